"Processes in poor surroundings: no home, no UTF-8, a closed or full standard output, a reader that leaves, caches that cannot be written."

import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zsad_nb.backbones.engines import engine_folder
from zsad_nb.cli.commands import main
from zsad_nb.cli.console import READER_LEFT, locale_hint
from zsad_nb.core.sessions import EngineError
from zsad_nb.methods.base import create
from zsad_nb.runs.kernel import some_home
from zsad_nb.runs.run import Spec, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def homeless(monkeypatch):
    "A user whom the system does not know, without HOME: a container started with a bare number."
    pwd = pytest.importorskip("pwd")

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def test_some_home(homeless):
    before = dict(os.environ)
    with some_home():
        inside = Path.home()
        assert inside.is_dir() and not list(inside.iterdir())
    assert dict(os.environ) == before and not inside.exists()
    with pytest.raises(OSError):
        with some_home():
            raise OSError
    assert dict(os.environ) == before


def test_a_run_without_a_home(homeless, tmp_path, own_kernel):
    "Jupyter asks for a home; the notebook gets one that is gone afterwards."
    source = (
        "from pathlib import Path\nimport json\nPath(output,"
        " 'result.json').write_text(json.dumps(dict(home=str(Path.home()))))"
    )
    cells = [
        dict(
            cell_type="code",
            id="aaaaaaaa",
            metadata=dict(tags=["parameters"]),
            source="output: str = ''\n",
            outputs=[],
            execution_count=None,
        ),
        dict(cell_type="code", id="bbbbbbbb", metadata={}, source=source, outputs=[], execution_count=None),
    ]
    (tmp_path / "note.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    found = run(Spec(tmp_path / "note.ipynb", {}), tmp_path / "runs")
    assert found.ok, found.error
    assert not Path(found.result["home"]).exists() and "HOME" not in os.environ


def test_folder_of_engines(monkeypatch, tmp_path):
    monkeypatch.delenv("ZSAD_ENGINES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for odd in ("", "relative", "./here"):
        monkeypatch.setenv("XDG_CACHE_HOME", odd)
        assert engine_folder() == tmp_path / "home/.cache/zsad_nb/engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert engine_folder() == tmp_path / "cache/zsad_nb/engines"
    monkeypatch.setenv("ZSAD_ENGINES", "~/mine")
    assert engine_folder() == tmp_path / "home/mine"


def test_folder_of_engines_without_a_home(homeless, monkeypatch, tmp_path):
    monkeypatch.delenv("ZSAD_ENGINES", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = engine_folder()
    assert folder.is_relative_to(tmp_path) and (folder.parent.parent.stat().st_mode & 0o777) == 0o700


def engine_batch():
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return type("Batch", (), dict(image=image, category=["nut"], to=lambda self, device: self))()


def test_engines_on_a_disk_that_is_read_only(tmp_path, monkeypatch, permissions_hold):
    "No graph can be made there: an error with the way out, before anything is traced."
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("ZSAD_ENGINES", str(tmp_path / "engines"))
    (tmp_path / "engines").mkdir(mode=0o500)
    with pytest.raises(EngineError, match="no graph can be kept in .*engines .*ZSAD_ENGINES"):
        create("self_distance", image_size=64, engine="onnxruntime").predict(engine_batch())


@pytest.mark.skipif("ZSAD_KILLS" not in os.environ, reason="traces a graph: half a minute; set ZSAD_KILLS")
def test_graphs_that_are_there_are_used_from_a_read_only_disk(tmp_path, monkeypatch, permissions_hold):
    monkeypatch.setenv("ZSAD_ENGINES", str(tmp_path / "engines"))
    first = create("self_distance", image_size=64, engine="onnxruntime").predict(engine_batch())
    for folder, _, names in os.walk(tmp_path / "engines", topdown=False):
        for name in names:
            os.chmod(Path(folder) / name, 0o400)
        os.chmod(folder, 0o500)
    again = create("self_distance", image_size=64, engine="onnxruntime").predict(engine_batch())
    for folder, _, _ in os.walk(tmp_path / "engines"):
        os.chmod(folder, 0o700)
    assert torch.equal(first.map, again.map)


# --------------------------------------------------------------------------------------------------------------------- consoles

COMMAND = textwrap.dedent("""
    import sys
    from zsad_nb.cli.console import on_any_console

    @on_any_console
    def main():
        for line in range(int(sys.argv[1])):
            print("Flaschen\\u00f6ffner \\u74f6 \\U0001f529 \\udcff", line)
        return 3

    sys.exit(main())
""")


def start(lines=2, stdout=subprocess.PIPE, **environment):
    names = (
        {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
        | dict(PYTHONPATH=str(ROOT))
        | environment
    )
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(lines)], stdout=stdout, stderr=subprocess.PIPE, env=names
    )


@pytest.mark.parametrize(
    "environment",
    [
        dict(PYTHONIOENCODING="ascii"),
        dict(PYTHONIOENCODING="latin-1"),
        dict(PYTHONIOENCODING="cp1252"),
        dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
        dict(PYTHONUTF8="1"),
        dict(LC_ALL="POSIX"),
    ],
    ids=str,
)
def test_any_name_is_printed(environment):
    process = start(**environment)
    said, errors = process.communicate()
    assert (
        process.returncode == 3 and b"Traceback" not in errors and len(said.splitlines()) == 2 and b"ffner" in said
    ), errors
    assert (b"set PYTHONUTF8=1" in errors) == (environment.get("PYTHONCOERCECLOCALE") == "0")


def test_a_reader_that_leaves():
    "head takes what it wants: no traceback, the exit status of SIGPIPE."
    process = start(lines=100_000)
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == READER_LEFT == 141 and errors == b""


def test_standard_output_that_is_full():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "wb") as full:
        process = start(stdout=full)
        errors = process.stderr.read().decode()
    assert process.wait() == 2 and errors == "zsad: standard output was not written (No space left on device)\n"


def test_no_standard_output_at_all():
    code = f"import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-c', {COMMAND!r}, '2'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | dict(PYTHONPATH=str(ROOT))
    )
    assert done.returncode == 3 and b"Traceback" not in done.stderr


def test_a_report_with_names_that_the_console_lacks(tmp_path, monkeypatch):
    "zsad check names the files that it finds wrong, on an ASCII console, too."
    folder = tmp_path / "Flaschenöffner"
    for path in ("train/good/ä.png", "test/good/ö.png", "test/kaputt/ü.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(path)).integers(0, 255, (32, 32, 3), "uint8")).save(folder / path)
    (folder / "ground_truth/kaputt").mkdir(parents=True)
    Image.fromarray(np.eye(32, dtype="uint8") * 255).save(folder / "ground_truth/kaputt/ü_mask.png")
    (folder / "test/good/ö.png").write_bytes(b"no image")
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    code = main(["check", str(folder), "--dataset", "mvtec_like"])
    shown.flush()
    text = shown.buffer.getvalue().decode("ascii")
    assert code == 1 and r"\xf6.png" in text, text
    assert shown.errors == "strict" and locale_hint() == ""
