"The report of `zsad predict`: one page that opens anywhere, made again after a kill; the checkpoint of the package."

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from zsad_nb.cli.commands import main
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.inspection.results import read_results
from zsad_nb.inspection.sources import method_from, shipped_checkpoint
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.synthetic.benchmark import render, synthetic_index

SCRIPT = "import sys; from zsad_nb.cli.commands import main; sys.exit(main(sys.argv[1:]))"


def photographs(folder: Path, count: int, defect: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        image = render("leather", seed + 50 * bool(defect), 96, defect if seed % 2 else None).image
        Image.fromarray(image).save(folder / f"{seed:02}.png")
    return folder


@pytest.mark.slow
def test_a_report_that_was_killed_is_made_again(tmp_path, capsys):
    photos = photographs(tmp_path / "photos", 8, "scratch")
    good = photographs(tmp_path / "good", 5)
    out = tmp_path / "out"
    words = ["predict", str(photos), "--out", str(out), "--model", "self_distance", "-p", "image_size", "96"]
    words += ["--normals", str(good), "--rate", "0.05", "--report"]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stdout=subprocess.DEVNULL)
    end = time.time() + 120
    while time.time() < end and process.poll() is None and not (out / "report" / "run.json").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "report.html").exists()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "8 known before" in said
        and "5 normal images are too few" in said
        and f"report    {out / 'report.html'}" in said
    )
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("The worst", "Close calls", "Scores", "Still like the good ones?", "The table"):
        assert heading in page
    assert "<script" not in page and not re.search(r"(src|href)=.(?!data:|#)[a-z/]", page), "nothing from elsewhere"
    pictures = re.findall("<img [^>]*>", page)
    assert len(pictures) == 6 + 6 + 2 and all("alt=" in picture for picture in pictures)
    assert "require_declared" not in page and "papermill" not in page
    result = json.loads((out / "report" / "result.json").read_text())
    assert result["summary"]["known_before"] == 8 and len(result["drift"]) == 3


def test_the_checkpoint_of_the_package(tmp_path, capsys):
    "Small, on the embedded tower, with a card that names that tower; it tells defects of unseen categories."
    header = read_header(shipped_checkpoint())
    card = shipped_checkpoint().with_suffix(".md").read_text(encoding="utf-8")
    tower = header["backbones"]["backbone"]
    assert tower["name"] == "tiny-dino" and f"`{tower['hash']}`" in card and "Apache-2.0" in card
    assert shipped_checkpoint().stat().st_size < 2.5e6 and {t.split("/")[0] for t in header["trained_on"]} == {
        "synthetic-auxiliary"
    }
    measured = pd.read_csv(ROOT / "paper_figures" / "tables" / "visualad_tiny.csv")
    for row in measured.dropna().to_dict("records"):
        numbers = " / ".join(f"{row[name]:.1f}" for name in ("image AUROC", "pixel AUROC", "AUPRO"))
        assert numbers in card, row
    target = synthetic_index(tmp_path / "set", "target", 320, normal=2, defective=2)
    found = evaluate(method_from("shipped", evidence="preferred"), target, progress=False).mean
    assert found["image_auroc"] > 0.8 and found["pixel_auroc"] > 0.8
    photos = str(tmp_path / "set" / "gear" / "test" / "good")
    assert main(["predict", photos, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "judged by visualad and the image itself" in said and "A real tower sees far more" in said
    assert len(read_results(tmp_path / "out")) == 2


@pytest.mark.slow
def test_the_notebook_that_makes_it(tmp_path):
    "In small, without photographs: a checkpoint and its card."
    environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    book = str(ROOT / "nbs" / "experiments" / "shipped_checkpoint.ipynb")
    command = [sys.executable, "-m", "papermill", book, str(tmp_path / "n.ipynb"), "--no-progress-bar"]
    done = subprocess.run([*command, "-p", "output", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = read_header(tmp_path / "visualad_tiny.safetensors")
    shipped = read_header(shipped_checkpoint())
    assert {n: t["dtype"] for n, t in made["tensors"].items()} == {n: t["dtype"] for n, t in shipped["tensors"].items()}
    assert "Not measured" in (tmp_path / "visualad_tiny.md").read_text(encoding="utf-8")
