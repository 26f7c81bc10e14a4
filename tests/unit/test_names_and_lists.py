"Names in any form and lists in any state: paired, round-tripped, or refused with file, line and cure; nothing leaves the root."

import json
import os
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from test_left_out import base, put, told
from test_readers import quiet

from zsad_nb.cli.commands import main
from zsad_nb.data.folder import read_csv
from zsad_nb.data.folders import find_folder
from zsad_nb.data.images import check
from zsad_nb.data.index import (
    apply_split,
    concat_indices,
    fingerprint,
    load_index,
    make_index,
    relative_path,
    root_of,
    save_index,
    save_split,
)
from zsad_nb.data.layouts import pair, read_mvtec
from zsad_nb.data.listing import LayoutError
from zsad_nb.data.medical import read_headct
from zsad_nb.data.meta import read_meta, write_meta
from zsad_nb.data.readers import read
from zsad_nb.data.taxonomy import plain, type_of
from zsad_nb.inspection.inspector import Inspector

NFC, NFD = (unicodedata.normalize(form, "prüfling é ガ") for form in ("NFC", "NFD"))
BYTES = os.fsdecode(b"pr\xfcf.png")  # Latin-1
ROW = dict(category="c", split="test", image="a.png", anomalous=False)


# ------------------------------------------------------------------------------------------------------------------------- Unicode


@pytest.mark.parametrize("image, mask", [(NFC, NFD), (NFD, NFC), (NFC.upper(), NFD), (NFD, NFD)])
@pytest.mark.parametrize("layout", ["mvtec", "folder", "visa", "rsdd", "kvasir", "his"])
def test_every_pairing_compares_names_in_one_form(tmp_path, layout, image, mask):
    trees = {
        "mvtec": ("c/test/good/1.png", f"c/test/bad/{image}.png", f"c/ground_truth/bad/{mask}_mask.png"),
        "folder": ("good/1.png", f"bad/{image}.png", f"masks/{mask}.png"),
        "visa": (
            "c/Data/Images/Normal/1.JPG",
            f"c/Data/Images/Anomaly/{image}.JPG",
            f"c/Data/Masks/Anomaly/mask {mask}.png",
        ),
        "rsdd": ("neg/1.jpg", f"pos/{image}.jpg", f"pos/{mask}.png"),
        "kvasir": ("images/1.png", f"images/{image}.png", f"masks/{mask}.png"),
        "his": ("test/good/1.png", f"test/Ungood/img/{image}.png", f"test/Ungood/label/{mask}.png"),
    }
    if layout == "visa":
        trees["visa"] = (*trees["visa"][:2], f"c/Data/Masks/Anomaly/{mask}.png")
    put(tmp_path, *trees[layout])
    index = quiet(read, layout, tmp_path, **(dict(masks=True) if layout == "his" else {}))
    row = index[[Path(path).stem == image for path in index.image]].iloc[0]
    assert row["mask"] and Path(row["mask"]).stem.removesuffix("_mask") == mask


def test_folders_of_defects_in_two_forms(tmp_path):
    put(tmp_path, "c/test/good/1.png", f"c/test/{NFC}/2.png", f"c/ground_truth/{NFD}/2_mask.png")
    assert quiet(read_mvtec, tmp_path)["mask"].tolist() == ["", f"c/ground_truth/{NFD}/2_mask.png"]
    assert find_folder(tmp_path / "c" / "test", NFD).name == NFC


def test_two_files_that_differ_only_in_form_are_an_error_that_names_both(tmp_path):
    put(tmp_path, "good/1.png", f"bad/{NFC}.png", f"bad/{NFD}.png")
    if len(os.listdir(tmp_path / "bad")) < 2:
        pytest.skip("this disk knows one form only")
    with pytest.raises(LayoutError, match="differ only in their Unicode form") as error:
        read("folder", tmp_path)
    assert ascii(f"{NFC}.png") in str(error.value) and ascii(f"{NFD}.png") in str(error.value)
    rows = [ROW | dict(image=f"{form}.png") for form in (NFC, NFD)]
    with pytest.raises(ValueError, match="row 1: .*differ only in their Unicode form"):
        make_index(rows, tmp_path, "t")


def test_lists_in_another_form_than_the_files(tmp_path):
    put(tmp_path, "c/Data/Images/Normal/1.JPG", f"c/Data/Images/Anomaly/{NFC}.JPG", f"c/Data/Masks/Anomaly/{NFC}.png")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text(
        "object,split,label,image,mask\nc,train,normal,c/Data/Images/Normal/1.JPG,\n"
        f"c,test,anomaly,c/Data/Images/Anomaly/{NFD}.JPG,x\n",
        encoding="utf-8",
    )
    (tmp_path / "c" / "image_anno.csv").write_text(
        f"image,label\nc/Data/Images/Anomaly/{NFD}.JPG,melted\n", encoding="utf-8-sig"
    )
    index = quiet(read, "visa", tmp_path)
    assert index.split.tolist() == ["train", "test"] and index.defect.tolist() == ["good", "melted"]
    save_split(index.assign(image=[unicodedata.normalize("NFD", image) for image in index.image]), tmp_path / "s.csv")
    assert apply_split(index, tmp_path / "s.csv").image.tolist() == index.image.tolist()


def test_dagm_labels_and_taxonomy_in_another_form(tmp_path):
    put(tmp_path, f"Class1/Test/{NFC}.png", "Class1/Test/2.png", "Class1/Test/Label/2_label.png")
    (tmp_path / "Class1/Test/Label/Labels.txt").write_text(
        f"1\n1\t1\t{NFD.replace(' ', '')}.png\t0\t0\n", encoding="utf-8"
    )
    assert plain(NFD) == plain(NFC) and type_of("mine", NFD) == type_of("mine", NFC)


def test_names_that_differ_only_in_case_are_noticed(tmp_path):
    put(tmp_path, "good/1.png", "good/1.PNG", "bad/2.png")
    if len(os.listdir(tmp_path / "good")) < 2:
        pytest.skip("this disk does not tell them apart")
    problems = check(quiet(read, "folder", tmp_path))
    assert "name_clash" in set(problems.problem) and "on Windows and macOS one of them is lost" in " ".join(
        problems.message
    )


# ------------------------------------------------------------------------------------------------------------------- not UTF-8


@pytest.mark.parametrize("name", [f"good/{BYTES}", f"good/{BYTES.removesuffix('.png')}/1.png", f"{BYTES}/good/1.png"])
def test_a_name_that_is_not_utf8_is_refused_at_the_start_by_name(tmp_path, name):
    try:
        put(tmp_path, "good/1.png", "bad/2.png", name)
    except OSError:
        pytest.skip("this disk knows UTF-8 only")
    try:
        index = quiet(read, "folder", tmp_path)
    except ValueError as error:
        assert r"\udcfc" in str(error) and "convmv" in str(error)
        str(error).encode("utf-8")
    else:  # it lies where the layout does not look: told, and everything can be saved
        said = " ".join(group["text"] for group in index.attrs["left_out"])
        assert r"\udcfc" in said
        (
            fingerprint(index),
            save_index(index, tmp_path / "i.csv"),
            write_meta(index),
            index.to_json(),
            json.dumps(index.attrs["left_out"]),
        )


@pytest.mark.parametrize("field", ["dataset", "category", "image", "mask", "defect"])
def test_make_index_refuses_it_in_every_column(field):
    row = ROW | dict(dataset="t", mask="m.png", anomalous=True, defect="bent") | {field: "x\udcfc"}
    with pytest.raises(ValueError, match=r"row 0 .*not UTF-8"):
        make_index([row], "data")


def test_a_root_that_is_not_utf8(tmp_path):
    with pytest.raises(ValueError, match=r"the folder of the images: .*\\udcfc"):
        make_index([ROW], tmp_path / BYTES, "t")


def test_predict_reads_such_a_name_and_finds_it_again(tmp_path):
    try:
        put(tmp_path / "in", "1.png", BYTES)
    except OSError:
        pytest.skip("this disk knows UTF-8 only")
    inspector = Inspector.load("self_distance", image_size=32)
    first = inspector.predict(tmp_path / "in", tmp_path / "out", progress=False)
    again = inspector.predict(tmp_path / "in", tmp_path / "out", progress=False)
    assert first.path.str.endswith(r"pr\udcfcf.png").sum() == 1 and (first.error == "").all()
    assert again.attrs["summary"]["known_before"] == 2 and again.score.tolist() == first.score.tolist()


# --------------------------------------------------------------------------------------------------------------- odd names, kept

ODD = [
    "NA",
    "None",
    "null",
    "nan",
    "007",
    "1e5",
    "-inf",
    "True",
    "=1+1",
    "+1",
    "-1",
    "@x",
    "'",
    "'=x",
    "a\\b",
    "a\nb",
    "a\rb",
    "a,b",
    'a"b',
    "a;b",
    " a",
    "a ",
    "CON",
    "a\u2028b",
    "a\x85b",
    "$x$",
    "<b>",
    "ガ",
    "x" * 200,
    "1:2",
]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_odd_names_come_back_from_every_list(tmp_path):
    rows = []
    for number, name in enumerate(ODD):
        put(tmp_path / "set", f"{name}/{name}.png")
        rows.append(ROW | dict(category=name, image=f"{name}/{name}.png", anomalous=True, defect=name))
    index = make_index(rows, tmp_path / "set", "NA")
    assert index.image.tolist() == [row["image"] for row in rows]
    pd.testing.assert_frame_equal(load_index(save_index(index, tmp_path / "i.csv")), index)
    pd.testing.assert_frame_equal(quiet(read_meta, write_meta(index), dataset="NA"), index)
    pd.testing.assert_frame_equal(apply_split(index, save_split(index, tmp_path / "s.csv")), index)
    lines = quiet(read_meta, write_meta(index, tmp_path / "l.jsonl"), root=tmp_path / "set", dataset="NA")
    pd.testing.assert_frame_equal(lines.drop(columns="defect"), index.drop(columns="defect"))
    pytest.importorskip("pyarrow")
    index.to_parquet(tmp_path / "i.parquet")
    pd.testing.assert_frame_equal(make_index(pd.read_parquet(tmp_path / "i.parquet"), root_of(index)), index)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["a\\b", "C:x", "1:30", "\\x", "a\\..\\b", "~", "http:"])
def test_a_file_that_is_really_called_so(tmp_path, name):
    index = quiet(read, "folder", put(base(tmp_path), f"bad/{name}.png", f"{name}x/readme.txt"))
    assert f"bad/{name}.png" in set(index.image) and not {"missing"} & set(check(index).problem)


# ------------------------------------------------------------------------------------------------------------------------- paths

OUTSIDE = [
    "../x.png",
    "a/../../x.png",
    "/etc/x.png",
    "//server/share/x.png",
    "\\\\server\\share\\x.png",
    "C:\\x.png",
    "C:x.png",
    "..\\x.png",
    "a\\..\\..\\x.png",
    "a/..\\..\\x.png",
    "https://example.org/x.png",
    "file:///etc/x.png",
    "s3://bucket/x.png",
    "a\0.png",
    "..",
    ".",
    "a/..",
    "link/../../x.png",
    "x" * 300 + ".png",
    "\\x.png",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_leaves_the_root(tmp_path, path):
    root = tmp_path / "deep" / "set"
    put(root, "good/1.png")
    put(tmp_path / "deep", "x.png")
    os.symlink(tmp_path, root / "link")
    for change in (dict(image=path), dict(mask=path, anomalous=True, defect="b")):
        with pytest.raises(ValueError, match="row 0"):
            make_index([ROW | change], root, "t")
    with pytest.raises(ValueError):
        relative_path(path, root)
    if "\0" not in path:
        (root / "l.csv").write_text(f'image,label\n"{path}",0\n', encoding="utf-8")
        with pytest.raises(ValueError, match="l.csv, line 2"):
            quiet(read_csv, root / "l.csv")
    record = dict(img_path=path, mask_path="", cls_name="c", specie_name="good", anomaly=0)
    (root / "meta.json").write_text(json.dumps({"test": {"c": [record, record | dict(img_path="good/1.png")]}}))
    with pytest.raises((ValueError, FileNotFoundError)):
        quiet(read_meta, root)


def test_parent_folders_are_taken_out_before_links(tmp_path):
    put(tmp_path / "set", "a.png")
    os.symlink(tmp_path, tmp_path / "set" / "link")
    assert relative_path("link/../a.png", tmp_path / "set") == "a.png"
    assert relative_path("~/a.png", tmp_path / "set") == "~/a.png"  # a folder of that name, not somebody's home


@pytest.mark.parametrize("dataset", ["../other", "/etc", "a\\..\\..", ".."])
def test_the_name_of_a_set_leads_nowhere(tmp_path, dataset):
    put(tmp_path / "other", "1.png")
    put(tmp_path / "set", "1.png")
    record = dict(img_path="gone.png", mask_path="", cls_name="c", specie_name="good", anomaly=0, dataset_name=dataset)
    (tmp_path / "set" / "meta.json").write_text(json.dumps({"test": {"c": [record]}}))
    assert root_of(quiet(read_meta, tmp_path / "set")) == tmp_path / "set"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROW | dict(anomalous=True, defect="b", mask="a.png")], "row 0 .*is its own mask"),
        (
            [ROW | dict(anomalous=True, defect="b", mask="b.png"), ROW | dict(image="./b.png")],
            "row 1: the image b.png is the mask of row 0",
        ),
        ([ROW, ROW | dict(image="x/../a.png")], "row 1: the image a.png occurs twice"),
    ],
)
def test_one_file_is_one_thing(rows, message):
    with pytest.raises(ValueError, match=message):
        make_index(rows, "data", "t")


def test_a_mask_that_is_its_image_by_a_link(tmp_path):
    put(tmp_path, "good/1.png", "bad/2.png")
    (tmp_path / "masks").mkdir()
    os.symlink(tmp_path / "bad" / "2.png", tmp_path / "masks" / "2.png")
    assert "is the image itself" in " ".join(check(quiet(read, "folder", tmp_path)).message)


# ------------------------------------------------------------------------------------------------------------------- CSV and JSON


def labels(tmp_path: Path, data: bytes) -> Path:
    put(tmp_path, "a.png", "b ü.png")
    (tmp_path / "labels.csv").write_bytes(data)
    return tmp_path / "labels.csv"


GOOD = "image,label\na.png,0\nb ü.png,1\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.replace(",0", ",0.0").replace(",1\n", ",1.0\n"),
        GOOD.replace(",1", ", True "),
        GOOD.replace(",0\n", ",0\n\n,\n"),
        GOOD.replace("image,label", " Image , LABEL "),
        GOOD.replace(",1", ',"1"').replace("a.png", '"a.png"'),
        GOOD.replace(",0", ",OK").replace(",1", ",ng"),
        GOOD.replace("label\n", "label,defect\n").replace(",0", ",0,").replace(",1\n", ', 1, "bent, melted"\n'),
        GOOD.replace("image,label", "Path,is_anomalous"),
        GOOD.removesuffix("\n"),
        GOOD.replace(",1", ",1."),
    ],
)
def test_a_list_that_is_read(tmp_path, text):
    index = quiet(read_csv, labels(tmp_path, text.encode("utf-8")))
    assert index.image.tolist() == ["a.png", "b ü.png"] and index.anomalous.tolist() == [False, True]
    assert "missing" not in set(check(index).problem)


@pytest.mark.parametrize(
    "data, message",
    [
        (GOOD.encode("cp1252"), "labels.csv, line 3: the byte 0xfc is not UTF-8; save it as 'CSV UTF-8'"),
        (GOOD.encode("utf-16"), "UTF-16"),
        (GOOD.encode("utf-16-le"), "labels.csv, line"),
        (b"image,label\na.png,\x00\n", "NUL"),
        (GOOD.replace(",", ";").encode(), "semicolons"),
        (GOOD.replace(",", "\t").encode(), "tabs"),
        (GOOD.replace(",1", ",0.5").encode(), "line 3.*anomalous is '0.5'"),
        (GOOD.replace(",1", ',"1,0"').encode(), "line 3.*decimal comma"),
        (GOOD.replace(",1", ",maybe").encode(), "line 3, row 1"),
        (GOOD.replace(",1", ",").encode(), "line 3"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"image,label\n", "no images"),
        (b"image\na.png\n", "no column anomalous or label"),
        (b"label\n0\n", "no column image"),
        (b"image,label,label\na.png,0,1\n", "occurs twice"),
        (b"image,label,Label \na.png,0,1\n", "have one name"),
        (b"# made by hand\nimage,label\n", "line 2"),
        (b"#image,label\na.png,0\n", "the first line is a comment"),
        (b"image,label\na.png,0,extra\n", "line 2: 3 cells"),
        (b"image,label\na.png\n", "line 2: 1 cells"),
        (b'image,label\n"a.png,0\n', "line "),
        (b'image,label\n"a\nb.png",2\n', "line 3, row 0"),
        (b"image,label\n,1\n", "line 2.*image is empty"),
        (b"image,label,split\na.png,0,valid\n", "line 2.*split is 'valid'"),
        (b"image,label\na.png,0\na.png,1\n", "line 3: the image a.png occurs twice"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "labels.csv"),
        (b"PK\x03\x04\0\0\0", "labels.csv"),
    ],
)
def test_a_list_that_is_refused_with_file_line_and_cure(tmp_path, data, message):
    path = labels(tmp_path, data)
    with pytest.raises((ValueError, LayoutError), match=message) as error:
        quiet(read_csv, path)
    assert "labels.csv" in str(error.value)


def test_a_folder_called_like_a_list(tmp_path):
    (tmp_path / "labels.csv").mkdir()
    with pytest.raises(ValueError, match="labels.csv is a folder"):
        read_csv(tmp_path / "labels.csv")
    with pytest.raises(LayoutError):
        read("folder", tmp_path)


def test_the_command_names_file_and_cure(tmp_path, capsys):
    labels(tmp_path, GOOD.encode("cp1252"))
    assert main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "labels.csv, line 3" in said and "CSV UTF-8" in said and "Traceback" not in said


@pytest.mark.parametrize("call", ["load_index", "apply_split", "visa split", "visa defects", "headct"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_every_list_of_the_readers_is_read_so(tmp_path, call, encoding):
    put(tmp_path, "c/Data/Images/Normal/1.JPG", "head_ct/000.png")
    (tmp_path / "split_csv").mkdir()
    texts = {
        "load_index": ("i.csv", "category,split,image,anomalous\nü,test,a.png,0\n"),
        "apply_split": ("s.csv", "category,split,image,anomalous\nü,test,a.png,0\n"),
        "visa split": ("split_csv/1cls.csv", "image,split\nü.png,test\n"),
        "visa defects": ("c/image_anno.csv", "image,label\nü.png,x\n"),
        "headct": ("labels.csv", "id,hemorrhage\n0,ü\n"),
    }
    name, text = texts[call]
    (tmp_path / name).write_bytes(text.encode(encoding))
    calls = {
        "load_index": lambda: load_index(tmp_path / name, tmp_path),
        "apply_split": lambda: apply_split(make_index([ROW], tmp_path, "t"), tmp_path / name),
        "headct": lambda: read_headct(tmp_path),
    }
    with pytest.raises(ValueError, match=f"{name}.*UTF-"):
        quiet(calls.get(call, lambda: read("visa", tmp_path)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,h\n0,2\n", "line 2: anomalous is '2'"),
        ("id,h\nx,1\n", "line 2: 'x' is no number"),
        ("id,h\n0,1\n0,0\n", "occurs twice"),
        ("id\n0\n", "expected two columns"),
    ],
)
def test_headct_labels(tmp_path, text, message):
    put(tmp_path, "head_ct/000.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        quiet(read_headct, tmp_path)


META = {"test": {"c": [dict(img_path="good/1.png", mask_path="", cls_name="c", specie_name="good", anomaly=0)]}}


@pytest.mark.parametrize(
    "data, message",
    [
        (
            json.dumps(META).replace('"c"', '"\u00fc"', 1).replace("\\u00fc", "ü").encode("cp1252"),
            "meta.json, line 1: the byte 0xfc",
        ),
        (json.dumps(META).encode("utf-16"), "UTF-16"),
        (json.dumps(META).replace('": 0', '": NaN').encode(), "is not JSON"),
        (b'{"test": {}, "test": {}}', "occurs twice"),
        (b'{"test": []}', "test is a list"),
        (b'{"test": {"c": {}}}', "c is a dict"),
        (b'"x"', "expected 'train'"),
        (b"[" * 50_000, "nested too deeply"),
        (b"", "names no image"),
        (json.dumps(META).replace('"good/1.png"', "7").encode(), "record 0: image is 7"),
        (json.dumps(META).replace('"mask_path": ""', '"mask_path": ["a"]').encode(), "mask is"),
        (json.dumps(META).replace('"anomaly": 0', '"anomaly": 0.5').encode(), "anomalous is 0.5"),
    ],
)
def test_meta_that_is_refused_by_name(tmp_path, data, message):
    put(tmp_path, "good/1.png")
    (tmp_path / "meta.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        quiet(read_meta, tmp_path)
    assert "meta.json" in str(error.value)


def test_meta_is_whole_or_absent(tmp_path, monkeypatch):
    index = quiet(read, "folder", base(tmp_path))
    write_meta(index)
    before = (tmp_path / "meta.json").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_meta(index.assign(defect=["good", "other"]))
    assert (tmp_path / "meta.json").read_bytes() == before and not list(tmp_path.glob(".*tmp"))


def test_joining_keeps_what_is_known(tmp_path):
    parts = [told(read, "folder", base(tmp_path / name))[0] for name in ("a", "b")]
    assert check(concat_indices(parts)).problem.isin(["duplicate"]).all()
    assert pair([Path("a.png")], [Path("a_mask.png")]) == [Path("a_mask.png")]
