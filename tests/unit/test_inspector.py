"One's own images: folders as they come, killed runs, what identifies a row, what is refused."

import contextlib
import csv
import gc
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import ndimage

from zsad_nb.cli.commands import main
from zsad_nb.core.locks import Busy, lock
from zsad_nb.core.tables import read_table, spreadsheet_safe
from zsad_nb.data.stored import BadImage
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.inspection import inspector as module
from zsad_nb.inspection import results
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.journal import Journal
from zsad_nb.inspection.regions import at_size, find_regions
from zsad_nb.inspection.results import read_results
from zsad_nb.inspection.sources import from_array, method_from, sources
from zsad_nb.inspection.verdicts import COLUMNS, COUNTS, NUMBERS, PEOPLE, Inspection, exit_code, for_people, table_of
from zsad_nb.methods.base import METHODS, Method, Prediction, create, save
from zsad_nb.methods.controls import SelfDistance, SelfDistanceParameters
from zsad_nb.synthetic.benchmark import render, synthetic_index

PHOTO = render("leather", 250_001, 96, "scratch").image


class Counted(SelfDistance):
    "Counts the images it was given."

    seen = 0

    def forward(self, features, batch):
        Counted.seen += len(batch)
        return super().forward(features, batch)


@pytest.fixture(scope="module")
def method() -> Method:
    return Counted(SelfDistanceParameters(image_size=64, sigma=2.0)).eval()


@pytest.fixture
def inspector(method) -> Inspector:
    Counted.seen = 0
    return Inspector(method)


def write(path: Path, array=PHOTO, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def pictures(folder: Path, count: int) -> list[Path]:
    return [
        write(folder / f"{i:02d}.png", render("leather", 250_000 + i, 48, "scratch" if i % 3 else None).image)
        for i in range(count)
    ]


def names(table: pd.DataFrame) -> list[str]:
    return [Path(p).name for p in table["path"]]


def look(inspector, *arguments, **more):
    return inspector.predict(*arguments, progress=False, **more)


# ---------------------------------------------------------------------------------------------------- a folder as it comes


def as_it_comes(folder: Path, huge: bool = False, locked: bool = True) -> dict[str, tuple]:
    "Every kind of file of the list; good ones with the size they have."
    grey = PHOTO.mean(2)
    write(folder / "plain.png"), write(folder / "plain.jpg", quality=95)
    write(folder / "16 bit.tif", (grey * 256).astype("uint16"))
    write(folder / "see through.png", np.dstack([PHOTO, np.full(PHOTO.shape[:2], 200, "uint8")]))
    write(folder / "small.png", PHOTO[30:50, 40:60])
    write(folder / "grey.png", grey.astype("uint8"))
    write(folder / "Prüfling 7 – 検査.png", PHOTO[::-1])
    write(folder / "sub folder" / "wide.bmp", PHOTO[:10])
    shutil.copy(folder / "plain.png", folder / "zz copy of plain.png")
    good = {
        "plain.png": (96, 96),
        "plain.jpg": (96, 96),
        "16 bit.tif": (96, 96),
        "see through.png": (96, 96),
        "small.png": (20, 20),
        "grey.png": (96, 96),
        "Prüfling 7 – 検査.png": (96, 96),
        "wide.bmp": (96, 10),
        "zz copy of plain.png": (96, 96),
    }
    if huge:
        Image.fromarray(PHOTO).resize((12000, 9000), Image.Resampling.NEAREST).save(folder / "huge.jpg", quality=30)
        good["huge.jpg"] = (12000, 9000)
    (folder / "cut.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:1500])
    (folder / "letter.png").write_text("Dear Sir or Madam")
    (folder / "box.png").mkdir()
    (folder / "empty.bmp").touch()
    os.symlink(folder / "gone", folder / "link.png")
    (folder / "notes.txt").write_text("not asked about")
    (folder / "._plain.png").write_text("what a Mac leaves behind")
    if locked:
        write(folder / "locked.png").chmod(0)
    return good


REASONS = {
    "cut.jpg": "truncated",
    "letter.png": "not an image that can be read",
    "box.png": "a folder with the name of an image; rename it",
    "empty.bmp": "0 bytes",
    "link.png": "no such file",
    "locked.png": "no permission to read it; change its permissions",
}


def test_every_good_image_gets_its_result_and_every_bad_one_a_reason(inspector, tmp_path, permissions_hold):
    good = as_it_comes(tmp_path / "in")
    bad = REASONS
    inspector.use_values(0.0, 0.05)
    table = look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert sorted(names(table)) == sorted([*good, *bad]) and exit_code(table) == 1
    for path, row in zip(names(table), table.to_dict("records")):
        if path in bad:
            assert (
                row["decision"] == "error"
                and bad[path] in row["error"]
                and str(tmp_path) not in row["error"]
                and np.isnan(row["score"])
                and not row["picture"]
            ), path
            continue
        assert (
            row["error"] == ""
            and row["decision"] == "defective"
            and np.isfinite(row["score"])
            and (row["width"], row["height"]) == good[path]
            and row["scale"] == 1
        ), path
        with Image.open(tmp_path / "out" / row["picture"]) as shown:
            width, height = good[path]
            assert shown.width == width and shown.height > height and shown.mode == "RGB", "the scale stands below"
        boxes = np.array(json.loads(row["boxes"])).reshape(-1, 6)
        assert (
            row["regions"] == len(boxes)
            and row["area"] == boxes[:, 4].sum()
            and (boxes[:, 2] <= good[path][0]).all()
            and (boxes[:, 3] <= good[path][1]).all()
        )
    assert (table["regions"] > 0).sum() >= 6
    twins = table.set_index(pd.Series(names(table)))["duplicate_of"]
    assert Path(twins["zz copy of plain.png"]).name == "plain.png" and (twins.drop("zz copy of plain.png") == "").all()
    assert table["score"][names(table).index("plain.png")] == table["score"][names(table).index("zz copy of plain.png")]
    assert table.attrs["summary"] == dict(
        images=len(table),
        errors=len(bad),
        defective=len(good),
        normal=0,
        normal_but_marked=0,
        normal_but_high=0,
        duplicates=1,
        known_before=0,
        left_out=[],
        half_rows=0,
        moved="",
        out=str(tmp_path / "out"),
    )
    on_disk = pd.read_csv(tmp_path / "out" / "results.csv", keep_default_na=False)
    assert sorted(on_disk["path"]) == sorted(table["path"]) and "Prüfling 7 – 検査.png" in "".join(on_disk["path"])
    assert tuple(on_disk.columns) == PEOPLE and on_disk["rank"].tolist()[: len(good)] == [
        str(n) for n in range(1, len(good) + 1)
    ]
    assert (on_disk["decision"].tolist()[len(good) :]) == ["error"] * len(bad)
    pd.testing.assert_frame_equal(read_results(tmp_path / "out"), table, check_like=True)


def test_one_that_cannot_be_used_raises_when_it_is_the_only_one(inspector, tmp_path):
    as_it_comes(tmp_path)
    for name in ("cut.jpg", "letter.png", "empty.bmp", "gone.png"):
        with pytest.raises(BadImage, match=re.escape(name)):
            look(inspector, tmp_path / name)
    with pytest.raises(ValueError, match="there is no folder and no image"):
        look(inspector, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no image in .*box.png"):
        look(inspector, tmp_path / "box.png")


PEAK = """
import sys
from pathlib import Path
from zsad_nb.cli.commands import main
import numpy as np
from zsad_nb.inspection.inspector import Inspector
Inspector.load("self_distance", image_size=64).predict(np.zeros((64, 64), "uint8"))
def peak():  # kB; ru_maxrss would begin with what the parent had
    try: return next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except OSError: return 0
before = peak()
code = main(sys.argv[1:])
print("peak", code, before, peak())
"""


@pytest.mark.slow
def test_a_huge_photograph_in_little_memory(tmp_path):
    "12,000 x 9,000 among the others, on the command line: exit code 1, picture and map at the stated limit, boxes in its own pixels, hardly more than its decoded size in memory."
    as_it_comes(tmp_path / "in", huge=True, locked=False)  # a new process of root's may read everything
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            "-c",
            PEAK,
            "predict",
            str(tmp_path / "in"),
            "--out",
            str(tmp_path / "out"),
            "--model",
            "self_distance",
            "-p",
            "image_size",
            "64",
            "--threshold",
            "0",
            "--pixel-threshold",
            "0.02",
            "--max-side",
            "1024",
            "--pictures",
            "defective",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, code, before, after = next(line for line in run.stdout.splitlines() if line.startswith("peak")).split()
    assert (
        code == "1"
        and "letter.png: not an image that can be read" in run.stderr
        and "DecompressionBomb" not in run.stderr
    ), run.stderr
    table = read_results(tmp_path / "out").set_index(["path"])
    row = table.loc[(tmp_path / "in" / "huge.jpg").as_posix()]
    assert (int(row["width"]), int(row["height"]), float(row["scale"])) == (12000, 9000, 1024 / 12000)
    with Image.open(tmp_path / "out" / row["picture"]) as shown:
        assert shown.width == 1024 and 768 < shown.height < 850
    boxes = np.array(json.loads(row["boxes"]))
    assert (
        boxes[:, 2].max() > 2000
        and boxes[:, 2].max() <= 12000
        and boxes[:, 3].max() <= 9000
        and boxes[:, 4].sum() <= int(row["area"]) <= 108_000_000
    )
    assert (int(after) - int(before)) / 1024 < 600, (  # PIL keeps 4 bytes a pixel; a second copy would make it 830
        f"{(int(after) - int(before)) / 1024:.0f} MB for a photograph of 412 MB"
    )


# ---------------------------------------------------------------------------------------------------- the numbers


def test_the_scores_are_those_of_evaluate(inspector, tmp_path):
    index = synthetic_index(tmp_path / "set", "target", 64, normal=1, defective=2)
    same = evaluate(inspector.method, index, progress=False, batch_size=5).per_image.set_index("image")
    table = look(inspector, index)
    for ours, theirs in (
        ("score", "score"),
        ("peak", "map_high"),
    ):  # in other batches: products of another shape round differently
        np.testing.assert_allclose(table[ours], same[theirs][index["image"]], rtol=1e-6)
    assert table["category"].tolist() == index["category"].tolist()
    for other in (
        Inspector(inspector.method, batch_size=1, workers=0),
        Inspector(inspector.method, batch_size=7, workers=3),
    ):
        pd.testing.assert_frame_equal(look(other, index), table)


def test_the_heatmap_comes_back_at_the_photographs_size(inspector):
    for size in ((96, 96), (20, 20), (300, 40), (1, 50)):
        found = inspector.use_values(0.1, 0.05).predict(np.asarray(Image.fromarray(PHOTO).resize(size)))
        assert (
            found.heat.shape == found.mask.shape == found.image.shape[:2] == found.overlay().shape[:2] == size[::-1]
            and found.size == size
        )
        assert found.heat.max() <= found.peak + 1e-6 and np.array_equal(found.mask, found.heat > 0.05)
        labels, count = ndimage.label(found.mask, np.ones((3, 3)))
        assert len(found.regions) == count and sorted(r.area for r in found.regions) == sorted(
            np.bincount(labels.ravel())[1:].tolist()
        )
    capped = Inspector(inspector.method, inspector.calibration, max_side=100).predict(
        np.asarray(Image.fromarray(PHOTO).resize((400, 200)))
    )
    assert capped.heat.shape == (50, 100) and capped.size == (400, 200) and capped.area == 16 * capped.mask.sum()


def test_shrinking_never_loses_a_spot_and_enlarging_never_adds_one():
    rng = np.random.default_rng(0)
    for _ in range(40):
        heat = rng.random((rng.integers(2, 40), rng.integers(2, 40))).astype("float32")
        size = tuple(rng.integers(1, 80, 2).tolist())
        found = at_size(heat, size)
        assert found.shape == size[::-1] and found.max() <= heat.max() + 1e-6 and found.min() >= heat.min() - 1e-6
        if size[0] <= heat.shape[1] and size[1] <= heat.shape[0]:
            assert found.max() == heat.max()


def test_regions_against_a_slow_reference():
    rng = np.random.default_rng(1)
    for connectivity in (4, 8):
        heat = ndimage.gaussian_filter(rng.random((40, 50)), 1.5)
        mask, parts = find_regions(heat, float(np.quantile(heat, 0.8)), size=(100, 80), connectivity=connectivity)
        labels, count = ndimage.label(mask, ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2))
        want = []
        for n in range(1, count + 1):
            y, x = np.nonzero(labels == n)
            want.append(
                ((2 * x.min(), 2 * y.min(), 2 * x.max() + 2, 2 * y.max() + 2), 4 * len(x), heat[labels == n].max())
            )
        assert sorted((r.box, r.area, r.peak) for r in parts) == sorted(want) and [r.peak for r in parts] == sorted(
            (r.peak for r in parts), reverse=True
        )
        for r in parts:
            assert heat[r.y // 2, r.x // 2] == r.peak
    large, kept = find_regions(heat, float(np.quantile(heat, 0.8)), min_area=20)
    assert large.sum() == sum(r.area for r in kept) and all(r.area >= 20 for r in kept) and len(kept) < count


def test_no_threshold_is_said(inspector, tmp_path):
    found = inspector.predict(PHOTO)
    assert (
        found.decision == "score only"
        and found.mask is None
        and found.threshold is None
        and "no threshold: score only" in found.reason
        and "Inspector.calibrate" in found.reason
    )
    row = look(inspector, pictures(tmp_path, 1)).iloc[0]
    assert (
        row["decision"] == "score only"
        and pd.isna(row["regions"])
        and row["boxes"] == ""
        and np.isnan(row["threshold"])
    )
    with pytest.raises(ValueError, match="pictures='defective' needs a threshold"):
        look(inspector, tmp_path, out=tmp_path / "out", pictures="defective")
    assert inspector.use_values(image=found.score).predict(PHOTO).decision == "normal"  # strictly above
    assert inspector.use_values(image=np.nextafter(found.score, -1)).predict(PHOTO).decision == "defective"


def test_it_shows_itself(inspector):
    for thresholds in ((None, None), (0.1, 0.05)):
        found = inspector.use_values(*thresholds).predict(np.asarray(Image.fromarray(PHOTO).resize((900, 600))))
        page = found._repr_html_()
        assert (
            found.decision in page
            and "900 x 600" in page
            and "src='data:image/jpeg;base64," in page
            and found._repr_png_()[:4] == b"\x89PNG"
            and found.decision in repr(found)
        )
    inspector.use(None)
    assert (
        "<script>"
        not in Inspection(
            "<script>.png",
            "",
            0.0,
            "normal",
            "",
            None,
            None,
            0.0,
            np.zeros((2, 2)),
            None,
            [],
            "",
            {},
            (2, 2),
            (0, 1),
            np.zeros((2, 2, 3), "uint8"),
        )._repr_html_()
    )


# ------------------------------------------------------------------------------------------------------- defect types, odd methods


def test_types_where_the_method_has_them(tmp_path):
    typed = Inspector(
        create(
            "multiads",
            clip_weights="random:0",
            image_size=64,
            types=("hole", "stain", "scratch"),
            words=("hole", "stain", "scratch"),
        ),
        category="leather",
    )
    found = typed.predict(PHOTO)
    assert (
        set(found.types) == {"hole", "stain", "scratch"}
        and abs(sum(found.types.values()) - 1) < 1e-6
        and found.type == max(found.types, key=found.types.get)
        and found.type in repr(found)
    )
    raw = found.score
    assert (
        typed.use_values(raw + 1).predict(PHOTO).type == ""
        and typed.use_values(raw - 1e-6).predict(PHOTO).type == found.type
    )  # a normal image has none
    row = look(typed, [write(tmp_path / "a.png")]).iloc[0]
    assert row["type"] == found.type and json.loads(row["types"]) == {k: round(v, 4) for k, v in found.types.items()}


class Odd(SelfDistance):
    "Not a number for a black image."

    name = "odd"
    Parameters = SelfDistanceParameters

    def forward(self, features, batch):
        dark = torch.where(batch.image.flatten(1).amax(1) > 0, 1.0, torch.nan)
        p = super().forward(features, batch)
        return Prediction(p.map, p.score * dark, {})


def test_a_score_that_is_not_a_number_is_no_result(tmp_path):
    odd = Inspector(Odd(SelfDistanceParameters(image_size=64)).eval())
    write(tmp_path / "black.png", PHOTO * 0), write(tmp_path / "fine.png")
    table = look(odd, tmp_path)
    assert table["decision"].tolist() == ["error", "score only"] and "not a number" in table["error"][0]
    with pytest.raises(BadImage, match="not a number"):
        odd.predict(PHOTO * 0)


def test_methods_that_cannot_judge_one_image():
    with pytest.raises(ValueError, match="mutual judges an image by the other images"):
        Inspector.load("mutual", image_size=64)


# ------------------------------------------------------------------------------------------------------------- what is looked at


def test_arrays_tensors_images_files_are_one_picture(inspector, tmp_path):
    path = write(tmp_path / "a.png")
    want = inspector.predict(path).score
    for same in (
        str(path),
        PHOTO,
        PHOTO / 255,
        Image.fromarray(PHOTO),
        torch.from_numpy(PHOTO).permute(2, 0, 1),
        torch.from_numpy(PHOTO).permute(2, 0, 1) / 255,
    ):
        assert inspector.predict(same).score == want
    assert inspector.predict(PHOTO[..., ::-1]).score != want
    grey = PHOTO[..., 0]
    assert (
        inspector.predict(grey).score
        == inspector.predict(grey[..., None]).score
        == inspector.predict(grey.astype("uint16") * 257).score
    )
    assert Inspector(inspector.method, bits=8).predict(grey.astype("uint16")).score == inspector.predict(grey).score
    table = look(inspector, [PHOTO, path, torch.from_numpy(PHOTO).permute(2, 0, 1)])
    assert names(table) == ["array-00000", "a.png", "array-00002"] and (table["score"] == want).all()
    assert len(look(inspector, np.stack([PHOTO, PHOTO]))) == 2


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 40, 40), "uint8"), "it looks like .3, H, W.: transpose"),
        (np.zeros((40, 40, 3)) + 7, "floats are read as 0 to 1"),
        (np.full((4, 4), np.nan), "not numbers"),
        (np.zeros((40, 40, 2)), "of shape"),
        (torch.zeros(40, 40, 3), "an image is .3, H, W."),
        (np.zeros((0, 4, 3)), "of shape"),
        (np.array([[-1, 2]]), "negative"),
    ],
)
def test_arrays_that_are_not_guessed_at(inspector, array, message):
    with pytest.raises(ValueError, match=message):
        from_array(array)
    with pytest.raises(ValueError, match=message):
        inspector.predict(array)
    assert look(inspector, [array, PHOTO])["decision"].tolist() == ["error", "score only"]


def test_folders_patterns_lists(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/2.JPG", "b/c/3.tiff", "b/[4].png"):
        write(tmp_path / name)

    def short(found):
        return [Path(s.name).name for s in found]

    assert short(sources(tmp_path)) == ["1.png", "2.JPG", "[4].png", "3.tiff"]
    assert short(sources(f"{tmp_path}/**/*.png")) == ["1.png", "[4].png"] and short(
        sources(tmp_path / "b" / "[4].png")
    ) == ["[4].png"]
    assert short(sources([tmp_path / "b", tmp_path / "a" / "1.png", tmp_path / "b"])) == ["[4].png", "3.tiff", "1.png"]
    assert [s.picture for s in sources([tmp_path / "a", tmp_path / "b"])] == [
        "a/1.png",
        "a/2.png",
        "b/[4].png",
        "b/c/3.png",
    ]
    assert [s.category for s in sources(tmp_path, "folder")] == ["a", "a", "b", "c"]
    monkeypatch.chdir(tmp_path / "b")
    assert [s.picture for s in sources(["../a/1.png", "c"])] == ["a/1.png", "b/c/3.png"] and sources(
        "../a/1.png", "folder"
    )[0].category == "a"
    for nothing, message in (
        (tmp_path / "b" / "d", "there is no folder"),
        ("*.gif", "no image fits"),
        ([], "the list is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            sources(nothing)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_names_that_are_hardly_names(inspector, tmp_path):
    odd = [
        os.fsencode(tmp_path) + b"/" + n
        for n in (b"\xff\xfe.png", b"two\nlines.png", b'quote",comma.png', b"x" * 250 + b".png")
    ]
    for n in odd:
        Image.fromarray(PHOTO).save(os.fsdecode(n), "PNG")
    first = look(inspector, tmp_path, out=tmp_path / "out", table="parquet")
    assert (
        (first["decision"] == "score only").all()
        and len(set(first["path"])) == 4
        and all((tmp_path / "out" / p).is_file() for p in first["picture"])
    )
    assert look(inspector, tmp_path, out=tmp_path / "out").attrs["summary"]["known_before"] == 4


# ------------------------------------------------------------------------------------------------------------ stopped and started again


def test_what_is_done_is_not_done_again(inspector, tmp_path):
    pictures(tmp_path / "in", 7)
    first = look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert Counted.seen == 7
    again = look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert Counted.seen == 7 and again.attrs["summary"]["known_before"] == 7
    pd.testing.assert_frame_equal(first, again)
    pictures(tmp_path / "in", 9)
    assert len(look(inspector, tmp_path / "in", out=tmp_path / "out")) == 9 and Counted.seen == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["bytes", "method", "threshold", "category", "max_side", "picture", "row", "table", "size"]
)
def test_a_row_of_something_else_is_not_believed(inspector, tmp_path, change):
    files = pictures(tmp_path / "in", 5)
    inspector.use_values(0.0, 0.05)
    first = look(inspector, tmp_path / "in", out=tmp_path / "out")
    other = inspector
    redone = 5
    aside = True
    if change == "bytes":
        write(files[2], PHOTO)
        redone, aside = 1, False
    if change == "method":
        other = Inspector(Counted(SelfDistanceParameters(image_size=64, sigma=1.0)).eval()).use_values(0.1, 0.05)
    if change == "threshold":
        inspector.use_values(0.2, 0.05)
    if change == "category":
        other = Inspector(inspector.method, inspector.calibration, category="leather")
        aside = False
    if change == "max_side":
        other = Inspector(inspector.method, inspector.calibration, max_side=30)
    if change == "size":
        other = Inspector(inspector.method, size=96).use_values(0.1, 0.05)
    if change == "picture":
        (tmp_path / "out" / first["picture"][1]).unlink()
        redone, aside = 1, False
    if change == "row":  # by hand
        with contextlib.closing(sqlite3.connect(tmp_path / "out" / "journal.sqlite")) as journal, journal:
            journal.execute("UPDATE rows SET decision = 'normal' WHERE rowid = 2")
        redone, aside = 1, False
    if change == "table":  # by hand; the journal has what was found
        path = tmp_path / "out" / "results.csv"
        before = path.read_bytes()
        path.write_text(path.read_text().replace("defective", "normal", 1))
        redone, aside = 0, False
    again = look(other, tmp_path / "in", out=tmp_path / "out")
    summary = again.attrs["summary"]
    assert Counted.seen == 5 + redone and summary["known_before"] == 5 - redone and bool(summary["moved"]) == aside
    if aside:
        assert not set(again["settings"]) & set(first["settings"])
        kept = read_table(summary["moved"], numbers=(*NUMBERS, *COUNTS))
        people = for_people(first)
        for column in ("rank", "path", "decision", "score", "area", "boxes"):  # renamed, not lost
            assert kept[column].astype(people[column].dtype).equals(people[column]), column
        exact = Journal(tmp_path / "out" / "journal.before.sqlite", COLUMNS).rows
        pd.testing.assert_frame_equal(table_of(exact), first, check_like=True)
    if change == "bytes":
        assert again["score"][2] != first["score"][2] and (again["score"] == first["score"]).sum() == 4
    if change in ("picture", "row", "table"):
        pd.testing.assert_frame_equal(again, first)
    if change == "table":
        assert path.read_bytes() == before


def test_bad_ones_are_tried_again_and_others_rows_stay(inspector, tmp_path):
    pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "late.png").write_bytes(b"")
    assert exit_code(look(inspector, tmp_path / "in", out=tmp_path / "out")) == 1
    write(tmp_path / "in" / "late.png")
    (tmp_path / "in" / "00.png").unlink()
    table = look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert exit_code(table) == 0 and names(table) == ["01.png", "02.png", "late.png"] and Counted.seen == 4
    pictures(tmp_path / "other", 2)
    assert names(look(inspector, tmp_path / "other", out=tmp_path / "out")) == ["00.png", "01.png"]
    on_disk = pd.read_csv(tmp_path / "out" / "results.csv")
    assert len(on_disk) == 6 and on_disk["path"].is_unique  # also that of the file that has gone


SLOW = """
import sys, time
import zsad_nb.inspection.inspector as module
from zsad_nb.inspection.inspector import Inspector
inspector = Inspector.load("self_distance", image_size=64, sigma=2.0, batch_size=2)
inspector.use_values(0.1, 0.05)
before = inspector.method.forward
def forward(features, batch):
    time.sleep(0.4)
    return before(features, batch)
inspector.method.forward = forward
inspector.predict(sys.argv[1], out=sys.argv[2], progress=False)
"""


def rows_in_journal(out: Path) -> int:
    "As another program reads it, while it may be written."
    if not (out / "journal.sqlite").is_file():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{out / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        try:
            return journal.execute("SELECT count(*) FROM rows").fetchone()[0]
        except sqlite3.OperationalError as error:
            assert "no such table" in str(error)
            return 0


def sealed_csv(rows: list) -> str:
    "Rows as results.csv held them when it was the journal."
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "seal"])
    for fields in rows:
        seal = hashlib.sha256("\0".join(fields).encode()).hexdigest()[:8]
        writer.writerow([*map(spreadsheet_safe, fields), seal])
    return text.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sqlite", "csv"])
def test_a_killed_run_goes_on(tmp_path, form):
    "SIGKILL in the middle: whole rows are kept and not computed again; the end is that of a run that was never disturbed, byte for byte. The same where an earlier version was killed, whose journal was a CSV."
    pictures(tmp_path / "in", 16)
    (tmp_path / "in" / "bad.png").write_text("no")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "in"), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    end = time.time() + 120
    while time.time() < end and process.poll() is None and rows_in_journal(out) < 5:  # read while it is written
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was too fast to be killed"
    done = rows_in_journal(out)
    assert 5 <= done < 17
    if form == "sqlite":
        lost = 0
    else:  # as an earlier version left it, the last row cut in half as by a full disk or a power cut
        with contextlib.closing(sqlite3.connect(out / "journal.sqlite")) as journal:
            fields = [row[:-1] for row in journal.execute("SELECT * FROM rows")]
        whole = sealed_csv(fields).encode()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        (out / "results.csv").write_bytes(whole[: last + (len(whole) - last) // 2])
        (out / "journal.sqlite").unlink()
        lost = 1
    Counted.seen = 0
    inspector = Inspector(Counted(SelfDistanceParameters(image_size=64, sigma=2.0)).eval(), batch_size=2).use_values(
        0.1, 0.05
    )
    inspector.identity["method"] = inspector.method.name
    table = look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert (
        table.attrs["summary"]["known_before"] == done - lost
        and table.attrs["summary"]["half_rows"] == lost
        and Counted.seen == 16 - (done - lost)
        and table.attrs["summary"]["moved"] == ""
    )
    look(inspector, tmp_path / "in", out=tmp_path / "undisturbed")
    assert (out / "results.csv").read_bytes() == (tmp_path / "undisturbed" / "results.csv").read_bytes()
    assert "seal" not in pd.read_csv(out / "results.csv").columns
    for p in (tmp_path / "undisturbed" / "pictures").rglob("*.png"):
        assert p.read_bytes() == (tmp_path / "out" / "pictures" / p.name).read_bytes()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_full_disk_keeps_the_rows(inspector, tmp_path, monkeypatch):
    "SQLite itself is told that there is no further room after three rows."
    pictures(tmp_path / "in", 24)
    insert = Journal._insert

    def full(journal, connection, lines):
        if len(journal.rows) >= 3:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
        insert(journal, connection, lines)

    monkeypatch.setattr(Journal, "_insert", full)
    with pytest.raises(OSError, match=r"\d+ rows are kept. Free some space") as error:
        look(inspector, tmp_path / "in", out=tmp_path / "out", pictures="none")
    monkeypatch.undo()
    kept = int(re.search(r"(\d+) rows are kept", str(error.value))[1])
    assert 3 <= kept < 24 and rows_in_journal(tmp_path / "out") == kept
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == kept  # written when the call ended
    seen = Counted.seen
    assert look(inspector, tmp_path / "in", out=tmp_path / "out", pictures="none").attrs["summary"] | dict(
        out=""
    ) == dict(
        images=24,
        errors=0,
        defective=0,
        normal=0,
        normal_but_marked=0,
        normal_but_high=0,
        duplicates=0,
        known_before=kept,
        left_out=[],
        half_rows=0,
        moved="",
        out="",
    )
    assert Counted.seen - seen == 24 - kept


def test_a_table_that_cannot_be_written_loses_nothing(inspector, tmp_path, monkeypatch):
    "results.csv is open in a program that locks it."
    pictures(tmp_path / "in", 3)
    write = results.write_table
    calls = []

    def locked(table, path):
        calls.append(path)
        if len(calls) > 1:  # not yet when the run began
            raise PermissionError(13, "Permission denied")
        return write(table, path)

    monkeypatch.setattr(results, "write_table", locked)
    with pytest.raises(OSError, match="3 rows are kept in journal.sqlite.*close the program"):
        look(inspector, tmp_path / "in", out=tmp_path / "out")
    monkeypatch.undo()
    assert rows_in_journal(tmp_path / "out") == 3
    assert look(inspector, tmp_path / "in", out=tmp_path / "out").attrs["summary"]["known_before"] == 3
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == 3


def test_a_journal_that_another_program_holds(inspector, tmp_path, monkeypatch):
    "A reader does not disturb; a writer is waited for, and then named."
    pictures(tmp_path / "in", 2)
    look(inspector, tmp_path / "in", out=tmp_path / "out")
    path = tmp_path / "out" / "journal.sqlite"
    write(tmp_path / "in" / "late.png")
    with contextlib.closing(sqlite3.connect(path)) as reader:
        assert len(reader.execute("SELECT path FROM rows").fetchall()) == 2
        assert len(look(inspector, tmp_path / "in", out=tmp_path / "out")) == 3
    monkeypatch.setattr("zsad_nb.inspection.journal.PATIENCE", 0.05)
    write(tmp_path / "in" / "later.png")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match="locked"):
            look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert look(inspector, tmp_path / "in", out=tmp_path / "out").attrs["summary"]["known_before"] == 3


def test_ctrl_c_leaves_a_table(inspector, tmp_path, monkeypatch):
    pictures(tmp_path / "in", 5)
    append = Journal.append

    def stop(journal, row):
        if len(journal.rows) == 2:
            raise KeyboardInterrupt
        return append(journal, row)

    monkeypatch.setattr(Journal, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert len(pd.read_csv(tmp_path / "out" / "results.csv")) == 2
    monkeypatch.undo()
    assert look(inspector, tmp_path / "in", out=tmp_path / "out").attrs["summary"]["known_before"] == 2


def test_two_at_once_are_refused(inspector, tmp_path):
    pictures(tmp_path / "in", 1)
    with lock(tmp_path / "out"), pytest.raises(Busy, match="is being run by"):
        look(inspector, tmp_path / "in", out=tmp_path / "out")


def test_somebody_elses_table_is_not_overwritten(inspector, tmp_path):
    pictures(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("my,own\n1,2\n")
    look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert (tmp_path / "out" / "results.other.csv").read_text() == "my,own\n1,2\n"


@pytest.mark.slow
def test_maps_are_not_held(inspector, tmp_path, monkeypatch):
    "Sixty images, at most two maps at their size at any time, and those of overlays that wait; a batch of the method's own at most."
    pictures(tmp_path / "in", 10)
    items = [np.roll(PHOTO, i, 0) for i in range(60)]
    alive = []
    most = []

    def watched(heat, size):
        found = at_size(heat, size).copy()
        alive.append(weakref.ref(found))
        gc.collect(0)
        most.append(sum(r() is not None for r in alive))
        return found

    monkeypatch.setattr(module, "at_size", watched)
    inspector.use_values(0.1, 0.05)
    assert (
        len(look(inspector, items, out=tmp_path / "out")) == 60 and len(most) == 60 and max(most) <= 2 + results.WAITING
    )
    shapes = {found.heat.shape for found in inspector.stream(items[:9])}
    assert shapes == {(96, 96)}


def test_pictures_and_tables(inspector, tmp_path, monkeypatch):
    pictures(tmp_path / "in", 4)
    scores = look(inspector, tmp_path / "in")["score"]
    inspector.use_values(float(scores.median()), 0.05)
    table = look(inspector, tmp_path / "in", out=tmp_path / "out", pictures="defective", table="parquet")
    assert (table["picture"] != "").tolist() == (table["decision"] == "defective").tolist() and table[
        "decision"
    ].nunique() == 2
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "out" / "results.parquet").astype(table.dtypes), table, check_dtype=False
    )
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    look(inspector, tmp_path / "in", out=tmp_path / "out", pictures="all")
    assert (
        len(list((tmp_path / "out" / "pictures").iterdir())) == 4 and Counted.seen == 4 + 4 + 2
    )  # those without a picture are done again
    for wrong in (dict(pictures="some"), dict(table="xlsx")):
        with pytest.raises(ValueError, match="use "):
            look(inspector, tmp_path / "in", **wrong)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="Parquet needs pyarrow: pip install"):
        look(inspector, tmp_path / "in", out=tmp_path / "out2", table="parquet")
    assert not (tmp_path / "out2").exists()


# --------------------------------------------------------------------------------------------------------------------- thresholds


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for i in range(24):
        write(folder / f"{i:02d}.png", render("leather", i, 64).image)
    return folder


def test_calibrated_on_a_folder(inspector, good, tmp_path):
    assert inspector.calibrated_on is None
    made = inspector.calibrate(good, rate=0.05, progress=False, out=tmp_path / "c")
    assert inspector.calibration is made and made.image[""].facts["images"] == 24 and Counted.seen == 24
    scores = inspector.calibrated_on["score"].tolist()
    assert scores == sorted(scores, reverse=True) and made.image[""].value == scores[0]  # the largest of 24 at 5 %
    table = look(inspector, good)
    assert (
        not (table["decision"] == "defective").any() and (table["regions"] == 0).all()
    )  # no normal image is above its own largest score, or shows a spot
    assert inspector.predict(PHOTO).decision in ("normal", "defective")
    Counted.seen = 0
    assert (
        Inspector(inspector.method).calibrate(good, rate=0.05, progress=False, out=tmp_path / "c") == made
        and Counted.seen == 0
    )  # kept
    again = Inspector(inspector.method, made.save(tmp_path / "t.json"))
    pd.testing.assert_frame_equal(look(again, good), table)
    with pytest.raises(ValueError, match=r"t.json were made with self_distance .* at 64 px"):
        Inspector(create("self_distance", image_size=64), tmp_path / "t.json")  # another sigma
    with pytest.raises(
        ValueError, match="24 normal images are too few for a false-alarm rate of 0.01: at least 99 are needed"
    ):
        inspector.calibrate(good, progress=False)


def test_what_does_not_count_among_normal_images(inspector, good, tmp_path):
    shutil.copytree(good, tmp_path / "good")
    shutil.copy(good / "03.png", tmp_path / "good" / "03 copy.png")
    (tmp_path / "good" / "bad.png").write_text("no")
    with pytest.warns(UserWarning) as said:
        made = inspector.calibrate(tmp_path / "good", rate=0.05, progress=False)
    assert made.image[""].facts["images"] == 24 and len(made.notes) == 2
    assert any("1 of 26 images could not be used, such as" in str(w.message) for w in said) and any(
        "1 of 26 images are copies" in str(w.message) for w in said
    )
    index = synthetic_index(tmp_path / "set", "target", 64, normal=1, defective=1)
    with pytest.raises(
        ValueError,
        match=r"8 of 16 images given as normal are labelled otherwise; choose the rows with index\[~index.anomalous\]",
    ):
        inspector.calibrate(index, progress=False)


def test_with_labelled_defects(inspector, good, tmp_path):
    bad = [write(tmp_path / f"{i}.png", render("leather", 250_000 + i, 64, "scratch").image) for i in range(5)]
    made = inspector.calibrate(good, bad, rate=0.05, miss=10, false_alarm=1, progress=False)
    assert made.image[""].kind == "labels" and made.pixel[""].kind == "normals" and made.image[""].facts["normal"] == 24
    few = inspector.calibrate(sorted(good.iterdir())[:4], bad, progress=False)
    assert few.pixel == {} and "4 normal images are too few" in few.notes[0] and inspector.predict(PHOTO).mask is None


def test_another_product_is_pointed_out(inspector, good, tmp_path):
    inspector.calibrate(good, rate=0.05, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(inspector, good)
        with pytest.raises(UserWarning, match="made from images of object, these are of screw"):
            look(Inspector(inspector.method, inspector.calibration, category="screw"), good)


@pytest.mark.slow
def test_comparable_scores(method, tmp_path):
    index = synthetic_index(tmp_path / "set", "target", 64, normal=0, defective=1, train_normal=21)
    index = index[index["category"].isin(["leather", "gear"])].pipe(
        lambda t: (t.attrs.update(root=str(tmp_path / "set")), t)[1]
    )
    normal = index[~index["anomalous"]]
    defective = index[index["anomalous"]]
    inspector = Inspector(method, category="folder")
    assert look(inspector, defective)["comparable"].isna().all()  # off by default
    for how in ("quantile", "robust"):
        made = inspector.calibrate(normal, rate=0.1, comparable=how, progress=False)
        table = look(inspector, index)
        assert (
            table["comparable"].notna().all()
            and table.groupby("category")["threshold"].nunique().eq(1).all()
            and table["threshold"].nunique() == 2
        )
        for c, part in table.groupby("category"):
            assert (
                part.sort_values("score")["comparable"].is_monotonic_increasing
                and ((part["score"] > made.of("image", c).value) == (part["decision"] == "defective")).all()
            )
        if how == "quantile":
            assert (
                (table["comparable"] >= 0.9 - 1e-12) == (table["decision"] == "defective")
            ).all()  # one meaning in both
            assert all(
                table[(table["category"] == c) & ~index["anomalous"].to_numpy()]["decision"].eq("defective").sum() <= 2
                for c in ("leather", "gear")
            )
        with pytest.raises(ValueError, match="no normal images of category 'chip'"):
            look(inspector, index.assign(category="chip").pipe(lambda t: (t.attrs.update(index.attrs), t)[1]))


# ------------------------------------------------------------------------------------------------------------ where a method is kept


@pytest.mark.slow
def test_from_a_checkpoint_a_run_a_name_a_method(tmp_path):
    trained = create("visualad", weights="random:0", image_size=64)
    path = save(trained, tmp_path / "runs" / "train" / "abc" / "checkpoint.safetensors")
    want = Inspector(trained).predict(PHOTO).score
    assert (
        Inspector.load(path).predict(PHOTO).score
        == Inspector.load(path.parent).predict(PHOTO).score
        == Inspector.load(str(path)).predict(PHOTO).score
        == want
    )
    assert Inspector.load(trained).identity == Inspector.load(path).identity
    evaluated = tmp_path / "runs" / "evaluate" / "def"
    evaluated.mkdir(parents=True)
    record = dict(
        status="done",
        hash="def",
        cwd=str(tmp_path),
        after=dict(train=dict(run="train/abc", parameters={})),
        spec=dict(parameters=dict(method="visualad", checkpoint="{train}/checkpoint.safetensors", size=64)),
    )
    (evaluated / "run.json").write_text(json.dumps(record)), (evaluated / "result.json").write_text("{}")
    assert Inspector.load(evaluated).predict(PHOTO).score == want
    for parameters, wanted in (
        (
            dict(method="self_distance", size=64, options=dict(sigma=1.0)),
            create("self_distance", image_size=64, sigma=1.0),
        ),
        (dict(checkpoint=str(path.parent)), trained),
    ):
        (evaluated / "run.json").write_text(json.dumps(dict(record, after={}, spec=dict(parameters=parameters))))
        assert Inspector.load(evaluated).predict(PHOTO).score == Inspector(wanted).predict(PHOTO).score
    (evaluated / "run.json").write_text(json.dumps(dict(record, status="failed", error="it broke")))
    with pytest.raises(ValueError, match=r"is failed \(it broke\); its method is not used"):
        method_from(evaluated)
    (path.parent / "second.safetensors").write_bytes(path.read_bytes())
    assert method_from(path.parent).p == trained.p  # checkpoint.safetensors is the run's
    path.rename(path.with_name("first.safetensors"))
    with pytest.raises(ValueError, match="several checkpoints .first.safetensors, second.safetensors.; name one"):
        method_from(path.parent)
    with pytest.raises(TypeError, match="there already cannot be changed"):
        method_from(trained, image_size=96)
    with pytest.raises(ValueError, match="unknown method 'visualat'; known"):
        method_from("visualat")
    assert method_from(Inspector(trained)) is trained and "self_distance" in METHODS


# ------------------------------------------------------------------------------------------------------------------ the command line


def test_the_command_line(tmp_path, good, capsys):
    folder = tmp_path / "in"
    out = tmp_path / "out"
    pictures(folder, 3)
    small = ["-p", "image_size", "64", "-p", "sigma", "2.0"]

    def call(*more):
        return (main(["predict", str(folder), "--out", str(out), *small, *more]), capsys.readouterr())

    code, said = call()
    assert (
        code == 0
        and "no threshold: scores only" in said.out
        and "3 images, 0 without a result" in said.out
        and (out / "results.csv").is_file()
    )
    code, said = call("--normals", str(good), "--rate", "0.05")
    assert (
        code == 0
        and "rank 24 of 24 normal images" in said.out
        and " defective, " in said.out
        and "results.before.csv (rows of other settings)" in said.out
    )
    (folder / "bad.png").write_text("no")
    code, said = call("--thresholds", str(out / "thresholds.json"), "--format", "parquet", "--pictures", "none")
    assert (
        code == 1
        and "bad.png: not an image" in said.err
        and "3 known before" in said.out
        and (out / "results.parquet").is_file()
    )
    for path in folder.glob("0*.png"):
        path.unlink()
    assert call("--threshold", "0.1")[0] == 2


def test_overlays_share_a_scale_and_keep_their_names(inspector, tmp_path):
    "Two photographs that differ in their suffix alone; one that comes later; JPEG by choice."
    write(tmp_path / "in" / "a.png", render("leather", 5, 96).image)
    first = look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert first["picture"].tolist() == ["pictures/a.png"]
    before = (tmp_path / "out" / "pictures" / "a.png").read_bytes()
    write(tmp_path / "in" / "a.jpg")
    write(tmp_path / "in" / "b.jpg", render("leather", 6, 96).image)
    table = look(inspector, tmp_path / "in", out=tmp_path / "out")
    assert len(set(table["picture"])) == 3 and table["picture"][2] == "pictures/b.png" and Counted.seen == 3
    assert (tmp_path / "out" / "pictures" / "a.png").read_bytes() == before, "its row is as it was"
    assert [s.picture for s in sources(tmp_path / "in")] == ["a-jpg.png", "a-png.png", "b.png"]
    strips = {Image.open(tmp_path / "out" / p).crop((0, 96, 96, 120)).tobytes() for p in table["picture"]}
    assert len(strips) == 1, "all on one scale, that of the first call"
    (about,) = json.loads((tmp_path / "out" / "settings.json").read_text()).values()
    assert about["colours"][0] < about["colours"][1]
    again = look(inspector, tmp_path / "in", out=tmp_path / "out", picture_format="jpg")
    assert [p.rpartition("/")[2] for p in again["picture"]] == ["a-jpg.jpg", "a-png.jpg", "b.jpg"]
    with pytest.raises(ValueError, match="use png or jpg"):
        look(inspector, tmp_path / "in", out=tmp_path / "out", picture_format="gif")


def test_a_good_part_does_not_glow(inspector, tmp_path):
    "Ten calm photographs and a scratched one, without a threshold: the calm ones look like photographs."
    for i in range(10):
        write(tmp_path / "in" / f"{i}.png", np.full((64, 64, 3), 120 + i, np.uint8))
    scratched = np.full((64, 64, 3), 120, np.uint8)
    scratched[30:34, 8:56] = 255
    write(tmp_path / "in" / "x.png", scratched)
    look(inspector, tmp_path / "in", out=tmp_path / "out")

    def coloured(name):  # grey stays grey where nothing lies on it
        shown = np.asarray(Image.open(tmp_path / "out" / "pictures" / f"{name}.png"))[:64].astype(int)
        return (np.ptp(shown, axis=-1) > 8).mean()

    assert max(coloured(i) for i in range(10)) < 0.06 and coloured("x") > 0.15


def test_a_picture_that_cannot_be_written_ends_the_call(inspector, tmp_path, monkeypatch):
    pictures(tmp_path / "in", 6)
    inspector.use_values(0.1, 0.05)
    written = results.write_atomically

    def full(path, write):
        if Path(path).name == "03.png":
            raise OSError(28, f"{path} was not written: no space left on the device")
        return written(path, write)

    monkeypatch.setattr(results, "write_atomically", full)
    with pytest.raises(OSError, match="03.png was not written"):
        look(inspector, tmp_path / "in", out=tmp_path / "out")
    kept = rows_in_journal(tmp_path / "out")
    assert kept == 3, "the row of a picture that is not there is not there either"
    monkeypatch.undo()
    assert look(inspector, tmp_path / "in", out=tmp_path / "out").attrs["summary"]["known_before"] == kept


def test_few_good_images_and_both_thresholds(tmp_path, good, capsys):
    "Six good images for one per cent: the run goes on and states its rate; what is outlined and passed is counted."
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(good.rglob("*.png"))[:6]:
        shutil.copy(path, few)
    write(tmp_path / "in" / "scratched.png")
    write(tmp_path / "in" / "calm.png", render("leather", 3, 96).image)
    words = [
        "predict",
        str(tmp_path / "in"),
        "--model",
        "self_distance",
        "-p",
        "image_size",
        "64",
        "-p",
        "sigma",
        "2.0",
    ]

    def said(out, *more):
        assert main([*words, "--out", str(tmp_path / out), *more]) == 0
        return capsys.readouterr().out

    first = said("a", "--normals", str(few))
    assert "6 normal images are too few for the image rate asked for, 1 % (99 are needed)" in first
    assert "lowest rate that they allow, 14.3 %" in first and "by score" in first
    passed = ("--threshold", "9", "--pixel-threshold", "0.01")
    assert "2 of the normal ones have a marked region; --decide either" in said("b", *passed)
    assert "2 defective, 0 normal, by score or marked regions" in said("b", *passed, "--decide", "either")
    assert "2 defective, 0 normal, by marked regions" in said("b", *passed, "--decide", "regions")
    quiet = said("b", "--threshold", "-1", "--pixel-threshold", "9", "--decide", "regions")
    assert "2 of the normal ones have a score above the threshold" in quiet
    people = pd.read_csv(tmp_path / "b" / "results.csv", keep_default_na=False)
    assert people["above"].tolist() == ["score", "score"] and people["decision"].tolist() == ["normal", "normal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder and no image nowhere"),
        (["IN", "--out", "IN"], "cannot hold the images and their results"),
        (["IN", "--model", "visualat"], "unknown method 'visualat'"),
        (["IN", "--decide", "regions", "--threshold", "1"], "decide='regions' needs a pixel threshold"),
        (["IN", "--report", "--pictures", "none"], "--report shows pictures"),
        (["IN", "--model", "hub:mine"], "OWNER/NAME"),
        (["IN", "--rate", "0.1"], "--rate: thresholds are made from good images; add --normals FOLDER"),
        (["IN", "--normals", "IN", "--threshold", "1"], "give one of --normals and --threshold"),
        (["IN", "--pictures", "defective"], "needs a threshold"),
        (["IN", "-p", "imagesize", "64"], "did you mean image_size"),
        (["IN", "--thresholds", "none.json"], "no thresholds at none.json"),
        (["IN", "--defective", "IN"], "go with --normals"),
        (["IN", "--model", "mutual"], "a single image has no score"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(tmp_path, capsys, arguments, message):
    pictures(tmp_path / "in", 3)
    arguments = [str(tmp_path / "in") if a == "IN" else a for a in arguments]
    small = [] if "-p" in arguments or "--model" in arguments else ["-p", "image_size", "64"]
    assert (
        main(["predict", *(["--out", str(tmp_path / "out")] if "--out" not in arguments else []), *arguments, *small])
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        said[-1].startswith("zsad predict: ")
        and message in said[-1]
        and sum(line.startswith("zsad") for line in said) == 1
    )


def test_stopped_by_hand(tmp_path, capsys, monkeypatch):
    pictures(tmp_path / "in", 3)
    monkeypatch.setattr(Inspector, "predict", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["predict", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "-p", "image_size", "64"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_no_notebook_of_these_knows_this_machine():
    for path in (ROOT / "nbs" / "use").glob("80*.ipynb"):
        assert "/tmp/" not in path.read_text()
