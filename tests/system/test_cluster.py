"Sweeps and evaluations on a Dask cluster whose workers and schedulers die, and shards whose sum is the whole."

import contextlib
import functools
import io
import json
import operator
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from test_runs import COUNT, WRITE, made_up, notebook, wait_for

from zsad_nb.cli.commands import main
from zsad_nb.data.index import make_index
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.metrics import PixelMetrics
from zsad_nb.evaluation.run_state import result_of
from zsad_nb.methods.base import create, save
from zsad_nb.runs.cluster import DaskExecutor, open_executor
from zsad_nb.runs.executors import LostWorker, Unusable
from zsad_nb.runs.plans import expand
from zsad_nb.runs.run import Spec
from zsad_nb.runs.schedulers import connect
from zsad_nb.runs.shards import evaluate_shards, split
from zsad_nb.runs.sweeps import sweep

GATED = (
    "import time\nopen(f'{output}/pids', 'w').write(f'{os.getpid()} {os.getppid()}')\nwhile gate and not"
    " os.path.exists(gate): time.sleep(0.1)"
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    "A scheduler and workers, each a process of its own."

    def __init__(self, place):
        self.place = place
        self.port = free_port()
        self.made = []

    @property
    def address(self):
        return f"tcp://127.0.0.1:{self.port}"

    def start(self, *command):
        with open(self.place / "cluster.log", "a") as log:
            self.made.append(subprocess.Popen([*map(str, command)], stdout=log, stderr=log, cwd=self.place))
        return self.made[-1]

    def scheduler(self, *options):
        made = self.start(
            sys.executable,
            "-m",
            "dask",
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--no-dashboard",
            *options,
        )
        wait_for(self.answers, 120)
        return made

    def answers(self):
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def worker(self, name, before=()):
        return self.start(
            *before,
            sys.executable,
            "-m",
            "dask",
            "worker",
            self.address,
            "--nthreads",
            1,
            "--no-nanny",
            "--no-dashboard",
            "--name",
            name,
            "--memory-limit",
            0,
        )

    def close(self):
        for p in self.made:
            p.kill()
        for p in self.made:
            p.wait()


@pytest.fixture
def new_cluster(tmp_path):
    pytest.importorskip("distributed")
    with contextlib.closing(Cluster(tmp_path)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "Two workers for the tests that leave them alive."
    distributed = pytest.importorskip("distributed")
    with contextlib.closing(Cluster(tmp_path_factory.mktemp("cluster"))) as cluster:
        cluster.scheduler("--scheduler-file", cluster.place / "scheduler.json")
        for name in ("a", "b"):
            cluster.worker(name)
        with distributed.Client(cluster.address, timeout=60) as client:
            client.wait_for_workers(2, 60)
            cluster.client = client
            yield cluster


@pytest.fixture
def executor(cluster, tmp_path):
    e = DaskExecutor(cluster.client, tmp_path)
    yield e
    e.shutdown()


def gone(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


class Background(threading.Thread):
    "A sweep in a thread, with what it said."

    def __init__(self, *arguments, **options):
        super().__init__(daemon=True)
        self.said = io.StringIO()
        self.done = None
        self.error = None
        self.call = functools.partial(sweep, *arguments, stream=self.said, **options)
        self.start()

    def run(self):
        try:
            self.done = self.call()
        except Exception as error:
            self.error = error


# --------------------------------------------------------------------------------------------------------------------------------- sweeps


@pytest.fixture
def gated(tmp_path):
    "A run that waits for a file when it is told of one, and its log."
    return notebook(
        tmp_path / "gated.ipynb",
        "n: int = 0\ngate: str = ''\nlog: str = ''\nof: str = ''",
        COUNT,
        WRITE.format("dict(n=n)"),
        GATED,
    )


def test_a_worker_killed_in_mid_sweep(new_cluster, tmp_path, gated):
    "Its kernel ends with it, what the run had written is not believed, the other worker does it again, nothing finished is done twice."
    gate = tmp_path / "gate"
    log = tmp_path / "log"
    runs = tmp_path / "runs"
    first = Spec(gated, dict(n=1, log=str(log)))
    slow = Spec(gated, dict(n=2, log=str(log), gate=str(gate), of="{first}/result.json"), after=dict(first=first))
    new_cluster.scheduler()
    for name in "ab":
        new_cluster.worker(name)
    background = Background([slow], runs, client=new_cluster.address)
    folder = slow.folder(runs)
    kernel, child = map(
        int, wait_for(lambda: background.error or (folder / "pids").exists() and (folder / "pids").read_text().split())
    )
    made = [p.pid for p in new_cluster.made]
    worker = next(p for p in psutil.Process(child).parents() if p.pid in made)  # a template may stand between them
    assert (folder / "result.json").exists()
    worker.kill()
    wait_for(lambda: gone(kernel) and gone(child), 30)
    assert not result_of(folder).ok  # interrupted, or begun again
    gate.touch()
    background.join(200)
    said = background.said.getvalue()
    assert background.done.ok and background.done.table.attempts.tolist() == [1, 2], said
    assert (
        "retry    gated n=2" in said
        and "is gone" in said
        and "2 workers on 127.0.0.1 (2), 2 runs at a time" in said
        and "1 worker on 127.0.0.1, 1 run at a time" in said
    )
    assert log.read_text().split() == ["1", "2", "2"] and all(
        result_of(s.folder(runs), s.hash).ok for s in (first, slow)
    )
    record = result_of(folder).record
    assert (
        record["attempt"] == 2
        and record["took_over"].startswith(f"process {child} on ")
        and record["cwd"] == os.getcwd()
    )
    assert not list(runs.glob(".cluster-*")) and background.done.summary.exists()


def test_a_scheduler_killed_in_mid_sweep(new_cluster, tmp_path, gated, capsys):
    "The sweep ends and says what to do; the same command on a new scheduler goes on from there."
    distributed = pytest.importorskip("distributed")
    gate = tmp_path / "gate"
    log = tmp_path / "log"
    runs = tmp_path / "runs"
    plan = dict(
        name="s", notebook="gated.ipynb", parameters=dict(log=str(log)), list=[dict(n=1), dict(n=2, gate=str(gate))]
    )
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(plan))
    one, two = expand(tmp_path / "s.yaml")
    made_up(one, runs)
    scheduler = new_cluster.scheduler()
    worker = new_cluster.worker("a")
    with distributed.Client(new_cluster.address, timeout=60) as client:
        client._timeout = 1  # how long it tries to come back
        background = Background([one, two], runs, client=client)
        pids = map(
            int,
            wait_for(
                lambda: (
                    background.error
                    or (two.folder(runs) / "pids").exists()
                    and (two.folder(runs) / "pids").read_text().split()
                )
            ),
        )
        before = (one.folder(runs) / "run.json").stat().st_mtime_ns
        scheduler.kill()
        background.join(60)
        assert (
            isinstance(background.error, Unusable)
            and "is gone. What was done is kept" in str(background.error)
            and "the same sweep again" in str(background.error)
        )
    said = background.said.getvalue()
    assert (
        "1 done, 1 interrupted" in said and "summary.md" in said and "does not answer; trying to reach it again" in said
    ), said
    for pid in pids:
        wait_for(lambda pid=pid: gone(pid), 60)  # the worker ends the run nobody waits for
    worker.wait(60)
    assert result_of(one.folder(runs)).ok and result_of(two.folder(runs)).status == "interrupted"
    new_cluster.scheduler()
    new_cluster.worker("b")
    gate.touch()
    assert main(["sweep", str(tmp_path / "s.yaml"), "--root", str(runs), "--scheduler", new_cluster.address]) == 0, (
        capsys.readouterr().err
    )
    assert (
        (one.folder(runs) / "run.json").stat().st_mtime_ns == before
        and result_of(two.folder(runs)).ok
        and log.read_text().split() == ["2", "2"]
    )
    assert "it was interrupted; it is run again" in capsys.readouterr().err


def test_a_scheduler_that_comes_back(new_cluster, tmp_path):
    "What was under way is lost and said so; the executor goes on with the new workers."
    new_cluster.scheduler()
    new_cluster.worker("a")
    with connect(new_cluster.address) as client:
        client.wait_for_workers(1, 60)
        executor = DaskExecutor(client, tmp_path)
        task = executor.submit(time.sleep, 300)
        wait_for(task.running)
        child = wait_for(lambda: psutil.Process(new_cluster.made[1].pid).children())[0]
        new_cluster.made[0].kill()
        wait_for(lambda: "does not answer" in executor.check())
        assert not task.done()
        new_cluster.scheduler()
        with pytest.raises(LostWorker, match="connection to the scheduler at .* was lost while it ran"):
            task.result()
        wait_for(lambda: gone(child.pid), 60)
        again = executor.submit(operator.add, 1, 2)
        wait_for(lambda: "no worker is connected" in executor.check(), 30)
        new_cluster.worker("b")
        assert again.result() == 3
        executor.shutdown()


def test_a_stopped_sweep_leaves_nothing_running(cluster, tmp_path, executor):
    tasks = [executor.submit(time.sleep, 300) for _ in range(3)]
    wait_for(lambda: sum(t.running() for t in tasks) == 2)  # two workers
    children = wait_for(lambda: [c for p in cluster.made[1:] for c in psutil.Process(p.pid).children()])
    assert len(children) == 2 and executor.check() == "" or "2 runs at a time" in executor._news
    executor.shutdown()
    for child in children:
        wait_for(lambda pid=child.pid: gone(pid), 30)
    assert not executor.place.exists() and not list(tmp_path.glob(".cluster-*"))


def test_a_killed_sweep_is_noticed(cluster, tmp_path):
    "The process of the sweep dies without a word: its runs are ended, so that they can be begun again."
    code = (
        "import time\nfrom distributed import Client\nfrom zsad_nb.runs.cluster import DaskExecutor\ne ="
        f" DaskExecutor(Client({cluster.address!r}), {str(tmp_path)!r})\nt = e.submit(time.sleep, 300)\nwhile not"
        " t.running(): time.sleep(0.1)\nprint('begun', flush=True)\ntime.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    child = wait_for(lambda: [c for p in cluster.made[1:] for c in psutil.Process(p.pid).children()])[0]
    process.kill()
    process.wait()
    wait_for(lambda: gone(child.pid), 60)


def test_what_a_call_may_do(cluster, executor, tmp_path):
    asked = [
        executor.submit(operator.truediv, 1, 0),
        executor.submit(os.kill, 0, signal.SIGKILL),
        executor.submit(os.getcwd),
        executor.submit(os.getenv, "ZSAD_SCHEDULER"),
    ]
    with pytest.raises(ZeroDivisionError):
        asked[0].result()
    with pytest.raises(LostWorker, match=r"worker [ab] \(tcp://.* on .*: its process ended with SIGKILL"):
        asked[1].result()
    assert [t.result() for t in asked[2:]] == [os.getcwd(), cluster.address]
    with open_executor(tmp_path, cluster.client, cores=3) as three:
        assert three.submit(os.getenv, "OMP_NUM_THREADS").result() == "3"


def test_a_task_that_dask_repeats_is_not_run_twice(cluster, executor, tmp_path):
    "As Dask does when the worker that held it died: the second worker sees that it was taken."
    task = executor.submit(operator.add, 1, 1)
    assert task.result() == 2
    from zsad_nb.runs.cluster import _on_worker

    task.ticket.with_name(task.ticket.name + ".begun").write_text("worker a (tcp://x) on y")
    cluster.client.submit(
        _on_worker,
        str(task.ticket),
        os.getcwd(),
        pickle.dumps((os.mkdir, (str(tmp_path / "twice"),))),
        {},
        [],
        pure=False,
    ).result()
    with pytest.raises(LostWorker, match=r"worker a \(tcp://x\) on y is gone"):
        task.result()
    assert not (tmp_path / "twice").exists()


# ------------------------------------------------------------------------------------------------------------------------- what is refused


def unshared():
    "How to start a process that sees another file system."
    for command in (["unshare", "-m"], ["unshare", "-r", "-m"]):
        with contextlib.suppress(OSError):
            if (
                subprocess.run(
                    [*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
                ).returncode
                == 0
            ):
                return command
    pytest.skip("no process can be given another file system here; the notebook tests the words")


def test_a_worker_that_sees_another_file_system(cluster, tmp_path):
    "Before anything starts, and when it comes later."
    runs = tmp_path / "runs"
    late = DaskExecutor(cluster.client, tmp_path / "late")
    runs.mkdir()
    before = [*unshared(), "sh", "-c", f'mount -t tmpfs none {tmp_path} && cd / && exec "$@"', "sh"]
    blind = cluster.worker("blind", before)
    try:
        cluster.client.wait_for_workers(3, 60)
        with pytest.raises(
            Unusable,
            match=(
                f"worker tcp://.* does not see {runs}.*must be on a file system that all machines mount.*Nothing was"
                " started"
            ),
        ):
            DaskExecutor(cluster.client, runs)
        assert not list(runs.iterdir())
        workers = cluster.client.scheduler_info()["workers"]
        address = next(a for a, w in workers.items() if w["name"] == "blind")
        from zsad_nb.runs.cluster import _on_worker

        (ticket := late.place / "t").touch()
        task = cluster.client.submit(_on_worker, str(ticket), os.getcwd(), b"", {}, [], workers=[address], pure=False)
        with pytest.raises(Unusable, match="worker blind .* does not see "):
            task.result()
        assert ticket.exists()  # not taken
    finally:
        late.shutdown()
        blind.kill()
        wait_for(lambda: len(cluster.client.nthreads()) == 2, 60)


class Refusing:
    "An executor all of whose workers are blind."

    def submit(self, *_):
        return self

    def done(self):
        return True

    def running(self):
        return True

    def result(self):
        raise Unusable("worker x does not see y")


def test_a_sweep_ends_when_its_executor_cannot_go_on(tmp_path, gated):
    said = io.StringIO()
    with pytest.raises(Unusable, match="worker x does not see y"):
        sweep([Spec(gated), Spec(gated, dict(n=4))], tmp_path / "runs", executor=Refusing(), stream=said)
    assert "1 interrupted, 1 waiting" in said.getvalue() and (tmp_path / "runs" / "gated" / "summary.md").exists()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            "tcp://127.0.0.1:{port}",
            (
                "no scheduler answers at tcp://127.0.0.1:{port} (Connection refused); start one there with `dask"
                " scheduler --port {port}`"
            ),
        ),
        ("127.0.0.1", "'127.0.0.1' is no scheduler; give tcp://HOST:PORT"),
        ("tcp://host", "'tcp://host' is no scheduler"),
        ("none.json", "no scheduler file at none.json"),
    ],
)
def test_wrong_addresses(tmp_path, gated, capsys, scheduler, message):
    pytest.importorskip("distributed")
    port = free_port()
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(dict(notebook="gated.ipynb")))
    start = time.monotonic()
    assert (
        main(
            [
                "sweep",
                str(tmp_path / "s.yaml"),
                "--root",
                str(tmp_path / "runs"),
                "--scheduler",
                scheduler.format(port=port),
            ]
        )
        == 2
    )
    assert message.format(port=port) in capsys.readouterr().err and time.monotonic() - start < 20
    assert (
        main(
            [
                "sweep",
                str(tmp_path / "s.yaml"),
                "--root",
                str(tmp_path / "runs"),
                "--scheduler",
                "tcp://127.0.0.1:1",
                "--workers",
                "2",
            ]
        )
        == 2
    )
    assert "workers=2 are of this machine" in capsys.readouterr().err


def test_without_dask(tmp_path, gated, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(dict(notebook="gated.ipynb")))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--root", str(tmp_path / "runs"), "--scheduler", "local"]) == 2
    assert "pip install zsad_nb[cluster]" in capsys.readouterr().err


def test_the_module_is_light():
    "A worker of a cluster imports it: no torch for that."
    code = (
        "import sys, zsad_nb.runs.cluster; print([m for m in ('torch', 'pandas', 'distributed', 'matplotlib') if m in"
        " sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_run_does_not_wait_for_its_own_cluster(cluster, monkeypatch):
    monkeypatch.setenv("ZSAD_SCHEDULER", cluster.address)
    with (
        pytest.raises(ValueError, match="has this very run among its tasks"),
        connect(cluster.place / "scheduler.json"),
    ):
        pass


# --------------------------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    "Four categories of seven images; one defective image has no mask, one category no normal image."
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for category in ("bolt", "cap", "disc", "edge"):
        for i in range(7):
            name = f"{category}{i}"
            bad = category == "edge" or i % 2 == 1
            masked = (category, i) != ("cap", 3)
            image = rng.integers(90, 140, (64, 64, 3), dtype=np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            if bad:
                y, x = rng.integers(0, 40, 2)
                image[y : y + 20, x : x + 20], mask[y : y + 20, x : x + 20] = 200 + i, 255
            Image.fromarray(image).save(root / f"{name}.png")
            Image.fromarray(mask).save(root / f"{name}_mask.png")
            rows.append(
                dict(
                    dataset="toy",
                    category=category,
                    split="test",
                    image=f"{name}.png",
                    mask=f"{name}_mask.png" if bad and masked else "",
                    anomalous=bad,
                    defect=f"spot {i % 3}" if bad else "good",
                )
            )
    return make_index([rows[i] for i in rng.permutation(len(rows))], root)


def equal(a, b):
    "To the last bit, in every table."
    for name in ("per_class", "per_image", "reasons"):
        x = getattr(a, name)
        y = getattr(b, name)
        pd.testing.assert_frame_equal(x, y, check_exact=True)
        for column in x.select_dtypes("float"):
            assert x[column].to_numpy().tobytes() == y[column].to_numpy().tobytes(), (name, column)
    assert a.seen == b.seen


@pytest.fixture(scope="module")
def method():
    return create("visualad", backbone="tiny-dino", weights="random:0", image_size=64)


@pytest.fixture(scope="module")
def whole(method, index):
    return evaluate(method, index, batch_size=3, limits=(0.3, 0.05), progress=False)


@pytest.mark.parametrize("shards", [1, 2, 5, 40])
def test_shards_are_the_whole(method, index, whole, shards):
    with ThreadPoolExecutor(1) as pool:
        equal(
            evaluate_shards(method, index, shards, executor=pool, batch_size=3, limits=(0.3, 0.05), progress=False),
            whole,
        )
    assert whole.reasons["metric"].tolist() and whole.per_class["image_auroc"].isna().sum() == 1


def test_batches_are_those_of_one_process(index, monkeypatch):
    "The same images together, with the same numbers for their defects."
    plain = create("self_distance", weights="random:0", image_size=64, tap=1)
    predict = type(plain).predict
    seen = []

    def peek(self, batch, cache=None):
        seen.append((batch.path, batch.defect.tolist(), batch.category))
        return predict(self, batch, cache)

    monkeypatch.setattr(type(plain), "predict", peek)
    evaluate(plain, index, batch_size=3, progress=False)
    whole, seen[:] = list(seen), []
    with ThreadPoolExecutor(1) as pool:
        evaluate_shards(plain, index, 6, executor=pool, batch_size=3, progress=False)
    assert seen == whole and len(seen) == 12 and max(max(d) for _, d, _ in seen) >= 2


def test_shards_are_whole_batches(index):
    test = index[index["split"] == "test"]
    for shards, size in ((1, 3), (3, 3), (7, 2), (100, 1), (4, 8)):
        found = split(test, shards, size)
        sizes = dict(test.groupby("category").size())
        covered = {c: [] for c in sizes}
        for part in found:
            for category, start, stop in part:
                assert start % size == 0 and (stop % size == 0 or stop == sizes[category])
                covered[category] += range(start, stop)
        assert {c: list(range(n)) for c, n in sizes.items()} == covered and len(found) <= shards
        numbers = [sum(b - a for _, a, b in part) for part in found]
        assert max(numbers) - min(numbers) <= 2 * size
    with pytest.raises(ValueError, match="shards=0: at least 1"):
        split(test, 0)


def test_transductive_methods_are_divided_between_categories_only(index):
    mutual = create("mutual", weights="random:0", image_size=64, references=4)
    test = index[index["split"] == "test"]
    assert (
        all(
            stop - start == (test["category"] == c).sum()
            for part in split(test, 9, 3, whole=True)
            for c, start, stop in part
        )
        and len(split(test, 9, 3, whole=True)) == 4
    )
    calls = []

    class Pool(ThreadPoolExecutor):
        def submit(self, function, *arguments):
            calls.append(arguments[-1])
            return super().submit(function, *arguments)

    with Pool(1) as pool:
        equal(
            evaluate_shards(mutual, index, 9, executor=pool, batch_size=3, progress=False),
            evaluate(mutual, index, batch_size=3, progress=False),
        )
    assert [[c for c, _, _ in part] for part in calls] == [[c] for c in sorted(test["category"].unique())]


def test_what_was_seen_is_refused_and_marked(method, index, monkeypatch):
    monkeypatch.setattr(method, "trained_on", ["toy/zz"])
    with pytest.raises(ValueError, match="would not be zero-shot"):
        evaluate_shards(method, index, executor=None)
    with pytest.warns(UserWarning, match="are not zero-shot"), ThreadPoolExecutor(1) as pool:
        merged = evaluate_shards(
            method, index, 2, executor=pool, batch_size=3, limits=(0.3, 0.05), progress=False, allow_seen="toy"
        )
    assert merged.seen == sorted("toy/" + index["category"].unique())
    with pytest.warns(UserWarning, match="are not zero-shot"):
        equal(merged, evaluate(method, index, batch_size=3, limits=(0.3, 0.05), progress=False, allow_seen="toy"))


def test_shards_in_processes_and_on_a_cluster(cluster, method, index, whole, tmp_path):
    "The method itself to a process of this machine, the path of a checkpoint to the workers of a cluster."
    how = dict(batch_size=3, limits=(0.3, 0.05), progress=False)
    equal(evaluate_shards(method, index, 1, **how), whole)
    path = save(method, tmp_path / "method.safetensors")
    equal(
        evaluate_shards(
            path, index, 2, client=cluster.client, folder=tmp_path / "counts", changes=dict(image_size=64), **how
        ),
        whole,
    )
    assert not list((tmp_path / "counts").iterdir())


def test_a_shard_that_dies_and_one_that_fails(method, index, whole):
    class Dying:
        "Loses the first tries."

        def __init__(self, losses):
            self.losses = losses

        def submit(self, function, *arguments):
            future = Future()
            self.losses = self.losses - 1
            if self.losses >= 0:
                future.set_exception(LostWorker("its process ended with SIGKILL"))
            else:
                future.set_result(function(*arguments))
            return future

    equal(evaluate_shards(method, index, 2, executor=Dying(1), batch_size=3, limits=(0.3, 0.05), progress=False), whole)
    with pytest.raises(LostWorker, match="shard . of 2, after 2 tries: its process ended with SIGKILL"):
        evaluate_shards(method, index, 2, executor=Dying(4), batch_size=3, progress=False)
    bad = index.copy()
    bad.attrs = index.attrs
    bad.loc[bad.index[-1], "image"] = "none.png"
    with pytest.raises(Exception, match="none.png"), ThreadPoolExecutor(1) as pool:
        evaluate_shards(method, bad, 2, executor=pool, progress=False)
    unsent = create("self_distance", weights="random:0", image_size=64, tap=1)
    unsent.handle = open(os.devnull)
    with (
        pytest.raises(
            ValueError, match="self_distance cannot be sent to other processes .* pass the checkpoint's path"
        ),
        unsent.handle,
    ):
        evaluate_shards(unsent, index, 2)


# ------------------------------------------------------------------------------------------------------------------------- metrics in files


def test_metrics_kept_in_files(tmp_path):
    "Blocks of several sizes, on disk and in memory, ties, an image without a mask: loaded and merged they are one."
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 40, (9, 20, 20)).astype(np.float32) / 7
    masks = rng.random((9, 20, 20)) > 0.9
    maps[0, 0, 0], has = -3.0, np.arange(9) != 4
    masks[4] = False
    want = PixelMetrics((0.3, 0.1)).update(maps, masks, has)
    for options in (dict(), dict(block=64), dict(block=64, memory_limit=0, spill=tmp_path)):
        total = PixelMetrics((0.3, 0.1), **options)
        for i in range(4):
            with PixelMetrics((0.3, 0.1), **options) as part:
                file = part.update(maps[i::4], masks[i::4], has[i::4]).save(tmp_path / f"{i}.pixels")
            with PixelMetrics.load(file, **options) as part:
                assert part.limits == (0.3, 0.1)
                total.merge(part)
            file.unlink()  # mapped blocks stay
        assert total.compute() == want.compute() and (total.images, total.excluded, total.regions) == (
            9,
            1,
            want.regions,
        )
        total.update(maps[:1], masks[:1])  # it goes on
        assert (
            total.compute() == PixelMetrics((0.3, 0.1)).update(maps, masks, has).update(maps[:1], masks[:1]).compute()
        )
        total.close()
    empty = PixelMetrics.load(PixelMetrics().save(tmp_path / "empty"))
    assert empty.merge(want).compute()["pixel_auroc"] == want.compute()["pixel_auroc"]
    content = want.save(tmp_path / "cut").read_bytes()
    for n, message in (
        (len(content) - 1, "is cut short"),
        (12, "holds no pixel metrics"),
        (0, "holds no pixel metrics"),
    ):
        (tmp_path / "cut").write_bytes(content[:n])
        with pytest.raises(ValueError, match=message):
            PixelMetrics.load(tmp_path / "cut")


def test_the_notebook_takes_shards(index, tmp_path):
    "The cells of `evaluate` with two shards leave the numbers of one."
    cells = json.loads((ROOT / "nbs" / "experiments" / "evaluate.ipynb").read_text())["cells"]
    parameters, imports, data, metrics = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"][:4]
    found = []
    for shards in (1, 2):
        space = {}
        for cell in (parameters, imports):
            exec(cell, space)
        space.update(
            weights="random:0",
            shards=shards,
            method="self_distance",
            size=64,
            options=dict(tap=1),
            batch=2,
            out=tmp_path / str(shards),
            load_dataset=lambda *_, **__: index,
        )
        with ThreadPoolExecutor(1) as pool:
            space["evaluate_shards"] = functools.partial(evaluate_shards, executor=pool)
            for cell in (data, metrics):
                exec(cell, space)
        found.append(space["evaluation"])
    equal(*found)
    assert (tmp_path / "1" / "metrics.csv").read_bytes() == (tmp_path / "2" / "metrics.csv").read_bytes()
