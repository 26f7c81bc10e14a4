"""What the feature cache saves: the first epoch (cold), the second (warm) and the same two without a cache, side by side, and what it does to the loss.

    python tests/benchmarks/bench_cache.py                       # ViT-B/16 at 384 px on eight images (random weights): four CPU minutes
    python tests/benchmarks/bench_cache.py --sizes small         # the embedded pair at 256 px: a minute
    python tests/benchmarks/bench_cache.py --sizes large         # ViT-L/14 at 518 px on two images: ten CPU minutes, 8 GB
    python tests/benchmarks/bench_cache.py --methods ssvp --images 1 --profile

middle: CLIP ViT-B/16 with DINOv2 ViT-S/14-reg (DMA+SAP) and with DINOv3 ViT-B/16 (SSVP), as the papers' towers one size smaller; large, the papers' own: CLIP ViT-L/14@336 at 518 px with
DINOv2 ViT-B/14-reg at 518 and with DINOv3 ViT-L/16 at 592. How long a tower takes does not depend on its weights, so they are random. Every case runs in a process of its own, so that its memory can be read.
CPU seconds are printed beside wall-clock seconds: on a busy machine only they can be compared. Not collected by pytest.
"""

import argparse
import json
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

LARGE = {
    "dma_sap": dict(clip="clip-vitl14-336", clip_weights="random:0", dino="dinov2-vitb14-reg", dino_weights="random:0"),
    "ssvp": dict(clip="clip-vitl14-336", clip_weights="random:0", dino="dinov3-vitl16", dino_weights="random:0"),
}
MIDDLE = {
    "dma_sap": dict(clip="clip-vitb16", clip_weights="random:0", dino="dinov2-vits14-reg", dino_weights="random:0"),
    "ssvp": dict(clip="clip-vitb16", clip_weights="random:0", dino="dinov3-vitb16", dino_weights="random:0"),
}
SIZES = dict(
    small=(256, {"dma_sap": {}, "ssvp": {}}, 32, "embedded pair at 256 px"),
    middle=(384, MIDDLE, 8, "ViT-B/16 at 384 px"),
    large=(518, LARGE, 2, "ViT-L/14 at 518 px"),
)
TARGET, LIMIT, SAME = (
    10.0,
    8e9,
    1e-3,
)  # wanted where towers dominate: second epoch against the first; bytes of the whole process; relative difference of any step's loss


def drawn(folder: Path, size: int, images: int):
    "An index of drawn images of one category, half of them with a defect; like photographs stored in their own size, twice that of the model."
    import numpy as np
    from PIL import Image

    from zsad_nb.data.index import make_index
    from zsad_nb.synthetic.versions import categories

    rows = []
    category = categories("auxiliary")[0]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(images):
        side = 2 * size
        image = np.kron(
            rng.integers(60, 190, (side // 16 + 1,) * 2 + (3,), dtype=np.uint8), np.ones((16, 16, 1), np.uint8)
        )[:side, :side]
        mask = np.zeros((side, side), np.uint8)
        bad = i % 2 == 1
        if bad:
            image[side // 4 : side // 3, side // 4 : side // 2], mask[side // 4 : side // 3, side // 4 : side // 2] = (
                250,
                255,
            )
        Image.fromarray(image).save(folder / f"{i}.png")
        if bad:
            Image.fromarray(mask).save(folder / f"{i}_mask.png")
        rows.append(
            dict(
                dataset="drawn",
                category=category,
                split="test",
                image=f"{i}.png",
                mask=f"{i}_mask.png" if bad else "",
                anomalous=bad,
                defect="spot" if bad else "good",
            )
        )
    return make_index(rows, folder)


def one(method: str, kind: str, images: int, dtype: str, folder: Path, profile: bool) -> dict:
    "Two epochs with a cache that is empty at first, and the same two without: seconds (wall, CPU) and losses of each."
    import torch

    from zsad_nb.backbones.features import FeatureCache
    from zsad_nb.core.settings import seed_everything
    from zsad_nb.methods.base import create
    from zsad_nb.training.fit import fit, recipe_of

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    size = SIZES[kind][0]
    options = SIZES[kind][1][method]
    index = drawn(folder / "images", size, images)
    cache = FeatureCache(folder / "cache", dtype)
    seed_everything(0)
    model = create(method, image_size=size, **options)
    start = {n: p.detach().clone() for n, p in model.learned().items()}
    recipe = recipe_of(method, epochs=1, batch_size=min(8, images))
    out = {}
    for name, use in (("cold", cache), ("warm", cache), ("first", None), ("second", None)):
        if name == "first":
            with torch.no_grad():
                for n, p in model.learned().items():
                    p.copy_(start[n])
        cpu = time.process_time()
        timer = None
        if profile and name == "warm":
            import cProfile

            timer = cProfile.Profile()
            timer.enable()
        history = fit(model, index, recipe, size=size, workers=2, progress=False, cache=use)
        if timer:
            import pstats

            timer.disable()
            pstats.Stats(timer).sort_stats("tottime").print_stats(14)
        epoch = history.attrs["epochs"][0]
        out[name] = dict(
            seconds=epoch["seconds"],
            cpu=time.process_time() - cpu,
            hits=epoch["hits"],
            misses=epoch["misses"],
            loss=history["total"].tolist(),
        )
    entries = len(list(cache.folder.rglob("*.safetensors")))
    return out | dict(
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        megabytes=cache.size() / entries / 1e6,
        images=images,
    )


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--methods", nargs="+", default=["dma_sap", "ssvp"], choices=list(LARGE))
    p.add_argument("--sizes", nargs="+", default=["middle"], choices=list(SIZES))
    p.add_argument("--images", type=int, help="default: 32, 8 and 2")
    p.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    p.add_argument("--profile", action="store_true", help="where the warm epoch's time goes")
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        method, kind, folder = a.one
        print(json.dumps(one(method, kind, a.images or SIZES[kind][2], a.dtype, Path(folder), a.profile)))
        return
    failed = []
    for kind in a.sizes:
        for method in a.methods:
            with tempfile.TemporaryDirectory() as folder:
                again = (
                    [sys.executable, "-W", "ignore", __file__, "--dtype", a.dtype, "--one", method, kind, folder]
                    + ["--profile"] * a.profile
                    + (["--images", str(a.images)] if a.images else [])
                )
                said = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()
            if a.profile:
                print("\n".join(said[:-1]))
            r = json.loads(said[-1])
            for name, text in (
                ("cold", "epoch 1, cold cache"),
                ("warm", "epoch 2, warm cache"),
                ("first", "epoch 1, no cache"),
                ("second", "epoch 2, no cache"),
            ):
                print(
                    f"{method}, {SIZES[kind][3]}, {r['images']} images: {text}: {r[name]['seconds']:.2f} s,"
                    f" {r[name]['cpu']:.2f} CPU s, {r[name]['hits']} hits, {r[name]['misses']} misses"
                )
            ratio = r["cold"]["cpu"] / r["warm"]["cpu"]
            far = max(
                abs(x - y) / abs(y)
                for with_cache, without in (("cold", "first"), ("warm", "second"))
                for x, y in zip(r[with_cache]["loss"], r[without]["loss"], strict=True)
            )
            good = far <= SAME and (kind == "small" or ratio >= TARGET and r["peak"] <= LIMIT)
            print(
                f"{method}, {kind}: second epoch {ratio:.1f} x faster in CPU seconds"
                f" ({r['cold']['seconds'] / r['warm']['seconds']:.1f} x by the clock), loss within {far:.1e} of that"
                f" without a cache, {r['megabytes']:.1f} MB an image on disk, peak memory {r['peak'] / 1e9:.2f} GB:"
                f" {'as wanted' if good else 'NOT as wanted'}",
                flush=True,
            )
            if not good:
                failed.append(f"{method} {kind}")
    print(
        f"wanted: loss within {SAME:g}; middle and large: {TARGET:.0f} x in less than {LIMIT / 1e9:.0f} GB:"
        f" {'not reached by ' + ', '.join(failed) if failed else 'reached'}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
