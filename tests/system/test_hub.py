"""The real loading path: a hub on this machine (HF_ENDPOINT) that serves every row of the table and each family.

Real: names of repositories and files, layout of the cache, HTTP headers and error codes of the hub, names of every
tensor (those of the library's own whole model, text tower and classifier included), the hub's own client.
Reduced: one block, a width of 64 and random values, so that a file has a few megabytes.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMITS = {"main": "c" * 40, "v1": "1" * 40}
FAMILIES = (
    "timm:vit_base_patch16_siglip_224.v2_webli",
    "timm:vit_pe_core_tiny_patch16_384.fb",
    "timm:eva02_tiny_patch14_224.mim_in22k",
    "timm:vit_7b_patch16_dinov3.lvd1689m",
    "timm:beit_base_patch16_224.in22k_ft_in22k",
    "timm:aimv2_large_patch14_224.apple_pt",
    "open_clip:ViT-B-16/metaclip_400m",
    "open_clip:ViT-B-16-SigLIP2/webli",
    "open_clip:PE-Core-T-16-384/meta",
    "open_clip:EVA02-B-16/merged2b_s8b_b131k",
    "open_clip:ViT-B-16/dfn2b",  # a repository with a pickle of its own name
)


class Hub(BaseHTTPRequestHandler):
    "Files under `folder`/REVISION/OWNER/NAME, with what the hub says of them; `faults` by repository."

    folder: Path
    faults: dict = {}
    asked: list = []

    def do_HEAD(self, body=False):
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        fault = self.faults.get(repo, "")
        self.asked.append(f"{self.command} {repo} {file}")
        if not rest:
            return self.refuse(404, "")
        if fault in ("gated", "gated, with a token"):
            return self.refuse(401 if fault == "gated" else 403, "GatedRepo")
        if fault == "down":
            return self.refuse(503, "")
        names = {**COMMITS, **{c: c for c in COMMITS.values()}}
        if not any((self.folder / r / repo).is_dir() for r in COMMITS):
            return self.refuse(401, "RepoNotFound")
        if revision not in names:
            return self.refuse(404, "RevisionNotFound")
        branch = next(r for r, c in COMMITS.items() if c == names[revision])
        path = self.folder / branch / repo / file
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", names[revision])
        content = path.read_bytes()
        return self.answer(content, names[revision], fault, body)

    def answer(self, content, commit, fault, body):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        if fault == "damaged":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "broken off" or (fault == "once broken off" and not start):
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[start:])

    def do_GET(self):
        self.do_HEAD(True)

    def do_POST(self):  # the tests' own: {repository: fault}
        self.faults.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        said = json.dumps(self.asked).encode()
        self.asked.clear()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def refuse(self, status, code, commit=None):
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Repo-Commit", commit), ("Content-Length", "0")):
            if value:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


PRELUDE = """
import json, os, sys, torch, urllib.request
from pathlib import Path
from safetensors.torch import save_file
import huggingface_hub.file_download
from huggingface_hub import constants
from zsad_nb.backbones.table import BACKBONES, backbone_row, read_weights
from zsad_nb.backbones.text import create_text, require_clip_text
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.backbones.weights import WeightsError, hub_file, import_vision_libraries

timm, open_clip = import_vision_libraries()
huggingface_hub.file_download.time.sleep = lambda seconds: None
huggingface_hub.utils._http.time.sleep = lambda seconds: None
constants.DOWNLOAD_CHUNK_SIZE = 1000  # of small files too, something arrives before the connection breaks
served = Path(os.environ["SERVED"])
whole = timm.create_model
listed = open_clip.get_model_config

def small(*args, **options):
    return whole(*args, **{**options, "depth": 1, "embed_dim": 64, "num_heads": 1})

def small_config(name):
    config = listed(name)
    if config:
        config["embed_dim"] = 32
        config["vision_cfg"] |= {} if "timm_model_name" in config["vision_cfg"] else dict(layers=1, width=64, head_width=64)
        config["text_cfg"] |= dict(layers=1, width=64, heads=1)
    return config

timm.create_model = small
open_clip.get_model_config = open_clip.factory.get_model_config = small_config

def tower(name, weights="pretrained", size=32):
    return create_backbone(name, weights, size, (1,))

def serve(row, revision="main", seed=0, file=None):
    "The library's own whole model of a row, with every tensor random, where the hub finds it."
    torch.manual_seed(seed)
    if row.library == "timm":
        model = whole(row.model, pretrained=False, depth=1, embed_dim=64, num_heads=1)
    else:
        model = open_clip.create_model(row.model, pretrained=None, load_weights=False)
    state = {k: torch.randn(v.shape).mul(0.02).half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    names = dict(timm="model.safetensors", open_clip="open_clip_model.safetensors")
    path = served / revision / row.hub / (file or names[row.library])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return state

def hub(**faults):
    "Change what goes wrong at a repository; what the hub was asked since the last time."
    request = urllib.request.Request(constants.ENDPOINT, json.dumps(faults).encode(), method="POST")
    return json.loads(urllib.request.urlopen(request).read())

def refused(function, *args, **options):
    try:
        function(*args, **options)
    except (WeightsError, ValueError) as error:
        return " ".join(str(error).split())
    return "it was taken"
"""


@pytest.fixture
def on_the_hub(tmp_path):
    "Run code beside a hub; what it prints last is JSON."
    Hub.folder, Hub.faults, Hub.asked = tmp_path / "served", {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    keep = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("HF_")}
    env = keep | dict(
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        HF_HOME=str(tmp_path / "home"),
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        SERVED=str(Hub.folder),
    )

    def run(code, **more):
        script = PRELUDE + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script], env=env | more, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    yield run
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_every_row_and_family_loads(on_the_hub):
    "First from the hub, then from the cache; every tensor is the one that was served, and the commit is known."
    said = on_the_hub(
        f"""
        said = {{}}
        for name in [n for n, row in BACKBONES.items() if row.model] + list({FAMILIES!r}):
            row = backbone_row(name)
            state = serve(row, file=row.file or None)
            size = 2 * row.patch
            hub()
            first = tower(name, size=size)
            gets = [a for a in hub() if a.startswith("GET")]
            again = tower(name, size=size)
            text = None
            if row.library == "open_clip":
                try: require_clip_text(row)
                except ValueError as error: text = str(error)
                else: text = create_text(name)
            prefixes = ("", "visual.", "visual.trunk.")
            own = first.tower.state_dict()
            same = {{k: any(torch.equal(v, state[p + k].float()) for p in prefixes if p + k in state) for k, v in own.items()}}
            if text is not None and not isinstance(text, str):
                mine = text.tower.state_dict()
                same |= {{"text " + k: torch.equal(v, state["text." + k if "text." + k in state else k].float()) for k, v in mine.items()}}
                text = text.commit
            said[name] = dict(
                gets=gets, later=hub(), commits=[first.commit, again.commit], hashes=[first.hash, again.hash],
                other=[k for k, equal in same.items() if not equal], text=text, identity=first.identity,
            )
        print(json.dumps(said))
        """
    )
    assert len(said) == 16 + len(FAMILIES)
    for name, row in said.items():
        assert len(row["gets"]) == 1, (name, row["gets"])
        assert row["later"] == [], f"{name}: the second time nothing is asked"
        assert row["commits"] == [COMMITS["main"]] * 2 and len(set(row["hashes"])) == 1
        assert row["other"] == [], f"{name}: not the tensors that were served"
        assert row["identity"].endswith("@" + COMMITS["main"]) and row["hashes"][0] in row["identity"]
    words = {name: row["text"] for name, row in said.items() if row["text"]}
    assert all(
        words[n] == COMMITS["main"] for n in ("clip-vitl14-336", "clip-vitb32", "open_clip:ViT-B-16/metaclip_400m")
    )
    assert words["open_clip:PE-Core-T-16-384/meta"] == COMMITS["main"]
    assert (
        "reads the words of timm/ViT-B-16-SigLIP2, not CLIP's byte pairs" in words["open_clip:ViT-B-16-SigLIP2/webli"]
    )


@pytest.mark.slow
def test_what_goes_wrong_is_told_apart(on_the_hub):
    said = on_the_hub(
        """
        row = backbone_row("vit-tiny16")
        repo, file = row.hub, "model.safetensors"
        load = lambda weights="pretrained": tower("vit-tiny16", weights)
        said = {"no repository": refused(load)}
        serve(row)
        for fault in ("down", "broken off", "damaged"):
            hub(**{repo: fault})
            said[fault] = refused(load)
        said["left"] = [p.name for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.is_file() and p.stat().st_size > 1000]
        constants.HF_HUB_OFFLINE = True
        said["offline"] = refused(load)
        constants.HF_HUB_OFFLINE = False
        said["no revision"] = refused(load, "pretrained@v9")
        said["no file"] = refused(hub_file, repo, "other.safetensors")
        endpoint, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
        said["unreachable"] = refused(load)
        constants.ENDPOINT = endpoint
        hub(**{repo: "once broken off"})
        said["resumed"] = load().commit
        constants.HF_HUB_OFFLINE = True
        said["offline, cached"] = load().commit
        constants.HF_HUB_OFFLINE = False
        copy = hub_file(repo, file)
        content = copy.read_bytes()
        copy.resolve().write_bytes(content[:-100])
        said["cut off later"] = refused(load)
        said["copy"] = str(copy)
        dino = backbone_row("dinov3-vits16")
        hub(**{dino.hub: "gated"})
        said["gated"] = refused(tower, "dinov3-vits16")
        os.environ["HF_TOKEN"] = "hf_" + "x" * 34
        hub(**{dino.hub: "gated, with a token"})
        said["gated, with a token"] = refused(tower, "dinov3-vits16")
        said["endpoint"] = endpoint
        print(json.dumps(said))
        """
    )
    hub = said["endpoint"]
    assert f"the hub at {hub} has no repository timm/vit_tiny_patch16_224.augreg" in said["no repository"]
    assert f"the hub at {hub} answered 503 when asked for timm/vit_tiny" in said["down"]
    assert "broke off" in said["broken off"] and "repeat: nothing half-done is kept" in said["broken off"]
    assert "was damaged on its way: its SHA-256 is" in said["damaged"] and "deleted again" in said["damaged"]
    assert said["left"] == []
    assert said["offline"].startswith("HF_HUB_OFFLINE is set and timm/vit_tiny")
    assert "has no revision v9" in said["no revision"] and "/commits/main" in said["no revision"]
    assert "has no file other.safetensors" in said["no file"]
    assert "the hub at http://127.0.0.1:9 cannot be reached" in said["unreachable"] and "connect" in said["unreachable"]
    assert said["resumed"] == said["offline, cached"] == COMMITS["main"]
    assert (
        "in the hub's cache" in said["cut off later"] and f"delete {said['copy']} and repeat" in said["cut off later"]
    )
    for word in (
        f"{hub}/timm/vit_small_patch16_dinov3.lvd1689m is gated (401)",
        "DINOv3 licence",
        "hf auth login",
        "HF_TOKEN",
    ):
        assert word in said["gated"], said["gated"]
    for word in (
        "is gated, and the account of your access token is not let in (403)",
        "accept the licence (DINOv3 licence)",
    ):
        assert word in said["gated, with a token"]
    messages = [
        v for k, v in said.items() if isinstance(v, str) and k not in ("endpoint", "copy", "resumed", "offline, cached")
    ]
    assert len({m[:60] for m in messages}) >= 9, "different faults, different words"


@pytest.mark.slow
def test_a_revision_is_pinned_and_recorded(on_the_hub, tmp_path):
    "pretrained@REVISION takes that commit for ever; the commit stands in checkpoints beside the hash."
    said = on_the_hub(
        f"""
        import zsad_nb
        from zsad_nb.methods.checkpoint_files import read_header
        row = backbone_row("vit-tiny16")
        serve(row, "main", 0)
        serve(row, "v1", 1)
        towers = {{w: tower("vit-tiny16", w) for w in ("pretrained", "pretrained@v1", "pretrained@{"1" * 40}")}}
        method = zsad_nb.create("visualad", backbone="vit-tiny16", weights="pretrained@v1", image_size=32, taps=(1,))
        path = zsad_nb.methods.base.save(method, {str(tmp_path / "a.safetensors")!r})
        loaded = zsad_nb.methods.base.load(path)
        bin = backbone_row("open_clip:ViT-B-32/laion2b_s34b_b79k")
        serve(bin, file="open_clip_pytorch_model.bin")
        pickle = tower(bin.name, size=64)
        print(json.dumps(dict(
            commits=[t.commit for t in towers.values()], hashes=[t.hash for t in towers.values()],
            header=read_header(path)["backbones"]["backbone"], loaded=loaded.backbone.commit, pickle=pickle.commit,
            embedded=refused(tower, "tiny-dino", "pretrained@v1"), wrong=refused(tower, "vit-tiny16", "pretrained@a b"),
        )))
        """
    )
    assert said["commits"] == [COMMITS["main"], COMMITS["v1"], COMMITS["v1"]]
    assert said["hashes"][0] != said["hashes"][1] == said["hashes"][2]
    assert said["header"]["commit"] == said["loaded"] == COMMITS["v1"] and said["header"]["weights"] == "pretrained@v1"
    assert said["pickle"] == COMMITS["main"]
    assert "it has no revisions" in said["embedded"] and "pretrained@REVISION" in said["wrong"]
