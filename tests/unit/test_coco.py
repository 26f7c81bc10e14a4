"COCO's JSON in and out: run lengths, polygons, boxes; damaged files say what is wrong and where."

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from zsad_nb.data.coco import read_coco, regions_as_annotations, write_coco
from zsad_nb.data.images import check
from zsad_nb.data.index import make_index, root_of
from zsad_nb.data.listing import LayoutError
from zsad_nb.data.masks import load_mask
from zsad_nb.data.run_lengths import (
    compress,
    expand,
    from_polygon,
    from_run_lengths,
    from_segmentation,
    outlines,
    run_lengths,
)


def literal_compress(counts):
    "The text of maskApi.c, number by number, with Python's integers as C's signed ones."
    text = ""
    for i, count in enumerate(counts):
        x = count
        if i > 2:
            x -= counts[i - 2]
        more = True
        while more:
            c = x & 0x1F
            x >>= 5
            more = (x != -1) if c & 0x10 else (x != 0)
            text += chr((c | 0x20 if more else c) + 48)
    return text


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_round_trip(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 70, 2)
    mask = rng.random((height, width)) < rng.choice([0, 0.01, 0.5, 0.99, 1])
    counts = run_lengths(mask)
    # literally: walk down the columns
    walked, value, run = [], False, 0
    for x in range(width):
        for y in range(height):
            if mask[y, x] != value:
                walked.append(run)
                value, run = mask[y, x], 0
            run += 1
    assert counts == [*walked, run]
    assert compress(counts) == literal_compress(counts) and expand(compress(counts)) == counts
    assert (from_run_lengths(compress(counts), mask.shape) == mask).all()
    assert (from_run_lengths(counts, mask.shape) == mask).all()


@pytest.mark.parametrize("seed", range(10))
def test_polygons_mark_the_pixels_whose_centres_lie_inside(seed):
    from matplotlib.path import Path as Outline

    rng = np.random.default_rng(seed)
    angles = np.sort(rng.random(9) * 2 * np.pi)
    radii = rng.uniform(3, 12, 9)
    points = np.stack([16 + radii * np.cos(angles), 14 + radii * np.sin(angles)], 1)
    yy, xx = np.mgrid[:28, :31] + 0.5
    inside = Outline(points).contains_points(np.stack([xx.ravel(), yy.ravel()], 1)).reshape(28, 31)
    assert (from_polygon(points.ravel().tolist(), (28, 31)) == inside).all()


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.6, 0.8, 0.98])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (20, 31)])
def test_outlines_mark_the_same_pixels(size, share):
    "Noise has every way in which pixels and holes can touch: corners, borders of the image, holes in parts in holes."
    from matplotlib.path import Path as Outline

    for seed in range(20):
        mask = np.random.default_rng(seed).random(size) < share
        lines = outlines(mask)
        assert len(lines) == ndimage.label(mask)[1]
        if lines:
            assert (from_segmentation(lines, size) == mask).all()
        yy, xx = np.mgrid[: size[0], : size[1]] + 0.5
        union = np.zeros(size, bool)
        for line in lines:  # to a reader with a code of its own, too
            x, y = np.array(line).reshape(-1, 2).T
            assert (x >= 0).all() and (x <= size[1]).all() and (y >= 0).all() and (y <= size[0]).all()
            assert ((np.roll(x, -1) == x) != (np.roll(y, -1) == y)).all()  # along edges, no point twice
            shifted = np.stack([x, y], 1) + 1e-4  # no centre lies on a slit
            union |= Outline(shifted).contains_points(np.stack([xx.ravel(), yy.ravel()], 1)).reshape(size)
        assert (union == mask).all()


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def images(folder, count=4, size=(20, 30)):
    for number in range(count):
        save(folder / f"{number}.png", np.full((*size, 3), 60 + number, np.uint8))


def content(**more):
    return dict(
        images=[dict(id=n, file_name=f"{n}.png", width=30, height=20) for n in range(4)],
        categories=[dict(id=1, name="scratch"), dict(id=2, name="dent"), dict(id=3, name="Good")],
        annotations=[
            dict(id=1, image_id=1, category_id=1, segmentation=[[1, 1, 9, 1, 9, 5, 1, 5]], bbox=[1, 1, 8, 4]),
            dict(id=2, image_id=1, category_id=2, bbox=[20, 10, 3, 3], segmentation=[]),
            dict(id=3, image_id=2, category_id=3, bbox=[0, 0, 30, 20]),
        ],
    ) | dict(more)


LAYOUTS = {
    "beside": ("set/labels.json", "set"),
    "label studio": ("set/result.json", "set/images"),
    "fiftyone": ("set/labels.json", "set/data"),
    "cvat": ("set/annotations/instances_default.json", "set/images/default"),
    "coco": ("set/annotations/instances_val2017.json", "set/val2017"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_found_where_tools_put_them(tmp_path, layout):
    file, folder = LAYOUTS[layout]
    images(tmp_path / folder)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content()))
    index = read_coco(path, category="lid")
    assert index["defect"].tolist() == ["good", "scratch", "good", "good"]  # a category called Good is no defect
    assert check(index).empty or set(check(index)["problem"]) <= {"left_out"}
    mask = load_mask(root_of(index) / index["mask"][1])
    assert mask.sum() == 32 + 9 and mask[1:5, 1:9].all()
    bare = read_coco(path, masks=False)
    assert bare["mask"].eq("").all() and bare["anomalous"].sum() == 1


@pytest.mark.parametrize("polygons", [False, True])
def test_an_index_goes_there_and_back(tmp_path, polygons):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(8):
        save(tmp_path / f"a/{number}.png", rng.integers(0, 255, (25, 40, 3), dtype=np.uint8))
        row = dict(image=f"a/{number}.png", category="lid", split=("train", "test")[number % 2], anomalous=False)
        if number % 4 > 1:
            mask = rng.random((25, 40)) < (0.4 if number > 4 else 0.02)  # many parts, corners that touch, holes
            mask[3:20, 5:30] = True
            mask[6:12, 8:20] = False
            save(tmp_path / f"m/{number}.png", mask.astype(np.uint8) * 255)
            row |= dict(anomalous=True, defect=("crack", "")[number % 2], mask=f"m/{number}.png")
        rows.append(row)
    index = make_index(rows, tmp_path, "shop")
    file = write_coco(index, tmp_path / "coco.json", polygons=polygons)
    again = read_coco(file, images=tmp_path)
    columns = ["image", "category", "split", "anomalous"]
    assert again[columns].values.tolist() == index[columns].values.tolist()
    assert again["defect"].tolist() == [d or "defect" for d in index["defect"]]
    for before, after in zip(index["mask"], again["mask"]):
        if before:
            assert (load_mask(tmp_path / before) == load_mask(root_of(again) / after)).all()
    data = json.loads(file.read_text())
    for annotation in data["annotations"]:  # what every reader relies on
        assert isinstance(annotation["segmentation"], list) == polygons
        part = from_segmentation(annotation["segmentation"], (25, 40))
        rows_, columns_ = np.nonzero(part)
        x, y, w, h = annotation["bbox"]
        assert (x, y) == (columns_.min(), rows_.min()) and (x + w, y + h) == (columns_.max() + 1, rows_.max() + 1)
        assert annotation["area"] == part.sum() and annotation["iscrowd"] == 0
    assert len({annotation["id"] for annotation in data["annotations"]}) == len(data["annotations"])


def test_crowds_and_uncompressed_run_lengths_are_masks(tmp_path):
    images(tmp_path)
    mask = np.zeros((20, 30), bool)
    mask[2:9, 4:11] = True
    mask[4:6, 6:8] = False
    crowd = dict(size=[20, 30], counts=run_lengths(mask))
    annotations = [dict(id=1, image_id=0, category_id=1, iscrowd=1, segmentation=crowd, bbox=[0, 0, 1, 1], area=3)]
    (tmp_path / "a.json").write_text(json.dumps(content(annotations=annotations)))
    index = read_coco(tmp_path / "a.json")
    assert (load_mask(root_of(index) / index["mask"][0]) == mask).all()  # not its stated box or area


def test_two_images_that_differ_in_their_suffix_have_two_masks(tmp_path):
    images(tmp_path, 1)
    save(tmp_path / "0.jpg", np.full((20, 30, 3), 9, np.uint8))
    pictures = [dict(id=n, file_name=f"0.{end}", width=30, height=20) for n, end in enumerate(("png", "jpg"))]
    annotations = [dict(id=n, image_id=n, category_id=1, bbox=[n, n, 2 + n, 2], segmentation=[]) for n in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(content(images=pictures, annotations=annotations)))
    index = read_coco(tmp_path / "a.json")
    assert [load_mask(root_of(index) / mask).sum() for mask in index["mask"]] == [4, 6]


def test_missing_images_are_named(tmp_path):
    images(tmp_path, 2)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content()))
    with pytest.warns(UserWarning, match=r"2 of 4 images do not exist under .* \(first: 2.png, 3.png\)"):
        index = read_coco(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check(index)["problem"].tolist().count("missing") == 2
    for number in range(2):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(LayoutError, match=r"names 4 images \(first: 0.png\), and none of them is in .*images=FOLDER"):
        read_coco(path)
    with pytest.raises(LayoutError, match="none of them is in"):
        read_coco(path, images=tmp_path / "nowhere")


ONE = dict(id=1, image_id=1, category_id=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no COCO file: .* it holds no object"),
        ('{"shapes": []}', "is no COCO file: .* it has shapes"),  # of labelme
        (dict(images=[], annotations=[]), "no images"),
        (dict(images=7), "images must be a list of objects"),
        (dict(annotations=[3]), "annotations must be a list of objects"),
        (dict(images=[dict(id=0)]), "image 0 has no file_name"),
        (dict(images=[dict(id=1.5, file_name="0.png")]), "has the id 1.5"),
        (dict(images=[dict(id=0, file_name="0.png"), dict(id=0, file_name="1.png")]), "both have the id 0"),
        (dict(images=[dict(id=0, file_name="0.png"), dict(id=1, file_name="0.png")]), "0 and 1 are both 0.png"),
        (dict(annotations=[ONE | dict(image_id=99)]), "annotation 1 has the image_id 99"),
        (dict(annotations=[ONE | dict(category_id=99)]), "annotation 1 has the category_id 99"),
        (dict(annotations=[ONE | dict(image_id=[1])]), r"has the image_id \[1\]"),
        (dict(annotations=[ONE]), r"annotation 1: the box is \[\]"),
        (dict(annotations=[ONE | dict(bbox=[0, 0, "a", 2])]), "annotation 1: "),
        (dict(annotations=[ONE | dict(bbox=[0, 0, 3, 0])]), "the last two above 0"),
        (dict(annotations=[ONE | dict(segmentation="abc")]), "neither a list of polygons nor"),
        (dict(annotations=[ONE | dict(segmentation=[[0, 0, 5, 5, 3]])]), "has 5 numbers"),
        (dict(annotations=[ONE | dict(segmentation=[[0, 0, 5, 5, None, 3]])]), "something that is no number"),
        (dict(annotations=[ONE | dict(segmentation=[[90, 90, 95, 90, 95, 95]])]), "marks no pixel"),
        (dict(annotations=[ONE | dict(segmentation=dict(size=[30, 20], counts=[600]))]), "export it at the image's"),
        (dict(annotations=[ONE | dict(segmentation=dict(size=[20, 30], counts=[599]))]), "cover 599 pixels"),
        (dict(annotations=[ONE | dict(segmentation=dict(size=[20, 30], counts=[-5, 605]))]), "no whole number"),
        (dict(annotations=[ONE | dict(segmentation=dict(size=[20, 30], counts="~"))]), "is no character"),
        (dict(annotations=[ONE | dict(segmentation=dict(size=[20, 30], counts="P"))]), "end within a number"),
        (dict(annotations=[ONE | dict(segmentation=dict(size=[20, 30]))]), "must be a list of run lengths"),
        (
            dict(
                images=[dict(id=1, file_name="1.png", width=-3, height=2)], annotations=[ONE | dict(bbox=[0, 0, 1, 1])]
            ),
            "is -3x2",
        ),
        (dict(images=[dict(id=1, file_name="../../etc/1.png")], annotations=[]), "none of them is in"),
        (dict(categories=[dict(id=1, name="")]), "category 1 has no name"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    images(tmp_path)
    path = tmp_path / "a.json"
    path.write_text(change if isinstance(change, str) else json.dumps(content(**change)))
    with pytest.raises((ValueError, LayoutError), match=message) as error:
        read_coco(path)
    assert "a.json" in str(error.value)


def test_a_mask_of_another_size_than_its_file_is_found_by_check(tmp_path):
    images(tmp_path, size=(24, 30))
    (tmp_path / "a.json").write_text(json.dumps(content()))
    problems = check(read_coco(tmp_path / "a.json"))
    assert problems["problem"].tolist().count("size_mismatch") == 1


def test_what_cannot_be_written_is_refused(tmp_path):
    images(tmp_path)
    rows = [dict(image=f"{n}.png", category="lid", split="test", anomalous=n > 1) for n in range(4)]
    index = make_index(rows, tmp_path, "shop")
    with pytest.raises(ValueError, match="2 anomalous images have no mask"):
        write_coco(index, tmp_path / "x.json")
    rows = [rows[0] | dict(split="unlabelled", anomalous=False, defect="")]
    with pytest.raises(ValueError, match="1 of 1 images have no label"):
        write_coco(make_index(rows, tmp_path, "shop"), tmp_path / "x.json")
    save(tmp_path / "m.png", np.full((3, 3), 255, np.uint8))
    rows = [dict(image="0.png", category="lid", split="test", anomalous=True, mask="m.png")]
    with pytest.raises(ValueError, match="the mask m.png is 3x3, its image 0.png is 30x20"):
        write_coco(make_index(rows, tmp_path, "shop"), tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_scores_are_the_largest_value_inside():
    heat = np.arange(48, dtype=np.float32).reshape(6, 8)
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[1, 1] = mask[4:6, 5:8] = True
    assert [part["score"] for part in regions_as_annotations(mask, 1, 1, heat=heat)] == [9, 47]
    four = regions_as_annotations(mask, 1, 1, 5, heat, connectivity=4)
    assert [(part["id"], part["area"]) for part in four] == [(5, 1), (6, 1), (7, 6)]
    assert regions_as_annotations(mask & False, 1, 1) == []


def test_masks_made_beside_photographs_are_no_photographs(tmp_path):
    "And what lies beside the images is looked for there, not below the folder that images and masks have in common."
    from zsad_nb.inspection.sources import sources

    images(tmp_path / "photos")
    (tmp_path / "photos/a.json").write_text(json.dumps(content()))
    index = read_coco(tmp_path / "photos/a.json")
    assert index["mask"].ne("").sum() == 1 and (tmp_path / "photos/a_masks/1.png").is_file()
    found = sources(tmp_path / "photos")
    assert [source.name.rpartition("/")[2] for source in found] == [f"{n}.png" for n in range(4)]
    assert "folder of masks made from annotations" in found.left_out[0]["text"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.json").write_text(json.dumps(content()))
    save(tmp_path / "private/secret.png", np.zeros((5, 5, 3), np.uint8))
    save(tmp_path / "photos/extra.png", np.zeros((5, 5, 3), np.uint8))
    far = read_coco(tmp_path / "elsewhere/b.json", images=tmp_path / "photos")
    text = json.dumps(far.attrs["left_out"])
    assert "photos/extra.png" in text and "secret" not in text and "folder of masks made from annotations" in text


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    images(tmp_path)
    with pytest.raises(LayoutError, match="a.json does not exist; give COCO's JSON file itself"):
        read_coco(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(content()))
    with pytest.raises(LayoutError, match="is a folder; give COCO's JSON file itself, such as .*a.json"):
        read_coco(tmp_path)
