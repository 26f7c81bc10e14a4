"Ctrl-C and SIGTERM while a command runs, from its first imports on: one line, the right exit status, nothing half-written, nobody left behind."

import ast
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image

from zsad_nb.cli import commands as cli
from zsad_nb.cli import grammar
from zsad_nb.synthetic.benchmark import synthetic_index

TIMES = int(os.environ.get("ZSAD_KILLS", 2))
ZSAD = [sys.executable, "-c", "import sys; from zsad_nb.cli.entry import zsad; sys.exit(zsad())"]


def with_usual_signals():
    "A shell's background jobs ignore Ctrl-C, and so would whatever they start."
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def marked(mark):
    "The processes that a command started, and itself."
    for process in psutil.process_iter():
        try:
            if process.environ().get("ZSAD_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def stopped_after(begun, seconds, number, folder, *arguments):
    "A command that gets a signal so long after it has begun; its exit status, what it said, and what it left running."
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with open(folder / "said", "w+b") as said:
        process = subprocess.Popen(
            [*ZSAD, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd=folder,
            start_new_session=True,
            preexec_fn=with_usual_signals,
            env=dict(os.environ, ZSAD_TEST_MARK=mark, PYTHONWARNINGS="ignore", TQDM_DISABLE="1", OMP_NUM_THREADS="1"),
        )
        while process.poll() is None and not begun():
            time.sleep(0.01)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        code = process.wait(120)
        said.seek(0)
        text = said.read().decode()
    end = time.monotonic() + 15
    while (left := list(marked(mark))) and time.monotonic() < end:
        time.sleep(0.1)
    for other in left:
        other.kill()
    return code, text, left


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "photos").mkdir()
    for n in range(60):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (320, 320, 3), dtype=np.uint8)).save(
            folder / "photos" / f"{n:03}.png"
        )
    synthetic_index(folder / "set", "target", size=256, normal=4, defective=4)
    cells = [
        nbformat.v4.new_code_cell(c)
        for c in (
            "n: int = 1\noutput: str = ''",
            "import time; time.sleep(60)",
            "open(f'{output}/result.json', 'w').write('{}')",
        )
    ]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "slow.ipynb")
    (folder / "sweep.yaml").write_text("notebook: slow.ipynb\ngrid: {n: [1, 2, 3]}\n")
    return folder


BEGUN = dict(
    predict="results.csv", sweep="*/*/run.json", run="*/*/run.json", check="never", demo="*"
)  # what is in OUT once a command has begun
COMMANDS = dict(
    predict=("predict", "photos", "--out", "OUT", "-p", "image_size", "320"),
    sweep=("sweep", "sweep.yaml", "--root", "OUT", "--workers", "2"),
    run=("run", "slow.ipynb", "--root", "OUT"),
    check=("check", "set", "--dataset", "mvtec_like"),
    demo=("demo", "--out", "OUT"),
)


@pytest.mark.parametrize(("name", "number"), [*((name, signal.SIGINT) for name in COMMANDS), ("run", signal.SIGTERM)])
def test_stopped_at_any_moment(place, tmp_path, name, number):
    "Every other time while it loads, otherwise while it works."
    moments = random.Random(f"{name} {number} {TIMES}")
    latest = 2.0
    few = TIMES <= 2  # then one moment of each: what works costs seconds
    for turn in range(1 if few else TIMES):
        out = tmp_path / f"out{turn}"
        loading = (name, number) not in (("predict", signal.SIGINT), ("run", signal.SIGTERM)) if few else turn % 2
        seconds = moments.uniform(0.1, latest)
        begun = (lambda: True) if name == "check" or loading else (lambda out=out: any(out.glob(BEGUN[name])))
        code, text, left = stopped_after(
            begun, seconds, number, place, *(str(out) if word == "OUT" else word for word in COMMANDS[name])
        )
        if code == 0:  # it was faster
            latest = seconds
            continue
        if code == -number and not text:
            continue  # before Python itself had begun
        where = f"{name}, {seconds:.2f} s: status {code}\n{text}"
        assert code == 128 + number, where
        assert "Traceback" not in text and "Exception ignored" not in text, where
        assert (
            [line for line in text.splitlines() if line.startswith("zsad")][-1].partition(": ")[2].startswith("stopped")
        ), where
        assert sum(line.startswith("zsad") for line in text.splitlines()) == 1, where
        assert not left, where
        assert not [path for path in out.rglob("*.tmp")], where
        for record in out.rglob("run.json"):
            assert json.loads(record.read_text())["status"] != "done"
        print(
            f"{name:8} {signal.Signals(number).name} {'loading' if loading else 'working'} {seconds:5.2f} s: {code} "
            f" {text.strip().splitlines()[-1]}"
        )


def test_every_help_lists_the_exit_statuses(capsys):
    for words in ([], *([name] for name in cli.parser()._subparsers._group_actions[0].choices)):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "xit status: 0" in said and "130 stopped by Ctrl-C" in said and "143" in said, words


def test_the_grammar_is_light():
    "What is imported before anything is asked for."
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys, zsad_nb.cli.entry, zsad_nb.cli.commands as c; c.parser(); print([m for m in ('torch',"
                " 'pandas', 'numpy', 'yaml') if m in sys.modules])"
            ),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_commands_import_where_an_interruption_is_understood():
    "What a command imports, it imports inside `importing`."
    for name in ("model_commands", "image_commands", "run_commands"):
        tree = ast.parse((ROOT / "zsad_nb" / "cli" / f"{name}.py").read_text())
        guarded = [
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and ast.unparse(node.items[0]) == "importing()"
            for inner in ast.walk(node)
        ]
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        imports = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert imports and all(node in guarded for node in imports), name
    for each in grammar.COMMANDS.values():  # itself, or a function of its module that it calls
        module = inspect.getmodule(each.function)
        called = [getattr(module, name, None) for name in each.function.__code__.co_names]
        own = [f for f in called if inspect.isfunction(f) and f.__module__ == module.__name__]
        assert any("importing()" in inspect.getsource(f) for f in (each.function, *own)), each.name


def test_a_call_from_python_changes_no_signal(capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert cli.main(["show", "nowhere.safetensors"]) == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "photos"),
        ("predict", "photos", "--out", "o"),
        ("show", "x"),
        ("status", "photos"),
        ("collect", "photos"),
        ("rerun", "photos"),
        ("export", "x", "--out", "o"),
    ],
)
def test_stopped_inside_any_command(tmp_path, monkeypatch, capsys, arguments):
    "Wherever the exception comes out of, it is one line."

    def stop(*_, **__):
        raise KeyboardInterrupt

    for name in (
        "data.images.check",
        "data.readers.detect",
        "inspection.inspector.Inspector.load",
        "methods.checkpoint_files.read_header",
        "methods.base.load",
        "runs.run.status",
        "runs.run.collect",
        "runs.rerun.rerun",
        "deploy.export.export",
    ):
        monkeypatch.setattr(f"zsad_nb.{name}", stop)
    assert cli.main(list(arguments)) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"zsad {arguments[0]}: stopped")
