"""Pixel metrics of the reference task, side by side in one run: this package, scikit-learn, the usual AUPRO loop.

    python tests/benchmarks/bench_metrics.py                    # ours on smooth maps and on noise, then the references on smooth maps (minutes, 4 GB)
    python tests/benchmarks/bench_metrics.py --skip-references  # ours only (seconds)
    python tests/benchmarks/bench_metrics.py --many             # 10,000 maps of 256 x 256 within 1 GB, whole and as ten shards merged (a minute or two, 3 GB of disk)

Each measurement runs in a fresh process: CPU seconds from time.process_time over update and compute, memory as the rise of the peak
resident size above the size with the maps in memory; with --many of the whole process, libraries included.
"system" is the part of the CPU seconds that the kernel spent, nearly all of it on handing out memory; on a virtual machine that gives
free memory back it varies (a millisecond a MB was seen, or a quarter). "again" is a second evaluation in the same process, as for
the second class of a table: its memory is at hand already. Not collected by pytest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
for name in THREADS:
    os.environ.setdefault(name, "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy import ndimage


def make(kind: str, n: int, size: int, folder: Path):
    "n maps, every second one with raised defects of several regions: smooth (sigma 8) or pixel noise"
    rng = np.random.default_rng(0)
    maps = np.lib.format.open_memmap(folder / f"{kind}_maps.npy", "w+", np.float32, (n, size, size))
    masks = np.lib.format.open_memmap(folder / f"{kind}_masks.npy", "w+", bool, (n, size, size))
    for i in range(n):
        m = rng.standard_normal((size, size), dtype=np.float32)
        maps[i] = ndimage.gaussian_filter(m, 8) * 28 if kind == "smooth" else m
        if i % 2:
            g = ndimage.gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 12)
            masks[i] = g > 1.8 * g.std()
            maps[i] += masks[i] * np.float32(rng.uniform(0.3, 3))


def peak_mb() -> float:
    "Highest resident size so far"
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 2**20
    )  # Linux counts kB, macOS bytes


def ours(maps, masks, batch=8, **kwargs):
    from zsad_nb.evaluation.metrics import PixelMetrics

    with PixelMetrics(**kwargs) as m:
        for i in range(0, len(maps), batch):
            m.update(maps[i : i + batch], masks[i : i + batch])
        return dict(m.compute())


def spilled(maps, masks):
    return ours(maps, masks, block=2**24)


def small_blocks(maps, masks):
    return ours(maps, masks, block=2**20)


def binned(maps, masks, batch=8):
    "2^22 bins: 150 MB whatever the number of pixels, with a bound for every number"
    from zsad_nb.evaluation.binned import BinnedPixelMetrics

    m = BinnedPixelMetrics()
    for i in range(0, len(maps), batch):
        m.update(maps[i : i + batch], masks[i : i + batch])
    found = m.compute()
    return {**found, **{f"bound of {k}": v for k, v in found.bounds.items()}}


def sklearn(maps, masks):
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    y = np.asarray(masks).ravel()
    s = np.asarray(maps).ravel()
    p, r, _ = precision_recall_curve(y, s)
    with np.errstate(invalid="ignore"):
        f1 = np.nanmax(2 * p * r / (p + r))
    del p, r
    return {
        "pixel_auroc": float(roc_auc_score(y, s)),
        "pixel_ap": float(average_precision_score(y, s)),
        "pixel_f1max": float(f1),
    }


def usual_loop(maps, masks):
    "200 passes over all pixels and regions, written from its definition"
    from zsad_nb.evaluation.aupro_200 import aupro_200

    maps = np.asarray(maps)
    masks = np.asarray(masks)
    low = maps.min()
    high = maps.max()
    fpr = []
    pro = []
    normal = ~masks
    for t in np.arange(low, high, (high - low) / 200):
        above = maps > t
        covered = []
        for a, k in zip(above, masks):
            label, _ = ndimage.label(k, np.ones((3, 3)))
            for i, box in enumerate(ndimage.find_objects(label), 1):
                region = label[box] == i
                covered.append(a[box][region].mean())
        fpr.append((above & normal).sum() / normal.sum())
        pro.append(np.mean(covered))
    return {"pixel_aupro_200": aupro_200(np.array(fpr), np.array(pro))[0]}


CASES = {f.__name__: f for f in (ours, spilled, small_blocks, binned, sklearn, usual_loop)}


def child(case: str, kind: str, folder: Path):
    maps = np.load(folder / f"{kind}_maps.npy")
    masks = np.load(folder / f"{kind}_masks.npy")
    CASES[case](maps[:2], masks[:2])  # imports and first-call costs are not the task's
    start = peak_mb()
    wall = time.perf_counter()
    cpu = time.process_time()
    system = os.times().system
    values = CASES[case](maps, masks)
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    system = os.times().system - system
    again = time.process_time()
    mb = peak_mb() - start
    if cpu < 10:
        assert CASES[case](maps, masks) == values
    print(
        json.dumps(
            dict(
                cpu=cpu,
                system=system,
                again=time.process_time() - again if cpu < 10 else float("nan"),
                wall=wall,
                mb=mb,
                values=values,
            )
        )
    )


def some(part: int, size: int = 256, count: int = 20):
    "The maps and masks of one part of many, made anew wherever they are needed: noise, every second map with three raised defects"
    rng = np.random.default_rng([7, part])
    maps = rng.standard_normal((count, size, size), dtype=np.float32)
    masks = np.zeros((count, size, size), bool)
    for m, k in zip(maps[::2], masks[::2]):
        for y, x, h, w in rng.integers((0, 0, 8, 8), (size - 40, size - 40, 40, 40), (3, 4)):
            k[y : y + h, x : x + w] = True
        m += k * np.float32(rng.uniform(0.3, 3))
    return maps, masks


def many(kind: str, total: int, folder: Path):
    "Whole; in ten shards, each evaluated, saved and closed as a worker does, then loaded and merged; or in bins"
    from zsad_nb.evaluation.binned import BinnedPixelMetrics
    from zsad_nb.evaluation.metrics import PixelMetrics

    parts = range(total // 20)
    shards = 10 if kind == "shards" else 1
    spent = 0.0
    wall = time.perf_counter()
    for shard in range(shards):
        one = BinnedPixelMetrics() if kind == "binned" else PixelMetrics(spill=folder)
        for part in parts[shard::shards]:
            maps, masks = some(part)
            begun = time.process_time()
            one.update(maps, masks)
            spent += time.process_time() - begun
        if shards > 1:
            one.save(folder / f"{shard}.metrics")
            one.close()
    begun = time.process_time()
    if shards > 1:
        one = PixelMetrics(spill=folder)
        for shard in range(shards):
            with PixelMetrics.load(folder / f"{shard}.metrics") as other:
                one.merge(other)
    before = peak_mb()
    values = dict(one.compute())
    spent += time.process_time() - begun
    one.close()
    print(json.dumps(dict(cpu=spent, wall=time.perf_counter() - wall, mb=peak_mb(), before=before, values=values)))


def scale(total: int, limit: float = 1000) -> bool:
    "Whether all that was promised of many maps holds"
    results, good = {}, True
    print(
        f"{total} maps of 256 x 256 float32, half with masks, one thread; peak of the whole process in MB (limit"
        f" {limit:.0f})"
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("whole", "shards", "binned"):
            out = subprocess.run(
                [sys.executable, __file__, "--many", str(total), "--child", kind, "", folder],
                capture_output=True,
                text=True,
            )
            if out.returncode:
                sys.exit(f"{kind} failed:\n{out.stderr}")
            r = results[kind] = json.loads(out.stdout)
            fits = r["mb"] <= limit
            print(
                f"{kind:<8}{r['cpu']:>8.1f} CPU s{r['wall']:>8.1f} s with drawing{r['mb']:>8.0f} MB "
                f" {'within' if fits else 'ABOVE'} the limit   "
                + " ".join(f"{k.removeprefix('pixel_')} {v!r}" for k, v in r["values"].items() if v == v),
                flush=True,
            )
            good &= fits
    same = results["whole"]["values"] == results["shards"]["values"]
    print(f"ten shards merged {'equal one pass to the last bit' if same else 'DIFFER from one pass'}")
    return good and same


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--maps", type=int, default=200)
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--skip-references", action="store_true")
    parser.add_argument(
        "--many", type=int, nargs="?", const=10_000, metavar="MAPS", help="this many maps of 256 x 256 instead (10000)"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child and args.many:
        return many(args.child[0], args.many, Path(args.child[2]))
    if args.many:
        sys.exit(not scale(args.many))
    if args.child:
        return child(args.child[0], args.child[1], Path(args.child[2]))
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("smooth", "noise"):
            make(kind, args.maps, args.size, Path(folder))
        runs = [(c, k) for k in ("smooth", "noise") for c in ("ours", "spilled", "small_blocks", "binned")]
        runs += [] if args.skip_references else [("sklearn", "smooth"), ("usual_loop", "smooth")]
        print(
            f"{args.maps} maps of {args.size} x {args.size} float32, half with masks, one thread\n"
            f"{'':<14}{'maps':<8}{'CPU s':>8}{'system':>8}{'again':>8}{'wall s':>8}{'+MB':>8}   values"
        )
        results = {}
        for case, kind in runs:
            out = subprocess.run(
                [sys.executable, __file__, "--child", case, kind, folder], capture_output=True, text=True
            )
            if out.returncode:
                sys.exit(f"{case} on {kind} maps failed:\n{out.stderr}")
            r = results[case, kind] = json.loads(out.stdout)
            print(
                f"{case:<14}{kind:<8}{r['cpu']:>8.2f}{r['system']:>8.2f}{r['again']:>8.2f}{r['wall']:>8.2f}{r['mb']:>8.0f}   "
                + " ".join(
                    f"{k.removeprefix('pixel_')} {v:.6f}" for k, v in r["values"].items() if v == v and "bound" not in k
                )
                + "".join(f"\n{'':<57}{k} {v:.1e}" for k, v in r["values"].items() if "bound" in k),
                flush=True,
            )
        if not args.skip_references:
            us = results["ours", "smooth"]
            refs = [results["sklearn", "smooth"], results["usual_loop", "smooth"]]
            cpu = sum(r["cpu"] for r in refs)
            mb = max(r["mb"] for r in refs)
            diff = max(abs(us["values"][k] - v) for r in refs for k, v in r["values"].items())
            print(
                f"references / ours: CPU {cpu / us['cpu']:.0f} x ({cpu:.0f} s against {us['cpu']:.2f} s), memory"
                f" {mb / us['mb']:.0f} x; largest difference of a value {diff:.1e}"
            )


if __name__ == "__main__":
    main()
