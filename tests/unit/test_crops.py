"Crops: what they hold, that they repeat, and KSDD's strips."

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from zsad_nb.data.crops import cut_crops, cut_ksdd, defective_spots, normal_spots, window_counts
from zsad_nb.data.images import check
from zsad_nb.data.index import apply_split, load_index, make_index, root_of
from zsad_nb.data.layouts import read_mvtec
from zsad_nb.data.listing import LayoutError
from zsad_nb.data.masks import load_mask
from zsad_nb.data.sets import read_ksdd


@pytest.fixture
def index(tmp_path):
    "Six images whose pixels say where they are: red is the row, green the column, blue the defect."
    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "src" / "a").mkdir(parents=True), (tmp_path / "src" / "b").mkdir()
    for k in range(6):
        mask = np.zeros((60, 90), bool)
        top = rng.integers(0, 50)
        left = rng.integers(0, 80)
        mask[top : top + 8, left : left + 8] = k < 4
        pixels = np.dstack(
            [np.arange(60)[:, None].repeat(90, 1), np.arange(90)[None].repeat(60, 0), mask * 255]
        ).astype("uint8")
        name = f"{'ab'[k % 2]}/{k // 2}"  # the same stems in two folders
        (
            Image.fromarray(pixels).save(tmp_path / "src" / f"{name}.png"),
            Image.fromarray(mask).save(tmp_path / "src" / f"{name}_mask.png"),
        )
        rows.append(
            dict(
                category="steel / strip",
                split="train" if k % 3 else "test",
                image=f"{name}.png",
                mask=f"{name}_mask.png" if k < 4 else "",
                anomalous=k < 4,
                defect="Hole, big" if k < 4 else "good",
            )
        )
    return make_index(rows, tmp_path / "src", "steel")


def test_crops_hold_what_they_say(index, tmp_path):
    crops = cut_crops(
        index, tmp_path / "out", 24, per_image_normal=3, per_image_defective=2, min_defect_fraction=0.02, margin=3
    )
    assert root_of(crops) == tmp_path / "out" and len(check(crops)) == 0  # sizes match, no empty mask, no duplicate
    assert (
        set(crops.category) == {"steel / strip"}
        and set(crops.defect) == {"good", "Hole, big"}
        and set(crops.dataset) == {"steel"}
    )
    for row in crops.itertuples():
        pixels = np.asarray(Image.open(tmp_path / "out" / row.image))
        top, left = pixels[0, 0, :2]
        assert (
            pixels.shape == (24, 24, 3)
            and (pixels[..., 0] == np.arange(top, top + 24)[:, None]).all()
            and (pixels[..., 1] == np.arange(left, left + 24)[None]).all()
        )
        if row.anomalous:
            assert (
                np.array_equal(load_mask(tmp_path / "out" / row.mask), pixels[..., 2] > 0)
                and (pixels[..., 2] > 0).mean() >= 0.02
            )
        else:
            assert row.mask == "" and (pixels[..., 2] == 0).all()
    assert (
        crops.groupby("anomalous").size().to_dict() == {False: (~crops.anomalous).sum(), True: crops.anomalous.sum()}
        and crops.anomalous.sum() >= 4
    )
    assert crops[crops.anomalous].groupby(crops.image.str.replace(r"_\d+_\d+\.png", "", regex=True)).size().max() <= 2
    assert (crops.groupby("split").size() > 0).all() and set(crops.split) == {"train", "test"}


def test_margin_is_kept(index, tmp_path):
    cut_crops(index, tmp_path / "out", 24, per_image_normal=4, per_image_defective=0, margin=6)
    for row in load_index(tmp_path / "out" / "index.csv").itertuples():
        pixels = np.asarray(Image.open(tmp_path / "out" / row.image))
        top, left = (int(value) for value in pixels[0, 0, :2])
        source = [
            i
            for i in index.itertuples()
            if row.image.split("/")[-1].startswith(i.image.replace("/", "-").removesuffix(".png") + "_")
        ]
        assert len(source) == 1
        whole = np.asarray(Image.open(root_of(index) / source[0].image))[..., 2]
        assert not whole[max(top - 6, 0) : top + 30, max(left - 6, 0) : left + 30].any()


def test_crops_repeat_and_do_not_depend_on_the_other_images(index, tmp_path):
    first = cut_crops(index, tmp_path / "1", 24, 2, 2)
    again = cut_crops(index[::-1], tmp_path / "2", 24, 2, 2)
    assert sorted(first.image) == sorted(again.image)
    for name in first.image:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    part = cut_crops(index[2:4], tmp_path / "3", 24, 2, 2)
    assert set(part.image) < set(first.image)
    assert sorted(cut_crops(index, tmp_path / "4", 24, 2, 2, seed=1).image) != sorted(first.image)


def test_crops_are_in_mvtec_layout_and_their_names_survive(index, tmp_path):
    crops = cut_crops(index, tmp_path / "out", 24, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every mask finds its image
        read = read_mvtec(tmp_path / "out")
    assert sorted(zip(read.image, read["mask"], read.split)) == sorted(zip(crops.image, crops["mask"], crops.split))
    assert read.category.unique().tolist() == ["steel_strip"] and sorted(set(read.defect)) == ["Hole_big", "good"]
    pd.testing.assert_frame_equal(load_index(tmp_path / "out" / "index.csv"), crops)  # the exact names


def test_what_cannot_be_cut(index, tmp_path):
    with pytest.raises(ValueError, match="a/0.png is 90x60, smaller than a crop of 61; choose size <= 60"):
        cut_crops(index, tmp_path / "x", 61)
    with pytest.raises(ValueError, match="no crop of 24 fits"):
        cut_crops(index[:1], tmp_path / "x", 24, per_image_normal=0, min_defect_fraction=0.9)
    with pytest.raises(ValueError, match="size=0"):
        cut_crops(index, tmp_path / "x", 0)
    assert not (tmp_path / "x").exists()  # a failed run leaves nothing under the final name
    blind = make_index([row | dict(mask="") for row in index.to_dict("records")], root_of(index))
    with pytest.warns(UserWarning, match="4 anomalous images without a mask were left out"):
        crops = cut_crops(blind, tmp_path / "y", 24)
    assert not crops.anomalous.any() and len(crops) == 2
    with pytest.raises(FileExistsError, match="overwrite=True"):
        cut_crops(index, tmp_path / "y", 24)
    assert len(cut_crops(index, tmp_path / "y", 24, overwrite=True)) > 2


def test_mask_of_another_size_raises(index, tmp_path):
    Image.fromarray(np.ones((5, 5), bool)).save(root_of(index) / "a/0_mask.png")
    with pytest.raises(ValueError, match='is 5x5 but image 0.png is 90x60 .*pass mask_mismatch="resize"'):
        cut_crops(index, tmp_path / "x", 24)


def test_window_counts_agree_with_slices():
    mask = np.random.default_rng(0).random((17, 23)) > 0.7
    for size, margin in ((5, 0), (5, 2), (17, 0), (1, 0)):
        counts = window_counts(mask, size, margin)
        assert counts.shape == (17 - size + 1, 23 - size + 1)
        for y in range(counts.shape[0]):
            for x in range(counts.shape[1]):
                assert (
                    counts[y, x]
                    == mask[max(y - margin, 0) : y + size + margin, max(x - margin, 0) : x + size + margin].sum()
                )


def test_small_defects_are_aimed_at_as_often_as_large_ones():
    mask = np.zeros((200, 200), bool)
    mask[:100, :100], mask[180:183, 180:183] = True, True
    hits = sum(
        bool(mask[y : y + 20, x : x + 20][mask[y : y + 20, x : x + 20]].sum() <= 9 and y > 120)
        for seed in range(60)
        for y, x in defective_spots(mask, 20, 1, np.random.default_rng(seed), 0.001)
    )
    assert 15 <= hits <= 45


def test_spots_keep_apart():
    spots = normal_spots(np.zeros((100, 100), bool), 20, 50, np.random.default_rng(0))
    assert len(spots) > 8 and all(
        max(abs(a - c), abs(b - d)) >= 10 for k, (a, b) in enumerate(spots) for c, d in spots[:k]
    )


# ---- KSDD ----


@pytest.fixture
def raw(tmp_path):
    "Twelve parts of 31 rows (not a multiple of three), two defective; one defect lies across an edge."
    rng = np.random.default_rng(0)
    for folder in ("kos01", "kos02", "kos10"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        for part in range(4):
            label = np.zeros((31, 12), "uint8")
            if (folder, part) == ("kos01", 2):
                label[8:12, 3:6] = 255
            if (folder, part) == ("kos10", 0):
                label[25:28, 3:6] = 255
            Image.fromarray(rng.integers(0, 255, (31, 12)).astype("uint8")).save(
                tmp_path / "raw" / folder / f"Part{part}.jpg"
            )
            Image.fromarray(label).save(tmp_path / "raw" / folder / f"Part{part}_label.bmp")
    return tmp_path / "raw"


def test_strips(raw, tmp_path):
    strips = cut_ksdd(raw, tmp_path / "SDD")
    defective = strips[strips.anomalous]
    assert len(strips) == 36 and len(defective) == 3 and set(defective.split) == {"test"}
    assert sorted(name.split("/")[-1] for name in defective.image) == [
        "kos01_Part2_0.png",
        "kos01_Part2_1.png",
        "kos10_Part0_2.png",
    ]
    assert ((strips.split == "test") & ~strips.anomalous).sum() == math.ceil(0.25 * 33)
    assert len(check(strips)) == 0
    heights = {Image.open(tmp_path / "SDD" / name).size for name in strips.image if "kos02_Part1" in name}
    assert {width for width, _ in heights} == {12} and sum(
        Image.open(tmp_path / "SDD" / name).size[1] for name in strips.image if "kos02_Part1" in name
    ) == 31
    parts = [np.asarray(Image.open(next((tmp_path / "SDD").glob(f"t*/good/kos02_Part1_{k}.png")))) for k in range(3)]
    assert np.array_equal(np.vstack(parts), np.asarray(Image.open(raw / "kos02" / "Part1.jpg")))


def test_strips_repeat_and_the_split_list_carries_them(raw, tmp_path):
    first = cut_ksdd(raw, tmp_path / "1")
    again = cut_ksdd(raw, tmp_path / "2")
    assert first.to_dict() == again.to_dict()
    other = cut_ksdd(raw, tmp_path / "3", seed=7)
    assert set(other[other.split == "test"].image) != set(first[first.split == "test"].image)
    carried = cut_ksdd(raw, tmp_path / "4", seed=7, split=tmp_path / "1" / "split.csv")
    assert carried.to_dict() == first.to_dict()
    pd.testing.assert_frame_equal(apply_split(read_ksdd(tmp_path / "1"), tmp_path / "1" / "split.csv"), first)
    with pytest.raises(ValueError, match="the names differ"):
        cut_ksdd(raw, tmp_path / "5", strips=2, split=tmp_path / "1" / "split.csv")


def test_the_draw_is_scikit_learns_on_the_names_in_order(raw, tmp_path):
    from sklearn.model_selection import train_test_split

    strips = cut_ksdd(raw, tmp_path / "SDD")
    normal = [name.split("/")[-1] for name in strips[~strips.anomalous].image]  # in the order of the files
    assert normal == sorted(normal)
    _, test = train_test_split(normal, test_size=0.25, random_state=42)
    assert {name.split("/")[-1] for name in strips[(strips.split == "test") & ~strips.anomalous].image} == set(test)


def test_strips_refuse_the_wrong_folder(raw, tmp_path):
    cut_ksdd(raw, tmp_path / "SDD")
    with pytest.raises(LayoutError, match="holds strips already"):
        cut_ksdd(tmp_path / "SDD", tmp_path / "again")
    with pytest.raises(FileExistsError):
        cut_ksdd(raw, tmp_path / "SDD")
    (raw / "kos02" / "Part1_label.bmp").unlink()
    with pytest.warns(UserWarning, match="1 images have no label file"):
        assert len(cut_ksdd(raw, tmp_path / "fewer")) == 33


def test_a_killed_run_leaves_no_folder(raw, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "zsad_nb.data.crops.save_split",
        lambda *args: calls.append(args) or (_ for _ in ()).throw(OSError("no space left on device")),
    )
    with pytest.raises(OSError, match="no space left"):
        cut_ksdd(raw, tmp_path / "SDD")
    assert calls and not (tmp_path / "SDD").exists()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cut_ksdd(raw, tmp_path / "SDD")) == 36  # and the next run is not disturbed by what is left
