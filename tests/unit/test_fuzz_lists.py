"Lists that nobody thought of: an index comes back as it was, a damaged list is refused in words, and no path leaves its root."

import json
import os
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsad_nb.core.names import same_name
from zsad_nb.data.folder import read_csv
from zsad_nb.data.index import apply_split, load_index, make_index, relative_path, save_index, save_split
from zsad_nb.data.left_out import grouped, unused
from zsad_nb.data.meta import read_meta, write_meta

WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20)
FILES = WORDS.filter(
    lambda word: (
        "/" not in word
        and "\\" not in word
        and ":" not in word
        and word not in (".", "..")
        and len(word.encode()) < 250
    )
)
PATHS = (
    st.lists(
        st.sampled_from(["a", "..", ".", "/", "\\", "C:", "~", "\0", "b.png", "//", "http://", " ", "é"]), max_size=12
    ).map("".join)
    | st.lists(st.sampled_from(["a", "..", ".", "", "C:", "b.png", "link"]), max_size=6).map("/".join)
    | st.lists(st.sampled_from(["a", "..", "b"]), max_size=5).map("\\".join)
)


@st.composite
def indices(draw) -> pd.DataFrame:
    "Any index that can be made."
    names = draw(st.lists(FILES, min_size=1, max_size=6, unique_by=same_name))
    rows = []
    for number, name in enumerate(names):
        anomalous = draw(st.booleans())
        defect = draw(WORDS | st.just("")) if anomalous else "good"
        rows.append(
            dict(
                dataset=draw(WORDS),
                category=draw(WORDS),
                split=draw(st.sampled_from(["train", "test"])),
                image=f"i/{name}.png",
                mask=f"m/{number}.png" if anomalous and draw(st.booleans()) else "",
                anomalous=anomalous,
                defect="x" if anomalous and defect == "good" else defect,
            )
        )
    return make_index(rows, tempfile.gettempdir())


@pytest.mark.slow
@given(indices())
def test_an_index_comes_back_from_csv(index):
    with tempfile.TemporaryDirectory() as folder:
        pd.testing.assert_frame_equal(load_index(save_index(index, Path(folder) / "i.csv")), index)
        pd.testing.assert_frame_equal(apply_split(index, save_split(index, Path(folder) / "s.csv")), index)


@given(indices())
def test_an_index_comes_back_from_meta(index):
    index = index.assign(mask="", dataset="d").sort_values(["split"], ascending=False, kind="stable")
    wanted = pd.concat(
        [part for _, half in index.groupby("split", sort=False) for _, part in half.groupby("category", sort=False)]
    )
    wanted = wanted.assign(
        defect=["x" if bad and word == "good" else word for bad, word in zip(wanted.anomalous, wanted.defect)]
    ).reset_index(drop=True)
    wanted.attrs = dict(index.attrs)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = read_meta(write_meta(wanted, Path(folder) / "meta.json"), root=folder, dataset="d")
    pd.testing.assert_frame_equal(again, wanted)


@given(PATHS | st.text(max_size=30))
def test_a_path_stays_below_its_root_or_is_refused(path):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        (root / "a").mkdir(parents=True)
        os.symlink(folder, root / "link")
        try:
            inside = relative_path(path, root)
        except ValueError as error:
            assert str(error)
            return
        assert inside == "" or (
            not os.path.isabs(inside) and os.path.normpath(inside) == inside and ".." not in inside.split("/")
        )
        assert os.path.abspath(root / inside).startswith(str(root))


@given(
    st.binary(max_size=80)
    | st.text(st.sampled_from('image,label\n\r";\t01.é#\0 '), max_size=60).map(lambda text: text.encode())
    | st.lists(
        st.sampled_from(
            [
                b"image,label\n",
                b"a.png,0\n",
                b"b.png,1.0\n",
                b'"c,',
                b"\xff",
                b"\n",
                b",\n",
                b"image;label\n",
                b"\xef\xbb\xbf",
            ]
        ),
        max_size=6,
    ).map(b"".join)
)
def test_any_list_is_read_or_refused_in_words(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.csv"
        path.write_bytes(data)
        for call in (read_csv, lambda path: load_index(path, folder)):
            try:
                index = call(path)
            except (ValueError, FileNotFoundError) as error:
                assert "labels.csv" in str(error) and "codec" not in str(error)
            else:
                assert len(index) or call is not read_csv


RECORDS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(allow_nan=True)
    | st.sampled_from(["", "a.png", "../a", "c", "0", "good"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "train",
                    "test",
                    "Test",
                    "c",
                    "img_path",
                    "mask_path",
                    "cls_name",
                    "specie_name",
                    "anomaly",
                    "dataset_name",
                    "label",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(
    RECORDS
    | st.fixed_dictionaries(
        dict(
            test=st.fixed_dictionaries(
                dict(
                    c=st.lists(
                        st.fixed_dictionaries(
                            dict(
                                img_path=PATHS,
                                cls_name=st.just("c"),
                                anomaly=st.sampled_from([0, 1, "1", 2]),
                                mask_path=PATHS,
                            )
                        ),
                        max_size=3,
                    )
                )
            )
        )
    )
)
def test_any_json_is_read_or_refused_in_words(value):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "meta.json"
        path.write_text(json.dumps(value))
        try:
            index = read_meta(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(error)
        else:
            assert all(not os.path.isabs(image) and not image.startswith("..") for image in index.image)


@given(
    st.lists(
        st.sampled_from(
            [
                "good/1.png",
                "bad/2.png",
                "bad/x/3.png",
                ".h/4.png",
                "_h/5.png",
                "6.heic",
                "masks/7.png",
                "n.txt",
                "bad/é.png",
                "8",
            ]
        ),
        unique=True,
    ),
    st.sets(st.sampled_from(["good/1.png", "bad/2.png", "masks/7.png"])),
)
def test_every_file_is_used_or_counted(names, used):
    "Nothing that could be a photograph is in neither."
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).parent.mkdir(exist_ok=True, parents=True)
            (Path(folder) / name).touch()
        rest = unused(folder, used)
        assert {entry.path for entry in rest} == set(names) - used - {"n.txt"}
        assert sum(group["count"] for group in grouped(rest)) == len(rest)
