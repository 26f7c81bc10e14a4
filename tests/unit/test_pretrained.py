"What a method learned as a folder and on a hub on this machine: whole, unchanged and nothing else, or refused by name."

import base64
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
from small_sets import bright_squares
from test_hub import COMMITS, ROOT, Hub

from zsad_nb.backbones.weights import WeightsError
from zsad_nb.core.settings import seed_everything
from zsad_nb.evaluation import pretrained
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.pretrained import (
    CARD,
    CONFIG,
    MODEL,
    PAPERS,
    from_pretrained,
    load_pretrained,
    numbers_of,
    push_to_hub,
    save_pretrained,
)
from zsad_nb.methods.base import MODULES, create, method_class, save

SIZE = 32


def stirred(seed=0, **parameters):
    seed_everything(seed)
    method = create("visualad", **{"image_size": SIZE, **parameters})
    with torch.no_grad():
        for p in method.learned().values():
            p.add_(0.1 * torch.randn_like(p))
    method.trained_on = ["visa/candle", "visa/pcb1"]
    method.fitted = dict(epochs=3, seed=7, chosen=dict(epoch=2, by="pixel_ap", judged=[0.1, 0.3, 0.2], images=12))
    return method


@pytest.fixture(scope="module")
def method():
    return stirred()


@pytest.fixture
def folder(method, tmp_path):
    return save_pretrained(method, tmp_path / "mine")


def same(a, b):
    return all(torch.equal(p, b.learned()[n]) for n, p in a.learned().items())


# ---- a folder
def test_there_and_back(method, folder):
    back = from_pretrained(folder)
    assert same(method, back) and back.trained_on == method.trained_on and back.fitted == method.fitted
    assert {path.name for path in folder.iterdir()} == {CARD, CONFIG, MODEL}
    config = json.loads((folder / CONFIG).read_text())
    assert config["checkpoint"]["backbones"]["backbone"]["hash"] == method.backbone.hash
    other = stirred(1)
    assert same(other, from_pretrained(save_pretrained(other, folder))), "a trained method that is there is replaced"


@pytest.mark.parametrize("name", [CONFIG, MODEL])
def test_every_changed_byte_is_refused(folder, name):
    content = (folder / name).read_bytes()
    places = [0, 9, len(content) // 3, len(content) // 2, len(content) - 1]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / name).write_bytes(changed)
        with pytest.raises(WeightsError, match=name):
            from_pretrained(folder)
    (folder / name).write_bytes(content + b" ")
    with pytest.raises(WeightsError, match=name):
        from_pretrained(folder)


def test_two_halves_of_different_methods(folder, tmp_path):
    other = save_pretrained(stirred(1), tmp_path / "other")
    (folder / MODEL).write_bytes((other / MODEL).read_bytes())
    with pytest.raises(WeightsError, match=f"{MODEL} of .* is not what was saved"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG, MODEL])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"has no {name}"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "model-2.safetensors"])
def test_a_foreign_file(method, folder, name, monkeypatch):
    (folder / name).write_bytes(b"")
    monkeypatch.setattr(pretrained, "load", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(WeightsError, match=f"holds {name}, which does not belong"):
        from_pretrained(folder)
    with pytest.raises(WeightsError, match=f"holds {name}"):
        save_pretrained(method, folder)


def test_the_card_may_be_edited_and_hidden_files_may_be_there(method, folder):
    (folder / CARD).write_text("mine")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert same(method, from_pretrained(folder))


def test_a_kill_leaves_no_half(method, folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "card", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(stirred(1), folder)
    with pytest.raises(WeightsError, match=f"has no {CONFIG}"):
        from_pretrained(folder)


def test_no_path_of_this_machine_is_written(tmp_path):
    "A tower from a file goes by the file's name; whoever loads it says where his copy is, and its hash decides."
    from safetensors.torch import save_file

    tower = create("visualad", backbone="vit-tiny16", weights="random:0", image_size=SIZE, taps=(1,)).backbone.tower
    path = tmp_path / "secret place" / "tower.safetensors"
    path.parent.mkdir()
    save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, path)
    method = stirred(backbone="vit-tiny16", weights=str(path), taps=(1,))
    folder = save_pretrained(method, tmp_path / "mine")
    assert method.p.weights == method.backbone.weights == str(path), "the method itself is as it was"
    for file in folder.iterdir():
        assert b"secret place" not in file.read_bytes(), file.name
    assert same(method, from_pretrained(folder, weights=str(path)))
    with pytest.raises(WeightsError, match="tower.safetensors"):
        from_pretrained(folder)


def test_what_cannot_be_handed_on(tmp_path):
    with pytest.raises(ValueError, match="self_distance learns nothing"):
        save_pretrained(create("self_distance", image_size=SIZE), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda folder: from_pretrained("nowhere at all"), "neither a folder that is there nor OWNER/NAME"),
        (lambda folder: from_pretrained("../up/model"), "neither a folder"),
        (lambda folder: from_pretrained(folder, "v1"), "is a folder, which has no revisions"),
        (lambda folder: load_pretrained("hub:a/b@"), "no revision behind the @"),
        (lambda folder: load_pretrained(f"hub:{folder}"), "OWNER/NAME on the hub"),
        (lambda folder: push_to_hub(None, "alone"), "OWNER/NAME on the hub"),
    ],
)
def test_what_is_no_name(folder, call, text):
    with pytest.raises(ValueError, match=text):
        call(folder)


# ---- the card
@pytest.fixture(scope="module")
def evaluations(method, tmp_path_factory):
    index = bright_squares(tmp_path_factory.mktemp("card"), 8)
    how = dict(size=SIZE, progress=False, workers=0)
    return [evaluate(stirred(seed), index, **how) for seed in (0, 1, 2)]


def test_the_card_says_what_it_is_worth(method, evaluations, tmp_path):
    folder = save_pretrained(method, tmp_path / "mine", {"mvtec": evaluations}, "cc-by-nc-4.0")
    text = (folder / CARD).read_text()
    values = [100 * each.mean["pixel_auroc"] for each in evaluations]
    row = next(line for line in text.splitlines() if "| pixel AUROC |" in line)
    assert f"| MVTec AD | pixel AUROC | {np.mean(values):.1f} | ± {np.std(values, ddof=1):.1f} (3 seeds) | ± " in row
    assert 'license: "cc-by-nc-4.0"' in text and text.startswith("---\n")
    assert "Trained on visa/candle, visa/pcb1." in text and "epochs 3" in text
    assert "Epoch 2 of 3 was chosen by pixel_ap on 12 images that were held out." in text
    assert f"| backbone | tiny-dino | pretrained | {method.backbone.hash} | {method.backbone.row.licence} |" in text
    assert PAPERS["visualad"] in text
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.to_dict()["tags"][-1] == "visualad", "the hub's own parser reads it"


def test_numbers_of_a_folder_and_of_one_seed(evaluations, tmp_path):
    evaluations[0].save(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(dict(seen=["visa/candle"])))
    stored = numbers_of(dict(visa=tmp_path))
    fresh = numbers_of(dict(visa=evaluations[0]))
    pd.testing.assert_frame_equal(stored.drop(columns="seen"), fresh.drop(columns="seen"), rtol=1e-9)
    assert stored["seen"].all() and not fresh["seen"].any() and stored["over_seeds"].isna().all()
    assert (stored["over_images"] >= 0).any() and len(numbers_of({})) == 0


def test_without_numbers_the_card_says_so(folder):
    text = (folder / CARD).read_text()
    assert "what it is worth is not known" in text and "was not stated by whoever saved them" in text


def test_every_method_that_learns_has_its_paper():
    learning = {name for name in MODULES if method_class(name).recipe}
    assert learning <= set(PAPERS), learning - set(PAPERS)


# ---- the hub
class Writable(Hub):
    "Takes commits, too, and lists files; what is pushed becomes the branch main."

    created: dict = {}

    def do_GET(self):
        if not self.path.startswith("/api/"):
            return super().do_GET()
        words = self.path.partition("?")[0].split("/")
        repo, rest = "/".join(words[3:5]), words[5:]
        if not (self.folder / "main" / repo).is_dir():
            return self.refuse(401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        branch = next((b for b, c in COMMITS.items() if revision in (b, c)), None)
        if branch is None or not (self.folder / branch / repo).is_dir():
            return self.refuse(404, "RevisionNotFound")
        files = sorted((self.folder / branch / repo).iterdir())
        if rest[:1] == ["tree"]:
            return self.say([dict(type="file", path=f.name, size=f.stat().st_size, oid="0" * 40) for f in files])
        self.say(dict(id=repo, sha=COMMITS[branch], siblings=[dict(rfilename=f.name) for f in files]))

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_mine":
            return self.refuse(401, "")
        if self.path == "/api/repos/create":
            asked = json.loads(text)
            repo = f"{asked['organization']}/{asked['name']}"
            self.created[repo] = asked
            (self.folder / "main" / repo).mkdir(parents=True, exist_ok=True)
            return self.say(dict(url=f"http://{self.headers['Host']}/{repo}", id=repo))
        if self.path == "/api/validate-yaml":
            return self.say(dict(errors=[], warnings=[]))
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(text)["files"]]
            return self.say(dict(files=files))
        for line in text.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = self.folder / "main" / repo / entry["value"]["path"]
                file.write_bytes(base64.b64decode(entry["value"]["content"]))
        url = f"http://{self.headers['Host']}/{repo}/commit/{COMMITS['main']}"
        self.say(dict(success=True, commitOid=COMMITS["main"], commitUrl=url, hookOutput=""))

    def say(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


SCRIPT = """
import json, os, sys
from pathlib import Path
from huggingface_hub import constants
from test_pretrained import same, stirred
from zsad_nb.evaluation.pretrained import CARD, CONFIG, MODEL, from_pretrained, load_pretrained, push_to_hub
import zsad_nb.evaluation.pretrained as module

served = Path(os.environ["SERVED"]) / "main" / "me" / "first"

def refused(function, *args, **options):
    try:
        function(*args, **options)
    except ValueError as error:
        return str(error)
    return "it was taken"

method = stirred()
word = push_to_hub(method, "me/first")
said = dict(word=word, files=sorted(f.name for f in served.iterdir()))
said["back"] = [same(method, load_pretrained(word)), same(method, from_pretrained("me/first", "main"))]
said["no repository"] = refused(load_pretrained, "hub:me/second")
said["no revision"] = refused(load_pretrained, "hub:me/first@v9")
content = (served / MODEL).read_bytes()
changed = bytearray(content)
changed[-1] ^= 1
(served / MODEL).write_bytes(changed)
home = Path(constants.HF_HUB_CACHE)
for blob in home.rglob("blobs/*"):
    blob.unlink()
said["changed"] = refused(from_pretrained, "me/first")
(served / MODEL).write_bytes(content)
for blob in home.rglob("blobs/*"):
    blob.unlink()
said["whole again"] = same(method, from_pretrained("me/first"))
(served / "pytorch_model.bin").write_bytes(b"pickle")
said["foreign"] = refused(from_pretrained, "me/first")
said["foreign, pushed"] = refused(push_to_hub, method, "me/first")
(served / "pytorch_model.bin").unlink()
(served / CONFIG).rename(served / ".config")
said["missing"] = refused(from_pretrained, "me/first")
(served / ".config").rename(served / CONFIG)
os.environ["HF_TOKEN"] = "hf_other"
said["not allowed"] = refused(push_to_hub, method, "me/third")
constants.HF_HUB_OFFLINE = True
said["offline"] = same(method, from_pretrained("me/first"))
said["offline, pushed"] = refused(push_to_hub, method, "me/first")
said["offline, not here"] = refused(from_pretrained, "me/other")
print(json.dumps(said))
"""


def test_a_hub_on_this_machine(tmp_path):
    "Pushed, pinned, read back, damaged, foreign, missing, offline: through the hub's own client."
    Writable.folder, Writable.faults, Writable.asked = tmp_path / "served", {}, []
    Writable.created = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Writable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}"
    keep = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("HF_")}
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "unit", ROOT / "tests" / "system"]
    env = keep | dict(
        PYTHONPATH=os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        HF_HOME=str(tmp_path / "home"),
        HF_ENDPOINT=hub,
        HF_TOKEN="hf_mine",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        SERVED=str(Writable.folder),
    )
    code = textwrap.dedent(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["word"] == f"hub:me/first@{COMMITS['main']}" and said["files"] == [CARD, CONFIG, MODEL]
    assert said["back"] == [True, True] and said["whole again"] and said["offline"]
    asked = Writable.created["me/first"]  # the client has said it in two ways
    assert asked.get("private") or asked.get("visibility") == "private", "public is a decision of its own"
    assert f"there is no me/second on the hub at {hub}" in said["no repository"]
    assert f"me/first on the hub at {hub} has no revision v9" in said["no revision"]
    assert f"{MODEL} of me/first on the hub at {hub} is not what was saved (SHA-256)" in said["changed"]
    assert "holds pytorch_model.bin" in said["foreign"] and "holds pytorch_model.bin" in said["foreign, pushed"]
    assert f"has no {CONFIG}" in said["missing"]
    assert "give a token that may do this" in said["not allowed"]
    assert "nothing was sent" in said["offline, pushed"] and "no copy of it is here" in said["offline, not here"]


def test_checkpoints_of_save_are_as_before(method, tmp_path):
    "The folder's checkpoint is the one of `save`, to the last byte, where no file of weights is named."
    folder = save_pretrained(method, tmp_path / "mine")
    assert (folder / MODEL).read_bytes() == save(method, tmp_path / "a.safetensors").read_bytes()
