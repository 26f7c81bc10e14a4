"""Does evaluation stream? Peak memory of evaluating many drawn images against few, each in a fresh process.

    python tests/benchmarks/bench_memory.py                # 5,000 images of 256 px against 50
    python tests/benchmarks/bench_memory.py --images 500   # smaller

The many are distinct files (links) over 50 drawn images, in one category, so that nothing of a category can be let go early. Not collected by pytest.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def linked(folder: Path, count: int, size: int, drawn: int = 50):
    "An index of `count` distinct files of one category"
    import pandas as pd

    from zsad_nb.synthetic.benchmark import synthetic_index

    base = synthetic_index(folder / "drawn", "target", size, 4, 3).iloc[:drawn].assign(category="everything")
    rows = []
    for i in range(count):
        row = base.iloc[i % len(base)].to_dict()
        for key in ("image", "mask"):
            if not row[key]:
                continue
            name = f"copies/{i:05d}_{key}.png"
            (folder / "drawn" / "copies").mkdir(exist_ok=True)
            if not (folder / "drawn" / name).exists():
                os.link(folder / "drawn" / row[key], folder / "drawn" / name)
            row[key] = name
        rows.append(row)
    index = pd.DataFrame(rows)
    index.attrs = dict(base.attrs)
    return index


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--images", type=int, default=5000)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--method", default="self_distance")
    p.add_argument("--limit", type=float, default=300, help="MB the many may need more than 50")
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        import torch

        from zsad_nb.evaluation.evaluate import evaluate
        from zsad_nb.methods.base import create

        torch.set_num_threads(1)
        index = linked(Path(a.folder), a.one, a.size)
        start = time.perf_counter()
        found = evaluate(create(a.method, image_size=a.size), index, progress=False)
        print(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            time.perf_counter() - start,
            found.mean["pixel_auroc"],
            len(found.per_image),
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for count in (50, a.images):
            out = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--one",
                    str(count),
                    "--folder",
                    folder,
                    "--size",
                    str(a.size),
                    "--method",
                    a.method,
                ],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()
            print(
                f"{count} images of {a.size} px: peak {float(out[0]):.0f} MB, {float(out[1]):.0f} s, pixel AUROC"
                f" {float(out[2]):.4f} over {out[3]} images",
                flush=True,
            )
            peaks.append(float(out[0]))
    print(f"{a.images} images need {peaks[1] - peaks[0]:+.0f} MB more than 50 (limit {a.limit:.0f})")
    sys.exit(peaks[1] - peaks[0] > a.limit)


if __name__ == "__main__":
    main()
