"Checkpoints that lack something, hold too much, would run code, or were interrupted: refused by name, never half there."

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zsad_nb.backbones.towers import create_backbone
from zsad_nb.backbones.weights import WeightsError
from zsad_nb.core.files import write_atomically
from zsad_nb.methods.base import create, load, save
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.methods.visualad import VisualAD, export_released, import_released

ROOT = Path(__file__).parents[2]
TAPS, WIDTH, ANCHORS, ROWS = (2, 3, 5, 6), 192, 4, 1536


def small(**changes) -> VisualAD:
    return create("visualad", **{"weights": "random:0", "image_size": 64, **changes})


@pytest.fixture(scope="module")
def method() -> VisualAD:
    return small()


@pytest.fixture(scope="module")
def saved(method, tmp_path_factory) -> Path:
    return save(method, tmp_path_factory.mktemp("saved") / "ours.safetensors")


def header_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["zsad_nb"])


def rewritten(saved: Path, path: Path, tensors=lambda t: None, header=lambda h: h) -> Path:
    "A copy of a checkpoint with its tensors changed in place and its header replaced; header None: none at all."
    state = load_file(saved)
    head = header(header_of(saved))
    tensors(state)
    save_file(state, path, None if head is None else {"zsad_nb": head if isinstance(head, str) else json.dumps(head)})
    return path


def refused(call, *words: str) -> str:
    "The message of the WeightsError that `call` raises; it holds all words."
    with pytest.raises(WeightsError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- our own files


def test_round_trip(method, saved):
    method_again = load(saved)
    header = read_header(saved)
    for name, value in method.learned().items():
        assert torch.equal(method_again.learned()[name], value), name
    assert (
        method_again.p == method.p
        and header["method"] == "visualad"
        and header["backbones"]["backbone"]["hash"] == method.backbone.hash
    )
    assert not any(name.startswith("backbone") for name in load_file(saved)), "a checkpoint holds the learned part only"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("sca.tap_3.query.weight"), ["missing sca.tap_3.query.weight"]),
        (lambda t: [t.pop("tokens"), t.pop("saf.tap_6.3.bias")], ["missing tokens", "missing saf.tap_6.3.bias"]),
        (lambda t: t.update({"sca.tap_4.scale": torch.ones(1)}), ["unexpected sca.tap_4.scale"]),
        (lambda t: t.update(tokens=torch.ones(2, 7)), ["tokens is (2, 7), expected (2, 192)"]),
        (
            lambda t: t.update({"sca.tap_2.positions": torch.ones(1, 10, 192)}),
            ["sca.tap_2.positions is (1, 10, 192), expected (1, 1536, 192)"],
        ),
    ],
    ids=["missing", "two missing", "extra", "mis-shaped", "mis-shaped table"],
)
def test_key_that_does_not_fit_is_named(saved, tmp_path, change, words):
    path = rewritten(saved, tmp_path / "changed.safetensors", change)
    refused(lambda: load(path), "changed.safetensors", "visualad", *words)


def test_many_wrong_keys_are_counted_not_listed(saved, tmp_path):
    path = rewritten(
        saved, tmp_path / "changed.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith("sca.")]
    )
    assert re.search(r"and \d+ more", refused(lambda: load(path), "missing sca.tap_2.anchors"))


def test_a_failed_load_changes_nothing(saved, tmp_path):
    ours = small()
    path = tmp_path / "theirs.pth"
    before = {k: v.clone() for k, v in ours.learned().items()}
    state = released("current")
    state["cross_attn"].pop("layer_attentions.layer_6.out_proj.bias")
    torch.save(state, path)
    refused(lambda: import_released(ours, path))
    for name, value in ours.learned().items():
        assert torch.equal(value, before[name]), name


def test_no_header(saved, tmp_path):
    path = rewritten(saved, tmp_path / "bare.safetensors", header=lambda h: None)
    refused(lambda: load(path), "bare.safetensors", "header")


@pytest.mark.parametrize("header", ["{", "[]", "{}", "drop parameters", "drop backbones", "drop hash"])
def test_broken_header(saved, tmp_path, header):
    def change(head):
        if not header.startswith("drop"):
            return header
        word = header.split()[1]
        (head["backbones"]["backbone"] if word == "hash" else head).pop(word)
        return head

    path = rewritten(saved, tmp_path / "broken.safetensors", header=change)
    refused(lambda: load(path), "broken.safetensors")


@pytest.mark.parametrize("share", [0, 0.00001, 0.0001, 0.5, 0.999999])
def test_truncated(saved, tmp_path, share):
    content = saved.read_bytes()
    path = tmp_path / "short.safetensors"
    path.write_bytes(content[: int(len(content) * share)])
    refused(lambda: load(path), "short.safetensors")
    refused(lambda: import_released(small(), path), "short.safetensors")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        refused(lambda path=path: load(path), str(path))
        refused(lambda path=path: import_released(small(), path), str(path))


def test_wrong_backbone_weights(method, saved):
    other = create_backbone("tiny-dino", "random:1", 64)
    refused(
        lambda: load(saved, weights="random:1"), saved.name, method.backbone.hash, other.hash, "random:1", "tiny-dino"
    )


def test_unknown_names():
    with pytest.raises(TypeError, match=r"unknown parameter of visualad 'sigm'; did you mean sigma"):
        small(sigm=4)
    with pytest.raises(TypeError, match=r"'anchor'; did you mean anchors"):
        small(anchor=4)
    with pytest.raises(TypeError, match=r"'qqqq'; known: backbone, weights"):
        small(qqqq=4)
    with pytest.raises(ValueError, match=r"unknown method 'visualadd'; known: .*visualad"):
        create("visualadd")


def test_unknown_names_in_a_file(saved, tmp_path):
    with pytest.raises(TypeError, match="did you mean sigma"):
        load(saved, sigm=1.0)
    newer = rewritten(
        saved, tmp_path / "newer.safetensors", header=lambda h: {**h, "parameters": {**h["parameters"], "sigmas": 3}}
    )
    with pytest.raises(TypeError, match="'sigmas'; did you mean sigma"):
        load(newer)
    other = rewritten(saved, tmp_path / "other.safetensors", header=lambda h: {**h, "method": "visualadd"})
    with pytest.raises(ValueError, match="unknown method 'visualadd'"):
        load(other)


def test_weights_as_a_path_object(tmp_path):
    "A parameter that takes a file takes a Path, and its checkpoint loads again."
    save_file(
        {k: v.contiguous() for k, v in create_backbone("tiny-dino", "random:3").tower.state_dict().items()},
        tmp_path / "tower.safetensors",
    )
    ours = small(weights=tmp_path / "tower.safetensors")
    assert load(save(ours, tmp_path / "ours.safetensors")).backbone.hash == ours.backbone.hash


# ------------------------------------------------------------------------------------------------------- the authors' two layouts


def released(layout: str) -> dict:
    "Random tensors under the names of the authors' first (16 keys) or current (12 keys) trainer, written from the specification, section 10."
    g = torch.Generator().manual_seed(7)

    def t(*shape):
        return torch.randn(*shape, generator=g)

    sca = {
        "anchor_queries": (ANCHORS, WIDTH),
        "pos_encoding": (1, ROWS, WIDTH),
        "res_scale": (1,),
        **{f"{c}_proj.weight": (WIDTH, WIDTH) for c in "qkv"},
        **{f"{c}_norm.{p}": (WIDTH,) for c in "qk" for p in ("weight", "bias")},
        "gate.0.weight": (ANCHORS, WIDTH),
        "gate.0.bias": (ANCHORS,),
        "out_proj.weight": (WIDTH, WIDTH),
        "out_proj.bias": (WIDTH,),
    }
    saf = {
        "mlp.0.weight": (WIDTH, WIDTH),
        "mlp.0.bias": (WIDTH,),
        "mlp.3.weight": (WIDTH, WIDTH),
        "mlp.3.bias": (WIDTH,),
    }
    state = dict(
        anomaly_token=t(WIDTH),
        normal_token=t(WIDTH),
        ln_post_weight=t(WIDTH),
        ln_post_bias=t(WIDTH),
        layer_transforms={f"layer_{tap}": {k: t(*s) for k, s in saf.items()} for tap in TAPS},
        cross_attn={f"layer_attentions.layer_{tap}.{k}": t(*s) for tap in TAPS for k, s in sca.items()},
        cross_attn_config=dict(num_anchors=ANCHORS, dropout=0.1, res_scale_init=0.01, apply_to_layer24=True),
        transform_type="mlp",
        features_list=list(TAPS),
        image_size=64,
        epoch=1,
        backbone="ViT-L/14@336px",
    )
    if layout == "first":
        state |= dict(
            transform_config=dict(dropout=0.1, mlp_hidden_ratio=1.0), token_insert_layer=0, proj=None, use_1024_dim=True
        )
    return state


def flat(state: dict, prefix="") -> dict:
    out = {}
    for key, value in state.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        elif torch.is_tensor(value):
            out[prefix + key] = value
    return out


@pytest.mark.parametrize("layout, keys", [("first", 16), ("current", 12)])
def test_released_layouts_load_completely(tmp_path, layout, keys):
    state = released(layout)
    assert len(state) == keys
    torch.save(state, tmp_path / "CLIP.pth")
    ours = import_released(small(ln_post="trained"), tmp_path / "CLIP.pth")
    back = flat(export_released(ours))
    theirs = flat(state)
    assert set(back) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(back[name], value), name
    assert sum(v.numel() for v in theirs.values()) == sum(p.numel() for p in ours.learned().values())
    assert torch.equal(ours.tokens[0], state["anomaly_token"]) and torch.equal(
        ours.norm_weight, state["ln_post_weight"]
    )


def test_released_variants(tmp_path):
    "Tokens with a leading axis, the same names in safetensors, the final norm left out or not trained at all."
    state = released("first")
    torch.save(
        {**state, "anomaly_token": state["anomaly_token"][None], "normal_token": state["normal_token"][None]},
        tmp_path / "axis.pth",
    )
    save_file(flat(state), tmp_path / "flat.safetensors")
    first = import_released(small(), tmp_path / "axis.pth")
    for name, value in import_released(small(), tmp_path / "flat.safetensors").learned().items():
        assert torch.equal(value, first.learned()[name]), name
    ours = small()
    norm = ours.norm_weight.clone()
    assert torch.equal(import_released(ours, tmp_path / "axis.pth", ln_post=False).norm_weight, norm)
    assert "norm_weight" not in import_released(small(ln_post="frozen"), tmp_path / "axis.pth").learned()


def test_export_is_read_by_import(method, tmp_path):
    torch.save(export_released(method), tmp_path / "export.pth")
    for name, value in import_released(small(), tmp_path / "export.pth").learned().items():
        assert torch.equal(value, method.learned()[name]), name


@pytest.mark.parametrize("layout", ["first", "current"])
@pytest.mark.parametrize(
    "change, either",
    [
        (
            lambda s: s["cross_attn"].pop("layer_attentions.layer_5.q_proj.weight"),
            ("layer_5.q_proj.weight", "sca.tap_5.query.weight"),
        ),
        (lambda s: s["layer_transforms"]["layer_2"].pop("mlp.3.bias"), ("layer_2.mlp.3.bias", "saf.tap_2.3.bias")),
        (lambda s: s.pop("anomaly_token"), ("anomaly_token",)),
        (lambda s: s.pop("ln_post_bias"), ("ln_post_bias", "norm_bias")),
        (lambda s: s["cross_attn"].update({"layer_attentions.layer_5.bogus": torch.ones(3)}), ("layer_5.bogus",)),
        (lambda s: s["layer_transforms"].update(layer_4={"mlp.0.bias": torch.ones(WIDTH)}), ("layer_4.mlp.0.bias",)),
        (
            lambda s: s["cross_attn"].update({"layer_attentions.layer_6.gate.0.weight": torch.ones(8, WIDTH)}),
            ("layer_6.gate.0.weight", "sca.tap_6.gate.weight"),
        ),
        (
            lambda s: s["layer_transforms"]["layer_3"].update({"mlp.0.weight": torch.ones(7, 7)}),
            ("layer_3.mlp.0.weight", "saf.tap_3.0.weight"),
        ),
        (lambda s: s.update(anomaly_token=torch.ones(768), normal_token=torch.ones(768)), ("token",)),
        (lambda s: s.update(anomaly_token=torch.ones(768)), ("anomaly_token", "tokens")),
        (lambda s: s.update(normal_token=torch.ones(3)), ("normal_token", "tokens")),
    ],
    ids=[
        "missing SCA",
        "missing SAF",
        "missing token",
        "missing norm",
        "extra SCA",
        "extra SAF",
        "mis-shaped SCA",
        "mis-shaped SAF",
        "both tokens mis-shaped",
        "anomaly token mis-shaped",
        "normal token mis-shaped",
    ],
)
def test_released_inner_key_is_named(tmp_path, layout, change, either):
    state = released(layout)
    path = tmp_path / "CLIP.pth"
    change(state)
    torch.save(state, path)
    message = refused(lambda: import_released(small(), path), "CLIP.pth")
    assert any(name in message for name in either), f"none of {either} in: {message}"


def test_released_taps_must_agree(tmp_path):
    torch.save({**released("current"), "features_list": [6, 12, 18, 24]}, tmp_path / "CLIP.pth")
    refused(
        lambda: import_released(small(), tmp_path / "CLIP.pth"), "(6, 12, 18, 24)", str(TAPS), "taps=(6, 12, 18, 24)"
    )


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.ones(3), "text", {}, {"state_dict": {}}, {1: torch.ones(1)}, None],
    ids=["list", "tensor", "text", "empty", "empty inside", "numbered", "none"],
)
def test_a_file_that_holds_something_else(tmp_path, content):
    path = tmp_path / "something.pt"
    torch.save(content, path)
    refused(lambda: import_released(small(), path), "something.pt")
    refused(lambda: small(backbone="vit", weights=str(path)))
    refused(lambda: load(path), "something.pt")


def test_text_is_not_weights(tmp_path):
    for name in ("note.pth", "note.safetensors"):
        (tmp_path / name).write_text("these are not the weights you are looking for")
        refused(lambda name=name: import_released(small(), tmp_path / name), name)
        refused(lambda name=name: small(weights=str(tmp_path / name)), name)


# ------------------------------------------------------------------------------------------------------------ files with code in them


class Trap:
    "Unpickling it writes a file."

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path.write_text, (Path(self.marker), "the code ran"))


TRAPS = {
    "zip.pth": lambda p, o: torch.save(o, p),
    "old.pth": lambda p, o: torch.save(o, p, _use_new_zipfile_serialization=False),
    "zip.safetensors": lambda p, o: torch.save(o, p),
    "raw.safetensors": lambda p, o: p.write_bytes(pickle.dumps(o)),
    **{f"raw{n}.pkl": lambda p, o, n=n: p.write_bytes(pickle.dumps(o, protocol=n)) for n in (0, 2, 4)},
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", TRAPS)
def test_pickle_with_code_is_refused_and_not_run(saved, tmp_path, name):
    path = tmp_path / name
    marker = tmp_path / "marker"
    TRAPS[name](path, {"anomaly_token": Trap(marker), "state_dict": {"visual.conv1.weight": Trap(marker)}})
    doors = [
        lambda: import_released(small(), path),
        lambda: load(path),
        lambda: read_header(path),
        lambda: load(saved, weights=str(path)),
        *(lambda b=b: small(backbone=b, weights=str(path)) for b in ("vit", "clip", "vit-tiny16", "tiny-dino")),
    ]
    for door in doors:
        message = refused(door, name)
        assert not marker.exists(), f"{name}: code from the file was run"
        assert "weights_only" not in message, f"the message shows how to run the code: {message}"


def test_the_trap_works(tmp_path):
    "Otherwise the test above shows nothing."
    pickle.loads(pickle.dumps(Trap(tmp_path / "marker")))
    assert (tmp_path / "marker").read_text() == "the code ran"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [n for n in TRAPS if n.endswith((".pth", "2.pkl", "4.pkl"))])
def test_refusal_says_why(tmp_path, name):
    TRAPS[name](tmp_path / name, {"anomaly_token": Trap(tmp_path / "marker")})
    refused(lambda: import_released(small(), tmp_path / name), "refused", "run code", "safetensors")


def test_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    refused(lambda: small(backbone="vit", weights=str(tmp_path / "module.pt")), "module.pt", "refused")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_torchscript_is_refused_with_the_cure(tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    for door in (lambda: small(backbone="clip", weights=str(path)), lambda: import_released(small(), path)):
        message = refused(door, "ViT-L-14.pt", "TorchScript", "torch.jit.load", "torch.save", "state_dict()")
    cure = re.search(r"torch\.save\(.*\)", message)[0]
    here = os.getcwd()
    try:  # the cure is a line of Python that works as it stands, beside the file
        os.chdir(tmp_path)
        exec(cure, {"torch": torch})
    finally:
        os.chdir(here)
    assert set(torch.load(tmp_path / "clip.pt", weights_only=True)) == {"weight", "bias"}


# ---------------------------------------------------------------------------------------------------------- writing that is interrupted


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("old", [False, True], ids=["new file", "over an old file"])
def test_disk_full_while_writing(tmp_path, old):
    path = tmp_path / "file.bin"
    if old:
        path.write_bytes(b"old")

    def write(p):
        p.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"file\.bin was not written .*Free some space") as caught:
        write_atomically(path, write)
    assert caught.value.errno == errno.ENOSPC
    assert leftovers(tmp_path) == (["file.bin"] if old else []) and (not old or path.read_bytes() == b"old")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_disk_full_at_the_last_moment(method, saved, tmp_path, monkeypatch, where):
    "File systems that allocate late report a full disk when the file is flushed."
    path = tmp_path / "ours.safetensors"
    path.write_bytes(saved.read_bytes())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(OSError, match="was not written"):
            save(method, path)
        with pytest.raises(OSError, match="was not written"):
            save(method, tmp_path / "another.safetensors")
    assert leftovers(tmp_path) == ["ours.safetensors"] and path.read_bytes() == saved.read_bytes()
    save(method, path)
    assert load(path).p == method.p


def test_any_other_error_leaves_nothing_either(tmp_path):
    for error in (KeyboardInterrupt, RuntimeError):

        def write(p, error=error):
            p.write_bytes(b"half")
            raise error("stop")

        with pytest.raises(error):
            write_atomically(tmp_path / "file.bin", write)
        assert leftovers(tmp_path) == []


def python(code: str, *arguments, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture(scope="module")
def no_room(saved, tmp_path_factory) -> tuple:
    "Folder and messages of two saves, over an old file and under a new name, in a process that may not write more than 100 kB."
    pytest.importorskip("resource", reason="file size limits exist on POSIX only")
    folder = tmp_path_factory.mktemp("no_room")
    (folder / "old.safetensors").write_bytes(saved.read_bytes())
    process = python(
        """
        import resource, sys
        from pathlib import Path
        from zsad_nb.methods.base import save
        from zsad_nb.methods import visualad
        from zsad_nb.methods.base import create
        method = create("visualad", weights="random:0", image_size=64)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        for name in ("old", "new"):
            try: save(method, Path(sys.argv[1]) / f"{name}.safetensors")
            except Exception as error: print(type(error).__name__, " ".join(str(error).split()))
            else: print("no error")
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        save(method, Path(sys.argv[1]) / "again.safetensors")
        """,
        folder,
    )
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return folder, out.splitlines()


@pytest.mark.slow
def test_no_room_leaves_the_old_file_or_nothing(saved, no_room):
    folder, messages = no_room
    assert len(messages) == 2 and "no error" not in messages
    assert leftovers(folder) == ["again.safetensors", "old.safetensors"]
    assert (folder / "old.safetensors").read_bytes() == saved.read_bytes()
    assert load(folder / "again.safetensors").name == "visualad"


def test_no_room_says_which_file_and_what_to_do(no_room):
    for name, message in zip(("old", "new"), no_room[1]):
        assert f"{name}.safetensors was not written" in message and "Free some space" in message, message


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL exists on POSIX only")
def test_killed_while_writing(method, saved, tmp_path):
    "SIGKILL half-way through two saves: under the final names are the complete old file, and nothing; the next saves work."
    old = tmp_path / "old.safetensors"
    new = tmp_path / "new.safetensors"
    old.write_bytes(saved.read_bytes())
    process = python(
        """
        import sys, threading, time
        from zsad_nb.methods import base
        from zsad_nb.core.files import write_atomically
        from zsad_nb.methods import visualad
        def slowly(path, write):
            def half(temporary):
                write(temporary)
                data = temporary.read_bytes()
                with open(temporary, "wb") as file:
                    file.write(data[:len(data) // 2])
                    file.flush()
                    print(f"half {temporary}\\n", end="", flush=True)
                    time.sleep(60)
            return write_atomically(path, half)
        base.write_atomically = slowly
        method = base.create("visualad", weights="random:0", image_size=64)
        for path in sys.argv[1:]: threading.Thread(target=base.save, args=(method, path)).start()
        """,
        old,
        new,
    )
    said = [process.stdout.readline().split() for _ in range(2)]
    assert [words[:1] for words in said] == [["half"], ["half"]], process.communicate()[1]
    halves = [Path(words[1]) for words in said]
    for half in halves:
        assert half.stat().st_size == saved.stat().st_size // 2, "the writer was not in the middle of it"
        assert half.parent == tmp_path, "another folder may be another disk, where a rename is a copy"
    process.kill()
    process.communicate()
    assert old.read_bytes() == saved.read_bytes() and not new.exists()
    assert [n for n in leftovers(tmp_path) if n.endswith(".safetensors")] == ["old.safetensors"], (
        "what a kill leaves behind must not look like a checkpoint"
    )
    for path in (old, new):
        save(method, path)
        assert torch.equal(load(path).tokens, method.tokens)


def test_a_checkpoint_keeps_its_engine_and_its_training(tmp_path):
    "What the frozen features were computed with, and what the learned part was fitted with, are of the checkpoint; a caller's word counts."
    model = create("visualad", weights="random:0", image_size=64, engine="torch", precision="bf16")
    model.fitted = dict(seed=7, size=64, precision="fp32")
    path = save(model, tmp_path / "a.safetensors")
    assert (
        load(path).engine.precision == "bf16"
        and load(path).fitted == model.fitted
        and read_header(path)["engine"] == dict(engine="torch", precision="bf16")
    )
    assert (
        load(path, engine="torch").engine is None
        and load(save(load(path, engine="torch"), tmp_path / "b.safetensors")).engine is None
    )
