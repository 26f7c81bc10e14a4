"Runs and sweeps where things go wrong: killed, hung, full, cut short, twice at once. The notebooks are made here, so that a kernel is all that takes time."

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import ROOT

from zsad_nb.core.locks import Busy, lock
from zsad_nb.core.tables import write_table
from zsad_nb.evaluation.run_state import result_of
from zsad_nb.methods.base import MODULES
from zsad_nb.runs import execution
from zsad_nb.runs.executors import LocalExecutor, LostWorker
from zsad_nb.runs.parameters import Parameter
from zsad_nb.runs.plans import expand
from zsad_nb.runs.progress import Progress, Task
from zsad_nb.runs.rerun import rerun
from zsad_nb.runs.run import Spec, collect, run, status
from zsad_nb.runs.sweeps import sweep

EXPERIMENTS = ROOT / "nbs" / "experiments"
SWEEPS = sorted((EXPERIMENTS / "sweeps").glob("*.yaml"))
WRITE = "import json, pathlib\nout = pathlib.Path(output)\n(out / 'result.json').write_text(json.dumps({}))"
COUNT = "import os\nwith open(log, 'a') as f: f.write(f'{n}\\n')"  # one line an execution


def notebook(path, parameters, *code):
    cells = [nbformat.v4.new_code_cell(text) for text in (parameters + "\noutput: str = ''  # folder", *code)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3"))),
        path,
    )
    return path


@pytest.fixture
def twice(tmp_path):
    return notebook(
        tmp_path / "twice.ipynb",
        "n: int = 1  # a number\nlog: str = ''",
        COUNT.replace("open(log", "open(log or os.devnull"),
        WRITE.format("dict(twice=2 * n)"),
    )


def quiet(specs, root, **options):
    "A sweep in this process, with what it said."
    said = io.StringIO()
    done = sweep(specs, root, **{"executor": ThreadPoolExecutor(1), **options}, stream=said)
    return done, said.getvalue()


# ------------------------------------------------------------------------------------------------------------------ before anything starts


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(rat=1.0), TypeError, "unknown parameter of typed.ipynb 'rat'; did you mean rate?"),
        (dict(seed="3"), TypeError, "parameter seed of typed.ipynb is '3' (str); it must be int"),
        (dict(seed=True), TypeError, "True (bool); it must be int"),
        (dict(seed=1.0), TypeError, "1.0 (float); it must be int"),
        (dict(rate="1e-3"), TypeError, "text in quotes: leave them out"),
        (dict(word=False), TypeError, "quote a word such as 'true'"),
        (dict(maybe="no"), TypeError, "must be int | None; write true or false"),
        (dict(rate=float("nan")), ValueError, "holds nan, which JSON and so the run's record cannot keep"),
        (dict(rate=float("-inf")), ValueError, "holds -inf"),
        (dict(word="a\udcff"), ValueError, "is not UTF-8 text"),
        (dict(names=["a", 1]), TypeError, "it must be list[str]"),
        (dict(output="x"), ValueError, "`output` is set by the run itself"),
        (dict(word="{train}/a"), ValueError, "refers to a run 'train'"),
    ],
)
def test_wrong_parameters_start_nothing(tmp_path, given, error, message):
    path = notebook(
        tmp_path / "typed.ipynb",
        "rate: float = 1.0\nseed: int = 0\nword: str = ''\nnames: list[str] = []\nmaybe: int | None = None",
        "1",
    )
    with pytest.raises(error) as caught:
        run(Spec(path, given), tmp_path / "runs")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="1 of 2 specs are wrong, nothing was started"):
        quiet([Spec(path), Spec(path, given)], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_what_fits():
    kinds = dict(float=(1, 1.5), int=(1,), bool=(True,), str=("a",), list=([1],), dict=({"a": 1},))
    values = [1, 1.5, True, "a", [1], {"a": 1}, None]
    for kind, good in kinds.items():
        assert [v for v in values if Parameter("p", kind, None).fits(v)] == [
            v for v in values if any(v is g or (v == g and type(v) is type(g)) for g in good)
        ], kind
    assert Parameter("p", "int | None", 0).fits(None) and not Parameter("p", "int | None", 0).fits("x")
    assert Parameter("p", "", 3).fits(4) and not Parameter("p", "", 3).fits("4")  # no annotation: the default's type
    assert [
        Parameter("p", k, None).parse(t)
        for k, t in (("float", "1e-3"), ("str", "12"), ("bool", "false"), ("list", "[1, a]"), ("int", "1.5"))
    ] == [1e-3, "12", False, [1, "a"], "1.5"]
    with pytest.raises(ValueError, match="not understood"):
        Parameter("p", "Tensor[3]", 0).fits(1)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["n = 1"], "0 code cells tagged"),
        (["n: int = len('a')"], "the default of n is computed"),
        (["n, m = 1, 2"], "is not `name: type = value`"),
    ],
)
def test_notebooks_that_cannot_be_run(tmp_path, cells, message):
    path = notebook(tmp_path / "bad.ipynb", cells[0], "1")
    if message.startswith("0"):
        path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(ValueError, match=message):
        run(Spec(path), tmp_path / "runs")
    with pytest.raises(ValueError, match="no notebook at"):
        run(Spec(tmp_path / "none.ipynb"), tmp_path / "runs")
    (tmp_path / "text.ipynb").write_text("text")
    with pytest.raises(ValueError, match="is not a notebook"):
        run(Spec(tmp_path / "text.ipynb"), tmp_path / "runs")


def test_hash_is_of_source_values_and_dependencies(tmp_path, twice):
    assert (
        Spec(twice).hash
        == Spec(twice, dict(n=1)).hash
        == Spec(str(twice), experiment="other").hash
        != Spec(twice, dict(n=2)).hash
    )
    planned, copy = (
        Spec(twice),
        notebook(
            tmp_path / "copy.ipynb",
            "n: int = 1  # a number\nlog: str = ''",
            COUNT.replace("open(log", "open(log or os.devnull"),
            WRITE.format("dict(twice=2 * n)"),
        ),
    )
    nb = nbformat.read(copy, 4)
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(nb, copy)
    assert Spec(copy).hash == planned.hash  # outputs and names do not count
    nb.cells[2].source += "\n"
    nb.cells[2].source += "print(1)"
    nbformat.write(nb, copy)
    assert Spec(copy).hash != planned.hash
    assert (
        Spec(copy, after=dict(a=Spec(twice))).hash
        != Spec(copy, after=dict(a=Spec(twice, dict(n=2)))).hash
        != Spec(copy).hash
    )


def test_dry_run_starts_and_writes_nothing(tmp_path, twice):
    class Never:
        def submit(self, *_):
            raise AssertionError("it started something")

    done, said = quiet([Spec(twice, dict(n=i)) for i in range(3)], tmp_path / "runs", executor=Never(), dry_run=True)
    assert said.count("to run") == 3 and len(done.table) == 3 and not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------------------------- what goes wrong


def test_a_finished_run_and_its_record(tmp_path, twice):
    r = run(Spec(twice, dict(n=4), "small"), tmp_path / "runs")
    assert (
        r.ok
        and r.fresh
        and r.result == dict(twice=8)
        and r.folder == (tmp_path / "runs" / "small" / Spec(twice, dict(n=4)).hash)
    )
    record = json.loads((r.folder / "run.json").read_text())
    assert (
        record["spec"]["parameters"] == dict(n=4, log="")
        and record["hash"] == r.folder.name
        and record["status"] == "done"
    )
    assert (
        record["versions"]["torch"]
        and record["versions"]["numpy"]
        and record["hardware"]["cpu"]
        and record["code"]["source"]
    )
    assert 10 < record["peak_memory_mb"] < 2000 and 0 < record["seconds"] < 120
    assert {p.name for p in r.folder.iterdir()} == {".lock", "run.json", "result.json", "notebook.ipynb", "run.log"}
    assert "n = 4" in (r.folder / "notebook.ipynb").read_text()
    before = (r.folder / "run.json").stat().st_mtime_ns
    assert (
        not run(Spec(twice, dict(n=4), "small"), tmp_path / "runs").fresh
        and (r.folder / "run.json").stat().st_mtime_ns == before
    )


def test_a_killed_kernel_is_not_believed_and_tried_again(tmp_path):
    "The result is written before the kernel dies: it must not count, and be there after the second try."
    path = notebook(
        tmp_path / "dies.ipynb",
        "once: str = ''",
        WRITE.format("dict(a=1)"),
        "import os, signal\nif not os.path.exists(once): open(once, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)",
    )
    spec = Spec(path, dict(once=str(tmp_path / "once")))
    r = run(spec, tmp_path / "runs")
    assert (
        (r.status, r.kind) == ("failed", "dead kernel")
        and (r.folder / "result.json").exists()
        and not result_of(r.folder).ok
        and (r.folder / "failed.ipynb").exists()
    )
    (tmp_path / "once").unlink()
    done, said = quiet([spec], tmp_path / "runs")
    assert (
        done.ok
        and done.table.attempts.tolist() == [2]
        and "retry" in said
        and result_of(r.folder).record["attempt"] == 2
    )
    assert "failed the kernel died" in (r.folder / "run.log").read_text()  # the log keeps every attempt


def test_no_retries_means_none(tmp_path):
    path = notebook(tmp_path / "dies.ipynb", "", "import os; os._exit(3)")
    done, said = quiet([Spec(path)], tmp_path / "runs", retries=0)
    assert (
        not done.ok
        and done.table.attempts.tolist() == [1]
        and "the kernel died" in done.table.error[0]
        and "retry" not in said
    )


def test_hung_raising_and_silent_specs_stop_nobody_else(tmp_path, twice):
    hangs = notebook(tmp_path / "hangs.ipynb", "", "import time; time.sleep(300)")
    raises = notebook(tmp_path / "raises.ipynb", "", "raise KeyError('such')")
    silent = notebook(tmp_path / "silent.ipynb", "", "1")
    last = notebook(tmp_path / "last.ipynb", "of: str = ''", WRITE.format("json.load(open(of))"))
    bad = Spec(raises)
    middle = Spec(last, dict(of="{a}/result.json"), after=dict(a=bad))
    end = Spec(last, dict(of="{b}/result.json"), after=dict(b=middle))
    good = Spec(twice)
    follows = Spec(last, dict(of="{c}/result.json"), after=dict(c=good))
    start = time.monotonic()
    done, said = quiet([end, Spec(hangs), Spec(silent), follows], tmp_path / "runs", timeout=2)
    assert time.monotonic() - start < 60
    table = done.table.set_index("label")
    assert dict(zip(done.table.label.str.split().str[0], done.table.status)) | {"last": ""} == dict(
        raises="failed", last="", hangs="failed", silent="failed", twice="done"
    )
    assert (
        done.table.status.tolist().count("skipped") == 2 and done.table.attempts.tolist().count(2) == 0 and not done.ok
    )
    assert (
        "KeyError: 'such' (cell 3)" in table.error["raises"]
        and "longer than 2 s" in table.error["hangs"]
        and "no result.json" in table.error["silent"]
    )
    assert all("it comes after" in e for e in done.table.error[done.table.status == "skipped"])
    assert result_of(follows.folder(tmp_path / "runs")).result == dict(twice=2)
    text = done.summary.read_text()
    assert "failed.ipynb" in text and "notebook.ipynb" in text and text.count("run.log") == 5 and "KeyError" in text
    assert "KeyError" in (bad.folder(tmp_path / "runs") / "run.log").read_text()
    links = [t.split(")")[0] for t in text.split("](")[1:]]
    assert links and all((done.folder / link).exists() for link in links) and (done.folder / "summary.html").exists()
    assert set(status(tmp_path / "runs").status) == {
        "done",
        "failed",
        "absent",
    }  # the plan knows those that never began


@pytest.fixture
def start_sweep(tmp_path):
    "plan -> the process of `zsad sweep` on it; ended with the test, whatever happens in it."
    begun = []

    def start(plan):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        begun.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "import sys; from zsad_nb.cli.commands import main; sys.exit(main())",
                    "sweep",
                    str(tmp_path / "plan.yaml"),
                    "--root",
                    str(tmp_path / "runs"),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
            )
        )
        return begun[-1]

    yield start
    for process in begun:
        process.kill()


def wait_for(what, seconds=300):  # a fraction of that on a machine that has nothing else to do
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)
    return value


def test_a_killed_sweep_goes_on_where_it_was(tmp_path, start_sweep):
    "Killed in the third run, which has already written a result: two are kept, the third is not believed and done again."
    log = tmp_path / "log"
    slow = notebook(
        tmp_path / "slow.ipynb",
        "n: int = 0\nlog: str = ''\ngate: str = ''",
        COUNT,
        WRITE.format("dict(n=n)"),
        "import time, os\nwhile n == 2 and not os.path.exists(gate): time.sleep(0.1)",
    )
    plan = dict(
        name="k",
        notebook="slow.ipynb",
        parameters=dict(log=str(log), gate=str(tmp_path / "gate")),
        grid=dict(n=[0, 1, 2, 3]),
    )
    process = start_sweep(plan)
    folders = {s.values["n"]: s.folder(tmp_path / "runs") for s in expand(plan, base=tmp_path)}
    wait_for(lambda: (folders[2] / "result.json").exists())
    worker = json.loads((folders[2] / "run.json").read_text())["process"]
    assert result_of(folders[2]).status == "running" and status(
        tmp_path / "runs"
    ).status.value_counts().to_dict() == dict(done=2, running=1, absent=1)
    process.kill()
    process.wait()
    wait_for(
        lambda: not Path(f"/proc/{worker}").exists() or Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z", 60
    )  # it notices, and ends with its kernel
    wait_for(lambda: result_of(folders[2]).status == "interrupted", 60)
    before = {n: (folders[n] / "run.json").stat().st_mtime_ns for n in (0, 1)}
    (tmp_path / "gate").touch()
    again = start_sweep(plan)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "was interrupted" in said or "ended without saying how" in said
    assert {n: (folders[n] / "run.json").stat().st_mtime_ns for n in (0, 1)} == before and all(
        result_of(f).ok for f in folders.values()
    )
    assert sorted(log.read_text().split()) == ["0", "1", "2", "2", "3"]
    assert slow.exists()


def test_two_sweeps_at_once_do_nothing_twice(tmp_path, start_sweep):
    log = tmp_path / "log"
    notebook(
        tmp_path / "short.ipynb",
        "n: int = 0\nlog: str = ''",
        COUNT,
        "import time; time.sleep(1)",
        WRITE.format("dict(n=n)"),
    )
    plan = dict(name="t", notebook="short.ipynb", parameters=dict(log=str(log)), grid=dict(n=[0, 1, 2]))
    both = [start_sweep(plan) for _ in range(2)]
    said = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sorted(log.read_text().split()) == ["0", "1", "2"], said
    assert any("is being run by process" in s or "had a result" in s for s in said) and all("3 done" in s for s in said)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, twice):
    spec = Spec(twice)
    folder = spec.folder(tmp_path / "runs")
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("process 999999 on here")
    r = run(spec, tmp_path / "runs")
    assert (
        r.ok
        and r.record["took_over"] == "process 999999 on here"
        and "took over" in (folder / "run.log").read_text()
        and (folder / ".lock").read_text() == ""
    )
    with lock(folder), pytest.raises(Busy, match=f"is being run by process {os.getpid()}"):
        run(spec, tmp_path / "runs")


@pytest.mark.parametrize("content", ['{"twice": 2', "", "[1]", "\0\0\0"])
def test_a_result_that_was_cut_short(tmp_path, twice, content):
    spec = Spec(twice)
    folder = run(spec, tmp_path / "runs").folder if content == "" else made_up(spec, tmp_path / "runs")
    (folder / "result.json").write_text(content)
    assert result_of(folder).status == "damaged" and not status(tmp_path / "runs").status.eq("done").any()
    with pytest.warns(UserWarning, match="run.json says done, but result.json"):
        assert len(collect(tmp_path / "runs")) == 0
    if content:
        return  # the rest takes a kernel
    done, said = quiet([spec], tmp_path / "runs")
    assert done.ok and "run.json says done, but result.json cannot be read" in said and "it is run again" in said
    assert result_of(folder).result == dict(twice=2) and (folder / "result.json.unreadable").read_text() == content


def made_up(spec, root, **record):
    "A finished run's folder, without running."
    folder = spec.folder(root)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(dict(twice=2)))
    (folder / "run.json").write_text(json.dumps(dict(status="done", hash=spec.hash, **record)))
    return folder


def test_a_result_nobody_vouches_for(tmp_path, twice):
    folder = made_up(Spec(twice), tmp_path / "runs")
    assert result_of(folder, Spec(twice).hash).ok
    assert (
        "not " + Spec(twice, dict(n=2)).hash in result_of(folder, Spec(twice, dict(n=2)).hash).error
    )  # another spec's
    (folder / "run.json").unlink()
    assert result_of(folder).status == "damaged" and "its result does not count" in result_of(folder).error
    other = tmp_path / "runs" / "twice" / Spec(twice, dict(n=5)).hash
    other.mkdir()
    (other / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="was not made by a run"):
        run(Spec(twice, dict(n=5)), tmp_path / "runs")
    assert (other / "mine.txt").read_text() == "precious"


# -------------------------------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 1 MB."
    place = tmp_path / "disk"
    place.mkdir()
    made = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, check=False)
        if os.getuid() == 0
        else None
    )
    if made is None or made.returncode:
        pytest.skip("a small file system cannot be mounted here; the patched writer below stands for it")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_full_disk(small_disk, tmp_path, twice):
    first = run(Spec(twice), small_disk / "runs")
    assert first.ok
    big = notebook(
        tmp_path / "big.ipynb",
        "",
        "import pathlib\nout = pathlib.Path(output)\ntry: (out / 'data.bin').write_bytes(bytes(3_000_000))\nexcept"
        " OSError: pass",
        WRITE.format("dict(a=1)"),
    )
    done, said = quiet([Spec(big), Spec(twice)], small_disk / "runs", retries=0)
    assert (
        done.table.status.tolist() == ["failed", "done"]
        and "space" in done.table.error[0]
        and not done.ok
        and "space" in said
    )
    assert not result_of(Spec(big).folder(small_disk / "runs")).ok and result_of(first.folder).result == dict(
        twice=2
    )  # nothing invented, nothing lost
    with contextlib.suppress(OSError):
        (Spec(big).folder(small_disk / "runs") / "data.bin").unlink()
    small = run(Spec(twice, dict(n=3)), small_disk / "runs")
    assert small.ok  # there is room again


def test_disk_full_at_the_very_end(tmp_path, twice, monkeypatch):
    "The result is there, but the record that vouches for it cannot be written (a patched writer)."
    write = execution.write_atomically
    calls = []

    def full(path, *rest):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, f"{path} was not written (No space left on device)")
        return write(path, *rest)

    monkeypatch.setattr(execution, "write_atomically", full)
    r = run(Spec(twice), tmp_path / "runs")
    assert (
        (r.status, r.kind) == ("failed", "disk")
        and "No space left" in r.error
        and not result_of(r.folder).ok
        and (r.folder / "result.json").exists()
    )
    monkeypatch.undo()
    assert run(Spec(twice), tmp_path / "runs").fresh


# ------------------------------------------------------------------------------------------------------------------------------ executors


def seen_environment(seconds):
    time.sleep(seconds)
    return {k: os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}


def test_local_executor_gives_each_its_gpu_and_cores(monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")  # the function is importable in the process
    executor = LocalExecutor(workers=2, cores=3, gpus=[4, 5])
    found = [f.result(120) for f in [executor.submit(seen_environment, 1.0) for _ in range(2)]]
    assert {f["CUDA_VISIBLE_DEVICES"] for f in found} == {"4", "5"} and {f["OMP_NUM_THREADS"] for f in found} == {"3"}
    with pytest.raises(LostWorker, match="SIGKILL"):
        executor.submit(os.kill, 0, signal.SIGKILL).result(120)  # its own group
    with pytest.raises(ZeroDivisionError):
        executor.submit(divmod, 1, 0).result(120)
    executor.shutdown()
    with pytest.raises(ValueError, match="at least 1"):
        LocalExecutor(workers=0)


def test_a_lost_worker_is_tried_again(tmp_path):
    path = notebook(
        tmp_path / "kills.ipynb",
        "once: str = ''",
        "import os, signal\nif not os.path.exists(once): open(once, 'w').close(); os.kill(os.getppid(),"
        " signal.SIGKILL)",
        WRITE.format("dict(a=1)"),
    )
    done, said = quiet(
        [Spec(path, dict(once=str(tmp_path / "once")))], tmp_path / "runs", executor=LocalExecutor(1, 1, [])
    )
    assert done.ok and done.table.attempts.tolist() == [2] and "ended with SIGKILL" in said


def test_stopped_by_hand(tmp_path, twice):
    class Stopped:
        def submit(self, *_):
            raise KeyboardInterrupt

    done, _ = quiet([Spec(twice), Spec(twice, dict(n=2))], tmp_path / "runs", executor=Stopped())
    assert (
        done.interrupted
        and not done.ok
        and done.table.status.tolist() == ["interrupted", "waiting"]
        and done.summary.exists()
    )


def test_progress_on_a_terminal(twice, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    tasks = [
        Task(Spec(twice, dict(n=i)), f"twice n={i}", status=s, seconds=10.0 if s == "done" else None)
        for i, s in enumerate(["done", "running", "waiting", "failed"])
    ]
    show = Progress(tasks, Terminal())
    tasks[1].begun = time.monotonic()
    show.slots = 2
    assert show.eta() == pytest.approx(10, abs=0.5)  # ten seconds each, one waiting and one begun, two at a time
    show.refresh()
    drawn = show.stream.getvalue()
    assert "1 done, 1 running, 1 waiting, 1 failed of 4" in drawn and "0:10 left" in drawn and "twice n=1" in drawn
    show.say("line")
    assert show.stream.getvalue().endswith("\x1b[2A\x1b[Jline\n")  # drawn over, not left behind
    tasks[0].status = "waiting"
    assert show.eta() is None


# ---------------------------------------------------------------------------------------------------------------------- once more, and tables


def test_rerun_says_what_came_out_the_same(tmp_path):
    first = Spec(notebook(tmp_path / "first.ipynb", "seed: int = 3", WRITE.format("dict(value=seed)")), experiment="e")
    path = notebook(
        tmp_path / "chance.ipynb",
        "of: str = ''\nseed: int = 7",
        "import json, random, time, pandas as pd\nrandom.seed(seed)\na = random.random() +"
        " json.load(open(of))['value']",
        "pd.DataFrame(dict(category=['x', 'mean'], image_auroc=[a, time.time()],"
        " seconds=time.time())).to_csv(f'{output}/metrics.csv', index=False)",
        WRITE.format("dict(a=a, seconds=time.time())"),
    )
    second = Spec(path, dict(of="{first}/result.json"), "e", dict(first=first))
    assert run(first, tmp_path / "runs").ok
    folder = run(second, tmp_path / "runs").folder
    same = rerun(first.folder(tmp_path / "runs"))
    assert same.same.all() and same.what.tolist() == ["result.json value"] and not same.attrs["changed"]
    nb = nbformat.read(path, 4)
    nb.cells[1].source = "raise SystemError"
    nbformat.write(nb, path)  # today's notebook is not the one that was run
    table = rerun(folder, tmp_path / "again").set_index("what")
    assert (
        table.same["result.json a"]
        and table.same["metrics.csv image_auroc 0"]
        and not table.same["metrics.csv image_auroc 1"]
        and len(table) == 5
    )
    assert not any("seconds" in w for w in table.index)
    with pytest.raises(ValueError, match="is not empty"):
        rerun(folder, tmp_path / "again")
    text = (folder / "notebook.ipynb").read_text()
    (folder / "notebook.ipynb").write_text(text.replace("random.seed(seed)", "random.seed(8)"))
    with pytest.raises(ValueError, match="was changed after it was run"):
        rerun(folder)
    (folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        rerun(folder)


def test_train_and_evaluate_leave_what_tables_need(tmp_path):
    small = dict(size=64, images=1)
    learnt = Spec(
        EXPERIMENTS / "train.ipynb", dict(small, weights="random:0", epochs=1, seed=5, options=dict(sigma=2.0)), "e"
    )
    tested = Spec(
        EXPERIMENTS / "evaluate.ipynb",
        dict(small, checkpoint="{train}/checkpoint.safetensors"),
        "e",
        dict(train=learnt),
    )
    done, said = quiet([learnt, tested], tmp_path / "runs")
    assert done.ok, said
    result = result_of(tested.folder(tmp_path / "runs")).result
    record = result_of(tested.folder(tmp_path / "runs")).record
    assert (
        len(result["trained_on"]) == 15
        and result["transductive"] is False
        and result["backbones"] == dict(backbone="tiny-dino")
        and result["versions"]["torch"]
    )
    assert (
        record["fingerprint"] == result["fingerprint"]
        and record["weights"] == result["frozen"]
        and record["data"] == "synthetic-2-target"
    )
    table = collect(tmp_path / "runs")
    assert (
        table.category.tolist()[-1] == "mean"
        and len(table) == 13
        and table.method.unique().tolist() == ["visualad"]
        and table.seed.unique().tolist() == [5]
    )
    assert (
        table["train.weights"].unique().tolist() == ["random:0"]
        and table["train.options"].unique().tolist() == ['{"sigma": 2.0}']
        and not table.seen.any()
    )
    assert (
        table.trained_on.unique().tolist() == ["synthetic-2-auxiliary"]
        and table.image_auroc.between(0, 1).all()
        and table["size"].unique().tolist() == [64]
    )
    file = write_table(table, tmp_path / "all.csv", csv_fallback=True)
    pd.testing.assert_frame_equal(
        pd.read_csv(file)[["category", "image_auroc"]],
        table[["category", "image_auroc"]],
        check_dtype=False,
        rtol=1e-14,
        atol=0,
    )


# ------------------------------------------------------------------------------------------------------------------------------- sweep files


def test_expand(tmp_path, twice):
    plan = dict(
        name="p",
        variables=dict(A=None, K=3),
        stages=dict(
            one=dict(notebook="twice.ipynb", list=[dict(n=1), dict(n="$K")], grid=dict(log=["x", "${A}/y"])),
            two=dict(notebook="twice.ipynb", after="one", inherit=["n"], parameters=dict(log="{one}/result.json")),
        ),
    )
    specs = expand(plan, dict(A="z"), tmp_path)
    assert [(s.values["n"], s.values["log"]) for s in specs] == [(1, "x"), (1, "z/y"), (3, "x"), (3, "z/y")] + [
        (n, "{one}/result.json") for n in (1, 1, 3, 3)
    ]
    assert all(s.experiment == "p" for s in specs) and [s.after["one"].hash for s in specs[4:]] == [
        s.hash for s in specs[:4]
    ]
    for change, message in (
        (dict(variables=dict(A=None, B=None)), "needs --set A=... --set B=..."),
        (dict(stage=1), "did you mean stages"),
        (dict(stages=dict(one=dict(notebook="twice.ipynb", gird={}))), "did you mean grid"),
        (dict(stages=dict(one={})), "names no notebook"),
        (dict(stages=dict(one=dict(notebook="twice.ipynb", after="two"))), "which is no stage before it"),
        (dict(variables={}, stages=dict(one=dict(notebook="twice.ipynb", grid=dict(n=3)))), "needs a list for n"),
        (
            dict(variables={}, stages=dict(one=dict(notebook="twice.ipynb", parameters=dict(log="$B/x")))),
            "no variable 'B'",
        ),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            expand({**plan, **change}, {} if "variables" in change else dict(A="z"), tmp_path)
        assert message in str(caught.value)
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        expand(tmp_path / "bad.yaml")


def test_there_are_sweeps():
    assert {p.stem for p in SWEEPS} >= {"synthetic", "dma_sap", "ssvp", "visualad", "dapo", "baselines"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_sweep_files(path):
    "Every file expands, and every value fits its notebook."
    variables = yaml.safe_load(path.read_text()).get("variables") or {}
    specs = expand(path, {k: "folder" for k, v in variables.items() if v is None})
    assert len(specs) >= 4 and all(s.hash for s in specs)
    methods = {m for s in specs for m in s.values.get("methods", [s.values.get("method")])}
    assert methods <= set(MODULES)
    if path.stem == "figures":
        return  # what the figures need beside synthetic.yaml: tests/system/test_paper_figures.py
    if path.stem == "synthetic":
        assert (
            methods == set(MODULES)
            and len(specs) >= 24
            and len({s.values["seed"] for s in specs if s.notebook.stem == "train"}) > 1
        )
    else:
        trained = {(s.after[k].values["train_data"], s.values["data"]) for s in specs for k in s.after}
        assert {("visa", "mvtec"), ("mvtec", "visa")} <= trained and not any(a == b for a, b in trained)
