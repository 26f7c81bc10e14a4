"Maps belong to pixels: an image that was replaced, a row that was moved, a file that was damaged is noticed, and the way out is said."

import json
import os
import shutil
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from zsad_nb.backbones import engines
from zsad_nb.backbones.engines import Engine
from zsad_nb.data.index import make_index
from zsad_nb.explore import maps_store
from zsad_nb.explore.map_records import DONE, ROW, UNREADABLE
from zsad_nb.explore.maps_store import MapStore, make_store, open_store
from zsad_nb.methods.base import create

COUNT, SIZE = 4, 32


@pytest.fixture(scope="module")
def method():
    return create("self_distance", image_size=SIZE, tap=1, weights="random:0")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(COUNT):
        picture(i).save(tmp_path / "data" / f"{i}.bmp")
    return make_index(
        [
            dict(image=f"{i}.bmp", category="c", split="test", anomalous=bool(i % 2), defect="x" if i % 2 else "good")
            for i in range(COUNT)
        ],
        tmp_path / "data",
        "set",
    )


@pytest.fixture
def store(method, data, tmp_path) -> MapStore:
    made = make_store(method, data, tmp_path / "maps", dtype="float32")
    assert made.compute(progress=False) == COUNT
    return made


def fresh(method, data, tmp_path, row):
    "What a new store says of a row."
    other = make_store(method, data, tmp_path / "another", dtype="float32")
    return other.map(row), float(other.rows["score"][row])


def same_name(path, mode):
    "Another image under the old name; every file of this kind has one size."
    about = os.stat(path)
    if mode == "written over":
        picture(99).save(path)
    else:
        picture(99).save(path.with_name("new.bmp"))
        if mode != "renamed":
            os.utime(path.with_name("new.bmp"), ns=(about.st_atime_ns, about.st_mtime_ns))
        if mode == "copied over with its time":
            path.write_bytes(path.with_name("new.bmp").read_bytes())
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        else:
            os.replace(path.with_name("new.bmp"), path)
    assert os.stat(path).st_size == about.st_size and (
        mode in ("written over", "renamed") or os.stat(path).st_mtime_ns == about.st_mtime_ns
    )


MODES = ["written over", "renamed", "renamed with its time", "copied over with its time"]


@pytest.mark.parametrize("mode", MODES)
def test_a_replaced_image_gets_its_own_map(method, data, tmp_path, store, mode):
    "When the store is made again, when it is opened with its method, and while it is open."
    before = store.map(0)
    same_name(tmp_path / "data" / "0.bmp", mode)
    again = make_store(method, data, tmp_path / "maps", dtype="float32")
    assert again.missing.tolist() == [0] and again.compute(progress=False) == 1
    expected, score = fresh(method, data, tmp_path, 0)
    opened = open_store(store.folder, method)
    for one in (again, opened, store):
        assert np.array_equal(one.map(0), expected) and not np.array_equal(expected, before)
        assert float(one.rows["score"][0]) == score


@pytest.mark.parametrize("mode", MODES)
def test_without_the_method_the_cure_is_said(data, tmp_path, store, mode):
    looking = open_store(store.folder)
    looking.map(1)
    same_name(tmp_path / "data" / "1.bmp", mode)
    with pytest.raises(
        ValueError, match=r"1\.bmp was replaced since its map in .*make_store\(method, index\)\.compute\(\)"
    ):
        looking.map(1)
    with pytest.warns(
        UserWarning, match=r"1 of 4 images of .* were replaced .*1\.bmp.*make_store\(method, index\)\.compute\(\)"
    ):
        later = open_store(store.folder)
    assert later.done == COUNT - 1 and np.array_equal(later.map(2), store.map(2))
    with pytest.raises(ValueError, match=r"1\.bmp was replaced"):
        later.rendering(1)


def test_the_same_pixels_are_not_computed_again(method, data, tmp_path, store, monkeypatch):
    "A touch, a copy of the data set, another inode: hashed once, then known."
    for i in range(COUNT):
        os.utime(tmp_path / "data" / f"{i}.bmp", ns=(1, 10**18))
    shutil.copy(tmp_path / "data" / "0.bmp", tmp_path / "data" / "x")
    os.replace(tmp_path / "data" / "x", tmp_path / "data" / "0.bmp")
    hashed = []
    real = maps_store.file_content
    monkeypatch.setattr(maps_store, "file_content", lambda path: (hashed.append(path), real(path))[1])
    monkeypatch.setattr(maps_store, "settled_state", lambda state: state)  # as two seconds later
    assert (
        make_store(method, data, tmp_path / "maps", dtype="float32").compute(progress=False) == 0
        and len(hashed) == COUNT
    )
    assert (
        make_store(method, data, tmp_path / "maps", dtype="float32").compute(progress=False) == 0
        and len(hashed) == COUNT
    )


def test_ten_thousand_rows_are_looked_at_quickly(method, data, tmp_path, store, monkeypatch):
    monkeypatch.setattr(maps_store, "settled_state", lambda state: state)
    store.refresh()
    begun = time.process_time()
    for _ in range(200):
        store.refresh()
    assert time.process_time() - begun < 2, "a thousandth of a second a row would be too slow"


def test_an_image_replaced_while_it_is_looked_at_is_not_kept(method, data, tmp_path, monkeypatch):
    made = make_store(method, data, tmp_path / "maps", dtype="float32")
    real = type(method).predict

    def predict(self, batch, *a):
        same_name(tmp_path / "data" / "2.bmp", "renamed")
        return real(self, batch, *a)

    with monkeypatch.context() as patch:
        patch.setattr(type(method), "predict", predict)
        made.compute(progress=False)
    assert made.missing.tolist() == [2] and made.compute(progress=False) == 1
    assert np.array_equal(made.map(2), fresh(method, data, tmp_path, 2)[0])


def test_an_unreadable_image_that_was_mended_gets_its_map(method, data, tmp_path):
    (tmp_path / "data" / "3.bmp").write_bytes(b"half")
    made = make_store(method, data, tmp_path / "maps", dtype="float32")
    made.compute(progress=False)
    assert made.rows["state"].tolist() == [DONE] * 3 + [UNREADABLE]
    picture(3).save(tmp_path / "data" / "3.bmp")
    assert make_store(method, data, tmp_path / "maps", dtype="float32").compute(progress=False) == 1


def test_what_was_kept_of_another_image_is_not_shown(method, data, tmp_path, store):
    box = store.keep(0)
    kept = store.inside(0).maps
    same_name(tmp_path / "data" / "0.bmp", "renamed")
    name = next(iter(kept))
    assert not np.array_equal(store.inside(0).maps[name], kept[name])
    again = open_store(store.folder, method)
    again.compute(progress=False)
    assert not np.array_equal(again.inside(0).maps[name], kept[name])
    again.keep(1)
    shutil.copy(store._box(1), box)  # of another row
    assert not np.array_equal(open_store(store.folder, method).inside(0).maps[name], again.inside(1).maps[name])
    for content in (b"", b"PK\x03\x04", box.read_bytes()[:500]):
        box.write_bytes(content)
        assert open_store(store.folder, method).inside(0).maps
        with pytest.raises(ValueError, match="damaged or of another image"):
            open_store(store.folder).inside(0)


# ---- files that are not what was written
def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_map_is_made_again_or_named(method, data, store):
    expected = store.map(2)
    flipped(store._file, 2 * SIZE * SIZE * 4 + 7)
    with pytest.raises(ValueError, match=r"the map of row 2 .* is damaged .*make_store\(method, index\)\.compute\(\)"):
        open_store(store.folder).map(2)
    assert np.array_equal(open_store(store.folder, method).map(2), expected) and np.array_equal(
        open_store(store.folder).map(2), expected
    )


def test_maps_and_records_that_changed_places(method, data, store):
    expected = [store.map(r) for r in range(COUNT)]
    for name, size in (("maps.f32", SIZE * SIZE * 4), ("rows.bin", ROW.itemsize)):
        content = (store.folder / name).read_bytes()
        parts = [content[i * size : (i + 1) * size] for i in range(COUNT)]
        (store.folder / name).write_bytes(b"".join([parts[1], parts[0], *parts[2:]]))
        again = open_store(store.folder, method)
        for row in range(COUNT):
            assert np.array_equal(again.map(row), expected[row]), (name, row)


def test_every_byte_of_a_record_counts(store):
    for at in range(0, ROW.itemsize, 7):
        flipped(store.folder / "rows.bin", ROW.itemsize + at)
        assert open_store(store.folder).missing.tolist() == [1], at
        flipped(store.folder / "rows.bin", ROW.itemsize + at)
    assert open_store(store.folder).done == COUNT


@pytest.mark.parametrize("name", ["maps.f32", "rows.bin"])
def test_a_file_of_another_length_is_named(store, name):
    content = (store.folder / name).read_bytes()
    for other in (content[:-1], content + b"x", b"", None):
        (store.folder / name).unlink() if other is None else (store.folder / name).write_bytes(other)
        with pytest.raises(
            ValueError,
            match=rf"{name} of .* (is|are) not there, or not of the length.*make_store\(method, index\)\.compute\(\)",
        ):
            open_store(store.folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:1] + lines[2:],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: lines + [lines[1].replace("0.bmp", "new.bmp")],
        lambda lines: [lines[0], lines[1].replace("0.bmp", "new.bmp"), *lines[2:]],
    ],
    ids=["deleted", "moved", "added", "renamed"],
)
def test_rows_of_the_index(store, change):
    path = store.folder / "index.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(
        ValueError,
        match=r"index\.csv of .* is not the one that its maps were made from.*make_store\(method, index\)\.compute\(\)",
    ):
        open_store(store.folder)


HEADERS = {
    "no JSON": "{",
    "NaN": '{"size": NaN}',
    "a list": "[]",
    "empty": "{}",
    "format": dict(format=1),
    "size": dict(size=10**9),
    "size is a text": dict(size="32"),
    "size is true": dict(size=True),
    "dtype": dict(dtype="object"),
    "types": dict(types=[1]),
    "types are a text": dict(types="x"),
    "rows": dict(rows="4"),
    "method": dict(method=None),
    "layers": dict(layers=[{}]),
}


@pytest.mark.parametrize("what", HEADERS)
def test_an_odd_description(method, data, tmp_path, store, what):
    change = HEADERS[what]
    path = store.folder / "store.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    for door in (
        lambda: open_store(store.folder),
        lambda: make_store(method, data, tmp_path / "maps", dtype="float32"),
    ):
        with pytest.raises(ValueError) as caught:
            door()
        assert store.folder.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_store_of_another_method(method, data, tmp_path, store):
    other = create("self_distance", image_size=SIZE, tap=2, weights="random:0")
    with pytest.raises(ValueError, match="was not made by this self_distance"):
        open_store(store.folder, other)
    theirs = make_store(other, data, tmp_path / "maps", dtype="float32")
    shutil.copy(theirs.folder / "store.json", store.folder / "store.json")
    with pytest.raises(ValueError, match="is that of another store"):
        make_store(method, data, tmp_path / "maps", dtype="float32")


def test_a_store_without_its_images_still_answers(data, tmp_path, store):
    expected = store.map(0)
    shutil.rmtree(tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(open_store(store.folder).map(0), expected)


# ---- engines' graphs
def test_an_engine_deletes_only_what_an_engine_wrote(tmp_path):
    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in ("about.json", *files):
            (tmp_path / name / file).write_bytes(b"0" * 1000)

    folder("ours", "graph.onnx", "reference.safetensors", "checked-openvino-fp32.json", "int8-0123456789ab.onnx")
    folder("project", "notes.txt")
    folder("new", "graph.onnx")
    (tmp_path / ".new-theirs").mkdir()
    (tmp_path / ".new-theirs" / "notes.txt").write_text("keep me")
    os.utime(tmp_path / ".new-theirs", (1, 1))
    (tmp_path / "link").symlink_to(tmp_path / "project")
    Engine(limit_gb=1e-9)._evict(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".new-theirs", "link", "new", "project"]
    assert (
        engines._remove_graph(tmp_path / "project") is False
        and (tmp_path / "project" / "notes.txt").exists()
        and not (tmp_path / "project" / "about.json").exists()
    )
