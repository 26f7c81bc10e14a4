"The gallery page: one row a tutorial and experiment, with a picture out of it: `python tests/benchmarks/make_gallery.py` (`--run NAME ...` executes notebooks first, for their seconds and for the pictures of those that keep none)."

import argparse
import base64
import io
import json
import os
import resource
import sys
import time
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parents[2]
OUT = ROOT / "paper_figures" / "gallery"
ROOM = ROOT / "runs" / "gallery"
WIDTH = 640
HEIGHT = 400
SHOWN = 320  # pixels on the page
ROWS = {  # notebook -> what you learn; where the picture is from: the number of a picture in the notebook (kept, or executed in runs/gallery) or in another one, a file or a part of it, a table, a drawing
    "tutorials/quickstart": ("from nothing to a heatmap of a defect in a category the model never saw", 0),
    "tutorials/your_own_images": (
        (
            "from a folder and no labels to decisions: a threshold from good images, its false alarms, regions, files"
            " that are no pictures"
        ),
        5,
    ),
    "tutorials/from_no_good_image": (
        "what a method's own image and one to sixteen good images add, a threshold from them, and the curve on real images",
        1,
    ),
    "tutorials/explore_heatmaps": (
        (
            "where methods see defects: thumbnails, sliders, pixels, types, one method wiped over another, pictures"
            " with the code that draws them"
        ),
        "widgets/explorer.png",
    ),
    "tutorials/which_defect": (
        "DAPO: defective or not, where, and which defect it is; asked about words of your own",
        3,
    ),
    "tutorials/inside_dma_sap": (
        "DMA+SAP part by part: whom a patch listens to, what the text adds, where the score comes from",
        2,
    ),
    "tutorials/inside_ssvp": (
        "SSVP part by part: what each level becomes, whom the gates believe, what an image does to its own prompts",
        2,
    ),
    "tutorials/from_equation_to_code": (
        "seven equations of SSVP, written down as they are printed, and found again in the package",
        1,
    ),
    "tutorials/your_own_method": (
        "a small method in a file of your own, beside another one in a sweep's table",
        0,
    ),
    "tutorials/a_sweep": (
        "from a YAML file to a table with seeds and published numbers; stopped and continued",
        0,
    ),
    "tutorials/on_a_cluster": (
        "one evaluation in shards, a sweep on many machines, and what happens when a worker dies",
        0,
    ),
    "tutorials/real_weights_and_data": (
        "what to download for the papers' numbers: towers, data sets, licences, expected values",
        0,
    ),
    "tutorials/glossary": ("the words that the notebooks use, and the way from a file to a heatmap", 0),
    "experiments/train": (
        "train a method on an auxiliary set: a checkpoint and its losses",
        ("visualad_synthetic.png", (115, 235, 815, 590)),
    ),
    "experiments/evaluate": (
        "evaluate a checkpoint on a target set: metrics a category, scores an image, best, median and worst cases",
        ("visualad_synthetic.png", (935, 235, 1638, 590)),
    ),
    "experiments/ablation": (
        "which step of a method's ablation table shows, under several seeds",
        "tables/ssvp_ablation.csv",
    ),
    "experiments/qualitative": ("the same images through two methods, chosen before anybody has seen a map", -1),
    "experiments/defect_types": (
        "DAPO beside MultiADS, on defect types that training saw and on others",
        ("tutorials/which_defect", 7),
    ),
    "experiments/tables": (
        "from a folder of evaluations to the papers' tables and charts",
        "tables/visualad_synthetic.csv",
    ),
    "experiments/benchmark": (
        (
            "methods on the second version of the drawn benchmark: how sure their differences are, and whether their"
            " order is that of real data"
        ),
        0,
    ),
    "experiments/inspect": (
        "a report on your own photographs: worst and borderline cases, scores, drift; `zsad predict --report` makes it",
        "widgets/report.png",
    ),
    "experiments/shipped_checkpoint": (
        "how the checkpoint of the package was trained, and what it is worth on photographs",
        ("visualad_synthetic.png", (935, 235, 1638, 590)),
    ),
    "experiments/pretrain_tiny": (
        "how the embedded image tower was taught, on drawn things that occur in no benchmark set",
        [None],
    ),
    "experiments/pretrain_tiny_clip": (
        "how the embedded image-text pair was taught, with captions that name material, pattern, object and defect",
        [None, "scratch", "hole", "stain", "crack"],
    ),
    "experiments/real_images": (
        "VisualAD on steel, roads and boards with a real small ViT; needs the images and the weights",
        "tables/visualad_real.csv",
    ),
    "experiments/evidence": (
        "from no good image to sixteen: method, its own image and good images, alone and by the rule; needs the images"
        " and the weights",
        ("components/14_evidence", 0),
    ),
    "experiments/neu_seg": (
        "which defect is it, on real steel; needs the images and the weights",
        "tables/neu_seg.csv",
    ),
}


SMALL = {  # the defaults of these are the papers'
    "experiments/train": dict(size=64, epochs=1),
    "experiments/evaluate": dict(size=64),
    "experiments/ablation": dict(size=64, epochs=1),
    "experiments/qualitative": dict(size=64),
}


def execute(name: str) -> float:  # seconds of processor time
    "Run a notebook with its default parameters, or small ones where those are the papers', on one thread."
    import papermill

    os.environ.update(
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        OMP_NUM_THREADS="1",
        TQDM_DISABLE="1",
    )
    out = ROOM / name
    out.mkdir(parents=True, exist_ok=True)

    def used():
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    before = used()
    start = time.time()
    papermill.execute_notebook(
        ROOT / "nbs" / f"{name}.ipynb",
        ROOM / f"{name}.ipynb",
        SMALL.get(name),
        cwd=str(out),
        progress_bar=False,
        kernel_name="python3",
    )
    print(f"{name}: {used() - before:.0f} s of processor time, {time.time() - start:.0f} s on the clock", flush=True)
    return used() - before


def pictures(path: Path) -> list[bytes]:
    "Of a notebook's outputs, in order."
    if not path.is_file():
        return []
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    return [
        base64.b64decode(o["data"][kind])
        for o in outputs
        for kind in ("image/png", "image/jpeg")
        if kind in o.get("data", {})
    ]


def bars(table: Path) -> bytes:
    "A table's methods or variants as bars."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    t = pd.read_csv(table)
    if "pixel AUROC" in t:
        found = t.groupby("method")[["image AUROC", "pixel AUROC", "AUPRO"]].mean()
    elif "target" in t:
        found = t[~t["target"].str.contains("whole")].groupby(["target", "method"])["pixel_auroc"].mean().unstack(0)
    else:
        found = 100 * t.groupby(["variant" if "variant" in t else "method", "stage"])[
            "pixel_auroc" if "variant" in t else "whole_pixel_auroc"
        ].mean().unstack(1)
    fig, ax = plt.subplots(figsize=(4.8, 3), layout="constrained")
    found.plot.barh(ax=ax, width=0.8, color=["#0072b2", "#e69f00", "#009e73", "#cc79a7"][: found.shape[1]])
    ax.set(xlabel="%" if "pixel AUROC" in t else "pixel AUROC, %", ylabel="", xlim=(0, 100))
    ax.invert_yaxis()
    ax.legend(title="", frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))
    ax.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    fig.savefig(out, dpi=130)
    plt.close(fig)
    return out.getvalue()


def drawn(kinds: list) -> bytes:
    "What the embedded towers were taught on."
    from zsad_nb.synthetic.benchmark import render
    from zsad_nb.synthetic.versions import categories

    page = Image.new("RGB", (5 * 64, 3 * 64), "white")
    out = io.BytesIO()
    names = categories("pretrain")
    for i in range(15):
        page.paste(
            Image.fromarray(render(names[i % len(names)], 10_000 + i, 256, kinds[i % len(kinds)]).image).resize(
                (62, 62), Image.Resampling.LANCZOS
            ),
            (64 * (i % 5) + 1, 64 * (i // 5) + 1),
        )
    page.save(out, "PNG")
    return out.getvalue()


def thumbnail(data: bytes, path: Path):
    "At most WIDTH x HEIGHT on white."
    picture = ImageOps.contain(Image.open(io.BytesIO(data)).convert("RGB"), (WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    page.paste(picture, ((WIDTH - picture.width) // 2, (HEIGHT - picture.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=85, optimize=True)


def picture_of(name: str) -> bytes | None:
    source = ROWS[name][1]
    if isinstance(source, list):
        return drawn(source)
    if isinstance(source, tuple) and not isinstance(source[1], int):
        out = io.BytesIO()
        Image.open(OUT.parent / source[0]).crop(source[1]).save(out, "PNG")
        return out.getvalue()
    if isinstance(source, tuple):
        return pictures(ROOT / "nbs" / f"{source[0]}.ipynb")[source[1]]
    if isinstance(source, str):
        return bars(OUT.parent / source) if source.endswith(".csv") else (OUT.parent / source).read_bytes()
    found = pictures(ROOT / "nbs" / f"{name}.ipynb") or pictures(ROOM / f"{name}.ipynb")
    return found[source] if found else None


def said(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument(
        "--run",
        nargs="*",
        default=[],
        help="notebooks to execute, such as tutorials/quickstart; all: every one that needs no data",
    )
    p.add_argument("--keep", action="store_true", help="make only the pictures that are not there")
    args = p.parse_args()
    times = OUT / "seconds.json"
    known = json.loads(times.read_text()) if times.is_file() else {}
    OUT.mkdir(parents=True, exist_ok=True)
    for name in (
        [n for n, (_, source) in ROWS.items() if not str(source).endswith(".csv")] if args.run == ["all"] else args.run
    ):
        known[name] = round(execute(name), 1)
        times.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    lines = [
        "# Gallery",
        "",
        (
            "What the notebooks show, with a picture out of each. Time: processor seconds of one core with the default"
            " parameters, the start of Python included (–: not measured). All images are synthetic unless said otherwise,"
            " all towers tiny: the pictures show what a notebook does, not how good a method is."
        ),
        "",
        "Made by `python tests/benchmarks/make_gallery.py`.",
    ]
    for room, title in (
        ("tutorials", "Tutorials: read them in this order"),
        ("experiments", "Experiments: typed parameters, for papermill and `zsad sweep`"),
    ):
        lines += ["", f"## {title}", "", "| | you learn | time |", "|---|---|---|"]
        for name, (learn, _) in ROWS.items():
            if not name.startswith(room):
                continue
            file = f"gallery/{Path(name).name}.jpg"
            link = f"../nbs/{name}.ipynb"
            heading = Path(name).name.replace("_", " ")
            if not (args.keep and (OUT.parent / file).is_file()) and (picture := picture_of(name)):
                thumbnail(picture, OUT.parent / file)
            shown = (
                f'<a href="{link}"><img src="{file}" width="{SHOWN}" alt="{heading}"></a>'
                if (OUT.parent / file).is_file()
                else ""
            )
            lines.append(f"| {shown} | **[{heading}]({link})**: {learn} | {said(known.get(name))} |")
    (OUT.parent / "gallery.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
