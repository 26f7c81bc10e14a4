"Every metric of every mode lies in [0, 1] and is scikit-learn's, whatever the scores: ties, constants, huge, tiny, float64, one pixel, nothing but defects."

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from zsad_nb.evaluation.aupro_200 import VARIANTS_200, aupimo, aupro_200
from zsad_nb.evaluation.binned import BinnedPixelMetrics, _digamma_step
from zsad_nb.evaluation.metrics import (
    ROUNDING,
    Metrics,
    PixelMetrics,
    aupro_name,
    fraction,
    image_metrics,
    mean_over_classes,
    pixel_metrics,
)
from zsad_nb.evaluation.type_metrics import TypeMetrics, macro

LIMITS = (0.3, 1.0, 0.05, 1e-6, 0.1, 0.1000001)
LEVELS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e-45, 3e38, -3e38, 0.1, 1 / 3, 16777216.0, 16777218.0]


@st.composite
def scored(draw, most=5):
    "Maps and masks of one shape: few levels and therefore ties, or any number that float32 holds, in either precision."
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, most), st.integers(1, most)))
    values = draw(
        st.sampled_from(
            [
                st.sampled_from(LEVELS),
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                st.integers(-3, 3).map(float),
            ]
        )
    )
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    masks = draw(st.one_of(arrays.arrays(bool, shape), st.sampled_from([np.ones(shape, bool), np.zeros(shape, bool)])))
    return draw(arrays.arrays(dtype, shape, elements=values.map(dtype))), masks


def held(found: dict, reasons: dict):
    "All values in [0, 1]; what is undefined says why."
    for name, value in found.items():
        assert 0 <= value <= 1 or (math.isnan(value) and reasons.get(name)), (name, value)


def sklearn_metrics(labels, scores):
    with np.errstate(invalid="ignore"):
        precision, recall, _ = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / (precision + recall)
    return [roc_auc_score(labels, scores), average_precision_score(labels, scores), np.nanmax(f1)]


@given(scored())
def test_pixel_metrics_are_fractions_and_scikit_learns(given_maps):
    maps, masks = given_maps
    found = pixel_metrics(maps, masks, limits=LIMITS, block=2**10)
    held(found, found.reasons)
    assert len([name for name in found if name.startswith("pixel_aupro")]) == len(LIMITS) + 1
    if masks.any() and not masks.all():
        scores = maps.astype(np.float32).ravel() + np.float32(0)
        assert [found[f"pixel_{name}"] for name in ("auroc", "ap", "f1max")] == pytest.approx(
            sklearn_metrics(masks.ravel(), scores), abs=1e-9
        )


@given(scored(), scored())
def test_shards_are_fractions_and_equal_one_pass(first, second):
    with PixelMetrics(LIMITS, block=2**10) as whole, PixelMetrics(LIMITS, block=2**10) as part:
        for maps, masks in (first, second):
            whole.update(maps, masks)
        other = PixelMetrics(LIMITS, block=2**10).update(*second)
        merged = part.update(*first).merge(other).compute()
        other.close()
        one = whole.compute()
    held(merged, merged.reasons)
    assert {name: None if math.isnan(value) else value for name, value in merged.items()} == {
        name: None if math.isnan(value) else value for name, value in one.items()
    }


@pytest.mark.slow
@given(scored(), st.sampled_from([8, 12, 22]))
def test_binned_metrics_and_their_bounds_are_fractions(given_maps, bits):
    if bits == 22 and given_maps[0].size > 4:
        bits = 12  # 100 MB each: a few are enough
    maps, masks = given_maps
    found = BinnedPixelMetrics(LIMITS, bits).update(maps, masks).compute()
    exact = pixel_metrics(maps, masks, limits=LIMITS, block=2**10)
    held(found, found.reasons)
    for name, bound in found.bounds.items():
        assert 0 <= bound <= 0.5 and -1e-12 <= found[name] - bound and found[name] + bound <= 1 + 1e-12
        assert abs(found[name] - exact[name]) <= bound + 1e-12, name


@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from(LEVELS + [1e300, -1e300, 5e-324]), st.floats(allow_nan=False, allow_infinity=False)
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_image_metrics_are_fractions_and_scikit_learns(rows):
    scores = np.array([score for score, _ in rows])
    labels = np.array([label for _, label in rows])
    found = image_metrics(scores, labels)
    held(found, found.reasons)
    if labels.any() and not labels.all():
        assert list(found.values()) == pytest.approx(
            sklearn_metrics(labels, np.unique(scores, return_inverse=True)[1]), abs=1e-9
        )


@pytest.mark.slow
@given(
    st.integers(1, 4).flatmap(
        lambda types: st.tuples(
            arrays.arrays(
                np.float32,
                (2, types + 1, 3, 3),
                elements=st.one_of(
                    st.sampled_from(LEVELS).map(np.float32), st.floats(width=32, allow_nan=False, allow_infinity=False)
                ),
            ),
            arrays.arrays(np.int64, (2, 3, 3), elements=st.integers(0, types)),
        )
    )
)
def test_type_metrics_are_fractions(given_maps):
    maps, labels = given_maps
    with TypeMetrics(["normal", *(f"type {k}" for k in range(1, maps.shape[1]))], memory_limit=2**12) as metrics:
        table = metrics.update(maps, labels).compute()
    for name in ("auroc", "ap", "f1", "precision", "recall"):
        assert table[name].dropna().between(0, 1).all()
    assert (table["auroc"].notna() | table["reason"].ne("")).all()
    assert all(0 <= value <= 1 or math.isnan(value) for value in macro(table).values())


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=30),
    st.sampled_from(VARIANTS_200),
    st.sampled_from([0.3, 1.0]),
)
def test_the_200_step_area_is_a_fraction(curve, variant, limit):
    fpr = np.array(sorted(x for x, _ in curve))[::-1]
    pro = np.array(sorted(y for _, y in curve))[::-1]
    value, why = aupro_200(fpr, pro, variant, limit)
    found = Metrics({"pixel_aupro_200": value}, {"pixel_aupro_200": why} if why else {})
    held(found, found.reasons)


@given(scored(4))
def test_aupimo_is_a_fraction(given_maps):
    maps, masks = given_maps
    found = aupimo(maps.astype(np.float32), masks, bounds=(1e-2, 1.0), steps=200)
    assert all(0 <= value <= 1 or math.isnan(value) for value in [*found.per_image, found.mean])
    assert found.reason or 0 <= found.mean <= 1


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=1, max_size=40))
def test_means_over_classes_are_fractions(values):
    table = pd.DataFrame({"image_auroc": values, "image_ap": values[::-1]})
    assert all(0 <= value <= 1 or math.isnan(value) for value in mean_over_classes(table)["mean"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused(bad):
    maps = np.zeros((2, 3, 3))
    masks = np.zeros((2, 3, 3), bool)
    maps[1, 0, 0], masks[0, 0] = bad, True
    for refuse in (
        lambda: pixel_metrics(maps, masks),
        lambda: BinnedPixelMetrics(bits=8).update(maps, masks),
        lambda: aupimo(maps, masks),
    ):
        with pytest.raises(ValueError, match="image 1 .*NaN or infinite"):
            refuse()
    with pytest.raises(ValueError, match="score of image 1 is"):
        image_metrics([0, bad, 1], [0, 0, 1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        TypeMetrics(["normal", "a"]).update(maps[:, None].repeat(2, 1), masks.astype(int))


@pytest.mark.parametrize("seed", range(40))
def test_a_perfect_map_has_no_more_than_one(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((2, 16, 16)) < 0.1
    found = pixel_metrics(masks + rng.random(masks.shape) * 0.5, masks, limits=LIMITS, block=2**12)
    assert {name: value for name, value in found.items() if name != "pixel_aupro_200"} == pytest.approx(
        dict.fromkeys([n for n in found if n != "pixel_aupro_200"], 1.0), abs=1e-12
    )
    held(found, found.reasons)


@pytest.mark.parametrize("value, name", [(1 + 2e-9, "image AP"), (-2e-9, "AUPRO"), (math.inf, "x"), (17.0, "x")])
def test_what_is_no_rounding_is_a_mistake(value, name):
    with pytest.raises(ArithmeticError, match=f"{name} came out as"):
        fraction(value, name)
    with pytest.raises(ArithmeticError):
        Metrics({name: value})


@pytest.mark.parametrize("value, expected", [(1 + ROUNDING, 1.0), (-ROUNDING, 0.0), (np.float32(0.5), 0.5), (1, 1.0)])
def test_rounding_is_taken_off(value, expected):
    assert fraction(value, "x") == expected and isinstance(fraction(value, "x"), float)


def test_limits_do_not_share_a_name():
    assert [aupro_name(limit) for limit in (0.3, 1, 1.0, 0.05, 0.1, 0.1000001)] == [
        "pixel_aupro",
        "pixel_aupro@1",
        "pixel_aupro@1",
        "pixel_aupro@0.05",
        "pixel_aupro@0.1",
        "pixel_aupro@0.1000001",
    ]
    assert len({aupro_name(limit) for limit in (0.123456789, 0.12345678, 0.1234567)}) == 3


@pytest.mark.parametrize("start", [1.0, 7.0, 63.0, 64.0, 1e4, 1e9, 4e10])
def test_the_worst_case_of_ap_keeps_its_digits(start):
    for steps in (1, 3, 50):
        assert _digamma_step(np.array([start]), np.array([float(steps)]))[0] == pytest.approx(
            math.fsum(1 / (start + j) for j in range(steps)), rel=1e-13
        )


def test_bounds_hold_where_one_pixel_stands_against_a_billion():
    "The lowest AP of one defect below 10^9 normal pixels is 10^-9, not a negative number."
    metrics = BinnedPixelMetrics(bits=8).update(np.zeros((1, 2, 2)), np.array([[[True, False], [False, False]]]))
    metrics._count()
    metrics.normal *= 10**9 // 3
    found = metrics.compute()
    assert found["pixel_ap"] - found.bounds["pixel_ap"] == pytest.approx(1e-9, rel=0.1)
    held(found, found.reasons)
