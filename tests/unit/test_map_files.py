"Maps in files: of predictions and evaluations, at the images' own size; submissions; annotations of what was marked."

import json
import warnings
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

import zsad_nb as zsad
from zsad_nb.cli.commands import main
from zsad_nb.data.coco import read_coco
from zsad_nb.data.index import make_index, root_of
from zsad_nb.data.map_files import MapFolder, at_size, read_map, write_map, write_marks
from zsad_nb.data.masks import load_mask
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.inspection.annotations import results_as_coco
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.submission import check_submission, write_submission
from zsad_nb.methods.base import create
from zsad_nb.runs.shards import evaluate_shards


@pytest.fixture(scope="module")
def method():
    return create("self_distance", image_size=48)


def photograph(path, size=(30, 44), seed=0, spot=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(90, 140, (*size, 3), dtype=np.uint8)
    if spot:
        pixels[size[0] // 3 : size[0] // 2, size[1] // 4 : size[1] // 2] = 250
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    for number, (name, size) in enumerate([("a/0.png", (30, 44)), ("a/0.jpg", (90, 70)), ("b/0.png", (20, 200))]):
        photograph(tmp_path / "photos" / name, size, number)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "kind, suffix, dtype", [("float16", "tiff", "f2"), ("float32", "tiff", "f4"), ("npy", "npy", "f4")]
)
def test_predict_writes_maps_at_the_images_own_size(tmp_path, photos, method, kind, suffix, dtype):
    inspector = Inspector(method, max_side=32).use_values(0.5, 0.3)  # pictures are smaller, maps are not
    table = inspector.predict(photos, tmp_path / "out", "none", progress=False, maps=kind, marks=True)
    files = json.loads((tmp_path / "out/maps.json").read_text())
    assert set(files) == set(table["path"]) and len({which["map"] for which in files.values()}) == 3
    for path, which in files.items():
        width, height = Image.open(path).size
        heat = read_map(tmp_path / "out" / which["map"])
        assert which["map"].endswith(suffix) and heat.dtype == np.dtype(dtype) and heat.shape == (height, width)
        own = at_size(Inspector(method).predict(path).raw, (width, height))
        assert np.array_equal(heat, own.astype(dtype))
        marks = np.asarray(Image.open(tmp_path / "out" / which["marks"]))
        assert marks.dtype == np.uint8 and set(np.unique(marks)) <= {0, 255}
        assert np.array_equal(marks > 0, own > 0.3)


def test_a_lost_map_is_made_again_and_nothing_else(tmp_path, photos, method):
    inspector = Inspector(method)
    first = inspector.predict(photos, tmp_path / "out", "none", progress=False)
    assert first.attrs["summary"]["known_before"] == 0
    with_maps = inspector.predict(photos, tmp_path / "out", "none", progress=False, maps="float32")
    assert with_maps.attrs["summary"]["known_before"] == 0  # rows without maps are not enough
    again = inspector.predict(photos, tmp_path / "out", "none", progress=False, maps="float32")
    assert again.attrs["summary"]["known_before"] == 3
    files = json.loads((tmp_path / "out/maps.json").read_text())
    lost = tmp_path / "out" / files[again["path"][1]]["map"]
    before = lost.read_bytes()
    lost.unlink()
    last = inspector.predict(photos, tmp_path / "out", "none", progress=False, maps="float32")
    assert last.attrs["summary"]["known_before"] == 2 and lost.read_bytes() == before
    assert last["score"].tolist() == first["score"].tolist()


def test_what_cannot_be_written_is_refused_before_anything_starts(tmp_path, photos, method):
    inspector = Inspector(method)
    with pytest.raises(ValueError, match="maps='float64'; use float16, float32, npy"):
        inspector.predict(photos, tmp_path / "out", maps="float64")
    with pytest.raises(ValueError, match="give out=FOLDER"):
        zsad.predict(photos, inspector, maps="npy")
    with pytest.raises(ValueError, match="marks=True needs a pixel threshold"):
        inspector.predict(photos, tmp_path / "out", marks=True)
    assert not (tmp_path / "out").exists()
    heat = np.full((4, 5), 1e5)
    with pytest.raises(ValueError, match="reaches 100000, more than float16 holds; use float32"):
        write_map(tmp_path / "a.tiff", heat, "float16")
    with pytest.raises(ValueError, match="no numbers"):
        write_map(tmp_path / "a.tiff", heat * np.nan)
    assert not (tmp_path / "a.tiff").exists()
    (tmp_path / "a.tiff").write_bytes(b"II*\0 no tiff")
    with pytest.raises(ValueError, match="cannot be read as a map"):
        read_map(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="needs a mask of 5x4 pixels"):
        MapFolder(tmp_path, "npy", marks=True).write("x", heat, (5, 4), np.zeros((2, 2), bool))


@pytest.fixture
def labelled(tmp_path):
    rows = []
    for number in range(6):
        photograph(tmp_path / f"set/{number}.png", (30, 44 + number), number, number % 2 == 1)
        row = dict(image=f"{number}.png", category=f"c{number // 4}", split="test", anomalous=number % 2 == 1)
        if number % 2:
            mask = np.zeros((30, 44 + number), bool)
            mask[10:15, 11:22] = True
            write_marks(tmp_path / f"set/m{number}.png", mask)
            row["mask"] = f"m{number}.png"
        rows.append(row)
    return make_index(rows, tmp_path / "set", "toy")


def test_evaluate_writes_maps_and_its_numbers_stay(tmp_path, method, labelled):
    index = labelled
    plain = evaluate(method, index, progress=False, workers=0)
    with_maps = evaluate(
        method, index, progress=False, workers=0, maps="float32", map_threshold=0.25, map_folder=tmp_path / "out"
    )
    assert with_maps.per_class.equals(plain.per_class) and with_maps.per_image.equals(plain.per_image)
    for number in range(6):
        heat = tifffile.imread(tmp_path / f"out/maps/{number}.png.tiff")
        assert heat.shape == (30, 44 + number)
        assert np.array_equal(load_mask(tmp_path / f"out/marks/{number}.png.png"), heat > 0.25)
    with pytest.raises(ValueError, match="give map_folder=FOLDER"):
        evaluate(method, index, progress=False, maps="npy")


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Here:
    "An executor that computes at once; a shard still reads from its file what it has to know."

    def submit(self, function, *args):
        future: Future = Future()
        future.set_result(function(*args))
        return future


@pytest.mark.parametrize("shards", [9, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_write_every_map_once_and_as_one_process_does(tmp_path, method, labelled, shards):
    """One image in two categories, two names that are one where case does not count, and a folder that is not there;
    shards of one image, and two shards in processes of their own."""
    photograph(tmp_path / "set/A.png", (20, 30), 7)
    photograph(tmp_path / "set/a.PNG", (22, 30), 8)
    rows = [dict(image=name, category="c0", split="test", anomalous=False) for name in ("A.png", "a.PNG")]
    rows += [dict(image="A.png", category="c1", split="test", anomalous=False)]
    index = pd.concat([labelled, make_index(rows, tmp_path / "set", "toy")], ignore_index=True)
    index.attrs = dict(labelled.attrs)
    how = dict(progress=False, batch_size=1, workers=0, maps="float16", map_threshold=0.25)
    whole = evaluate(method, index, map_folder=tmp_path / "whole", **how)
    folder = tmp_path / "not" / "yet"
    executor = Here() if shards > 2 else None
    for _ in range(2 if executor else 1):  # over maps of an earlier call, too
        found = evaluate_shards(method, index, shards=shards, executor=executor, map_folder=folder, **how)
        assert content(folder) == content(tmp_path / "whole") and len(content(folder)) == 18
        assert found.per_image.equals(whole.per_image) and found.per_class.equals(whole.per_class)
    with pytest.raises(ValueError, match="give map_folder=FOLDER"):
        evaluate_shards(method, index, shards=2, progress=False, maps="npy")


def test_one_image_in_two_categories_has_two_maps(tmp_path, method):
    photograph(tmp_path / "0.png")
    rows = [dict(image="0.png", category=name, split="test", anomalous=False) for name in ("a", "b")]
    index = make_index(rows, tmp_path, "toy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(method, index, progress=False, maps="npy", map_folder=tmp_path / "out")
    assert len(list((tmp_path / "out/maps").iterdir())) == 2


@pytest.mark.parametrize("polygons", [[], ["--polygons"]])
def test_marked_regions_become_annotations(tmp_path, photos, method, capsys, polygons):
    out = tmp_path / "out"
    arguments = ["predict", str(photos), "--out", str(out), "-p", "image_size", "48", "--pictures", "none"]
    assert main([*arguments, "--pixel-threshold", "0.3", "--maps", "float32", "--marks", "--coco", *polygons]) == 0
    assert "annotations.json" in capsys.readouterr().out
    files = json.loads((out / "maps.json").read_text())
    data = json.loads((out / "annotations.json").read_text())
    assert sorted(image["file_name"] for image in data["images"]) == ["a/0.jpg", "a/0.png", "b/0.png"]
    index = read_coco(out / "annotations.json", images=photos)
    for row in index.itertuples():
        which = files[str(root_of(index) / row.image)]
        marks = load_mask(out / which["marks"])
        assert bool(row.mask) == marks.any() == row.anomalous
        if row.mask:
            assert np.array_equal(load_mask(root_of(index) / row.mask), marks)
    for part in data["annotations"]:
        assert isinstance(part["segmentation"], list) == bool(polygons)
        name = data["images"][part["image_id"] - 1]["file_name"]
        heat = read_map(out / files[str(photos / name)]["map"])
        x, y, w, h = part["bbox"]
        assert 0.3 < part["score"] <= heat[y : y + h, x : x + w].max() + 1e-6
    assert main([*arguments, "--coco"]) == 2
    assert "--coco makes annotations of what is marked: add --marks" in capsys.readouterr().err
    assert main([*arguments, "--polygons"]) == 2
    assert "--polygons says how annotations are written: add --coco and --marks" in capsys.readouterr().err
    (out / "maps.json").write_text("[]")
    with pytest.raises(ValueError, match="was changed after it was written"):
        results_as_coco(out)


def ad_2(root, classes=("can", "vial")):
    for category in classes:
        for number in range(4):
            photograph(root / f"{category}/validation/good/00{number}_regular.png", (24, 36), number, False)
            photograph(root / f"{category}/test_private/00{number}_regular.png", (24, 36), 10 + number)
            photograph(root / f"{category}/test_private_mixed/00{number}_mixed.png", (48, 30), 20 + number)
    return root


def test_a_submission_is_laid_out_and_goes_on_where_it_was_stopped(tmp_path, method):
    root = ad_2(tmp_path / "ad2")
    inspector = Inspector(method)
    how = dict(rate=0.5, progress=False)
    problems = write_submission(root, inspector, tmp_path / "mine", **how)
    assert problems["problem"].tolist() == ["classes"]
    names = sorted(path.relative_to(tmp_path / "mine").as_posix() for path in (tmp_path / "mine").rglob("*.*"))
    assert len(names) == 32
    assert "anomaly_images/can/test_private/000_regular.tiff" in names
    assert "anomaly_images_thresholded/vial/test_private_mixed/003_mixed.png" in names
    heat = tifffile.imread(tmp_path / "mine/anomaly_images/can/test_private_mixed/000_mixed.tiff")
    assert heat.dtype == np.float16 and heat.shape == (48, 30)
    lost = tmp_path / "mine/anomaly_images/can/test_private/002_regular.tiff"
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*.tiff") if path != lost}
    content = lost.read_bytes()
    lost.unlink()
    assert len(check_submission(tmp_path / "mine", root, ("can", "vial"))) == 1
    assert len(write_submission(root, inspector, tmp_path / "mine", ("can", "vial"), **how)) == 0
    assert lost.read_bytes() == content and all(path.stat().st_mtime_ns == at for path, at in others.items())
    with pytest.raises(ValueError, match="was begun with other settings"):
        write_submission(root, inspector, tmp_path / "mine", pixel_threshold=0.3, **how)
    with pytest.raises(ValueError, match="has no class 'cans'; it has can, vial"):
        write_submission(root, inspector, tmp_path / "mine", ("cans",), **how)


def test_the_check_finds_what_the_server_would(tmp_path, method, capsys):
    root = ad_2(tmp_path / "ad2", ("can",))
    folder = tmp_path / "mine"
    write_submission(root, Inspector(method), folder, ("can",), pixel_threshold=0.3, progress=False)
    assert main(["submit", str(root), "--out", str(folder), "--check", "--classes", "can"]) == 0
    assert "ready: tar -czf" in capsys.readouterr().out
    maps = folder / "anomaly_images/can/test_private"
    marks = folder / "anomaly_images_thresholded/can/test_private_mixed"
    tifffile.imwrite(maps / "000_regular.tiff", np.zeros((24, 36), np.float32))
    tifffile.imwrite(maps / "001_regular.tiff", np.zeros((24, 36, 3), np.float16), photometric="rgb")
    tifffile.imwrite(maps / "002_regular.tiff", np.full((24, 36), np.nan, np.float16))
    (maps / "003_regular.tiff").write_bytes(b"nothing")
    Image.fromarray(np.full((48, 30), 1, np.uint8)).save(marks / "000_mixed.png")
    Image.fromarray(np.zeros((48, 30, 3), np.uint8)).save(marks / "001_mixed.png")
    Image.fromarray(np.zeros((30, 48), np.uint8)).save(marks / "002_mixed.png")
    (marks / "003_mixed.png").rename(marks / "003_regular.png")
    found = check_submission(folder, root, ("can",)).set_index("file")["message"].to_dict()
    assert {name.rpartition("/")[2]: message.partition(";")[0] for name, message in found.items()} == {
        "000_regular.tiff": "is float32",
        "001_regular.tiff": "has the shape (24, 36, 3)",
        "002_regular.tiff": "holds values that are NaN or infinite",
        "003_regular.tiff": found["anomaly_images/can/test_private/003_regular.tiff"].partition(";")[0],
        "000_mixed.png": "holds the values 1",
        "001_mixed.png": "has the shape (48, 30, 3)",
        "002_mixed.png": "is 48x30, its image is 30x48",
        "003_mixed.png": "is not there",
        "003_regular.png": "does not belong here",
    }
    assert "cannot be read as a map" in found["anomaly_images/can/test_private/003_regular.tiff"]
    assert main(["submit", str(root), "--out", str(folder), "--check", "--classes", "can"]) == 1
    assert "9 problems; do not upload" in capsys.readouterr().out
    assert main(["submit", str(root), "--out", str(tmp_path / "none"), "--check"]) == 2
    assert "does not exist; make it with zsad submit" in capsys.readouterr().err
