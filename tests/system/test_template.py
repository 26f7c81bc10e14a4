"Kernels copied from a template: as fresh as a new process, whatever ran before, and nothing that dies harms the next one."

import ast
import io
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from test_runs import WRITE, notebook

import zsad_nb
from zsad_nb.evaluation.run_state import result_of
from zsad_nb.runs.executors import LocalExecutor
from zsad_nb.runs.run import Spec, run
from zsad_nb.runs.sweeps import sweep
from zsad_nb.runs.template import can_copy

pytestmark = pytest.mark.skipif(not can_copy(), reason="processes are copied on Linux only")

STATE = """
import decimal, gc, locale, logging, os, random, resource, signal, sys, threading, warnings
import matplotlib, matplotlib.pyplot, numpy as np, pandas as pd, torch, tqdm.auto
from zsad_nb.methods.base import create
from zsad_nb.core.settings import seed_everything
import zsad_nb.evaluation.metrics as metrics

state = dict(
    cwd=os.getcwd(),
    path=sys.path,
    environment={k: v for k, v in sorted(os.environ.items()) if k not in ("JPY_PARENT_PID", "PYTEST_CURRENT_TEST")},
    flags=str(sys.flags),
    arguments=[a for a in sys.argv if "json" not in a],
    main=__name__,
    signals=[str(signal.getsignal(n)).partition(" at ")[0] for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)],
    limits=[resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT")],
    mask=os.umask(0o22),
    session=os.getsid(0) == os.getpid(),
    affinity=sorted(os.sched_getaffinity(0)),
    filters=sorted(map(str, warnings.filters)),
    threads=sorted(t.name.partition("-")[0] for t in threading.enumerate()),
    dtype=str(torch.get_default_dtype()),
    torch_threads=torch.get_num_threads(),
    deterministic=torch.are_deterministic_algorithms_enabled(),
    cuda=torch.cuda.is_initialized(),
    parameters={k: str(v) for k, v in matplotlib.rcParams.items()},
    backend=matplotlib.get_backend(),
    bars=tqdm.auto.tqdm.__mro__[1].__name__,
    display=pd.get_option("display.max_rows"),
    recursion=sys.getrecursionlimit(),
    collector=(gc.isenabled(), gc.get_threshold()),
    handlers=len(logging.getLogger().handlers),
    level=logging.getLogger().level,
    locale=locale.setlocale(locale.LC_ALL),
    decimals=str(decimal.getcontext()),
    stdin=sys.stdin is None or sys.stdin.fileno() if hasattr(sys.stdin, "fileno") else None,
    read=os.read(0, 1).decode(),
    names=sorted(n for n in globals() if not n.startswith("_")),
    patched=metrics.image_metrics.__name__,
)
chance = [random.random(), float(np.random.rand()), torch.rand(1).item()]
seed_everything(seed)
a = torch.randn(300, 300)
kernel = torch.nn.functional.conv2d(a[None, None], torch.randn(4, 1, 5, 5)).sum().item()
b = np.random.default_rng(seed).normal(size=(200, 200))
method = create("self_distance", image_size=64)
score = method.predict(type("Batch", (), dict(image=torch.rand(2, 3, 64, 64), category=["nut"] * 2, to=lambda s, d: s))()).map
numbers = [(a @ a).sum().item(), kernel, float((b @ b).sum()), np.linalg.svd(b)[1].tolist(), score.flatten().tolist()]
"""
KEEP = WRITE.format("dict(state=state, numbers=numbers, chance=chance)").replace("json.dumps(", "json.dumps(obj=")

HOSTILE = """
import atexit, os, random, resource, signal, socket, subprocess, sys, threading, time, warnings, builtins, gc, locale, logging
import matplotlib, numpy as np, pandas as pd, torch
import zsad_nb.evaluation.metrics as metrics
import zsad_nb.methods.base as base
import zsad_nb.core.settings as settings

torch.use_deterministic_algorithms(True)
os.chdir("/")
os.environ.update(OMP_NUM_THREADS="7", HOME="/nowhere", ZSAD_ENGINES="/nowhere")
sys.path[:] = ["/nowhere"]
sys.modules["json.decoder"] = None
random.seed(1), np.random.seed(1), torch.manual_seed(1)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(2)
torch.set_grad_enabled(False)
torch.randn(500, 500) @ torch.randn(500, 500)
metrics.image_metrics = base.create = settings.seed_everything = lambda *a, **k: None
torch.randn = torch.rand = lambda *a, **k: 0
matplotlib.rcParams["figure.dpi"] = 3
pd.set_option("display.max_rows", 1)
warnings.simplefilter("error")
os.umask(0o777)
os.nice(5)
gc.disable()
logging.basicConfig(level=0)
sys.setrecursionlimit(500)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
kept = [open("/dev/null") for _ in range(20)]
listening = socket.socket(); listening.bind(("127.0.0.1", 0)); listening.listen()
threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
atexit.register(lambda: open(mark, "a").write("left"))
builtins.print = None
"""


def quiet(specs, root, **options):
    said = io.StringIO()
    return sweep(specs, root, stream=said, **options), said.getvalue()


def kept(spec, root):
    state = result_of(spec.folder(root))
    assert state.ok, state.error
    return state.result, state.record


@pytest.fixture
def probe(tmp_path):
    return notebook(tmp_path / "probe.ipynb", "seed: int = 0\nmark: str = ''", STATE, KEEP)


@pytest.mark.slow
def test_a_copy_is_a_fresh_kernel_whatever_ran_before(tmp_path, probe):
    "Every number and every piece of state, in a process of its own and as a run of a sweep, before and after hostile runs."
    hostile = notebook(tmp_path / "hostile.ipynb", "seed: int = 0\nmark: str = ''", HOSTILE, "import os; os._exit(3)")
    spec = Spec(probe, dict(seed=3))
    assert run(spec, tmp_path / "fresh", fresh_kernel=True).ok
    fresh, record = kept(spec, tmp_path / "fresh")
    assert record["kernel"]["fresh"] is True

    assert run(spec, tmp_path / "before").ok
    died = run(Spec(hostile), tmp_path / "hostile")
    assert died.kind == "dead kernel"
    assert run(spec, tmp_path / "after").ok
    chance = [fresh["chance"]]
    for place in ("before", "after"):
        copied, record = kept(spec, tmp_path / place)
        assert record["kernel"]["fresh"] is False and record["hash"] == spec.hash
        assert copied["numbers"] == fresh["numbers"]
        for name, value in fresh["state"].items():
            assert copied["state"][name] == value, name
        chance.append(copied["chance"])
    assert len({value for pair in chance for value in pair}) == 9, "unseeded numbers are equal"

    ends = notebook(
        tmp_path / "ends.ipynb", "seed: int = 0\nmark: str = ''", HOSTILE.replace("builtins.print = None", "")
    )
    executor = LocalExecutor(1, 1, [])
    fresh_one = LocalExecutor(1, 1, [])
    try:
        done, said = quiet(
            [spec, Spec(ends), Spec(probe, dict(seed=4))], tmp_path / "swept", executor=executor, retries=0
        )
        assert done.table.status.tolist() == ["done", "failed", "done"], said
        quiet([Spec(probe, dict(seed=4))], tmp_path / "alone", executor=fresh_one, fresh_kernels=True)
    finally:
        executor.shutdown()
        fresh_one.shutdown()
    swept, record = kept(spec, tmp_path / "swept")
    assert record["kernel"]["fresh"] is False and swept["numbers"] == fresh["numbers"]
    later, record = kept(Spec(probe, dict(seed=4)), tmp_path / "swept")
    alone, other = kept(Spec(probe, dict(seed=4)), tmp_path / "alone")
    assert record["kernel"]["fresh"] is False and other["kernel"]["fresh"] is True
    assert later["numbers"] == alone["numbers"]
    for name, value in alone["state"].items():
        assert later["state"][name] == value, name


@pytest.fixture
def light(tmp_path):
    return notebook(
        tmp_path / "light.ipynb", "n: int = 1", WRITE.format("dict(parent=__import__('os').getppid(), n=n)")
    )


def dying(tmp_path, code):
    return notebook(tmp_path / "dies.ipynb", "n: int = 1", code)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("import os; os._exit(3)", "dead kernel"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "dead kernel"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(60)", "dead kernel"),
        ("import time; time.sleep(600)", "timeout"),
        ("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)", "timeout"),
        ("import ctypes; ctypes.string_at(0)", "dead kernel"),
    ],
    ids=["exit", "killed", "template killed", "hung", "deaf", "crashed"],
)
def test_what_dies_harms_nobody(tmp_path, light, code, kind):
    died = run(Spec(dying(tmp_path, code)), tmp_path / "runs", timeout=2)
    assert died.kind == kind, died.error
    after = run(Spec(light), tmp_path / "runs")
    assert after.ok and after.record["kernel"]["fresh"] is False


def test_a_sweep_tries_again_in_a_fresh_kernel(tmp_path):
    book = notebook(
        tmp_path / "kills.ipynb",
        "n: int = 0\nonce: str = ''",
        "import os, signal\nif n and not os.path.exists(once): open(once, 'w').close(); os.kill(os.getppid(), signal.SIGKILL)",
        WRITE.format("dict(n=n)"),
    )
    specs = [Spec(book, dict(n=n, once=str(tmp_path / "once"))) for n in range(3)]
    executor = LocalExecutor(2, 1, [])
    try:
        done, said = quiet(specs, tmp_path / "runs", executor=executor)
    finally:
        executor.shutdown()
    assert done.ok and "ended with SIGKILL" in said
    fresh = [kept(spec, tmp_path / "runs")[1]["kernel"]["fresh"] for spec in specs]
    assert fresh[0] is False and True in fresh[1:]


def test_on_request_every_kernel_is_fresh(tmp_path, light):
    specs = [Spec(light, dict(n=n)) for n in range(2)]
    executor = LocalExecutor(2, 1, [])
    try:
        assert quiet(specs, tmp_path / "runs", executor=executor, fresh_kernels=True)[0].ok
        assert not executor._templates._all
    finally:
        executor.shutdown()
    assert all(kept(spec, tmp_path / "runs")[1]["kernel"]["fresh"] for spec in specs)


def test_other_surroundings_get_another_template(tmp_path, light, monkeypatch):
    parents = []
    for n, variable in enumerate(["a", "b", "a"]):
        monkeypatch.setenv("ZSAD_SOMETHING", variable)
        parents.append(run(Spec(light, dict(n=n)), tmp_path / "runs").result["parent"])
    assert parents[0] == parents[2] != parents[1]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(Spec(light, dict(n=4)), tmp_path / "runs")
    (tmp_path / "here" / "traitlets.py").write_text("raise SystemError")
    shadowed = run(Spec(light, dict(n=5)), tmp_path / "runs")
    assert shadowed.record["kernel"]["fresh"] is True, "a new process might import another module"


def test_a_template_that_is_out_of_date(tmp_path, light):
    "The package is edited between two runs: the second one has another template."
    shutil.copytree(os.path.dirname(zsad_nb.__file__), tmp_path / "package" / "zsad_nb")
    code = (
        "import sys; from pathlib import Path; from zsad_nb.runs.run import Spec, run; import zsad_nb\n"
        "parents = []\n"
        "for n in range(4):\n"
        "    if n == 2:\n"
        "        with open(Path(zsad_nb.__file__).with_name('_modidx.py'), 'a') as file: file.write('#')\n"
        "    done = run(Spec(sys.argv[1], dict(n=n)), sys.argv[2])\n"
        "    parents.append((done.result['parent'], done.record['kernel']['fresh']))\n"
        "print(parents)"
    )
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "package"))
    command = [sys.executable, "-c", code, str(light), str(tmp_path / "runs")]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    first, second, third, fourth = ast.literal_eval(said)
    assert first == second != third == fourth and third[1] is False


def test_a_template_ends_with_its_owner(tmp_path, light):
    code = (
        "import sys, time; from zsad_nb.runs.run import Spec, run; from zsad_nb.runs.template import templates\n"
        "assert run(Spec(sys.argv[1]), sys.argv[2]).ok\n"
        "print(*[t.process.pid for t in templates._all.values()], flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(light), str(tmp_path / "runs")], stdout=subprocess.PIPE)
    pid = int(owner.stdout.readline())
    assert psutil.pid_exists(pid)
    owner.kill()
    owner.wait()
    end = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "it goes on alone"
        time.sleep(0.1)
