"Metrics over types: scikit-learn's numbers in slices of any size, bounded memory, undefined values, products' lists, oracle and chance, left-out images, figures."

import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, roc_auc_score

from zsad_nb.backbones.text import create_text
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.data.index import GOOD, concat_indices
from zsad_nb.data.taxonomy import type_words
from zsad_nb.evaluation.multi_type import CHOICES, evaluate_types
from zsad_nb.evaluation.rank_counts import RankCounts
from zsad_nb.evaluation.type_metrics import TypeMetrics, distinct, macro
from zsad_nb.figures.types import confusion_figure, paint_types, render_types, type_colours, type_figure
from zsad_nb.methods import controls, dapo  # noqa: F401 (registered by their import)
from zsad_nb.methods.base import Prediction, create
from zsad_nb.methods.dapo import DAPOParameters, TypeMethod
from zsad_nb.synthetic.benchmark import synthetic_index

SIZE = 64


class Oracle(TypeMethod):
    "Knows the masks; `wrong` turns every defect into the first type of the list."

    name = "oracle"
    Parameters = DAPOParameters

    def __init__(self, types=None, wrong=False):
        super().__init__(DAPOParameters(clip_weights="random:0", types=types))
        self.clip = create_backbone("tiny-clip", "random:0", SIZE)
        self.text = create_text("tiny-clip", "random:0")
        self.wrong = wrong
        self._first_types()

    def encode(self, batch):
        return None

    def type_maps(self, layers, size, keep=None):
        assert not self.training and tuple(layers["state"].shape[-2:]) == tuple(size)
        x = layers["state"]
        return (x if keep is None else x[:, [0, *keep]]).softmax(1)

    def type_scores(self, layers, maps, keep=None):
        return maps[:, 1:].amax((2, 3))

    def forward(self, features, batch):
        kind = self.kinds(batch)
        kind = torch.where(kind > 0, 1, 0) if self.wrong else kind
        at = batch.mask[:, 0] * kind[:, None, None]
        state = 8.0 * torch.nn.functional.one_hot(at, len(self.types) + 1).permute(0, 3, 1, 2).float()
        maps = state.softmax(1)
        return Prediction(
            maps[:, 1:].sum(1),
            maps[:, 1:].sum(1).amax((1, 2)),
            dict(state=state, normal=maps[:, 0]),
            maps[:, 1:],
            maps[:, 1:].amax((2, 3)),
        )


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return synthetic_index(tmp_path_factory.mktemp("target"), "target", SIZE, normal=1, defective=4)


def as_mvtec(index, names=("bottle", "screw")):
    "Two drawn categories under the names and labels of MVTec AD."
    categories = sorted(index["category"].unique())[: len(names)]
    labels = dict(
        bottle=["broken_large", "contamination", "broken_small", "broken_large"],
        screw=["manipulated_front", "scratch_neck", "thread_top", "scratch_head"],
    )
    parts = []
    for category, name in zip(categories, names):
        part = index[index["category"] == category].copy()
        part["defect"] = [GOOD if d == GOOD else labels[name][i % 4] for i, d in enumerate(part["defect"])]
        parts.append(part.assign(category=name, dataset="mvtec"))
    out = pd.concat(parts, ignore_index=True)
    out.attrs = dict(index.attrs)
    return out


# --------------------------------------------------------------------------------------------------------------------- numbers, streaming


def case(kind: str, n=5, c=4, side=24):
    rng = np.random.default_rng(3)
    labels = rng.choice(c, (n, side, side), p=[0.9, 0.06, 0.03, 0.01])
    maps = rng.random((n, c, side, side)).astype(np.float32) + 0.3 * (
        labels[:, None] == np.arange(c)[:, None, None]
    ).astype(np.float32)
    if kind == "ties":
        maps = np.round(maps, 1)
    if kind == "saturated":
        maps = maps.clip(0.4, 0.9)
    if kind == "constant":
        maps = np.full_like(maps, 0.25)
    if kind == "signed zero":
        maps = np.where(maps < 0.5, np.float32(-0.0), np.where(maps < 0.8, np.float32(0.0), maps - 1))
    if kind == "negative":
        maps = -10 * maps
    return maps, labels


@pytest.mark.parametrize("kind", ["distinct", "ties", "saturated", "constant", "signed zero", "negative"])
@pytest.mark.parametrize("memory", [2**11, 2**26])
def test_scikit_learns_numbers(kind, memory):
    maps, labels = case(kind)
    with TypeMetrics(["normal", "a", "b", "c"], memory_limit=memory) as metrics:
        for m, y in zip(np.array_split(maps, 3), np.array_split(labels, 3)):
            metrics.update(m, y)
        table = metrics.compute()
        assert (memory == 2**11) == any(h.end for h in metrics.own + metrics.rest)
        pd.testing.assert_frame_equal(table, metrics.compute())  # asking twice changes nothing
    y = labels.ravel()
    s = maps.transpose(0, 2, 3, 1).reshape(-1, 4)
    for k, r in enumerate(table.itertuples()):
        assert r.auroc == pytest.approx(roc_auc_score(y == k, s[:, k]), abs=1e-9) and r.ap == pytest.approx(
            average_precision_score(y == k, s[:, k]), abs=1e-9
        )
    assert table["f1"].to_numpy() == pytest.approx(
        f1_score(y, s.argmax(1), average=None, labels=range(4), zero_division=0)
    )
    assert (metrics.confusion == confusion_matrix(y, s.argmax(1), labels=range(4))).all() and table[
        "pixels"
    ].tolist() == np.bincount(y, minlength=4).tolist()
    found = macro(table)
    assert found["f1"] == pytest.approx(f1_score(y, s.argmax(1), average="macro")) and found["auroc"] == pytest.approx(
        table["auroc"].mean()
    )
    assert found["ap_defects"] == pytest.approx(table["ap"].iloc[1:].mean())


def test_the_multiclass_convention_of_the_code():
    "roc_auc_score(..., multi_class='ovr') on probabilities is the same macro mean."
    maps, labels = case("distinct")
    p = torch.tensor(maps).mul(3).softmax(1).numpy()
    with TypeMetrics(list("nabc")) as metrics:
        table = metrics.update(p, labels).compute()
    rows = p.transpose(0, 2, 3, 1).reshape(-1, 4).astype(np.float64)
    assert macro(table)["auroc"] == pytest.approx(
        roc_auc_score(labels.ravel(), rows / rows.sum(1, keepdims=True), multi_class="ovr"), abs=1e-6
    )


@pytest.mark.parametrize("step", [1, 2, 7, 64, 10**6])
def test_slices(step):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 60, 3000).astype(np.float32)
    heap = RankCounts(size=100, room=4000)
    scores[:1500] = 7  # half of them equal
    for part in np.split(rng.permutation(scores), 30):
        heap.add(part)
    slices = list(distinct(heap, step))
    values, hits = (np.concatenate(x) for x in zip(*slices))
    expected = np.unique(scores, return_counts=True)
    assert np.array_equal(values, expected[0]) and np.array_equal(hits, expected[1]) and hits.sum() == 3000
    heap.close()


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    "Twelve million scores with room for half a million: four times the images, the same peak."
    limit = 2**21
    peaks = []
    for batches in (12, 48):
        rng = np.random.default_rng(0)
        with TypeMetrics(["normal", "a", "b"], tmp_path, limit) as metrics:
            tracemalloc.start()
            for _ in range(batches):
                labels = (rng.random((1, 288, 288)) < 0.02).astype(np.int64)
                metrics.update(rng.random((1, 3, 288, 288), dtype=np.float32), labels)
            table = metrics.compute()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert sum(h.end for h in metrics.rest) > 4 * limit / 10
        assert abs(table.loc["normal", "auroc"] - 0.5) < 0.01
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < 0.5 * 4 * 48 * 3 * 288 * 288, (
        peaks
    )  # all scores together would be 48 MB


def test_states_that_do_not_occur():
    maps, labels = case("distinct")
    with TypeMetrics(["normal", "a", "b", "c"]) as metrics:
        table = metrics.update(maps, np.minimum(labels, 1)).compute()
    assert (
        table.loc[["b", "c"], ["auroc", "ap"]].isna().all().all()
        and table.loc["b", "reason"] == "no pixel is b"
        and table.loc["b", "f1"] == 0
        and np.isnan(table.loc["b", "recall"])
    )
    with TypeMetrics(["normal", "a"]) as metrics:
        table = metrics.update(maps[:, :2], np.zeros_like(labels)).compute()
    assert table.loc["normal", "reason"] == "no pixel is anything but normal" and np.isnan(table.loc["normal", "auroc"])
    with TypeMetrics(["normal", "a"]) as metrics:
        empty = metrics.compute()
    assert empty[["auroc", "ap", "f1"]].isna().all().all()


def test_errors_change_nothing():
    maps, labels = case("distinct")
    with pytest.raises(ValueError, match="at least one type"):
        TypeMetrics(["normal"])
    with pytest.raises(ValueError, match="does not exist"):
        TypeMetrics(["normal", "a"], spill="nowhere/at/all")
    with TypeMetrics(["normal", "a", "b", "c"]) as metrics:
        metrics.update(maps, labels)
        before = metrics.compute()
        bad = maps.copy()
        bad[2, 1, 0, 0] = np.nan
        for m, y, why in (
            (maps[:, :3], labels, "one map for each of normal, a, b, c"),
            (maps, labels[:, :5], "must be"),
            (bad, labels, "image 7 have values that are NaN"),
            (maps, labels + 1, "they number 4 states"),
        ):
            with pytest.raises(ValueError, match=why):
                metrics.update(m, y)
        pd.testing.assert_frame_equal(metrics.compute(), before)


# ----------------------------------------------------------------------------------------------------------------------- whole data sets


def test_an_oracle_is_perfect(target):
    model = Oracle()
    image = len(target)
    found = evaluate_types(model, target, progress=False, trained_on=["synthetic-auxiliary"])
    rows = found.per_product.set_index(["choice", "category"])
    assert rows[
        ["auroc", "ap", "f1", "auroc_defects", "ap_defects", "f1_defects", "image_accuracy"]
    ].to_numpy() == pytest.approx(1.0)
    assert rows.loc[("filtered", "mean"), "images"] == image and set(rows.index.get_level_values(0)) == set(CHOICES)
    assert (found.per_image["type"] == found.per_image["said_filtered"]).all() and len(found.per_image) == target[
        "anomalous"
    ].sum()
    for c in CHOICES:
        table = found.confusion[c].to_numpy()
        assert table.sum() == image * SIZE * SIZE == table.trace()
    table = found.types()
    assert {"mean of 8 seen types", "mean of 4 novel types"} <= set(table.index) and not found.notes


def test_a_wrong_type_costs_types_not_normal(target):
    found = evaluate_types(Oracle(wrong=True), target, progress=False, choices=("unfiltered",))
    first = type_words("synthetic-target").__iter__().__next__()
    assert found.per_type.query("type == 'normal'")["f1"].to_numpy() == pytest.approx(1.0)
    assert (found.per_type.query("type not in ('normal', @first) and pixels > 0")["recall"] == 0).all()
    mean = found.per_product.set_index("category").loc["mean"]
    assert mean["f1_defects"] < mean["f1"] < 0.3
    assert (found.per_image["said_unfiltered"] == first).all()


def test_a_products_own_list(target):
    index = as_mvtec(target)
    with pytest.warns(UserWarning, match="never read"):
        found = evaluate_types(Oracle(), index, progress=False)
    rows = found.per_product.set_index(["choice", "category"])
    assert (
        rows.loc["filtered", "types"].iloc[:2].tolist() == [2, 3]
        and (rows.loc["unfiltered", "types"].iloc[:2] == 20).all()
    )
    names = found.per_type.query("choice == 'filtered' and category == 'screw'")["type"].tolist()
    assert names == ["normal", "fabric", "scratch", "thread"]  # manipulated_front is fabric when tested
    assert set(found.per_image["type"]) == {"broken", "contamination", "fabric", "scratch", "thread"}
    assert found.types("filtered").loc["scratch", "products"] == 1


def test_images_that_cannot_count(target):
    index = as_mvtec(target, ("bottle",))
    whole = evaluate_types(
        Oracle(["broken", "contamination"]), index, progress=False, choices=("filtered",)
    ).per_product.iloc[0]
    lost = index.copy()
    at = lost.index[lost["anomalous"]][0]
    lost.loc[at, "mask"] = ""  # no mask: known type, unknown place
    found = evaluate_types(Oracle(["broken", "contamination"]), lost, progress=False, choices=("filtered",))
    assert found.per_product.iloc[0]["pixels"] == whole["pixels"] - SIZE * SIZE and len(found.per_image) == 4
    lost.loc[at, "defect"] = "broken_large,contamination"  # several labels
    with pytest.warns(UserWarning, match="1 of 4 anomalous images have no single type"):
        found = evaluate_types(Oracle(["broken", "contamination"]), lost, progress=False)
    assert found.notes == ["1 images without a single type were left out"] and len(found.per_image) == 3
    index.loc[at, "defect"] = "metal_contamination"
    index.loc[at + 1, "defect"] = "poke"  # a type that the public list of bottles lacks
    with pytest.warns(UserWarning, match="never read"):
        found = evaluate_types(Oracle(), index, progress=False)
    assert found.notes == ["bottle: poke occurs but is not in the public list; added"]
    assert found.per_type.query("choice == 'filtered'")["type"].tolist() == [
        "normal",
        "broken",
        "contamination",
        "poke",
    ]


@pytest.mark.slow
def test_batch_size_and_order_do_not_matter(target):
    model = create("dapo", clip_weights="random:0", image_size=SIZE, prompts=2)
    few = target[target["category"].isin(sorted(target["category"].unique())[:2])]
    a = evaluate_types(model, few, progress=False, batch_size=8)
    b = evaluate_types(model, few.iloc[::-1], progress=False, batch_size=3, memory_limit=2**14)
    assert a.per_product["auroc"].to_numpy() == pytest.approx(b.per_product["auroc"].to_numpy(), abs=1e-4)
    assert a.per_image.sort_values("image")["type"].tolist() == b.per_image.sort_values("image")["type"].tolist()
    assert model.training is True  # as it was


def test_what_cannot_be_evaluated(target):
    with pytest.raises(ValueError, match="knows no types"):
        evaluate_types(create("self_distance"), target)
    with pytest.raises(ValueError, match="choices="):
        evaluate_types(Oracle(), target, choices=("all",))
    with pytest.raises(ValueError, match="no rows with split 'test'"):
        evaluate_types(Oracle(), target.assign(split="train"))
    with pytest.raises(ValueError, match=r"none of the method's types \(scratch\)"):
        evaluate_types(Oracle(["scratch"]), target, progress=False)


def test_files(target, tmp_path):
    found = evaluate_types(Oracle(), target, progress=False)
    last = found.save(tmp_path / "out")
    assert last.name == "types_products.csv"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "types.csv",
        "types_confusion_filtered.csv",
        "types_confusion_unfiltered.csv",
        "types_images.csv",
        "types_products.csv",
    ]
    pd.testing.assert_frame_equal(pd.read_csv(last), found.per_product, check_dtype=False)
    assert found.table().loc[("filtered", "mean"), "auroc"] == 100 and found.table().loc[
        ("filtered", "mean"), "images"
    ] == len(target)


def test_two_data_sets_at_once(target, tmp_path):
    "Types of both, products apart."
    other = synthetic_index(tmp_path / "aux", "auxiliary", SIZE, normal=1, defective=1)
    both = concat_indices([target, other[other["category"] == other["category"].iloc[0]]])
    found = evaluate_types(Oracle(), both, progress=False, choices=("filtered",))
    assert found.per_product["category"].nunique() == both["category"].nunique() + 1 and found.per_product[
        "auroc"
    ].min() == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.slow
def test_figures(target, tmp_path):
    few = target[target["category"] == sorted(target["category"].unique())[0]]
    model = Oracle()
    found = evaluate_types(model, few, progress=False)
    for choice in CHOICES:
        files = render_types(model, few, found, tmp_path / choice, choice=choice, title="oracle", dpi=60)
        assert [f.name for f in files] == [f"{few['category'].iloc[0]}.png", "confusion.png"] and all(
            2_000 < f.stat().st_size < 400_000 for f in files
        )
    with pytest.raises(ValueError, match="choice='x'"):
        render_types(model, few, found, tmp_path, choice="x")
    assert model.training is True


def test_a_type_keeps_its_colour():
    types = [f"t{i}" for i in range(21)]
    colours = type_colours(types)
    assert len(set(colours.values())) == 21 and list(type_colours(types[:5]).values()) == [
        colours[t] for t in types[:5]
    ]
    image = np.full((4, 4, 3), 0.5)
    labels = np.zeros((4, 4), int)
    labels[0, 0], labels[1, 1] = 1, 21
    painted = paint_types(image, labels, colours, strength=1.0)
    assert (
        painted[0, 0] == pytest.approx(colours["t0"])
        and painted[1, 1] == pytest.approx(colours["t20"])
        and np.ptp(painted[2, 2]) == 0
    )
    faint = paint_types(image, labels, colours, strength=np.zeros((4, 4)))
    assert np.ptp(faint[0, 0]) == 0


def test_legend_names_what_is_seen():
    image = np.full((8, 8, 3), 0.5)
    one = np.zeros((8, 8), int)
    truth = one.copy()
    said = one.copy()
    truth[:2], said[3:5] = 1, 3
    figure = type_figure(
        [
            dict(image=image, truth=truth, largest=said, left="x"),
            dict(image=image, truth=one, largest=one, has_mask=False),
        ],
        ["a", "b", "c"],
        "title",
    )
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "c"] and any(
        t.get_text() == "no mask" for ax in figure.axes for t in ax.texts
    )
    with pytest.raises(ValueError, match="no counts"):
        confusion_figure(pd.DataFrame(0, index=["a"], columns=["a"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig("/dev/null", format="png")
