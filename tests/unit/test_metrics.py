"Metrics against scikit-learn and a brute-force AUPRO; batches, shards and disk; undefined cases; errors."

import errno
import gc
import math
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from zsad_nb.evaluation import metrics as module
from zsad_nb.evaluation.aupro_200 import aupimo, aupro_200, thresholds_200
from zsad_nb.evaluation.binned import BinnedPixelMetrics
from zsad_nb.evaluation.metrics import PixelMetrics, image_metrics, mean_over_classes, pixel_metrics
from zsad_nb.evaluation.rank_counts import RankCounts

LIMITS = (0.3, 0.05, 1.0, 0.17)
ROOT = Path(__file__).resolve().parents[2]


def reference(y, s):
    "AUROC, AP, F1-max of scikit-learn"
    p, r, _ = precision_recall_curve(y, s)
    with np.errstate(invalid="ignore"):
        f1 = 2 * p * r / (p + r)
    return [roc_auc_score(y, s), average_precision_score(y, s), f1[np.isfinite(f1)].max()]


def regions_of(masks):
    "(image, bool map) of every 8-connected region, by flood fill"
    for i, mask in enumerate(masks):
        todo = set(zip(*np.nonzero(mask)))
        while todo:
            region = set()
            front = [todo.pop()]
            while front:
                y, x = front.pop()
                region.add((y, x))
                near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & todo
                todo -= near
                front += near
            out = np.zeros(mask.shape, bool)
            out[tuple(zip(*region))] = True
            yield i, out


def brute_aupro(maps, masks, limit):
    "One pass per distinct score; trapezoid to the limit, interpolated there, divided by it"
    regions = list(regions_of(masks))
    fpr, pro = [0.0], [0.0]
    for t in np.unique(maps)[::-1]:
        above = maps >= t
        fpr.append((above & ~masks).sum() / (~masks).sum())
        pro.append(np.mean([above[i][r].mean() for i, r in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr, fpr[1:], pro, pro[1:]):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y) / 2
    return area / limit


def brute_aupro_200(maps, masks, variant):
    "The public loop: a pass per threshold over all pixels and regions; float32 scores against float64 thresholds"
    regions = list(regions_of(masks))
    low = maps.min()
    high = maps.max()
    fpr, pro = [], []
    for t in np.arange(low, high, (high - low) / 200):
        above = maps.astype(np.float64) > t
        fpr.append((above & ~masks).sum() / (~masks).sum())
        pro.append(np.mean([above[i][r].mean() for i, r in regions]))
    return aupro_200(np.array(fpr), np.array(pro), variant)[0]


def sample(kind, seed, n=7, h=19, w=23):
    "Maps and masks: continuous, few levels, saturated, negative, or mostly defect"
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.standard_normal((n, h, w)), (0, 2, 2)) > (0.15 if kind != "mostly" else -0.2)
    masks[0] = False
    masks[1, 0, 0] = masks[1, 2, 2] = True  # a pixel at the border
    maps = rng.standard_normal((n, h, w)) + rng.uniform(-1, 3) * masks
    if kind == "levels":
        maps = np.round(maps * 2) / 2
    if kind == "two":
        maps = (maps > 0.5).astype(float)
    if kind == "saturated":
        maps = maps.clip(0, 1)
    if kind == "negative":
        maps = -np.exp(maps)
    if kind == "tiny":
        maps = maps * 1e-42  # subnormal in float32
    return maps.astype(np.float32), masks


KINDS = ["continuous", "levels", "two", "saturated", "negative", "mostly", "tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_pixel_metrics_against_references(kind, seed):
    maps, masks = sample(kind, seed)
    got = pixel_metrics(maps, masks, limits=LIMITS)
    assert list(got) == [
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1max",
        "pixel_aupro",
        "pixel_aupro@0.05",
        "pixel_aupro@1",
        "pixel_aupro@0.17",
        "pixel_aupro_200",
    ]
    np.testing.assert_allclose(list(got.values())[:3], reference(masks.ravel(), maps.ravel()), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        list(got.values())[3:7], [brute_aupro(maps, masks, l) for l in LIMITS], rtol=0, atol=1e-12
    )
    for variant in ("anomalyclip", "visualad"):
        want = brute_aupro_200(maps, masks, variant)
        value = pixel_metrics(maps, masks, variant_200=variant)
        np.testing.assert_allclose(value["pixel_aupro_200"], want, rtol=0, atol=1e-12)
        assert math.isnan(want) == ("pixel_aupro_200" in value.reasons)


@pytest.mark.parametrize("levels", [0, 2, 5])
def test_image_metrics_against_sklearn(levels):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y = rng.random(30) < 0.3
        y[:2] = 0, 1
        s = rng.standard_normal(30) + y
        if levels:
            s = np.round(s * levels) / levels
        np.testing.assert_allclose(list(image_metrics(s, y).values()), reference(y, s), rtol=0, atol=1e-12)
        assert (
            image_metrics(torch.tensor(s), torch.tensor(y))
            == image_metrics(s, y.astype(int))
            == image_metrics(list(s), list(y))
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_batches_shards_and_disk_exactly(kind, tmp_path, monkeypatch):
    maps, masks = sample(kind, 5, n=12)
    has_mask = np.ones(12, bool)
    has_mask[7] = False
    masks[7] = False
    want = pixel_metrics(maps, masks, has_mask, LIMITS)
    for size in (1, 5):
        m = PixelMetrics(LIMITS)
        for i in range(0, 12, size):
            m.update(maps[i : i + size], masks[i : i + size], has_mask[i : i + size])
        assert m.compute() == want and m.compute() == want  # twice
    assert pixel_metrics(maps[::-1], masks[::-1], has_mask[::-1], LIMITS) == want  # any order
    for options in (
        dict(memory_limit=0, block=97),
        dict(memory_limit=2000, block=97, spill=tmp_path),
        dict(block=10**6),
    ):
        shards = [PixelMetrics(LIMITS, **options).update(maps[i::3], masks[i::3], has_mask[i::3]) for i in range(3)]
        before = [s.compute() for s in shards]
        total = PixelMetrics(LIMITS, **options)
        for s in shards[::-1]:
            total.merge(s)
        assert total.compute() == want and (total.images, total.excluded) == (12, 1)
        assert [s.compute() for s in shards] == before  # untouched
        assert pickle.loads(pickle.dumps(total)).compute() == want
        assert (
            shards[0].update(maps[1::3], masks[1::3], has_mask[1::3]).merge(shards[2]).compute() == want
        )  # goes on after compute
    monkeypatch.setattr(module, "_SLICE", 3)  # slices of the sorted keys, not to the last bit but to rounding
    np.testing.assert_allclose(
        list(pixel_metrics(maps, masks, has_mask, LIMITS).values()), list(want.values()), rtol=1e-13
    )


def test_ten_shards_of_different_sizes_and_tensors():
    parts = [sample("levels", s, n=3, h=10 + s, w=12) for s in range(10)]
    one = PixelMetrics()
    for a, b in parts:
        one.update(a, b)
    many = PixelMetrics()
    for a, b in parts:
        many.merge(PixelMetrics().update(torch.tensor(a, requires_grad=True)[:, None], torch.tensor(b)[:, None]))
    assert many.compute() == one.compute() and many.images == 30


def test_power_of_the_scores_moves_only_the_200_threshold_value():
    maps, masks = sample("continuous", 0)
    maps = np.round((maps - maps.min() + 1) * 64) / 64
    a = pixel_metrics(maps, masks)
    b = pixel_metrics(maps.astype(np.float64) ** 20, masks)
    assert {k: v for k, v in a.items() if k != "pixel_aupro_200"} == {
        k: v for k, v in b.items() if k != "pixel_aupro_200"
    }
    assert abs(a["pixel_aupro_200"] - b["pixel_aupro_200"]) > 0.02


def test_zero_and_minus_zero_tie():
    maps = np.float32([[[0.0, -0.0, -0.0, 0.0]]])
    masks = np.array([[[1, 1, 0, 0]]], bool)
    got = pixel_metrics(maps, masks)
    assert [got[k] for k in ("pixel_auroc", "pixel_ap", "pixel_aupro")] == pytest.approx([0.5, 0.5, 0.15], abs=1e-12)


def test_perfect_and_reversed():
    _, masks = sample("continuous", 1)
    best = pixel_metrics(masks.astype(np.float32), masks)
    worst = pixel_metrics(-masks.astype(np.float32), masks)
    assert all(
        best[k] == pytest.approx(1, abs=1e-12) for k in ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
    )
    assert (worst["pixel_auroc"], worst["pixel_aupro"]) == (0, 0)


def test_undefined_is_nan_with_a_reason():
    maps, masks = sample("continuous", 2)
    for got, word in (
        (pixel_metrics(maps, masks & False), "no anomalous pixel"),
        (pixel_metrics(maps, masks | True), "no normal pixel"),
        (PixelMetrics().compute(), "no image"),
        (pixel_metrics(maps, masks & False, np.zeros(len(maps), bool)), f"{len(maps)} images without a mask"),
    ):
        assert len(got) == 5 and all(map(math.isnan, got.values())) and all(word in got.reasons[k] for k in got)
    constant = pixel_metrics(np.full_like(maps, -0.25), masks)
    p = masks.mean()
    assert list(constant.values())[:4] == pytest.approx([0.5, p, 2 * p / (1 + p), 0.15], abs=1e-12)
    assert math.isnan(constant["pixel_aupro_200"]) and list(constant.reasons) == ["pixel_aupro_200"]
    assert image_metrics([], []).reasons["image_auroc"] == "no image"
    assert all(map(math.isnan, image_metrics([1.0, 2.0], [0, 0]).values()))
    one_kind = image_metrics([1.0, 2.0], [1, 1])
    assert (
        math.isnan(one_kind["image_auroc"])
        and (one_kind["image_ap"], one_kind["image_f1max"]) == (1, 1)
        and list(one_kind.reasons) == ["image_auroc"]
    )


def test_images_without_mask_are_left_out_and_counted():
    maps, masks = sample("continuous", 3)
    masks[4] = False
    maps[4] = 100  # its scores touch nothing, not even the 200 thresholds
    use = np.arange(len(maps)) != 4
    m = PixelMetrics().update(maps, masks, use)
    assert m.compute() == pixel_metrics(maps[use], masks[use]) and (m.images, m.excluded) == (len(maps), 1)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            lambda a, b: (a.__setitem__((2, 3, 4), np.nan), a)[1:] + (b,),
            ValueError,
            "map of image 9 (number 2 of its batch) has 1 scores",
        ),
        (lambda a, b: (a.__setitem__((6, 0, 0), np.inf), a)[1:] + (b,), ValueError, "map of image 13"),
        (lambda a, b: (a.astype(np.float64) * 1e300, b), ValueError, "infinite in float32"),
        (lambda a, b: (a, b * 255), ValueError, "mask of image 8"),
        (lambda a, b: (a, b * 0.5), ValueError, "values other than 0 and 1, up to 0.5"),
        (lambda a, b: (a[:, :-1], b), ValueError, "one shape (B, H, W)"),
        (lambda a, b: (a[0], b[0]), ValueError, "one shape (B, H, W)"),
        (lambda a, b: (a[:5], b), ValueError, "one shape (B, H, W)"),
        (lambda a, b: (a.astype(np.int64), b), TypeError, "int64"),
        (lambda a, b: (a.astype(complex), b), TypeError, "complex128"),
        (lambda a, b: (a, b, np.ones(3, bool)), ValueError, "has_mask (3,) must be (7,)"),
        (lambda a, b: (a, b, np.zeros(7, bool)), ValueError, "image 8 (number 1 of its batch) has has_mask False"),
        (lambda a, b: (a, b, np.full(7, 2)), ValueError, "has_mask of image 0 is"),
    ],
)
def test_a_bad_batch_names_the_image_and_changes_nothing(change, error, words):
    maps, masks = sample("continuous", 4)
    m = PixelMetrics().update(maps, masks)
    want = m.compute()
    with pytest.raises(error) as e:
        m.update(*change(maps.copy(), masks.copy()))
    assert words in str(e.value)
    assert m.compute() == want and m.images == len(maps)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: PixelMetrics(limits=(0,)), "limits (0,)"),
        (lambda: PixelMetrics(limits=(0.3, 30)), "limits (0.3, 30)"),
        (lambda: PixelMetrics(spill="no/such/folder"), "spill folder no/such/folder does not exist"),
        (lambda: PixelMetrics(variant_200="crane"), "anomalyclip, visualad"),
        (lambda: image_metrics([1, 2, np.inf], [0, 1, 1]), "score of image 2 is inf"),
        (lambda: image_metrics([1, 2], [0, 1, 1]), "(2,) and labels (3,)"),
        (lambda: image_metrics([1, 2], [0, -1]), "label of image 1"),
        (lambda: image_metrics([1, 2], [0, np.nan]), "label of image 1"),
        (lambda: aupimo(np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2))), "map of image 0"),
        (lambda: aupimo(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), bounds=(1, 0.1)), "bounds (1, 0.1)"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert words in str(e.value)


def test_closed_or_self_merged_is_refused():
    m = PixelMetrics()
    with pytest.raises(ValueError, match="merged with itself"):
        m.merge(m)
    with m:
        pass
    for call in (
        m.compute,
        lambda: m.update(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool)),
        lambda: PixelMetrics().merge(m),
    ):
        with pytest.raises(RuntimeError, match="is closed"):
            call()


def test_lossless_inputs_are_equal():
    maps, masks = sample("levels", 6)
    want = pixel_metrics(maps, masks)
    for a in (
        maps.astype(np.float64),
        maps.astype(np.float16),
        torch.tensor(maps).bfloat16(),
        np.asfortranarray(maps),
        (maps * 2).astype(np.int8) / np.float32(2),
    ):
        assert pixel_metrics(a, masks) == want
    for b in (masks.astype(np.uint8), masks.astype(float), torch.tensor(masks)):
        assert pixel_metrics(maps, b) == want
    read_only = maps.copy()
    read_only.flags.writeable = False
    assert pixel_metrics(read_only, masks) == want and (read_only == maps).all()


def spill_files(folder):
    "Named files in the folder, and unnamed ones this process holds open there"
    held = (
        [os.readlink(f"/proc/self/fd/{f}") for f in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{f}")]
        if os.path.isdir("/proc/self/fd")
        else []
    )
    return os.listdir(folder) + [h for h in held if h.startswith(str(folder))]


@pytest.mark.slow
def test_temporary_files_are_always_removed(tmp_path):
    maps, masks = sample("continuous", 7)
    options = dict(spill=tmp_path, memory_limit=0, block=50)
    m = PixelMetrics(**options).update(maps, masks)
    m.compute()
    assert os.listdir(tmp_path) == []  # never has a name
    m.close()
    assert spill_files(tmp_path) == []
    with PixelMetrics(**options) as m:
        m.update(maps, masks)
    m = PixelMetrics(**options).update(maps, masks)
    del m
    gc.collect()
    pixel_metrics(maps, masks, **options)
    with pytest.raises(ValueError):
        pixel_metrics(np.where(masks, np.nan, maps), masks, **options)
    assert spill_files(tmp_path) == []


def test_full_disk_by_error_code(tmp_path, monkeypatch):
    maps, masks = sample("continuous", 8)

    class Full:
        def __init__(self, **kwargs):
            self.closed = False

        def seek(self, at):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    m = PixelMetrics(spill=tmp_path, memory_limit=0, block=50)
    with pytest.raises(OSError, match="spill=FOLDER") as e:
        m.update(maps, masks)
    assert e.value.errno == errno.ENOSPC and str(tmp_path) in str(e.value)
    with pytest.raises(RuntimeError, match="is closed"):
        m.compute()  # half a batch was written: no number rather than a wrong one


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_full_disk_for_real_and_killed_process(tmp_path):
    code = textwrap.dedent(f"""
        import os, resource, signal, sys, numpy as np
        sys.path.insert(0, {str(ROOT)!r})
        from zsad_nb.evaluation.metrics import PixelMetrics
        m = PixelMetrics(spill={str(tmp_path)!r}, memory_limit=0, block=1000)
        maps, masks = np.random.default_rng(0).random((8, 50, 50), np.float32), np.zeros((8, 50, 50), bool)
        m.update(maps, masks)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try: m.update(maps, masks)
        except OSError as e: print(e, m.closed)
        m = PixelMetrics(spill={str(tmp_path)!r}, memory_limit=0, block=1000).update(maps, masks)
        os.kill(os.getpid(), signal.SIGKILL)""")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == -9, out.stderr
    assert "free space there" in out.stdout and out.stdout.strip().endswith("True")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_memory_stays_bounded():
    "2,000 maps of 128 x 128 (131 MB of scores), 16 MB kept: the peak grows by less than 60 MB"
    code = textwrap.dedent(f"""
        import resource, sys, numpy as np
        sys.path.insert(0, {str(ROOT)!r})
        from zsad_nb.evaluation.metrics import PixelMetrics
        def run(n):
            rng = np.random.default_rng(0); mask = np.zeros((20, 128, 128), bool); mask[::2, 5:25, 5:20] = True
            with PixelMetrics(memory_limit=16 * 2**20, block=2**20) as m:
                for _ in range(n): m.update(rng.random((20, 128, 128), np.float32), mask)
                m.compute()
        run(2); start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(100); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)""")
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown / (1024 if sys.platform != "darwin" else 2**20) < 60


def test_thresholds_decide_like_the_public_loop():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        low, high = np.sort(rng.standard_normal(2).astype(np.float32) * np.float32(10.0 ** rng.integers(-6, 6)))
        t = thresholds_200(low, high)
        exact = np.arange(low, high, (high - low) / 200)
        near = np.concatenate([t, np.nextafter(t, np.float32(np.inf)), np.nextafter(t, np.float32(-np.inf))])
        assert ((near[:, None] > t) == (near[:, None].astype(np.float64) > exact)).all()
    assert len(thresholds_200(0, np.float32(1e-45))) == 0  # the step underflows
    assert len(thresholds_200(-3e38, 3e38)) == 0  # the range overflows


def test_rank_counts_against_counting():
    rng = np.random.default_rng(0)
    for levels, size in ((3, 11), (1000, 64), (1000, 10**5)):
        x = rng.integers(0, levels, 500).astype(np.float32)
        v = np.unique(rng.integers(-3, levels + 3, 60)).astype(np.float32)
        counts = RankCounts(room=256, size=size)
        for part in np.array_split(x, 7):
            counts.add(part)
        for part in (v, v[:1], v[-1:], v[:0]):
            less, ties = counts.counts(part)
            assert (less == (x < part[:, None]).sum(1)).all() and (ties == (x == part[:, None]).sum(1)).all()
    assert (RankCounts().counts(v)[0] == 0).all()


def test_aupimo_by_hand():
    "Normal scores 0..99 (one image): FPR at threshold t is (100 - t) / 100; the defect's scores are all 95"
    maps = np.stack([np.arange(100.0).reshape(10, 10), np.full((10, 10), 95.0)])
    masks = np.zeros((2, 10, 10), bool)
    masks[1, :3, :3] = True
    got = aupimo(maps, masks, bounds=(0.01, 0.1), steps=100)
    x = np.log(np.arange(1, 11) / 100)  # TPR is 0 at FPR 0.01..0.04 and 1 from 0.05 on
    want = np.trapezoid((np.arange(1, 11) >= 5).astype(float), x) / math.log(10)
    assert got.mean == pytest.approx(want, abs=1e-12) and math.isnan(got.per_image[0])
    assert "no image with a defect" in aupimo(maps, masks, has_mask=[True, False]).reason
    assert "no image without defect" in aupimo(maps, masks | True).reason
    assert "above the lower bound" in aupimo(maps, masks).reason


def test_mean_over_classes():
    table = pd.DataFrame(
        {
            "image_auroc": [0.5, math.nan, 1.0],
            "image_ap": [0.4, 1.0, 0.6],
            "pixel_auroc": [math.nan, 0.7, 0.9],
            "pixel_aupro": [math.nan, 0.2, 0.4],
            "note": list("abc"),
        },
        index=["x", "y", "z"],
    )
    got = mean_over_classes(table)
    assert list(got.index) == ["image_auroc", "image_ap", "pixel_auroc", "pixel_aupro"]
    assert (
        list(got["mean"]) == pytest.approx([0.75, 0.5, 0.8, 0.3])
        and list(got.averaged) == [2, 2, 2, 2]
        and list(got.left_out) == ["y", "y", "x", "x"]
    )
    none = mean_over_classes(table.iloc[1:2][["image_auroc"]])
    assert math.isnan(none.loc["image_auroc", "mean"]) and none.loc["image_auroc", "averaged"] == 0
    assert table.loc["y", "image_ap"] == 1  # the argument is not changed


# ---- counted in bins


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smooth", "quantised", "negative", "constant", "tiny"])
@pytest.mark.parametrize("bits", [10, 22])
def test_binned_metrics_stay_within_their_bounds(kind, bits):
    rng = np.random.default_rng(0)
    maps = ndimage.gaussian_filter(rng.standard_normal((9, 40, 40)), (0, 3, 3)).astype(np.float32) * 9
    masks = ndimage.gaussian_filter(rng.standard_normal((9, 40, 40)), (0, 4, 4)) > 0.12
    masks[::3] = False
    maps += masks * np.float32(0.7)
    maps = dict(
        smooth=maps,
        quantised=maps.round(),
        negative=maps - 50,
        constant=np.zeros_like(maps),
        tiny=maps * np.float32(1e-38),
    )[kind]
    with PixelMetrics((0.3, 0.05)) as m:
        exact = m.update(maps, masks).compute()
    found = BinnedPixelMetrics((0.3, 0.05), bits).update(maps, masks).compute()
    assert set(found.bounds) == set(exact) - {"pixel_aupro_200"}
    for name, bound in found.bounds.items():
        assert abs(found[name] - exact[name]) <= bound + 1e-12, name
    if bits == 22 and kind in ("smooth", "tiny"):
        assert max(found.bounds.values()) < 2e-3
    parts = [BinnedPixelMetrics((0.3, 0.05), bits).update(maps[i::3], masks[i::3]) for i in range(3)]
    for p in parts[1:]:
        parts[0].merge(p)
    for name in found.bounds:
        assert parts[0].compute()[name] == pytest.approx(found[name], abs=1e-12)


@pytest.mark.slow
def test_evaluation_in_bins_says_how_far_it_is_off(tmp_path):
    from zsad_nb.evaluation.evaluate import evaluate
    from zsad_nb.methods.base import create
    from zsad_nb.synthetic.benchmark import synthetic_index

    index = synthetic_index(tmp_path, "target", 64, 1, 1)
    method = create("self_distance", image_size=64)
    exact, binned = (evaluate(method, index, progress=False, exact=e) for e in (True, False))
    said = binned.reasons[binned.reasons["reason"].str.startswith("counted in bins")]
    assert (
        set(said["category"]) == set(index["category"]) and not exact.reasons["reason"].str.startswith("counted").any()
    )
    for row in said.itertuples():
        bound = float(row.reason.split("at most ")[1].split()[0])
        assert (
            abs(binned.per_class.loc[row.category, row.metric] - exact.per_class.loc[row.category, row.metric])
            <= bound * 1.1 + 1e-12
        )
    assert binned.per_class["pixel_aupro_200"].isna().all()
