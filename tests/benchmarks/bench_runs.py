"""Runs in CPU seconds, this checkout against another one: `python tests/benchmarks/bench_runs.py --against PATH`.

Both are measured in one go, by turns, each in processes of its own with one thread; without --against this one alone.
A row: the work, seconds there and here (the smallest of --repeats), their ratio, the instruction sets of the processor."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMMON = """
import io, json, os, resource, shutil, sys, tempfile, time
from pathlib import Path
from zsad_nb.runs.plans import expand
from zsad_nb.runs.run import Spec, collect
from zsad_nb.runs.sweeps import sweep

def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

evaluate = Path.cwd() / "nbs/experiments/evaluate.ipynb"
train = Path.cwd() / "nbs/experiments/train.ipynb"
count = int(sys.argv[1])
out = Path(tempfile.mkdtemp())
quiet = open(os.devnull, "w")
begun = cpu()
"""

WORKS = {
    "tiny evaluation as a run of a sweep": (
        8,
        """
specs = [Spec(evaluate, dict(method="self_distance", size=64, images=1, seed=seed)) for seed in range(count)]
assert sweep(specs, out, cores=1, stream=quiet).ok
print(json.dumps((cpu() - begun) / count))
""",
    ),
    "planning a sweep": (
        2000,
        """
plan = dict(name="plan", seeds=list(range(count // 8)), stages=dict(
    train=dict(notebook=str(train), grid=dict(method=["visualad", "dapo"])),
    evaluate=dict(notebook=str(evaluate), after="train", inherit=["method"], grid=dict(data=["mvtec", "visa", "mpdd"])),
))
specs = expand(plan)
assert len(specs) == count
sweep(specs, out, dry_run=True, stream=quiet)
print(json.dumps(cpu() - begun))
""",
    ),
    "waiting, share of a core": (
        800,
        """
import threading
from concurrent.futures import Future

class Slow:
    slots = 2

    def submit(self, function, *arguments):
        future = Future()
        ended = dict(status="done", fresh=True, seconds=1.0)
        threading.Timer(5.0 if len(waited) < 2 else 0.0, future.set_result, [ended]).start()
        waited.append(time.process_time())
        return future

waited = []
specs = [Spec(evaluate, dict(seed=seed)) for seed in range(count)]
from zsad_nb.runs import sweeps
sweeps.summarise = lambda done: None
start = {}

class Waiting(Slow):
    def submit(self, function, *arguments):
        if len(waited) == 2 and "share" not in start:
            start["share"] = (time.process_time() - waited[1]) / 5.0
            raise KeyboardInterrupt
        return super().submit(function, *arguments)

sweep(specs, out, executor=Waiting(), stream=quiet)
print(json.dumps(start["share"]))
os._exit(0)
""",
    ),
    "collecting runs": (
        2000,
        """
metrics = "category,normal,anomalous,image_auroc,image_ap,pixel_auroc,pixel_aupro\\n"
metrics += "".join(f"class{n},10,10,0.9,0.91,0.92,0.93\\n" for n in range(8)) + "mean,80,80,0.9,0.91,0.92,0.93\\n"
for seed in range(count):
    spec = dict(notebook="evaluate.ipynb", experiment="e", given=["seed"], parameters=dict(method="ssvp", seed=seed, size=64))
    folder = out / "e" / f"{seed:016x}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(dict(status="done", hash=folder.name, spec=spec, after={})))
    result = dict(notebook="evaluate", method="ssvp", data="mvtec", seed=seed, seen=[], trained_on=["visa"])
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.csv").write_text(metrics)
begun = cpu()
assert len(collect(out)) == 9 * count
print(json.dumps(cpu() - begun))
""",
    ),
}


def measured(checkout: Path, code: str, count: int) -> float:
    "CPU seconds of a piece of work in a checkout."
    with tempfile.TemporaryDirectory() as place:
        environment = dict(os.environ, PYTHONPATH=str(checkout), OMP_NUM_THREADS="1", TMPDIR=place, HF_HUB_OFFLINE="1")
        command = [sys.executable, "-W", "ignore", "-c", COMMON + code, str(count)]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def instruction_sets() -> str:
    "Those that numeric libraries choose by."
    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    return " ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags) or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--count", type=int, help="runs, instead of those of each row")
    options = parser.parse_args()
    checkouts = [path.resolve() for path in (options.against, ROOT) if path]
    print("| work | runs | before | after | ratio | instruction sets |\n|---|---|---|---|---|---|")
    for work in options.only:
        count, code = WORKS[work]
        count = options.count or count
        seconds: dict[Path, list[float]] = {path: [] for path in checkouts}
        for _ in range(options.repeats):
            for path in checkouts:
                seconds[path].append(measured(path, code, count))
        best = [min(values) for values in seconds.values()]
        before, after = (best[0], best[1]) if len(best) > 1 else (None, best[0])
        ratio = f"{before / after:.1f}" if before else ""
        print(
            f"| {work} | {count} | {'' if before is None else f'{before:.3f}'} | {after:.3f} | {ratio} | {instruction_sets()} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
