"Importing and using the package leaves the process as it was: warning filters, environment, torch, numpy, matplotlib, logging, signals, paths, locale and random states."

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

THIRD_PARTIES = (
    "numpy pandas torch matplotlib.pyplot scipy.stats scipy.sparse scipy.ndimage seaborn PIL.Image tqdm.auto yaml"
    " ipywidgets IPython.display safetensors.torch".split()
)  # what they change is theirs

SCRIPT = textwrap.dedent("""
    import importlib, locale, logging, os, pkgutil, random, signal, sys, threading, warnings
    for name in sys.argv[1].split():
        importlib.import_module(name)
    import matplotlib, numpy as np, pandas as pd, torch
    from PIL import Image, ImageFile

    def world():
        umask = os.umask(0)
        os.umask(umask)
        backends = torch.backends
        found = dict(umask=umask, cwd=os.getcwd(), environment=dict(os.environ), path=list(sys.path), locale=locale.setlocale(locale.LC_ALL),
            filters=list(map(str, warnings.filters)), showwarning=warnings.showwarning, excepthook=sys.excepthook, displayhook=sys.displayhook, recursion=sys.getrecursionlimit(),
            streams=(id(sys.stdout), id(sys.stderr)), threads=threading.active_count(), signals={s: str(signal.getsignal(s)) for s in signal.valid_signals()},
            logging=(logging.root.level, len(logging.root.handlers), logging.root.manager.disable),
            torch=(torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                   torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled()),
            backends=(backends.mkldnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
            numpy=(np.geterr(), str(np.get_printoptions())), pandas={k: pd.get_option(k) for k in ("display.max_rows", "display.width", "display.max_columns")},
            matplotlib=(str(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)), pillow=(Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
            random=(random.getstate(), np.random.get_state()[1].tobytes(), torch.random.get_rng_state().numpy().tobytes()))
        return found

    def changed(before, after): return {k: (before[k], after[k]) for k in before if before[k] != after[k]}

    before, count = world(), 0
    import zsad_nb
    for module in pkgutil.walk_packages(zsad_nb.__path__, "zsad_nb."):
        importlib.import_module(module.name)
        now = world()
        if changed(before, now):
            sys.exit(f"importing {module.name} changed {changed(before, now)}")
        count += 1
    from zsad_nb.methods.base import create
    from zsad_nb.inspection.inspector import Inspector
    image = Image.new("RGB", (64, 64), (90, 120, 150))
    for name in ("self_distance", "winclip"):
        method = create(name)
        found = Inspector(method).predict(np.asarray(image))
        now = world()
        if changed(before, now):
            sys.exit(f"{name} changed {changed(before, now)}")
    print(count, "modules")
""")


def test_the_world_is_left_as_it_was(tmp_path):
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_CACHE_DIR", "HF_HUB_OFFLINE")
    } | dict(PYTHONPATH=str(ROOT), MPLBACKEND="Agg")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, " ".join(THIRD_PARTIES)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 90, done.stdout
    assert os.listdir(tmp_path) == []
