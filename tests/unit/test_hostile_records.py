"Records that are odd, cut off, of others or no files at all: they are named and left out, and everything else goes on."

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from zsad_nb.cli.commands import main
from zsad_nb.core.records import misfit, read_record, relative_path
from zsad_nb.evaluation.results import PLAN, RESULT, RUN, finished_runs, read_runs
from zsad_nb.evaluation.run_state import result_of
from zsad_nb.figures.chosen_runs import Runs
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.thresholds import FORMAT, Calibration
from zsad_nb.runs.rerun import compare_runs, rerun
from zsad_nb.runs.run import collect, run_folders, status
from zsad_nb.synthetic.benchmark import synthetic_index

FEW = 25 if settings().max_examples <= 40 else settings().max_examples  # each reads whole folders
METRICS = "category,normal,anomalous,image_auroc\nbottle,1,1,0.5\nmean,1,1,0.5\n"
RECORD = dict(
    status="done",
    hash="good",
    notebook_hash="n",
    seed=3,
    attempt=1,
    seconds=2.5,
    peak_memory_mb=None,
    process=7,
    cwd="/tmp",
    started="2026-01-01",
    finished="2026-01-01",
    spec=dict(
        notebook="evaluate.ipynb",
        experiment="e",
        parameters=dict(size=64, options=dict(a=[1]), checkpoint="{train}/c"),
        given=["size"],
    ),
    after=dict(train=dict(run="e/other", parameters=dict(seed=3, method="ssvp"))),
    versions=dict(zsad_nb="1"),
    code=dict(source="s", commit=None, dirty=False),
)
FOUND = dict(
    notebook="evaluate",
    method="ssvp",
    data="mvtec",
    seed=3,
    seen=["mvtec/bottle"],
    trained_on=["visa/pcb1"],
    transductive=False,
    checkpoint="c",
    fingerprint="f",
    backbones=dict(clip="clip-vitb16"),
    frozen=dict(clip="clip-vitb16 0123"),
    image_auroc=0.5,
)
OTHER = dict(FOUND, data="visa", seen=[])  # no repetition of the good one
ANOTHER = dict(RECORD, hash="odd", spec=dict(RECORD["spec"], parameters=dict(RECORD["spec"]["parameters"], size=65)))
THRESHOLDS = dict(
    format=FORMAT,
    method=dict(method="ssvp", size=64, hash="h"),
    image={"": dict(value=0.5, kind="given", facts={})},
    pixel={},
    comparable=None,
    typical={"": 0.5},
    categories=["object"],
    notes=[],
    version="1",
)


def leave(folder, record=RECORD, result=FOUND, metrics=METRICS):
    folder.mkdir(parents=True)
    for name, value in (("run.json", record), ("result.json", result)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    if metrics:
        (folder / "metrics.csv").write_text(metrics)
    return folder


def everything(folder, good="e/good"):
    "All that reads a folder of runs; the good run is always there."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = status(folder)
        assert table.set_index("path").at[(Path(folder) / good).as_posix(), "status"] == "done"
        collected = collect(folder)
        assert good in set(collected["path"]), collected.attrs["skipped"]
        assert good in {run.path for run in Runs(folder).matching}
        assert Runs(folder).evaluations is not None
        for run in finished_runs(folder)[0]:
            assert isinstance(run.notebook, str) and isinstance(run.parameters, dict), run.seed
        for path in run_folders(folder):
            assert result_of(path).status in ("absent", "running", "interrupted", "damaged", "failed", "done")
    return table, collected


# --------------------------------------------------------------------------------------------------------------- what is no record at all


def text(content):
    return lambda path: path.write_bytes(content)


ODD = dict(
    empty=text(b""),
    list=text(b"[]"),
    text=text(b'"done"'),
    null=text(b"null"),
    number=text(b"3"),
    half=text(b'{"status": "do'),
    binary=text(bytes(range(256))),
    utf16=text("{}".encode("utf-16")),
    latin1=text(b'{"status": "\xe4"}'),
    nan=text(b'{"status": "done", "seconds": NaN}'),
    infinite=text(b'{"seconds": 1e999}'),
    digits=text(b'{"seconds": ' + b"9" * 5000 + b"}"),
    deep=text(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    nested=text(b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}"),
    twice=text(b'{"status": "done", "status": 3}'),
    folder=lambda path: path.mkdir(),
    fifo=lambda path: os.mkfifo(path),
    dangling=lambda path: path.symlink_to("nowhere"),
    linked=lambda path: path.symlink_to(path.parent.parent / "good" / path.name),
    itself=lambda path: path.symlink_to(path.name),
    large=lambda path: (path.touch(), os.truncate(path, 2**27)),
)


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_what_is_no_record_is_named_and_left_out(tmp_path, name):
    "A folder of them: each is named, and the good run is in every table."
    leave(tmp_path / "e" / "good", dict(RECORD, hash="good"))
    kinds = [kind for kind in ODD if (name, kind) != ("result.json", "twice")]  # that one is an object, if an odd one
    for kind in kinds:
        odd = leave(tmp_path / "e" / kind, ANOTHER, OTHER)
        (odd / name).unlink()
        ODD[kind](odd / name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = status(tmp_path).set_index("hash")
        collect(tmp_path)
    for kind in kinds:
        assert table.at[kind, "status"] == "damaged" and name in table.at[kind, "error"], kind
        assert any(str(w.message).startswith(f"e/{kind}: ") and name in str(w.message) for w in said), kind
    everything(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "twice"])
def test_a_plan_that_is_none_is_named(tmp_path, kind):
    leave(tmp_path / "e" / "good", dict(RECORD, hash="good"))
    ODD[kind](tmp_path / "e" / "plan.json")
    with pytest.warns(UserWarning, match="plan.json"):
        assert status(tmp_path)["hash"].tolist() == ["good"]


# ------------------------------------------------------------------------------------------------------------ of other types, at any depth

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../..", "/etc", "a\\..\\b", "\udcff", "\0", "nan", "-1", "e" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    "Every place in a record."
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def changed(value, path, new):
    "A copy with something else at a place."
    if not path:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


def fuzzed(name, valid, data, folder):
    "One record with something else somewhere, as it would lie on a disk."
    value = changed(valid, data.draw(st.sampled_from(list(places(valid)))), data.draw(ANYTHING))
    raw = json.dumps(value).encode()
    if data.draw(st.integers(0, 9)) == 0:
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    (folder / name).write_bytes(raw)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    leave(folder / "e" / "good", dict(RECORD, hash="good"))
    leave(folder / "e" / "odd", ANOTHER, OTHER)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "valid"),
    [("run.json", ANOTHER), ("result.json", OTHER), ("plan.json", dict(runs=["odd", "good", "later"]))],
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=FEW)
@given(data=st.data())
def test_any_change_of_a_record(runs, name, valid, data):
    for own, content in (("run.json", ANOTHER), ("result.json", OTHER)):
        (runs / "e" / "odd" / own).write_text(json.dumps(content))
    fuzzed(name, valid, data, runs / "e" / ("" if name == "plan.json" else "odd"))
    everything(runs)
    (runs / "e" / "plan.json").unlink(missing_ok=True)
    try:
        Inspector.load(runs / "e" / "odd")
    except (ValueError, TypeError, OSError):
        pass  # a sentence: no run of a method that exists


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_thresholds(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("thresholds", numbered=True)
    fuzzed("t.json", THRESHOLDS, data, place)
    try:
        found = Calibration.load(place / "t.json")
    except ValueError as error:
        assert "t.json" in str(error)
        return
    str(found), found.hash, found.colours(""), found.of("image", "")


def test_a_valid_record_fits():
    assert misfit(RECORD, RUN) == misfit(FOUND, RESULT) == misfit(dict(runs=["a/b"]), PLAN) == ""
    assert Calibration.load.__doc__ and misfit(dict(seed=1.5, more=[None]), dict(seed=float)) == ""


@pytest.mark.parametrize("path", ["", "..", "../x", "a/../../x", "/etc", "a\\..\\..\\x", "\0", "a/b/..", 3, None])
def test_paths_in_records_stay_below(path):
    assert relative_path(path)


@pytest.mark.parametrize("plan", [["../../elsewhere/x"], ["/etc"], ["out/x"]])
def test_a_plan_leads_nowhere_else(tmp_path, plan):
    leave(tmp_path / "runs" / "e" / "good", dict(RECORD, hash="good"))
    leave(tmp_path / "elsewhere" / "x")
    (tmp_path / "runs" / "e" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "e" / "plan.json").write_text(json.dumps(dict(runs=plan)))
    table, _ = everything(tmp_path / "runs")
    assert table["hash"].tolist() == ["good"]


def test_links_to_other_folders_are_named(tmp_path):
    "Of an experiment and of a run: nothing is read through them, and nothing is silent."
    leave(tmp_path / "runs" / "e" / "good", dict(RECORD, hash="good"))
    leave(tmp_path / "elsewhere" / "x" / "other")
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere" / "x")
    (tmp_path / "runs" / "e" / "run").symlink_to(tmp_path / "elsewhere" / "x" / "other")
    with pytest.warns(UserWarning, match="is a link to another folder"):
        table = status(tmp_path / "runs")
    assert table["hash"].tolist() == ["good"]
    assert [p for p, why in read_runs(tmp_path / "runs").attrs["skipped"] if "link to another folder" in why] == [
        "e/run",
        "linked",
    ]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, permissions_hold):
    leave(tmp_path / "e" / "good", dict(RECORD, hash="good"))
    leave(tmp_path / "closed" / "run").parent.chmod(0)
    try:
        assert ("closed", "the folder cannot be listed (Permission denied)") in read_runs(tmp_path).attrs["skipped"]
        with pytest.warns(UserWarning, match="closed cannot be listed"):
            assert status(tmp_path)["hash"].tolist() == ["good"]
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_commands_go_on(tmp_path, capsys):
    "status, collect and figures; names that a terminal would obey are shown as what they are."
    leave(tmp_path / "runs" / "e" / "good", dict(RECORD, hash="good"))
    leave(tmp_path / "runs" / "e" / "odd\x1b[2J", dict(RECORD, spec=None))
    leave(tmp_path / "runs" / "e" / "failed", dict(RECORD, status="failed", error="\x1b]0;title\x07 \udcff"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["status", str(tmp_path / "runs")]) == 1
        said = capsys.readouterr().out
        assert "\x1b" not in said and "good" in said and "spec is null, not an object" in said
        assert main(["collect", str(tmp_path / "runs")]) == 0
        assert "e/good" in capsys.readouterr().out
        assert main(["figures", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--only", "nothing"]) == 2


def test_a_record_that_cannot_be_repeated_says_so(tmp_path):
    folder = leave(tmp_path / "e" / "good", {k: v for k, v in RECORD.items() if k != "after"})
    (folder / "notebook.ipynb").write_text('{"cells": []}')
    with pytest.raises(ValueError, match="run.json in .* has no after"):
        rerun(folder)
    (folder / "more.csv").write_text("a,b\n1\n2,3,4\n")  # of a shape of its own
    assert compare_runs(folder, folder)["same"].all() and "more.csv sha256" in set(compare_runs(folder, folder)["what"])


# ------------------------------------------------------------------------------------------------------- an existing folder of results


@pytest.mark.parametrize(
    "name", ["results.csv", "settings.json", "journal.sqlite", "journal.sqlite-journal", "results.parquet", ".lock"]
)
@pytest.mark.parametrize("kind", ["folder", "link", "dangling", "binary", "list"])
def test_predict_goes_on_in_a_folder_with_odd_files(tmp_path, photographs, name, kind):
    inspector, images = photographs
    victim = tmp_path / "thesis.tex"
    out = tmp_path / "out"
    victim.write_text("years of work")
    out.mkdir()
    if kind == "folder":
        (out / name).mkdir(), (out / name / "mine").write_text("x")
    elif kind in ("link", "dangling"):
        (out / name).symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    else:
        (out / name).write_bytes(bytes(range(256)) if kind == "binary" else b"[]")
    before = (out / name).read_bytes() if (out / name).is_file() and not (out / name).is_symlink() else None
    table = inspector.predict(images, out, progress=False)
    assert len(table) == 2 and (out / "results.csv").is_file() and json.loads((out / "settings.json").read_text())
    assert victim.read_text() == "years of work" and not (tmp_path / "nowhere").exists()
    if kind == "folder":
        assert list(out.rglob("mine"))
    if name == ".lock" and before is not None:
        assert (out / name).read_bytes() == before


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for n in range(2):
        Image.new("RGB", (40, 40), (60 * n, 90, 120)).save(folder / f"{n}.png")
    return Inspector.load("self_distance", image_size=32), folder


def test_only_what_a_killed_writer_left_is_removed(tmp_path, photographs):
    inspector, images = photographs
    (tmp_path / "pictures").mkdir()
    for name in (
        ".results.csv.0a1b2c3d.tmp",
        "pictures/.0.png.png.ffffffff.tmp",
        ".my.tmp",
        "pictures/notes.tmp",
        ".x.ABCDEFGH.tmp",
    ):
        (tmp_path / name).write_text("x")
    inspector.predict(images, tmp_path, progress=False)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.tmp")) == [
        ".my.tmp",
        ".x.ABCDEFGH.tmp",
        "pictures/notes.tmp",
    ]


@pytest.mark.parametrize("kind", ["list", "half", "nan", "deep", "folder", "linked", "binary"])
def test_the_stamp_of_a_synthetic_set(tmp_path, kind):
    synthetic_index(tmp_path / "good", "target", size=64, normal=0, defective=0)
    (tmp_path / "set").mkdir()
    ODD[kind](tmp_path / "set" / "synthetic.json")
    with pytest.raises(ValueError, match="synthetic.json"):
        synthetic_index(tmp_path / "set", "target", size=64, normal=0, defective=0)


def test_what_is_written_is_read(tmp_path):
    "A record of a shape with a field of another type says which."
    (tmp_path / "r.json").write_text('{"a": {"b": [1, "x"]}}')
    assert read_record(tmp_path / "r.json", {"a": {"b": [int]}}) == ({}, "r.json: a.b[1] is text, not a whole number")
    assert read_record(tmp_path / "r.json", {"a": {"b": [(int, str)]}})[1] == ""
    assert (
        read_record(tmp_path / "none.json")[1] == "there is no none.json"
        and read_record(tmp_path / "r.json" / "x.json")[1] == "there is no x.json"
    )
