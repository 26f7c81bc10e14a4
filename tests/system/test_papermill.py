"The experiment notebooks as a batch runner uses them: papermill, parameters, files."

import json

import pandas as pd
import papermill
import pytest
from conftest import ROOT
from safetensors import safe_open

from zsad_nb.methods.checkpoint_files import read_header

EXPERIMENTS = ROOT / "nbs" / "experiments"


def run(name, out, **parameters):
    return papermill.execute_notebook(
        EXPERIMENTS / f"{name}.ipynb",
        out / f"{name}.ipynb",
        parameters,
        cwd=str(out),
        progress_bar=False,
        kernel_name="python3",
    )


pytestmark = pytest.mark.usefixtures("own_kernel")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    run("train", out, images=2, size=64, epochs=2, seed=3, weights="random:0", output=str(out))
    return out


def test_train_leaves_a_checkpoint_and_its_history(trained):
    result = json.loads((trained / "result.json").read_text())
    history = pd.read_csv(trained / "history.csv")
    assert (
        result["seed"] == 3 and result["steps"] == len(history) == 2 * 8
    )  # fifteen categories, two normal and two defective images each, batch 8
    assert len(result["trained_on"]) == 15 and all(c.startswith("synthetic-2-auxiliary/") for c in result["trained_on"])
    with safe_open(trained / "checkpoint.safetensors", "pt") as file:
        assert "tokens" in file.keys()


def test_injected_parameters_win(trained):
    "Without the tag papermill injects at the top and the defaults below win, silently."
    cells = json.loads((trained / "train.ipynb").read_text())["cells"]
    tags = [c["metadata"].get("tags", []) for c in cells]
    injected = next(i for i, t in enumerate(tags) if "injected-parameters" in t)
    assert "parameters" in tags[injected - 1]


def test_same_seed_same_checkpoint(trained, tmp_path):
    run("train", tmp_path, images=2, size=64, epochs=2, seed=3, weights="random:0", output=str(tmp_path))
    columns = ["total", "cls", "ctr", "focal", "dice"]
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "history.csv")[columns], pd.read_csv(trained / "history.csv")[columns], rtol=0, atol=0
    )
    assert (tmp_path / "checkpoint.safetensors").read_bytes()[-4096:] == (
        trained / "checkpoint.safetensors"
    ).read_bytes()[-4096:]


def test_evaluate_writes_tables_and_figures(trained, tmp_path):
    run(
        "evaluate",
        tmp_path,
        checkpoint=str(trained / "checkpoint.safetensors"),
        images=2,
        figures=True,
        output=str(tmp_path),
    )
    metrics = pd.read_csv(tmp_path / "metrics.csv", index_col=0)
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert list(metrics.index)[-1] == "mean" and len(metrics) == 13 and len(scores) == 12 * 4
    for column in (
        "image_auroc",
        "image_ap",
        "image_f1max",
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1max",
        "pixel_aupro",
        "pixel_aupro_200",
    ):
        assert metrics[column].between(0, 1).all(), column
        assert metrics.loc["mean", column] == pytest.approx(metrics[column].iloc[:-1].mean(), abs=1e-12)
    figures = {p.stem for p in (tmp_path / "figures").glob("*.png")}
    assert figures == {"overview"} | set(metrics.index[:-1])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seen"] == [] and len(result["trained_on"]) == 15
    assert (
        result["size"],
        result["seed"],
        result["epochs"],
        result["lr_scale"],
        result["engine"],
        result["precision"],
        result["options"],
    ) == (64, 3, 2, 1.0, "torch", "fp32", {}), "not the checkpoint's"
    assert (
        result["values"]["weights"] == "random:0"
        and result["fitted"]["size"] == 64
        and (tmp_path / "pixels.npz").is_file()
    )


def test_a_released_file_must_say_what_it_was_trained_on(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="does not say what it was trained on"):
        run("evaluate", tmp_path, released="CLIP.pth", size=64, output=str(tmp_path))


def test_what_was_trained_on_is_marked(trained, tmp_path):
    seen = dict(
        checkpoint=str(trained / "checkpoint.safetensors"),
        data="synthetic-2-auxiliary",
        images=1,
        size=64,
        output=str(tmp_path),
    )
    with pytest.raises(Exception, match="would not be zero-shot; evaluate on another data set, or pass allow_seen"):
        run("evaluate", tmp_path, **seen)
    assert not (tmp_path / "result.json").exists()
    run("evaluate", tmp_path, **seen, allow_seen=["synthetic-2-auxiliary"])
    assert len(json.loads((tmp_path / "result.json").read_text())["seen"]) == 15


def test_a_failing_notebook_fails_and_leaves_no_result(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="unknown backbone"):
        run("train", tmp_path, backbone="clip-vitl15", output=str(tmp_path))
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.real
def test_real_images_in_small(shared, tmp_path):
    run(
        "real_images",
        tmp_path,
        data=str(shared / "data"),
        weights=str(shared / "weights"),
        quick=True,
        output=str(tmp_path),
    )
    runs = pd.read_csv(tmp_path / "real_images.csv")
    assert set(runs["target"]) == {"road", "board", "steel"}
    assert set(runs["method"]) == {"VisualAD", "VisualAD, untrained", "self_distance (no training)"}
    assert (
        runs["pixel_auroc"].between(0, 100).all()
        and (tmp_path / "figures" / "road" / "overview.png").stat().st_size > 10_000
    )


def test_an_epoch_chosen_on_a_held_out_part(trained, tmp_path):
    "Recorded in the run and in the checkpoint; the default says nothing of it; the log says how it went."
    small = dict(images=2, size=64, epochs=2, seed=3, weights="random:0")
    run("train", tmp_path, held_out=0.5, patience=1, chosen_by="image_auroc", **small, output=str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    before = json.loads((trained / "result.json").read_text())
    chosen = result["chosen"]
    best = max(chosen["judged"])
    assert chosen["epoch"] == chosen["judged"].index(best) + 1 and chosen["images"] == 15 * 2
    assert (chosen["by"], chosen["held_out"], chosen["patience"]) == ("image_auroc", 0.5, 1)
    assert "chosen" not in before and result["fingerprint"] == before["fingerprint"], "the same auxiliary set"
    assert read_header(tmp_path / "checkpoint.safetensors")["fitted"]["chosen"] == chosen
    assert "chosen" not in read_header(trained / "checkpoint.safetensors")["fitted"]
    lines = (tmp_path / "progress.log").read_text().splitlines()
    assert sum("epoch " in line for line in lines) == len(chosen["judged"]) and lines[-1].endswith("fit is done")
