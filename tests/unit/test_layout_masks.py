"Masks of layouts: all missing is an error that says how to read without; MVTec LOCO's folders are united and work everywhere."

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_readers import CASES, READERS, E, I, M, build, quiet

from zsad_nb.cli.commands import main
from zsad_nb.data.crops import cut_crops
from zsad_nb.data.images import batches, check
from zsad_nb.data.index import concat_indices, fingerprint, load_index, root_of, save_index
from zsad_nb.data.layouts import read_mvtec
from zsad_nb.data.listing import LayoutError
from zsad_nb.data.masks import load_mask
from zsad_nb.data.meta import read_meta, write_meta
from zsad_nb.data.pixels import load_pair
from zsad_nb.data.readers import detect, read
from zsad_nb.data.stored import BadImage

# readers whose layout has masks, and what a mask's path looks like in the generated tree
WITH_MASKS = [
    case
    for case, (name, tree, *_) in CASES.items()
    if READERS[name].masks
    and M in [w for w in tree.values() if isinstance(w, str)]
    and case not in ("ksdd", "ksdd2", "folder with a CSV", "brain_ad, with valid", "deeppcb", "mvtec_loco")
]


def without(tree: dict) -> dict:
    "The tree with every mask under a name that fits nothing."
    return {
        (f"{name.rpartition('/')[0]}/zz{n}_mask.png" if what == M else name): what
        for n, (name, what) in enumerate(tree.items())
        if what != E
    }


@pytest.mark.parametrize("case", WITH_MASKS)
def test_no_mask_at_all_is_an_error(tmp_path, case):
    name, tree, _, options, _ = CASES[case]
    root = build(tmp_path / "here", without(tree))
    with pytest.raises(LayoutError) as error:
        quiet(read, name, root, **options)
    said = str(error.value)
    assert "none of the" in said and "expected" in said and "masks=False" in said
    assert "belong to no image (first: " in said or "found none" in said
    index = quiet(read, name, root, **options, masks=False)
    assert (index["mask"] == "").all() and index.anomalous.any()
    assert not [group for group in index.attrs["left_out"] if group["reason"] == "masks"]


def test_an_error_says_what_lies_there(tmp_path):
    build(
        tmp_path,
        {"c/test/good/1.png": I, "c/test/bent/2.png": I, "c/test/bent/3.png": I, "c/ground_truth/bent/mask_2.png": M},
    )
    with pytest.raises(
        LayoutError,
        match=(
            r"none of the 2 anomalous images has a mask \(first: c/test/bent/2.png\).*found 1 that belong to no image "
            r"\(first: c/ground_truth/bent/mask_2.png\)"
        ),
    ):
        quiet(read_mvtec, tmp_path)


def test_a_folder_of_masks_that_fit_nothing(tmp_path):
    build(tmp_path, {"good/1.png": I, "bad/2.png": I, "masks/two.png": M})
    with pytest.raises(LayoutError, match="none of the 1 anomalous images"):
        quiet(read, "folder", tmp_path)
    assert len(quiet(read, "folder", tmp_path, masks=False)) == 2
    shutil.rmtree(tmp_path / "masks")
    assert len(quiet(read, "folder", tmp_path)) == 2  # a folder without masks is no layout with masks


def test_some_missing_masks_are_a_warning_that_names_whole_categories(tmp_path):
    build(tmp_path, {"a/test/bent/1.png": I, "a/ground_truth/bent/1_mask.png": M, "b/test/bent/1.png": I})
    with pytest.warns(UserWarning, match=r"1 anomalous images have no mask \(first: b/test/bent/1.png\), all of b"):
        assert len(read_mvtec(tmp_path)) == 2


def test_the_command_can_be_told(tmp_path, capsys):
    build(tmp_path, {"c/test/good/1.png": I, "c/test/bent/2.png": I})
    assert main(["check", str(tmp_path)]) == 2 and "masks=False" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["check", str(tmp_path), "--no-masks"]) == 1
    assert "2 images, 1 categories, 1 anomalous" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------ MVTec LOCO


def spot(*boxes: tuple[int, int, int]) -> np.ndarray:
    "A mask with squares of one value each."
    mask = np.zeros((12, 16), "uint8")
    for top, left, value in boxes:
        mask[top : top + 3, left : left + 3] = value
    return mask


@pytest.fixture
def loco(tmp_path) -> Path:
    kind = "juice_bottle/ground_truth/logical_anomalies"
    return build(
        tmp_path / "loco",
        {
            "juice_bottle/train/good/000.png": I,
            "juice_bottle/test/good/000.png": I,
            "juice_bottle/test/logical_anomalies/000.png": I,
            "juice_bottle/test/logical_anomalies/001.png": I,
            "juice_bottle/test/structural_anomalies/000.png": I,
            f"{kind}/000/000.png": spot((0, 0, 255)),
            f"{kind}/000/001.png": spot((0, 2, 254), (6, 6, 240)),
            f"{kind}/001/000.png": spot((4, 4, 250)),
            "juice_bottle/ground_truth/structural_anomalies/000/000.png": spot((5, 5, 236)),
        },
    )


def test_loco_masks_are_united(loco):
    assert detect(loco) == "mvtec_loco"
    index = quiet(read, "mvtec_loco", loco)
    masks = [load_mask(root_of(index) / mask) for mask in index["mask"][index.anomalous]]
    assert [int(mask.sum()) for mask in masks] == [9 + 9 - 3 + 9, 9, 9]
    batch = next(iter(batches(index[index.split == "test"], (12, 16), 8)))
    assert batch.has_mask.all() and batch.mask.sum(dim=(1, 2, 3)).tolist() == [0, 24, 9, 9]
    assert set(check(index).problem) <= {"duplicate"}


@pytest.mark.parametrize("name", ["mvtec_loco", "mvtec", "mvtec_like"])
def test_loco_under_any_name_of_the_layout(loco, name):
    index = quiet(read, name, loco)
    assert (index["mask"][index.anomalous] != "").all() and index[index.anomalous].defect.nunique() == 2


@pytest.mark.parametrize("folder", ["mvtec_loco_anomaly_detection", "MVTec LOCO", "mvtec", "data"])
def test_loco_is_recognised(loco, folder):
    assert detect(loco.rename(loco.parent / folder)) == "mvtec_loco"
    assert detect(loco.parent / folder / "juice_bottle") == "mvtec_loco"


def test_loco_round_trips(loco, tmp_path):
    index = quiet(read, "mvtec_loco", loco)
    pd.testing.assert_frame_equal(load_index(save_index(index, tmp_path / "i.csv")), index)
    for options in ({}, dict(absolute=True)):
        pd.testing.assert_frame_equal(
            quiet(read_meta, write_meta(index, **options), dataset="mvtec_loco"),
            index.sort_values("split", ascending=False, kind="stable").reset_index(drop=True),
        )
    both = concat_indices([index, index.assign(dataset="again").iloc[:1]])
    assert both["mask"].str.contains("ground_truth").sum() == 3
    before = [fingerprint(index, how) for how in ("none", "size", "content")]
    part = loco / "juice_bottle/ground_truth/logical_anomalies/000/001.png"
    Image.fromarray(spot((0, 2, 254))).save(part)
    assert [fingerprint(index, how) == old for how, old in zip(("none", "size", "content"), before)] == [
        True,
        False,
        False,
    ]
    crops = quiet(cut_crops, index, tmp_path / "crops", 8)
    assert crops.anomalous.any() and set(check(crops).problem) <= {"duplicate"}


def test_loco_masks_of_a_wrong_size_or_folder(loco):
    index = quiet(read, "mvtec_loco", loco)
    Image.fromarray(spot()[:, :9]).save(loco / "juice_bottle/ground_truth/logical_anomalies/001/001.png")
    assert "size_mismatch" in set(check(index).problem)
    for part in (loco / "juice_bottle/ground_truth/structural_anomalies/000").glob("*.png"):
        part.unlink()
    assert "missing_mask" in set(check(index).problem)
    with pytest.raises(BadImage, match="not named like its image"):
        load_pair(
            loco / "juice_bottle/test/logical_anomalies/000.png", loco / "juice_bottle/ground_truth/logical_anomalies"
        )


def test_loco_without_its_masks(loco):
    shutil.rmtree(loco / "juice_bottle" / "ground_truth")
    with pytest.raises(LayoutError, match=r"none of the 3 anomalous images has a mask.*masks=False"):
        quiet(read, "mvtec_loco", loco)
    assert len(quiet(read, "mvtec_loco", loco, masks=False)) == 5


def test_a_mask_and_a_folder_of_one_name_are_ambiguous(loco):
    Image.fromarray(spot()).save(loco / "juice_bottle/ground_truth/logical_anomalies/000_mask.png")
    with pytest.raises(LayoutError, match="000.png has 2 masks"):
        quiet(read, "mvtec_loco", loco)


@pytest.mark.parametrize("valid, splits", [(None, 0), ("skip", 0), ("train", 2), ("test", 1)])
def test_loco_validation(loco, valid, splits):
    build(loco, {"juice_bottle/validation/good/000.png": I})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = read("mvtec_loco", loco, **({} if valid is None else dict(valid=valid)))
    said = " ".join(str(warning.message) for warning in caught)
    assert ("for validation: valid='train'" in said) == (valid is None)
    assert len(index) == 5 + (valid in ("train", "test")) and ("validation" in " ".join(index.image)) == (
        valid in ("train", "test")
    )


def test_a_plain_folder_may_have_folders_of_masks(tmp_path):
    build(
        tmp_path,
        {"good/1.png": I, "bad/7.png": I, "masks/7/a.png": spot((0, 0, 255)), "masks/7/b.png": spot((6, 6, 255))},
    )
    index = quiet(read, "folder", tmp_path)
    assert index["mask"].tolist() == ["", "masks/7"] and load_mask(tmp_path / "masks/7").sum() == 18


# ------------------------------------------------------------------------------------------------------------ boxes and lists


def test_boards_of_one_name_have_masks_of_their_own(tmp_path):
    for group, box in (("group1", "0 0 1 1 1"), ("group2", "2 2 5 5 2")):
        build(
            tmp_path,
            {f"{group}/0001/x_temp.jpg": I, f"{group}/0001/x_test.jpg": I, f"{group}/0001_not/x.txt": f"{box}\n"},
        )
    with pytest.raises(LayoutError, match="belongs by name|has 2 masks"):
        quiet(read, "deeppcb", tmp_path)  # boxes of one name: which board is meant?


@pytest.mark.parametrize(
    "record, message",
    [
        (dict(image_path="../../etc/x.jpg", anomaly_class="OK"), "leaves the root"),
        (dict(image_path="/etc/x.jpg", anomaly_class="OK"), "does not lie under"),
        (dict(image_path="OK/S1/a.jpg", anomaly_class="OK", mask_path="../../x.png"), "leaves the root"),
        (dict(image_path=3, anomaly_class="OK"), "must be text"),
        (dict(anomaly_class="OK"), "expected an object"),
        (7, "expected an object"),
        (dict(image_path="a\0b", anomaly_class="OK"), "NUL"),
    ],
)
def test_real_iad_records(tmp_path, record, message):
    good = dict(category="mint", anomaly_class="OK", image_path="OK/S1/a.jpg", mask_path=None)
    data = dict(meta=dict(prefix="mint/", normal_class="OK"), test=[good, record])
    build(tmp_path, {"realiad_1024/mint/OK/S1/a.jpg": I, "realiad_jsons/mint.json": json.dumps(data)})
    with pytest.raises(ValueError, match=message) as error:
        quiet(read, "real_iad", tmp_path)
    assert "mint.json test" in str(error.value)


@pytest.mark.parametrize("split_csv", ["../../x", "/etc/x", "a/b"])
def test_visa_lists_lie_in_their_folder(tmp_path, split_csv):
    build(tmp_path, {"candle/Data/Images/Normal/1.JPG": I})
    with pytest.raises(ValueError, match="must be the name of a list"):
        read("visa", tmp_path, split_csv=split_csv)
