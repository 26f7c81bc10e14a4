"""Do two Dask workers halve a sweep? Equal runs that keep one core busy, on one worker and on two, side by side.

    python tests/benchmarks/bench_cluster.py                      8 runs of 15 s; needs two free cores; about four minutes
    python tests/benchmarks/bench_cluster.py --runs 2 --seconds 1  does it work at all

Prints one line a sweep and the ratio of the times; at most 0.6 is the aim. Exit status 1 if it is missed.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distributed import Client

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "system"))
from test_runs import WRITE, notebook

from zsad_nb.runs.run import Spec
from zsad_nb.runs.sweeps import sweep

BUSY = (  # CPU seconds: a core that is shared takes longer
    "import time\nend, x = time.process_time() + seconds, 0\nwhile time.process_time() < end: x = sum(i * i for i in"
    " range(10_000))"
)


def timed(workers: int, specs: list, place: Path) -> float:
    "Seconds of a sweep on a fresh cluster of so many workers with one thread each."
    file = place / "scheduler.json"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dask",
                "scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--no-dashboard",
                "--scheduler-file",
                str(file),
            ],
            stderr=subprocess.DEVNULL,
        )
    ]
    try:
        while not file.exists():
            time.sleep(0.1)
        processes += [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "dask",
                    "worker",
                    "--scheduler-file",
                    str(file),
                    "--nthreads",
                    "1",
                    "--no-nanny",
                    "--no-dashboard",
                    "--memory-limit",
                    "0",
                ],
                stderr=subprocess.DEVNULL,
            )
            for _ in range(workers)
        ]
        with Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(workers, 120)
            start = time.perf_counter()
            done = sweep(specs, place / "runs", client=client, cores=1, stream=io.StringIO())
            took = time.perf_counter() - start
        assert done.ok and len(done.table) == len(specs) and done.table["attempts"].eq(1).all(), done.table.to_string()
        print(
            f"{workers} worker{'s' * (workers > 1)}: {len(specs)} runs in {took:.1f} s; a run"
            f" {done.table['seconds'].mean():.1f} s in the mean",
            flush=True,
        )
        return took
    finally:
        for p in processes:
            p.kill()
        for p in processes:
            p.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="CPU seconds of each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = notebook(
            Path(folder) / "busy.ipynb", "n: int = 0\nseconds: float = 1.0", BUSY, WRITE.format("dict(n=n)")
        )
        specs = [Spec(path, dict(n=n, seconds=args.seconds)) for n in range(args.runs)]
        times = {}
        for workers in (1, 2):
            (place := Path(folder) / str(workers)).mkdir()
            times[workers] = timed(workers, specs, place)
    ratio = times[2] / times[1]
    print(f"ratio {ratio:.2f} (aim: at most 0.6)")
    sys.exit(ratio > 0.6)
