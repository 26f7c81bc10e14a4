"A training that is killed again and again, at moments that nobody chose, ends with the bits of one that nobody disturbed."

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

KILLS = int(os.environ.get("ZSAD_KILLS", 2))

CHILD = """
    import json, os, random, shutil, signal, sys, time, warnings
    from pathlib import Path
    import torch
    from small_sets import bright_squares
    from zsad_nb.core.settings import seed_everything
    from zsad_nb.training.fit import fit, recipe_of
    from zsad_nb.methods.base import create, save

    torch.set_num_threads(1)  # and none was started: a process may be forked
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    index = bright_squares(root, 10, defect="spot")

    def train(method, folder):
        "In a process of its own: the same command every time."
        child = os.fork()
        if child: return child
        try:
            history = fit(method, index, recipe_of(method, epochs=5, batch_size=4), progress=False, cache=folder / "cache", resume=folder / "state")
            text = history.drop(columns="seconds").to_json(double_precision=15)
            (folder / "about.json").write_text(json.dumps(dict(resumed=history.attrs["resumed"], hits=[e["hits"] for e in history.attrs["epochs"]], history=text)))
            save(method, folder / "checkpoint.safetensors")
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)

    def result(folder): return (folder / "checkpoint.safetensors").read_bytes(), json.loads((folder / "about.json").read_text())

    done = []
    for name in ("visualad", "dma_sap"):
        seed_everything(0)
        method = create(name, image_size=32)
        (quiet := root / f"{name} undisturbed").mkdir()
        start = time.perf_counter()
        assert os.waitpid(train(method, quiet), 0)[1] == 0
        seconds, want, made, number = time.perf_counter() - start, result(quiet), 0, 0
        while made < (kills + (name == "dma_sap")) // 2 or number == 0:
            folder = root / f"{name} {number}"
            folder.mkdir()
            number, attempts, moments = number + 1, 0, []
            while not (folder / "checkpoint.safetensors").exists():
                child, attempts = train(method, folder), attempts + 1
                left = random.SystemRandom().uniform(0, seconds) if made < (kills + (name == "dma_sap")) // 2 else None
                if left is None: assert os.waitpid(child, 0)[1] == 0; break
                until = time.perf_counter() + left
                while (alive := os.waitpid(child, os.WNOHANG) == (0, 0)) and time.perf_counter() < until: time.sleep(0.001)
                if not alive: break
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                made += 1
                moments.append(round(left / seconds, 2))
            checkpoint, about = result(folder)
            half = [str(p) for p in (folder / "state").glob("*")]
            done.append(dict(method=name, attempts=attempts, killed_at=moments, resumed=about["resumed"], same=checkpoint == want[0], history=about["history"] == want[1]["history"], left=half))
    print(json.dumps(done))
"""


def test_killed_at_any_moment(tmp_path):
    "With a cache and without features to keep; half of the kills each."
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CHILD), str(tmp_path), str(KILLS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120 + 60 * KILLS,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    trainings = json.loads(run.stdout.splitlines()[-1])
    for t in trainings:
        print(t)
    kills = sum(len(t["killed_at"]) for t in trainings)
    print(
        f"{kills} kills in {len(trainings)} trainings: {sum(t['same'] and t['history'] for t in trainings)} ended with"
        f" the bits of the undisturbed one, {sum(t['resumed'] > 0 for t in trainings)} after going on from a state"
    )
    assert kills >= KILLS and all(t["same"] and t["history"] and not t["left"] for t in trainings)
