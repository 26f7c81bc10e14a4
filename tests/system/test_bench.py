"`zsad bench`: what it says of a method is true of it, what does not fit is said before anything starts, a case that fails costs its row alone."

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import multiplies_bf16

from zsad_nb.cli.commands import main
from zsad_nb.components import maps
from zsad_nb.deploy import bench as module
from zsad_nb.deploy.bench import CASE, STAGES, bench_cases, bench_figure, bench_table, machine, measure
from zsad_nb.methods import dma_sap
from zsad_nb.methods.base import MODULES, create
from zsad_nb.synthetic.benchmark import synthetic_index

SIZE = 64
LOWER = "bf16" if multiplies_bf16() else "fp32"  # where it is emulated, a product takes minutes
TINY = dict(clip_weights="random:0", dino_weights="random:0", image_size=SIZE)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return synthetic_index(tmp_path_factory.mktemp("drawn"), "target", SIZE, 1, 1)


@pytest.mark.parametrize(
    ("name", "parameters", "engine"),
    [("dma_sap", TINY, ("torch", "fp32")), ("visualad", dict(weights="random:0", image_size=SIZE), ("torch", LOWER))],
)
def test_stages_add_up_and_nothing_is_left_behind(index, name, parameters, engine, monkeypatch):
    method = create(name, **parameters, engine=engine[0], precision=engine[1]).train()
    seen = []
    for backbone in method.backbones().values():
        backbone.register_forward_hook(lambda *_: seen.append("tower"))
    for stage in ("features", "forward"):
        monkeypatch.setattr(
            method, stage, lambda *a, stage=stage, real=getattr(method, stage): (seen.append(stage), real(*a))[1]
        )
    row = measure(method, index, SIZE, 2, repeats=1)
    assert method.training, "as it was before"
    assert (
        maps.to_pixels.__name__ == dma_sap.to_pixels.__name__ == "to_pixels" and F.interpolate.__name__ == "interpolate"
    )
    assert math.isclose(row["model_s"], sum(row[f"{s}_s"] for s in ("encode", "head", "map"))) and row["map_s"] > 0
    if name == "dma_sap":
        assert seen.index("features") < seen.index("tower") < seen.index("forward"), "towers belong to encoding"
    else:
        assert "tower" not in seen[: seen.index("forward")], "tokens act inside the backbone: it belongs to the head"
    assert (
        row["images_per_s"] > 0 and row["ratio_to_towers"] > 0 and row["share_of_matmul"] > 0 and row["peak_mb"] > 100
    )
    assert row["tower_gflop"] == pytest.approx(
        sum(flops(b) for b in method.backbones().values() if hasattr(b, "patch")) / 1e9, rel=1e-6
    )


def flops(b) -> float:
    "By formula: patches, then 24 T D^2 + 4 T^2 D a block."
    patches = (b.size // b.patch) ** 2
    tokens = patches + b.prefix_count
    return 2 * patches * b.width * 3 * b.patch**2 + b.depth * (24 * tokens * b.width**2 + 4 * tokens**2 * b.width)


def test_time_that_is_spent_on_maps_is_the_maps(index, monkeypatch):
    from types import SimpleNamespace

    from zsad_nb.methods import controls

    method = create("self_distance", image_size=SIZE)
    now = [0.0]

    def tick(seconds=0.02):  # a clock that only work moves
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=tick, process_time=tick))
    usual = measure(method, index, SIZE, 1, repeats=1)
    real = maps.to_pixels
    monkeypatch.setattr(maps, "to_pixels", lambda *a: (tick(5), real(*a))[1])
    monkeypatch.setattr(controls, "to_pixels", maps.to_pixels)
    found = measure(method, index, SIZE, 1, repeats=1)
    assert found["map_s"] > 5 > usual["map_s"] and found["head_s"] < 1


def test_towers_run_in_the_engine_of_the_method(monkeypatch):
    pytest.importorskip("onnxruntime")
    method = create("self_distance", image_size=SIZE).use_engine("onnxruntime")
    asked = []
    monkeypatch.setattr(
        module.Engine, "__call__", lambda self, owner, function, key, image, *a: asked.append((self, key))
    )
    module._bare(method, method.backbone, torch.rand(1, 3, SIZE, SIZE))()
    assert (
        len(asked) == 1
        and asked[0][0] is not method.engine
        and asked[0][0].engine == "onnxruntime"
        and asked[0][1]["bare"] == method.backbone.hash
    )


def test_the_command_leaves_table_machine_and_plot(tmp_path, capsys):
    "Two cases, one of which cannot be built: its row says why, the other's stands."
    out = tmp_path / "out"
    assert (
        main(
            [
                "bench",
                "--methods",
                "self_distance",
                "--set",
                "weights=random:0",
                "image_size=64",
                "--batch",
                "2",
                "--images",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "self_distance" in said.out and "milliseconds an image" in said.out and "1/1" in said.err
    table = pd.read_csv(out / "bench.csv")
    about = json.loads((out / "machine.json").read_text())
    assert (
        table.loc[0, "towers"] == "tiny-dino 64"
        and table.loc[0, "size"] == 64
        and table.loc[0, "machine"].startswith(about["cpu"])
    )
    assert {f"{s}_s" for s in STAGES} | {f"{s}_cpu_s" for s in STAGES} | {
        "decode_mb",
        "peak_mb",
        "ratio_to_towers",
        "share_of_matmul",
    } <= set(table.columns)
    assert about["torch"] and "host" not in about and str(tmp_path) not in (out / "machine.json").read_text()
    assert (out / "bench.png").stat().st_size > 1000 and (out / "bench.pdf").stat().st_size > 1000
    assert (
        main(
            [
                "bench",
                "--methods",
                "self_distance",
                "--set",
                f"weights={tmp_path / 'none.safetensors'}",
                "--images",
                "1",
                "--out",
                str(out),
            ]
        )
        == 1
    )
    assert (
        "1 of 1 cases failed" in (said := capsys.readouterr()).err
        and "none.safetensors" in pd.read_csv(out / "bench.csv").loc[0, "error"]
        and said.out == ""
    )


def test_tables_and_plots_leave_failures_out():
    row = dict(
        method="a",
        engine="torch",
        precision="fp32",
        size=64,
        batch=1,
        device="cpu",
        threads=1,
        images_per_s=2.0,
        ratio_to_towers=1.0,
        share_of_matmul=0.5,
        peak_mb=100.0,
    )
    row |= {
        f"{s}{kind}": 0.5 if kind == "_s" else 0.25 for s in (*STAGES, "model", "towers") for kind in ("_s", "_cpu_s")
    }
    table = pd.DataFrame(
        [
            row,
            row | dict(threads=2),
            dict(method="b", engine="torch", precision="fp32", size=64, batch=1, device="cpu", error="no"),
        ]
    )
    shown = bench_table(table)
    assert shown["method"].tolist() == ["a", "a"] and shown["head"].tolist() == [
        "250",
        "500",
    ], "CPU time where one thread worked, the clock's elsewhere"
    assert [t.get_text() for t in bench_figure(table).axes[0].get_yticklabels()] == ["a", "a"]
    assert bench_table(table[2:]).empty


def test_all_methods_and_all_pairs():
    assert [c["method"] for c in bench_cases()] == list(MODULES) and all(
        set(c) <= set(CASE) and c["parameters"]["image_size"] == 256 for c in bench_cases()
    )
    cases = bench_cases(["ssvp"], ["torch"], ["fp32", "bf16"], [64, 128], [1, 4], {"ssvp.dino": "tiny-dino"}, images=3)
    assert len(cases) == 8 and all(c["parameters"]["dino"] == "tiny-dino" and c["images"] == 3 for c in cases)
    assert {(c["parameters"]["image_size"], c["size"]) for c in cases} == {(64, 64), (128, 128)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "visualadd"], "unknown method 'visualadd'; did you mean visualad"),
        (["--engines", "tensorrt"], "use torch, openvino, onnxruntime"),
        (["--precisions", "fp64"], "nothing fits 'fp64'"),
        (["--set", "clip"], "write NAME=VALUE"),
        (["--methods", "ssvp", "--set", "clp=x"], "did you mean clip"),
        (["--methods", "ssvp", "visualad", "--set", "clip=tiny-clip"], "write METHOD.clip="),
        (["--methods", "ssvp", "visualad", "--set", "dino=tiny-dino"], "write METHOD.dino="),
        (["--methods", "ssvp", "--set", "dapo.clip=x"], "unknown method of this call 'dapo'"),
        (["--methods", "visualad", "--set", "ln_post=none"], "use base, trained or frozen"),
        (["--batch", "0"], "from 1 on"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, capsys, arguments, message):
    assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert (
        message in said
        and said.startswith("zsad bench: ")
        and said.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


def test_the_papers_size_in_small(tmp_path):
    "The script for large machines: inference beside the first engine, a step of training with activations kept and computed again."
    script = Path(__file__).parents[1] / "benchmarks" / "bench_large.py"
    done = subprocess.run(
        [
            sys.executable,
            script,
            "--tiny",
            "--training",
            "--training-precision",
            LOWER,
            "--only",
            "visualad",
            "--engines",
            "torch fp32 usual",
            f"torch {LOWER}",
            "--batch",
            "1",
            "2",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table, steps = (pd.read_csv(tmp_path / "tables" / f"bench_large{end}.csv") for end in ("", "_training"))
    assert (
        table["precision"].tolist() == ["fp32", "fp32", LOWER, LOWER]
        and table["batch"].tolist() == [1, 2, 1, 2]
        and table["x_first"][:2].tolist() == [1, 1]
    )
    assert (
        table["x_first"] * table["batch"].map(table["images_per_s"][:2].set_axis([1, 2]))
    ).tolist() == pytest.approx(table["images_per_s"].tolist(), rel=0.01)
    assert (
        steps["checkpointing"].tolist() == [False, True]
        and (steps["batch"] == 8).all()
        and (steps["step_s"] > 0).all()
        and (steps["peak_gb"] > 0.1).all()
    )
    assert (tmp_path / "bench_large.png").stat().st_size > 1000


def test_the_drift_of_one_machine_leaves_the_rows_of_another(tmp_path):
    "What an engine does to the metrics, in small; a second run takes the place of the first and of nothing else."
    script = Path(__file__).parents[1] / "benchmarks" / "bench_drift.py"
    table = tmp_path / "drift.csv"
    pd.DataFrame(
        [
            dict(
                processor="another",
                images=16,
                method="visualad",
                state="trained",
                engine="torch",
                precision="fp32",
                image_auroc=50.0,
            )
        ]
    ).to_csv(table, index=False)
    for _ in range(2):
        done = subprocess.run(
            [
                sys.executable,
                script,
                "--only",
                "visualad",
                "--engines",
                "torch bf16",
                "--size",
                "64",
                "--images",
                "1",
                "--train-images",
                "1",
                "--epochs",
                "1",
                "--csv",
                table,
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    found = pd.read_csv(table)
    assert (
        found["processor"].tolist() == ["another", machine()["cpu"], machine()["cpu"]]
        and found["precision"].tolist() == ["fp32", "fp32", "bf16"]
        and (found["images"] == 16).all()
    )
    assert found["largest"][1] == 0 and found.filter(regex="^(image|pixel)_").iloc[2].abs().max() == pytest.approx(
        found["largest"][2], abs=1e-3
    )
