"What a hand can do to the explorer and the upload, done to their traits: pictures, numbers and sentences must follow; what is missing or broken is said."

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bench_widgets import fill, many_images
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from zsad_nb.data.index import make_index
from zsad_nb.explore.controls import range_text
from zsad_nb.explore.explorer import HeatmapExplorer
from zsad_nb.explore.maps_store import make_store, open_store, snapshot
from zsad_nb.explore.upload import Upload
from zsad_nb.figures.blending import ORDER, Rendering, View, decode, encode, enlarge_map
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.methods.base import METHODS, Prediction, create, save
from zsad_nb.methods.controls import SelfDistance, SelfDistanceParameters
from zsad_nb.synthetic.benchmark import synthetic_index

SIZE = 64


def visualad(seed=0):
    return create("visualad", weights=f"random:{seed}", image_size=SIZE)


def words(html) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.value)).strip()


def touch(widget, **state):
    widget.set_state(state)  # what the browser sends


def same(jpeg: bytes, picture: np.ndarray) -> bool:
    return jpeg == encode(picture) and decode(jpeg).shape == picture.shape


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("explorer")


@pytest.fixture(scope="module")
def index(room):
    return synthetic_index(room / "set", "target", SIZE, normal=4, defective=5)


@pytest.fixture
def explorer(room, index, tmp_path):
    torch.manual_seed(0)
    return HeatmapExplorer(
        {"one": visualad(0), "two": visualad(1)}, index, room / "maps", out=tmp_path / "out", progress=False
    )


@pytest.fixture
def asked(monkeypatch):
    "Counts how often a method is asked."
    from zsad_nb.methods.base import Method

    count = []
    predict = Method.predict
    monkeypatch.setattr(Method, "predict", lambda self, *a, **k: count.append(self) or predict(self, *a, **k))
    return count


# ------------------------------------------------------------------------------------------------------------------------------ sliders


@pytest.mark.slow
def test_the_first_picture_is_the_method_s(explorer):
    store = explorer.store
    row = explorer.row
    assert row == explorer.gallery.order[0] and store.rows["score"][row] == store.rows["score"][explorer.rows].max()
    drawing = Rendering(*store.picture(row)[:1], store.map(row), store.picture(row)[1])
    view = explorer.view()
    for name in ORDER:
        assert same(explorer.pictures[name].data, drawing.panel(name, view)), name


@pytest.mark.parametrize(
    "control, value, changed",
    [
        ("opacity", 0.1, {"overlay"}),
        ("level", None, {"contour"}),
        ("smoothing", 4.0, {"heatmap", "overlay", "contour"}),
        ("clip", 5.0, {"heatmap", "overlay"}),
        ("scale", "image", {"heatmap", "overlay"}),
        ("threshold", None, set()),
        ("wipe", 0.2, set()),
    ],
)
def test_a_slider_draws_what_it_changes_and_nothing_else(explorer, asked, control, value, changed):
    before = {n: p.data for n, p in explorer.pictures.items()}
    control = getattr(explorer, control)
    control.value = control.min + 0.9 * (control.max - control.min) if value is None else value
    assert {n for n, p in explorer.pictures.items() if p.data != before[n]} == changed
    view = explorer.view()
    for name in changed:
        assert same(explorer.pictures[name].data, explorer.rendering.panel(name, view))
    assert not asked and not explorer.message.value


def test_opacity_zero_is_the_image_and_one_covers_it(explorer):
    explorer.opacity.value = 0.0
    assert same(explorer.pictures["overlay"].data, explorer.rendering.image)
    explorer.opacity.value = 1.0
    assert not same(explorer.pictures["overlay"].data, explorer.rendering.image)


def test_contour_follows_its_slider(explorer):
    explorer.level.value = explorer.level.min
    covered = explorer.rendering.detected(explorer.view()).mean()
    explorer.level.value = explorer.level.max
    assert explorer.rendering.detected(explorer.view()).mean() < covered
    explorer.show.value = "defective"
    assert "contour covers" in words(explorer.verdict)


def test_threshold_counts_like_scikit_learn(explorer):
    scores = explorer.store.rows["score"][explorer.rows]
    labels = explorer.index["anomalous"].to_numpy()[explorer.rows]
    for share in (0.2, 0.5, 0.8):
        explorer.threshold.value = explorer.threshold.min + share * (explorer.threshold.max - explorer.threshold.min)
        called = scores >= explorer.threshold.value
        p, r, f, _ = precision_recall_fscore_support(labels, called, average="binary", zero_division=np.nan)
        said = words(explorer.numbers)
        for name, value in (("precision", p), ("recall", r), ("F1", f)):
            assert f"{name} {'–' if math.isnan(value) else f'{100 * value:.1f} %'}" in said
        assert (
            f"false alarms {(called & ~labels).sum()} of {(~labels).sum()}" in said
            and f"misses {(~called & labels).sum()} of {labels.sum()}" in said
        )
    explorer.best.click()
    assert explorer.threshold.value == pytest.approx(explorer.split.best())
    touch(explorer.chart, clicked=[explorer.histogram.x(float(np.median(scores))), 0.5, 1])
    assert explorer.threshold.value == pytest.approx(float(np.median(scores)), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------------------------ choosing


def test_filters_list_what_they_say(explorer):
    labels = explorer.index["anomalous"].to_numpy()
    scores = explorer.store.rows["score"]
    explorer.category.value = ""
    explorer.threshold.value = float(np.median(scores))
    for show, wanted in {
        "all": np.ones(len(labels), bool),
        "defective": labels,
        "normal": ~labels,
        "misses": labels & (scores < explorer.threshold.value),
        "false alarms": ~labels & (scores >= explorer.threshold.value),
    }.items():
        explorer.show.value = show
        assert set(explorer.gallery.order) == set(np.flatnonzero(wanted)), show
        tags = {i["tag"] for i in explorer.gallery.widget.items}
        assert tags == {"misses": {"miss"}, "false alarms": {"false alarm"}}.get(show, tags)
        assert explorer.row in explorer.gallery.order and all(explorer.gallery.widget.images)
    explorer.show.value, explorer.sort.value = "all", "error"
    error = np.where(labels, explorer.threshold.value - scores, scores - explorer.threshold.value)[
        explorer.gallery.order
    ]
    assert (np.diff(error) <= 0).all()
    explorer.show.value = "misses"
    explorer.threshold.value = explorer.threshold.min
    assert not len(explorer.gallery.order) and "no miss at this threshold" in words(explorer.pages)


def test_the_list_follows_the_threshold(explorer):
    explorer.category.value, explorer.show.value = "", "misses"
    few = len(explorer.gallery.order)
    explorer.threshold.value = explorer.threshold.max
    assert len(explorer.gallery.order) > few and len(explorer.gallery.order) == int(explorer.index["anomalous"].sum())


def test_thumbnails_arrows_and_pages(explorer):
    explorer.category.value = ""
    order = explorer.gallery.order
    touch(explorer.gallery.widget, clicked=[3, 1])
    assert explorer.row == order[3] and explorer.gallery.widget.chosen == 3 and words(explorer.where).startswith("4 /")
    touch(explorer.pictures["image"], key=["ArrowRight", 1])
    assert explorer.row == order[4] and same(explorer.pictures["image"].data, explorer.store.picture(order[4])[0])
    touch(explorer.gallery.widget, key=["ArrowLeft", 1])
    explorer.back.click()
    assert explorer.row == order[2]
    for count, (key, place) in enumerate(
        (("Home", 0), ("ArrowLeft", 0), ("PageDown", 12), ("End", len(order) - 1), ("ArrowDown", len(order) - 1)), 2
    ):
        touch(explorer.gallery.widget, key=[key, count])
        assert explorer.gallery.place == place, key
    explorer.page_back.click()
    assert "page 5 of 6" in words(explorer.pages) and explorer.row == order[-1] and explorer.gallery.widget.chosen == -1


def test_another_category_brings_its_own_scale(explorer):
    seen = {}
    for category in explorer.category.options[:3]:
        explorer.category.value = category[1]
        view = explorer.view()
        rows = np.flatnonzero(explorer.index["category"] == category[1])
        assert (view.low, view.high) == pytest.approx(explorer.store.scale(rows), rel=1e-5)
        assert explorer.level.min <= explorer.level.value <= explorer.level.max
        seen[category[1]] = view
    assert len(set(seen.values())) == 3


def test_another_method_keeps_the_image(explorer):
    touch(explorer.gallery.widget, clicked=[2, 1])
    row = explorer.row
    before = explorer.pictures["heatmap"].data
    explorer.method.value = "two"
    assert explorer.row == row and explorer.pictures["heatmap"].data != before
    assert same(
        explorer.pictures["heatmap"].data,
        Rendering(*explorer.store.picture(row)[:1], explorer.store.map(row)).panel("heatmap", explorer.view()),
    )


# ------------------------------------------------------------------------------------------------------------------------------ touching


def test_a_pixel_tells_its_score_and_what_is_similar(explorer):
    touch(explorer.pictures["heatmap"], clicked=[0.3, 0.7, 1])
    store = explorer.store
    row = explorer.row
    at = (int(0.3 * SIZE), int(0.7 * SIZE))
    said = words(explorer.pixel)
    assert (
        f"x {at[0]}, y {at[1]} of {SIZE}" in said
        and f"score {store.map(row)[at[1], at[0]]:.4g}" in said
        and "knows no types" in said
    )
    share = (store.map(row) < store.map(row)[at[1], at[0]]).mean()
    assert f"higher than {100 * share:.1f} %" in said
    assert all(p.mark == [0.3, 0.7] for p in explorer.pictures.values())
    patches, grid, tower = store.patches(row)
    patches = patches.astype(np.float32)
    cosines = (patches @ patches[int(0.7 * grid[0]) * grid[1] + int(0.3 * grid[1])]).reshape(grid)
    shown = decode(explorer.pictures["similar"].data).sum(-1)
    bright = np.array(
        [
            [
                shown[y * SIZE // grid[0] + SIZE // grid[0] // 2, x * SIZE // grid[1] + SIZE // grid[1] // 2]
                for x in range(grid[1])
            ]
            for y in range(grid[0])
        ]
    )
    assert explorer.pictures["similar"].note == tower and np.corrcoef(bright.ravel(), cosines.ravel())[0, 1] > 0.8
    touch(explorer.gallery.widget, clicked=[1, 1])
    assert not explorer.pictures["similar"].data and "Click into a picture" in words(explorer.pixel)


def test_the_method_runs_once_an_image(explorer, asked):
    touch(explorer.pictures["image"], clicked=[0.1, 0.1, 1])
    explorer.layer.value = explorer.store.layers[0]
    first = len(asked)
    for i in range(5):
        touch(explorer.pictures["image"], clicked=[i / 5, 0.5, i + 2])
        explorer.smoothing.value = i
        explorer.layer.value = ["", *explorer.store.layers][i % 3]
    assert first <= 1 and len(asked) == first  # patches come from the tower alone


@pytest.mark.slow
def test_types_of_a_pixel(room, index):
    torch.manual_seed(0)
    explorer = HeatmapExplorer(
        create("dapo", clip_weights="random:0", image_size=SIZE), index, room / "maps", progress=False
    )
    touch(explorer.pictures["image"], clicked=[0.5, 0.5, 1])
    shares = explorer.store.inside(explorer.row).at(0.5, 0.5)
    assert set(shares) == {"normal", *explorer.store.method.types} and sum(shares.values()) == pytest.approx(
        1, abs=1e-3
    )
    best = max(shares, key=shares.get)
    bars = re.findall(r"<span>([^<]+)</span><i style=\"width:([\d.]+)%", explorer.pixel.value)
    assert (
        bars[0] == (best, f"{100 * shares[best]:.1f}")
        and len(bars) == 7
        and f"and {len(shares) - 7} less likely" in words(explorer.pixel)
    )
    kind = next(t for t in explorer.layer.options if t[0].startswith("type: "))
    explorer.layer.value = kind[1]
    assert same(
        explorer.pictures["heatmap"].data, explorer.rendering.panel("heatmap", explorer.view())
    ) and explorer.pictures["heatmap"].note == range_text(explorer.view().low, explorer.view().high)
    explorer.threshold.value = explorer.threshold.min
    assert f"most likely {explorer.store.types[explorer.store.rows['kind'][explorer.row]]}" in words(explorer.verdict)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts",
    [
        ("dma_sap", ["DMA level 1", "DMA level 3", "refined CLIP path", "pooling weights"]),
        ("ssvp", ["VTAM expert 2", "VTAM gate of places 4"]),
        ("visualad", ["tap 2", "tap 6"]),
    ],
)
def test_parts_of_a_map(room, index, name, parts):
    options = dict(weights="random:0") if name == "visualad" else dict(clip_weights="random:0", dino_weights="random:1")
    few = index[index.category == "gear"].reset_index(drop=True)
    few.attrs = dict(index.attrs)
    explorer = HeatmapExplorer(create(name, image_size=SIZE, **options), few, room / "maps", progress=False)
    assert set(parts) <= {label for label, _ in explorer.layer.options}
    for part in parts:
        before = explorer.pictures["heatmap"].data
        explorer.layer.value = part
        assert explorer.pictures["heatmap"].data != before and not explorer.message.value
        low, high = explorer.rendering.scale()
        assert (
            explorer.view().low == pytest.approx(low, rel=1e-4)
            and explorer.level.min == pytest.approx(low)
            and explorer.level.max == pytest.approx(high)
        )
    assert ("VTAM gate of the levels: 0." in words(explorer.inside)) == (name == "ssvp")


def test_parts_beside_each_other(room, index):
    "All parts of the map in one row, a place read in all of them, in the saved picture and its code, too."
    few = index[index.category == "gear"].reset_index(drop=True)
    few.attrs = dict(index.attrs)
    explorer = HeatmapExplorer(visualad(), few, room / "maps", progress=False)
    taps = explorer.store.layers
    plain = explorer.snapshot()
    assert explorer.parts.layout.display == "none" and explorer.parts_button.layout.display is None
    explorer.parts_button.value = True
    assert explorer.parts.layout.display is None and not explorer.message.value
    assert [picture.label for picture in explorer.parts.children] == taps
    assert all(picture.data and " – " in picture.note for picture in explorer.parts.children)
    touch(explorer.parts.children[1], clicked=[0.25, 0.75, 1])
    part = explorer.store.inside(explorer.row).maps[taps[1]]
    enlarged = enlarge_map(part, (SIZE, SIZE))
    assert explorer.parts.children[1].note == f"{enlarged[SIZE * 3 // 4, SIZE // 4]:.3g}"
    assert all(picture.mark == [0.25, 0.75] for picture in (*explorer.pictures.values(), *explorer.parts.children))
    explorer.at = None
    picture = explorer.snapshot()
    assert picture.height > plain.height and "parts=True" in explorer.code()
    assert picture.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    before = explorer.parts.children[0].data
    explorer.forth.click()
    assert explorer.parts.children[0].data != before
    explorer.parts_button.value = False
    assert explorer.parts.layout.display == "none" and "parts=True" not in explorer.code()


def test_sources_of_evidence_beside_each_other(room):
    "Z, S, R and their sum, the sources on one scale."
    from zsad_nb.methods.evidence import measure, references_of

    index = synthetic_index(room / "larger", "target", 96, normal=3, defective=2)
    good = index[~index["anomalous"].astype(bool)].reset_index(drop=True)
    good.attrs = dict(index.attrs)
    method = create("visualad", weights="random:0", image_size=96)
    measure(method, good, 96)
    method.use_evidence("self", references_of(method, good, size=96))
    explorer = HeatmapExplorer(method, index, room / "evidence", progress=False)
    explorer.parts_button.value = True
    labels = [picture.label for picture in explorer.parts.children]
    assert labels[0] == "the method, Z" and labels[-2:] == ["good images, R", "their sum"] and len(labels) == 6
    *sources, total = explorer._parts
    assert len({part.high for part in sources}) == 1 and all(part.low == 0 for part in explorer._parts)
    whole = sum(part.map for part in sources)
    assert np.corrcoef(whole.ravel(), total.map.ravel())[0, 1] > 0.5


# ------------------------------------------------------------------------------------------------------------------------------ comparing, keeping


def test_wipe_between_two_methods(explorer, asked):
    over = explorer.pictures["overlay"]
    assert over.wipe < 0 and explorer.wipe.layout.display == "none"
    explorer.compare.value = "two"
    other = explorer.store_of("two")
    assert over.wipe == explorer.wipe.value and over.names == ["one", "two"] and explorer.wipe.layout.display is None
    assert (
        same(
            over.other,
            Rendering(explorer.rendering.image, other.map(explorer.row)).panel("overlay", explorer.view(other)),
        )
        and over.other != over.data
    )
    touch(over, wipe=0.25)  # dragged on the picture
    assert explorer.wipe.value == 0.25
    explorer.wipe.value = 0.75
    assert over.wipe == 0.75 and not asked
    assert f"two: score {other.rows['score'][explorer.row]:.4g}" in words(explorer.verdict)
    touch(explorer.gallery.widget, clicked=[2, 1])
    assert same(
        over.other, Rendering(explorer.rendering.image, other.map(explorer.row)).panel("overlay", explorer.view(other))
    )
    explorer.compare.value = ""
    assert over.wipe < 0 and not over.other
    explorer.compare.value, explorer.method.value = "two", "two"  # never with itself
    assert explorer.compare.value == "" and {v for _, v in explorer.compare.options} == {"", "one"}


def test_save_writes_what_is_on_the_screen_and_code_that_draws_it(explorer, tmp_path, monkeypatch):
    explorer.opacity.value = 0.4
    explorer.smoothing.value = 2.5
    explorer.clip.value = 1.25
    explorer.compare.value = "two"
    explorer.wipe.value = 0.3
    explorer.layer.value = explorer.store.layers[1]
    touch(explorer.pictures["contour"], clicked=[0.123456, 0.9, 1])
    explorer.code_button.value = True
    explorer.save_button.click()
    path = next((tmp_path / "out").glob("*.png"))
    assert path.name in words(explorer.message) and "one-and-two" in path.name
    saved = np.asarray(Image.open(path))
    code = path.with_suffix(".py").read_text()
    assert words(explorer.shown_code).replace("&#x27;", "'") == " ".join(code.split())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    space = {}
    exec(code, space)  # no method anywhere: the store is enough
    np.testing.assert_array_equal(np.asarray(space["picture"]), saved)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / path.name)), saved)
    assert space["store"].method is None
    explorer.opacity.value = 0.9
    assert not np.array_equal(np.asarray(explorer.snapshot()), saved)


def test_a_view_means_the_same_elsewhere(explorer):
    "The panels of a saved picture are those on the screen, pixel by pixel."
    page = np.asarray(explorer.snapshot())
    view = explorer.view()
    left, top = 10, 34
    for i, name in enumerate(ORDER):
        np.testing.assert_array_equal(
            page[top : top + SIZE, left + i * (SIZE + 10) :][:, :SIZE], explorer.rendering.panel(name, view)
        )


# ------------------------------------------------------------------------------------------------------------------------------ what is missing or broken


def part(index, keep):
    found = index[keep].reset_index(drop=True)
    found.attrs = dict(index.attrs)
    return found


def test_only_normal_images(room, index):
    explorer = HeatmapExplorer(visualad(), part(index, ~index.anomalous), room / "maps", progress=False)
    assert "no defective image here" in words(explorer.numbers) and "recall –" in words(explorer.numbers)
    explorer.show.value = "misses"
    assert "none of 4 images: no miss" in words(explorer.pages) and explorer.rendering is not None
    explorer.show.value = "defective"
    assert "no defective image here" in words(explorer.pages) and not explorer.message.value
    assert "no defect" in explorer.pictures["mask"].note


def test_only_defective_images(room, index):
    explorer = HeatmapExplorer(visualad(), part(index, index.anomalous), room / "maps", progress=False)
    assert "no normal image here" in words(explorer.numbers)


def test_a_category_without_test_images_says_so(room, index):
    rows = index.to_dict("records") + [dict(index.iloc[0].to_dict(), category="zeppelin", split="train")]
    explorer = HeatmapExplorer(visualad(), make_index(rows, index.attrs["root"]), room / "maps", progress=False)
    explorer.category.value = "zeppelin"
    assert (
        "zeppelin has no test images: its 1 rows are of the training split" in words(explorer.verdict)
        and not explorer.pictures["image"].data
        and explorer.gallery.widget.items == []
    )
    for control, value in (
        (explorer.opacity, 0.2),
        (explorer.threshold, 0.1),
        (explorer.layer, explorer.store.layers[0]),
        (explorer.show, "misses"),
    ):
        control.value = value
    touch(explorer.pictures["image"], clicked=[0.5, 0.5, 1])
    explorer.save_button.click()
    assert "no picture" in words(explorer.message)
    explorer.show.value, explorer.layer.value, explorer.category.value = "all", "", "gear"
    assert explorer.pictures["image"].data and "score" in words(explorer.verdict)


def test_nothing_to_test(room, index):
    with pytest.raises(ValueError, match="no rows with split 'test'"):
        HeatmapExplorer(
            visualad(), index.assign(split="train").pipe(lambda t: (t.attrs.update(index.attrs), t)[1]), room / "maps"
        )
    with pytest.raises(ValueError, match="nothing to explore"):
        HeatmapExplorer({})
    with pytest.raises(ValueError, match="does not say what it was evaluated on"):
        HeatmapExplorer(visualad(), folder=room / "maps")


@dataclass(frozen=True)
class BrokenParameters(SelfDistanceParameters):
    pass


class Broken(SelfDistance):
    "Says what is no number in one corner, and stumbles where it is asked for its parts."

    name = "broken"
    Parameters = BrokenParameters
    stumbles = False

    def forward(self, features, batch):
        if Broken.stumbles:
            raise RuntimeError("the model stumbled")
        found = super().forward(features, batch)
        found.map[:, :8, :8] = float("nan")
        score = found.score.clone()
        score[[p.endswith("good/000.png") for p in batch.path]] = float("nan")
        return Prediction(found.map, score, found.layers)


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(METHODS, "broken", Broken)
    return create("broken", weights="random:0", image_size=SIZE)


def test_a_map_with_nan_is_shown_and_told(room, index, broken):
    explorer = HeatmapExplorer(broken, index, room / "maps", progress=False)
    assert "64 pixels of this map are not numbers" in words(explorer.verdict)
    assert np.abs(decode(explorer.pictures["heatmap"].data)[:7, :7].astype(int) - 128).max() < 12
    explorer.level.value = explorer.level.min
    explorer.smoothing.value = 3.0
    assert not explorer.rendering.detected(explorer.view())[:8, :8].any() and np.isfinite(explorer.view().low)
    assert "1 scores are not numbers" in words(explorer.numbers)
    explorer.open(
        str(
            explorer.index["image"][
                next(i for i in explorer.rows if explorer.index["image"][i].endswith("good/000.png"))
            ]
        )
    )
    assert "no score" in words(explorer.verdict)
    touch(explorer.pictures["image"], clicked=[0.01, 0.01, 1])
    assert "score" in words(explorer.pixel)


def test_an_error_in_an_event_is_told(room, index, broken, monkeypatch):
    explorer = HeatmapExplorer(broken, index, room / "maps", progress=False)
    monkeypatch.setattr(Broken, "stumbles", True)
    explorer.layer.value = "distance"
    assert "RuntimeError: the model stumbled" in words(explorer.message) and "problem" in explorer.message.value
    monkeypatch.setattr(Broken, "stumbles", False)
    explorer.layer.value = ""
    assert not explorer.message.value


def test_a_file_that_cannot_be_read(room, index, tmp_path):
    rows = index[index.category == "gear"].to_dict("records")
    for row in rows:
        for key in ("image", "mask"):
            if row[key]:
                (tmp_path / row[key]).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / row[key]).write_bytes((Path(index.attrs["root"]) / row[key]).read_bytes())
    (tmp_path / rows[0]["image"]).write_bytes((tmp_path / rows[0]["image"]).read_bytes()[:200])
    explorer = HeatmapExplorer(visualad(), make_index(rows, tmp_path), tmp_path / "maps", progress=False)
    assert explorer.gallery.order[-1] == 0 and explorer.gallery.widget.items[-1]["label"] == "–"
    explorer.open(0)
    assert (
        "truncated" in words(explorer.verdict)
        and not explorer.pictures["heatmap"].data
        and len(explorer.split) == len(rows) - 1
    )
    explorer.gallery.key("ArrowLeft")
    assert explorer.pictures["heatmap"].data and "score" in words(explorer.verdict)


def test_maps_that_are_not_there_yet(index, tmp_path, asked):
    explorer = HeatmapExplorer(
        visualad(), part(index, index.category == "gear"), tmp_path / "maps", compute=False, progress=False
    )
    assert (
        len(asked) <= 2
        and explorer.store.done == 1
        and "8 of 9 maps" in words(explorer.missing)
        and explorer.gap.layout.display is None
    )  # the image that is shown, and the names of its parts
    assert sum(i["label"] == "–" for i in explorer.gallery.widget.items) >= 8
    before = len(asked)
    explorer.gallery.key("ArrowRight")
    assert explorer.store.done == 2 and len(asked) == before + 1
    explorer.compute_button.click()
    assert (
        explorer.store.done == 9
        and explorer.gap.layout.display == "none"
        and not any(i["label"] == "–" for i in explorer.gallery.widget.items)
    )
    left = open_store(explorer.store.folder)
    left.rows["state"][3] = 0
    shown = HeatmapExplorer(left, progress=False)
    assert "open it with its method" in words(shown.missing) and shown.compute_button.layout.display == "none"
    shown.open(3)
    assert "are not computed" in words(shown.message)


@pytest.mark.slow
def test_ten_thousand_rows_cost_one_page(tmp_path):
    index = many_images(tmp_path / "images", 10_000, SIZE, 8)
    store = make_store(visualad(), index, tmp_path / "maps", SIZE)
    fill(store)
    explorer = HeatmapExplorer(store, compute=False)
    explorer.category.value = ""
    assert (
        len(explorer.gallery.order) == 10_000
        and len(explorer.gallery.widget.images) == 12
        and "page 1 of 834" in words(explorer.pages)
    )
    explorer.gallery.turn(500)
    explorer.threshold.value = explorer.threshold.min
    explorer.show.value = "false alarms"
    assert len(explorer.gallery._kept) <= 60 and len(explorer.gallery.order) == 5000


# ------------------------------------------------------------------------------------------------------------------------------ where methods come from


def test_sources(room, index, tmp_path):
    torch.manual_seed(0)
    method = visualad()
    checkpoint = save(method, tmp_path / "trained.safetensors")
    store = make_store(method, index, room / "maps")
    store.compute(progress=False)
    explorer = HeatmapExplorer(
        {
            "checkpoint": str(checkpoint),
            "store": store,
            "folder": store.folder,
            "inspector": Inspector(method),
            "method": method,
        },
        index,
        room / "maps",
        progress=False,
    )
    assert {explorer.store_of(n).folder for n in explorer.sources} == {store.folder}
    assert len({explorer.store_of(n).map(5).tobytes() for n in explorer.sources}) == 1
    with pytest.raises(ValueError, match="of other images"):
        HeatmapExplorer(
            {"a": method, "b": make_store(visualad(3), part(index, index.category == "gear"), tmp_path)},
            index,
            room / "maps",
            progress=False,
        ).store_of("b")
    with pytest.raises(ValueError, match="no image"):
        snapshot(store, "absent.png", View())


def test_what_was_trained_on_is_marked(room, index):
    method = visualad(5)
    method.trained_on = ["synthetic-target/gear"]
    explorer = HeatmapExplorer(method, part(index, index.category == "gear"), room / "maps", progress=False)
    assert "not zero-shot" in words(explorer.verdict)


# ------------------------------------------------------------------------------------------------------------------------------ upload


def file(picture, kind="PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return out.getvalue()


def test_upload_shows_what_the_method_says(index):
    method = visualad()
    photo = np.asarray(Image.open(Path(index.attrs["root"]) / index.image[20]))
    upload = Upload(method)
    touch(upload.zone, name="mine.png", data=file(photo), count=1)
    found = Inspector(method).predict(photo)
    assert f"score {found.score:.4g}" in words(upload.verdict) and "mine.png, 64 x 64" in words(upload.verdict)
    for name in upload.pictures:
        assert same(upload.pictures[name].data, Rendering(photo, found.heat).panel(name, upload.view()))
    before = upload.pictures["overlay"].data
    upload.opacity.value = 0.0
    assert upload.pictures["overlay"].data != before and same(upload.pictures["overlay"].data, photo)
    touch(upload.pictures["image"], clicked=[0.5, 0.25, 1])
    assert f"{found.heat[16, 32]:.4g}" in words(upload.pixel)


def test_upload_asks_with_the_word_that_is_given(index):
    upload = Upload(create("winclip", clip_weights="random:0", image_size=SIZE))
    touch(upload.zone, name="mine.png", data=(Path(index.attrs["root"]) / index.image[20]).read_bytes(), count=1)
    before = upload.result.score
    upload.word.value = "gear"
    assert upload.result.category == "gear" and upload.result.score != before


def test_upload_of_an_inspector_asks_with_the_word_too():
    method = create("winclip", clip_weights="random:0", image_size=SIZE)
    picture = file(np.full((SIZE, SIZE, 3), 128, np.uint8))
    plain = Inspector(method, category="cable")
    upload = Upload(plain, category="screw")
    upload.open_file("a.png", picture)
    assert (upload.result.category, plain.category, Upload(plain).word.value) == ("screw", "cable", "cable")
    assert upload.result.score == Inspector(method, category="screw").predict(picture).score


def test_a_second_good_picture_makes_a_threshold():
    "Thresholds that were made without good pictures are gone with the first one; two make one of their own."
    method = create("self_distance", image_size=96)
    upload = Upload(Inspector(method).use_values(9.0, 9.0))
    rng = np.random.default_rng(0)
    for count, decision in ((1, "score only"), (2, "normal")):
        upload.zone.set_state(
            dict(
                name=f"{count}.png",
                data=file(rng.integers(90, 120, (96, 96, 3), np.uint8)),
                count=count,
            )
        )
        upload.remember_this()
        assert not upload.message.value and upload.result.decision == decision, upload.message.value
    assert "33.3 %" in upload.kept.value
    upload.forget_good()
    assert upload.result.threshold == 9.0


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.png", b"text", "not an image"),
        ("b.jpg", b"", "the file is empty"),
        ("c.tif", file(np.zeros((40, 40), np.uint16) + 7000, "TIFF"), ""),
        ("f.tif", file(np.zeros((40, 40), np.uint16) + 700, "TIFF"), "state bits=10"),
        ("d e ü.png", file(np.zeros((40, 90, 4), np.uint8)), ""),
        ("e.jpg", file(np.zeros((64, 64, 3), np.uint8), "JPEG")[:300], "truncated"),
    ],
)
def test_upload_of_anything(name, data, said):
    upload = Upload(visualad())
    touch(upload.zone, name=name, data=data, count=1)
    if said:
        assert (
            said in words(upload.message)
            and words(upload.message).startswith(name)
            and upload.stage.layout.display == "none"
            and "/" not in words(upload.message).split(":")[0]
        )
    else:
        assert not upload.message.value and name in words(upload.verdict)
    touch(upload.zone, name="good.png", data=file(np.full((40, 40, 3), 90, np.uint8)), count=2)
    assert "good.png" in words(upload.verdict) and upload.stage.layout.display is None


def test_upload_of_a_camera_with_fewer_bits():
    upload = Upload(visualad(), bits=10)
    touch(upload.zone, name="f.tif", data=file(np.zeros((40, 40), np.uint16) + 700, "TIFF"), count=1)
    assert not upload.message.value and upload.result.image.max() == round(700 * 255 / 1023)
    with pytest.raises(ValueError, match="make it with bits=12"):
        Upload(upload.inspector, bits=12)


def test_upload_with_thresholds_decides():
    upload = Upload(Inspector.load("visualad", weights="random:0", image_size=SIZE).use_values(image=1e9))
    touch(upload.zone, name="good.png", data=file(np.full((40, 40, 3), 90, np.uint8)), count=1)
    assert words(upload.verdict).startswith("normal") and isinstance(pd.Series(upload.result.types), pd.Series)


def test_an_upload_without_a_picture_says_so():
    with pytest.raises(ValueError, match="no picture yet"):
        Upload(visualad()).snapshot()
