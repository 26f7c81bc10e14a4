"Regions, mosaics and crops under fuzzing: boxes, areas, order and connectivity; every pixel of four parts; crops that are slices of their parents."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from zsad_nb.data.crops import cut_crops, defective_spots, normal_spots, window_counts
from zsad_nb.data.images import check
from zsad_nb.data.index import GOOD, load_index, make_index
from zsad_nb.data.masks import load_mask
from zsad_nb.data.mosaic import Mosaic, join, quarters
from zsad_nb.inspection.regions import STRUCTURES, at_size, display_size, edge, find_regions

SIDES = st.integers(1, 17)


@st.composite
def heats(draw, values=(0.0, 0.25, 0.5, 0.75, 1.0)):
    "A small heatmap of few different values, so that ties and plateaus occur."
    h = draw(SIDES)
    w = draw(SIDES)
    return (
        np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        .choice(values, (h, w), p=(0.4, 0.3, 0.1, 0.1, 0.1))
        .astype("float32")
    )


@given(heats(), st.sampled_from([-np.inf, -1.0, 0.0, 0.25, 0.6, 0.75, 1.0, 2.0, np.inf]), st.sampled_from([4, 8]))
def test_regions_are_the_parts_of_the_mask(heat, threshold, connectivity):
    "At the map's own size: disjoint, complete, as scipy labels them; the largest peak first."
    mask, regions = find_regions(heat, threshold, connectivity=connectivity)
    h, w = heat.shape
    assert np.array_equal(mask, heat > threshold)
    labels, count = ndimage.label(mask, STRUCTURES[connectivity])
    assert len(regions) == count and sum(r.area for r in regions) == mask.sum()
    for r in regions:
        assert 0 <= r.left <= r.x < r.right <= w and 0 <= r.top <= r.y < r.bottom <= h
        own = labels == labels[r.y, r.x]
        rows, columns = np.nonzero(own)
        assert r.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) and r.area == own.sum()
        assert r.peak == heat[r.y, r.x] == heat[own].max() > threshold
    assert [(-r.peak, r.box) for r in regions] == sorted((-r.peak, r.box) for r in regions)
    assert len({labels[r.y, r.x] for r in regions}) == count


@given(
    heats(),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from([0.0, 0.3, 0.8]),
    st.integers(0, 40),
    st.sampled_from([4, 8]),
)
def test_regions_of_a_photograph_of_another_size(heat, size, threshold, min_area, connectivity):
    "Boxes stay inside the photograph and hold their peak; small regions leave the mask, too; what stays is what stays without the limit."
    mask, regions = find_regions(heat, threshold, size, connectivity, min_area)
    whole_mask, whole = find_regions(heat, threshold, size, connectivity)
    for r in regions:
        assert (
            0 <= r.left < r.right <= size[0]
            and 0 <= r.top < r.bottom <= size[1]
            and r.area >= 1
            and r.left <= r.x < r.right
            and r.top <= r.y < r.bottom
        )
    assert (mask <= whole_mask).all() and set(regions) <= set(whole)
    assert ndimage.label(mask, STRUCTURES[connectivity])[1] == len(regions)
    assert (
        find_regions(heat, threshold, size, connectivity, 10**9)[1] == [] and find_regions(heat, np.inf, size)[1] == []
    )


@given(heats(), st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_a_map_at_another_size(heat, size):
    "Never higher than it was; a smaller one keeps the highest value; the own size is the map itself."
    found = at_size(heat, size)
    assert found.shape == size[::-1] and found.max() <= heat.max() + 1e-6 and found.min() >= heat.min() - 1e-6
    if size[0] <= heat.shape[1] and size[1] <= heat.shape[0]:
        assert found.max() == heat.max()
    assert np.array_equal(at_size(heat, heat.shape[::-1]), heat)


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 3000))
def test_display_sizes(size, most):
    found = display_size(size, most)
    assert all(1 <= f <= s for f, s in zip(found, size)) and max(found) <= max(most, 1)
    if max(size) <= most:
        assert found == size


@given(heats(), st.integers(1, 4))
def test_edges(heat, width):
    "A border is part of its mask, lies along the image's own rim, too, and is all of a thin mask."
    mask = heat > 0
    border = edge(mask, width)
    assert (
        (border <= mask).all()
        and np.array_equal(border[[0, -1]], mask[[0, -1]])
        and np.array_equal(border[:, [0, -1]], mask[:, [0, -1]])
    )
    assert border.any() == mask.any()


# ------------------------------------------------------------------------------------------------------------------------ mosaics


@given(
    st.integers(2, 23),
    st.integers(2, 23),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_every_pixel_of_a_mosaic(height, width, bad, masked):
    "Pixels of the four parts say where they are from; masks of parts without one are empty there."
    sizes = quarters((height, width))
    tiles = []
    for k, (h, w) in enumerate(sizes):
        pixels = torch.stack(
            [
                torch.full((h, w), float(k)),
                torch.arange(h)[:, None].expand(h, w).float(),
                torch.arange(w).expand(h, w).float(),
            ]
        )
        mask = torch.zeros(1, h, w, dtype=torch.bool)
        if bad[k] and masked[k]:
            mask[0, -1, -(k + 1) :] = True
        tiles.append(
            (
                (
                    f"{k}.png",
                    f"{k}_mask.png" if bad[k] and masked[k] else "",
                    bad[k],
                    f"type {k}" if bad[k] else GOOD,
                    "nut",
                ),
                pixels,
                mask,
            )
        )
    (image, masks, anomalous, defect, category), pixels, mask = join(tiles)
    assert pixels.shape == (3, height, width) and mask.shape == (1, height, width)
    top = height // 2
    left = width // 2
    for y in range(height):
        for x in range(width):
            k = 2 * (y >= top) + (x >= left)
            inner_y = y - top * (y >= top)
            inner_x = x - left * (x >= left)
            assert (
                pixels[:, y, x].tolist() == [k, inner_y, inner_x] and mask[0, y, x] == tiles[k][2][0, inner_y, inner_x]
            )
    assert image == "0.png + 1.png + 2.png + 3.png" and category == "nut" and anomalous == any(bad)
    assert defect in ([f"type {k}" for k in range(4) if bad[k]] or [GOOD])
    assert (masks == "") == (not any(bad) or any(b and not m for b, m in zip(bad, masked)))
    largest = max((int(t[2].sum()) for t in tiles if t[0][2]), default=0)
    if any(bad):
        assert int(tiles[int(defect[-1])][2].sum()) == largest


@pytest.mark.parametrize("size", [0, 1, (1, 8), (8, 1), (0, 0)])
def test_a_mosaic_needs_two_pixels(size):
    with pytest.raises(ValueError, match="at least two pixels a side"):
        quarters(size)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([GOOD, "hole", "dent"])), min_size=1, max_size=12),
    st.integers(0, 10),
    st.integers(0, 3),
    st.booleans(),
)
def test_tiles_of_a_mosaic(rows, seed, epoch, one_type):
    "Own category, own row among them, four of them; the same every time; one kind of defect where that is asked for."
    index = pd.DataFrame([dict(dataset="d", category=c, defect=d) for c, d in rows])
    mosaic = Mosaic(index, 1.0, seed, "one type" if one_type else "tiles")
    for at in range(len(rows)):
        four = mosaic.tiles(at, epoch)
        assert (
            four == Mosaic(index, 1.0, seed, "one type" if one_type else "tiles").tiles(at, epoch)
            and len(four) == 4
            and at in four
        )
        assert {rows[i][0] for i in four} == {rows[at][0]}
        if one_type:
            assert len({rows[i][1] for i in four} - {GOOD}) <= 1
        assert Mosaic(index, 0.0, seed).tiles(at, epoch) is None


# -------------------------------------------------------------------------------------------------------------------------- crops


@st.composite
def masks(draw):
    h = draw(st.integers(1, 24))
    w = draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).random((h, w)) < draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]))


@given(masks(), st.integers(1, 24), st.integers(0, 4), st.integers(0, 5), st.integers(0, 99))
def test_spots(mask, size, margin, count, seed):
    "Windows count what they hold; normal crops hold no defect and keep away from any, defective ones hold enough; all lie inside."
    assume(size <= min(mask.shape))
    counts = window_counts(mask, size)
    assert counts.shape == (mask.shape[0] - size + 1, mask.shape[1] - size + 1)
    for y, x in np.ndindex(counts.shape):
        assert counts[y, x] == mask[y : y + size, x : x + size].sum()
    spots = normal_spots(mask, size, count, np.random.default_rng(seed), margin)
    assert len(spots) <= count and spots == normal_spots(mask, size, count, np.random.default_rng(seed), margin)
    for y, x in spots:
        assert 0 <= y <= mask.shape[0] - size and 0 <= x <= mask.shape[1] - size
        assert not mask[max(0, y - margin) : y + size + margin, max(0, x - margin) : x + size + margin].any()
    bad = defective_spots(mask, size, count, np.random.default_rng(seed), 0.01)
    assert len(bad) <= count and all(counts[spot] >= max(1, 0.01 * size * size) for spot in bad)
    if count and not margin and (counts == 0).any():
        assert spots
    if count and counts.max() >= max(1, 0.01 * size * size):
        assert bad


NAMES = st.text(alphabet="aZ0 _-.$é螺{}%'", min_size=1, max_size=8).filter(lambda t: t.strip(". ") == t and t)


@settings(max_examples=15)  # each writes and reads some twenty files
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(9, 20), st.integers(9, 20), st.booleans(), NAMES, NAMES), min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_crops_are_slices_of_their_parents(tmp_path_factory, size, images, seed):
    "Pixels say where they come from: every crop, and its mask, is a slice of one parent; names are unique, safe and inside the folder; the list reads back."
    folder = tmp_path_factory.mktemp("crops")
    rng = np.random.default_rng(seed)
    rows = []
    parents = {}
    for k, (h, w, defective, category, defect) in enumerate(images):
        mask = (rng.random((h, w)) < 0.1) & defective
        pixels = np.dstack(
            [np.arange(h)[:, None].repeat(w, 1) * 12, np.arange(w)[None].repeat(h, 0) * 12, np.full((h, w), k)]
        ).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{k}.png")
        bad = bool(mask.any())
        if bad:
            Image.fromarray(mask).save(folder / f"{k}_mask.png")
        parents[k] = pixels, mask
        rows.append(
            dict(
                category=category,
                split="test",
                image=f"{k}.png",
                mask=f"{k}_mask.png" if bad else "",
                anomalous=bad,
                defect=("x" + defect) if bad else GOOD,
            )
        )
    index = make_index(rows, folder, "fuzz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            crops = cut_crops(index, folder / "out", size, 2, 2, min_defect_fraction=0.0, seed=seed)
        except ValueError as error:
            assert "no crop of" in str(error) and not (folder / "out").exists() and not (folder / "out.part").exists()
            return
    assert (
        crops["image"].str.lower().is_unique
        and set(crops["category"]) <= set(index["category"])
        and set(crops["defect"]) <= set(index["defect"]) | {GOOD}
    )
    for row in crops.itertuples():
        path = folder / "out" / row.image
        assert path.resolve().is_relative_to((folder / "out").resolve()) and path.is_file()
        pixels = np.asarray(Image.open(path))
        k = pixels[0, 0, 2]
        top = pixels[0, 0, 0] // 12
        left = pixels[0, 0, 1] // 12
        parent, mask = parents[k]
        assert np.array_equal(pixels, parent[top : top + size, left : left + size]) and pixels.shape == (size, size, 3)
        part = mask[top : top + size, left : left + size]
        assert (
            row.anomalous == bool(row.mask)
            and row.image.endswith(f"_{top}_{left}.png")
            and rows[k]["category"] == row.category
        )
        if row.anomalous:
            assert np.array_equal(load_mask(folder / "out" / row.mask), part) and row.defect == rows[k]["defect"]
        else:
            assert not part.any()
    back = load_index(folder / "out" / "index.csv")
    pd.testing.assert_frame_equal(back.reset_index(drop=True), crops.reset_index(drop=True), check_dtype=False)
    again = cut_crops(index, folder / "out", size, 2, 2, min_defect_fraction=0.0, seed=seed, overwrite=True)
    pd.testing.assert_frame_equal(again, crops)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["out"]


def test_an_image_smaller_than_the_crop(tmp_path):
    Image.new("RGB", (8, 20)).save(tmp_path / "a.png")
    index = make_index(
        [dict(category="nut", split="test", image="a.png", mask="", anomalous=False, defect=GOOD)], tmp_path, "small"
    )
    with pytest.raises(ValueError, match=r"a.png is 8x20, smaller than a crop of 9; choose size <= 8"):
        cut_crops(index, tmp_path / "out", 9)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (
        len(cut_crops(index, tmp_path / "out", 8)) == 1
        and len(check(cut_crops(index, tmp_path / "out", 8, overwrite=True))) == 0
    )
