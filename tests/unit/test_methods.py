"Methods, training, evaluation and figures where something is missing, odd or goes wrong; and that every learned number learns."

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from zsad_nb.components.maps import to_pixels
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch, batches
from zsad_nb.data.index import make_index
from zsad_nb.evaluation.evaluate import MEAN, cases, evaluate
from zsad_nb.figures.heatmaps import render_cases
from zsad_nb.methods import controls, visualad  # noqa: F401 (registered by their import)
from zsad_nb.methods.base import MODULES, create, describe, load, method_class, save
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import Recipe, cosine_rate, fit

SIZE = 64
SMALL = dict(weights="random:0", image_size=64)
PIXEL = ["pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro", "pixel_aupro_200"]
IMAGE = ["image_auroc", "image_ap", "image_f1max"]


def small(name="visualad", **changes):
    seed_everything(0)
    known = [f.name for f in dataclasses.fields(method_class(name).Parameters)]
    towers = {k: "random:0" for k in ("clip_weights", "dino_weights") if k in known}  # methods of two towers
    return create(name, **{**{k: v for k, v in SMALL.items() if k in known}, **towers, **changes})


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> pd.DataFrame:
    return synthetic_index(tmp_path_factory.mktemp("target"), "target", SIZE, normal=3, defective=3)


@pytest.fixture(scope="module")
def model():
    return small().eval()


def rows(index: pd.DataFrame, keep, **columns) -> pd.DataFrame:
    "Some rows of an Index, with columns changed."
    part = pd.DataFrame(index[keep]).assign(**columns)
    return make_index(part.to_dict("records"), index.attrs["root"])


def category(index: pd.DataFrame, number: int):
    return index["category"] == sorted(index["category"].unique())[number]


def batch_of(image: torch.Tensor, anomalous=False) -> Batch:
    n = len(image)
    mask = torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.bool)
    if anomalous:
        mask[:, :, 10:30, 20:40] = True
    return Batch(
        image,
        mask,
        torch.full((n,), anomalous),
        torch.zeros(n, dtype=torch.long),
        ["c"] * n,
        [f"{i}.png" for i in range(n)],
        torch.ones(n, dtype=torch.bool),
    )


def mixed_batch() -> Batch:
    return Batch.cat([batch_of(torch.rand(2, 3, SIZE, SIZE)), batch_of(torch.rand(2, 3, SIZE, SIZE), anomalous=True)])


# --------------------------------------------------------------------------------------------- categories where a number does not exist


def odd(full: pd.DataFrame) -> pd.DataFrame:
    "Five categories: whole, only normal, only anomalous, without masks, and with one mask of three."
    first, second, third, fourth, fifth = (category(full, i) for i in range(5))
    parts = [
        rows(full, first),
        rows(full, second & ~full["anomalous"]),
        rows(full, third & full["anomalous"]),
        rows(full, fourth, mask=""),
    ]
    part = rows(full, fifth)
    part.loc[part.index[part["anomalous"]][1:], "mask"] = ""
    return make_index(pd.concat([*parts, part], ignore_index=True).to_dict("records"), full.attrs["root"])


@pytest.fixture(scope="module")
def oddities(full, model):
    index = odd(full)
    return index, evaluate(model, index, progress=False)


def test_undefined_numbers_are_nan_with_a_reason(oddities):
    index, found = oddities
    whole, normal, anomalous, bare, partly = sorted(index["category"].unique())
    table = found.per_class
    assert table.loc[[whole, partly], [*IMAGE, *PIXEL]].notna().all(axis=None)
    assert table.loc[normal, [*IMAGE, *PIXEL]].isna().all()
    assert math.isnan(table.loc[anomalous, "image_auroc"]) and table.loc[anomalous, PIXEL].notna().all(), (
        "defects have normal pixels around them"
    )
    assert table.loc[bare, IMAGE].notna().all() and table.loc[bare, PIXEL].isna().all()
    assert table.loc[[whole, normal, anomalous, bare, partly], "normal"].tolist() == [3, 3, 0, 3, 3]
    assert table.loc[[whole, normal, anomalous, bare, partly], "anomalous"].tolist() == [3, 0, 3, 3, 3]

    said = {(r.category, r.metric): r.reason for r in found.reasons.itertuples()}
    for name in (whole, normal, anomalous, bare, partly, MEAN):
        for metric in (*IMAGE, *PIXEL):
            if math.isnan(table.loc[name, metric]):
                assert said[name, metric], f"{metric} of {name} is missing and nobody says why"
    assert said[normal, "image_auroc"] == "no anomalous image" and said[normal, "pixel_aupro"] == "no anomalous pixel"
    assert "no normal image" in said[anomalous, "image_auroc"] and "3 images without a mask" in said[bare, "pixel_ap"]


def test_means_leave_out_what_is_undefined(oddities):
    index, found = oddities
    whole, normal, anomalous, bare, partly = sorted(index["category"].unique())
    table = found.per_class
    for metric in IMAGE:
        assert found.mean[metric] == pytest.approx(table.loc[[whole, bare, partly], metric].mean())
    for metric in PIXEL:
        assert found.mean[metric] == pytest.approx(table.loc[[whole, anomalous, partly], metric].mean())
    said = {(r.category, r.metric): r.reason for r in found.reasons.itertuples()}
    assert said[MEAN, "image_auroc"] == f"mean of 3 classes, without {normal}, {anomalous}"
    assert said[MEAN, "pixel_aupro"] == f"mean of 3 classes, without {normal}, {bare}"
    assert found.mean["normal"] == 12 and found.mean["anomalous"] == 12


def test_scores_per_image(oddities, model):
    index, found = oddities
    images = found.per_image
    assert sorted(images["image"]) == sorted(index["image"]) and images["score"].notna().all()
    assert (images["pixel_ap"].notna() == (index.loc[images["position"], "mask"].to_numpy() != "")).all(), (
        "a pixel AP where there is a mask, and only there"
    )
    merged = images.set_index("position").sort_index()
    for name in ("image", "category", "anomalous", "defect"):
        assert (merged[name] == index.loc[merged.index, name]).all(), name
    assert (images["map_low"] <= images["map_high"]).all()
    chosen = cases(found)
    assert set(chosen["case"]) == {"best", "median", "worst", "false alarm"}
    assert chosen.groupby("category")["case"].agg(set)[sorted(index["category"].unique())[1]] == {"false alarm"}
    for _, part in chosen[chosen["case"] != "false alarm"].groupby("category"):
        by = part.set_index("case")["pixel_ap" if part["pixel_ap"].notna().any() else "score"]
        assert by["best"] >= by["median"] >= by["worst"]


def test_saved_evaluation_is_read_back(oddities, tmp_path):
    _, found = oddities
    found.save(tmp_path / "deep" / "folder")
    back = pd.read_csv(tmp_path / "deep" / "folder" / "metrics.csv", index_col="category")
    pd.testing.assert_frame_equal(back, found.per_class, check_dtype=False)
    assert len(pd.read_csv(tmp_path / "deep" / "folder" / "scores.csv")) == len(found.per_image)
    assert (
        pd.read_csv(tmp_path / "deep" / "folder" / "reasons.csv")["reason"].tolist() == found.reasons["reason"].tolist()
    )
    assert found.table().loc[MEAN, "image_auroc"] == round(100 * found.mean["image_auroc"], 1)


def test_nothing_but_normals(full, model, tmp_path):
    index = rows(full, category(full, 0) & ~full["anomalous"])
    found = evaluate(model, index, progress=False)
    assert found.mean[[*IMAGE, *PIXEL]].isna().all() and set(found.reasons["category"]) == {index["category"][0], MEAN}


def test_nothing_to_evaluate(full, model):
    with pytest.raises(ValueError, match="no rows with split 'test'.*train"):
        evaluate(model, rows(full, category(full, 0), split="train"), progress=False)
    empty = full.iloc[:0]
    empty.attrs = dict(full.attrs)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model, empty, progress=False)


def test_train_rows_are_not_evaluated(full, model):
    first = category(full, 0)
    index = rows(full, first)
    index.loc[index.index[:2], "split"] = "train"
    assert len(evaluate(model, index, progress=False).per_image) == len(index) - 2


def test_same_category_name_in_two_data_sets(full, model):
    "Two sets may both have a 'screw': their images must not be ranked against each other unnoticed."
    name = sorted(full["category"].unique())[0]
    both = make_index(
        pd.concat(
            [rows(full, category(full, 0)), rows(full, category(full, 1), dataset="another", category=name)]
        ).to_dict("records"),
        full.attrs["root"],
    )
    try:
        found = evaluate(model, both, progress=False)
    except ValueError as error:
        assert name in str(error) and "another" in str(error)
        return
    assert len(found.per_class) == 3, (
        f"two data sets became one row: {found.per_class[['normal', 'anomalous']].to_dict('index')}"
    )


def test_category_named_like_the_mean(full, model):
    index = make_index(
        pd.concat([rows(full, category(full, 0), category=MEAN), rows(full, category(full, 1))]).to_dict("records"),
        full.attrs["root"],
    )
    try:
        found = evaluate(model, index, progress=False)
    except ValueError as error:
        assert repr(MEAN) in str(error)
        return
    assert len(found.per_class) == 3, "the mean overwrote a category"


def test_a_map_that_is_not_finite_is_an_error(full):
    broken = small()
    with torch.no_grad():
        broken.tokens[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate(broken, rows(full, category(full, 0)), progress=False)


# ------------------------------------------------------------------------------------------------------------------------- training


def test_nothing_to_train_on(full):
    method = small()
    empty = full.iloc[:0]
    empty.attrs = dict(full.attrs)
    with pytest.raises(ValueError, match="index is empty"):
        fit(method, empty, progress=False)
    with pytest.raises(ValueError, match="none of the 24 images is anomalous"):
        fit(method, rows(full, ~full["anomalous"]), progress=False)
    with pytest.raises(ValueError, match="self_distance is training-free"):
        fit(small("self_distance"), full, progress=False)
    assert method.trained_on == []


def four(full: pd.DataFrame) -> pd.DataFrame:
    part = full[category(full, 0)]
    return rows(full, full.index.isin([*part[part["anomalous"]].index[:2], *part[~part["anomalous"]].index[:2]]))


def poisoned(method, steps: set, where: str):
    "The method with a loss (or only its gradient) that is not finite at some steps."
    true = method.loss
    count = itertools.count()

    def loss(prediction, batch):
        parts = true(prediction, batch)
        if next(count) in steps:
            if where == "gradient":
                parts["total"] = parts["total"] + (method.tokens.sum() * 0).sqrt()  # 0, with a derivative of 0 * inf
            else:
                parts["total"] = parts["total"] * (math.nan if where == "nan" else math.inf)
        return parts

    method.loss = loss
    return method


@pytest.mark.parametrize("where", ["nan", "inf", "gradient"])
def test_steps_that_are_not_finite_are_skipped(full, where):
    recipe = Recipe(epochs=2, batch_size=2)
    index = four(full)
    method = poisoned(small(), {1, 2}, where)
    log = fit(method, index, recipe, progress=False)
    assert log["skipped"].tolist() == [False, True, True, False] and log["step"].tolist() == [0, 1, 2, 3]
    assert all(p.isfinite().all() for p in method.learned().values()) and method.trained_on
    clean = small()
    fit(clean, index, recipe, progress=False)
    assert not torch.equal(clean.tokens, method.tokens)
    assert np.isfinite(log["total"][[1, 2]]).all() == (where == "gradient")


def test_a_skipped_step_changes_nothing(full):
    method = poisoned(small(), {0}, "nan")
    before = {k: v.clone() for k, v in method.learned().items()}
    with pytest.raises(FloatingPointError):
        fit(method, four(full), Recipe(epochs=1, batch_size=4), progress=False)
    for name, value in method.learned().items():
        assert torch.equal(value, before[name]), name


def test_mostly_not_finite_is_an_error(full):
    method = poisoned(small(), {0, 1, 3}, "nan")
    with pytest.raises(FloatingPointError, match="3 of 4 steps had a loss or gradient that is not finite"):
        fit(method, four(full), Recipe(epochs=2, batch_size=2), progress=False)
    assert method.trained_on == [], "a failed training is none"


def test_training_is_remembered(full, tmp_path):
    seen = rows(full, category(full, 0) | category(full, 1))
    unseen = rows(full, category(full, 2))
    names = sorted(set(seen["dataset"] + "/" + seen["category"]))
    method = small()
    log = fit(method, seen, Recipe(epochs=1), progress=False)
    assert method.trained_on == names and not method.training
    assert log.columns[:5].tolist() == ["step", "epoch", "seconds", "lr", "skipped"] and {
        "total",
        "cls",
        "ctr",
        "focal",
        "dice",
    } <= set(log.columns)
    again = load(save(method, tmp_path / "trained.safetensors"))
    for m in (method, again):
        tested = rows(full, category(full, 0) | category(full, 2))
        both = sorted(set(tested["dataset"] + "/" + tested["category"]))
        data = names[0].split("/")[0]
        with pytest.warns(
            UserWarning, match=f"trained on {names[0]}, {names[1]}: the rows of {both[0]}, {both[1]} are not zero-shot"
        ):
            assert evaluate(m, tested, progress=False, allow_seen=data).seen == both
        with pytest.raises(ValueError, match=f"{both[0]}, {both[1]} would not be zero-shot; .*allow_seen=.'{data}',"):
            evaluate(m, tested, progress=False)
        with pytest.raises(ValueError, match=f"so {both[1]} would not be zero-shot"):
            evaluate(m, tested, progress=False, allow_seen=both[:1])
        with pytest.raises(ValueError, match="would not be zero-shot"):
            evaluate(m, unseen, progress=False, allow_seen="another")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert evaluate(m, unseen.assign(dataset="another"), progress=False).seen == []
    fit(again, unseen, Recipe(epochs=1), progress=False)
    assert again.trained_on == sorted({*names, unseen["dataset"][0] + "/" + unseen["category"][0]}), (
        "a second training adds to the first"
    )


def test_same_category_of_another_set_is_not_seen(full):
    method = small()
    fit(method, rows(full, category(full, 0), dataset="another"), Recipe(epochs=1), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(method, rows(full, category(full, 0)), progress=False).seen == []


def test_learning_rates():
    "The paper's schedule: tokens 1e-3, then 5.5e-4; everything else stays at 1e-4, the floor."
    assert [cosine_rate(1e-3, 1e-4, e, 2) for e in (0, 1)] == pytest.approx([1e-3, 5.5e-4])
    assert [cosine_rate(1e-4, 1e-4, e, 3) for e in range(3)] == [1e-4] * 3 and cosine_rate(1e-5, 1e-4, 1, 2) == 1e-5


def test_rates_reach_the_optimiser(full):
    log = fit(small(), four(full), Recipe(epochs=2, batch_size=4, lr_scale=3.0), progress=False)
    assert log["lr"].tolist() == pytest.approx([3e-3, 3 * 5.5e-4])
    with pytest.raises(TypeError, match="unknown recipe value 'epoch'; did you mean epochs"):
        Recipe().change(epoch=3)


def test_tokens_are_clipped_one_by_one():
    method = small(clip=0.5)
    method.tokens.grad = torch.stack([torch.full((192,), 1.0), torch.full((192,), 1e-3)])
    method.norm_weight.grad = torch.full_like(method.norm_weight, 100.0)
    method.clip_gradients()
    assert method.tokens.grad[0].norm() == pytest.approx(0.5, abs=1e-4) and torch.equal(
        method.tokens.grad[1], torch.full((192,), 1e-3)
    )
    assert (method.norm_weight.grad == 100).all(), "nothing else is clipped"


def test_training_learns(full):
    "Forty steps on four images: the loss falls, and defects get higher maps than their surroundings."
    method = small()
    index = four(full)
    log = fit(method, index, Recipe(epochs=40, batch_size=4, lr_scale=5.0), progress=False)
    assert log["total"].iloc[-5:].mean() < log["total"].iloc[:5].mean() - 0.3
    batch = next(iter(batches(index, SIZE, 4)))
    maps = method.predict(batch).map
    assert maps[batch.mask[:, 0]].mean() > maps[~batch.mask[:, 0]].mean() + 0.1


# ------------------------------------------------------------------------------------------------------- VisualAD's parts and options

ABLATIONS = {
    **visualad.VisualAD.ablations,
    "frozen norm": dict(ln_post="frozen"),
    "trained norm": dict(ln_post="trained"),
    "two taps": dict(taps=(2, 6)),
    "one inner tap": dict(taps=(3,)),
    "weighted": dict(tap_weights=(1.0, 2.0, 0.5, 0.0)),
    "one anchor": dict(anchors=1),
    "no dropout": dict(dropout=0.0),
    "interpolated table": dict(sca_positions="interpolate"),
    "half-width SAF": dict(saf_ratio=0.5),
}


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations_build_train_predict_and_load(full, tmp_path, changes):
    method = small(**changes)
    assert any(n.startswith("sca.") for n in method.learned()) == changes.get("sca", True)
    assert any(n.startswith("saf.") for n in method.learned()) == changes.get("saf", True)
    before = {k: v.clone() for k, v in method.learned().items()}
    index = four(full)
    assert not fit(method, index, Recipe(epochs=1, batch_size=4), progress=False)["skipped"].any()
    still = [k for k, v in method.learned().items() if torch.equal(v, before[k])]
    dead = ["key_norm.bias"] + (["tap_6"] if "tap_weights" in changes else [])
    assert all(any(d in k for d in dead) for k in still), f"one step left these unchanged: {still}"
    batch = next(iter(batches(index, SIZE, 4)))
    prediction = method.predict(batch)
    assert (
        prediction.map.shape == (4, SIZE, SIZE) and prediction.score.shape == (4,) and prediction.map.isfinite().all()
    )
    assert [k for k in prediction.layers if k.startswith("tap_")] == [f"tap_{t}" for t in method.backbone.taps]
    assert torch.equal(load(save(method, tmp_path / "m.safetensors")).predict(batch).map, prediction.map)


def test_the_papers_ablations_are_named():
    assert visualad.VisualAD.ablations == {
        "full": {},
        "no SCA": dict(sca=False),
        "no SAF": dict(saf=False),
        "neither": dict(sca=False, saf=False),
    }
    for changes in visualad.VisualAD.ablations.values():
        assert set(changes) <= {f.name for f in dataclasses.fields(visualad.VisualADParameters)}


@pytest.mark.parametrize("ln_post", ["base", "trained", "frozen"])
def test_gradient_reaches_every_learned_parameter(ln_post):
    method = small(ln_post=ln_post, sca_rows=16, dropout=0.0).train()
    batch = mixed_batch()
    method.loss(method(None, batch), batch)["total"].backward()
    for name, p in method.learned().items():
        assert p.grad is not None, name
        if name.endswith("key_norm.bias"):
            assert p.grad.abs().max() < 1e-6, "a softmax does not see a shift"
        else:
            assert p.grad.abs().max() > 1e-8, name
        if name.endswith("positions"):
            assert (p.grad[0].abs().amax(1) > 0).all(), "16 patches, 16 rows"
    assert all(p.grad is None for p in method.backbone.parameters())
    grouped = [id(p) for g in method.param_groups() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.learned().values()), (
        "every learned parameter is in one group of the optimiser"
    )


def test_rows_beyond_the_grid_get_no_gradient():
    method = small(dropout=0.0).train()
    batch = mixed_batch()
    method.loss(method(None, batch), batch)["total"].backward()
    table = method.sca["tap_3"].positions.grad[0]
    assert (table[:16].abs().amax(1) > 0).all() and (table[16:] == 0).all()


def test_final_norm():
    "base: trained, but the backbone's own at evaluation (the paper's numbers); trained: the same at both; frozen: never trained."
    batch = mixed_batch()

    def moved(**changes):
        method = small(dropout=0.0, **changes)
        before = method.predict(batch).map
        training = method.train()(None, batch).map.detach()
        if "norm_weight" in method.learned():
            with torch.no_grad():
                method.norm_weight.mul_(1.5)
                method.norm_bias.add_(0.1 * torch.randn(192))
        return (
            not torch.equal(method.predict(batch).map, before),
            not torch.equal(method.train()(None, batch).map, training),
            len(method.learned()),
        )

    assert moved(ln_post="base")[:2] == (False, True)
    assert moved(ln_post="trained")[:2] == (True, True)
    assert moved(ln_post="frozen")[:2] == (False, False)
    assert moved(ln_post="frozen")[2] == moved(ln_post="base")[2] - 2
    with pytest.raises(ValueError, match="ln_post='other'; use base, trained or frozen"):
        small(ln_post="other")


def test_the_map_is_the_weighted_sum_of_the_taps(model):
    batch = mixed_batch()
    prediction = model.predict(batch)
    taps = [prediction.layers[f"tap_{t}"] for t in model.backbone.taps]
    assert all(t.shape == (4, 4, 4) and t.abs().max() <= 2 for t in taps)
    assert torch.allclose(prediction.map, to_pixels(sum(taps), SIZE, 4.0), atol=1e-6)
    weights = (1.0, 2.0, 0.5, 0.0)
    assert torch.allclose(
        small(tap_weights=weights).predict(batch).map,
        to_pixels(sum(w * t for w, t in zip(weights, taps)), SIZE, 4.0),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="2 tap_weights for 4 taps"):
        small(tap_weights=(1.0, 1.0))


def table_of(method, factor=30.0):
    "Positions large enough to matter."
    with torch.no_grad():
        for sca in method.sca.values():
            sca.positions.mul_(factor)
            sca.scale.fill_(1.0)
    return method


def test_position_table_at_other_sizes(tmp_path):
    big = torch.rand(2, 3, 128, 128)
    raster, smooth = (table_of(small(sca_positions=p)) for p in ("raster", "interpolate"))
    batch = batch_of(torch.rand(2, 3, SIZE, SIZE))
    assert torch.equal(raster.predict(batch).map, smooth.predict(batch).map), "at the trained grid the two are the same"
    path = save(smooth, tmp_path / "smooth.safetensors")
    wide, rastered = (load(path, image_size=128, sca_positions=p, sca_grid=4) for p in ("interpolate", "raster"))
    assert wide.backbone.size == 128 and wide.predict(batch_of(big)).map.isfinite().all()
    assert (wide.predict(batch_of(big)).map - rastered.predict(batch_of(big)).map).abs().max() > 1e-3, (
        "the option changed nothing"
    )


def test_the_trained_grid_is_remembered(tmp_path):
    "A model trained at 64 px and loaded at 128 px resizes its 4 x 4 positions; it must not read 8 x 8 rows that were never trained."
    batch = batch_of(torch.rand(2, 3, 128, 128))
    for trained in ("interpolate", "raster"):
        path = save(table_of(small(sca_positions=trained)), tmp_path / f"{trained}.safetensors")
        told = load(path, image_size=128, sca_positions="interpolate", sca_grid=4).predict(batch).map
        difference = (load(path, image_size=128, sca_positions="interpolate").predict(batch).map - told).abs().max()
        assert difference == 0, f"trained with {trained}: maps differ by {difference:.4f} from those with sca_grid=4"


def test_position_table_too_short():
    with pytest.raises(
        ValueError, match=r"64 patches \(8 x 8\) exceed SCA's position table of 63 rows.*sca_positions='interpolate'"
    ):
        small(sca_rows=63, image_size=128).predict(batch_of(torch.rand(1, 3, 128, 128)))
    assert small(sca_rows=64, image_size=128).predict(batch_of(torch.rand(1, 3, 128, 128))).map.shape == (1, 128, 128)
    assert (
        small(sca_rows=16, sca_positions="interpolate", sca_grid=4, image_size=128)
        .predict(batch_of(torch.rand(1, 3, 128, 128)))
        .map.isfinite()
        .all()
    )
    with pytest.raises(ValueError, match="sca_positions='other'; use raster or interpolate"):
        small(sca_positions="other")


@pytest.mark.parametrize("rows_", [16, 20])
def test_a_grid_larger_than_its_table_is_an_error(rows_):
    with pytest.raises(ValueError, match="sca_rows|position table"):
        small(sca_positions="interpolate", sca_grid=8, sca_rows=rows_).predict(batch_of(torch.rand(1, 3, SIZE, SIZE)))


def test_sizes_and_taps_that_do_not_exist():
    with pytest.raises(ValueError, match="65 is not a multiple of the patch size 16.*use 64 or 80"):
        small(image_size=65)
    with pytest.raises(ValueError, match=r"\[7\] outside 1..6"):
        small(taps=(3, 7))
    assert small(taps=[3, 6]).p.taps == (3, 6), "JSON has lists only"


INDUCTIVE = [n for n in MODULES if not method_class(n).transductive]  # the others need the index first: their own tests


@pytest.mark.parametrize("name", INDUCTIVE)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_black_and_uniform_images(name, level):
    prediction = small(name).predict(batch_of(torch.full((2, 3, SIZE, SIZE), level)))
    assert (
        prediction.map.isfinite().all()
        and prediction.score.isfinite().all()
        and torch.equal(prediction.map[0], prediction.map[1])
    )


@pytest.mark.parametrize("name", INDUCTIVE)
def test_images_of_another_size_than_the_backbone(name):
    prediction = small(name).predict(batch_of(torch.rand(2, 3, 90, 40)))
    assert prediction.map.shape == (2, 90, 40) and prediction.map.isfinite().all()


def test_predicting_does_not_end_the_training(model):
    method = small().train()
    a, b = (method.predict(batch_of(torch.full((1, 3, SIZE, SIZE), 0.3))) for _ in range(2))
    assert method.training and torch.equal(a.map, b.map), "dropout was on"
    assert not method.backbone.training and not a.map.requires_grad
    assert not model.training and set(a.cpu().layers) == set()


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_has_a_source(name):
    table = describe(name)
    fields = dataclasses.fields(method_class(name).Parameters)
    assert table["parameter"].tolist() == [f.name for f in fields] and table["parameter"].is_unique
    assert all(isinstance(s, str) and len(s.strip()) > 2 for s in table["source"]), table[table["source"].str.len() < 3]
    assert all(isinstance(h, str) and h.strip() for h in table["help"])
    for row in table.itertuples():
        assert row.default == getattr(method_class(name).Parameters(), row.parameter) or pd.isna(row.default)
    with pytest.raises(ValueError, match="unknown method 'other'; known: .*visualad"):
        describe("other")


def test_released_size():
    "31,522,836 learned numbers with ViT-L/14@336px, part by part (specification, section 6); counted without memory."
    with torch.device("meta"):
        method = create("visualad", backbone="clip-vitl14-336", weights="random:0")
    counts = {n: p.numel() for n, p in method.learned().items()}

    def total(start):
        return sum(v for n, v in counts.items() if n.startswith(start))

    assert (total("tokens"), total("norm"), total("saf"), total("sca")) == (
        2_048,
        2_048,
        8_396_800,
        23_121_940,
    ) and sum(counts.values()) == 31_522_836
    assert (
        method.backbone.size == 518
        and method.backbone.taps == (6, 12, 18, 24)
        and counts["sca.tap_24.positions"] == 1_572_864
    )


def test_defaults_are_the_papers():
    p = visualad.VisualADParameters()
    assert (p.anchors, p.sca_rows, p.sca_scale, p.dropout, p.saf_ratio, p.token_scale, p.ln_post) == (
        4,
        1536,
        0.01,
        0.1,
        1.0,
        0.1,
        "base",
    )
    assert (p.sigma, p.top_share, p.margin, p.weight_cls, p.weight_ctr, p.weight_seg, p.lr_tokens, p.lr, p.clip) == (
        4.0,
        0.01,
        0.5,
        1.0,
        1.0,
        1.0,
        1e-3,
        1e-4,
        1.0,
    )
    r = Recipe()
    assert (r.batch_size, r.weight_decay, r.betas, r.eta_min, r.lr_scale, r.seed) == (
        8,
        0.01,
        (0.9, 0.999),
        1e-4,
        1.0,
        111,
    )


def test_initial_tokens():
    method = small(token_scale=0.1)
    assert method.tokens.shape == (2, 192) and not torch.equal(*method.tokens)
    assert method.tokens.std().item() == pytest.approx(0.1 / math.sqrt(192), rel=0.15)


# -------------------------------------------------------------------------------------------------------------------------- figures


def is_picture(path) -> bool:
    with Image.open(path) as image:
        image.load()
        pixels = np.asarray(image.convert("RGB"))
    return image.format == "PNG" and min(pixels.shape[:2]) > 50 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


FIGURES = {
    "whole": (lambda i: category(i, 0) | category(i, 1), {}, 2),
    "without masks": (lambda i: category(i, 0), dict(mask=""), 1),
    "without normals": (lambda i: category(i, 0) & i["anomalous"], {}, 1),
    "one image": (lambda i: i.index == i.index[i["anomalous"]][0], {}, 1),
    "only normals": (lambda i: category(i, 0) & ~i["anomalous"], {}, 1),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_figures(full, model, tmp_path, kind):
    keep, columns, classes = FIGURES[kind]
    index = rows(full, keep(full), **columns)
    if kind == "without masks":
        assert (index["mask"] == "").all()
    paths = render_cases(model, index, evaluate(model, index, progress=False), tmp_path, title="a title", dpi=50)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert sorted(p.name for p in paths) == names, "a path was named that is not there"
    assert {f"{c}.png" for c in index["category"]} <= set(names) and len(names) >= classes
    for path in paths:
        assert is_picture(path), path.name


def test_figures_show_the_image_they_name(full, model, tmp_path, monkeypatch):
    "Views are joined to cases by position: the map shown is the map of that image."
    from zsad_nb.figures import heatmaps as figures

    caught = {}

    def class_figure(chosen, views, scale, heading):
        caught.update({row.image: (row.score, views[row.position]) for row in chosen.itertuples()})
        return true(chosen, views, scale, heading)

    true = figures.class_figure
    monkeypatch.setattr(figures, "class_figure", class_figure)
    shuffled = full[category(full, 0)].sample(frac=1, random_state=1)
    shuffled.attrs = dict(full.attrs)
    found = evaluate(model, shuffled, progress=False)
    render_cases(model, shuffled, found, tmp_path, dpi=30)
    assert caught
    for path, (score, (image, mask, heat, _)) in caught.items():
        true_image = np.asarray(Image.open(f"{full.attrs['root']}/{path}").convert("RGB"))
        assert np.abs(image * 255 - true_image).max() < 1 and mask.any() == ("/good/" not in path)
        low, high = found.per_image.set_index("image").loc[path, ["map_low", "map_high"]]
        assert (heat.min(), heat.max()) == pytest.approx((low, high), abs=1e-5)
        assert np.sort(heat.ravel())[-math.ceil(0.01 * heat.size) :].mean() == pytest.approx(score, abs=1e-5)
