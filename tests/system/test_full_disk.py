"A disk that is full, read-only or failing, at every kind of write: the error names the file, what was there before stays whole, nothing half-written is left."

import contextlib
import errno
import json
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.core import files as files_module
from zsad_nb.core.files import write_atomically, write_json
from zsad_nb.core.tables import read_table, write_table
from zsad_nb.data.crops import cut_crops
from zsad_nb.data.index import load_index, make_index, save_index, save_split
from zsad_nb.data.meta import read_meta, write_meta
from zsad_nb.data.pixels import load_image
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.metrics import PixelMetrics
from zsad_nb.evaluation.rank_counts import RankCounts
from zsad_nb.explore.maps_store import make_store
from zsad_nb.figures.style import save_figure
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.journal import Journal
from zsad_nb.methods.base import create, load, save
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.runs.run import Spec, run
from zsad_nb.runs.shards import evaluate_shards
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import Recipe, fit


@contextlib.contextmanager
def full_disk(size: int = 40):
    "No file grows beyond so many bytes: the kernel refuses, as it does on a full disk (EFBIG in the place of ENOSPC), whoever writes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Four photographs of 64 pixels, two of them defective, and their Index."
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for k in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), "uint8")).save(root / f"{k}.png")
        mask = np.zeros((64, 64), "uint8")
        mask[8:20, 8:20] = 255
        if k > 1:
            Image.fromarray(mask).save(root / f"{k}_mask.png")
        rows.append(
            dict(
                category="nut",
                split="test",
                image=f"{k}.png",
                mask=f"{k}_mask.png" if k > 1 else "",
                anomalous=k > 1,
                defect="dent" if k > 1 else "good",
            )
        )
    return make_index(rows, root, "own")


@pytest.fixture(scope="module")
def method():
    return create("self_distance", image_size=64)


@pytest.fixture(scope="module")
def evaluation(method, images):
    return evaluate(method, images, size=64, progress=False, workers=0)


def pixels_of(seed):
    rng = np.random.default_rng(seed)
    metrics = PixelMetrics()
    metrics.update(rng.random((2, 16, 16)).astype("float32"), rng.random((2, 16, 16)) < 0.2, np.ones(2, bool))
    return metrics


def figure_of(k):
    figure = Figure()
    figure.subplots().plot([0, k])
    return figure


def save_trained(path, k):
    made = create("april_gan", clip_weights="random:0", image_size=64)
    with torch.no_grad():
        next(iter(made.learned().values())).fill_(k)
    save(made, path)


WRITERS = {  # name of the file -> write(path, version)
    "table.csv": lambda p, k: write_table(pd.DataFrame(dict(a=["text"] * 9, b=[k] * 9)), p),
    "table.parquet": lambda p, k: write_table(pd.DataFrame(dict(a=["text"] * 9, b=[k] * 9)), p),
    "value.json": lambda p, k: write_json(p, dict(text="word " * 9, k=k)),
    "bytes.bin": lambda p, k: write_atomically(p, lambda part: part.write_bytes(bytes([k]) * 99)),
    "tensors.pt": lambda p, k: write_atomically(p, lambda part: torch.save(torch.full((99,), k), part)),
    "array.npz": lambda p, k: write_atomically(p, lambda part: np.savez(open(part, "wb"), a=np.full(99, k))),
    "picture.png": lambda p, k: write_atomically(
        p,
        lambda part: Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 32, 3), "uint8")).save(part, "PNG"),
    ),
    "pixels.state": lambda p, k: pixels_of(k).save(p),
    "checkpoint.safetensors": save_trained,
}


def check_write(write, path: Path, fails):
    "The first version is written, the second one fails: the first is still there, alone."
    write(path, 1)
    before = contents(path.parent)
    assert path.name in before
    with fails, pytest.raises(OSError, match=rf"{path.name} was not written \("):
        write(path, 2)
    assert contents(path.parent) == before
    write(path, 2)
    assert contents(path.parent).keys() == before.keys() and contents(path.parent) != before


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk(name, tmp_path):
    check_write(WRITERS[name], tmp_path / "out" / name, full_disk())


@contextlib.contextmanager
def failing(call: str, code: int):
    "A call of the system that fails for files in the package's hands."
    with pytest.MonkeyPatch.context() as patch:

        def fail(*args, **kwargs):
            raise OSError(code, os.strerror(code))

        patch.setattr(files_module.os, call, fail)
        yield


@pytest.mark.parametrize(
    "call, code",
    [
        ("replace", errno.EXDEV),
        ("replace", errno.EACCES),
        ("replace", errno.EBUSY),
        ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC),
        ("open", errno.EROFS),
        ("open", errno.EMFILE),
    ],
)
@pytest.mark.parametrize("name", ["table.csv", "value.json", "picture.png"])
def test_a_rename_or_flush_that_fails(name, call, code, tmp_path):
    check_write(WRITERS[name], tmp_path / "out" / name, failing(call, code))


@pytest.mark.parametrize("name", ["table.csv", "value.json", "checkpoint.safetensors"])
def test_a_folder_that_is_forbidden(name, tmp_path, permissions_hold):
    path = tmp_path / "out" / name
    WRITERS[name](path, 1)
    before = contents(tmp_path)
    path.parent.chmod(0o500)
    with pytest.raises(PermissionError, match=rf"{name} was not written \(Permission denied\)"):
        WRITERS[name](path, 2)
    path.parent.chmod(0o700)
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------------- results of several files


def test_evaluation(evaluation, tmp_path):
    evaluation.save(tmp_path / "out")
    before = contents(tmp_path)
    with full_disk(), pytest.raises(OSError, match=r"\.csv was not written"):
        evaluation.save(tmp_path / "out")
    assert contents(tmp_path) == before


def test_figures(tmp_path):
    save_figure(figure_of(1), tmp_path / "plot", 60)
    before = contents(tmp_path)
    with full_disk(), pytest.raises(OSError, match="plot.* was not written"):
        save_figure(figure_of(2), tmp_path / "plot", 60)
    assert contents(tmp_path) == before and len(before) == 2


def test_crops(images, tmp_path):
    "A folder of crops is made whole or stays as it was, also where the last rename fails."
    kept = cut_crops(images, tmp_path / "out", 16)
    before = contents(tmp_path)
    with (
        full_disk(),
        pytest.raises(OSError, match=r"out was not made \(File too large\); what was there before is unchanged"),
    ):
        cut_crops(images, tmp_path / "out", 12, overwrite=True)
    assert contents(tmp_path) == before

    def fails(path, target):
        if Path(path).name.endswith(".part"):
            raise OSError(errno.EACCES, "no")
        return rename(path, target)

    rename = os.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", fails)
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError):
            cut_crops(images, tmp_path / "out", 12, overwrite=True)
    assert contents(tmp_path) == before and len(load_index(tmp_path / "out" / "index.csv")) == len(kept)
    assert len(cut_crops(images, tmp_path / "out", 12, overwrite=True)) and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["out"]


def test_synthetic_set(tmp_path):
    "A set that could not be drawn is named, and drawn whole the next time."
    with full_disk(2000), pytest.raises(OSError, match=r"\.png was not written \(File too large\)"):
        synthetic_index(tmp_path / "set", "target", 32, normal=1, defective=1)
    index = synthetic_index(tmp_path / "set", "target", 32, normal=1, defective=1)
    for row in index.itertuples():
        load_image(tmp_path / "set" / row.image)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.tmp"))


def test_index_and_split_and_meta(images, tmp_path):
    "The lists of a data set survive a second writing that fails."
    for write, read, name in (
        (save_index, load_index, "index.csv"),
        (save_split, lambda p: read_table(p), "split.csv"),
        (write_meta, lambda p: read_meta(p, root=images.attrs["root"]), "meta.json"),
    ):
        path = tmp_path / name
        write(images, path)
        before = contents(tmp_path)
        with full_disk(), pytest.raises(OSError):
            write(images.iloc[:3], path)
        assert contents(tmp_path) == before, name
        assert len(read(path)) == 4


def test_inspection_goes_on(method, images, tmp_path):
    "What was looked at before the disk was full is not looked at again."
    what = [str(Path(images.attrs["root"]) / name) for name in images["image"]]
    out = tmp_path / "out"
    inspector = Inspector(method)
    inspector.predict(what[:2], out=out, pictures="none", progress=False)
    grown = (out / "journal.sqlite").stat().st_size
    with full_disk(grown + 10), pytest.raises(OSError, match="results.csv|settings.json|journal.sqlite"):
        inspector.predict(what, out=out, pictures="none", progress=False)
    table = inspector.predict(what, out=out, pictures="none", progress=False)
    assert len(table) == 4 and table["decision"].ne("error").all() and not list(out.rglob(".*.tmp"))
    with (
        full_disk(grown // 2),
        pytest.raises(OSError, match=r"\.png was not written|results.csv|settings.json|journal.sqlite"),
    ):
        Inspector(method).predict(what, out=tmp_path / "pictures", progress=False)


def test_journal(tmp_path):
    journal = Journal(tmp_path / "a.sqlite", ["name", "score"])
    journal.append(dict(name="a", score=1.0))
    with (
        full_disk((tmp_path / "a.sqlite").stat().st_size + 5),
        pytest.raises(OSError, match=r"a row was not written to .*a.sqlite .*; 1 rows are kept"),
    ):
        journal.append(dict(name="b" * 5000, score=2.0))
    assert [r["name"] for r in Journal(tmp_path / "a.sqlite", ["name", "score"]).rows] == ["a"]


def test_feature_cache_is_no_reason_to_stop(images, tmp_path, monkeypatch):
    "Features that cannot be kept are computed again, with the same numbers."
    method = create("april_gan", clip_weights="random:0", image_size=64)
    plain = evaluate(method, images, size=64, progress=False, workers=0, cache=FeatureCache(tmp_path / "whole"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.warns(UserWarning, match="features"):
        kept = evaluate(method, images, size=64, progress=False, workers=0, cache=FeatureCache(tmp_path / "cache"))
    assert kept.per_image["score"].tolist() == plain.per_image["score"].tolist()


def test_spilled_scores(tmp_path):
    counts = RankCounts(str(tmp_path), 0, 1024)
    with (
        full_disk(100),
        pytest.raises(
            OSError,
            match=r"spilling scores to .* failed after 0 MB: File too large; free space there, pass spill=FOLDER",
        ),
    ):
        counts.add(np.random.default_rng(0).random(5000).astype("float32"))


def test_store_of_maps(method, images, tmp_path):
    "Maps that could not be written are computed the next time; a row says done only where its map is there."
    store = make_store(method, images, tmp_path / "maps", size=64)
    with full_disk(2000), pytest.raises(OSError):
        store.compute(progress=False)
    assert not any(store.rows["state"] == 1)
    store.compute(progress=False)
    assert (store.rows["state"] == 1).all()


def test_a_run_says_that_the_disk_was_full(tmp_path):
    "A run's record and result; the next call runs it."
    notebook = tmp_path / "note.ipynb"
    cells = [
        dict(
            cell_type="code",
            id="aaaaaaaa",
            metadata=dict(tags=["parameters"]),
            source="output: str = ''\nk: int = 1\n",
            outputs=[],
            execution_count=None,
        )
    ]
    notebook.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    with full_disk(200):
        with contextlib.suppress(OSError):
            found = run(Spec(notebook, {}), tmp_path / "runs")
            assert not found.ok and found.kind in ("disk", "error") and found.error
    assert not any(p.name == "result.json" for p in (tmp_path / "runs").rglob("*"))


def test_checkpoint_stays_readable(tmp_path):
    path = tmp_path / "a.safetensors"
    save_trained(path, 1)
    with full_disk(500), pytest.raises(OSError):
        save_trained(path, 2)
    assert read_header(path)["method"] == "april_gan"
    first = next(iter(load(path).learned().values()))
    assert (first == 1).all()


def test_work_for_other_processes(method, images, tmp_path, monkeypatch):
    "What is handed to other processes does not fit: the disk is named, not the method."
    with full_disk(200), pytest.raises(OSError, match=r"evaluation\.pt was not written"):
        evaluate_shards(method, images, shards=2, size=64, folder=tmp_path, progress=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trained = create("april_gan", clip_weights="random:0", image_size=64)
    with full_disk(200), pytest.raises(OSError, match=r"method\.pt was not written"):
        fit(trained, images, Recipe(epochs=1, batch_size=2), size=64, devices=2, progress=False)
    assert not list(tmp_path.iterdir())
