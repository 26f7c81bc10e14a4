"""What every engine and precision does to every metric, in points: the four methods, trained on drawn images, on the drawn target set.

    python tests/benchmarks/bench_drift.py                    # an hour on one core -> paper_figures/tables/engine_drift.csv
    python tests/benchmarks/bench_drift.py --only visualad --engines "openvino bf16" --csv FILE

"torch fp32" is PyTorch as it comes, "torch routed" its fp32 products through oneDNN, which the package uses where that pays: on an AMD processor, and only there it has a row.
288 normal and 288 defective images a category, because with 72 one pair of images in another order moves the image F1-max by tenths of a point. What other processors said, or
another number of images, stays in the table. How fast the engines are: `zsad bench`, tests/benchmarks/bench_large.py.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from zsad_nb.backbones.products import onednn_pays
from zsad_nb.core.files import write_atomically
from zsad_nb.core.sessions import EngineError
from zsad_nb.core.settings import seed_everything
from zsad_nb.deploy.bench import machine
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods.base import create
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("visualad", "dapo", "dma_sap", "ssvp")
ENGINES = (
    "torch fp32",
    "torch routed",
    "torch bf16",
    "onnxruntime fp32",
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
)


def drift(args) -> pd.DataFrame:
    "Every metric's difference to PyTorch in fp32, in points (hundredths); small trainings with a fixed seed"
    torch.set_num_threads(args.threads)
    processor = machine()["cpu"]
    rows = []
    size = args.size
    engines = [e for e in args.engines if e != "torch fp32" and (e != "torch routed" or onednn_pays())]
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        room = Path(room)
        auxiliary = synthetic_index(room / "auxiliary", "auxiliary", size, args.train_images, args.train_images)
        target = synthetic_index(room / "target", "target", size, args.images, args.images)
        for name in args.only:
            for kind in args.states:
                seed_everything(0)
                method = create(name, image_size=size)
                os.environ["ZSAD_PRODUCTS"] = "usual"
                if kind == "trained":
                    fit(
                        method,
                        auxiliary,
                        recipe_of(method, epochs=args.epochs, lr_scale=args.lr_scale, seed=0),
                        progress=False,
                        cache=room / "features",
                    )
                expected = None
                for engine in ("torch fp32", *engines):
                    which, precision = engine.split()
                    row = dict(
                        processor=processor,
                        images=len(target),
                        method=name,
                        state=kind,
                        engine=which,
                        precision=precision,
                    )
                    os.environ["ZSAD_PRODUCTS"] = "" if precision == "routed" else "usual"
                    method.use_engine(
                        which,
                        precision.replace("routed", "fp32"),
                        **({} if which == "torch" else dict(folder=room / "engines")),
                    )
                    start = time.perf_counter()
                    try:
                        found = (
                            evaluate(method, target, size=size, progress=False).mean.filter(regex="^(image|pixel)_")
                            * 100
                        )
                    except EngineError as error:  # too far away at export: nobody gets numbers from it
                        rows.append(row | dict(refused=str(error)))
                        print(f"{name} {kind} {engine}: refused, {error}", flush=True)
                        continue
                    if expected is None:
                        expected = found
                    rows.append(
                        row
                        | ((found - expected).round(3) + 0.0 if engine != "torch fp32" else found).to_dict()
                        | dict(largest=(found - expected).abs().max())
                    )
                    print(
                        f"{name} {kind} {engine}: largest difference {rows[-1]['largest']:.3f} points at"
                        f" {(found - expected).abs().idxmax()}; {time.perf_counter() - start:.0f} s",
                        flush=True,
                    )
            table = merged(args.csv, pd.DataFrame(rows))
            write_atomically(args.csv, lambda p, table=table: table.to_csv(p, index=False, float_format="%.3f"))
    return table


def merged(path: Path, new: pd.DataFrame) -> pd.DataFrame:
    "The table there is, with the new rows in the place of those that tell of the same processor, images, method and state"
    if not path.exists():
        return new
    which = ["processor", "images", "method", "state"]
    old = pd.read_csv(path)
    return pd.concat([old[~old.set_index(which).index.isin(new.set_index(which).index)], new], ignore_index=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--folder", help="where graphs go meanwhile; default: the system's temporary folder")
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "paper_figures" / "tables" / "engine_drift.csv",
        help="the table (default: the committed one)",
    )
    for name, default in (("size", 192), ("images", 288), ("train-images", 6), ("epochs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--lr-scale", type=float, default=8.0, help="default: %(default)s")
    parser.add_argument(
        "--states", nargs="+", default=["trained"], choices=("trained", "untrained"), help="default: %(default)s"
    )
    with pd.option_context("display.width", 250, "display.max_columns", None):
        print(drift(parser.parse_args()).round(3).to_string(index=False))
