"The few functions that every name, table, record and lock goes through: rules, held against any text."

import csv
import io
import json
import math
import os
import re
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsad_nb.core.files import (
    FileNames,
    inside,
    open_lock,
    owned_only,
    private_folder,
    read_json,
    safe_name,
    to_json,
    write_atomically,
    write_json,
)
from zsad_nb.core.names import require_utf8, same_name, shown
from zsad_nb.core.tables import read_table, spreadsheet_safe, spreadsheet_text, table_text, write_table

NAMES = [
    "NA",
    "None",
    "null",
    "nan",
    "NaN",
    "007",
    "1e5",
    "-inf",
    "True",
    "",
    " ",
    "=1+1",
    "'=1",
    "''@x",
    "+",
    "-",
    "\t",
    "a\rb",
    "a\r\nb",
    'a"b',
    "a;b",
    "$x$",
    "<b>",
    "\\",
    "瓶",
    "Pru\u0308fling",
    "\u202egnp",
    "../../x",
    "/etc",
    "con",
    "a" * 500,
    ".",
    "..",
    "~",
    "-rf",
    "a\x00b",
    "pr\udcfcf",
]
printable = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    NAMES[:-2]
)
anything = (
    st.text(max_size=12)
    | st.sampled_from(NAMES)
    | st.text(st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF), max_size=3)
)


# ---------------------------------------------------------------------------------------------------------- names


@given(anything)
@settings(max_examples=300)
def test_a_shown_name_is_one_printable_line(text):
    seen = shown(text)
    assert len(seen.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f\u202e\ud800-\udfff]", seen)
    seen.encode("utf-8")


@pytest.mark.parametrize("text", ["pr\udcfcf.png", "\udcff"])
def test_a_name_that_is_not_utf8_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"bad/: the name .*\\udc.* is not UTF-8.*rename") as caught:
        require_utf8(text, "bad/: ")
    str(caught.value).encode("ascii")


@given(st.lists(anything, unique=True, max_size=8))
@settings(max_examples=300)
def test_every_text_has_a_file_name_of_its_own(texts):
    names = FileNames(reserved=["overview", "index"])
    made = [names.name(text) for text in texts]
    assert made == [names.name(text) for text in texts]
    assert len({same_name(name) for name in [*made, "overview", "index"]}) == len(made) + 2
    for name in made:
        assert 0 < len(name.encode()) < 200 and Path(name).name == name and name[0] not in ".-" and shown(name) == name
        assert not re.search(r'[/\\:*?"<>|\x00-\x1f]', name) and name.lower().partition(".")[0] not in (
            "con",
            "nul",
            "aux",
            "prn",
        )


def test_ordinary_names_stay():
    for text in ("bottle", "metal_nut", "01", "Woven_001", "瓶", "Prüfling 7", "a.b", "M6"):
        assert safe_name(text) == text


@pytest.mark.slow
@given(st.lists(anything, max_size=4))
@settings(max_examples=300)
def test_nothing_is_written_outside(tmp_path_factory, parts):
    root = tmp_path_factory.getbasetemp() / "root" / "deep"
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "away").is_symlink():
        os.symlink("..", root / "away")
    for more in ((), ("away", "x"), ("sub",)):
        try:
            path = inside(root, *parts, *more)
        except ValueError:
            continue
        assert os.path.realpath(path) == str(root) or os.path.realpath(path).startswith(f"{root}{os.sep}")


# ---------------------------------------------------------------------------------------------------------- JSON

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=8,
)


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


@given(values)
@settings(max_examples=300)
def test_everything_written_is_json(value):
    text = to_json(value)
    text.encode("utf-8")
    json.loads(text, parse_constant=refuse)


@given(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200)
def test_a_file_is_read_or_named(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "odd.json"
    path.write_bytes(data)
    try:
        value = read_json(path)
    except ValueError as error:
        assert "odd.json cannot be read as JSON" in str(error)
    else:
        write_json(path, value)
        assert read_json(path) == value


def test_json_that_is_too_large_deep_or_a_folder(tmp_path):
    (tmp_path / "large.json").write_text("[" + "1," * 40_000 + "1]")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "folder.json").mkdir()
    for name, options in (("large", dict(limit_mb=0.05)), ("deep", {}), ("folder", {})):
        with pytest.raises(ValueError, match=f"{name}.json cannot be read as JSON"):
            read_json(tmp_path / f"{name}.json", **options)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_values_of_numpy_become_plain():
    value = dict(
        a=np.float32(0.5),
        b=np.arange(3),
        c=Path("x") / "y",
        d={2, 1},
        e=(np.nan, np.inf, np.bool_(True)),
        f=np.int64(3),
    )
    assert json.loads(to_json(value)) == dict(a=0.5, b=[0, 1, 2], c="x/y", d=[1, 2], e=[None, None, True], f=3)
    with pytest.raises(TypeError, match=r"value\.a\[1\] is a object"):
        to_json(dict(a=[1, object()]))


# ---------------------------------------------------------------------------------------------------------- tables


@given(anything)
@settings(max_examples=500)
def test_a_cell_runs_nowhere_and_comes_back(text):
    cell = spreadsheet_safe(text)
    assert not re.match("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]", cell)
    assert spreadsheet_text(cell) == text


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(printable, printable, st.floats(allow_infinity=False), st.integers(-(2**62), 2**62), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=200)
def test_a_table_comes_back_to_the_last_digit(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    table = pd.DataFrame(rows, columns=["category", "=heading", "value", "count", "flag"]).astype({"value": float})
    write_table(table, path)
    back = read_table(path, numbers="rest", text=["category", "=heading"])
    pd.testing.assert_frame_equal(back, table, check_dtype=False, check_exact=True)
    assert len(list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))) == len(rows) + 1
    assert len(pd.read_csv(path, dtype=str, keep_default_na=False)) == len(rows)


def test_an_index_an_empty_table_and_one_column(tmp_path):
    table = pd.DataFrame(dict(image_auroc=[0.5, math.nan]), index=pd.Index(["NA", "=x"], name="category"))
    write_table(table, tmp_path / "t.csv", index=True)
    assert (tmp_path / "t.csv").read_text() == "category,image_auroc\nNA,0.5\n'=x,\n"
    assert read_table(tmp_path / "t.csv", numbers=["image_auroc"])["category"].tolist() == ["NA", "=x"]
    write_table(table.iloc[:0], tmp_path / "e.csv", index=True)
    assert read_table(tmp_path / "e.csv").columns.tolist() == ["category", "image_auroc"]
    write_table(pd.DataFrame(dict(a=["", "x"])), tmp_path / "o.csv")
    assert read_table(tmp_path / "o.csv")["a"].tolist() == ["", "x"]
    assert table_text(pd.DataFrame(dict(a=[0.123456789])), float_format="%.1f") == "a\n0.1\n"


def test_a_name_that_is_not_utf8_is_written_out(tmp_path):
    write_table(pd.DataFrame(dict(path=pd.Series(["pr\udcfcf.png"], dtype=object))), tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv")["path"].tolist() == [r"pr\udcfcf.png"]


# ---------------------------------------------------------------------------------------------------------- files of others


def test_the_umask_is_never_touched(tmp_path, monkeypatch):
    "Eight threads write; a ninth would make a file that others can write if the mask were 0 for an instant."
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask of the whole process was changed"))
    threads = [
        threading.Thread(
            target=lambda n=n: [write_atomically(tmp_path / f"{n}-{k}", lambda p: p.write_text("x")) for k in range(20)]
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 160


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", lambda p: p.write_text("x"))
        (tmp_path / "b").write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_long_name_and_a_name_that_is_not_utf8_are_written(tmp_path):
    for name in ("x" * 250, "é" * 120, "pr\udcfcf"):
        write_atomically(tmp_path / name, lambda p: p.write_text("whole"))
        assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    os.symlink(tmp_path / "thesis", tmp_path / "result")
    write_atomically(tmp_path / "result", lambda p: p.write_text("new"))
    assert (tmp_path / "thesis").read_text() == "years of work" and (tmp_path / "result").read_text() == "new"


@pytest.mark.parametrize("kind", ["link", "dangling", "second name", "folder", "pipe"])
def test_a_lock_is_a_file_of_its_own(tmp_path, kind):
    victim = tmp_path / "thesis"
    place = tmp_path / ".lock"
    victim.write_text("years of work")
    if kind == "link":
        os.symlink(victim, place)
    if kind == "dangling":
        os.symlink(tmp_path / "nowhere", place)
    if kind == "second name":
        os.link(victim, place)
    if kind == "folder":
        place.mkdir()
    if kind == "pipe":
        os.mkfifo(place)
    with pytest.raises(OSError, match="cannot be used as a lock .*delete it, or choose another folder"):
        open_lock(place)
    assert victim.read_text() == "years of work" and not (tmp_path / "nowhere").exists()


def test_a_folder_that_others_can_enter_is_not_private(tmp_path):
    assert private_folder(tmp_path / "new").stat().st_mode & 0o777 == 0o700
    owned_only(tmp_path / "new")
    for mode in (0o750, 0o707, 0o777):
        (tmp_path / "new").chmod(mode)
        with pytest.raises(PermissionError, match="not a folder of this user alone"):
            private_folder(tmp_path / "new")
    (tmp_path / "new" / "answer").write_text("x")
    with pytest.raises(PermissionError, match="could have been written by other users"):
        owned_only(tmp_path / "new" / "answer")
    os.symlink(tmp_path / "new", tmp_path / "link")
    for call in (private_folder, owned_only):
        with pytest.raises(PermissionError):
            call(tmp_path / "link")
