"Engines: the same numbers from another runtime, graphs kept on disk, learned tokens, caches that never mix, what is missing or wrong is said."

import contextlib
import copy
import importlib
import json
import logging
from pathlib import Path

import pytest
import torch

from zsad_nb.backbones import engines, products
from zsad_nb.backbones.engines import Engine, engine_folder
from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.graphs import hold_constant, resize_matrix, synthetic_images, trace, write_onnx
from zsad_nb.backbones.products import fast_products, onednn_pays, probe_matmul
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.core.sessions import ENGINES, EngineError, Session, available, import_optional
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch, batches
from zsad_nb.methods.base import create, load, save

SIZE = 64
SAME = 1e-4  # maps and scores, of the issue
EXTERNAL = ("openvino", "onnxruntime")


def batch_of(image: torch.Tensor) -> Batch:
    n = len(image)
    mask = torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.bool)
    mask[::2, :, 8:24, 16:40] = True
    bad = mask.flatten(1).any(1)
    return Batch(
        image, mask, bad, bad.long(), ["c"] * n, [f"{i}.png" for i in range(n)], torch.ones(n, dtype=torch.bool)
    )


def far(a, b) -> float:
    return max((a.map - b.map).abs().max().item(), (a.score - b.score).abs().max().item())


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(synthetic_images((SIZE, SIZE), 3, 50))


@pytest.fixture(scope="module")
def tower_file(tmp_path_factory):
    "Two blocks: tracing a graph takes a second or two."
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("tower") / "two.safetensors"
    state = create_backbone("tiny-dino", "random:0").tower.state_dict()
    save_file(
        {k: v.contiguous() for k, v in state.items() if not k.startswith("blocks.") or int(k.split(".")[1]) < 2}, path
    )
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


def shaken(tower_file, **changes):
    "VisualAD as after training: its two tokens differ."
    seed_everything(0)
    method = create("visualad", backbone="vit", weights=tower_file, image_size=SIZE, taps=(1, 2), **changes).eval()
    with torch.no_grad():
        method.tokens.mul_(20)
    return method


@pytest.fixture(scope="module")
def method(tower_file):
    return shaken(tower_file)


def frozen(**changes):
    seed_everything(0)
    return create("self_distance", image_size=SIZE, **changes).eval()


# ---- the same numbers
@pytest.mark.parametrize("engine", EXTERNAL)
def test_learned_tokens_inside_the_backbone(method, batch, folder, engine):
    pytest.importorskip(engine)
    expected = method.predict(batch)
    method.use_engine(engine, folder=folder)
    try:
        found = method.predict(batch)
        alone = method.predict(batch[[1]])
        assert (
            far(found, expected) < SAME
            and set(found.layers) == set(expected.layers)
            and found.layers["tap_1"].shape == expected.layers["tap_1"].shape
        )
        assert (found.map[1:2] - alone.map).abs().max() < 2e-5, "a prediction must not depend on its company"
    finally:
        method.use_engine()
    assert method.engine is None and far(method.predict(batch), expected) == 0


def test_frozen_features_for_training_and_evaluation(batch, folder, tmp_path):
    pytest.importorskip("openvino")
    plain = create("ssvp", image_size=SIZE, hsvs="none", vcpg=False).eval()
    other = create("ssvp", image_size=SIZE, hsvs="none", vcpg=False, engine="openvino").eval()
    other.load_state_dict(plain.state_dict())
    other.use_engine("openvino", folder=folder)
    assert far(other.predict(batch), plain.predict(batch)) < SAME
    with torch.no_grad():
        expected = plain.features(batch)
        found = other.features(batch)
    assert list(found) == list(expected) and all((found[k] - v).norm() < 1e-5 * v.norm() for k, v in expected.items())
    before = other.train().loss(other(found, batch), batch)
    before["total"].backward()
    assert abs(before["total"].item() - plain.train().loss(plain(expected, batch), batch)["total"].item()) < 1e-4
    assert all(p.grad is not None for p in other.prompts.parameters()) and all(
        p.grad is None for p in other.clip.parameters()
    )
    calls = []
    cache = FeatureCache(tmp_path)
    other.engine._torch = lambda *a: calls.append(a)
    assert plain.encode_key() | {"engine": "openvino fp32"} == other.encode_key() and "engine" not in plain.encode_key()
    for m in (plain.eval(), other.eval()):
        m.predict(batch, cache)
    assert cache.misses == 2 * len(batch) and not calls, "features of two engines must never meet"
    with torch.no_grad(), fast_products():
        other.features(batch, cache)  # as `predict` does: other products, other features
    assert cache.hits == len(batch)


def test_training_is_pytorch_where_tokens_are_inside(tower_file, batch, folder, monkeypatch):
    method = shaken(tower_file)
    method.use_engine("onnxruntime", folder=folder) if available("onnxruntime") else method.use_engine("torch", "bf16")
    monkeypatch.setattr(Engine, "__call__", lambda *a, **k: pytest.fail("an engine has no gradients"))
    method.train().loss(method(None, batch), batch)["total"].backward()
    assert method.tokens.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "part"), [("ssvp", lambda m: m.hsvs.project[0]), ("dma_sap", lambda m: m.fuse[0].dino_proj)]
)
def test_large_learned_products_take_bf16_where_the_engine_does(name, part, batch, monkeypatch):
    seed_everything(0)
    method = create(name, image_size=SIZE, precision="bf16")
    seen = []
    part(method).register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    found = method.predict(batch)
    with torch.no_grad():
        features = method.features(batch)
    method.train()(features, batch)  # training says its own precision
    monkeypatch.setattr(type(method), "lowered", lambda self: contextlib.nullcontext())
    assert 0 < far(found, method.predict(batch)) < 0.01
    assert (
        seen == [torch.bfloat16, torch.float32, torch.float32] and found.map.dtype == found.score.dtype == torch.float32
    )


@pytest.mark.parametrize("name", ["visualad", "dma_sap"])
def test_compiled(name, method, batch, monkeypatch):
    "Captured as a graph, tokens inside the backbone or not; the code generator itself is left to machines that have one."
    monkeypatch.setattr(
        logging.getLogger("torch.__trace"), "propagate", False
    )  # thousands of lines that pytest would keep
    model = method if name == "visualad" else create(name, image_size=SIZE)
    expected = model.predict(batch)
    try:
        assert far(model.use_engine(compile="eager").predict(batch), expected) < SAME and model.engine._kept
    finally:
        model.use_engine()


def test_features_objects_and_other_sizes(folder):
    pytest.importorskip("onnxruntime")
    method = frozen()
    wide = batch_of(torch.rand(2, 3, 48, 80))  # resized inside the graph
    expected = method.predict(wide)
    found = method.use_engine("onnxruntime", folder=folder).predict(wide)
    assert far(found, expected) < SAME and found.map.shape == (2, 48, 80)


def computes_in(engine: str, precision: str) -> bool:
    "OpenVINO takes fp32 where the processor has no instructions for bf16."
    if (engine, precision) != ("openvino", "bf16"):
        return True
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize(
    "engine,precision", [("torch", "bf16"), ("openvino", "bf16"), ("openvino", "int8"), ("onnxruntime", "int8")]
)
def test_lower_precision_is_near_and_is_not_fp32(method, batch, folder, engine, precision):
    if engine != "torch":
        pytest.importorskip(engine), pytest.importorskip("onnxruntime")
    expected = method.predict(batch)
    try:
        found = method.use_engine(engine, precision, **({} if engine == "torch" else dict(folder=folder))).predict(
            batch
        )
    finally:
        method.use_engine()
    assert found.map.dtype == torch.float32 and far(found, expected) < (0.02 if precision == "bf16" else 0.2)
    if computes_in(engine, precision):
        assert far(found, expected) > SAME / 100


# ---- graphs on disk
def test_graphs_are_traced_once_and_made_again_when_damaged(method, batch, folder, monkeypatch):
    pytest.importorskip("onnxruntime")
    first = method.use_engine("onnxruntime", folder=folder).predict(batch)
    traced = []
    monkeypatch.setattr(engines, "trace", lambda *a: traced.append(1) or trace(*a))
    try:
        again = method.use_engine("onnxruntime", folder=folder).predict(batch)  # as in a new process
        assert not traced and far(first, again) == 0
        graph = max(folder.glob("*/graph.onnx"), key=lambda p: "visualad" in (p.parent / "about.json").read_text())
        about = json.loads((graph.parent / "about.json").read_text())
        assert (
            about["batch"] is None
            and about["key"]["method"] == "visualad"
            and max(json.loads((graph.parent / "checked-onnxruntime-fp32.json").read_text())["relative_error"].values())
            < 1e-4
        )
        graph.write_bytes(graph.read_bytes()[:1000])
        assert far(method.use_engine("onnxruntime", folder=folder).predict(batch), first) == 0 and traced == [1]
        assert not list(folder.glob(".new-*"))
    finally:
        method.use_engine()


def test_learned_values_are_part_of_the_graph(tower_file, batch, folder):
    pytest.importorskip("onnxruntime")
    method = shaken(tower_file).use_engine("onnxruntime", folder=folder)
    before = method.predict(batch)
    with torch.no_grad():
        method.tokens.data.mul_(-1)  # past the version counter
    after = method.predict(batch)
    assert far(before, after) > 100 * SAME and far(after, method.use_engine().predict(batch)) < SAME


def test_copies_and_checkpoints(method, batch, folder, tmp_path, tower_file):
    pytest.importorskip("onnxruntime")
    method.use_engine("onnxruntime", folder=folder)
    try:
        expected = method.predict(batch)
        other = copy.deepcopy(method)
        assert (
            other.engine is not method.engine
            and other.engine.folder == folder
            and not other.engine._kept
            and far(other.predict(batch), expected) == 0
        )
        loaded = load(save(method, tmp_path / "a.safetensors"), engine="torch")
        assert loaded.engine is None and far(loaded.predict(batch), expected) < SAME, "asked for PyTorch, it is PyTorch"
        assert repr(load(tmp_path / "a.safetensors").engine) == "Engine(onnxruntime, fp32)", (
            "not asked: the one that it was saved with"
        )
        assert repr(load(tmp_path / "a.safetensors", engine="torch", precision="bf16").engine) == "Engine(torch, bf16)"
    finally:
        method.use_engine()


def test_the_folder_has_a_limit_and_a_place(folder, tmp_path, monkeypatch, method):
    monkeypatch.setenv("ZSAD_ENGINES", str(tmp_path / "mine"))
    assert engine_folder() == tmp_path / "mine"
    monkeypatch.delenv("ZSAD_ENGINES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine_folder() == tmp_path / "zsad_nb" / "engines"
    import os

    for at, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph.onnx").write_bytes(b"0" * 1000)
        (tmp_path / name / "about.json").write_text("{}")
        os.utime(tmp_path / name / "about.json", (at + 1, at + 1))
    (tmp_path / ".new-left").mkdir()
    os.utime(tmp_path / ".new-left", (1, 1))
    Engine(limit_gb=1500e-9)._evict(tmp_path / "new")
    assert (tmp_path / "new").is_dir() and not (tmp_path / "old").exists() and not (tmp_path / ".new-left").exists()


# ---- what is wrong is said
def test_choices():
    with pytest.raises(EngineError, match="use torch, openvino, onnxruntime"):
        Engine("tensorrt")
    with pytest.raises(EngineError, match="that has fp32, int8"):
        create("self_distance", image_size=SIZE, engine="onnxruntime", precision="bf16")
    with pytest.raises(EngineError, match="belongs to engine='torch'"):
        Engine("openvino", compile=True)
    assert (
        create("self_distance", image_size=SIZE).engine is None
        and issubclass(EngineError, ValueError)
        and set(ENGINES) == {"torch", *EXTERNAL}
    )


@pytest.mark.parametrize(
    "how",
    [
        ModuleNotFoundError("No module named 'onnx'"),
        AttributeError("partially initialized module 'onnx'"),
        OSError("libprotobuf.so: cannot open shared object file"),
    ],
)
def test_a_missing_or_broken_package_names_the_extra(monkeypatch, how, tmp_path):
    saved = save(create("visualad", image_size=SIZE).use_engine("onnxruntime"), tmp_path / "with_engine.safetensors")
    real = importlib.import_module

    def broken(name, *a):
        if name == "onnx":
            raise how
        return real(name, *a)

    monkeypatch.setattr(importlib, "import_module", broken)
    for ask in (
        lambda: create("visualad", image_size=SIZE, engine="onnxruntime"),
        lambda: write_onnx(None, tmp_path / "x.onnx", {}),
        lambda: import_optional("this", "onnx"),
    ):
        with pytest.raises(EngineError, match=r"pip install zsad_nb\[engines\]"):
            ask()
    with pytest.raises(
        ValueError, match=r"pip install zsad_nb\[engines\].*load\('with_engine.safetensors', engine='torch'\)"
    ):
        load(saved)
    assert load(saved, engine="torch").engine is None
    assert not available("openvino") and available("torch")


def test_an_engine_that_deviates_is_refused(method, batch, folder, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(engines, "LIMITS", dict(fp32=0.0, bf16=0.0, int8=0.0))
    for old in folder.glob("*/checked-*"):
        old.unlink()
    try:
        with pytest.raises(EngineError, match="away from PyTorch at"):
            method.use_engine("onnxruntime", folder=folder).predict(batch)
    finally:
        method.use_engine()


def test_a_full_disk_is_named(method, batch, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(engines.shutil, "disk_usage", lambda p: type("", (), dict(free=10))())
    try:
        with pytest.raises(EngineError, match="no room for a graph"):
            method.use_engine("onnxruntime", folder=tmp_path).predict(batch)
    finally:
        method.use_engine()


def test_what_cannot_be_traced_is_said():
    class Branches(torch.nn.Module):
        def forward(self, image):
            return dict(a=image * 2 if image.sum() > 0 else image)

    module = Branches()
    with pytest.raises(EngineError, match="Branches cannot be traced"):
        trace(module, module.forward, dict(image=torch.rand(2, 3, 8, 8)))

    def counts(image):
        return dict(a=image.sum((1, 2, 3)) * len(image))

    assert trace(module, counts, dict(image=torch.rand(2, 3, 8, 8))).batch == 1, (
        "a Python number of images: one at a time"
    )


# ---- parts
def test_constants_hold_and_let_go():
    for name in ("tiny-dino", "tiny-clip"):
        tower = create_backbone(name, "random:0", size=SIZE)
        image = torch.rand(2, 3, 96, 80)
        with torch.no_grad():
            plain = tower(image)
            known = set(tower.__dict__)
            with hold_constant(tower):
                held = tower(image)
        assert (
            all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(held.patches, plain.patches))
            and set(tower.__dict__) == known
        )
        with pytest.raises(RuntimeError), hold_constant(tower):
            raise RuntimeError("in between")
        assert set(tower.__dict__) == known
    image = torch.rand(1, 3, 50, 31)
    product = resize_matrix(24, 50) @ image @ resize_matrix(40, 31).T
    assert (
        product - torch.nn.functional.interpolate(image, (24, 40), mode="bicubic", antialias=True, align_corners=False)
    ).abs().max() < 1e-5


def test_rotations_are_constants():
    tower = create_backbone("dinov3-vits16", "random:0", size=48)
    image = torch.rand(2, 3, 48, 48)
    tower.tower.blocks = tower.tower.blocks[:2]
    with torch.no_grad():
        expected = tower(image, taps=(1, 2)).patches
        with hold_constant(tower):
            found = tower(image, taps=(1, 2)).patches
    assert all(torch.equal(a, b) for a, b in zip(found, expected)) and "get_embed" not in tower.tower.rope.__dict__


def test_unread_weights_are_left_out():
    method = create("ssvp", clip_weights="random:0", dino_weights="random:0", image_size=SIZE).eval()
    traced = trace(
        method,
        lambda image: dict(a=method.hsvs.project[0](method.clip(image, taps=(1,), norm=True).patches[0])),
        dict(image=torch.rand(2, 3, SIZE, SIZE)),
    )
    kept = set(traced.program.state_dict)
    assert any("clip.tower.transformer.resblocks.0." in k for k in kept) and not any(
        part in k for k in kept for part in ("text.", "dino.", "vcpg")
    )
    assert torch.equal(traced.program.module()(torch.rand(1, 3, SIZE, SIZE))[0].isfinite().all(), torch.tensor(True))


def test_probe_leaves_the_switch_alone(monkeypatch):
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("no such switch")
    was = torch.backends.mkldnn.matmul.fp32_precision
    found = probe_matmul(64, 64, 64)
    assert torch.backends.mkldnn.matmul.fp32_precision == was and found["error_usual"] < 1e-6 and found["speedup"] > 0


@pytest.fixture
def switch():
    "PyTorch's, as it comes, and put back after the test."
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("no such switch")
    found = torch.backends.mkldnn.matmul
    was = found.fp32_precision
    found.fp32_precision = "none"
    yield found
    found.fp32_precision = was


@pytest.mark.parametrize(
    ("vendor", "error", "said", "on"),
    [
        ("AuthenticAMD", 1e-7, "", True),
        ("AuthenticAMD", 1e-3, "", False),
        ("GenuineIntel", 1e-7, "", False),
        ("AuthenticAMD", 1e-7, "usual", False),
    ],
)
def test_products_take_the_fast_route_where_it_is_exact(switch, monkeypatch, vendor, error, said, on):
    monkeypatch.setattr(products, "probe_matmul", lambda *a: dict(error=error))
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: f"vendor_id : {vendor}" if str(self) == "/proc/cpuinfo" else real(self, *a, **k),
    )
    monkeypatch.setenv("ZSAD_PRODUCTS", said)
    onednn_pays.cache_clear()
    try:
        with pytest.raises(KeyError), fast_products():
            assert switch.fp32_precision == ("bf16" if on else "none")
            raise KeyError("restored after an error, too")
        assert switch.fp32_precision == "none"
        switch.fp32_precision = "tf32"
        with fast_products():
            assert switch.fp32_precision == "tf32", "somebody's choice"
    finally:
        onednn_pays.cache_clear()


def test_prediction_and_training_use_it(switch, monkeypatch, tmp_path):
    "The switch is on inside the method's own code, and a prediction is the same either way."
    from zsad_nb.synthetic.benchmark import synthetic_index
    from zsad_nb.training.fit import fit, recipe_of

    if not onednn_pays():
        pytest.skip("this processor multiplies fast as it is")
    method = create("dma_sap", clip_weights="random:0", dino_weights="random:0", image_size=SIZE)
    seen = []
    real = method.forward
    monkeypatch.setattr(method, "forward", lambda *a: (seen.append(switch.fp32_precision), real(*a))[1])
    index = synthetic_index(tmp_path, "auxiliary", SIZE, 1, 1).iloc[:4]
    one = next(iter(batches(index, SIZE, 4)))
    routed = method.predict(one).map
    monkeypatch.setenv("ZSAD_PRODUCTS", "usual")
    torch.testing.assert_close(routed, method.predict(one).map, rtol=1e-4, atol=1e-5)
    monkeypatch.delenv("ZSAD_PRODUCTS")
    fit(method, index, recipe_of(method, epochs=1), progress=False)
    assert (
        seen[:2] == ["bf16", "none"] and set(seen[2:]) == {"bf16"} and len(seen) > 2 and switch.fp32_precision == "none"
    )


def test_sessions_take_pytorch_threads(tmp_path):
    pytest.importorskip("openvino")
    linear = torch.nn.Linear(4, 2)
    write_onnx(
        trace(linear, lambda image: dict(out=linear(image)), dict(image=torch.rand(2, 4))),
        tmp_path / "l.onnx",
        dict(note="kept"),
    )
    import onnx

    assert {p.key: p.value for p in onnx.load(tmp_path / "l.onnx").metadata_props}["note"] == "kept"
    x = torch.rand(5, 4)
    for engine in EXTERNAL:
        session = Session(tmp_path / "l.onnx", engine)
        assert (torch.from_numpy(session(x)["out"]) - linear(x)).abs().max() < 1e-6
        if engine == "openvino":
            assert session.model.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
        else:
            assert session.model.get_session_options().intra_op_num_threads == torch.get_num_threads()
