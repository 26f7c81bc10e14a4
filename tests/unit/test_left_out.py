"No file is left out without a word: every kind of file that a reader or `predict` passes over, with its reason and a count."

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from zsad_nb.cli.commands import main
from zsad_nb.data.folders import files, find_folder
from zsad_nb.data.images import batches, check
from zsad_nb.data.index import concat_indices, fingerprint, load_index, make_index, root_of, save_index
from zsad_nb.data.layouts import read_mvtec
from zsad_nb.data.left_out import left_out
from zsad_nb.data.listing import IMAGE_SUFFIXES, LayoutError, Record, image_suffixes, walk
from zsad_nb.data.meta import read_meta, write_meta
from zsad_nb.data.readers import read
from zsad_nb.data.stored import BadImage
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.sources import sources

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype("uint8")
MASK = np.zeros((16, 16), "uint8")
MASK[2:6, 2:6] = 255


def put(root: Path, *names: str, kind: str | None = None) -> Path:
    "Images; masks where the path says so; other files as they are named."
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            path.write_bytes(b"something")
        elif "mask" in name or "ground_truth" in name:
            Image.fromarray(MASK).save(path, kind)
        else:
            Image.fromarray(np.roll(PIXELS, sum(map(ord, name)), 0)).save(path, kind)
    return root


def told(function, *args, **options) -> tuple:
    "What a call returns, and its warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = function(*args, **options)
    return out, [str(warning.message) for warning in caught]


def base(root: Path) -> Path:
    return put(root, "good/1.png", "bad/2.png", "masks/2.png")


def reasons(index: pd.DataFrame) -> dict[str, int]:
    return {group["reason"]: group["count"] for group in left_out(index)}


# ------------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "suffix",
    [
        "jfif",
        "jpe",
        "jpeg",
        "JPG",
        "webp",
        "gif",
        "tif",
        "TIFF",
        "bmp",
        "ppm",
        "pgm",
        "tga",
        "pcx",
        "jp2",
        "png",
        "apng",
    ],
)
def test_ordinary_images_are_read(tmp_path, suffix):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "apng": "PNG"}
    put(base(tmp_path), f"bad/9.{suffix}", kind=kinds.get(suffix))
    index, said = told(read, "folder", tmp_path)
    assert f"bad/9.{suffix}" in set(index.image) and not any("not used" in text for text in said)
    assert [source.name for source in sources(tmp_path / "bad")] == [
        str(tmp_path / name) for name in sorted(("bad/2.png", f"bad/9.{suffix}"))
    ]


def test_documents_videos_icons_are_no_images():
    assert not {".pdf", ".eps", ".ps", ".mpg", ".ico", ".cur", ".h5", ".wmf", ".txt"} & set(image_suffixes())


# ------------------------------------------------------------------------------------------------- each kind, where it is told

KINDS = {  # name -> (files to add, links to add: path -> target, reason, count, a word of the sentence)
    "heic": (("bad/3.heic", "bad/4.HEIC"), {}, "suffix", 2, ".heic 2; first: bad/3.heic"),
    "raw": (("good/3.raw", "good/4.npy", "good/5.dcm"), {}, "suffix", 3, "first: good/3.raw"),
    "archive": (("rest.zip",), {}, "suffix", 1, ".zip 1; first: rest.zip"),
    "document": (("bad/scan.pdf",), {}, "suffix", 1, "no pixels of its own"),
    "video": (("bad/film.mpg",), {}, "suffix", 1, "a video"),
    "no suffix": (("bad/3",), {}, "suffix", 1, "no suffix 1; first: bad/3"),
    "space after the suffix": (("bad/3.png ",), {}, "suffix", 1, "first: bad/3.png "),
    "half a download": (("bad/3.png.part",), {}, "suffix", 1, ".part 1"),
    "hidden folder": (("bad/_old/3.png", "bad/.cache2/4.png"), {}, "hidden", 2, "first: bad/.cache2/4.png"),
    "hidden class": (("_draft/good/3.png",), {}, "hidden", 1, "_draft/good/3.png"),
    "hidden image": (("good/.3.png",), {}, "hidden", 1, "good/.3.png"),
    "deeper": (("good/2024/3.png", "bad/dent/deep/4.png"), {}, "deeper", 2, "first: bad/dent/deep/4.png"),
    "near name": (("normal_test/3.png", "good_images/4.png"), {}, "near", 2, "looks like"),
    "typing error": (("defectiv/3.png",), {}, "near", 1, "defectiv/ looks like defective/"),
    "second name": (("ok/3.png",), {}, "near", 1, "first: ok/3.png"),
    "elsewhere": (("holiday/3.png", "4.png"), {}, "elsewhere", 2, "first: 4.png"),
    "orphan mask": (("masks/7.png",), {}, "masks", 1, "first: masks/7.png"),
    "labelme": (("bad/2.json",), {}, "notes", 1, "bad/2.json"),
    "dangling folder": ((), {"bad/disk": "gone"}, "missing", 1, "first: bad/disk"),
    "dangling archive": ((), {"bad/disk.zip": "gone.zip"}, "missing", 1, "bad/disk.zip"),
    "loop": ((), {"bad/up": "."}, "twin", 1, "first: bad/up"),
    "link to itself": ((), {"bad/self": "bad/self"}, "missing", 1, "first: bad/self"),
    "results": (("out/results.csv", "out/settings.json", "out/pictures/1.png"), {}, "results", 1, "first: out"),
}


def add(root: Path, kind: str) -> Path:
    names, links, *_ = KINDS[kind]
    put(root, *names)
    for link, target in links.items():
        os.symlink(root / target, root / link)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_told_by_the_reader_and_by_check(tmp_path, kind):
    _, _, reason, count, word = KINDS[kind]
    index, said = told(read, "folder", add(base(tmp_path / "here"), kind))
    assert len(index) == 2 and reasons(index) == {reason: count}
    assert len(said) == 1 and said[0].startswith("here: not used: ") and word in said[0]
    problems = check(index)
    assert problems.problem.tolist() == ["left_out"] and word in problems.message[0] and problems.row.isna().all()


@pytest.mark.parametrize("kind", KINDS)
def test_told_after_the_record_is_lost(tmp_path, kind):
    "From a CSV, or after a pandas operation that dropped attrs: the folder is listed again."
    _, _, reason, count, word = KINDS[kind]
    index, _ = told(read, "folder", add(base(tmp_path / "here"), kind))
    bare = pd.DataFrame(index.to_dict())
    bare.attrs["root"] = str(tmp_path / "here")
    for again in (load_index(save_index(index, tmp_path / "lists" / "i.csv")), bare):
        problems = check(again)
        assert problems.problem.tolist() == ["left_out"] and problems.image[0]
        assert reasons(again) == {"unlisted" if reason in ("deeper", "near", "elsewhere") else reason: count}


@pytest.mark.parametrize(
    "litter",
    [
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "._2.png",
        "__MACOSX/good/1.png",
        "@eaDir/1.png/SYNOPHOTO.jpg",
        "readme.txt",
        "LICENSE",
        "labels.json",
        "bad/notes.md",
        ".git/a.png",
        "$RECYCLE.BIN/1.png",
        "SHA256SUMS",
        ".ipynb_checkpoints/1.png",
    ],
)
def test_nobodys_photographs_are_passed_over(tmp_path, litter):
    index, said = told(read, "folder", put(base(tmp_path), litter))
    assert said == [] and len(check(index)) == 0 and len(sources(tmp_path)) == 3 and sources(tmp_path).left_out == []


def test_one_warning_of_bounded_length(tmp_path):
    base(tmp_path)
    for kind in KINDS:
        add(tmp_path, kind)
    put(
        tmp_path,
        *(f"bad/{'x' * 200}{number}.heic" for number in range(300)),
        *(f"bad/1.s{number}" for number in range(50)),
    )
    index, said = told(read, "folder", tmp_path)
    assert len(said) == 1 and len(said[0]) < 3500 and ".heic 302" in said[0] and "and others" in said[0]
    assert set(reasons(index)) == {reason for _, _, reason, _, _ in KINDS.values()}


def test_a_name_cannot_forge_a_line(tmp_path):
    _, said = told(read, "folder", put(base(tmp_path), "bad/a\nError: all is lost\x1b[31m.heic"))
    assert "\n" not in said[0] and "\x1b" not in said[0] and r"a\nError" in said[0]


# --------------------------------------------------------------------------------------------------------- what users do with it


def test_the_record_survives_what_users_do(tmp_path):
    a, _ = told(read, "folder", put(base(tmp_path / "a"), "bad/3.heic"))
    b, _ = told(read, "folder", base(tmp_path / "b"))
    for same in (a[a.anomalous], a.sort_values("image"), a.copy(), pd.concat([a[:1], a[1:]], ignore_index=True)):
        assert reasons(same) == {"suffix": 1}
    both = concat_indices([a, b])
    assert left_out(both)[0]["first"] == "a/bad/3.heic" and check(both)[
        check(both).problem == "left_out"
    ].image.tolist() == ["a/bad/3.heic"]
    mixed = pd.concat(
        [a, make_index([dict(category="c", split="test", image="x.png", anomalous=False)], root_of(a), "x")]
    )
    assert root_of(mixed) == root_of(a)
    a.to_json(), a.to_dict()


def test_a_filtered_index_says_nothing_of_its_other_rows(tmp_path):
    index, _ = told(read, "folder", base(tmp_path))
    assert len(check(index[index.anomalous])) == 0 and len(check(index[:1])) == 0
    bare = load_index(save_index(index, tmp_path / "i.csv"))
    assert len(check(bare[bare.anomalous])) == 0


def test_several_data_sets_are_listed_each_in_its_folder(tmp_path):
    parts = [told(read, "folder", put(base(tmp_path / name), "bad/3.heic"))[0] for name in ("a", "b")]
    put(tmp_path, "another set/1.heic")
    both = concat_indices(parts)
    del both.attrs["left_out"]
    assert reasons(both) == {"suffix": 2}


def test_lists_count_what_they_do_not_name_in_one_line(tmp_path):
    put(base(tmp_path), "bad/3.png", "bad/4.png", "bad/5.heic", "bad/sub/6.png")
    (tmp_path / "labels.csv").write_text("image,label\ngood/1.png,0\nbad/2.png,1\n")
    from zsad_nb.data.folder import read_csv

    index, said = told(read_csv, tmp_path / "labels.csv")
    assert said == [] and reasons(index) == {"suffix": 1, "unlisted": 3, "masks": 1}
    assert "3 images that labels.csv does not name (first: bad/3.png)" in "\n".join(check(index).message)
    write_meta(index, tmp_path / "meta.json")
    assert reasons(read_meta(tmp_path)) == {"suffix": 1, "unlisted": 3, "masks": 1}


def test_a_csv_beside_the_folders_is_named(tmp_path):
    (base(tmp_path) / "labels.csv").write_text("image,label\ngood/1.png,1\n")
    index, said = told(read, "folder", tmp_path)
    assert len(index) == 2 and "labels.csv (the folders say what is normal" in said[0]


def test_what_lies_beside_a_wrapped_set(tmp_path):
    put(
        tmp_path,
        "BTech_Dataset_transformed/01/test/ok/1.png",
        "BTech_Dataset_transformed/01/test/ko/2.png",
        "BTech_Dataset_transformed/01/ground_truth/ko/2.png",
        "more/3.png",
    )
    index, said = told(read, "btad", tmp_path)
    assert any("more/3.png" in text for text in said) and reasons(index) == {"elsewhere": 1}


def test_a_defect_called_like_normal_images_is_questioned(tmp_path):
    put(
        tmp_path, "c/test/good/1.png", "c/test/good_images/2.png", "c/test/bent/3.png", "c/ground_truth/bent/3_mask.png"
    )
    index, said = told(read_mvtec, tmp_path)
    assert (
        any("good_images/ looks like good/" in text for text in said)
        and check(index).problem.tolist().count("left_out") == 1
    )


def test_no_images_says_what_lies_there_instead(tmp_path):
    put(tmp_path, "good/1.heic", "bad/2.heic")
    with pytest.raises(LayoutError, match=r"2 files of types that are not read \(\.heic 2"):
        read("folder", tmp_path)
    with pytest.raises(ValueError, match=r"\.heic 2"):
        sources(tmp_path)
    put(tmp_path / "near", "normal_test/1.png", "defective_test/2.png")
    with pytest.raises(LayoutError, match="looks like"):
        read("folder", tmp_path / "near")


# ------------------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("layout", ["folder", "mvtec"])
def test_an_image_or_mask_that_is_not_there_stays_and_is_missing(tmp_path, layout):
    root = (
        base(tmp_path)
        if layout == "folder"
        else put(tmp_path, "c/test/good/1.png", "c/test/bad/2.png", "c/ground_truth/bad/2_mask.png")
    )
    bad, masks, end = ("bad", "masks", "") if layout == "folder" else ("c/test/bad", "c/ground_truth/bad", "_mask")
    for link in (f"{bad}/3.png", f"{bad}/4.png", f"{masks}/4{end}.png"):
        os.symlink(tmp_path / "annex" / "gone.png", root / link)
    put(root, f"{masks}/3{end}.png")
    index, said = told(read, layout, root)
    assert len(index) == 4 and any(
        "3 images or masks that are links to nothing" in text and "dvc pull" in text for text in said
    )
    problems = check(index)
    assert problems.problem.tolist() == ["missing", "missing", "missing_mask"]
    with pytest.raises(FileNotFoundError, match="run check"):
        fingerprint(index, "content")
    with pytest.raises(BadImage, match="no such file"):
        list(batches(index, 16))


def test_linked_data_sets_are_read_and_silent(tmp_path):
    "Classes on another disk, images that are links into a store."
    put(tmp_path / "disk", "cap/good/1.png", "cap/bad/2.png", "store/ab12.png")
    (tmp_path / "set" / "lid" / "good").mkdir(parents=True)
    os.symlink(tmp_path / "disk" / "cap", tmp_path / "set" / "cap")
    os.symlink(tmp_path / "disk" / "store" / "ab12.png", tmp_path / "set" / "lid" / "good" / "1.png")
    index, said = told(read, "folder", tmp_path / "set")
    assert index.image.tolist() == ["cap/good/1.png", "cap/bad/2.png", "lid/good/1.png"] and said == []
    assert set(check(index).problem) <= {"missing_mask"}


def test_loops_end_and_every_file_is_found_once(tmp_path):
    put(tmp_path / "photos", "a/1.png", "b/2.png")
    put(tmp_path / "disk", "3.png")
    for link, target in (
        ("photos/monday", "disk"),
        ("photos/tuesday", "disk"),
        ("photos/a/up", "photos"),
        ("photos/out", ""),
        ("disk/back", "photos"),
        ("photos/again", "photos/b"),
    ):
        os.symlink(tmp_path / target, tmp_path / link)
    found = sources(tmp_path / "photos")
    assert [Path(source.name).relative_to(tmp_path).as_posix() for source in found] == [
        "photos/a/1.png",
        "photos/b/2.png",
        "photos/monday/3.png",
    ]
    assert {group["reason"]: group["count"] for group in found.left_out} == {"twin": 5}
    assert len(sources(f"{tmp_path}/photos/**/*.png")) == 3
    assert len([entry for entry in walk(tmp_path / "photos") if entry.kind == "file"]) == 3


def test_what_cannot_be_opened_is_named(tmp_path, permissions_hold):
    put(base(tmp_path), "bad/locked/3.png")
    os.mkfifo(tmp_path / "bad" / "4.png")
    (tmp_path / "bad" / "locked").chmod(0)
    try:
        found = sources(tmp_path)
        assert {group["reason"] for group in found.left_out} == {"closed", "special"}
        with pytest.raises(LayoutError, match="may not be opened; change its permissions"):
            read("folder", tmp_path)
    finally:
        (tmp_path / "bad" / "locked").chmod(0o700)


def test_a_listing_is_bounded(tmp_path):
    put(tmp_path, *(f"{number}.txt" for number in range(20)))
    entries = walk(tmp_path, limit=5)
    assert len(entries) == 6 and "more" in {entry.kind for entry in entries}


# ----------------------------------------------------------------------------------------------------------------------- predict


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    return Inspector.load("self_distance", image_size=32)


PREDICTED = {
    "heic": "suffix",
    "raw": "suffix",
    "archive": "suffix",
    "document": "suffix",
    "no suffix": "suffix",
    "hidden image": "hidden",
    "dangling folder": "missing",
    "loop": "twin",
    "link to itself": "missing",
    "results": "results",
}


@pytest.mark.parametrize("kind", PREDICTED)
def test_the_summary_of_predict_says_what_was_not_looked_at(inspector, tmp_path, kind):
    add(base(tmp_path), kind)
    table = inspector.predict(tmp_path, progress=False)
    groups = table.attrs["summary"]["left_out"]
    assert (
        len(table) == 3
        and [group["reason"] for group in groups] == [PREDICTED[kind]]
        and groups[0]["count"] == KINDS[kind][3]
    )


def test_the_last_lines_of_the_command(tmp_path, capsys):
    add(put(base(tmp_path / "in"), "bad/3.heic"), "loop")
    assert (
        main(
            [
                "predict",
                str(tmp_path / "in"),
                "--out",
                str(tmp_path / "out"),
                "-p",
                "image_size",
                "32",
                "--pictures",
                "none",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "3 images, 0 without a result" in said
        and said.count("left out  ") == 2
        and ".heic 1" in said
        and "linked folder" in said
    )
    assert main(["check", str(tmp_path / "in"), "--dataset", "folder"]) == 1
    assert "left_out: 1 file of a type that is not read (.heic 1" in capsys.readouterr().out


def test_stream_and_calibration_say_it_too(inspector, tmp_path):
    put(tmp_path, *(f"good/{number}.png" for number in range(12)), "good/x.heic")
    with pytest.warns(UserWarning, match="not looked at: 1 file of a type"):
        list(inspector.stream(tmp_path))
    with pytest.warns(UserWarning, match="not looked at: 1 file of a type"):
        Inspector(inspector.method).calibrate(tmp_path, rate=0.2, progress=False)


def test_a_pattern_tells_what_it_met(tmp_path):
    put(tmp_path, "a/1.png", "a/2.heic", "a/notes.txt")
    assert [group["text"] for group in sources(f"{tmp_path}/a/*").left_out][0].startswith(
        "1 file of a type that is not read (.heic 1"
    )
    with pytest.raises(ValueError, match=r"no image fits the pattern.*\.heic 1"):
        sources(f"{tmp_path}/a/*.heic")


def test_overlays_have_names_of_their_own_on_every_disk(tmp_path):
    put(tmp_path, "a/1.png", "a/1.PNG", "A/1.png")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this disk does not tell a from A")
    pictures = [source.picture for source in sources(tmp_path)]
    assert len({picture.lower() for picture in pictures}) == 3


# ----------------------------------------------------------------------------------------------------------- listing functions


def test_files_and_find(tmp_path):
    put(tmp_path, "Good/1.png", "GOOD/2.png")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this disk does not tell Good from GOOD")
    with pytest.raises(LayoutError, match="GOOD/ and Good/.*are both called good"):
        find_folder(tmp_path, "good")
    shutil.move(tmp_path / "GOOD", tmp_path / "good")
    assert find_folder(tmp_path, "good").name == "good"  # the exact name wins; the other one is left out, with a word
    index, said = told(read, "folder", put(tmp_path, "bad/3.png"))
    assert len(index) == 2 and "Good/ looks like good/" in said[0]
    assert files(tmp_path / "nowhere") == []


def test_records_compare_equal_so_that_roots_survive():
    assert Record([1]) == Record([2]) and not Record([1]) != Record([]) and Record([1]) != "text"
