"Export folders from elsewhere: nothing in them is executed, unpickled or imported; damage and odd descriptions are one sentence."

import io
import json
import os
import stat
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from zsad_nb.backbones.graphs import synthetic_images
from zsad_nb.backbones.onnx_files import onnx_session, read_onnx
from zsad_nb.backbones.programs import OPERATORS, read_program
from zsad_nb.core.sessions import EngineError, available, file_hash
from zsad_nb.deploy.export import export
from zsad_nb.deploy.inference import load_exported, read_description
from zsad_nb.methods.base import create

SIZE = 32


class Trap:
    "Unpickling it writes a file."

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "An export in torch's format; its head is small."
    folder = tmp_path_factory.mktemp("exported") / "system"
    export(create("self_distance", image_size=SIZE, tap=1, weights="random:0"), folder, "torch")
    return folder


@pytest.fixture(scope="module")
def members(made) -> dict:
    with zipfile.ZipFile(made / "head.pt2") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


def written(path: Path, members: dict, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def pickled(value) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def edited(members: dict, name: str, change) -> dict:
    "A copy of the members with the JSON of one of them changed."
    key = next(k for k in members if k.endswith(name))
    about = json.loads(members[key])
    change(about)
    return {**members, key: json.dumps(about).encode()}


def graph(about: dict) -> dict:
    return about["graph_module"]["graph"]


def first(table: dict) -> dict:
    return next(iter(table.values()))


def code(marker) -> str:
    return f"__import__('os').system('touch {marker}')"


def size_expression(text):
    def change(about):
        table = graph(about)["tensor_values"]
        found = [s for v in table.values() for s in v["sizes"] if "as_expr" in s]
        found[0]["as_expr"]["expr_str"] = text

    return change


def named(text):
    def change(about):
        graph(about)["nodes"][0]["name"] = text

    return change


def target(text):
    def change(about):
        graph(about)["nodes"][-1]["target"] = text

    return change


def spec(kind, context):
    text = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])

    def change(about):
        about["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = text

    return change


def as_pickle(table):
    def change(about):
        entry = first(about["config"])
        entry["use_pickle"] = True

    return change


MODEL = {
    "size that is code": lambda m: size_expression(code(m)),
    "size that calls a function": lambda m: size_expression("Symbol('s1', positive=True).__class__"),
    "size that is a huge power": lambda m: size_expression("Pow(Integer(9), Integer(999999999))"),
    "size that is huge": lambda m: size_expression("Integer(" + "9" * 400 + ")"),
    "size that is nested": lambda m: size_expression("Add(" * 500 + "Integer(1)" + ")" * 500),
    "size with a keyword": lambda m: size_expression("Symbol('s1', cls=open)"),
    "symbol that is code": lambda m: size_expression(f"Symbol({code(m)!r})"),
    "name that is code": lambda m: named(f"x = {code(m)}; y"),
    "name with a new line": lambda m: named("x\n    import os"),
    "name that is a keyword": lambda m: named("import"),
    "name with underscores": lambda m: named("__builtins__"),
    "argument that is code": lambda m: (
        lambda a: a["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=[f"x={code(m)}"])
    ),
    **{
        f"operator {name}": lambda m, name=name: target(name)
        for name in (
            "torch.hub.load",
            "torch.load",
            "torch.ops.aten.from_file.default",
            "torch.ops.aten.save.default",
            "torch.ops.aten._print.default",
            "torch.ops.aten.as_strided.default",
            "torch.ops.aten.set_.source_Tensor",
            "torch.ops.load_library",
            "torch.ops.mine.evil.default",
            "torch.ops.aten.add.Tensor.__class__",
            "torch.ops.aten.add.__init__",
            "torch.utils.cpp_extension.load_inline",
            "_operator.call",
            "_operator.methodcaller",
            "math.__loader__.exec_module",
            "#ext:evil",
            "os.system",
            "builtins.exec",
        )
    },
    "container of another module": lambda m: spec(
        "collections.defaultdict",
        json.dumps({"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}),
    ),
    "named tuple": lambda m: spec("collections.namedtuple", "x"),
    "enumeration": lambda m: spec("builtins.dict", json.dumps({"__enum__": True, "fqn": "os:system", "name": "x"})),
    "custom object": lambda m: (
        lambda a: graph(a)["nodes"][0]["inputs"][0].update(
            arg={"as_custom_obj": {"name": "x", "class_fqn": "__torch__.Evil"}}
        )
    ),
    "operator as an argument": lambda m: (
        lambda a: graph(a)["nodes"][0]["inputs"][0].update(arg={"as_operator": "_operator.call"})
    ),
    "table of custom objects": lambda m: (
        lambda a: graph(a)["custom_obj_values"].update(x={"name": "x", "class_fqn": "__torch__.Evil"})
    ),
    "verifier of another module": lambda m: lambda a: a.update(verifiers=["os.system"]),
    "text where none belongs": lambda m: lambda a: a.update(surprise="text"),
    "another device": lambda m: lambda a: first(graph(a)["tensor_values"])["device"].update(type="cuda"),
    "number of 70 bits": lambda m: lambda a: first(graph(a)["tensor_values"]).update(dtype=2**70),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MODEL)
def test_a_graph_that_asks_for_more_than_tensors(members, tmp_path, marker, what):
    path = written(tmp_path / "head.pt2", edited(members, "models/model.json", MODEL[what](marker)))
    with pytest.raises(EngineError, match=r"head\.pt2 is refused: .*Nothing of it was run; export again"):
        read_program(path)
    assert not marker.exists(), "code from the file was run"


@pytest.mark.parametrize("what", ["guards", "stack traces", "example inputs"])
def test_what_is_left_out_is_not_run(made, members, tmp_path, marker, what):
    "Guards are Python source and example inputs pickles; neither reaches PyTorch."

    def change(about):
        if what == "guards":
            about["guards_code"] = [code(marker)]
        else:
            graph(about)["nodes"][0]["metadata"] = {
                "nn_module_stack": code(marker),
                "source_fn_stack": f"x,torch.{code(marker)}",
                "custom": "{",
                "from_node": "{",
            }

    changed = (
        edited(members, "models/model.json", change)
        if what != "example inputs"
        else {
            k: pickled(((Trap(marker),), {})) if k.endswith("sample_inputs/model.pt") else v for k, v in members.items()
        }
    )
    inputs = [torch.rand(2, 4, 192)]  # the patches of one tap
    with torch.no_grad():
        found, expected = (
            read_program(p)(*inputs) for p in (written(tmp_path / "head.pt2", changed), made / "head.pt2")
        )
    assert all(torch.equal(a, b) for a, b in zip(found, expected)) and not marker.exists()


def payload(name, entry):
    def change(about):
        first(about["config"]).update(entry)

    return name, change


TABLES = {
    "pickle": payload("constants_config.json", dict(use_pickle=True)),
    "pickle by a number": payload("constants_config.json", dict(use_pickle=1)),
    "pickle by a text": payload("constants_config.json", dict(use_pickle="no")),
    "custom object": payload("constants_config.json", dict(path_name="custom_obj_0", use_pickle=True)),
    "opaque object": payload("constants_config.json", dict(path_name="opaque_obj_0")),
    "outside": payload("constants_config.json", dict(path_name="../weights/weight_0")),
    "absolute": payload("constants_config.json", dict(path_name="/etc/passwd")),
    "absent": payload("constants_config.json", dict(path_name="tensor_99")),
    "no sizes": payload("constants_config.json", dict(tensor_meta=None)),
    "another entry": ("constants_config.json", lambda a: a.update(other={})),
    "huge": (
        "constants_config.json",
        lambda a: first(a["config"])["tensor_meta"].update(sizes=[{"as_int": 10**12}], strides=[{"as_int": 0}]),
    ),
    "beyond the end": (
        "constants_config.json",
        lambda a: first(a["config"])["tensor_meta"].update(storage_offset={"as_int": 10**6}),
    ),
    "negative": (
        "constants_config.json",
        lambda a: first(a["config"])["tensor_meta"].update(storage_offset={"as_int": -1}),
    ),
    "symbolic": (
        "constants_config.json",
        lambda a: first(a["config"])["tensor_meta"].update(storage_offset={"as_expr": {"expr_str": "print(1)"}}),
    ),
    "of no type": ("constants_config.json", lambda a: first(a["config"])["tensor_meta"].update(dtype=99)),
}


@pytest.mark.parametrize("what", TABLES)
def test_tensors_are_bytes_of_the_archive(members, tmp_path, marker, what):
    name, change = TABLES[what]
    trapped = {
        k: pickled(Trap(marker)) if "constants/tensor_" in k and what.startswith("pickle") else v
        for k, v in edited(members, name, change).items()
    }
    root = next(iter(members)).split("/")[0]
    for extra in ("custom_obj_0", "opaque_obj_0"):
        if extra in str(trapped.values()):
            trapped[f"{root}/data/constants/{extra}"] = pickled(Trap(marker))
    with pytest.raises(EngineError, match=r"head\.pt2 is refused"):
        read_program(written(tmp_path / "head.pt2", trapped))
    assert not marker.exists()


EXTRA = [
    "data/weights/model.pt",
    "data/constants/model.pt",
    "data/constants/custom_obj_0",
    "data/aotinductor/model/x.so",
    "data/weights/../../x",
    "/etc/passwd",
    "../x",
    "extra/other.json",
    "models/other.json",
    "x\x00y",
    "executorch/x",
    "data/weights/weight_0/",
    "C:\\x",
]


@pytest.mark.parametrize("name", EXTRA)
def test_a_member_that_no_export_has(members, tmp_path, marker, name):
    for full in (f"{next(iter(members)).split('/')[0]}/{name}", name):
        path = written(tmp_path / "head.pt2", {**members, full: pickled(Trap(marker))})
        with pytest.raises(EngineError, match="is refused"):
            read_program(path)
        assert not marker.exists()


def linked(members, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name)
            if name.endswith("tensor_0"):
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, data)


def twice(members, path):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in [*members.items(), next(iter(members.items()))]:
            archive.writestr(name, data)


def encrypted(members, path):
    content = bytearray(written(path, members).read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def commented(members, path):
    written(path, members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"hidden"


ARCHIVES = {
    "compressed": lambda m, p: written(p, m, compression=zipfile.ZIP_DEFLATED),
    "bomb": lambda m, p: written(
        p, {**m, f"{next(iter(m)).split('/')[0]}/data/weights/weight_0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED
    ),
    "link": linked,
    "member twice": twice,
    "encrypted": encrypted,
    "comment": commented,
    "something before": lambda m, p: p.write_bytes(b"#!/bin/sh\n" + written(p, m).read_bytes()),
    "something behind": lambda m, p: p.write_bytes(written(p, m).read_bytes() + b"tail"),
    "cut short": lambda m, p: p.write_bytes(written(p, m).read_bytes()[:-100]),
    "empty": lambda m, p: p.write_bytes(b""),
    "text": lambda m, p: p.write_text("no archive"),
    "no members": lambda m, p: written(p, {}),
    "pickle": lambda m, p: p.write_bytes(pickled({"a": 1})),
    "no graph": lambda m, p: written(p, {k: v for k, v in m.items() if "models" not in k}),
    "another format": lambda m, p: written(p, {k: b"pt3" if k.endswith("archive_format") else v for k, v in m.items()}),
    "the layout of torch 2.7": lambda m, p: written(
        p,
        {
            "version": b"8.8",
            "serialized_exported_program.json": b"{}",
            **{
                f"serialized_{n}.pt": pickled(Trap(p.parent / "marker"))
                for n in ("state_dict", "constants", "example_inputs")
            },
        },
    ),
    "graph that is no JSON": lambda m, p: written(
        p, {k: b"{" if k.endswith("models/model.json") else v for k, v in m.items()}
    ),
    "graph that is a list": lambda m, p: written(
        p, {k: b"[]" if k.endswith("models/model.json") else v for k, v in m.items()}
    ),
    "graph nested a million times": lambda m, p: written(
        p, {k: b"[" * 10**6 if k.endswith("models/model.json") else v for k, v in m.items()}
    ),
    "two roots": lambda m, p: written(
        p, {k if "/models" not in k else f"tail/models{k.split('/models')[1]}": v for k, v in m.items()}
    ),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_in_which_something_is_hidden(members, tmp_path, marker, what):
    ARCHIVES[what](members, tmp_path / "head.pt2")
    with pytest.raises(EngineError, match=r"head\.pt2 (is refused|cannot be loaded)"):
        read_program(tmp_path / "head.pt2")
    assert not marker.exists()


def test_the_trap_works(tmp_path):
    torch.load(io.BytesIO(pickled(Trap(tmp_path / "marker"))), weights_only=False)
    assert (tmp_path / "marker").exists()


# ---- the folder
def copied(made: Path, target: Path) -> Path:
    target.mkdir()
    for file in made.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.slow
def test_every_file_is_held_against_the_description(made, tmp_path):
    about = read_description(made)
    assert {k: file_hash(made / k) for k in ("encode.pt2", "head.pt2")} == about["hashes"]
    folder = copied(made, tmp_path / "copy")
    content = bytearray((folder / "head.pt2").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "head.pt2").write_bytes(content)
    with pytest.raises(EngineError, match=r"head\.pt2 is not the file that was exported"):
        load_exported(folder, "torch")
    (folder / "head.pt2").write_bytes((made / "encode.pt2").read_bytes())
    with pytest.raises(EngineError, match=r"head\.pt2 is not the file that was exported"):
        load_exported(folder, "torch")


@pytest.mark.slow
def test_an_export_without_hashes_is_read_with_a_warning(made, tmp_path):
    folder = copied(made, tmp_path / "copy")
    about = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({k: v for k, v in about.items() if k != "hashes"}))
    with pytest.warns(UserWarning, match="before descriptions carried hashes"):
        found = load_exported(folder, "torch")
    images = synthetic_images((SIZE, SIZE), 2)
    assert np.array_equal(found.predict(images).map, load_exported(made, "torch").predict(images).map)


DESCRIPTIONS = {
    "no JSON": "{",
    "a list": "[]",
    "not a number": '{"format": 1, "input": NaN}',
    "nested": "[" * 10**5,
    "of another version": lambda a: a.update(format=7),
    "no format": lambda a: a.pop("format"),
    "no input": lambda a: a.pop("input"),
    "size is a text": lambda a: a["input"].update(size="32"),
    "size is huge": lambda a: a["input"].update(size=[10**9, 10**9]),
    "size is negative": lambda a: a["input"].update(size=[-1, -1]),
    "size is no square": lambda a: a["input"].update(size=[32, 33]),
    "size is true": lambda a: a["input"].update(size=[True, True]),
    "batch is 2": lambda a: a["input"].update(batch=2),
    "no graphs": lambda a: a.update(graphs=[]),
    "graphs are a text": lambda a: a.update(graphs="encode"),
    "a hundred graphs": lambda a: a.update(graphs=a["graphs"] * 100),
    "a file elsewhere": lambda a: a["graphs"][0]["files"].update(torch="../encode.pt2"),
    "an absolute file": lambda a: a["graphs"][0]["files"].update(torch="/tmp/encode.pt2"),
    "a file of another kind": lambda a: a["graphs"][0]["files"].update(torch="encode.so"),
    "no files": lambda a: a["graphs"][0].update(files={}),
    "inputs that nothing gives": lambda a: a["graphs"][1].update(inputs=["x"]),
    "names twice": lambda a: a["graphs"][0].update(outputs=["cls", "cls"]),
    "no map": lambda a: a["graphs"][1].update(outputs=["score"]),
    "hashes of nothing": lambda a: a.update(hashes={"x": {"bytes": 1, "sha256": "x"}}),
    "hashes are a list": lambda a: a.update(hashes=[1]),
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_an_odd_description_is_one_sentence(made, tmp_path, what):
    folder = copied(made, tmp_path / "copy")
    change = DESCRIPTIONS[what]
    about = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(change if isinstance(change, str) else json.dumps((change(about), about)[1]))
    with pytest.raises(ValueError, match=r"export\.json") as caught:
        load_exported(folder, "torch")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_too_few_results_are_no_prediction(made, tmp_path):
    folder = copied(made, tmp_path / "copy")
    about = json.loads((folder / "export.json").read_text())
    about["graphs"][1]["outputs"].append("type_map")
    (folder / "export.json").write_text(json.dumps(about))
    with pytest.raises(EngineError, match="gives 2 results, its description names 3"):
        load_exported(folder, "torch").predict(synthetic_images((SIZE, SIZE), 1))


def test_operators_are_of_one_library():
    assert all(
        name.startswith(
            (
                "torch.ops.aten.",
                "torch.sym_",
                "_operator.",
                "math.",
                "torch.ops.higher_order.wrap_with_set_grad_enabled",
            )
        )
        for name in OPERATORS
    )
    for name in OPERATORS:
        if not name.startswith("torch.ops.aten."):
            continue
        packet = getattr(torch.ops.aten, name.split(".")[-1], None)
        assert packet is not None, f"{name} does not exist"
        schemas = [getattr(packet, o)._schema for o in packet.overloads()]
        schemas = [
            s for s in schemas if any("Tensor" in str(r.type) for r in s.returns)
        ]  # others compute numbers and texts
        texts = {
            a.name for s in schemas for a in s.arguments if str(a.type).removeprefix("Optional[").rstrip("]") == "str"
        }
        assert texts <= {
            "mode",
            "reduce",
            "approximate",
            "rounding_mode",
            "equation",
            "interpolation",
            "padding",
            "side",
            "indexing",
            "ord",
            "assert_msg",
            "reduction",
            "p",
            "string",
            "self",
            "other",
        }, (name, texts)


# ---- ONNX
@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> Path:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    weight = onnx.numpy_helper.from_array(torch.eye(4).numpy(), "weight")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["image", "weight"], ["map"])],
        "g",
        [helper.make_tensor_value_info("image", 1, [None, 4])],
        [helper.make_tensor_value_info("map", 1, [None, 4])],
        [weight],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def outside(location, **more):
    def change(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        for key, value in dict(location=location, **more).items():
            entry = tensor.external_data.add()
            entry.key = key
            entry.value = str(value)

    return change


def branch(model):
    import onnx

    inner = onnx.helper.make_graph([onnx.helper.make_node("Evil", [], ["y"], domain="evil")], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["image"], ["z"], then_branch=inner))


def sparse(model):
    tensor = model.graph.sparse_initializer.add()
    tensor.values.dims.append(10**12)


ONNX = {
    "a file above": outside("../../etc/passwd"),
    "an absolute file": outside("/etc/passwd"),
    "a file beside it": outside("other.data"),
    "beyond the end": outside("model.onnx.data", offset=10**9),
    "negative": outside("model.onnx.data", offset=-1),
    "a length that is no number": outside("model.onnx.data", length="many"),
    "no location": lambda m: m.graph.initializer[0].external_data.add(),
    "another library": lambda m: setattr(m.graph.node[0], "domain", "evil.ops"),
    "another library, not used": lambda m: m.opset_import.add(domain="com.microsoft"),
    "another library in a branch": branch,
    "a function": lambda m: m.functions.add(name="f", domain="x"),
    "training": lambda m: m.training_info.add(),
    "huge": lambda m: m.graph.initializer[0].dims.__setitem__(0, 10**12),
    "huge by many": lambda m: m.graph.initializer[0].dims.extend([10**6] * 30),
    "huge and sparse": sparse,
}


@pytest.mark.parametrize("what", ONNX)
def test_a_model_that_asks_for_more_than_itself(linear, tmp_path, what):
    import onnx

    model = onnx.load(linear)
    path = tmp_path / "model.onnx"
    ONNX[what](model)
    path.write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes(bytes(64))
    with pytest.raises(EngineError, match=r"model\.onnx is refused"):
        read_onnx(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", b"<?xml version='1.0'?><net/>", b"ORTM" * 30, b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x0f"],
    ids=["empty", "cut", "IR", "ORT", "noise", "a length beyond the end"],
)
def test_a_file_that_is_no_onnx(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"model\.onnx (is refused|cannot be loaded)"):
        (
            onnx_session(tmp_path / "model.onnx", "onnxruntime")
            if available("onnxruntime")
            else read_onnx(tmp_path / "model.onnx")
        )


def test_models_run_from_what_was_checked(linear, tmp_path):
    "With its tensors inside, and in the one file beside it that the description knows."
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    x = torch.rand(3, 4)
    onnx.save(onnx.load(linear), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    hashes = {f.name: file_hash(f) for f in tmp_path.iterdir()}
    good = (tmp_path / "model.onnx.data").read_bytes()
    for engine in ("onnxruntime", "openvino"):
        if not available(engine):
            continue
        for file, expected in ((linear, None), (path, hashes)):
            assert np.allclose(onnx_session(file, engine, expected=expected)(x)["map"], x, atol=1e-6), (engine, file)
        (tmp_path / "model.onnx.data").write_bytes(bytes(64))
        with pytest.raises(EngineError, match=r"model\.onnx\.data is not the file that was exported"):
            onnx_session(path, engine, expected=hashes)
        (tmp_path / "model.onnx.data").write_bytes(good)
