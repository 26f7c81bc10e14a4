"A method that wants its images resized otherwise gives the same map through every door; images that were resized otherwise are refused."

import ast
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import zsad_nb
from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.graphs import hold_constant
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.data.images import Batch, batches
from zsad_nb.data.method_images import batches_for, resize_for
from zsad_nb.deploy import bench
from zsad_nb.deploy.export import describe_export
from zsad_nb.deploy.inference import Exported
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.multi_type import evaluate_types
from zsad_nb.evaluation.views import map_ranges, view
from zsad_nb.explore.maps_store import make_store, open_store
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.sources import identity
from zsad_nb.methods.base import create, load, save
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of

SIDE, DRAWN = 32, 80  # pixels a method sees, and of the files
SAME = 1e-6


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    drawn = synthetic_index(tmp_path_factory.mktemp("drawn"), "target", DRAWN, normal=1, defective=2)
    few = drawn[drawn["category"].isin(["carpet", "gear"])].reset_index(drop=True)
    few.attrs = dict(drawn.attrs)
    return few


def model_of(name: str = "self_distance", way: str = "bilinear", **parameters):
    "A method whose tower, and nothing else, says how images are resized."
    weights = dict(weights="random:0") if name in ("self_distance", "visualad") else dict(clip_weights="random:0")
    model = create(name, **{**weights, "image_size": SIDE, **parameters}).eval()
    for tower in model.backbones().values():
        if hasattr(tower, "interpolation"):
            tower.interpolation = way
    return model


def read_by_hand(index, way: str = "bilinear") -> torch.Tensor:  # (n, 3, SIDE, SIDE)
    "Every image with Pillow alone."
    found = []
    for name in index["image"]:
        with Image.open(Path(index.attrs["root"]) / name) as image:
            small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), getattr(Image.Resampling, way.upper())))
        found.append(torch.from_numpy(small.copy()).permute(2, 0, 1))
    return torch.stack(found).float() / 255


def maps_by_hand(model, index) -> dict:  # image -> map
    images = read_by_hand(index)
    no = torch.zeros(len(index), dtype=torch.bool)
    batch = Batch(
        images,
        torch.zeros(len(index), 1, SIDE, SIDE, dtype=torch.bool),
        no,
        no.long(),
        list(index["category"]),
        list(index["image"]),
        ~no,
    )
    return dict(zip(index["image"], model.predict(batch).map))


class Pixels(SimpleNamespace):
    "Pixels and no more."

    def __init__(self, image):
        super().__init__(image=image)

    def to(self, device):
        return self


def far(found, expected) -> float:
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())


def test_the_two_ways_differ(index):
    expected = maps_by_hand(model_of(), index)
    other = model_of(way="bicubic")
    first = next(iter(batches_for(other, index, SIDE, 1)))
    assert far(other.predict(first).map[0], expected[index["image"][0]]) > 1e-3, "the other tests could not fail"


# -------------------------------------------------------------------------------------------------------------------- the same map by every door


def by_predict(model, index, folder):
    return {path: m for b in batches_for(model, index, SIDE, 2) for path, m in zip(b.path, model.predict(b).map)}


def by_cache(model, index, folder):
    cache = FeatureCache(folder / "kept")
    other = model_of("april_gan", "bicubic", templates=("a {}.",))
    for batch in batches_for(other, index, SIDE, 4):
        other.predict(batch, cache)
    assert cache.misses == len(index)
    return {path: m for b in batches_for(model, index, SIDE, 4) for path, m in zip(b.path, model.predict(b, cache).map)}


def by_store(model, index, folder):
    store = make_store(model, index, folder / "stores", dtype="float32")
    store.compute(progress=False)
    again = open_store(store.folder)  # without the method: its pictures are those that the method saw
    assert (
        far(
            again.read(0).image[0],
            resize_for(model, Image.open(Path(index.attrs["root"]) / again.index["image"][0]), SIDE) / 255,
        )
        == 0
    )
    return {store.index["image"][row]: store.map(row) for row in range(len(store))}


def by_view(model, index, folder):
    seen = view(model, index, SIDE)
    return dict(zip(seen.rows["image"], seen.maps))


def by_export(model, index, folder):
    "What an export's description makes of a file, in PyTorch: its graph is compared elsewhere."
    exported = Exported.__new__(Exported)
    nothing = SimpleNamespace(batch=None, inputs=("image",), outputs=(), reference={})
    exported.about = json.loads(json.dumps(describe_export(model, SIDE, dict(model=nothing), None), default=str))
    assert exported.about["input"]["interpolation"] == "bilinear" and "BILINEAR" in exported.about["input"]["resize"]
    images = [torch.from_numpy(exported.image(Path(index.attrs["root"]) / name)) for name in index["image"]]
    return {name: model.predict(Pixels(image)).map[0] for name, image in zip(index["image"], images)}


@pytest.mark.parametrize("door", [by_predict, by_cache, by_store, by_view, by_export], ids=lambda door: door.__name__)
def test_the_same_map(index, tmp_path, door):
    torch.manual_seed(0)
    model = model_of("april_gan", templates=("a {}.",)) if door is by_cache else model_of()
    expected = maps_by_hand(model, index)
    found = door(model, index, tmp_path)
    assert set(found) == set(index["image"])
    for name, m in found.items():
        assert far(m, expected[name]) < SAME, name


@pytest.mark.parametrize("kind", ["path", "bytes", "picture", "array"])
def test_inspector(index, kind):
    model = model_of()
    expected = maps_by_hand(model, index)
    path = Path(index.attrs["root"]) / index["image"][1]
    what = dict(
        path=path, bytes=io.BytesIO(path.read_bytes()), picture=Image.open(path), array=np.asarray(Image.open(path))
    )[kind]
    found = Inspector(model, max_side=SIDE).predict(what)
    assert found.peak == pytest.approx(float(expected[index["image"][1]].max()), abs=SAME)


def test_evaluate_and_scales(index):
    model = model_of()
    expected = maps_by_hand(model, index)
    rows = evaluate(model, index, progress=False).per_image
    scales = map_ranges(model, index, 0)
    for table in (rows, scales):
        for row in table.itertuples():
            assert row.map_low == pytest.approx(
                float(expected[row.image].min()), abs=SAME
            ) and row.map_high == pytest.approx(float(expected[row.image].max()), abs=SAME)


def spied(model, door) -> list:
    "The images that reach the towers."
    seen = []
    own = model.encode
    model.encode = lambda batch: seen.append(batch.image) or own(batch)
    door(model)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("door", ["types", "fit", "bench"])
def test_what_reaches_the_towers(index, door, monkeypatch):
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1.0)
    model = model_of("multiads", templates=("a {}.",), patterns=1)
    bad = index[index["anomalous"]].reset_index(drop=True)
    bad.attrs = dict(index.attrs)
    ways = dict(
        types=lambda m: evaluate_types(m, bad, progress=False),
        fit=lambda m: fit(m, bad, recipe_of(m, epochs=1, batch_size=2), progress=False, workers=0),
        bench=lambda m: bench.measure(m.prepare(bad), bad, SIDE, repeats=1),
    )
    with torch.no_grad():
        expected = read_by_hand(bad)
    seen = torch.cat(spied(model.prepare(bad, training=True), ways[door]))
    assert len(seen) and all((expected - image).abs().flatten(1).amax(1).min() == 0 for image in seen)


def test_other_processes_get_the_tower_as_it_is():
    assert pickle.loads(pickle.dumps(model_of())).interpolation == "bilinear"


# --------------------------------------------------------------------------------------------------------------------------------- the rule


def test_images_resized_otherwise_are_refused(index):
    model = model_of()
    wrong = next(iter(batches(index, SIDE, 2)))
    with pytest.raises(ValueError, match="were resized bicubic, self_distance wants them bilinear: .*batches_for"):
        model.predict(wrong)
    with pytest.raises(ValueError, match="were resized bicubic"):
        model.features(wrong[[0]])
    assert next(iter(batches(index, DRAWN, 2))).interpolation == "", "nothing was resized"
    model.predict(next(iter(batches(index, DRAWN, 2))))
    with pytest.raises(ValueError, match="resized in different ways .bicubic, bilinear."):
        Batch.cat([wrong, next(iter(batches_for(model, index, SIDE, 2)))])
    assert (
        Batch.cat([wrong, wrong]).interpolation == wrong[:1].interpolation == wrong.to("cpu").interpolation == "bicubic"
    )
    assert next(iter(batches(index, DRAWN, 1, mosaic=1.0))).interpolation == "bicubic", "the tiles are"
    with pytest.raises(ValueError, match="interpolation='cubic'"):
        batches(index, SIDE, interpolation="cubic")
    with pytest.raises(ValueError, match="interpolation='cubic'"):
        create_backbone("tiny-clip", "random:0", interpolation="cubic")


@pytest.mark.parametrize("way", ["bicubic", "bilinear"])
def test_a_tower_of_another_size(way):
    "Tensors are resized as files are: in PyTorch, and in a graph."
    tower = create_backbone("tiny-clip", "random:0", SIDE, interpolation=way)
    image = torch.rand(1, 3, 50, 41)
    expected = torch.nn.functional.interpolate(image, (SIDE, SIDE), mode=way, antialias=True).clamp(0, 1)
    assert far(tower.prepare(image) * tower.std + tower.mean, expected) < SAME
    with hold_constant(tower):
        assert far(tower.prepare(image) * tower.std + tower.mean, expected) < 1e-5


def test_anovl_says_it_by_its_parameter(tmp_path):
    released, ours = (
        create("anovl", clip_weights="random:0", image_size=SIDE, **changes) for changes in ({}, dict(resize="bicubic"))
    )
    assert (released.interpolation, ours.interpolation) == ("bilinear", "bicubic")
    assert load(save(ours, tmp_path / "ours.safetensors")).interpolation == "bicubic"
    assert released.encode_key() != ours.encode_key() and identity(released)["hash"] != identity(ours)["hash"]


def test_features_and_thresholds_of_the_two_ways_never_meet(index):
    one, other = (model_of("april_gan", way) for way in ("bilinear", "bicubic"))
    assert one.encode_key() != other.encode_key() and identity(one)["hash"] != identity(other)["hash"]
    assert "interpolation" not in str(other.encode_key()), "what was kept before stays known"


def test_every_door_of_the_package():
    "Outside the room of the data, images are read and resized for a method, or for an interpolation that is named."
    found = []
    for path in sorted(Path(zsad_nb.__file__).parent.rglob("*.py")):
        if path.parent.name == "data":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("batches", "resize"):
                found.append((path.name, node.lineno, "interpolation" in {k.arg for k in node.keywords}))
    assert found and all(named for _, _, named in found), found


def test_images_alone_need_a_size(index):
    with pytest.raises(ValueError, match="pass size"):
        view(None, index)
    assert view(None, index, SIDE).images.shape[1:3] == (SIDE, SIDE)
