"Mosaics of training images: pixels, masks and labels follow the tiles; the same for the same seed; one category each; only where a recipe asks for them."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from zsad_nb.data.augment import AUGMENTATIONS, Augmentation
from zsad_nb.data.images import Batch, batches
from zsad_nb.data.index import GOOD, concat_indices, make_index
from zsad_nb.data.masks import load_mask, resize_mask
from zsad_nb.data.mosaic import Mosaic, join, quarters
from zsad_nb.data.pixels import resize
from zsad_nb.data.readers import read as read_set
from zsad_nb.data.stored import BadImage
from zsad_nb.methods.base import create
from zsad_nb.training.fit import fit, recipe_of

SIDE = 24


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    "Two categories of six images each: flat, each of a colour of its own, three of them with a rectangle that the mask marks."
    folder = tmp_path_factory.mktemp("flat")
    rows = []
    for c, category in enumerate(("nut", "cap")):
        for i in range(6):
            pixels = np.full((SIDE, SIDE, 3), 20 + 40 * i + 10 * c, "uint8")
            mask = np.zeros((SIDE, SIDE), "uint8")
            name = f"{category}{i}.png"
            bad = i % 2 == 1
            if bad:
                mask[4 : 4 + 4 * i, 6:18] = 255
                pixels[mask > 0] = 255
                Image.fromarray(mask).save(folder / f"mask_{name}")
            Image.fromarray(pixels).save(folder / name)
            rows.append(
                dict(
                    dataset="own",
                    category=category,
                    split="test",
                    image=name,
                    mask=f"mask_{name}" if bad else "",
                    anomalous=bad,
                    defect=f"type{i}" if bad else GOOD,
                )
            )
    return make_index(rows, folder)


def some(index, keep) -> pd.DataFrame:
    return make_index(index[keep].to_dict("records"), index.attrs["root"])


def read(index, **options):
    return list(batches(index, SIDE, **{**dict(batch_size=4, mosaic=1.0), **options}))


def stacked(index, passes=1, **options):
    loader = batches(index, SIDE, **{**dict(batch_size=4, mosaic=1.0), **options})
    return [torch.cat([b.image for b in loader]) for _ in range(passes)]


def test_a_mosaic_of_normals_is_normal(index):
    for batch in read(some(index, ~index["anomalous"])):
        assert not batch.anomalous.any() and not batch.mask.any() and batch.has_mask.all()
        assert (batch.image.flatten(2).amax(2) < 1).all(), "a normal tile has no white pixel"


@pytest.mark.parametrize("size", [SIDE, 25, (16, 31)])
def test_pixels_and_masks_are_where_their_tiles_are(index, size):
    "Every tile is the file, read at its quarter's size; the mask is where the defects are, and nowhere else."
    root = index.attrs["root"]
    found = 0
    height, width = (size, size) if isinstance(size, int) else size
    corners = [(0, 0), (0, width // 2), (height // 2, 0), (height // 2, width // 2)]
    for batch in batches(index, size, 5, mosaic=1.0, seed=2):
        assert batch.image.shape[-2:] == batch.mask.shape[-2:] == (height, width)
        for image, mask, path, bad, defect in zip(batch.image, batch.mask, batch.path, batch.anomalous, batch.defect):
            names = path.split(" + ")
            area = {}
            for name, (h, w), (top, left) in zip(names, quarters(size), corners):
                row = index[index["image"] == name].iloc[0]
                expected = (
                    torch.from_numpy(resize(Image.open(f"{root}/{name}"), (h, w)).copy()).permute(2, 0, 1).float() / 255
                )
                assert torch.equal(image[:, top : top + h, left : left + w], expected)
                truth = (
                    torch.from_numpy(resize_mask(load_mask(f"{root}/{row['mask']}"), (h, w)))
                    if row["mask"]
                    else torch.zeros(h, w, dtype=torch.bool)
                )
                assert torch.equal(mask[0, top : top + h, left : left + w], truth)
                if row["anomalous"]:
                    area[row["defect"]] = area.get(row["defect"], 0) + int(truth.sum())
            assert bool(bad) == bool(area) == bool(mask.any())
            if len(area) > 1:
                found += 1
            assert sorted(set(index["defect"]))[defect] in ([GOOD] if not area else [d for d, n in area.items()])
    assert found, "no mosaic had two kinds of defect"


def test_the_name_is_the_largest_tiles():
    def part(name, n):
        mask = torch.zeros(1, 2, 2, dtype=torch.bool)
        mask.view(-1)[:n] = True
        return (
            (f"{name}.png", "m" if n else "", n > 0, name if n else GOOD, "nut"),
            torch.zeros(3, 2, 2, dtype=torch.uint8),
            mask,
        )

    assert join([part("a", 1), part("b", 3), part("c", 0), part("d", 2)])[0][3] == "b"


def test_categories_and_data_sets_stay_apart(index):
    "A nut of another data set is another thing."
    twin = some(index, index["category"] == "nut").assign(dataset="other")
    twin = index[index["category"] == "nut"].assign(dataset="other")
    both = concat_indices([index, make_index(twin.to_dict("records"), index.attrs["root"])])
    key = list(zip(both["dataset"], both["category"]))
    plan = Mosaic(both, 1.0)
    for at in range(len(both)):
        for epoch in range(20):
            assert {key[i] for i in plan.tiles(at, epoch)} == {key[at]} and at in plan.tiles(at, epoch)


def test_the_same_seed_the_same_mosaics(index):
    first = stacked(index, 3, mosaic=0.5, seed=7)
    for options in (dict(batch_size=1), dict(batch_size=5), dict(workers=3), dict(batch_size=12, workers=1)):
        for a, b in zip(first, stacked(index, 3, mosaic=0.5, seed=7, **options)):
            assert torch.equal(a, b), options
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], stacked(index, 1, mosaic=0.5, seed=8)[0])


def test_shuffling_moves_the_same_mosaics(index):
    "What a row becomes depends on the row and the pass, not on its place in the order."

    def by_set(shuffle):
        return sorted(
            (b.path[i], b.image[i].sum().item())
            for b in batches(index, SIDE, 4, shuffle=shuffle, seed=1, mosaic=0.5)
            for i in range(len(b))
        )

    assert by_set(True) == by_set(False)


@pytest.mark.parametrize("nothing", [0, 0.0, {}, {"mvtec": 0.2}])
def test_no_share_no_change(index, nothing):
    plain = torch.cat([b.image for b in batches(index, SIDE, 4)])
    assert torch.equal(stacked(index, mosaic=nothing)[0], plain)
    assert [p for b in read(index, mosaic=nothing) for p in b.path] == index["image"].tolist()


def test_share(index):
    plan = Mosaic(index, {"own": 0.2})
    found = np.mean([plan.tiles(at, epoch) is not None for at in range(len(index)) for epoch in range(250)])
    assert abs(found - 0.2) < 4 * np.sqrt(0.16 / 3000)
    assert sum(" + " in p for b in read(index, mosaic=0.5, seed=3) for p in b.path) not in (0, len(index))


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan"), True, "0.2", {"own": 2}, {"own": None}])
def test_what_is_no_share(index, rate):
    with pytest.raises(ValueError, match="from 0 to 1"):
        batches(index, SIDE, mosaic=rate)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_categories(index, count):
    few = make_index(index.head(count).to_dict("records"), index.attrs["root"])
    drawn = [Mosaic(few, 1.0).tiles(0, e) for e in range(30)]
    assert all(len(four) == 4 and set(four) <= set(range(count)) and 0 in four for four in drawn) and {
        i for four in drawn for i in four
    } == set(range(count))
    whole = [Mosaic(index, 1.0).tiles(at, e) for at in range(6) for e in range(30)]
    assert all(len(set(four)) == 4 for four in whole), "an image came twice although there are enough"
    assert {four.index(0) for four in (Mosaic(index, 1.0).tiles(0, e) for e in range(60))} == set(range(4)), (
        "the image whose turn it is has a fixed place"
    )


def test_one_type(index):
    def kinds(**options):
        return [
            len({index["defect"][i] for i in Mosaic(index, 1.0, **options).tiles(at, e)} - {GOOD})
            for at in range(len(index))
            for e in range(20)
        ]

    assert max(kinds(rule="one type")) == 1 and max(kinds()) > 1
    for batch in batches(index, SIDE, 4, mosaic=Mosaic(index, 1.0, 0, "one type")):
        for path, defect in zip(batch.path, batch.defect.tolist()):
            own = set(index["defect"][index["image"].isin(path.split(" + "))]) - {GOOD}
            assert own == ({sorted(set(index["defect"]))[defect]} - {GOOD}), "the name holds for every defective pixel"


def test_a_tile_without_a_mask(index):
    blind = index.copy()
    blind.attrs = dict(index.attrs)
    blind.loc[blind["anomalous"], "mask"] = ""
    for batch in read(make_index(blind.to_dict("records"), index.attrs["root"])):
        assert torch.equal(batch.has_mask, ~batch.anomalous) and not batch.mask.any()
    partly = index.copy()
    partly.loc[1, "mask"] = ""
    for batch in read(make_index(partly.to_dict("records"), index.attrs["root"])):
        assert [index["image"][1] not in p for p in batch.path] == batch.has_mask.tolist()


def test_a_tile_that_cannot_be_read(index, tmp_path):
    for name in {*index["image"], *index["mask"]} - {""}:
        (tmp_path / name).write_bytes((Path(index.attrs["root"]) / name).read_bytes())
    (tmp_path / "nut2.png").write_bytes(b"no image")
    broken = make_index(index.to_dict("records"), tmp_path)
    with pytest.raises(BadImage, match="nut2.png"):
        read(broken)
    loader = batches(broken, SIDE, 4, mosaic=1.0, on_bad="skip")
    with pytest.warns(UserWarning, match="skipped .*nut2.png"):
        seen = [p for b in loader for p in b.path]
    assert (
        0 < len(seen) < len(index)
        and not any("nut2" in p for p in seen)
        and len(loader.skipped) == len(index) - len(seen)
    )


def test_too_small():
    with pytest.raises(ValueError, match="at least two pixels"):
        quarters((1, 8))
    assert quarters((3, 2)) == [(1, 1), (1, 1), (2, 1), (2, 1)]


def test_a_cache_cannot_take_a_mosaic_for_its_image(index):
    "The path of a mosaic is no file's, so that a cache that trusts files looks at its pixels."
    for batch in read(index):
        assert not any((Path(index.attrs["root"]) / p).exists() for p in batch.path)


def test_a_mosaic_with_the_label_of_the_image_it_replaces(index):
    "AdaCLIP, as released: a picture with a defect in it may be called normal, and the other way round."
    labels = dict(zip(index["image"], index["anomalous"]))
    kept, own = (
        [b for b in batches(index, SIDE, 1, mosaic=Mosaic(index, 1.0, 0, rule))] for rule in ("replaced", "tiles")
    )
    assert [b.anomalous.item() for b in kept] == [bool(labels[p]) for p in index["image"]]
    assert all(torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) for a, b in zip(kept, own)), (
        "the pixels are the same"
    )
    assert any(a.anomalous.item() != b.anomalous.item() for a, b in zip(kept, own))


def test_mosaics_of_defective_images(index):
    "Bayes-PFL: four defective images of the class, whichever image they replace; none where a class has none."
    plan = Mosaic(index, 1.0, rule="defective")
    for at in range(len(index)):
        four = plan.tiles(at, 0)
        assert (
            index["anomalous"].iloc[four].all()
            and set(index["category"].iloc[four]) == {index["category"][at]}
            and len(four) == 4
        )
    good = some(index, ~index["anomalous"])
    assert Mosaic(good, 1.0, rule="defective").tiles(0, 0) is None
    with pytest.raises(ValueError, match="rule of a mosaic is 'bad'; use tiles, replaced, one type or defective"):
        Mosaic(index, 1.0, rule="bad")


# ------------------------------------------------------------------------------------------------------------------------------ in training


def mvtec_tree(root: Path, categories=("screw", "grid")) -> Path:
    "Every category: good training images, and three good and three bent test images with masks, in MVTec AD's layout."
    for c, category in enumerate(categories):
        for place in ("train/good", "test/good", "test/bent"):
            for i in range(3):
                pixels = np.full((SIDE, SIDE, 3), 20 + 40 * i + 10 * c, "uint8")
                if place == "test/bent":
                    pixels[4:12, 6:18] = 255
                (root / category / place).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / category / place / f"{i:03}.png")
        (root / category / "ground_truth/bent").mkdir(parents=True, exist_ok=True)
        mask = np.zeros((SIDE, SIDE), "uint8")
        mask[4:12, 6:18] = 255
        for i in range(3):
            Image.fromarray(mask).save(root / category / "ground_truth/bent" / f"{i:03}_mask.png")
    return root


def trained_on(method, index, recipe) -> list:
    "The batches that `fit` hands to a method."
    seen = []
    own = method.encode
    method.encode = lambda batch: seen.append(batch) or own(batch)
    fit(method, index, recipe, size=28, workers=0, progress=False)
    return seen


RELEASED = {
    "adaclip": ({"mvtec": 0.2}, "replaced"),
    "april_gan": ({"mvtec": 0.2}, "tiles"),
    "multiads": ({"mvtec": 0.2, "mpdd": 0.2}, "one type"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_training_with_the_mosaics_of_the_release(tmp_path, name):
    "On a tree in MVTec AD's layout some images are mosaics; on the same images under another data set's name none is."
    index = read_set("mvtec", mvtec_tree(tmp_path))
    index = index[index["split"] == "test"].reset_index(drop=True)
    recipe = recipe_of(name)
    assert (recipe.mosaic, recipe.mosaic_rule) == RELEASED[name]
    method = create(name, clip_weights="random:0", image_size=32, templates=("a bad photo of the {} on a table.",))
    whole = recipe_of(name, epochs=4, batch_size=4, mosaic={"mvtec": 0.5})
    batch = Batch.cat(trained_on(method, index, whole))
    labels = dict(zip(index["image"], index["anomalous"]))
    mosaics = [i for i, path in enumerate(batch.path) if " + " in path]
    assert len(batch) == 4 * len(index) and 0 < len(mosaics) < len(batch)
    tiles = [batch.path[i].split(" + ") for i in mosaics]
    assert all(len(four) == 4 and len({path.split("/")[0] for path in four}) == 1 for four in tiles)
    own = [any(labels[path] for path in four) == bool(batch.anomalous[i]) for i, four in zip(mosaics, tiles)]
    assert all(own) is (name != "adaclip"), "AdaCLIP keeps the label of the image that is replaced"
    other = index.assign(dataset="visa")
    other.attrs = dict(index.attrs)
    assert not any(
        " + " in path for b in trained_on(method, other, recipe_of(name, epochs=1, batch_size=4)) for path in b.path
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mosaic=1.5), "from 0 to 1"),
        (dict(mosaic={"mvtec": True}), "from 0 to 1"),
        (dict(mosaic_rule="all"), "mosaic_rule='all'; use tiles"),
    ],
)
def test_a_recipe_with_a_wrong_mosaic(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_of("april_gan", **changes)


def test_changed_images_are_repeatable(index):
    "Neither batch size nor workers decide how an image is changed; every pass changes it anew; the mask goes along."
    plan = AUGMENTATIONS["bayes_pfl"]

    def passes(**options):
        loader = batches(index, SIDE, **{**dict(batch_size=4, augment=plan, seed=7), **options})
        return [Batch.cat(loader) for _ in range(2)]

    first = passes()
    for options in (dict(batch_size=1), dict(workers=2), dict(batch_size=5, mosaic=0.0)):
        for a, b in zip(first, passes(**options)):
            assert torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask), options
    assert not torch.equal(first[0].image, first[1].image) and not torch.equal(first[0].image, passes(seed=8)[0].image)
    assert (first[0].mask.flatten(1).any(1) == first[0].anomalous).all(), "no turn loses a defect"
    plain = passes(augment=Augmentation(**dict.fromkeys(("quarter", "turn", "light", "noise", "blur", "colour"), 0.0)))
    assert torch.equal(plain[0].image, Batch.cat(batches(index, SIDE, 4)).image), "nothing asked for, nothing changed"


@pytest.mark.parametrize("size", [SIDE, (16, 31), (2, 2)])
def test_changed_images_keep_their_size(index, size):
    for batch in batches(index, size, 12, augment=Augmentation(quarter=1.0, turn=1.0, light=1.0, noise=1.0, blur=1.0)):
        height, width = (size, size) if isinstance(size, int) else size
        assert (
            batch.image.shape[-2:] == batch.mask.shape[-2:] == (height, width)
            and batch.image.min() >= 0
            and batch.image.max() <= 1
        )
