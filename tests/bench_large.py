"""What the papers' size costs on this machine: every system at ViT-L/14, 518 px, beside its own bare towers, in every engine, side by side.

    python tests/bench_large.py                    about an hour on an idle core, 10 GB -> paper_figures/tables/bench_large.csv
    python tests/bench_large.py --tiny --out FOLDER  does it work at all

Seeded random weights: they cost what trained ones cost. One thread, CPU seconds; DMA+SAP with DINOv2 ViT-B/14-reg, SSVP with DINOv3 ViT-L/16 at 592 px.
`x_usual` is the throughput beside PyTorch's own fp32 products (`ZSAD_PRODUCTS=usual`). What the engines do to the metrics: engine_drift.csv.
"""
import argparse
import os
import tempfile
from pathlib import Path

import pandas as pd

from zsad_nb.use.bench import bench, bench_cases, bench_table

METHODS = ("visualad", "dapo", "ssvp", "dma_sap")
CLIP, DINO = "clip-vitl14-336", dict(dma_sap=dict(dino="dinov2-vitb14-reg"), ssvp=dict(dino="dinov3-vitl16", dino_size=592))


def parameters() -> dict:
    "Of every method at the papers' size, seeded random weights."
    found = {}
    for m in METHODS:
        tower = "backbone" if m == "visualad" else "clip"
        own = {tower: CLIP, "weights" if m == "visualad" else "clip_weights": "random:0", **(DINO[m] | dict(dino_weights="random:0") if m in DINO else {})}
        found |= {f"{m}.{k}": v for k, v in own.items()}
    return found


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--tiny", action="store_true", help="the embedded pair at 64 px")
    ask.add_argument("--out", type=Path, default=Path("paper_figures/tables"))
    ask.add_argument("--seconds", type=float, default=15.0, help="of every stage, two passes at least; the fastest counts")
    a = ask.parse_args()
    size, given = (64, {}) if a.tiny else (518, parameters())
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory(prefix="zsad_large_") as graphs:
        for products, engine, precision in (("usual", "torch", "fp32"), ("", "torch", "fp32"), ("", "openvino", "fp32"), ("", "openvino", "bf16")):
            os.environ["ZSAD_PRODUCTS"] = products
            rows.append(bench(bench_cases(METHODS, (engine,), (precision,), (size,), (1,), given, seconds=0.1 if a.tiny else a.seconds, folder=graphs)))
            if "error" in rows[-1]: raise SystemExit("\n".join(rows[-1]["error"].dropna()))
    table = pd.concat(rows, ignore_index=True)
    usual = rows[0].set_index("method")["images_per_s"]
    table.insert(table.columns.get_loc("images_per_s") + 1, "x_usual", table["images_per_s"] / table["method"].map(usual))
    a.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(a.out/"bench_large.csv", index=False, float_format="%.4g")
    print(bench_table(table).assign(x_usual=table["x_usual"].map("{:.2f}".format)).to_string(index=False))
    print(f"\nwritten: {a.out/'bench_large.csv'}")
    return 0


if __name__ == "__main__": raise SystemExit(main())
