"What this package starts listens on loopback, what it unpickles nobody else could have written, and its locks touch nothing of others."

import contextlib
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from zsad_nb.core.locks import LOCKS, Busy, is_locked, lock
from zsad_nb.evaluation.run_state import result_of
from zsad_nb.methods.base import create
from zsad_nb.runs import execution
from zsad_nb.runs.executors import LocalExecutor
from zsad_nb.runs.run import Spec, run
from zsad_nb.runs.shards import evaluate_shard, evaluate_shards
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training import devices


def listening(pids=None):
    "Addresses that processes listen on beyond this machine: all below this one."
    me = psutil.Process()
    found = []
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            found += [p.laddr for p in process.net_connections(kind="inet") if p.status == "LISTEN"]
    return [a for a in found if a.ip not in ("127.0.0.1", "::1")], found


class Watch(threading.Thread):
    "Everything that listened while something ran, and how often it was looked."

    def __init__(self):
        super().__init__(daemon=True)
        self.wide = set()
        self.all = set()
        self.stop = threading.Event()

    def look(self):
        wide, every = listening()
        self.wide |= set(wide)
        self.all |= set(every)

    def run(self):
        while not self.stop.is_set():
            self.look()
            time.sleep(0.05)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.join()


# -------------------------------------------------------------------------------------------------------------------------------- network


def test_a_local_cluster_listens_on_loopback(tmp_path):
    pytest.importorskip("distributed")
    from zsad_nb.runs.cluster import DaskExecutor
    from zsad_nb.runs.schedulers import connect

    with Watch() as watch, connect("local", 2) as client:
        executor = DaskExecutor(client, tmp_path)
        assert executor._link.startswith("; http://127.0.0.1:"), executor._link  # where it can be opened
        assert stat.S_IMODE(executor.place.stat().st_mode) == 0o700
        watch.look()  # once for certain, however busy the machine is
        executor.shutdown()
    assert not watch.wide and watch.all


def test_processes_of_a_training_meet_on_loopback():
    "Also where the user's environment names another interface."
    with Watch() as watch:
        store = devices._store()
        store.set("a", "b")
        time.sleep(0.2)
        assert torch.distributed.TCPStore("127.0.0.1", store.port, is_master=False).get("a") == b"b"
    assert not watch.wide and any(a.port == store.port for a in watch.all)


def test_a_kernel_listens_on_loopback(tmp_path, monkeypatch):
    "Sockets in a private folder, or, where its path is too long for them, ports of this machine."
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with Watch() as watch:
        found = run(Spec(small(tmp_path / "n.ipynb")), tmp_path / "runs")
    assert found.ok and watch.all and not watch.wide


def authority(folder):
    "A certificate authority, and a certificate that it signed."

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-days",
        "2",
        "-subj",
        "/CN=ours",
    )
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "own.csr", "-subj", "/CN=localhost")
    openssl(
        "x509",
        "-req",
        "-in",
        "own.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-out",
        "cert.pem",
        "-days",
        "2",
    )
    return {name: folder / f"{name}.pem" for name in ("ca", "cert", "key")}


def test_a_sweep_over_tls(tmp_path, capsys):
    "A scheduler and a worker that answer only to who has a certificate."
    pytest.importorskip("distributed")
    if not any((Path(p) / "openssl").is_file() for p in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("needs openssl")
    from test_cluster import free_port

    from zsad_nb.cli.commands import main

    tls = authority(tmp_path)
    port = free_port()
    options = [
        word for name, path in tls.items() for word in (f"--tls-{name}" + ("-file" if name == "ca" else ""), str(path))
    ]
    made = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *words, *options],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for words in (
            ("scheduler", "--host", f"tls://127.0.0.1:{port}", "--no-dashboard"),
            (
                "worker",
                f"tls://127.0.0.1:{port}",
                "--host",
                "127.0.0.1",
                "--nthreads",
                "1",
                "--no-nanny",
                "--no-dashboard",
            ),
        )
    ]
    small(tmp_path / "n.ipynb")
    (tmp_path / "s.yaml").write_text("notebook: n.ipynb\n")
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and not any(
            c.laddr.port == port
            for c in psutil.Process(made[0].pid).net_connections(kind="inet")
            if c.status == "LISTEN"
        ):
            time.sleep(0.1)
        call = [
            "sweep",
            str(tmp_path / "s.yaml"),
            "--root",
            str(tmp_path / "runs"),
            "--scheduler",
            f"tls://127.0.0.1:{port}",
        ]
        assert main(call) == 2 and "needs certificates: give --tls-ca" in capsys.readouterr().err
        assert main([*call, "--tls-ca", str(tls["ca"])]) == 2 and "cert and key is not given" in capsys.readouterr().err
        assert (
            main(
                [*call[:-1], f"tcp://127.0.0.1:{port}", "--tls-ca", str(tls["ca"]), "--tls-cert", "x", "--tls-key", "y"]
            )
            == 2
            and "are for a tls:// scheduler" in capsys.readouterr().err
        )
        assert main([*call, *(w for name, path in tls.items() for w in (f"--tls-{name}", str(path)))]) == 0, (
            capsys.readouterr().err
        )
        import dask

        assert not dask.config.get("distributed.comm.tls.client.cert", None)  # nothing of it stays
    finally:
        for process in made:
            process.kill()
        for process in made:
            process.wait()


# -------------------------------------------------------------------------------------------------------------------- pickles and their folders


def small(path):
    from test_runs import WRITE, notebook

    return notebook(path, "n: int = 1", WRITE.format("dict(n=n)"))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return synthetic_index(tmp_path_factory.mktemp("data") / "set", "target", size=32, normal=1, defective=1)


class Here:
    "Calls at once, and looks at what the shards were given."

    def __init__(self):
        self.modes, self.change = {}, None

    def submit(self, function, folder, *arguments):
        from concurrent.futures import Future

        place = Path(folder)
        self.modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (place, *place.iterdir())}
        if self.change:
            self.change(place)
        future = Future()
        try:
            future.set_result(function(folder, *arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_shards_are_private_whatever_the_umask(index, tmp_path, umask):
    before = os.umask(umask)
    executor = Here()
    try:
        evaluate_shards(
            create("self_distance", image_size=32),
            index,
            1,
            executor=executor,
            folder=tmp_path,
            progress=False,
            size=32,
        )
    finally:
        assert os.umask(before) == umask
    assert len(executor.modes) == 2 and set(executor.modes.values()) == {0o700, 0o600}, executor.modes


@pytest.mark.parametrize(
    "change",
    [
        lambda p: os.chmod(p / "evaluation.pt", 0o666),
        lambda p: os.chmod(p, 0o777),
        lambda p: (os.rename(p / "evaluation.pt", p / "x"), os.symlink(p / "x", p / "evaluation.pt")),
    ],
)
def test_nothing_is_unpickled_that_others_could_write(index, tmp_path, change):
    executor = Here()
    executor.change = change
    with pytest.raises(PermissionError, match="evaluation.pt|could have been written"):
        evaluate_shards(
            create("self_distance", image_size=32),
            index,
            1,
            executor=executor,
            folder=tmp_path,
            progress=False,
            size=32,
        )


def test_a_planted_evaluation_is_not_run(tmp_path):
    "As anyone could leave it in a folder that all may write to."

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "place").mkdir(mode=0o777)
    os.chmod(tmp_path / "place", 0o777)
    (tmp_path / "place" / "evaluation.pt").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(PermissionError):
        evaluate_shard(str(tmp_path / "place"), 0, [])
    assert not (tmp_path / "ran").exists()


def test_a_planted_answer_is_not_run(tmp_path):
    pytest.importorskip("distributed")
    from types import SimpleNamespace

    from zsad_nb.runs.cluster import Ticket

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "t.answer").write_bytes(pickle.dumps(("value", Runs())))
    os.chmod(tmp_path / "t.answer", 0o666)
    ticket = Ticket(
        SimpleNamespace(client=SimpleNamespace(status="running"), begun=set, alive=lambda: None),
        tmp_path / "t",
        SimpleNamespace(status="finished"),
    )
    with pytest.raises(PermissionError, match="nothing that could run code"):
        ticket.result()
    assert not (tmp_path / "ran").exists()


def test_another_checkout_in_the_folder_is_not_imported(tmp_path, monkeypatch):
    "Neither by a worker's process nor by a run's kernel: what runs is what the record names."
    (tmp_path / "zsad_nb").mkdir()
    (tmp_path / "zsad_nb" / "__init__.py").write_text("raise SystemExit('another checkout')")
    monkeypatch.chdir(tmp_path)
    executor = LocalExecutor(gpus=[])
    try:
        assert executor.submit(os.getcwd).result(120) == str(tmp_path)
    finally:
        executor.shutdown()


def test_a_run_records_what_executed_it(tmp_path, monkeypatch):
    "A kernelspec of the same name, startup variables of it and another checkout change nothing; a kernel that is another is no finished run."
    (tmp_path / "zsad_nb").mkdir()
    (tmp_path / "zsad_nb" / "__init__.py").write_text("raise SystemExit('another checkout')")
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        '{"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)
    from test_runs import WRITE, notebook

    book = notebook(
        tmp_path / "n.ipynb",
        "n: int = 1",
        "import sys, zsad_nb",
        WRITE.format("dict(package=zsad_nb.__file__, executable=sys.executable)"),
    )
    found = run(Spec(book), tmp_path / "runs")
    assert found.ok, found.error
    import zsad_nb

    kernel = found.record["kernel"]
    assert found.result == dict(package=zsad_nb.__file__, executable=sys.executable)
    assert (
        kernel["executable"] == sys.executable
        and kernel["prefix"] == sys.prefix
        and kernel["package"] == str(Path(zsad_nb.__file__).parent)
        and kernel["source"] == found.record["code"]["source"]
    )
    assert (
        found.record["versions"]["torch"] == torch.__version__.partition("+")[0]
        or found.record["versions"]["torch"] == torch.__version__
    )
    monkeypatch.setattr(execution, "package_folder", lambda: Path("/another/environment"))
    other = run(Spec(book, dict(n=2)), tmp_path / "runs")
    assert (
        other.status == "failed"
        and "another environment executed the notebook" in other.error
        and result_of(other.folder).status == "failed"
    )


# ---------------------------------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "fifo", "text", "binary"])
def test_what_is_called_like_a_lock_is_left_alone(tmp_path, kind):
    victim = tmp_path / "thesis.tex"
    folder = tmp_path / "run"
    victim.write_text("years of work")
    folder.mkdir()
    at = folder / ".lock"
    dict(
        link=lambda: at.symlink_to(victim),
        dangling=lambda: at.symlink_to(tmp_path / "nowhere"),
        folder=at.mkdir,
        fifo=lambda: os.mkfifo(at),
        text=lambda: at.write_text("# of another program\n"),
        binary=lambda: at.write_bytes(bytes(range(200))),
        **{"hard link": lambda: os.link(victim, at)},
    )[kind]()
    before = at.read_bytes() if kind in ("text", "binary", "hard link") else os.lstat(at)
    with lock(folder):
        assert is_locked(folder)
        with pytest.raises(Busy, match=f"is being run by process {os.getpid()}"), lock(folder):
            pass
    assert not is_locked(folder)
    assert victim.read_text() == "years of work" and not (tmp_path / "nowhere").exists()
    assert (at.read_bytes() if kind in ("text", "binary", "hard link") else os.lstat(at)) == before


def test_a_run_goes_on_beside_it(tmp_path):
    victim = tmp_path / "thesis.tex"
    spec = Spec(small(tmp_path / "n.ipynb"))
    victim.write_text("years of work")
    folder = spec.folder(tmp_path / "runs")
    folder.mkdir(parents=True)
    for name in (".lock", "run.json", "result.json", "run.log"):
        (folder / name).symlink_to(victim)
    found = run(spec, tmp_path / "runs")
    assert victim.read_text() == "years of work"
    assert found.ok or ("run.log" in found.error or "symbolic" in found.error), found
    (folder / "run.log").unlink()
    assert run(spec, tmp_path / "runs").ok and victim.read_text() == "years of work" and (folder / ".lock").is_symlink()


def test_both_names_taken_is_an_error(tmp_path):
    for name in LOCKS:
        (tmp_path / name).mkdir()
    with pytest.raises(OSError, match="are not files of this package; delete them"), lock(tmp_path):
        pass


def test_threads_leave_the_umask(tmp_path):
    before = os.umask(0o077)
    try:

        def job(n):
            for k in range(30):
                with lock(tmp_path / f"{n}-{k}"):
                    pass

        threads = [threading.Thread(target=job, args=(n,)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert os.umask(0o077) == 0o077 and all(
            stat.S_IMODE((p / ".lock").stat().st_mode) == 0o600 for p in tmp_path.iterdir()
        )
    finally:
        os.umask(before)


def test_a_folder_of_someone_else_is_looked_at(tmp_path, permissions_hold):
    "Without a right to write: what is held is seen to be held."
    folder = tmp_path / "run"
    with lock(folder):
        folder.chmod(0o555), (folder / ".lock").chmod(0o444)
        assert result_of(folder).status == "running"
    try:
        assert result_of(folder).status == "absent"
    finally:
        folder.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(OSError):
        lock(tmp_path / "closed").__enter__()
