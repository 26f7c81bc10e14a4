"SIGKILL at random moments: the same call goes on, and its end is that of a run that was never disturbed, to the last bit."

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image
from test_runs import WRITE, notebook

from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.run_state import result_of
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.journal import Journal
from zsad_nb.inspection.verdicts import COLUMNS
from zsad_nb.methods.base import create
from zsad_nb.runs.executors import LocalExecutor, LostWorker
from zsad_nb.runs.run import Spec, run
from zsad_nb.runs.shards import evaluate_shards
from zsad_nb.runs.sweeps import sweep
from zsad_nb.synthetic.benchmark import synthetic_index

TIMES = int(os.environ.get("ZSAD_KILLS", 2))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")


def forked(work) -> int:
    "A copy of this process that does some work and ends."
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        null = os.open(os.devnull, os.O_RDWR)
        for n in (1, 2):
            os.dup2(null, n)
        work()
        code = 0
    os._exit(code)


def killed_after(seconds, work) -> int | None:
    "Do some work in another process and kill it; its status, None where it was killed."
    child = forked(work)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def content(folder, *patterns):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for pattern in patterns for p in sorted(folder.rglob(pattern))
    }


def test_predict(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(24):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / "in" / f"{n:02}.png"
        )
    inspector = Inspector.load("self_distance", image_size=64, batch_size=2).use_values(0.1, 0.05)
    begun = time.monotonic()
    inspector.predict(tmp_path / "in", tmp_path / "undisturbed", progress=False)
    took = time.monotonic() - begun
    moments = random.Random(TIMES)
    killed = 0
    kept = []
    for turn in range(20 * TIMES):
        if killed == TIMES:
            break
        out = tmp_path / f"out{turn // 3}"
        begun = time.monotonic()  # three in a row into one folder
        if (
            killed_after(
                moments.uniform(0, took), lambda out=out: inspector.predict(tmp_path / "in", out, progress=False)
            )
            is None
        ):
            killed += 1
        else:
            took = min(took, time.monotonic() - begun)
    assert killed == TIMES
    for out in sorted(tmp_path.glob("out*")):
        copy = tmp_path / "journals" / out.name  # reading a journal undoes what a kill left half done
        shutil.copytree(out, copy, ignore=shutil.ignore_patterns("pictures"), dirs_exist_ok=True)
        before = len(Journal(copy / "journal.sqlite", COLUMNS).rows)
        table = inspector.predict(tmp_path / "in", out, progress=False)
        kept.append(table.attrs["summary"]["known_before"])
        assert kept[-1] == before, "rows are not computed again"
        assert content(out, "*.csv", "*.png", "*.json") == content(tmp_path / "undisturbed", "*.csv", "*.png", "*.json")
        assert not list(out.rglob("*.tmp"))
    print(f"predict: {killed} kills, {kept} of 24 rows kept")


def test_sweep(tmp_path):
    book = notebook(
        tmp_path / "n.ipynb",
        "n: int = 1",
        "import numpy as np\nvalue = np.random.default_rng(n).random(1000).tolist()",
        WRITE.format("dict(value=value)"),
    )
    specs = [Spec(book, dict(n=n)) for n in range(3)]
    log = open(os.devnull, "w")
    begun = time.monotonic()
    sweep(specs, tmp_path / "undisturbed", executor=ThreadPoolExecutor(1), stream=log)
    took = time.monotonic() - begun
    moments = random.Random(TIMES)
    killed = 0
    finished = []
    for turn in range(5 * TIMES):
        if killed == TIMES:
            break
        root = tmp_path / f"runs{turn // 3}"
        done = {
            s.hash: (s.folder(root) / "run.json").stat().st_mtime_ns
            for s in specs
            if result_of(s.folder(root), s.hash).ok
        }
        begun = time.monotonic()
        if (
            killed_after(
                moments.uniform(0, took),
                lambda root=root: sweep(specs, root, executor=ThreadPoolExecutor(1), stream=log),
            )
            is None
        ):
            killed += 1
        elif not done:
            took = min(took, time.monotonic() - begun)
        assert all((s.folder(root) / "run.json").stat().st_mtime_ns == done[s.hash] for s in specs if s.hash in done), (
            "what is done is not repeated"
        )
        finished.append(sum(result_of(s.folder(root), s.hash).ok for s in specs))
    assert killed == TIMES
    for root in sorted(tmp_path.glob("runs*")):
        assert sweep(specs, root, executor=ThreadPoolExecutor(1), stream=log).ok
        assert (
            content(root, "result.json") == content(tmp_path / "undisturbed", "result.json")
            and len(content(root, "result.json")) == 3
        )
        assert not list(root.rglob("*.tmp")) and all(
            json.loads(p.read_text())["status"] == "done" for p in root.rglob("run.json")
        )
    print(f"sweep: {killed} kills, {finished} of 3 runs done by then")


class Forked:
    "Shards in copies of this process."

    def __init__(self):
        self.pids = set()
        self._pool = ThreadPoolExecutor(2)

    def submit(self, function, *arguments) -> Future:
        return self._pool.submit(self._call, function, arguments)

    def _call(self, function, arguments):
        with tempfile.TemporaryDirectory() as place:
            answer = Path(place) / "answer"
            child = forked(lambda: answer.write_bytes(pickle.dumps(function(*arguments))))
            self.pids.add(child)
            _, status = os.waitpid(child, 0)
            self.pids.discard(child)
            if status:
                raise LostWorker(f"ended with {os.waitstatus_to_exitcode(status)}")
            return pickle.loads(answer.read_bytes())


def test_sharded_evaluation(tmp_path):
    "A shard is killed and repeated; more than two kills: in the processes that `evaluate_shards` starts by itself."
    index = synthetic_index(tmp_path / "set", "target", size=64, normal=3, defective=3)
    method = create("self_distance", image_size=64)
    undisturbed = evaluate(method, index, size=64, batch_size=2, progress=False)
    moments = random.Random(TIMES)
    killed = []
    executor = Forked() if TIMES <= 2 else LocalExecutor(2, cores=1, gpus=[])
    stop = threading.Event()
    pids = (lambda: list(executor.pids)) if TIMES <= 2 else (lambda: list(executor._alive))

    def kill():
        while not stop.is_set() and len(killed) < TIMES:
            stop.wait(moments.uniform(0.02, 0.3 if TIMES <= 2 else 12))
            for pid in pids()[:1]:
                with contextlib.suppress(OSError, psutil.Error):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        for turn in range(10 * TIMES):
            found = evaluate_shards(
                method,
                index,
                2,
                executor=executor,
                retries=100,
                size=64,
                batch_size=2,
                progress=False,
                folder=tmp_path / "counts",
            )
            pd.testing.assert_frame_equal(found.per_class, undisturbed.per_class, rtol=0, atol=0)
            pd.testing.assert_frame_equal(found.per_image, undisturbed.per_image, rtol=0, atol=0)
            if len(killed) >= TIMES:
                break
    finally:
        stop.set()
        killer.join()
        if TIMES > 2:
            executor.shutdown()
    assert len(killed) >= TIMES and not list((tmp_path / "counts").iterdir())
    print(f"sharded evaluation: {len(killed)} kills in {turn + 1} evaluations")


def test_the_clock_set_back(tmp_path):
    "Files from the future, and a record that says so: done is done, and nothing waits for the clock."
    book = notebook(tmp_path / "n.ipynb", "n: int = 1", WRITE.format("dict(n=n)"))
    found = run(Spec(book), tmp_path / "runs")
    record = json.loads((found.folder / "run.json").read_text())
    (found.folder / "run.json").write_text(
        json.dumps(dict(record, started="2099-01-01T00:00:00+00:00", finished="1970-01-01T00:00:00+00:00"))
    )
    for path in [found.folder, *found.folder.iterdir()]:
        os.utime(path, (time.time() + 10**8,) * 2)
    again = run(Spec(book), tmp_path / "runs")
    assert again.ok and not again.fresh
    (found.folder / "run.json").write_text(json.dumps(dict(record, status="running")))
    (found.folder / ".lock").write_text("process 999999 on elsewhere")
    os.utime(found.folder / ".lock", (time.time() + 10**8,) * 2)
    begun = time.monotonic()
    third = run(Spec(book), tmp_path / "runs")
    assert (
        third.ok
        and third.fresh
        and third.record["seconds"] >= 0
        and third.record["took_over"] == "process 999999 on elsewhere"
        and time.monotonic() - begun < 120
    )
