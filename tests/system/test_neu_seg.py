"The experiment on real steel, in small: on a drawn stand-in for NEU-Seg wherever the tests run, on the real one where it is there."

import json
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import ROOT
from PIL import Image

TINY = dict(images=1, defective=1, size=64, real_size=64, epochs=1, crop=48)
TYPES = ["inclusion", "patches", "scratch"]


pytestmark = pytest.mark.usefixtures("own_kernel")


def run(out: Path, **parameters):
    papermill.execute_notebook(
        ROOT / "nbs" / "experiments" / "neu_seg.ipynb",
        out / "neu_seg.ipynb",
        {**TINY, **parameters, "output": str(out)},
        cwd=str(out),
        progress_bar=False,
        kernel_name="python3",
    )
    said = "".join(
        "".join(o.get("text", ""))
        for c in json.loads((out / "neu_seg.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
    )
    return pd.read_csv(out / "neu_seg.csv"), said


def steel(folder: Path) -> Path:
    "Two images a type, and one that shows two types, in NEU-Seg's layout."
    rng = np.random.default_rng(0)
    for name in ("images", "annotations"):
        for split in ("training", "test"):
            (folder / "neu_seg" / name / split).mkdir(parents=True)
    for i, kinds in enumerate([(1,), (1,), (2,), (2,), (3,), (3,), (1, 2)]):
        mask = np.zeros((200, 200), "uint8")
        for j, k in enumerate(kinds):
            mask[20 + 80 * j : 60 + 80 * j, 30 : 30 + 40 * k] = k
        image = np.where(mask > 0, 40, 150) + rng.integers(0, 30, mask.shape)
        for split in ("training", "test"):
            Image.fromarray(image.astype("uint8")).save(folder / "neu_seg" / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(folder / "neu_seg" / "annotations" / split / f"{i}.png")
    return folder


def test_in_small(tmp_path):
    "Every number is there, of both lists of words, beside its guess; images of several types are left out; no real weights, no such rows."
    table, said = run(tmp_path, data=str(steel(tmp_path / "data")), weights="", methods=["dapo"], limit=0)
    assert "rows on real features are left out" in said and "6 whole images" in said
    assert "the better control" in said and "always the same one: 33.3 %" in said
    assert list(table[["method", "stage", "words"]].itertuples(index=False, name=None)) == [
        ("dapo", "untrained", "near"),
        ("dapo", "trained", "own"),
        ("dapo", "trained", "near"),
        ("self_distance", "no training", "none"),
    ]
    assert (table["whole_images"] == 6).all() and (table["crops_images"] > 6).all()
    percent = [c for c in table if c.startswith(("whole_", "crops_")) and not c.endswith("_images")]
    assert table[percent].stack().dropna().between(0, 1).all()
    assert table["whole_image_auroc"].isna().all() and table["crops_image_auroc"].notna().all(), (
        "whole images have no flawless ones, crops do"
    )
    typed = table[table["method"] == "dapo"]
    assert (
        typed[[f"whole_auroc_{t}" for t in TYPES]].notna().all(axis=None)
        and table[table["method"] == "self_distance"]["whole_types_auroc"].isna().all()
    )
    assert typed["whole_guess_type"].tolist() == [pytest.approx(1 / 3, abs=1e-4)] * 3
    normal = 1 - (2 * (40 + 80 + 120) * 40) / (6 * 200 * 200)  # share of flawless pixels
    assert typed["whole_guess_f1"].tolist() == pytest.approx([2 * normal / (1 + normal) / 4] * 3, abs=2e-3)
    assert len(list((tmp_path / "figures").glob("dapo-tiny-clip-*/confusion.png"))) == 2
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["dapo_tiny-clip_near_whole_pixel_auroc"] == pytest.approx(
        typed["whole_pixel_auroc"].iloc[-1], abs=1e-4
    )


def test_without_the_images(tmp_path):
    with pytest.raises(
        papermill.PapermillExecutionError,
        match="no NEU-Seg in .*give the folder that holds neu_seg with -p data FOLDER",
    ):
        run(tmp_path, data=str(tmp_path))
    assert not (tmp_path / "result.json").exists()


@pytest.mark.real
def test_real_steel_in_small(shared, tmp_path):
    "MultiADS on the embedded pair and on the real ViT; three images."
    table, said = run(
        tmp_path,
        data=str(shared / "data"),
        weights=str(shared / "weights"),
        methods=["multiads"],
        templates=["a {}"],
        limit=1,
    )
    assert (
        "3 whole images" in said
        and set(table["features"]) == {"tiny-clip", "vit-tiny16", "tiny-dino"}
        and set(table["method"]) == {"multiads", "self_distance"}
    )
    assert table[table["method"] == "multiads"].groupby("features")["whole_pixel_auroc"].count().tolist() == [3, 3]
    assert table["whole_pixel_auroc"].between(0, 1).all() and table["crops_image_auroc"].between(0, 1).all()
