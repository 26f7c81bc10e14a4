"Exported systems: equal to PyTorch in three runtimes, described, whole or absent, and readable without the method."

import importlib
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from zsad_nb.backbones.engines import flatten_features
from zsad_nb.backbones.graphs import synthetic_images
from zsad_nb.cli.commands import main
from zsad_nb.core.sessions import EngineError, available
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.data.method_images import resize_for
from zsad_nb.data.pixels import read_image
from zsad_nb.deploy.export import export
from zsad_nb.deploy.inference import Limits, load_exported
from zsad_nb.figures.blending import Rendering, View
from zsad_nb.inspection.thresholds import Calibration, from_normals
from zsad_nb.methods.base import create, save

SIZE, SAME = 64, 1e-4  # the tolerance
SYSTEMS = dict(visualad={}, dapo=dict(types=("scratch", "dent")), dma_sap={}, ssvp={})  # with the embedded pair


def stirred(name: str, **changes):
    "As after training: everything learned is away from where it starts."
    seed_everything(0)
    method = create(name, image_size=SIZE, **{**SYSTEMS.get(name, {}), **changes}).eval()
    with torch.no_grad():
        for n, p in method.learned().items():
            p.add_(0.3 * p.std(correction=0).nan_to_num() * torch.randn_like(p) + (0.3 if p.numel() == 1 else 0.0))
        if name == "visualad":
            method.tokens.mul_(20)
    return method


def far(found, expected) -> float:
    "The largest difference of an array and a tensor or array."
    return float(np.abs(found - np.asarray(expected)).max())


def batch_of(image: torch.Tensor) -> Batch:
    n = len(image)
    return Batch(
        image,
        torch.zeros(n, 1, SIZE, SIZE, dtype=torch.bool),
        torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.long),
        ["bottle"] * n,
        ["x"] * n,
        torch.ones(n, dtype=torch.bool),
    )


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def exported(room):
    "name -> (method, folder, what export said); written once."
    if not available("onnxruntime"):
        pytest.skip("no onnxruntime: pip install zsad_nb[engines]")
    made = {}

    def get(name):
        if name not in made:
            method = stirred(name)
            made[name] = method, room / name, export(method, room / name, category="bottle", optimise=False)
        return made[name]

    return get


@pytest.mark.parametrize("name", SYSTEMS)
def test_four_systems_in_every_runtime(exported, name):
    method, folder, about = exported(name)
    images = synthetic_images((SIZE, SIZE), 5, 300)
    expected = method.predict(batch_of(images))
    assert expected.map.std() > 1e-3, "a flat map proves nothing"
    for runtime in ["torch", "onnxruntime"] + ["openvino"] * available("openvino"):
        loaded = load_exported(folder, runtime)
        found = loaded.predict(images)
        assert far(found.map, expected.map) < SAME and far(found.score, expected.score) < SAME, runtime
        assert about["largest_difference"][runtime]["map"] < SAME
        alone = loaded.predict(images[2:3])
        assert far(alone.map, found.map[2:3]) < 2e-5, "an answer must not depend on its company"
        if name == "dapo":
            assert far(found.type_map, expected.type_map) < SAME
            assert far(found.type_score, expected.type_score) < SAME
        else:
            assert found.type_map is None
    assert [g["name"] for g in about["graphs"]] == (["encode", "head"] if method.encodes else ["model"]) and about[
        "input"
    ]["batch"] == "any"
    assert about["class_name"] == ("bottle" if name == "ssvp" else None)


@pytest.mark.parametrize("name", SYSTEMS)
def test_encode_and_head_each_on_its_own(exported, name):
    "Of the embedded pair with its weights; at the number of images the graphs were traced with (2), and at others."
    method, folder, _ = exported(name)
    towers = method.backbones()
    assert {b.row.name for b in towers.values()} <= {"tiny-clip", "tiny-dino", "tiny-clip-text"} and all(
        b.weights == "pretrained" for b in towers.values()
    ), towers
    for runtime in ["torch", "onnxruntime"] + ["openvino"] * available("openvino"):
        steps = load_exported(folder, runtime).steps
        for n in (2, 1, 3):
            images = synthetic_images((SIZE, SIZE), n, 40 + n)
            with torch.no_grad():
                features = flatten_features(method.encode(batch_of(images))) if method.encodes else dict(image=images)
            expected = method.predict(batch_of(images))
            if method.encodes:
                found = steps[0](dict(image=images))
                assert set(found) == set(features), runtime
                for key, value in features.items():
                    assert found[key].shape == value.shape and far(found[key], value) < SAME, (runtime, n, key)
            answer = steps[-1](features)  # the head alone, or what is both
            assert far(answer["map"], expected.map) < SAME, (runtime, n)
            assert far(answer["score"], expected.score) < SAME, (runtime, n)


def test_ssvp_draws_the_same_latents_every_time(exported):
    method, folder, _ = exported("ssvp")
    images = synthetic_images((SIZE, SIZE), 2, 9)
    torch.manual_seed(5)
    first = load_exported(folder).predict(images)
    torch.manual_seed(6)
    assert np.array_equal(first.score, load_exported(folder).predict(images).score) and method.vcpg.p.latents == 10


def test_the_description_is_in_the_file_and_beside_it(exported):
    onnx = pytest.importorskip("onnx")
    method, folder, about = exported("visualad")
    beside = json.loads((folder / "export.json").read_text())
    inside = {p.key: p.value for p in onnx.load(folder / "model.onnx").metadata_props}
    inside = json.loads(inside["zsad_nb"])
    tower = beside["backbones"]["backbone"]
    assert tower["hash"] == method.backbone.hash and tower["mean"] == [0.5, 0.5, 0.5] and tower["size"] == SIZE
    for key in ("input", "outputs", "backbones", "parameters", "learned", "method"):
        assert inside[key] == beside[key], key
    assert (
        beside["input"]["layout"] == "NCHW"
        and beside["input"]["range"] == [0, 1]
        and "icubic" in beside["input"]["resize"]
    )
    files = {"torch": ""}
    torch.export.load(folder / "model.pt2", extra_files=(files := {"zsad_nb.json": ""}))
    assert json.loads(files["zsad_nb.json"])["method"] == "visualad"
    assert json.loads((exported("dapo")[1] / "export.json").read_text())["types"] == ["scratch", "dent"]


def test_pictures_of_any_kind(exported, tmp_path):
    method, folder, _ = exported("visualad")
    loaded = load_exported(folder)
    pixels = (synthetic_images((90, 70), 1, 3)[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    Image.fromarray(pixels).save(tmp_path / "a b.png")
    ways = [
        loaded.predict(x)
        for x in (pixels, Image.fromarray(pixels), tmp_path / "a b.png", [str(tmp_path / "a b.png"), pixels])
    ]
    assert all(np.array_equal(w.map[0], ways[0].map[0]) for w in ways) and len(ways[3].score) == 2
    assert far(ways[0].map, method.predict(batch_of(torch.from_numpy(loaded.image(pixels)))).map) < SAME
    for wrong in (torch.rand(1, 3, 32, 32), np.zeros((1, 3, SIZE, SIZE), "uint8")):
        with pytest.raises(ValueError, match="give \\(B, 3, 64, 64\\)"):
            loaded.predict(wrong)


def test_the_reader_needs_no_weights(exported, monkeypatch):
    _, folder, _ = exported("visualad")
    from zsad_nb.methods import base

    monkeypatch.setattr(base, "create", lambda *a, **k: pytest.fail("no method is built"))
    assert load_exported(folder).predict(synthetic_images((SIZE, SIZE), 1)).map.shape == (1, SIZE, SIZE)


# ---- whole or not at all
def test_what_stands_is_kept_and_what_fails_leaves_nothing(tmp_path):
    method = create("self_distance", image_size=SIZE, tap=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds other things"):
        export(method, tmp_path / "mine")
    with pytest.raises(ValueError, match="use torch, onnx or both"):
        export(method, tmp_path / "new", ("coreml",))
    with pytest.raises(EngineError, match="nothing was written"):
        export(method, tmp_path / "strict", "torch", tolerance=-1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "export.json").write_text("{}")  # an older export
    (tmp_path / "again" / "model.onnx").write_text("old")
    method.train()
    assert set(export(method, tmp_path / "again", "torch")["largest_difference"]) == {"torch"} and method.training
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["encode.pt2", "export.json", "head.pt2"]
    with pytest.raises(ValueError, match="holds no onnx files"):
        load_exported(tmp_path / "again")
    with pytest.raises(ValueError, match="no export.json"):
        load_exported(tmp_path / "mine")
    (tmp_path / "again" / "head.pt2").unlink()
    with pytest.raises(ValueError, match="lacks head.pt2"):
        load_exported(tmp_path / "again", "torch")


def test_a_method_that_judges_by_evidence_is_refused(tmp_path):
    method = create("self_distance", image_size=96)
    method.evidence = "self"
    with pytest.raises(ValueError, match=r"export it after use_evidence\('method'\)"):
        export(method, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_without_onnx_the_extra_is_named(monkeypatch, tmp_path):
    real = importlib.import_module

    def broken(name, *a):
        if name == "onnxscript":
            raise ImportError("cannot import name 'ir' from partially initialized module")
        return real(name, *a)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EngineError, match=r"onnxscript.*pip install zsad_nb\[engines\]"):
        export(create("self_distance", image_size=SIZE), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path, capsys):
    if not available("onnxruntime"):
        pytest.skip("no onnxruntime")
    path = save(create("self_distance", image_size=SIZE, tap=1), tmp_path / "c.safetensors")
    assert main(["export", str(path), "--out", str(tmp_path / "out"), "--formats", "onnx"]) == 0
    said = capsys.readouterr().out
    assert (
        "onnxruntime" in said
        and "encode.onnx, head.onnx and export.json" in said
        and (tmp_path / "out" / "head.onnx").is_file()
    )
    assert main(["export", str(path), "--out", str(tmp_path)]) == 2 and "holds other things" in capsys.readouterr().err


# ---- without PyTorch
GOOD = 19  # photographs: as many as a rate of 5 % needs

WITHOUT = """
import sys

ALLOWED = {*sys.stdlib_module_names, "zsad_nb", "numpy", "PIL", ENGINE}

class Nothing:  # an environment in which only these are installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED and not name.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r} here", name=name)

sys.meta_path.insert(0, Nothing())

import json
from pathlib import Path
import numpy as np
from zsad_nb.deploy.inference import Limits, load_exported

room = Path(sys.argv[2])
looking = load_exported(sys.argv[1], ENGINE)
good = sorted((room / "good").iterdir())
parts = sorted((room / "parts").iterdir())
found = looking.predict(parts)
limits = looking.calibrate(good, rate=0.05)
for number, part in enumerate(parts):
    looking.overlay(part, found.map[number], limits).save(room / f"{ENGINE}-{part.name}")
np.savez(room / f"{ENGINE}.npz", images=looking.image(parts), map=found.map, score=found.score)
foreign = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "pandas", "scipy", "matplotlib", "onnx"})
print(json.dumps(dict(vars(limits), foreign=foreign)))
"""


@pytest.fixture(scope="module")
def looked_at(exported, room):
    "The folder of an export, photographs of good parts and of others; and the method itself."
    method, folder, _ = exported("visualad")
    pictures = synthetic_images((90, 70), GOOD + 3, 40)
    for number, picture in enumerate((pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        name = "good" if number < GOOD else "parts"
        (room / name).mkdir(exist_ok=True)
        Image.fromarray(picture).save(room / name / f"{number:02}.png")
    return folder, room, method


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_without_torch(looked_at, engine):
    "Everything but NumPy, Pillow and the engine is taken away; what comes out is what the library says."
    if not available(engine):
        pytest.skip(f"no {engine}")
    export_folder, folder, method = looked_at
    script = textwrap.dedent(WITHOUT).replace("ENGINE", repr(engine))
    done = subprocess.run(
        [sys.executable, "-c", script, str(export_folder), str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["foreign"] == []
    with np.load(folder / f"{engine}.npz") as file:
        found = dict(file)
    parts = sorted((folder / "parts").iterdir())
    images = torch.stack([resize_for(method, read_image(part), SIZE) for part in parts]).float() / 255
    assert far(found["images"], images) == 0, "the library's pixels, to the last bit"
    expected = method.predict(batch_of(images))
    assert expected.map.std() > 1e-3 and far(found["map"], expected.map) < 1e-4
    assert far(found["score"], expected.score) < 1e-4

    good = torch.stack([resize_for(method, read_image(p), SIZE) for p in sorted((folder / "good").iterdir())])
    normal = method.predict(batch_of(good.float() / 255))
    assert abs(said["score"] - from_normals(normal.score.numpy(), 0.05).value) < 1e-4
    peaks = normal.map.amax((1, 2)).numpy()
    pixel = from_normals(peaks, 0.05)
    assert abs(said["pixel"] - pixel.value) < 1e-4
    colours = Calibration({}, pixel={"": pixel}, typical={"": float(np.median(peaks))}).colours("")
    low, high = said["low"], said["high"]
    assert np.abs(np.subtract((low, high), colours)).max() < 1e-4, "the inspector's scale"

    photograph = np.asarray(read_image(parts[0]))
    heat = Image.fromarray(found["map"][0]).resize(photograph.shape[1::-1], Image.Resampling.BILINEAR)
    shown = np.asarray(Image.open(folder / f"{engine}-{parts[0].name}"))
    house = Rendering(photograph, np.asarray(heat)).panel("overlay", View(low, high))
    assert np.array_equal(shown, house), "the house's colours"


def test_what_is_asked_for_in_vain(looked_at):
    folder, room, _ = looked_at
    looking = load_exported(folder)
    good = sorted((room / "good").iterdir())
    with pytest.raises(ValueError, match="19 normal images are too few for a false-alarm rate of 0.01"):
        looking.calibrate(good)
    looking.about = {name: value for name, value in looking.about.items() if name != "colours"}
    with pytest.raises(ValueError, match="colours of heatmaps; export again"):
        looking.overlay(good[0], np.zeros((SIZE, SIZE)), Limits(0, 0, 0, 1))
