"How sure a difference is: contributions of images against the definition of the AUROC and against drawing the images again."

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from zsad_nb.evaluation.power import (
    KeptMaps,
    agreement,
    contributions,
    paired_errors,
    rank_correlation,
    scene_of,
    standard_error,
)


@pytest.mark.parametrize("seed, decimals", [(0, 8), (1, 1), (2, 0)])
def test_auroc_with_ties(seed, decimals):
    rng = np.random.default_rng(seed)
    truth = rng.random(80) < 0.3
    values = np.round(rng.normal(size=80) + truth, decimals)
    auroc, parts = contributions(values, truth)
    assert auroc == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
    assert parts.sum() == pytest.approx(0, abs=1e-12)


def test_many_pixels_are_binned_closely():
    rng = np.random.default_rng(0)
    masks = rng.random((12, 64, 64)) < 0.05
    maps = rng.normal(size=masks.shape) + masks
    auroc, parts = contributions(maps, masks)
    exact, whole = contributions(maps, masks, bins=maps.size)
    assert exact == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert auroc == pytest.approx(exact, abs=1e-5) and np.abs(parts - whole).max() < 1e-5  # a thousandth of a point


def test_delong_by_hand():
    "Three anomalous, two normal: DeLong's two variances, with n in the place of n - 1"
    values = np.array([3.0, 1.0, 2.0, 0.0, 2.5])
    truth = np.array([True, True, True, False, False])
    auroc, parts = contributions(values, truth)
    first = np.array([1, 0.5, 0.5])
    second = np.array([1, 1 / 3])
    assert auroc == pytest.approx(first.mean())
    assert parts[truth] == pytest.approx((first - auroc) / 3) and parts[~truth] == pytest.approx((second - auroc) / 2)


@pytest.mark.parametrize("truth", [np.zeros(4, bool), np.ones(4, bool)])
def test_one_class_has_no_auroc(truth):
    auroc, parts = contributions(np.arange(4.0), truth)
    assert np.isnan(auroc) and np.isnan(parts).all()


def rows(seed: int, categories: int = 2, scenes: int = 100, both: float = 1.0) -> pd.DataFrame:
    "Flawless and defective images of scenes; `both` is what a scene adds to both of its scores"
    rng = np.random.default_rng(seed)
    frames = []
    for c in range(categories):
        common = np.random.default_rng(100 + c).normal(size=scenes)
        truth = np.arange(2 * scenes) % 2 == 0
        scene = np.arange(2 * scenes) // 2
        value = contributions(both * common[scene] + truth + rng.normal(size=2 * scenes), truth)[1]
        paths = [f"{'bad' if t else 'good'}/{s}" for t, s in zip(truth, scene)]
        frames.append(
            pd.DataFrame(dict(category=f"c{c}", scene=[f"c{c}/{s}" for s in scene], image_path=paths, image=value))
        )
    return pd.concat(frames, ignore_index=True)


def test_mean_over_categories():
    table = rows(0)
    alone = [standard_error(table[table["category"] == c], "image") for c in ("c0", "c1")]
    assert standard_error(table, "image") == pytest.approx(np.sqrt(alone[0] ** 2 + alone[1] ** 2) / 2)


def test_a_scene_is_one_draw():
    table = rows(0, both=2.0)
    assert standard_error(table, "image") < 0.8 * standard_error(
        table.assign(scene=table["category"] + table["image_path"]), "image"
    )


def test_a_difference_needs_the_same_images():
    a = rows(0)
    b = rows(1)
    assert standard_error(a, "image", a) == 0
    assert paired_errors(dict(a=a, b=b), "image")["error"].tolist() == [standard_error(b, "image", a)]
    with pytest.raises(ValueError, match="same images in the same order"):
        standard_error(a, "image", b.iloc[::-1].reset_index(drop=True))
    with pytest.raises(ValueError, match="same images in the same order"):
        standard_error(a, "image", b.iloc[:-2])


def test_masks_are_needed():
    with pytest.raises(ValueError, match="1 images have no mask"):
        KeptMaps().update(np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), np.array([True, False]))


def test_scenes():
    assert scene_of("synthetic-2-target-weak", "nut", "nut/test/burn/012.png") == scene_of(
        "synthetic-2-target-weak", "nut", "nut/test/good/012.png"
    )
    assert scene_of("mvtec", "screw", "screw/test/good/012.png") != scene_of(
        "mvtec", "screw", "screw/test/thread_top/012.png"
    )


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 2], [5, 6, 7]) == pytest.approx(np.sqrt(3) / 2)


def test_agreement_leaves_out_what_is_not_printed():
    found = agreement(dict(winclip=70, april_gan=71, crane=80, self_distance=60), "image_auroc")
    assert found["method"].tolist() == ["winclip", "april_gan", "crane"]
    assert found["published"].is_monotonic_increasing is False and found.attrs["correlation"] == pytest.approx(0.5)
