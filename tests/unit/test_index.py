"The Index and meta.json: every dialect, every way to get it wrong."

import json
import os
import warnings

import numpy as np
import pandas as pd
import pytest

from zsad_nb.data.index import (
    COLUMNS,
    apply_split,
    concat_indices,
    fingerprint,
    load_index,
    make_index,
    root_of,
    save_index,
    save_split,
)
from zsad_nb.data.meta import read_meta, write_meta

GOOD_ROW = dict(category="screw", split="test", image="screw/test/good/0.png", anomalous=False)
BAD_ROW = dict(
    category="screw",
    split="test",
    image="screw/test/bent/0.png",
    mask="screw/gt/bent/0.png",
    anomalous=True,
    defect="bent",
)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


@pytest.fixture
def index(tmp_path):
    touch(tmp_path / "set", GOOD_ROW["image"], BAD_ROW["image"], BAD_ROW["mask"])
    return make_index([GOOD_ROW, BAD_ROW], tmp_path / "set", "toy")


# ---- make_index ----


def test_columns_dtypes_and_order(index):
    assert tuple(index.columns) == COLUMNS
    assert index.anomalous.dtype == bool
    assert list(index.index) == [0, 1]
    assert index.defect.tolist() == ["good", "bent"] and index["mask"].tolist() == ["", BAD_ROW["mask"]]
    shuffled = [dict(reversed(list(row.items()))) for row in (BAD_ROW, GOOD_ROW)]
    assert make_index(shuffled, "x", "toy").image.tolist() == [
        BAD_ROW["image"],
        GOOD_ROW["image"],
    ]  # rows keep their order, columns do not


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(split="Test"), "split is 'Test'"),
        (dict(split="val"), "split is 'val'"),
        (dict(anomalous="yes"), "anomalous is 'yes'"),
        (dict(anomalous=2), "anomalous is 2"),
        (dict(anomalous=np.nan), "anomalous is nan"),
        (dict(anomalous=False), "a normal image has the defect 'bent'"),
        (dict(defect="good"), "has the defect 'good'"),
        (dict(image=""), "image is empty"),
        (dict(category=""), "category is empty"),
        (dict(mask=float("nan")), "mask is nan"),
        (dict(image="../0.png"), "leaves the root"),
        (dict(image="/elsewhere/0.png"), "does not lie under the root"),
        (dict(mask="C:\\x\\0.png"), "another machine"),
        (dict(imgae="x"), "did you mean 'image'"),
        (dict(category=None), "no category"),
    ],
)
def test_a_bad_row_is_named(change, message):
    with pytest.raises(ValueError, match="row 1") as error:
        make_index([GOOD_ROW, BAD_ROW | change], "data", "toy")
    assert message in str(error.value)


def test_missing_dataset_and_repeated_image():
    with pytest.raises(ValueError, match="no dataset"):
        make_index([GOOD_ROW], "data")
    with pytest.raises(ValueError, match="row 1: the image screw/test/good/0.png occurs twice"):
        make_index([GOOD_ROW, GOOD_ROW], "data", "toy")
    assert (
        len(make_index([GOOD_ROW, GOOD_ROW | dict(split="train")], "data", "toy")) == 2
    )  # AdaCLIP lists the same images in both halves


def test_strings_of_a_csv_are_not_truthy():
    rows = [GOOD_ROW | dict(anomalous=word) for word in ("0", "False", "false")]
    assert not any(make_index([row], "d", "toy").anomalous[0] for row in rows)


def test_paths_become_relative_and_posix(tmp_path):
    got = make_index([BAD_ROW | dict(image=str(tmp_path / "a" / "b.png"), mask="a\\m.png")], tmp_path, "toy")
    assert (got.image[0], got["mask"][0]) == ("a/b.png", "a/m.png")


def test_root_survives_filters_and_is_missed_when_lost(index):
    assert root_of(index[index.anomalous].sort_values("image").copy()) == root_of(index)
    with pytest.raises(ValueError, match="lost its root"):
        root_of(pd.DataFrame(index.to_dict()))


# ---- several roots, disk ----


def test_concat_rebases_to_the_common_parent(index, tmp_path):
    other = make_index([BAD_ROW | dict(mask="")], tmp_path / "deep" / "er", "other")
    both = concat_indices([index, other])
    assert root_of(both) == tmp_path and both["mask"].tolist() == ["", "set/" + BAD_ROW["mask"], ""]
    assert both.image.iloc[-1] == "deep/er/" + BAD_ROW["image"]
    nested = concat_indices([index, make_index([GOOD_ROW | dict(image="0.png")], tmp_path / "set" / "inner", "in")])
    assert nested.image.iloc[-1] == "inner/0.png" and nested.image.iloc[0] == GOOD_ROW["image"]
    with pytest.raises(ValueError):
        concat_indices([])


def test_csv_round_trip_is_relative_and_moves(index, tmp_path):
    save_index(index, tmp_path / "lists" / "a.csv")
    assert str(tmp_path) not in (tmp_path / "lists" / "a.csv").read_text()
    pd.testing.assert_frame_equal(load_index(tmp_path / "lists" / "a.csv"), index)
    moved = tmp_path / "moved"
    moved.mkdir()
    os.rename(tmp_path / "lists", moved / "lists"), os.rename(tmp_path / "set", moved / "set")
    assert (
        root_of(load_index(moved / "lists" / "a.csv")) == moved / "lists" / ".." / "set"
        or root_of(load_index(moved / "lists" / "a.csv")) == moved / "set"
    )
    assert (root_of(load_index(moved / "lists" / "a.csv")) / GOOD_ROW["image"]).is_file()
    assert root_of(load_index(moved / "lists" / "a.csv", root=tmp_path)) == tmp_path


def test_csv_keeps_awkward_text(tmp_path):
    odd = make_index(
        [
            dict(category="NA", split="test", image='001/é, "x" #1.png', anomalous=True, defect="null"),
            dict(category="01", split="test", image="n.png", anomalous=False),
        ],
        tmp_path,
        "1.0",
    )
    pd.testing.assert_frame_equal(load_index(save_index(odd, tmp_path / "odd.csv")), odd)


def test_csv_without_a_root_asks_for_one(index, tmp_path):
    index.to_csv(tmp_path / "bare.csv", index=False)
    with pytest.raises(ValueError, match="pass root=FOLDER"):
        load_index(tmp_path / "bare.csv")
    pd.testing.assert_frame_equal(load_index(tmp_path / "bare.csv", root_of(index)), index)


def test_split_list(index, tmp_path):
    save_split(index.assign(split=["train", "test"]), tmp_path / "split.csv")
    assert apply_split(index[::-1], tmp_path / "split.csv").split.tolist() == ["train", "test"]
    with pytest.raises(ValueError, match="is not in the index"):
        apply_split(index[:1], tmp_path / "split.csv")
    flipped = make_index([GOOD_ROW | dict(anomalous=True), BAD_ROW], root_of(index), "toy")
    with pytest.raises(ValueError, match="the opposite in the index"):
        apply_split(flipped, tmp_path / "split.csv")


def test_fingerprint_sees_what_it_should(index, tmp_path):
    before = [fingerprint(index, files) for files in ("none", "size", "content")]
    assert len(set(before)) == 3 and all(len(digest) == 64 for digest in before)
    assert fingerprint(index.assign(defect=["good", "cut"])) != before[0] and fingerprint(index[::-1]) != before[0]
    path = root_of(index) / BAD_ROW["mask"]
    path.write_bytes(path.read_bytes()[::-1])  # same size, other bytes
    assert [fingerprint(index, files) == old for files, old in zip(("none", "size", "content"), before)] == [
        True,
        True,
        False,
    ]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="run check"):
        fingerprint(index, "size")
    with pytest.raises(ValueError, match="'content'"):
        fingerprint(index, "all")


# ---- meta.json ----


def record(image, anomaly, mask="", specie=None, name="brain", **more):
    return dict(
        img_path=image,
        mask_path=mask,
        cls_name=name,
        specie_name=specie if specie is not None else ("bad" if anomaly else "good"),
        anomaly=anomaly,
        **more,
    )


@pytest.fixture
def site(tmp_path):
    touch(tmp_path / "Br35H", "no/n1.jpg", "yes/y1.jpg", "yes/y2.jpg", "masks/y1.png")
    (tmp_path / "Br35H" / "empty").mkdir()
    return tmp_path / "Br35H"


def put(site, records, half="test", name="meta.json"):
    (site / name).write_text(
        json.dumps({"train": {}, half: {"brain": records}} if half == "test" else {half: {"brain": records}})
    )
    return site / name


def test_meta_relative(site):
    got = read_meta(
        put(site, [record("no/n1.jpg", 0), record("yes/y1.jpg", 1, "masks/y1.png"), record("yes/y2.jpg", "1")])
    )
    assert got[["image", "mask", "anomalous", "defect"]].values.tolist() == [
        ["no/n1.jpg", "", False, "good"],
        ["yes/y1.jpg", "masks/y1.png", True, "bad"],
        ["yes/y2.jpg", "", True, "bad"],
    ]
    assert got.dataset.unique().tolist() == ["Br35H"] and got.split.unique().tolist() == ["test"]
    pd.testing.assert_frame_equal(read_meta(site), got)  # the folder will do


@pytest.mark.parametrize("half", ["Test", "TEST", "Train"])
def test_meta_any_case_of_the_split_key(site, half):
    assert read_meta(put(site, [record("no/n1.jpg", 0)], half)).split.tolist() == [half.lower()]


@pytest.mark.parametrize("prefix", ["/home/author/data/Br35H/", "C:\\Users\\author\\Br35H\\", "here"])
def test_meta_absolute_paths_are_re_rooted(site, prefix):
    spell = {"here": lambda p: str(site / p)}.get(
        prefix, lambda p: prefix + (p.replace("/", "\\") if "\\" in prefix else p)
    )
    got = read_meta(put(site, [record(spell("no/n1.jpg"), 0), record(spell("yes/y1.jpg"), 1, spell("masks/y1.png"))]))
    assert got.image.tolist() == ["no/n1.jpg", "yes/y1.jpg"] and got["mask"].tolist() == ["", "masks/y1.png"]


def test_meta_absolute_paths_of_another_set_raise(site):
    with pytest.raises(FileNotFoundError, match="pass root=FOLDER"):
        read_meta(put(site, [record("/home/author/Kvasir/images/1.jpg", 1)]))
    # one prefix for the whole file: y1.jpg under another folder is not silently taken from here
    with pytest.raises(ValueError, match="does not start with"):
        read_meta(put(site, [record("/a/Br35H/no/n1.jpg", 0), record("/b/Other/yes/y1.jpg", 1)]))


@pytest.mark.parametrize("mask", ["empty", "empty/", "/home/author/Br35H/empty", "ground_truth/good"])
def test_meta_a_folder_as_mask_means_none(site, mask):
    image = "/home/author/Br35H/no/n1.jpg" if mask.startswith("/") else "no/n1.jpg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_meta(put(site, [record(image, 0, mask)]))["mask"].tolist() == [""]


def test_meta_missing_mask_counts_at_image_level_and_says_so(site):
    with pytest.warns(UserWarning, match="1 anomalous images name a mask that does not exist"):
        got = read_meta(
            put(site, [record("yes/y1.jpg", 1, "masks/gone.png"), record("no/n1.jpg", 0, "masks/none.png")])
        )
    assert got["mask"].tolist() == ["", ""] and got.anomalous.tolist() == [True, False]


def test_meta_missing_images_are_counted(site):
    with pytest.warns(UserWarning, match="1 of 2 images do not exist"):
        read_meta(put(site, [record("no/n1.jpg", 0), record("no/gone.jpg", 0)]))


def test_meta_specie_is_repaired(site):
    with pytest.warns(UserWarning, match="1 anomalous images are of the specie 'good'"):
        got = read_meta(
            put(
                site,
                [
                    record("no/n1.jpg", 0, specie=""),
                    record("yes/y1.jpg", 1, specie="good"),
                    record("yes/y2.jpg", 1, specie=""),
                ],
            )
        )
    assert got.defect.tolist() == ["good", "", ""]


def test_meta_with_dataset_name_beside_the_sets(site):
    file = put(site.parent, [record("Br35H/no/n1.jpg", 0, dataset_name="Br35H")], name="meta_br.json")
    got = read_meta(file)
    assert got.dataset.tolist() == ["Br35H"] and got.image.tolist() == ["Br35H/no/n1.jpg"]
    inside = put(site.parent, [record("no/n1.jpg", 0)], name="meta_Br35H.json")  # paths from the set's own folder
    assert root_of(read_meta(inside)) == site and read_meta(inside).dataset.tolist() == ["Br35H"]


def test_meta_json_lines(site, tmp_path):
    lines = [
        dict(image_path="no/n1.jpg", label=0, class_name="brain", mask_path=""),
        dict(image_path="yes/y1.jpg", label=1.0, class_name="brain", mask_path="masks/y1.png"),
        dict(image_path="yes/y2.jpg", label=1, class_name="brain", mask_path=None),
    ]
    (tmp_path / "full-shot.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    got = read_meta(tmp_path / "full-shot.jsonl", root=site, split="train")
    assert (
        got["mask"].tolist() == ["", "masks/y1.png", ""]
        and got.split.unique().tolist() == ["train"]
        and got.defect.tolist() == ["good", "", ""]
    )
    (tmp_path / "one.jsonl").write_text(json.dumps(lines[0]))
    assert len(read_meta(tmp_path / "one.jsonl", root=site)) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"test": ', "neither a meta.json nor JSON lines"),
        ("{}", "expected 'train' and 'test'"),
        ('{"valid": {}}', "expected 'train' and 'test'"),
        ('{"test": {"a": [{"img_path": "x.png"}]}}', "no anomalous"),
        ('{"test": {"a": [3]}}', "a record is 3"),
        (json.dumps({"test": {"a": [record("no/n1.jpg", "maybe")]}}), "anomalous is 'maybe'"),
    ],
)
def test_meta_damage_is_named(site, text, message):
    (site / "meta.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_meta(site)
    assert message in str(error.value)


def test_meta_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a meta.json"):
        read_meta(tmp_path)


@pytest.mark.parametrize("options", [{}, dict(absolute=True), dict(dataset_name=True)])
def test_meta_round_trip(index, options):
    index = pd.concat([index, make_index([GOOD_ROW | dict(split="train")], root_of(index), "toy")], ignore_index=True)
    index = make_index(index[::-1].sort_values("split", ascending=False), index.attrs["root"])
    again = read_meta(write_meta(index, **options), dataset="toy")
    pd.testing.assert_frame_equal(again, index)
    data = json.loads((root_of(index) / "meta.json").read_text())
    first = data["test"]["screw"][-1]
    assert set(first) == {"img_path", "mask_path", "cls_name", "specie_name", "anomaly"} | (
        {"dataset_name"} if "dataset_name" in options else set()
    )
    assert os.path.isabs(first["img_path"]) == options.get("absolute", False)


def test_meta_json_lines_refuse_two_halves(index, tmp_path):
    both = make_index([GOOD_ROW, GOOD_ROW | dict(split="train")], root_of(index), "toy")
    with pytest.raises(ValueError, match="a file each"):
        write_meta(both, tmp_path / "x.jsonl")
