"""What the papers' size costs on this machine: every system at ViT-L/14, 518 px, beside its own bare towers, in every engine, side by side.

    python tests/benchmarks/bench_large.py                     an hour on an idle core, 10 GB -> paper_figures/bench_large.pdf and .png, tables/bench_large.csv
    python tests/benchmarks/bench_large.py --device cuda       a GPU with 24 GB: batch 1 and 16 in fp32, bf16, compiled; then a step of training at batch 8 -> bench_large_cuda.*, tables/bench_large_cuda_training.csv
    python tests/benchmarks/bench_large.py --tiny --training --out FOLDER   does it work at all
    python tests/benchmarks/bench_large.py --only visualad --engines "torch bf16" "onnxruntime fp32" --out FOLDER

Seeded random weights: they cost what trained ones cost. DMA+SAP with DINOv2 ViT-B/14-reg, SSVP with DINOv3 ViT-L/16 at 592 px. On a CPU one thread and CPU seconds.
x_first is the throughput beside the first engine's at the same batch, on a CPU PyTorch's own fp32 products (`ZSAD_PRODUCTS=usual`); of_limit, on a GPU, the share of what an H200's
bf16 products allow one pass of CLIP ViT-L/14. What the engines do to the metrics: tests/benchmarks/bench_drift.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from zsad_nb.deploy.bench import bench, bench_cases, bench_figure, bench_table
from zsad_nb.figures.style import save_figure
from zsad_nb.methods.base import create, method_class
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of

METHODS = ("visualad", "dapo", "ssvp", "dma_sap")
CLIP = "clip-vitl14-336"
DINO = dict(dma_sap=dict(dino="dinov2-vitb14-reg"), ssvp=dict(dino="dinov3-vitl16", dino_size=592))
ENGINES = dict(
    cpu=("torch fp32 usual", "torch fp32", "openvino fp32", "openvino bf16"),
    cuda=("torch fp32", "torch bf16", "torch bf16 compiled"),
)
LIMIT = 790e12 / 1.01e12  # images a second: an H200's bf16 products, FLOP of CLIP ViT-L/14 at 518 px


def parameters(method: str, tiny: bool) -> dict:
    "Of a method at the papers' size, seeded random weights."
    if tiny:
        return {}
    tower = "backbone" if method == "visualad" else "clip"
    return {
        tower: CLIP,
        "weights" if method == "visualad" else "clip_weights": "random:0",
        **(DINO[method] | dict(dino_weights="random:0") if method in DINO else {}),
    }


def inference(a) -> pd.DataFrame:
    "A system's engines one after another: what x_first compares is minutes apart, not an hour."
    rows = []
    with tempfile.TemporaryDirectory(prefix="zsad_large_") as graphs:
        for method in a.only:
            own = {f"{method}.{k}": v for k, v in parameters(method, a.tiny).items()}
            for name in a.engines:
                engine, precision, *how = name.split()
                os.environ["ZSAD_PRODUCTS"] = "usual" if "usual" in how else ""
                rows.append(
                    bench(
                        bench_cases(
                            (method,),
                            (engine,),
                            (precision,),
                            (a.size,),
                            a.batch,
                            own,
                            seconds=a.seconds,
                            device=a.device,
                            folder=graphs,
                            compile="compiled" in how,
                        )
                    )
                )
    table = pd.concat(rows, ignore_index=True)
    if "images_per_s" not in table:
        raise SystemExit("\n".join(table["error"]))
    first = table.groupby(["method", "batch"])["images_per_s"].transform(
        lambda rate: rate.iloc[0]
    )  # nan where it failed
    at = table.columns.get_loc("images_per_s") + 1
    if a.device == "cuda":
        table.insert(at, "of_limit", table["images_per_s"] / LIMIT)
    table.insert(at, "x_first", table["images_per_s"] / first)
    return table


def step(method: str, size: int, batch: int, device: str, tiny: bool, **how) -> dict:
    "One short training, in this process."
    with tempfile.TemporaryDirectory(prefix="zsad_large_") as room:
        index = synthetic_index(room, "auxiliary", size, 2, 2).iloc[: (2 if tiny else 8) * batch]
        model = create(method, image_size=size, **parameters(method, tiny)).to(device)
        about = fit(model, index, recipe_of(model, epochs=1, batch_size=batch), progress=False, **how).attrs
    return dict(
        method=method,
        size=size,
        batch=batch,
        device=device,
        **how,
        step_s=about["step_seconds"],
        images_per_s=batch / about["step_seconds"],
        peak_gb=about["peak_memory"] / 1e9,
    )


def training(a) -> pd.DataFrame:
    "Step by step: with activations kept and, where gradients pass the towers, computed again; on a GPU also compiled. What fails has its error in its row."
    rows = []
    for method in a.only:
        for checkpointing in (False, True) if not method_class(method).encodes else (False,):
            for compiled in (False, True) if a.device == "cuda" else (False,):
                case = dict(
                    method=method,
                    size=a.size,
                    batch=8,
                    device=a.device,
                    tiny=a.tiny,
                    precision=a.training_precision,
                    checkpointing=checkpointing,
                    compile=compiled,
                )
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", __file__, "--step", json.dumps(case)],
                    capture_output=True,
                    text=True,
                )
                last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1:]
                rows.append(
                    json.loads(last[0])
                    if done.returncode == 0
                    else case | dict(error=(last or [f"exit status {done.returncode}"])[0])
                )
                print(
                    {k: v if not isinstance(v, float) else round(v, 4) for k, v in rows[-1].items()},
                    file=sys.stderr,
                    flush=True,
                )
    return pd.DataFrame(rows)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--tiny", action="store_true", help="the embedded pair at 64 px")
    ask.add_argument("--out", type=Path, default=Path("paper_figures"))
    ask.add_argument(
        "--seconds", type=float, help="of every stage, two passes at least; the fastest counts (default: 15)"
    )
    ask.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    ask.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    ask.add_argument(
        "--engines",
        nargs="+",
        metavar="ENGINE",
        help=(
            "engine and precision, with usual or compiled behind them where that is meant (default:"
            f" {', '.join(ENGINES['cpu'])}; on a GPU {', '.join(ENGINES['cuda'])})"
        ),
    )
    ask.add_argument("--batch", type=int, nargs="+", help="default: 1; on a GPU 1 and 16")
    ask.add_argument("--training", action="store_true", help="steps of training, too; on a GPU always")
    ask.add_argument(
        "--training-precision",
        default="bf16",
        choices=("fp32", "bf16", "fp16"),
        help="of the steps of training (default: bf16)",
    )
    ask.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    if a.step:
        print(json.dumps(step(**a.step)))
        return 0
    gpu = a.device == "cuda"
    a.size = 64 if a.tiny else 518
    a.engines = a.engines or ENGINES[a.device]
    a.batch = a.batch or ([1, 16] if gpu else [1])
    a.seconds = a.seconds or (0.1 if a.tiny else 15.0)
    name = "bench_large_cuda" if gpu else "bench_large"
    (a.out / "tables").mkdir(parents=True, exist_ok=True)
    table = inference(a)
    table.to_csv(a.out / "tables" / f"{name}.csv", index=False, float_format="%.4g")
    save_figure(bench_figure(table), a.out / name, 200)
    print(
        bench_table(table)
        .assign(**{c: table[c].map("{:.2f}".format) for c in ("x_first", "of_limit") if c in table})
        .to_string(index=False)
    )
    if gpu or a.training:
        steps = training(a)
        steps.to_csv(a.out / "tables" / f"{name}_training.csv", index=False, float_format="%.4g")
        print(f"\n{steps.round(3).to_string(index=False)}")
    failed = int(table["error"].notna().sum()) if "error" in table else 0
    print(
        f"\nwritten: {name}.* in {a.out} and {a.out / 'tables'}"
        + (f"; {failed} of {len(table)} cases failed, column error says why" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
