"""Each of the five baselines at the size of its release, on one image: does it run, how long, and how much does it learn.

    python tests/benchmarks/full_size_baselines.py                  minutes on an idle core, 6 GB at most
    python tests/benchmarks/full_size_baselines.py --only april_gan anovl
    python tests/benchmarks/full_size_baselines.py --only multiads --frames 2   a few sentences: the first call is shorter, all else as large
    python tests/benchmarks/full_size_baselines.py --small          the embedded tower: seconds

Seeded random weights ("random:0") cost what trained ones cost; what they say means nothing. Four have OpenAI's ViT-L/14-336 at 518 px, AnoVL the ViT-B/16-plus of LAION at 240 px, to which
it resizes the image of 518 px. The first call reads a class's sentences, the second finds them kept: what an image costs. Parameters: those that training moves, beside the count of the
paper or of the released files' layout, where the specification has one.
"""

import argparse
import dataclasses
import time
import warnings

import pandas as pd
import torch

from zsad_nb.data.images import Batch
from zsad_nb.methods.base import create, method_class
from zsad_nb.synthetic.benchmark import render

FIVE = ("adaclip", "april_gan", "anovl", "multiads", "bayes_pfl")
LARGE = dict(clip="clip-vitl14-336", image_size=518)
TOWERS = {"anovl": dict(clip="clip-vitb16-plus-240", image_size=240)}
MORE = {"multiads": dict(types=("crack", "contamination"))}  # as many types as a product has

# Learned values at full size: of each linear layer width times width, and a bias.
TAPS = 4 * (1024 * 768 + 768)
ADACLIP = 4 * 5 * 1024 + 3 * 5 * 768 + 5 * (768 * 1024 + 1024) + 5 * (768 * 768 + 768) + TAPS + 768 * 768 + 768
EXPECTED = {
    "adaclip": (ADACLIP, "layout of the released files: static tokens, heads, linear layers"),
    "april_gan": (TAPS, "specification: 3.15 M"),
    "anovl": (0, "training-free; an adapter of 924 x 640 an image, thrown away"),
    "multiads": (TAPS, "specification: adapters 3,148,800"),
}


def settings(name: str, small: bool, frames: int = 0) -> dict:
    "Parameters of a method at the size of its release."
    cls = method_class(name)
    more = dict(MORE.get(name, {}))
    fields = {f.name: f.default for f in dataclasses.fields(cls.Parameters)}
    if frames and "templates" in fields:
        more["templates"] = fields["templates"][:frames]
    if small:
        return dict(clip="tiny-clip", clip_weights="random:0", image_size=64, **more)
    towers = cls.released_towers or TOWERS.get(name, LARGE)
    return dict(**towers, clip_weights="random:0", **more)


def one_image(side: int) -> Batch:
    "A cracked bottle, drawn."
    sample = render("bottle", 5, side, "crack")
    image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float() / 255
    mask = torch.from_numpy(sample.mask)[None, None] > 0
    yes = torch.ones(1, dtype=torch.bool)
    return Batch(image, mask, yes, yes.long(), ["bottle"], ["bottle.png"], yes)


def measure(name: str, small: bool, frames: int = 0) -> dict:
    "One method on one image."
    begun = time.perf_counter()
    torch.manual_seed(0)
    method = create(name, **settings(name, small, frames)).eval()
    built = time.perf_counter() - begun
    batch = one_image(96 if small else 518)
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        said = method.predict(batch)
        seconds.append(time.perf_counter() - begun)
    if tuple(said.map.shape) != tuple(batch.image.shape[:1] + batch.image.shape[2:]) or tuple(said.score.shape) != (1,):
        raise AssertionError(f"{name}: map {tuple(said.map.shape)}, score {tuple(said.score.shape)}")
    if not (said.map.isfinite().all() and said.score.isfinite().all()):
        raise AssertionError(f"{name}: map or score is not finite")
    learned = sum(value.numel() for value in method.learned().values())
    frozen = sum(value.numel() for tower in method.backbones().values() for value in tower.parameters())
    expected, source = EXPECTED.get(name, (None, "no count in the specification"))
    if not small and expected is not None and learned != expected:
        raise AssertionError(f"{name} learns {learned:,} values, {source} gives {expected:,}")
    shapes = dict(map="x".join(map(str, said.map.shape)), score="x".join(map(str, said.score.shape)))
    return dict(
        method=name,
        tower=method.p.clip,
        px=next(iter(method.backbones().values())).size,
        build_s=built,
        first_s=seconds[0],
        image_s=seconds[1],
        **shapes,
        learned=f"{learned:,}",
        expected="" if small or expected is None else f"{expected:,}",
        source=source,
        frozen=f"{frozen:,}",
    )


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    "The table, printed row by row as it is measured."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=FIVE, choices=FIVE)
    parser.add_argument(
        "--frames", type=int, default=0, help="sentence frames, where a method has a list of them (default: all)"
    )
    parser.add_argument("--small", action="store_true", help="the embedded tower: does the script work at all")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.only:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a small text tower has not read every word
            rows.append(measure(name, options.small, options.frames))
        print(
            ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = main()
    print(table.drop(columns="source").round(2).to_string(index=False))
