"Parity of every metric with the reference implementations: classes, sizes, limits and bounds are read from metrics.json."

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from zsad_nb.evaluation.aupro_200 import aupimo
from zsad_nb.evaluation.metrics import image_metrics, mean_over_classes, pixel_metrics

FOLDER = Path(os.environ.get("ZSAD_FIXTURES") or Path(__file__).resolve().parents[3] / "shared" / "fixtures")
HERE = (FOLDER / "metrics.json").is_file()
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not HERE, reason=f"no metrics.json in {FOLDER}; set ZSAD_FIXTURES to the folder of the parity fixtures"
    ),
]
META = json.loads((FOLDER / "metrics.json").read_text()) if HERE else {"cfg": {"classes": []}, "values": {}}
CLASSES = META["cfg"]["classes"]
EXCLUDING = "pixel_metrics_excluding_images_without_mask"
PARTS = [(c, p) for c in CLASSES for p in ("all", EXCLUDING) if p == "all" or p in META["values"][c]]
TOLERANCE = META.get("tolerances_measured", {}).get("suggested", {})
VISUALAD = 1e-6  # its sums are float32; the JSON suggests no tolerance for it


def limits(values):
    return {float(k[6:]): v for k, v in values.items() if k.startswith("aupro@")}


def close(got, want, tolerance, what):
    "Equal within the tolerance; where the reference raised or gave NaN, NaN"
    if isinstance(want, str):
        assert math.isnan(got), f"{what}: reference {want}, got {got}"
    else:
        assert abs(got - want) <= tolerance, f"{what}: {got} differs from {want} by {abs(got - want):.2e}"


@pytest.fixture(scope="module")
def data():
    tensors = load_file(FOLDER / "metrics.safetensors")
    cfg = META["cfg"]

    def of(name):
        maps = tensors[f"{name}.map"]
        bits = tensors[f"{name}.mask_bits"]
        masks = np.unpackbits(bits, axis=1)[:, : maps[0].size].reshape(maps.shape).astype(bool)
        assert maps.shape[1:] == (cfg["height"], cfg["width"])
        return (
            maps,
            masks,
            tensors[f"{name}.image_score"],
            tensors[f"{name}.label"],
            tensors[f"{name}.has_mask"].astype(bool),
        )

    of.tensors = tensors
    return of


@pytest.mark.parametrize("name", CLASSES)
def test_image_metrics(data, name):
    _, _, scores, labels, _ = data(name)
    got = image_metrics(scores, labels)
    want = META["values"][name]["image"]
    tolerance = float(TOLERANCE["auroc/ap/f1max"])
    for metric in ("auroc", "ap", "f1max"):
        if not labels.any():  # recommended: NaN, where scikit-learn says 0
            assert math.isnan(got[f"image_{metric}"]) and "no anomalous image" in got.reasons[f"image_{metric}"]
        else:
            close(got[f"image_{metric}"], want[metric], tolerance, f"{name} image {metric}")
    assert all((k in got.reasons) == math.isnan(v) for k, v in got.items())


@pytest.mark.parametrize("name, part", PARTS)
def test_pixel_metrics(data, name, part):
    maps, masks, _, _, has_mask = data(name)
    values = META["values"][name]
    if part == EXCLUDING:
        values = values[part]
    else:
        has_mask = None  # a missing mask counts as all zero, as the reference values do
    areas = limits(values)
    for variant in ("anomalyclip", "visualad"):
        got = pixel_metrics(maps, masks, has_mask, tuple(areas), variant_200=variant)
        assert all((k in got.reasons) == math.isnan(v) for k, v in got.items())
        if not masks.any():  # recommended: NaN, where references say 0, 0.5 L or raise
            assert all(map(math.isnan, got.values())) and all("no anomalous pixel" in got.reasons[k] for k in got)
            continue
        for metric in ("auroc", "ap", "f1max"):
            close(
                got[f"pixel_{metric}"],
                values["pixel"][metric],
                float(TOLERANCE["auroc/ap/f1max"]),
                f"{name} pixel {metric}",
            )
        for limit, want in areas.items():
            close(
                got["pixel_aupro" if limit == 0.3 else f"pixel_aupro@{limit:g}"],
                want["mvtec"],
                float(TOLERANCE["aupro exact"]),
                f"{name} aupro@{limit}",
            )
        tolerance = float(TOLERANCE["aupro_200thr (anomalyclip)"]) if variant == "anomalyclip" else VISUALAD
        close(got["pixel_aupro_200"], values["aupro_200thr@0.3"][variant], tolerance, f"{name} aupro_200 {variant}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_streamed_and_spilled_are_the_same_numbers(data, name):
    maps, masks, _, _, has_mask = data(name)
    whole = pixel_metrics(maps, masks, has_mask)
    spilled = pixel_metrics(maps, masks, has_mask, memory_limit=0, block=1000)
    assert repr(dict(whole)) == repr(dict(spilled))  # NaN is not equal to itself, its name is


@pytest.mark.parametrize("name", CLASSES)
def test_constant_and_edge_cases_follow_the_recommendation(data, name):
    maps, masks, scores, labels, _ = data(name)
    if maps.min() == maps.max() and masks.any():
        p = masks.mean()
        q = labels.mean()
        got = pixel_metrics(maps, masks, limits=(0.3, 0.05)) | image_metrics(scores, labels)
        want = dict(
            pixel_auroc=0.5,
            pixel_ap=p,
            pixel_f1max=2 * p / (1 + p),
            pixel_aupro=0.15,
            **{"pixel_aupro@0.05": 0.025},
            image_auroc=0.5,
            image_ap=q,
            image_f1max=2 * q / (1 + q),
        )
        for k, v in want.items():
            assert abs(got[k] - v) < 1e-12, k
        assert math.isnan(got["pixel_aupro_200"])
    if labels.all():  # no normal image: AP and F1-max are 1 by definition, only the AUROC is undefined
        got = image_metrics(scores, labels)
        assert math.isnan(got["image_auroc"]) and (got["image_ap"], got["image_f1max"]) == (1, 1)


@pytest.mark.parametrize("name, part", PARTS)
def test_aupimo(data, name, part):
    maps, masks, _, _, has_mask = data(name)
    values = META["values"][name]
    if part == EXCLUDING:
        values = values[part]
    else:
        has_mask = None  # missing masks count as normal images
    keys = [k for k in values if k.startswith("aupimo@")]
    assert keys
    for key in keys:
        got = aupimo(maps, masks, has_mask, tuple(values[key]["bounds"]), values[key]["K"])
        close(got.mean, values[key]["anomalib_mean"], float(TOLERANCE["aupimo"]), f"{name} {key}")
        assert math.isnan(got.mean) == bool(got.reason)
        if part == "all" and f"{name}.{key}.per_image" in data.tensors:
            np.testing.assert_allclose(
                got.per_image, data.tensors[f"{name}.{key}.per_image"], rtol=0, atol=1e-7
            )  # stored in float32


def test_mean_over_classes(data):
    wanted = META["mean_over_classes"]
    areas = sorted({float(k.split("@")[1].split("/")[0]) for k in wanted if k.startswith("aupro@")})
    rows = {}
    for name in CLASSES:
        maps, masks, scores, labels, _ = data(name)
        rows[name] = image_metrics(scores, labels) | pixel_metrics(maps, masks, limits=tuple(areas))
    got = mean_over_classes(pd.DataFrame(rows).T)
    for key, want in wanted.items():
        if key == "note":
            continue
        kind, metric = key.split("/")
        column = (
            f"{kind}_{metric}"
            if kind in ("image", "pixel")
            else "pixel_aupro"
            if float(kind[6:]) == 0.3
            else f"pixel_aupro@{float(kind[6:]):g}"
        )
        assert abs(got.loc[column, "mean"] - want) <= 1e-7, f"{key}: {got.loc[column, 'mean']} instead of {want}"
