"Screenshots of the widgets at work, in paper_figures/widgets: `python tests/benchmarks/shoot_widgets.py` (trains two small methods once, in runs/widgets; needs Chromium, playwright and JupyterLab)."

import argparse
import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.cluster import MiniBatchKMeans

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "browser"))
from test_browser import CHROMIUM, Hand, expect, page_of, run_all, serving, sync_api

from zsad_nb.core.settings import seed_everything
from zsad_nb.methods.base import create, save
from zsad_nb.synthetic.benchmark import render
from zsad_nb.synthetic.datasets import load_dataset
from zsad_nb.training.fit import fit, recipe_of

ROOT = Path(__file__).parents[2]
SIZE = 192
NOTEBOOK = {
    "explorer": (
        """from zsad_nb.synthetic.datasets import load_dataset
from zsad_nb.explore.explorer import HeatmapExplorer

index = load_dataset("synthetic-target", "target", size=SIZE, normal=14, defective=22)
HeatmapExplorer({"VisualAD": "visualad.safetensors", "DAPO": "dapo.safetensors"}, index, progress=False)
"""
    ),
    "evidence": (
        """from zsad_nb.explore.explorer import HeatmapExplorer
from zsad_nb.methods.base import load
from zsad_nb.methods.evidence import choose_references, references_of
from zsad_nb.synthetic.datasets import load_dataset

index = load_dataset("synthetic-target", "target", size=SIZE, normal=14, defective=22)
good = choose_references(index, 4, split="")
others = index[~index["image"].isin(good["image"])]
method = load("visualad.safetensors")
method.use_evidence("self", references_of(method, good))
HeatmapExplorer({"VisualAD, with four good images": method}, others, progress=False)
"""
    ),
    "upload": (
        """from zsad_nb.synthetic.datasets import load_dataset
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.explore.upload import Upload

inspector = Inspector.load("dapo.safetensors", category="leather")
normal = load_dataset("synthetic-target", "target", size=SIZE, normal=14, defective=22).query("not anomalous and category == 'leather'")
inspector.calibrate(normal, rate=0.1, progress=False)
Upload(inspector)
"""
    ),
}


def train(room: Path, seed: int = 0):
    "Two small methods, once."
    room.mkdir(parents=True, exist_ok=True)
    auxiliary = load_dataset("synthetic-auxiliary", room / "auxiliary", size=SIZE, normal=4, defective=8)
    for name, changes, recipe in (
        ("visualad", dict(sigma=5.0), dict(epochs=3, lr_scale=8.0)),
        ("dapo", {}, dict(epochs=4, lr_scale=3.0)),
    ):
        if (room / f"{name}.safetensors").is_file():
            continue
        seed_everything(seed)
        method = create(name, image_size=SIZE, **changes)
        if name == "visualad":
            method.use_evidence("self")  # keeps some normal images, to measure its sources on
        fit(method, auxiliary, recipe_of(method, seed=seed, **recipe))
        method.use_evidence("method")
        save(method, room / f"{name}.safetensors")


def notebook(room: Path, name: str):
    cell = dict(
        cell_type="code",
        id="a",
        metadata={},
        execution_count=None,
        outputs=[],
        source=NOTEBOOK[name].replace("SIZE", str(SIZE)),
    )
    (room / "look.ipynb").write_text(
        json.dumps(
            dict(
                cells=[cell],
                metadata=dict(kernelspec=dict(display_name="Python 3", language="python", name="python3")),
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )


def palette(picture: Image.Image, colours: int) -> Image.Image:
    "Colours for a picture of photographs and of small coloured marks: a rare colour counts more than its few pixels."
    found, counts = np.unique(np.asarray(picture).reshape(-1, 3) >> 2, axis=0, return_counts=True)
    means = (
        MiniBatchKMeans(colours, random_state=0, batch_size=4096, n_init=1)
        .fit(found * 4.0 + 2, sample_weight=counts**0.4)
        .cluster_centers_
    )
    out = Image.new("P", (1, 1))
    out.putpalette(np.rint(means).clip(0, 255).astype(np.uint8).ravel().tolist())
    return out


def shoot(widget, path: Path, limit: int = 300_000):
    "A widget's picture in 256 colours, or fewer where that is too large."
    picture = Image.open(io.BytesIO(widget.screenshot())).convert("RGB")
    for colours in (256, 192, 128, 96):
        out = io.BytesIO()
        picture.quantize(palette=palette(picture, colours), dither=Image.Dither.FLOYDSTEINBERG).save(
            out, "PNG", optimize=True
        )
        if out.tell() < limit:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    print(f"{path}  {picture.width} x {picture.height}, {out.tell() / 1000:.0f} kB, {colours} colours")


BRIGHTEST = """frame => {
  const i = frame.querySelector("img:not([hidden])"), c = document.createElement("canvas"), g = c.getContext("2d"); c.width = i.naturalWidth; c.height = i.naturalHeight; g.drawImage(i, 0, 0);
  const d = g.getImageData(0, 0, c.width, c.height).data; let best = 0, at = 0;
  for (let k = 0; k < d.length; k += 4) { const v = d[k] + d[k + 1] + d[k + 2]; if (v > best) { best = v; at = k / 4; } }
  return [(at % c.width + 0.5) / c.width, (Math.floor(at / c.width) + 0.5) / c.height];
}"""


class Photographer(Hand):
    "A hand that waits for the kernel after what it does."

    def __init__(self, page):
        self.page, self.explorer = page, page.locator(".zsad").first
        expect(self.explorer).to_be_visible()

    def idle(self):
        self.page.wait_for_timeout(600)
        self.page.wait_for_selector("#jp-main-statusbar >> text=| Idle")
        self.settled(self.explorer)

    def select(self, label: str, option: str):
        self.explorer.get_by_label(label, exact=True).select_option(label=option)
        self.idle()

    def thumb(self, place: int):
        self.explorer.locator(".thumb").nth(place).click()
        self.idle()

    def touch_brightest(self):
        x, y = self.frame("heatmap").evaluate(BRIGHTEST)
        self.click("heatmap", x, y)
        expect(self.frame("similar places").locator("img:not([hidden])")).to_have_count(1)
        self.idle()
        return x


def shots(browser, room: Path, out: Path, name: str, theme: str, **size):
    "Open the notebook, bring it into the state of a shot, and take it."
    notebook(room, name if name in NOTEBOOK else "explorer")
    shutil.rmtree(room / "own", ignore_errors=True)  # an open side bar would be remembered
    settings = (
        room / "own" / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension" / "themes.jupyterlab-settings"
    )
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(dict(theme=theme)))
    with (
        serving(
            [
                "jupyter",
                "lab",
                "--no-browser",
                "--allow-root",
                "--ip=127.0.0.1",
                "--IdentityProvider.token=",
                "--ServerApp.root_dir=.",
            ],
            room,
            "/api/status",
        ) as url,
        page_of(browser, **size) as page,
    ):
        run_all(page, url)
        page.keyboard.press("Control+b")  # no side bar
        hand = Photographer(page)
        if name == "upload":
            data = io.BytesIO()
            Image.fromarray(render("leather", 901, 480, "contamination").image).save(data, "PNG")
            page.locator("input[type=file]").set_input_files(
                dict(name="from the line.png", mimeType="image/png", buffer=data.getvalue())
            )
            expect(hand.frame("overlay")).to_be_visible()
        else:
            hand.idle()
            if name in ("explorer", "explorer_narrow"):
                hand.select("Method", "DAPO")
            hand.select("Category", "gear" if name == "explorer_dark" else "leather")
            if name == "explorer":
                hand.select("Compare with", "VisualAD")
            hand.thumb(dict(explorer=5, explorer_dark=1, explorer_narrow=3, evidence=5)[name])
            if name == "evidence":
                hand.explorer.get_by_role("button", name="Parts beside each other").click()
                hand.idle()
            x = hand.touch_brightest()
            if name == "explorer":
                hand.slide("Wipe", x)
            if name == "explorer_dark":
                hand.explorer.get_by_role("button", name="Code").click()
        hand.idle()
        page.mouse.move(2, 2)
        shoot(hand.explorer, out / f"{name}.png")


def attach(folder: Path, tutorial: Path = ROOT / "nbs" / "tutorials" / "explore_heatmaps.ipynb"):
    "The screenshots inside the tutorial: a link out of the folder that a server shows would keep a page waiting."
    book = json.loads(tutorial.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        names = re.findall(r"\]\((?:attachment:|[./]*paper_figures/widgets/)([\w.]+\.png)\)", "".join(cell["source"]))
        if cell["cell_type"] != "markdown" or not names:
            continue
        cell["attachments"] = {}
        for name in names:
            with Image.open(folder / name) as picture:
                small = (
                    picture.convert("RGB").resize((960, round(picture.height * 960 / picture.width)), 1).quantize(96)
                )
            data = io.BytesIO()
            small.save(data, "PNG", optimize=True)
            cell["attachments"][name] = {"image/png": base64.b64encode(data.getvalue()).decode()}
        text = "".join(cell["source"])
        text = re.sub(r"\]\((?:[./]*paper_figures/widgets/)([\w.]+\.png)\)", r"](attachment:\1)", text)
        cell["source"] = text.splitlines(keepends=True)
    text = json.dumps(book, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    tutorial.write_text(text, encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=ROOT / "paper_figures" / "widgets")
    p.add_argument("--room", type=Path, default=ROOT / "runs" / "widgets")
    p.add_argument("--only", nargs="*", default=["explorer", "explorer_dark", "explorer_narrow", "evidence", "upload"])
    args = p.parse_args()
    train(args.room)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in args.only:
            shots(
                browser,
                args.room.resolve(),
                args.out,
                name,
                "JupyterLab Dark" if name.endswith("dark") else "JupyterLab Light",
                width=640 if name.endswith("narrow") else 1340,
                height=2600,
            )
        browser.close()
    attach(args.out)


if __name__ == "__main__":
    main()
