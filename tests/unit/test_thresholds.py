"Thresholds: the rate that is promised, the interval that comes with it, and what is refused."

import itertools
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, betabinom, binomtest, ks_1samp

from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.sources import identity
from zsad_nb.inspection.thresholds import (
    Calibration,
    Threshold,
    _thresholds,
    calibration,
    clopper_pearson,
    compare_with,
    from_labels,
    from_normals,
    from_value,
    needed,
    rank,
    realised,
)
from zsad_nb.methods.base import create, load, save
from zsad_nb.synthetic.benchmark import synthetic_index

KEY = dict(method="m", size=64, hash="0" * 16)


def table(scores, category="a", anomalous=False):
    return pd.DataFrame(dict(score=scores, peak=scores, category=category, anomalous=anomalous))


# ---------------------------------------------------------------------------------------------------------------- the promise


@pytest.mark.parametrize("n", range(1, 6))
def test_every_order_is_as_likely_as_any_other(n):
    "All (n + 1)! orders of n normal images and the next one: exactly (n + 1 - k) / (n + 1) of them are alarms."
    orders = list(itertools.permutations(range(n + 1)))
    for k in range(1, n + 1):
        alarms = sum(order[-1] > sorted(order[:-1])[k - 1] for order in orders)
        assert alarms * (n + 1) == (n + 1 - k) * len(orders)


@pytest.mark.parametrize(
    ("n", "rate", "sure"),
    [(99, 0.01, None), (200, 0.05, None), (40, 0.1, None), (300, 0.01, 0.95), (100, 0.05, 0.9), (12, 0.3, None)],
)
def test_coverage(n, rate, sure):
    "2,000 calibrations: the realised rate is Beta distributed (Kolmogorov-Smirnov), its mean and its interval are what is reported, `sure` is kept."
    rng = np.random.default_rng(n)
    k = rank(n, rate, sure)
    rates = 1 - np.sort(rng.random((2000, n)), 1)[:, k - 1]
    mean, low, high = realised(n, k)
    assert ks_1samp(rates, beta(n + 1 - k, k).cdf).pvalue > 1e-3
    assert abs(rates.mean() - mean) < 4 * beta.std(n + 1 - k, k) / 2000**0.5 and mean <= rate + 1e-12
    assert abs(((low <= rates) & (rates <= high)).mean() - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5
    if sure:
        assert (rates <= rate).mean() > sure - 4 * (sure * (1 - sure) / 2000) ** 0.5


@pytest.mark.parametrize(
    "draw",
    [
        lambda r, n: r.normal(size=n),
        lambda r, n: r.pareto(1.0, n),
        lambda r, n: r.integers(0, 5, n).astype(float),
        lambda r, n: np.full(n, 0.5),
    ],
)
def test_any_distribution(draw):
    "On held-out images the rate is kept on average; where scores are equal it is smaller, never larger."
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        found.append(from_normals(draw(rng, 60), 0.1)(draw(rng, 200)).mean())
    assert np.mean(found) < 0.1 + 4 * np.std(found) / 400**0.5 + 1e-12
    if len(np.unique(draw(rng, 60))) == 60:
        assert np.mean(found) > 0.1 - 4 * np.std(found) / 400**0.5 - 1 / 61


def test_as_many_images_as_said():
    for rate in (0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.01, 0.005, 0.001):
        assert needed(rate) == math.ceil(round(1 / rate, 9)) - 1
        for sure in (0.5, 0.9, 0.95, 0.99):
            n = needed(rate, sure)
            assert (1 - rate) ** n <= 1 - sure + 1e-12 and (
                n == 1 or (1 - rate) ** (n - 1) > 1 - sure
            )  # Wilks: all of them below
    with pytest.raises(
        ValueError,
        match=(
            "98 normal images are too few for a false-alarm rate of 0.01: at least 99 are needed; with 98 the lowest"
            " rate is 0.0101. Add normal images or ask"
        ),
    ):
        from_normals(range(98), 0.01)
    with pytest.raises(
        ValueError,
        match=(
            "100 normal images are too few .*kept with 95 % certainty: at least 299 are needed; with 100 the lowest"
            " rate is 0.0295"
        ),
    ):
        from_normals(range(100), 0.01, 0.95)
    with pytest.raises(ValueError, match="0 normal images are too few"):
        from_normals([], 0.5)
    for bad in (0, 1, -0.1, "0.1", None):
        with pytest.raises(ValueError, match="rate=.*between 0 and 1"):
            from_normals(range(9), bad)


def test_clopper_pearson_is_scipys():
    for n in (1, 7, 50):
        for x in range(n + 1):
            for level in (0.8, 0.95):
                want = binomtest(x, n).proportion_ci(level, "exact")
                assert np.allclose(clopper_pearson(x, n, level), (want.low, want.high), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="3 of 2"):
        clopper_pearson(3, 2)


def test_check_expects_what_really_comes():
    "Alarms among held-out images are beta-binomial: the interval that `check` calls plausible holds them at least as often as it says."
    rng = np.random.default_rng(3)
    inside = []
    counts = []
    for _ in range(600):
        found = from_normals(rng.normal(size=80), 0.05).check(rng.normal(size=100))
        inside.append(found["plausible"]), counts.append(found["alarms"])
    k = rank(80, 0.05)
    assert np.mean(inside) > 0.95 - 4 * (0.95 * 0.05 / 600) ** 0.5
    assert abs(np.mean(counts) - betabinom.mean(100, 81 - k, k)) < 4 * betabinom.std(100, 81 - k, k) / 600**0.5


# ------------------------------------------------------------------------------------------- the proof on the drawn target set


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> pd.DataFrame:
    "Scores and peaks of 45 good images of each of the eight target categories, each looked at once."
    index = synthetic_index(tmp_path_factory.mktemp("set"), "target", 64, normal=45, defective=0)
    return Inspector(create("self_distance", image_size=64, sigma=2.0), batch_size=32, max_side=64).predict(
        index, progress=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["score", "peak"])
@pytest.mark.parametrize(("rate", "sure"), [(0.05, None), (0.1, None), (0.05, 0.9)])
def test_the_rate_holds_on_held_out_images(good, what, rate, sure):
    """20 times: half of the images make the threshold, the other half is asked. The images of a set are exchangeable, so the number of alarms is beta-binomial whatever the scores are:
    it lies in the 95 % interval of the threshold itself about 19 times, and the mean rate is the promised one."""
    values = good[what].to_numpy()
    rng = np.random.default_rng(20)
    rates = []
    held = []
    kept = []
    assert len(np.unique(values)) == len(values) == 360
    for _ in range(20):
        order = rng.permutation(len(values))
        t = from_normals(values[order[:180]], rate, sure)
        found = t.check(values[order[180:]])
        rates.append(found["rate"]), held.append(found["plausible"])
        kept.append(
            found["low"] <= t.facts["high"] and t.facts["low"] <= found["high"]
        )  # the images' own interval meets the promised one
    k = rank(180, rate, sure)
    deviation = betabinom.std(180, 181 - k, k) / 180
    assert sum(held) >= 17 and all(kept)  # P(fewer than 17 of 20 | 95 %) = 1.6 %
    assert abs(np.mean(rates) - (181 - k) / 181) < 3 * deviation / 20**0.5
    if sure:
        assert np.mean(np.array(rates) <= rate) >= 0.6


def test_the_rate_holds_in_every_category_where_scores_are_comparable(good):
    "20 times, thresholds of each category from 25 images, asked about the other 20: the count of all categories is a sum of eight beta-binomials."
    rng = np.random.default_rng(7)
    rates = {"": [], "quantile": [], "robust": []}
    names = good.category.unique()
    worst = {how: [] for how in rates}
    for _ in range(20):
        part = good.iloc[rng.permutation(len(good))]
        first = part.groupby("category").head(25)
        rest = part.drop(first.index)
        for how in rates:
            made = calibration(first.assign(anomalous=False), KEY, rate=0.1, comparable=how)
            alarms = np.array([made.of("image", c)(s) for c, s in zip(rest["category"], rest["score"])])
            rates[how].append(alarms.mean())
            worst[how].append(pd.Series(alarms, rest["category"].to_numpy()).groupby(level=0).mean().max())
    k = rank(25, 0.1)
    assert (
        abs(np.mean(rates["quantile"]) - (26 - k) / 26)
        < 3 * betabinom.std(20, 26 - k, k) / 20 / (20 * len(names)) ** 0.5
    )
    assert abs(np.mean(rates["robust"]) - 0.1) < 0.03
    assert (
        np.mean(worst[""]) > np.mean(worst["robust"]) and np.mean(worst[""]) > np.mean(worst["quantile"]) + 0.1
    )  # one threshold for all: some category pays


# --------------------------------------------------------------------------------------------------------------- a few labels


def every_cut(scores):
    return [-np.inf, *np.unique(scores)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("miss", "false_alarm", "share"), [(None, None, None), (1, 1, None), (50, 1, 0.02), (1, 20, 0.5), (None, None, 0.1)]
)
def test_no_cut_is_better(seed, miss, false_alarm, share):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, 40) / 4
    labels = rng.random(40) < 0.3
    labels[:2], labels[-2:] = True, False
    t = from_labels(scores, labels, miss, false_alarm, share, rounds=3)
    p = labels.sum() if share is None else share
    n = (~labels).sum() if share is None else 1 - share

    def value(c):
        caught = (scores[labels] > c).mean()
        alarms = (scores[~labels] > c).mean()
        return (
            2 * p * caught / (p + p * caught + n * alarms)
            if miss is None
            else -(p * miss * (1 - caught) + n * false_alarm * alarms)
        )

    assert value(t.value) == pytest.approx(max(map(value, every_cut(scores))), abs=1e-12)
    assert (t.facts["caught_rate"], t.facts["alarm_rate"]) == pytest.approx(
        (t(scores[labels]).mean(), t(scores[~labels]).mean()), abs=1e-12
    )


def test_dear_misses_lower_the_threshold():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 1, 80), rng.normal(1.5, 1, 40)])
    labels = np.repeat([0, 1], [80, 40])
    values = [from_labels(scores, labels, m, 1, rounds=3).value for m in (0.1, 1, 10, 1000)]
    assert (
        values == sorted(values, reverse=True)
        and values[0] > values[-1]
        and math.isfinite(values[-1])
        and values[-1] < scores[labels == 1].min()
    )


def test_the_uncertainty_is_honest():
    "Pure noise: the best F1 of the set flatters; deciding every image without itself does not. Same seed, same words; large sets are cut into 200 parts."
    rng = np.random.default_rng(5)
    scores = rng.random(60)
    labels = np.repeat([False, True], 30)
    a = from_labels(scores, labels, 1, 1, seed=1)
    b = from_labels(scores, labels, 1, 1, seed=1)
    assert a == b
    wrong = a.facts["missed"] + a.facts["alarms"]
    assert wrong > 60 * (a.facts["alarm_rate"] + 1 - a.facts["caught_rate"]) / 2  # more than on the set itself
    assert a.facts["value_low"] < a.value < a.facts["value_high"]
    f = from_labels(
        np.concatenate([rng.normal(0, 1, 900), rng.normal(3, 1, 300)]), np.repeat([0, 1], [900, 300]), rounds=50
    ).facts
    assert f["missed_low"] * 300 <= f["missed"] <= f["missed_high"] * 300 and f["value_high"] - f["value_low"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(labels=[0, 0, 0, 0]),
            (
                "4 normal and 0 defective images; at least two of each are needed. With normal images alone use"
                " from_normals"
            ),
        ),
        (dict(labels=[1, 1, 1, 0]), "1 normal and 3 defective"),
        (dict(labels=[0, 1, 2, 1]), "labels are True/False or 1/0, found"),
        (dict(labels=[0, 1, 1]), "4 scores and 3 labels"),
        (dict(miss=1), "give both costs"),
        (dict(miss=-1, false_alarm=1), "costs are above 0"),
        (dict(share=1.5), "share=1.5"),
        (dict(scores=[1, 2, np.inf, 3]), "score of image 2 is inf"),
    ],
)
def test_labels_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_labels(**dict(dict(scores=[1, 2, 3, 4], labels=[0, 0, 1, 1]), **arguments))


# ----------------------------------------------------------------------------------------------------------------- comparable


def test_another_scale_changes_nothing_within_a_category():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=200)
    where = np.repeat(["a", "b"], 100)
    moved = np.where(where == "b", scores * 7 - 3, scores)
    probe = rng.normal(size=50) * 2
    for how in ("robust", "quantile"):
        one = compare_with(scores, where, how)
        other = compare_with(moved, where, how)
        assert np.allclose(one(probe, "b"), other(probe * 7 - 3, "b"), atol=1e-9) and np.array_equal(
            one(probe, "a"), other(probe, "a")
        )
        t, _ = _thresholds(scores, where, how, 0.1, None, 0.95)
        m, _ = _thresholds(moved, where, how, 0.1, None, 0.95)
        assert np.array_equal(t["b"](probe), m["b"](probe * 7 - 3))


def test_the_quantile_is_a_p_value():
    "One minus it exceeds no rate too often, and both ways of deciding are one."
    rng = np.random.default_rng(0)
    under = []
    for _ in range(3000):
        r = rng.exponential(size=30)
        by = compare_with(r, ["a"] * 30, "quantile")
        under.append(1 - float(by(rng.exponential(), "a")))
    for alpha in (1 / 31, 0.1, 0.3, 0.7):
        assert np.mean(np.array(under) <= alpha + 1e-12) < alpha + 4 * (alpha * (1 - alpha) / 3000) ** 0.5
    t, by = _thresholds(r, ["a"] * 30, "quantile", 0.1, None, 0.95)
    probe = rng.exponential(size=300)
    assert np.array_equal(t["a"](probe), by(probe, "a") >= 0.9 - 1e-12)


def test_robust_takes_scale_and_threshold_from_different_images():
    "One threshold for three categories of other scales: the rate is kept on new images of the same mixture."
    rng = np.random.default_rng(0)
    found = []
    names = np.repeat(["a", "b", "c"], 60)
    scale = np.repeat([1.0, 20.0, 0.1], 60)
    for _ in range(120):
        made = calibration(table(rng.normal(size=180) * scale, names), KEY, rate=0.1, comparable="robust")
        new = rng.normal(size=180) * scale
        found.append(np.mean([made.of("image", c)(s) for c, s in zip(names, new)]))
    assert abs(np.mean(found) - 0.1) < 4 * np.std(found) / 120**0.5 + 1 / 91
    with pytest.raises(ValueError, match="every second image of a category: 20 of 40 are left for it, 99 are needed"):
        calibration(table(np.arange(40.0)), KEY, comparable="robust")


def test_an_outlier_hardly_moves_the_robust_scale():
    scores = np.concatenate([np.linspace(0, 1, 99), [1e6]])
    median, spread = compare_with(scores, ["a"] * 100, "robust").scale("a")
    assert 0.4 < median < 0.6 and 0.2 < spread < 0.6


# ------------------------------------------------------------------------------------------------------- one file, one method


def test_what_a_score_depends_on(tmp_path):
    method = create("visualad", weights="random:0", image_size=64)
    same = load(save(method, tmp_path / "m.safetensors"))
    assert identity(same) == identity(method)  # the copy is the same method
    others = [
        identity(m, **more)
        for m, more in (
            (create("visualad", weights="random:0", image_size=64), {}),
            (create("self_distance", image_size=64), {}),
            (method, dict(size=96)),
            (method, dict(bits=12)),
        )
    ]
    next(iter(same.learned().values())).data.add_(1e-6)
    assert len({json.dumps(i) for i in [identity(method), identity(same), *others]}) == 6


@pytest.mark.parametrize("how", ["", "robust", "quantile"])
def test_saved_and_read_again(tmp_path, how):
    rng = np.random.default_rng(0)
    made = calibration(
        table(rng.normal(size=240), np.repeat(["ä b", "c"], 120)), KEY, rate=0.05, sure=None, comparable=how
    )
    again = Calibration.load(made.save(tmp_path / "t.json"))
    assert again == made and again.hash == made.hash and str(again) == str(made)
    assert not list(tmp_path.glob(".*"))  # nothing half written
    probe = rng.normal(size=100)
    assert all(np.array_equal(again.of(kind, "c")(probe), made.of(kind, "c")(probe)) for kind in ("image", "pixel"))


def test_refused_for_another_method(tmp_path):
    made = calibration(table(np.arange(200.0)), identity(create("self_distance", image_size=64)))
    made.require(identity(create("self_distance", image_size=64)))
    for other in (
        create("self_distance", image_size=96),
        create("self_distance", image_size=64, sigma=1.0),
        create("visualad", image_size=64, weights="random:0"),
    ):
        with pytest.raises(
            ValueError,
            match="t.json were made with self_distance .* at 64 px, this is .*another scale. Calibrate again",
        ):
            made.require(identity(other), "t.json")
    made.version = "0.0.0"
    with pytest.warns(UserWarning, match="were made with zsad_nb 0.0.0"):
        made.require(made.method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("format"), "was not written by Calibration.save"),
        (lambda d: d["image"][""].pop("value"), "was changed after it was written"),
        (lambda d: d["image"][""].update(value=float("nan")), "was changed"),
        (lambda d: d.pop("pixel"), "was changed"),
        (lambda d: d.update(more=1), "was changed"),
        (lambda d: d.update(method={}), "was changed"),
    ],
)
def test_a_file_that_is_not_believed(tmp_path, change, message):
    path = calibration(table(np.arange(200.0)), KEY).save(tmp_path / "t.json")
    d = json.loads(path.read_text())
    change(d)
    path.write_text(json.dumps(d))
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Calibration.load(path)
    with pytest.raises(ValueError, match="no thresholds at .*; make them with"):
        Calibration.load(tmp_path / "none.json")


def test_words():
    "What it was made from is said, also of a threshold from elsewhere."
    assert "nothing is known of its false alarms" in str(from_value(0.4))
    with pytest.raises(ValueError, match="finite"):
        from_value(math.nan)
    t = from_normals(np.arange(300.0), 0.01)
    assert (
        str(t)
        == "297, rank 298 of 300 normal images: 0.997 % of good images are expected above it, 0.207 to 2.39 % with 95 %"
        " confidence (1 % asked)"
    )
    few = calibration(table([1.0, 2, 3, 8, 9], anomalous=[0, 0, 0, 1, 1]), KEY)
    assert (
        "best F1 on 3 normal and 2 defective images" in str(few)
        and "no pixel threshold, so no mask" in str(few)
        and few.colours("a") is None
    )
    assert Threshold(1.0, "given")([1.0, 1.1]).tolist() == [False, True]  # strictly above
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "score only" in str(Calibration(KEY))
