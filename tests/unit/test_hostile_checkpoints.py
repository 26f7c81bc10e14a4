"Checkpoints from elsewhere, damaged or odd: every bit of what was learned is held against a hash, and a header asks for nothing beyond bounds."

import copy
import json
import pickle
import struct
import warnings
import zipfile
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from zsad_nb.backbones.weights import (
    HEADER_MB,
    WeightsError,
    bare_names,
    fitted,
    flat_state,
    read_state,
    released_state,
    require_finite,
    require_plain,
    vit_shapes,
)
from zsad_nb.core.parameters import ENTRIES, ParameterSet, param
from zsad_nb.methods.april_gan import released_names
from zsad_nb.methods.base import METHODS, Method, create, import_released, load, method_class, register, save
from zsad_nb.methods.checkpoint_files import read_header


@dataclass(frozen=True)
class SmallParameters(ParameterSet):
    hidden: int = param(4, "test")
    image_size: int | None = param(None, "test")
    gain: float = param(1.0, "test")
    norm: bool = param(True, "test")
    taps: tuple | None = param(None, "test")
    types: tuple | str | None = param(None, "test")
    word: str = param("x", "test")
    weights: str = param("pretrained", "test")
    seed: int = param(0, "test", "", "0 or more")
    kind: str = param("a", "test", "", ("a", "b"))


class Small(Method):
    "Two learned tensors and no tower: quick."

    name = "small-test"
    Parameters = SmallParameters

    def __init__(self, parameters):
        super().__init__(parameters)
        self.weight = nn.Parameter(torch.randn(parameters.hidden, 3))
        self.scale = nn.Parameter(torch.tensor(0.5))


@pytest.fixture(autouse=True)
def registered():
    register(Small)
    yield
    del METHODS["small-test"]


@pytest.fixture
def saved(tmp_path):
    return save(create("small-test"), tmp_path / "ours.safetensors")


def rewritten(saved, path, tensors=lambda t: None, header=lambda h: None, keep=True):
    "A copy with tensors and header changed in place."
    state = load_file(saved)
    head = read_header(saved)
    tensors(state)
    header(head)
    save_file(state, path, {"zsad_nb": json.dumps(head)})
    return path


# ---- every bit
def test_every_flipped_bit_is_found(saved, tmp_path):
    "One bit in each byte of the tensors, in turn; the message names the tensor."
    content = saved.read_bytes()
    path = tmp_path / "bit.safetensors"
    length = struct.unpack("<Q", content[:8])[0]
    table = {k: v["data_offsets"] for k, v in json.loads(content[8 : 8 + length]).items() if k != "__metadata__"}
    for at in range(8 + length, len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        name = next(k for k, (a, b) in table.items() if a <= at - 8 - length < b)
        with pytest.raises(WeightsError, match=rf"bit\.safetensors.*\b{name}\b"):
            load(path)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
def test_a_damaged_byte_anywhere_is_an_error_or_changes_no_tensor(tmp_path_factory, at, byte):
    register(Small)
    room = tmp_path_factory.mktemp("any")
    ours = create("small-test")
    content = bytearray(save(ours, room / "a.safetensors").read_bytes())
    content[int(at * len(content))] ^= byte
    (room / "a.safetensors").write_bytes(content)
    try:
        again = load(room / "a.safetensors")
    except (ValueError, TypeError) as error:
        assert "a.safetensors" in str(error)
    else:  # in a word of the header that no tensor depends on
        for name, value in ours.learned().items():
            assert torch.equal(again.learned()[name], value)


KINDS = {
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int": torch.int32,
    "long": torch.int64,
    "byte": torch.uint8,
    "bool": torch.bool,
    "complex": torch.complex64,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hashes", [True, False], ids=["with hashes", "of an earlier version"])
def test_other_types(saved, tmp_path, kind, hashes):
    "With hashes nothing but what was saved; without, floats of any width become float32, everything else is refused by name."
    path = rewritten(
        saved,
        tmp_path / "other.safetensors",
        lambda t: t.update(weight=t["weight"].to(KINDS[kind])),
        lambda h: None if hashes else h.pop("tensors"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hashes or not KINDS[kind].is_floating_point:
            with pytest.raises(WeightsError, match=r"other\.safetensors.*weight"):
                load(path)
        else:
            assert torch.equal(load(path).weight, load_file(path)["weight"].float())


VALUES = {
    "nan": lambda t: t.fill_(float("nan")),
    "one nan": lambda t: t[1, 1].fill_(float("nan")),
    "infinite": lambda t: t[0, 0].fill_(float("inf")),
    "minus infinite": lambda t: t[0, 0].fill_(-float("inf")),
}


@pytest.mark.parametrize("what", VALUES)
def test_values_that_are_no_numbers(saved, tmp_path, what):
    "Refused when written and when read, with hashes that agree."
    method = create("small-test")
    VALUES[what](method.weight.data)
    with pytest.raises(WeightsError, match=r"bad\.safetensors.*NaN or infinite values in weight"):
        save(method, tmp_path / "bad.safetensors")
    assert not (tmp_path / "bad.safetensors").exists()
    path = rewritten(
        saved, tmp_path / "read.safetensors", lambda t: VALUES[what](t["weight"]), lambda h: h.pop("tensors")
    )
    with pytest.raises(WeightsError, match=r"read\.safetensors.*NaN or infinite values in weight"):
        load(path)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0, 3),
        torch.zeros(4, 3, dtype=torch.long),
        torch.zeros(4, 3, dtype=torch.complex64),
        torch.zeros(4, 3, device="meta"),
        torch.zeros(4, 3).to_sparse(),
    ],
    ids=["no values", "whole numbers", "complex", "meta", "sparse"],
)
def test_what_nothing_can_have_learned_is_not_saved(tmp_path, value):
    method = create("small-test")
    method.weight = nn.Parameter(value, requires_grad=False)
    with pytest.raises(WeightsError, match="weight"):
        save(method, tmp_path / "bad.safetensors")
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_saved(tmp_path):
    method = create("small-test")
    both = torch.randn(2, 4, 3)
    method.weight = nn.Parameter(both[0])
    method.other = nn.Parameter(both[1])
    assert set(load_file(save(method, tmp_path / "shared.safetensors"))) == {"weight", "other", "scale"}


def test_hashes_of_other_tensors(saved, tmp_path):
    for change in (
        lambda h: h["tensors"].pop("scale"),
        lambda h: h["tensors"].update(more=h["tensors"]["scale"]),
        lambda h: h["tensors"]["scale"].update(sha256="0" * 64),
        lambda h: h["tensors"]["weight"].update(shape=[3, 4]),
    ):
        with pytest.raises(WeightsError, match=r"is damaged: (scale|more|weight) is not what was saved"):
            load(rewritten(saved, tmp_path / "other.safetensors", header=change))


def test_a_file_of_an_earlier_version_is_read_with_a_warning(saved, tmp_path):
    path = rewritten(saved, tmp_path / "earlier.safetensors", header=lambda h: h.pop("tensors"))
    with pytest.warns(UserWarning, match="earlier.safetensors was written before checkpoints carried hashes"):
        method = load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load(save(method, path)).weight, method.weight)


# ---- headers
PARAMETERS = {
    "hidden": [10**9, -1e30, 1.5, "4", True, None, [4], float("nan"), 2**80, {"a": 1}],
    "image_size": [10**9, "64", 64.5, True, -(10**9), [64]],
    "gain": [float("inf"), "much", True, None, 1e300, [1.0]],
    "norm": [1, "yes", None, 0.0],
    "taps": [
        5,
        "1,2",
        list(range(ENTRIES + 1)),
        [[[[[1]]]]],
        [float("inf")],
        [{}],
        [[1] * 3000, [2] * 3000],
        ["x" * 20_000],
        [10**20],
    ],
    "types": [7, ["x"] * 10**5],
    "word": [5, "x" * 20_000, None, ["x"]],
    "seed": [-1, 2**64, 0.5, "a"],
    "kind": ["c", 1, None, ["a"]],
    "weights": [
        "https://example.org/x.safetensors",
        "file:///etc/passwd",
        "\\\\host\\share\\x.pt",
        "//host/share/x.pt",
        "/etc/passwd",
        "/dev/zero",
        "../../.ssh/id_rsa",
        "x.safetensors\0",
        "/dev/stdin",
        "s3://bucket/x.pt",
    ],
}


@pytest.mark.parametrize(
    "name, value", [(k, v) for k, values in PARAMETERS.items() for v in values], ids=lambda v: repr(v)[:30]
)
def test_a_parameter_beyond_all_bounds(saved, tmp_path, monkeypatch, name, value):
    "One sentence with file and name, before the method is built or anything is read."
    monkeypatch.setattr(Small, "__init__", lambda *a: pytest.fail("it was built"))
    path = rewritten(saved, tmp_path / "odd.safetensors", header=lambda h: h["parameters"].update({name: value}))
    with pytest.raises(WeightsError) as caught:
        load(path)
    said = str(caught.value)
    assert "odd.safetensors" in said and "\n" not in said and len(said) < 600
    assert name in said or "NaN" in said or "Infinity" in said, said


@pytest.mark.parametrize(
    "name",
    [
        "visualad",
        "dma_sap",
        "ssvp",
        "dapo",
        "winclip",
        "anomalyclip",
        "crane_plus",
        "adaclip",
        "anovl",
        "april_gan",
        "bayes_pfl",
        "mutual",
        "multiads",
        "self_distance",
    ],
)
def test_every_method_bounds_its_whole_numbers(name):
    import dataclasses
    import typing

    kind = method_class(name).Parameters
    for f in dataclasses.fields(kind):
        types = typing.get_args(f.type) or (f.type,)
        if int in types:
            with pytest.raises(ValueError, match=rf"{f.name}="):
                kind(**{f.name: 10**20})
        if float in types:
            with pytest.raises(ValueError, match=rf"{f.name}="):
                kind(**{f.name: float("nan")})
        if tuple in types:
            with pytest.raises(ValueError, match=rf"{f.name}="):
                kind(**{f.name: (1,) * 10**5})
    assert kind() == kind(), "the defaults are within the bounds"


HEADERS = {
    "a list": [],
    "no method": {},
    "method is a list": dict(method=[1]),
    "parameters are a list": dict(parameters=[1]),
    "backbones are a text": dict(backbones="x"),
    "a backbone is a text": dict(backbones=dict(a="x")),
    "trained on a number": dict(trained_on=[1]),
    "trained on a text": dict(trained_on="x"),
    "tensors are a list": dict(tensors=[1]),
    "a tensor is a text": dict(tensors=dict(weight="x")),
    "fitted is a list": dict(fitted=[1]),
    "engine is a text": dict(engine="torch"),
    "engine is a number": dict(engine=dict(engine=1, precision="fp32")),
    "an engine without precision": dict(engine=dict(engine="torch")),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_of_other_kinds(saved, tmp_path, what):
    change = HEADERS[what]
    header = {**read_header(saved), **change} if isinstance(change, dict) and change else change
    save_file(load_file(saved), tmp_path / "odd.safetensors", {"zsad_nb": json.dumps(header)})
    for door in (load, read_header):
        with pytest.raises(WeightsError, match=r"odd\.safetensors"):
            door(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, "{" * 10, '{"method": NaN}', "\x00", "nul", '"x"', "1" * 10**5],
    ids=["nested", "open", "NaN", "zero", "word", "text", "digits"],
)
def test_a_header_that_is_no_json(saved, tmp_path, text):
    save_file(load_file(saved), tmp_path / "odd.safetensors", {"zsad_nb": text})
    with pytest.raises(WeightsError, match=r"odd\.safetensors"):
        load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("length", [0, 7, 2**63, 2**31, HEADER_MB * 2**20 + 1, 10])
def test_a_length_that_is_none(tmp_path, length):
    path = tmp_path / "odd.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length) + b"{}")
        file.truncate(40 * 2**20)  # takes no room
    for door in (load, read_header, read_state):
        with pytest.raises(WeightsError, match=r"odd\.safetensors"):
            door(path)


def test_a_local_file_of_weights_is_todays_use(saved, tmp_path, monkeypatch):
    "Relative or not: the one who saved it named it; and the caller's word counts for everything else."
    for value in ("../weights/tower.safetensors", str(tmp_path / "tower.pt"), "random:3", "pretrained"):
        assert (
            load(
                rewritten(
                    saved,
                    tmp_path / "a.safetensors",
                    header=lambda h, value=value: h["parameters"].update(weights=value),
                )
            ).p.weights
            == value
        )
    assert (
        load(
            rewritten(
                saved,
                tmp_path / "a.safetensors",
                header=lambda h: h["parameters"].update(weights="https://example.org/x"),
            ),
            weights="tower",
        ).p.weights
        == "tower"
    )


# ---- names
NAMES = {"patch_embed.proj.weight", "norm.weight"}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "backbone.",
        "model.",
        "state_dict.",
        "module.module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "backbone.module.",
        "module.backbone.",
        "model.module._orig_mod.backbone.",
        "_orig_mod._orig_mod.",
        "_fsdp_wrapped_module.module.",
        "state_dict.module.model.",
        "_forward_module.model.",
    ],
)
@pytest.mark.parametrize(
    "wrappers",
    [
        (),
        ("state_dict",),
        ("model",),
        ("model", "state_dict"),
        ("state_dict", "model", "module"),
        ("teacher",),
        ("backbone",),
    ],
    ids="-".join,
)
def test_any_nesting_of_wrappers(prefix, wrappers):
    state = {prefix + name: torch.zeros(1) for name in NAMES}
    for wrapper in wrappers:
        state = {wrapper: state, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}}}
    assert set(flat_state(state)) == NAMES


def test_a_part_that_was_compiled():
    assert set(
        bare_names(
            {
                "visual._orig_mod.conv1.weight": 1,
                "visual.transformer.resblocks.0._checkpoint_wrapped_module.attn": 2,
                "text": 3,
            }
        )
    ) == {"visual.conv1.weight", "visual.transformer.resblocks.0.attn", "text"}


@pytest.mark.parametrize(
    "state, words",
    [
        ({"module.a": 1, "b": 2}, ["module.a", "(b)"]),
        ({"_orig_mod.a": 1, "a": 2}, ["_orig_mod.a", "(a)"]),
        ({"a._orig_mod.b": 1, "a.b": 2}, ["a._orig_mod.b and a.b would both be a.b"]),
        ({"a.module.b": 1, "a._orig_mod.b": 2}, ["would both be a.b"]),
        ({"state_dict": {"a": 1}, "model": {"b": 2}}, ["state_dict, model"]),
    ],
)
def test_mixtures_are_refused_by_name(state, words):
    def tensors(value):
        return {k: tensors(v) if isinstance(v, dict) else torch.full((1,), float(v)) for k, v in value.items()}

    with pytest.raises(WeightsError) as caught:
        flat_state(tensors(state))
    assert all(w in str(caught.value) for w in words), caught.value


def test_a_file_that_holds_itself(tmp_path):
    state = {"a": torch.ones(1)}
    state["state_dict"] = {"model": state}
    torch.save(state, tmp_path / "self.pt")
    with pytest.raises(WeightsError, match="nested more than"):
        read_state(tmp_path / "self.pt")


def test_released_files_of_wrapped_modules(tmp_path):
    torch.save(
        {"prompt_learner": {"module.ctx_pos": torch.ones(1), "module._orig_mod.ctx_neg": torch.ones(1)}, "epoch": 1},
        tmp_path / "released.pth",
    )
    assert set(released_state(tmp_path / "released.pth")[0]) == {"prompt_learner.ctx_pos", "prompt_learner.ctx_neg"}
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "mixed.pth")
    with pytest.raises(WeightsError, match=r"mixed\.pth.*module\.a"):
        released_state(tmp_path / "mixed.pth")


# ---- files with traps in them
def test_tensors_that_are_no_plain_numbers(tmp_path):
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "expanded": torch.zeros(1).expand(10**12),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "meta": torch.zeros(2, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8),
    }
    for name, value in odd.items():
        with pytest.raises(WeightsError, match=name):
            require_plain({name: value}, "this")
        torch.save({name: value}, tmp_path / f"{name}.pt")
        with pytest.raises(WeightsError, match=rf"{name}\.pt"):
            read_state(tmp_path / f"{name}.pt")
    require_plain({"shared": torch.zeros(4, 4)[1:, ::2], "scalar": torch.tensor(1.0)}, "this")


def test_a_zip_bomb(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(WeightsError, match=r"bomb\.pt.*compressed"):
        read_state(tmp_path / "bomb.pt")


def test_a_ladder_without_rungs():
    state = {
        "patch_embed.proj.weight": torch.zeros(64, 3, 16, 16),
        "blocks.0.attn.qkv.weight": torch.zeros(1, 1),
        "blocks.0.mlp.fc1.weight": torch.zeros(256, 64),
        "pos_embed": torch.zeros(1, 17, 64),
    }
    assert vit_shapes(state)["depth"] == 1
    for change in (
        {"blocks.999999999.x": torch.zeros(1)},
        {"blocks.x.y": torch.zeros(1)},
        {"pos_embed": torch.zeros(1, 0, 64)},
    ):
        with pytest.raises(WeightsError):
            vit_shapes({**state, **change})


def test_finite_and_fitting():
    require_finite(
        {"a": torch.ones(2), "none": torch.zeros(0), "ids": torch.arange(3), "half": torch.ones(2).half()}, "this"
    )
    with pytest.raises(WeightsError, match=r"this holds NaN or infinite values in a, b, c, d and 2 more"):
        require_finite({k: torch.tensor([1.0, float("nan")]) for k in "abcdef"}, "this")
    own = {"a": torch.zeros(2)}
    for value, word in (
        (torch.full((2,), 1e300, dtype=torch.float64), "NaN or infinite"),
        (torch.zeros(3), r"a is \(3,\), expected \(2,\)"),
        ([1, 2], "a is a list"),
        (torch.zeros(2, dtype=torch.int8), "a is int8, expected float32"),
    ):
        with pytest.raises(WeightsError, match=word):
            fitted(own, {"a": value}, "this does not fit that")


def test_nothing_is_unpickled(saved, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("marker").touch, ())

    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": Trap()}))
        for door in (load, read_header, read_state, released_state):
            with pytest.raises(WeightsError):
                door(tmp_path / name)
    assert not (tmp_path / "marker").exists() and copy.deepcopy(create("small-test")).p.hidden == 4


@pytest.mark.parametrize(
    "name, parameter", [("april_gan", "templates"), ("adaclip", "templates"), ("multiads", "phrases")]
)
def test_a_header_names_no_file_of_sentences(tmp_path, name, parameter):
    "A checkpoint holds its sentences; a file that a header names is not opened, one that the caller names is."
    frames = tmp_path / "frames.txt"
    frames.write_text('{"normal": ["a fine {}"]}' if parameter == "phrases" else "a photo of one whole and good {}.\n")
    path = save(create(name, clip_weights="random:0", image_size=32), tmp_path / "model.safetensors")
    assert load(path).p.names == "released"
    hostile = rewritten(
        path, tmp_path / "hostile.safetensors", header=lambda h: h["parameters"].update({parameter: str(frames)})
    )
    with pytest.raises(WeightsError, match=rf"hostile\.safetensors asks for {parameter}=.*nothing was read from there"):
        load(hostile)
    assert "good" in str(load(hostile, **{parameter: str(frames)}).p) or parameter == "phrases"
    odd = rewritten(
        path,
        tmp_path / "odd.safetensors",
        header=lambda h: h["parameters"].update(clip=["tiny-clip"]) or h["parameters"].pop("position_resize"),
    )
    with pytest.raises(WeightsError, match=r"odd\.safetensors"):
        load(odd)


def test_released_numbers_of_another_type(tmp_path):
    model = create("april_gan", clip_weights="random:0", image_size=32)
    state = {theirs: model.learned()[ours].detach().clone() for ours, theirs in released_names(model).items()}
    save_file(state, tmp_path / "fine.safetensors")
    assert import_released(model, tmp_path / "fine.safetensors") is model
    first = next(iter(state))
    save_file({**state, first: state[first].long()}, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match=rf"{first} is int64, expected numbers with a fraction"):
        import_released(model, tmp_path / "odd.safetensors")
