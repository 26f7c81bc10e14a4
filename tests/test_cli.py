"The command line and the demo, in small."
import json

import pandas as pd
import pytest

from zsad_nb.data.synthetic import synthetic_index
from zsad_nb.use.cli import main
from zsad_nb.use.demo import demo

SMALL = dict(size=64, normal=1, defective=2, target_normal=1, target_defective=2, epochs=1, progress=False)


def test_demo_writes_everything_and_says_each_stage(tmp_path, capsys):
    table = demo(tmp_path, **SMALL)
    said = capsys.readouterr().err
    assert [line[:5] for line in said.splitlines() if line.startswith("[")] == [f"[{i}/5]" for i in range(1, 6)]
    assert set(table.columns.get_level_values(0)) == {"trained", "untrained", "control"} and table.index[-1] == "mean" and len(table) == 9
    for name in ("metrics.csv", "scores.csv", "comparison.csv", "history.csv", "visualad.safetensors", "figures/overview.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 0


def test_demo_repeats_itself(tmp_path):
    first, second = demo(tmp_path / "a", figures=False, **SMALL), demo(tmp_path / "b", figures=False, **SMALL)
    pd.testing.assert_frame_equal(first, second, rtol=0, atol=0)
    assert (tmp_path / "a" / "scores.csv").read_bytes() == (tmp_path / "b" / "scores.csv").read_bytes()


def test_demo_refuses_unknown_settings(tmp_path):
    with pytest.raises(TypeError, match="did you mean epochs"): demo(tmp_path, epoch=1)


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
