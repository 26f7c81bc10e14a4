"What a wheel brings works in an empty folder: notebooks by name, train and evaluate as commands, checks, papermill."

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from zsad_nb.cli.commands import main
from zsad_nb.runs.library import find_notebook, package_notebooks, package_sweeps
from zsad_nb.runs.parameters import parameters_of, read_notebook, require_declared

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "nbs"
SCRIPT = "import sys; from zsad_nb.cli.entry import zsad; sys.exit(zsad())"  # as the installed `zsad`


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy of what is tracked, so that nothing that lies around gets into it."
    folder = tmp_path_factory.mktemp("wheel")
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: what belongs into a wheel is read from git")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        if name.startswith(("tests/", "paper_figures/")) or not (ROOT / name).is_file():
            continue
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([*build, str(folder), str(folder / "source")], check=True, capture_output=True)
    return next(folder.glob("zsad_nb-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A folder with nothing but the unpacked wheel, and a runner of Python in an empty folder beside it."
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    empty = tmp_path_factory.mktemp("empty")
    environment = os.environ | {"PYTHONPATH": str(folder), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str, status: int = 0) -> str:
        program, *rest = words
        start = ["-c", SCRIPT] if program == "zsad" else ["-m", program]
        done = subprocess.run(
            [sys.executable, *start, *rest], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.folder = empty
    return run


@pytest.mark.slow
def test_what_is_in_it(wheel):
    assert wheel.stat().st_size < 16e6
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if name.startswith("zsad_nb/notebooks/")}
    for folder in ("experiments", "tutorials"):
        written = {p.relative_to(NOTEBOOKS) for p in (NOTEBOOKS / folder).rglob("*") if p.suffix in (".ipynb", ".yaml")}
        tracked = {f"zsad_nb/notebooks/{path.as_posix()}" for path in written if not path.name.startswith("_")}
        assert tracked <= inside
    assert not any(name.startswith(("tests/", "nbs/", "paper_figures/")) for name in names)
    assets = {
        f"zsad_nb/assets/{name}.{end}" for name in ("tiny_dino", "visualad_tiny") for end in ("safetensors", "md")
    }
    assert {"zsad_nb/py.typed", *assets} <= set(names)
    for name in inside:
        if name.endswith(".ipynb"):
            book = json.loads(zipfile.ZipFile(wheel).read(name))
            assert not any(cell.get("outputs") for cell in book["cells"]), f"{name} carries outputs"


@pytest.mark.slow
def test_an_empty_folder(installed):
    "The README's commands without a clone: train, evaluate, by name, copied, through papermill, planned."
    toy = ("--size", "64", "--images", "1", "--runs", "runs")
    said = installed("zsad", "train", "--method", "visualad", "--backbone", "tiny-dino", "--epochs", "1", *toy)
    run = Path(said.splitlines()[0].split(maxsplit=1)[1])
    checkpoint = run / "checkpoint.safetensors"
    assert said.startswith("done") and (installed.folder / checkpoint).is_file()
    again = installed("zsad", "train", "--method", "visualad", "--backbone", "tiny-dino", "--epochs", "1", *toy)
    assert again.startswith("had a result"), "the same words are the same run"
    tested = installed("zsad", "evaluate", "--checkpoint", str(checkpoint), "--images", "1", "--runs", "runs")
    assert "image_auroc" in tested
    same = installed("zsad", "run", "evaluate", "-p", "checkpoint", str(checkpoint), "-p", "images", "1")
    assert same.startswith("had a result"), "one definition: zsad evaluate is zsad run evaluate"
    assert "mine/tutorials/quickstart.ipynb" in installed("zsad", "notebooks", "mine")
    assert (installed.folder / "mine/experiments/sweeps/visualad.yaml").is_file()
    planned = installed("zsad", "sweep", "visualad", "--set", "DATA=DATA", "--dry-run")
    assert "train_data=visa" in planned and "backbone=dinov2-vitl14" in planned
    values = ("-p", "method", "self_distance", "-p", "size", "64", "-p", "images", "1", "--no-progress-bar")
    installed("papermill", "zsad://evaluate.ipynb", "out.ipynb", *values)
    book = json.loads((installed.folder / "out.ipynb").read_text())
    assert any("injected-parameters" in cell["metadata"].get("tags", []) for cell in book["cells"])
    wrong = installed("papermill", "zsad://evaluate.ipynb", "wrong.ipynb", "-p", "metod", "ssvp", status=1)
    assert "unknown parameter 'metod'; did you mean method?" in wrong


@pytest.mark.slow
def test_photographs_and_nothing_else(installed):
    "The first line of the README's section on one's own images: no model, no clone, a page at the end."
    from zsad_nb.synthetic.benchmark import render

    photos = installed.folder / "photos"
    photos.mkdir()
    for seed in range(3):
        Image.fromarray(render("leather", seed, 96, "scratch" if seed else None).image).save(photos / f"{seed}.png")
    said = installed("zsad", "predict", "photos", "--out", "results", "--report")
    assert "the package's small VisualAD" in said and "report    results/report.html" in said
    assert (installed.folder / "results" / "report.html").stat().st_size > 20_000
    assert sorted(p.name for p in (installed.folder / "results" / "pictures").iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_options_are_the_parameters(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    for each in parameters_of(read_notebook(find_notebook(name))):
        assert (f"--{each.replace('_', '-')} " in said) == (each != "output")


def test_names():
    assert {"train", "evaluate", "ablation", "quickstart"} <= set(package_notebooks())
    assert {"visualad", "ssvp", "dma_sap", "dapo"} <= set(package_sweeps())
    for name, path in package_notebooks().items():
        if path.parent.name == "experiments":
            sources = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
            assert any("\nrequire_declared()\n" in source for source in sources), (
                f"{name} does not check what it is given"
            )


@pytest.mark.parametrize(
    "words, text",
    [
        (["run", "evalute"], "did you mean evaluate"),
        (["sweep", "visual_ad"], "did you mean visualad?"),
        (["run", "nowhere/mine.ipynb"], "no notebook at nowhere/mine.ipynb"),
        (["run", "mine.ipynb"], "no notebook at mine.ipynb"),
        (["train", "--method", "visualad", "--epochs", "many"], "epochs"),
        (["notebooks", "{busy}"], "--replace"),
    ],
)
def test_bad_words(words, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "train.ipynb").write_text("mine")
    assert main([str(tmp_path) if word == "{busy}" else word for word in words]) == 2
    assert text in capsys.readouterr().err
    assert (tmp_path / "experiments" / "train.ipynb").read_text() == "mine"


def test_photographs_without_labels(tmp_path, capsys):
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (20, 20), (40 * number, 90, 10)).save(tmp_path / f"{number}.png")
    assert main(["check", str(tmp_path)]) == 0
    assert "photographs: 3 images, no labels" in capsys.readouterr().out
    (tmp_path / "3.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "4.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "3.png" in said and "the same bytes as row 1 (1.png)" in said and "2 problems" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["check", str(empty)]) == 2
    assert "no known layout" in capsys.readouterr().err


def test_export_says_what_it_lacks_before_it_computes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zsad_nb.cli.model_commands.find_spec", lambda name: None)
    assert main(["export", str(tmp_path / "no.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert "--formats torch" in capsys.readouterr().err


def test_injected_values_are_compared():
    cells = ["a: int = 1  # first\nb: str = ''", "# Parameters\na = 3\n"]
    require_declared(cells)
    require_declared(cells[:1])
    require_declared([])
    require_declared(["# Parameters\nc = 3\n"])  # one's own cell at the top
    with pytest.raises(TypeError, match="unknown parameter 'bb'; did you mean b?"):
        require_declared([cells[0], "# Parameters\na = 3\nbb = 'x'\n", "import os"])
