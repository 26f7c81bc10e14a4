"The command line and the demo, in small."

import json

import nbformat
import pandas as pd
import pytest

from zsad_nb.cli.commands import main
from zsad_nb.cli.demo import demo
from zsad_nb.methods.base import load
from zsad_nb.synthetic.benchmark import synthetic_index

SMALL = dict(size=64, normal=1, defective=2, target_normal=1, target_defective=2, epochs=1, held_out=0, progress=False)


def test_demo_writes_everything_and_says_each_stage(tmp_path, capsys):
    table = demo(tmp_path, **SMALL)
    said = capsys.readouterr().err
    assert [line[:5] for line in said.splitlines() if line.startswith("[")] == [f"[{i}/5]" for i in range(1, 6)]
    assert (
        set(table.columns.get_level_values(0)) == {"trained", "untrained", "control"}
        and table.index[-1] == "mean"
        and len(table) == 9
    )
    for name in (
        "metrics.csv",
        "scores.csv",
        "comparison.csv",
        "history.csv",
        "visualad.safetensors",
        "figures/overview.png",
    ):
        assert (tmp_path / name).stat().st_size > 0, name
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 0


def test_demo_compares_the_rule_and_predict_says_what_it_uses(tmp_path, capsys):
    table = demo(tmp_path / "demo", figures=False, **SMALL | dict(size=96, held_out=1))
    assert list(dict.fromkeys(table.columns.get_level_values(0))) == ["trained", "untrained", "control", "rule"]
    assert "38 auxiliary images that were not trained on" in capsys.readouterr().err
    checkpoint = str(tmp_path / "demo" / "visualad.safetensors")
    better = load(checkpoint).auxiliary.better
    means = {way: sum(values.values()) / 2 for way, values in better.items()}
    expected = "visualad and the image itself" if means["self"] > means["method"] else "visualad alone"
    pictures = str(next((tmp_path / "demo" / "data").glob("*/target/gear/test/good")))

    def said(*more):
        assert main(["predict", pictures, "--out", str(tmp_path / "out"), "--model", checkpoint, *more]) == 0
        return capsys.readouterr().out

    assert f"judged by {expected}" in said()
    assert "judged by visualad alone" in said("--evidence", "method")
    assert "judged by visualad and the image itself" in said("--evidence", "self")
    assert "judged by visualad, the image itself and 1 good image" in said("--references", pictures)
    assert "judged by 1 good image alone" in said("--references", pictures, "--evidence", "memory")


def test_demo_repeats_itself(tmp_path):
    first = demo(tmp_path / "a", figures=False, **SMALL)
    second = demo(tmp_path / "b", figures=False, **SMALL)
    pd.testing.assert_frame_equal(first, second, rtol=0, atol=0)
    assert (tmp_path / "a" / "scores.csv").read_bytes() == (tmp_path / "b" / "scores.csv").read_bytes()


def test_demo_refuses_unknown_settings(tmp_path):
    with pytest.raises(TypeError, match="did you mean epochs"):
        demo(tmp_path, epoch=1)


def test_check_reports_and_exits(tmp_path, capsys):
    synthetic_index(tmp_path / "set", "target", size=64, normal=1, defective=1)
    assert main(["check", str(tmp_path / "set"), "--dataset", "mvtec_like"]) == 0
    assert "no problems" in capsys.readouterr().out
    next((tmp_path / "set").glob("*/test/good/*.png")).write_text("not an image")
    assert main(["check", str(tmp_path / "set"), "--dataset", "mvtec_like"]) == 1
    assert "unreadable" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nowhere"), "--dataset", "mvtec"]) == 2
    assert main(["show", str(tmp_path / "none.safetensors")]) == 2
    assert all(line.startswith("zsad ") for line in capsys.readouterr().err.strip().splitlines())


def test_show_prints_the_header(tmp_path, capsys):
    demo(tmp_path, figures=False, **SMALL)
    assert main(["show", str(tmp_path / "visualad.safetensors")]) == 0
    assert "synthetic-auxiliary/brick" in capsys.readouterr().out


def small_notebook(path):
    cells = [
        nbformat.v4.new_code_cell(c)
        for c in (
            "n: float = 1.0  # a number\nmore: list = []\noutput: str = ''",
            "assert n < 9, 'too large'",
            "import json; json.dump(dict(twice=2 * n, more=more), open(f'{output}/result.json', 'w'))",
        )
    ]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return str(path)


def test_runs_from_the_command_line(tmp_path, capsys):
    "run, status, collect, rerun, and what each exits with."
    book = small_notebook(tmp_path / "small.ipynb")
    runs = str(tmp_path / "runs")
    assert main(["run", book, "-p", "n", "1e-1", "-p", "more", "[1, 2]", "--root", runs]) == 0
    said = capsys.readouterr().out
    folder = said.split()[1]
    assert json.loads((tmp_path / folder / "result.json").read_text()) == dict(twice=0.2, more=[1, 2]) and "0.2" in said
    assert main(["run", book, "-p", "n", "0.1", "-p", "more", "[1, 2]", "--root", runs]) == 0
    assert "had a result" in capsys.readouterr().out
    assert main(["run", book, "-p", "n", "10", "--root", runs]) == 1
    assert "too large" in capsys.readouterr().err
    assert main(["status", runs]) == 1
    assert "1 done, 1 failed" in capsys.readouterr().out
    assert main(["collect", runs, "--out", str(tmp_path / "all.csv")]) == 0  # no run has a metrics.csv
    assert "0 rows of 0 runs" in capsys.readouterr().out
    assert main(["rerun", folder]) == 0
    assert "3 of 3 values are the same" in capsys.readouterr().out


def test_sweep_from_the_command_line(tmp_path, capsys):
    small_notebook(tmp_path / "small.ipynb")
    (tmp_path / "s.yaml").write_text("variables: {N: 20}\nnotebook: small.ipynb\ngrid: {n: [$N]}\n")
    assert main(["sweep", str(tmp_path / "s.yaml"), "--root", str(tmp_path / "runs"), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to run") == 1 and not (tmp_path / "runs").exists()
    assert main(["sweep", str(tmp_path / "s.yaml"), "--root", str(tmp_path / "runs"), "--cores", "1"]) == 1
    assert "too large" in capsys.readouterr().err and (tmp_path / "runs" / "s" / "summary.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "BOOK", "-p", "m", "1"], "unknown parameter of small.ipynb 'm'"),
        (["run", "BOOK", "-p", "n", "many"], "it must be float"),
        (["run", "none.ipynb"], "no notebook at none.ipynb"),
        (["sweep", "none.yaml"], "no sweep at none.yaml"),
        (["sweep", "SWEEP", "--set", "M=1"], "unknown variable of the sweep 'M'"),
        (["status", "nowhere"], "no folder nowhere"),
        (["collect", "nowhere"], "no folder nowhere"),
        (["rerun", "nowhere"], "is absent"),
    ],
)
def test_expected_errors_are_one_line(tmp_path, capsys, arguments, message):
    book = small_notebook(tmp_path / "small.ipynb")
    (tmp_path / "s.yaml").write_text("notebook: small.ipynb\n")
    assert main([{"BOOK": book, "SWEEP": str(tmp_path / "s.yaml")}.get(a, a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith(f"zsad {arguments[0]}: ") and said.count("\n") == 1
