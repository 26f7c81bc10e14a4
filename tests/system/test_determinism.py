"Same seed, same numbers: twice in a row, in another process, in batches of 1 and of 8, on 1 and on 2 threads, in any order of the rows."

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import batches
from zsad_nb.data.index import make_index
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods import controls, visualad  # noqa: F401 (registered by their import)
from zsad_nb.methods.base import create, load, save
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import Recipe, fit

TOLERANCE, SIZE = 1e-5, 64
FILES = ("metrics.csv", "scores.csv", "reasons.csv")


def auxiliary(folder: Path) -> pd.DataFrame:
    return synthetic_index(folder / "auxiliary", "auxiliary", SIZE, normal=1, defective=1)


def target(folder: Path) -> pd.DataFrame:
    return synthetic_index(folder / "target", "target", SIZE, normal=2, defective=2)


def job(data: Path, out: Path, seed: int = 3, workers: int = 2):
    "Train, evaluate, write everything: losses.csv, checkpoint.safetensors and the evaluation's files."
    seed_everything(seed)
    method = create("visualad", weights="random:0", image_size=SIZE)
    log = fit(method, auxiliary(data), Recipe(epochs=2, seed=seed, lr_scale=5.0), workers=workers, progress=False).drop(
        columns="seconds"
    )
    out.mkdir(parents=True, exist_ok=True)
    log.to_csv(out / "losses.csv", index=False)
    save(method, out / "checkpoint.safetensors")
    evaluate(method, target(data), workers=workers, progress=False).save(out)
    return method, log


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    auxiliary(folder), target(folder)
    return folder


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    return *job(data, out), out


def same_files(a: Path, b: Path) -> list[str]:
    "Names of the files that differ in any byte."
    return [n for n in (*FILES, "losses.csv", "checkpoint.safetensors") if (a / n).read_bytes() != (b / n).read_bytes()]


def test_twice_in_a_row(data, first, tmp_path):
    torch.rand(17), np.random.rand(3)  # whatever drew before must not matter
    job(data, tmp_path, workers=0)  # nor the threads that read ahead
    assert same_files(first[2], tmp_path) == []


def test_in_another_process(data, first, tmp_path):
    tests = Path(__file__).parent
    root = tests.parents[1]
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); import test_determinism as t; from pathlib"
        f" import Path; t.job(Path({str(data)!r}), Path({str(tmp_path)!r}))"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), str(root), os.environ.get("PYTHONPATH", "")]),
        "PYTHONHASHSEED": "77",
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert same_files(first[2], tmp_path) == []


def test_another_seed_is_another_run(data, first, tmp_path):
    _, log = job(data, tmp_path, seed=4)
    assert not np.allclose(log["total"], first[1]["total"], atol=1e-6)
    assert {"losses.csv", "scores.csv", "metrics.csv"} <= set(same_files(first[2], tmp_path))


def test_recipe_seed_alone_changes_order_and_dropout(data):
    def losses(seed):
        seed_everything(0)
        return fit(
            create("visualad", weights="random:0", image_size=SIZE),
            auxiliary(data),
            Recipe(epochs=1, seed=seed),
            progress=False,
        )["total"].to_numpy()

    assert np.array_equal(losses(1), losses(1)) and not np.allclose(losses(1), losses(2), atol=1e-6)


def test_load_gives_the_same_numbers(data, first, tmp_path):
    with pytest.warns(UserWarning, match="not zero-shot"):
        evaluate(
            load(first[2] / "checkpoint.safetensors"), auxiliary(data), progress=False, allow_seen="synthetic-auxiliary"
        )
    evaluate(load(first[2] / "checkpoint.safetensors"), target(data), progress=False).save(tmp_path)
    assert [n for n in FILES if (tmp_path / n).read_bytes() != (first[2] / n).read_bytes()] == []


# ---------------------------------------------------------------------------------------------------------------- batch size and threads


@pytest.fixture(scope="module", params=["visualad", "self_distance"])
def method(request, first):
    if request.param == "self_distance":
        return create("self_distance", weights="random:0", image_size=SIZE)
    return load(first[2] / "checkpoint.safetensors", ln_post="trained")


def predictions(method, index, batch_size):
    out = [method.predict(batch).cpu() for batch in batches(index, SIZE, batch_size)]
    return torch.cat([p.map for p in out]), torch.cat([p.score for p in out])


def close(a, b):
    "Two evaluations agree: same rows, same reasons, numbers within the tolerance."
    grid = [
        "pixel_aupro_200"
    ]  # jumps by a whole pixel when a score crosses one of 200 fixed thresholds, however little it moves; the exact metrics do not
    pd.testing.assert_frame_equal(
        a.per_class.drop(columns=grid), b.per_class.drop(columns=grid), atol=TOLERANCE, rtol=0
    )
    pd.testing.assert_frame_equal(a.per_class[grid], b.per_class[grid], atol=5e-3, rtol=0)
    pd.testing.assert_frame_equal(a.per_image, b.per_image, atol=TOLERANCE, rtol=0)
    pd.testing.assert_frame_equal(a.reasons, b.reasons)
    assert a.seen == b.seen


def test_batch_size(method, data):
    index = target(data)
    ones = predictions(method, index, 1)
    eights = predictions(method, index, 8)
    for a, b in zip(ones, eights):
        assert a.shape == b.shape and (a - b).abs().max() < TOLERANCE
    assert ones[0].std() > 1e-4, "flat maps agree for the wrong reason"
    close(evaluate(method, index, batch_size=1, progress=False), evaluate(method, index, batch_size=8, progress=False))


def test_company_in_the_batch(method, data):
    "An image's map does not depend on the other images of its batch."
    index = target(data)
    batch = next(iter(batches(index, SIZE, 8)))
    whole = method.predict(batch)
    flipped = method.predict(batch[list(range(7, -1, -1))])
    alone = method.predict(batch[[3]])
    assert (whole.map - flipped.map.flip(0)).abs().max() < TOLERANCE and (
        whole.map[3] - alone.map[0]
    ).abs().max() < TOLERANCE


def some(index: pd.DataFrame, rows: list) -> pd.DataFrame:
    return make_index(index.iloc[rows].to_dict("records"), index.attrs["root"])


@pytest.fixture
def on_threads():
    "Run something with a number of threads; put back what was set."
    before = torch.get_num_threads()

    def run(threads, call):
        torch.set_num_threads(threads)
        return call()

    yield run
    torch.set_num_threads(before)


def test_threads(method, data, on_threads):
    "At 128 px, where the products are large enough to be shared out."
    index = some(target(data), [0, 1, 2, 3])

    def job():
        return (
            evaluate(method, index, size=128, progress=False),
            method.predict(next(iter(batches(index, 128, 4)))).cpu(),
        )

    (one, a), (two, b) = on_threads(1, job), on_threads(2, job)
    close(one, two)
    assert (a.map - b.map).abs().max() < TOLERANCE and (a.score - b.score).abs().max() < TOLERANCE


def test_threads_in_training(data, on_threads):
    index = some(auxiliary(data), list(range(8)))

    def job():
        seed_everything(0)
        method = create("visualad", weights="random:0", image_size=SIZE)
        return fit(method, index, Recipe(epochs=1, batch_size=8), progress=False).iloc[0]

    one = on_threads(1, job)
    two = on_threads(2, job)
    for name in ("total", "cls", "ctr", "focal", "dice"):
        assert abs(one[name] - two[name]) < TOLERANCE, name


# ------------------------------------------------------------------------------------------------------------------------ order of the rows


def test_order_of_the_rows(method, data):
    index = target(data)
    shuffled = index.sample(frac=1, random_state=5)
    reset = make_index(shuffled.to_dict("records"), index.attrs["root"])
    shuffled.attrs = dict(index.attrs)
    plain = evaluate(method, index, progress=False)
    for other, labels in ((shuffled, index), (reset, reset)):
        found = evaluate(method, other, progress=False)
        assert plain.per_class.equals(found.per_class), (
            "rows are evaluated in the order of their names, whatever their order in the table"
        )
        a = plain.per_image.set_index("image")
        b = found.per_image.set_index("image")
        pd.testing.assert_frame_equal(
            a.drop(columns="position"), b.drop(columns="position").loc[a.index], atol=TOLERANCE, rtol=0
        )
        assert (
            labels["image"].loc[found.per_image["position"]].to_numpy() == found.per_image["image"].to_numpy()
        ).all(), "position points at another image"


def test_shuffled_batches_are_the_same_images(method, data):
    index = target(data)
    maps = {path: m for b in batches(index, SIZE, 8) for path, m in zip(b.path, method.predict(b).map)}
    for b in batches(index, SIZE, 5, shuffle=True, seed=2):
        for path, m in zip(b.path, method.predict(b).map):
            assert (m - maps[path]).abs().max() < TOLERANCE


# -------------------------------------------------------------------------------------------------------------------- what parameters change


def test_sigma_and_top_share(data, first):
    path = first[2] / "checkpoint.safetensors"
    batch = next(iter(batches(target(data), SIZE, 8)))

    def predict(**changes):
        return load(path, **changes).predict(batch)

    plain = predict()
    raw = predict(sigma=0.0)
    wide = predict(sigma=12.0)
    for other in (raw, wide):
        assert all(torch.equal(plain.layers[k], other.layers[k]) for k in plain.layers), (
            "the smoothing comes after the taps"
        )

    def roughness(p):
        return p.map.diff(dim=-1).abs().mean()

    assert roughness(raw) > roughness(plain) > roughness(wide) > 0
    assert torch.allclose(raw.map.mean(), wide.map.mean(), atol=1e-4), (
        "a Gaussian that repeats the border keeps the mean"
    )
    assert not torch.allclose(raw.score, plain.score)
    last = math.inf
    for share in (1e-6, 0.01, 0.1, 1.0):
        other = predict(top_share=share)
        assert torch.equal(other.map, plain.map), "the share changes the score only"
        count = max(1, math.ceil(share * SIZE * SIZE))
        assert torch.allclose(
            other.score, other.map.flatten(1).sort(descending=True).values[:, :count].mean(1), atol=1e-6
        )
        assert (other.score < last).all()
        last = other.score


@pytest.mark.parametrize(
    "changes, same_map",
    [
        (dict(margin=0.1), True),
        (dict(weight_seg=0.0), True),
        (dict(dropout=0.5), True),
        (dict(lr=1.0), True),
        (dict(tap_weights=(1.0, 1.0, 1.0, 1.0)), True),
        (dict(tap_weights=(1.0, 0.0, 0.0, 0.0)), False),
        (dict(ln_post="trained"), False),
    ],
    ids=str,
)
def test_what_changes_the_map(data, first, changes, same_map):
    "Training parameters leave a trained model's maps alone; others do not."
    path = first[2] / "checkpoint.safetensors"
    batch = next(iter(batches(target(data), SIZE, 4)))
    difference = (load(path).predict(batch).map - load(path, **changes).predict(batch).map).abs().max()
    assert difference == 0 if same_map else difference > 1e-5
