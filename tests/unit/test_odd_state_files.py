"Thresholds, metrics' states and views that were damaged, cut, or written by something else: one sentence that names the file and the cure."

import io
import json
import math
import pickle

import numpy as np
import pandas as pd
import pytest

from zsad_nb.evaluation.metrics import PixelMetrics
from zsad_nb.evaluation.views import Views
from zsad_nb.inspection.thresholds import Calibration, calibration

METHOD = dict(method="m", size=32, hash="abc")


@pytest.fixture
def thresholds(tmp_path):
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(dict(score=rng.random(200), peak=rng.random(200), category=["a", "b"] * 100, anomalous=False))
    return calibration(rows, METHOD, 0.05, comparable="quantile").save(tmp_path / "thresholds.json")


def test_thresholds_come_back(thresholds, tmp_path):
    again = Calibration.load(thresholds)
    assert Calibration.load(again.save(tmp_path / "again.json")) == again


def first(d):
    return d["image"]["a"]


THRESHOLDS = {
    "NaN": lambda d: first(d).update(value=math.nan),
    "infinite": lambda d: first(d).update(value=math.inf),
    "null": lambda d: first(d).update(value=None),
    "a text": lambda d: first(d).update(value="0.5"),
    "true": lambda d: first(d).update(value=True),
    "unknown kind": lambda d: first(d).update(kind="magic"),
    "no facts": lambda d: first(d).update(facts={}),
    "facts of another kind": lambda d: first(d).update(facts=[1]),
    "a fact that is no number": lambda d: first(d)["facts"].update(low="x"),
    "a rank beyond": lambda d: first(d)["facts"].update(rank=10**6),
    "no method": lambda d: d.pop("method"),
    "another method": lambda d: d.update(method={"x": 1}),
    "hash is a number": lambda d: d["method"].update(hash=5),
    "an entry too many": lambda d: d.update(more=1),
    "images are a list": lambda d: d.update(image=[]),
    "typical is NaN": lambda d: d["typical"].update(a=math.nan),
    "typical is a text": lambda d: d["typical"].update(a="x"),
    "reference out of order": lambda d: d["comparable"]["reference"].update(a=[2, 1]),
    "reference empty": lambda d: d["comparable"]["reference"].update(a=[]),
    "reference of texts": lambda d: d["comparable"]["reference"].update(a=["x"]),
    "comparable of another kind": lambda d: d["comparable"].update(how="magic"),
    "categories are a text": lambda d: d.update(categories="a"),
    "notes are numbers": lambda d: d.update(notes=[1]),
    "another format": lambda d: d.update(format="zsad_nb thresholds 9"),
}


@pytest.mark.parametrize("what", THRESHOLDS)
def test_odd_thresholds(thresholds, what):
    d = json.loads(thresholds.read_text())
    THRESHOLDS[what](d)
    thresholds.write_text(json.dumps(d))
    with pytest.raises(ValueError, match=r"thresholds\.json") as caught:
        Calibration.load(thresholds)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{", b"[" * 10**5, pickle.dumps({"a": 1})],
    ids=["empty", "open", "list", "null", "another encoding", "nested", "pickle"],
)
def test_thresholds_that_are_none(thresholds, content):
    thresholds.write_bytes(content)
    with pytest.raises(ValueError, match=r"thresholds\.json"):
        Calibration.load(thresholds)


# ---- metrics
@pytest.fixture
def state(tmp_path):
    rng = np.random.default_rng(0)
    with PixelMetrics() as m:
        m.update(rng.random((3, 8, 8)), rng.random((3, 8, 8)) > 0.8)
        return m.save(tmp_path / "pixels.bin")


def headed(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[8:16], "little")
    head = json.loads(content[16 : 16 + length])
    head = (change(head), head)[1]
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(content[:8] + len(text).to_bytes(8, "little") + text + content[16 + length :])


HEADS = {
    "no limits": lambda h: h.pop("limits"),
    "limits of NaN": lambda h: h.update(limits=[math.nan]),
    "a limit of 2": lambda h: h.update(limits=[2.0]),
    "limits are a text": lambda h: h.update(limits="x"),
    "images are a text": lambda h: h.update(images="3"),
    "fewer than none": lambda h: h.update(keys=-1),
    "keys are huge": lambda h: h.update(keys=2**62),
    "blocks are a number": lambda h: h.update(blocks=3),
    "a block fewer than none": lambda h: h.update(blocks=[-8, *h["blocks"]]),
    "low is NaN": lambda h: h.update(low=math.nan),
    "regions are true": lambda h: h.update(regions=True),
}


@pytest.mark.parametrize("what", HEADS)
def test_an_odd_state(state, what):
    headed(state, HEADS[what])
    with pytest.raises(ValueError, match=r"pixels\.bin .*evaluate that shard again"):
        PixelMetrics.load(state)


def test_a_state_that_is_cut_or_none(state):
    content = state.read_bytes()
    for other in (
        b"",
        content[:7],
        content[:20],
        content[:-1],
        content + b"x",
        b"zsad_pm1" + b"\xff" * 8,
        b"zsad_pm1" + (2**40).to_bytes(8, "little"),
        b"zsad_pm1" + (8).to_bytes(8, "little") + b"[[[[[[[[",
        b"PK" * 20,
    ):
        state.write_bytes(other)
        with pytest.raises(ValueError, match=r"pixels\.bin .*evaluate that shard again"):
            PixelMetrics.load(state)


# ---- views
@pytest.fixture
def views(tmp_path):
    rows = pd.DataFrame(
        dict(
            dataset="d",
            category="c",
            image=["a", "b"],
            defect="x",
            anomalous=True,
            area=0.1,
            has_mask=True,
            score=0.5,
            low=0.0,
            high=1.0,
        )
    )
    Views(rows, np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), bool), np.zeros((2, 8, 8), np.float32)).save(
        tmp_path
    )
    return tmp_path


VIEWS = {
    "a map fewer": dict(maps=np.zeros((1, 8, 8), np.float32)),
    "maps of another size": dict(maps=np.zeros((2, 9, 8), np.float32)),
    "maps of NaN": dict(maps=np.full((2, 8, 8), np.nan, np.float32)),
    "masks of numbers": dict(masks=np.zeros((2, 8, 8))),
    "grey images": dict(images=np.zeros((2, 8, 8), np.uint8)),
    "four channels": dict(images=np.zeros((2, 8, 8, 4), np.uint8)),
    "types of numbers": dict(types=np.arange(2)),
    "types of another size": dict(typed_heat=np.zeros((2, 4, 4), np.float32)),
    "objects": dict(maps=np.array([{}, {}], object)),
}


@pytest.mark.parametrize("what", VIEWS)
def test_odd_views(views, what):
    with np.load(views / "views.npz") as kept:
        arrays = {k: kept[k] for k in kept.files}
    np.savez(views / "views.npz", **arrays | VIEWS[what])
    with pytest.raises(ValueError, match=r"holds no views .*make the run again|make the run again"):
        Views.read(views)


def test_views_that_are_none(views):
    assert len(Views.read(views)) == 2
    content = (views / "views.npz").read_bytes()
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, dict(descr="<f4", fortran_order=False, shape=(10**12, 8, 8)))
    for other in (b"", content[:100], content[:-30], b"PK\x03\x04", pickle.dumps({}), huge.getvalue()):
        (views / "views.npz").write_bytes(other)
        with pytest.raises(ValueError, match="make the run again"):
            Views.read(views)
