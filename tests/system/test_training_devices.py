"Several devices, half precision, checkpointing: another way of computing, the same training."

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.core.settings import seed_everything
from zsad_nb.data import images as reading
from zsad_nb.data.index import make_index
from zsad_nb.data.stored import BadImage
from zsad_nb.methods.base import create, load
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training import devices
from zsad_nb.training.devices import SameRandomNumbers, Shares, share
from zsad_nb.training.fit import fit, recipe_of, train_here
from zsad_nb.training.precision import checkpointed, frozen_blocks

SIZE, DEFECTS = 64, ("scratch", "crack", "hole")
METHODS = {
    "visualad": dict(weights="random:0"),
    "dma_sap": dict(clip_weights="random:0", dino_weights="random:0"),
    "ssvp": dict(clip_weights="random:0", dino_weights="random:0"),
    "dapo": dict(clip_weights="random:0", types=DEFECTS),
    "bayes_pfl": dict(clip_weights="random:0"),
}
needs_accelerate = pytest.mark.skipif(
    devices.importlib.util.find_spec("accelerate") is None, reason="pip install zsad_nb[multi]"
)


def drawn(root: Path, count: int) -> pd.DataFrame:
    "Images of two categories, three of four with a defect of one of three kinds, of very unequal size."
    rng = np.random.default_rng(0)
    rows = []
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = rng.integers(90, 140, (SIZE, SIZE, 3), dtype=np.uint8)
        mask = np.zeros((SIZE, SIZE), np.uint8)
        bad = i % 4 != 0
        if bad:
            image[8 : 12 + 7 * i, 16:40], mask[8 : 12 + 7 * i, 16:40] = 250 - 40 * (i % 3), 255
        Image.fromarray(image).save(root / f"{i}.png")
        if bad:
            Image.fromarray(mask).save(root / f"{i}_mask.png")
        rows.append(
            dict(
                dataset="toy",
                category=("wood", "metal_nut")[i % 2],
                split="test",
                image=f"{i}.png",
                mask=f"{i}_mask.png" if bad else "",
                anomalous=bad,
                defect=DEFECTS[i % 3] if bad else "good",
            )
        )
    return make_index(rows, root)


def made(name: str):
    seed_everything(0)
    return create(name, image_size=SIZE, **METHODS[name])


def short(name: str, **changes):
    return recipe_of(
        name, **{**dict(epochs=2, batch_size=3), **changes}
    )  # 7 images: batches of 3, 3 and 1; of two processes one has 1, 1 and no image


def job(index: pd.DataFrame, count: int = 1) -> dict:
    "Every method in float32 (two epochs) and in float64 (one), by `count` processes: losses and learned parameters."
    out = {}
    real = reading.Batches._collect

    def doubled(self, results):
        batch = real(self, results)
        batch.image = batch.image.double()
        return batch

    for double in (False, True):
        reading.Batches._collect = doubled if double else real
        for name in METHODS:
            method = made(name)
            if double:
                method.double()
            start = {k: p.detach().clone() for k, p in method.learned().items()}
            history = fit(method, index, short(name, epochs=1 if double else 2), progress=False, devices=count)
            out[name, double] = (
                history.drop(columns="seconds"),
                start,
                {k: p.detach() for k, p in method.learned().items()},
            )
    reading.Batches._collect = real
    return out


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    return drawn(tmp_path_factory.mktemp("seven"), 7)


# ------------------------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def both(index, tmp_path_factory):
    "The same trainings by one process and by two that were started from outside, as torchrun does."
    out = tmp_path_factory.mktemp("two")
    (out / "index.pkl").write_bytes(pickle.dumps(index))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = (
        "import sys, pickle, torch; sys.path.insert(0, sys.argv[1]); import test_training_devices as t; from pathlib"
        " import Path; out = Path(sys.argv[2]); torch.set_num_threads(1)\nfound = t.job(pickle.loads((out /"
        " 'index.pkl').read_bytes()), 2); (out / f'{t.os.environ[\"RANK\"]}.pkl').write_bytes(pickle.dumps(found));"
        " torch.distributed.destroy_process_group()"
    )
    env = dict(
        os.environ,
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    two = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), str(out)],
            env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    alone = job(index)
    for p in two:
        error = p.communicate(timeout=300)[1]
        assert p.returncode == 0, error
    return alone, *(pickle.loads((out / f"{r}.pkl").read_bytes()) for r in range(2))


def same_but_for_rounding(a: pd.DataFrame, b: pd.DataFrame):
    "Float32 losses of one training, summed in another order: the first step to 1e-6, the last after Adam has carried the rounding on"
    pd.testing.assert_frame_equal(a[:1], b[:1], rtol=1e-6, atol=1e-6)
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-5)


@needs_accelerate
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_take_the_steps_of_one(name, both):
    """In float64 an epoch agrees to 1e-9: what two processes compute is what one computes, whatever the loss (Bayes-PFL's is no mean over images), with shares of 1 + 2 and 0 + 1.
    In float32 sums over 2 rows and over 3 round differently by about 1e-7. The first losses feel just that; later ones also that the weights have moved apart, by how much depends on the processor (2e-5 was seen). Adam divides a gradient by its own size, so parameters whose gradient is itself of the size of the rounding
    (a bias that nearly cancels) may move apart by a small part of a step; hence a bound in steps for the worst parameter, and 1e-6 for all but few.
    """
    alone, first, second = both
    for double in (True, False):
        (a, start, p), (b, _, q), (c, _, r) = (found[name, double] for found in both)
        if double:
            pd.testing.assert_frame_equal(a, b, rtol=1e-9, atol=1e-9)
        else:
            same_but_for_rounding(a, b)
        pd.testing.assert_frame_equal(b, c, rtol=1e-12, atol=0)
        assert all(torch.equal(q[k], r[k]) for k in q), "both processes have the same parameters to the last bit"
        apart = torch.cat([(p[k] - q[k]).abs().flatten() for k in p])
        moved = torch.cat([(p[k] - start[k]).abs().flatten() for k in p]).max()
        print(
            f"{name}, {'float64' if double else 'float32'}: losses differ by"
            f" {(a['total'] - b['total']).abs().max():.1e}, parameters by {apart.max():.1e} (moved by {moved:.1e}),"
            f" {(apart > 1e-6).double().mean():.1e} of them by more than 1e-6"
        )
        if double:
            assert apart.max() < 1e-9
        else:
            assert apart.max() < 0.02 * moved and (apart > 1e-6).double().mean() < 5e-3
        assert moved > 1e-4 and len(a) == (3 if double else 6) and not a["skipped"].any()


@needs_accelerate
def test_fit_starts_its_own_processes(index, tmp_path):
    "With a cache that both share; as from a notebook: no guard around the call, nothing prepared."
    alone = made("dma_sap")
    cache = FeatureCache(tmp_path)
    a = fit(alone, index, short("dma_sap"), progress=False)
    together = made("dma_sap")
    identity = {k: id(p) for k, p in together.learned().items()}
    b = fit(together, index, short("dma_sap"), progress=False, devices=2, cache=cache)
    same_but_for_rounding(a.drop(columns="seconds"), b.drop(columns="seconds"))
    assert max((p - together.learned()[k]).abs().max() for k, p in alone.learned().items()) < 1e-4
    assert (
        {k: id(p) for k, p in together.learned().items()} == identity
        and not together.training
        and together.trained_on == ["toy/metal_nut", "toy/wood"] == alone.trained_on
    )
    assert [(e["hits"], e["misses"]) for e in b.attrs["epochs"]] == [(0, 7), (7, 0)] and (cache.hits, cache.misses) == (
        7,
        7,
    )
    assert (
        b.attrs["devices"] == 2
        and a.attrs["devices"] == 1
        and b.attrs["peak_memory"] > 1e7
        and b.attrs["step_seconds"] > 0
    )
    assert list(a.columns) == list(b.columns) and b["seconds"].is_monotonic_increasing


@needs_accelerate
def test_an_error_in_one_process_is_the_error(index, tmp_path):
    "A file that only one process reads."
    broken = drawn(tmp_path / "set", 3)
    (tmp_path / "set" / "2.png").write_bytes((tmp_path / "set" / "2.png").read_bytes()[:200])
    with pytest.raises(BadImage, match="2.png") as caught:
        fit(made("visualad"), broken, short("visualad"), progress=False, devices=2)
    assert "of 2, counted from 0" in caught.value.__notes__[0] and "Traceback" in caught.value.__notes__[0]
    assert not [
        p for p in psutil.Process().children(recursive=True) if "zsad_nb.training.devices" in " ".join(p.cmdline())
    ], "the other process was stopped"


def test_a_killed_process(index, monkeypatch, tmp_path):
    "One dies without a word while the other waits for it."
    method = made("visualad")
    before = {k: p.detach().clone() for k, p in method.learned().items()}
    monkeypatch.setattr(
        devices,
        "_START",
        f"import os, signal, time; rank = os.environ['RANK']; open({str(tmp_path)!r} + '/' + rank,"
        " 'w').write(str(os.getpid())); time.sleep(100) if rank == '0' else os.kill(os.getpid(), signal.SIGKILL)",
    )
    with pytest.raises(RuntimeError, match="process 1 of 2, counted from 0, ended with signal 9 .killed"):
        devices.launch(method, 2, train_here, {})
    if (tmp_path / "0").exists():
        assert not psutil.pid_exists(int((tmp_path / "0").read_text())), "the other one was stopped"
    assert all(torch.equal(before[k], p) for k, p in method.learned().items()), "nothing half-learned"
    monkeypatch.setattr(devices, "_START", "import sys; print('said before the end', flush=True); sys.exit(3)")
    with pytest.raises(RuntimeError, match="exit code 3; nothing was learned\nsaid before the end"):
        devices.launch(method, 2, train_here, {})
    method.backbone.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="this visualad cannot be sent to other processes"):
        devices.launch(method, 2, train_here, {})


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    "It waits for another that never comes, until nobody holds its standard input any more."
    code = (
        "import os, sys, threading, time\nfrom unittest import mock\nimport zsad_nb.training.devices as"
        " d\nprint('here', flush=True)\nwith mock.patch.object(d, 'import_vision_libraries', lambda: time.sleep(100)):"
        " d._work()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=dict(os.environ, RANK="0"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline().strip() == "here"
    time.sleep(0.5)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=60) == 1
    child.stdout.close()


def test_what_cannot_be_started(index, monkeypatch):
    method = made("visualad")

    def asked(count, **changes):
        return lambda: fit(method, index, short("visualad", **changes), progress=False, devices=count)

    for count, changes, why in (
        (0, {}, "1 or more"),
        (1.5, {}, "1 or more"),
        (5, {}, "at least one"),
        (1000, dict(batch_size=1000), "but this machine has"),
    ):
        with pytest.raises(ValueError, match=why):
            asked(count, **changes)()
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="one of 4 that were started together; pass devices=4"):
        asked(2)()
    monkeypatch.undo()
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install zsad_nb\[multi\]"):
        asked(2)()
    monkeypatch.undo()
    monkeypatch.setattr(type(method), "__module__", "__main__")
    with pytest.raises(ValueError, match="move it into a module"):
        asked(2)()


# --------------------------------------------------------------------------------------------------------------------- shares and draws


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_shares_cover_every_batch(ranks):
    for total in range(1, 20):
        parts = [share(r, ranks, total) for r in range(ranks)]
        assert [i for s in parts for i in range(total)[s]] == list(range(total))
        sizes = [s.stop - s.start for s in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_are_the_rows_of_one_process(index, workers):
    def loader():
        return reading.batches(index, SIZE, 4, shuffle=True, seed=3, workers=workers)

    whole = loader()
    parts = [Shares.of(loader(), r, 3) for r in range(3)]
    for _ in range(2):  # another order in the second pass
        for batch, *own in zip(whole, *parts, strict=True):
            rows = [own[r].path[: s.stop - s.start] for r in range(3) for s in [share(r, 3, len(batch))]]
            assert sum(rows, []) == batch.path == [whole.rows[i][0] for i in parts[0].whole] and all(
                len(b) for b in own
            )
    assert len(list(parts[0])) == 2


def test_a_draw_belongs_to_its_image():
    x = torch.rand(5, 4, 6)
    layer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4))

    def draw(x):
        seed_everything(3)
        return [
            torch.randn(len(x), 3),
            torch.rand(size=(len(x), 2)),
            torch.randn((len(x), 2), dtype=torch.float64),
            torch.rand_like(x),
            F.dropout(x, 0.5),
            layer(x),
            F.dropout(x.transpose(1, 2), 0.5),
            F.dropout(x[:, :1].expand(-1, 4, -1), 0.5),
            F.dropout(x.clone(), 0.3, True, True),
            torch.rand(7).expand(len(x), 7),
            torch.rand(()).expand(len(x)),
            layer.eval()(x),
            layer.train() and torch.randn(len(x), 1),
        ]

    whole = draw(x)
    for cuts in ((0, 2, 5), (0, 1, 2, 3, 4, 5)):
        for a, b in zip(cuts, cuts[1:]):
            with SameRandomNumbers(a, b - a, 5):
                part = draw(x[a:b])
            for i, (p, w) in enumerate(zip(part, whole)):
                assert torch.equal(p, w[a:b]) or (i == 5 and torch.allclose(p, w[a:b], atol=1e-6)) or i in (11,), i
            assert torch.allclose(part[11], whole[11][a:b], atol=1e-6)
    for other in (
        lambda: torch.bernoulli(x[:2]),
        lambda: torch.randint(3, (2, 4)),
        lambda: x[:2].clone().normal_(),
        lambda: F.dropout2d(x[:2], 0.5),
    ):
        with SameRandomNumbers(0, 2, 5), pytest.raises(NotImplementedError, match="random numbers for 2 images"):
            other()
    with SameRandomNumbers(0, 2, 5):
        torch.randperm(7), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))  # not of the images


# ------------------------------------------------------------------------------------------------------------------------- memory, speed


@pytest.mark.parametrize("name", ["visualad", "dapo"])
def test_checkpointing_changes_no_number(name, index):
    "Losses and parameters to the last bit; afterwards the blocks are as they were."
    plain = made(name)
    less = made(name)
    blocks = frozen_blocks(less)
    assert len(blocks) >= 3
    a = fit(plain, index, short(name), progress=False)
    b = fit(less, index, short(name), progress=False, checkpointing=True)
    assert a.drop(columns="seconds").equals(b.drop(columns="seconds")) and all(
        torch.equal(p, less.learned()[k]) for k, p in plain.learned().items()
    )
    assert (
        not any("forward" in vars(block) for block in blocks)
        and b.attrs["checkpointing"]
        and not a.attrs["checkpointing"]
    )


@pytest.mark.parametrize("name,share_left", [("visualad", 0.7), ("dapo", 0.3)])
def test_checkpointing_keeps_less(name, share_left, index):
    "Bytes that wait for the way back, without the weights; at this size SCA, SAF and the losses are a large part of the rest."
    batch = next(iter(reading.batches(index, SIZE, 4)))

    def waiting(on):
        method = made(name)
        kept = {}
        method.prepare(index, training=True)
        method.train()
        frozen = {p.untyped_storage().data_ptr() for p in method.parameters()}

        def keep(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with checkpointed(method, on), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = method.loss(method(method.features(batch), batch), batch)["total"]
        return sum(v for k, v in kept.items() if k not in frozen), loss.item()

    (plain, a), (less, b) = waiting(False), waiting(True)
    print(f"{name}: {plain / 1e6:.2f} MB wait for the way back, {less / 1e6:.2f} MB with checkpointing")
    assert a == b and less < share_left * plain


def test_batch_8_at_518_px_fits_24_gb():
    "VisualAD on ViT-L/14 counted on meta tensors, which have sizes and no memory: weights, what waits for the way back, and one block being computed again."
    size, images, giga = 518, 8, 1e9
    with torch.device("meta"):
        method = create("visualad", backbone="clip-vitl14-336", weights="random:0", image_size=size).train()
    with torch.device("meta"):
        batch = reading.Batch(
            torch.rand(images, 3, size, size),
            torch.zeros(images, 1, size, size) > 0,
            torch.ones(images) > 0,
            torch.zeros(images).long(),
            ["x"] * images,
            ["x"] * images,
            torch.ones(images) > 0,
        )
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in method.parameters()}
    found = {}
    for on in (False, True):
        kept, alive = {}, []

        def keep(t, kept=kept, alive=alive):
            alive.append(t.untyped_storage())  # so that no other takes its place
            kept[alive[-1]._cdata] = alive[-1].nbytes()
            return t

        with (
            torch.device("meta"),
            checkpointed(method, on),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        ):
            method(None, batch)
        found[on] = sum(v for k, v in kept.items() if k not in weights) / giga
    block = (found[False] - found[True]) / 24
    fixed = sum(weights.values()) / giga
    print(
        f"VisualAD, ViT-L/14, {images} images of {size} px: {found[False]:.1f} GB wait for the way back,"
        f" {found[True]:.1f} GB with checkpointing; a block {block:.1f} GB, weights {fixed:.1f} GB"
    )
    assert (
        found[False] > 24 and found[True] + block + 4 * fixed < 24
    )  # generously: gradient and Adam's two moments for every weight


@pytest.mark.parametrize(
    "name,precision,limit",
    [
        ("visualad", "bf16", 0.05),
        ("dma_sap", "bf16", 0.05),
        ("ssvp", "bf16", 0.05),
        ("dapo", "bf16", 0.05),
        ("visualad", "fp16", 0.02),
        ("dma_sap", "fp16", 0.02),
    ],
)
def test_half_precision(name, precision, limit, index, tmp_path):
    "Losses stay within 5 % (bf16, 8 bits) and 2 % (fp16, 11 bits, scaled) of float32 over six steps; parameters stay float32."
    full = made(name)
    half = made(name)
    a = fit(full, index, short(name), progress=False)
    b = fit(half, index, short(name), progress=False, precision=precision, cache=tmp_path)
    error = ((a["total"] - b["total"]) / a["total"]).abs().max()
    print(f"{name}: losses in {precision} differ by {error:.1%}")
    assert 0 < error < limit and not b["skipped"].any() and b.attrs["precision"] == precision
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.learned().values())
    if full.encode_key() is not None:
        said = json.loads(next(tmp_path.rglob("key.json")).read_text())
        assert said["precision"] == precision, "features of other products are other features"


def test_compiled(index, monkeypatch):
    "Captured as a graph; the code generator itself is left to machines that have one."
    monkeypatch.setattr(
        logging.getLogger("torch.__trace"), "propagate", False
    )  # thousands of lines that pytest would keep
    a, b = (
        fit(made("dma_sap"), index, short("dma_sap", epochs=1, batch_size=7), progress=False, compile=c)
        for c in (False, "eager")
    )
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), rtol=1e-4, atol=1e-5)
    assert b.attrs["compile"] == "eager"


def test_words_that_do_not_exist(index):
    with pytest.raises(ValueError, match="precision='int8'; use fp32, bf16, fp16"):
        fit(made("visualad"), index, short("visualad"), progress=False, precision="int8")


# --------------------------------------------------------------------------------------------------------------------------- the notebook


@needs_accelerate
def test_train_notebook_on_two_devices(tmp_path):
    "From a kernel under papermill: the same losses as on one, and what it cost in result.json."
    papermill = pytest.importorskip("papermill")
    options = dict(clip_weights="random:0", dino_weights="random:0")
    values = dict(
        method="dma_sap",
        options=options,
        devices=2,
        size=SIZE,
        epochs=2,
        batch=8,
        lr_scale=5.0,
        seed=0,
        output=str(tmp_path),
        cache=str(tmp_path / "cache"),
        cache_dtype="float16",
        cache_gb=1.0,
    )
    papermill.execute_notebook(
        str(Path(__file__).parents[2] / "nbs/experiments/train.ipynb"),
        str(tmp_path / "train.ipynb"),
        values,
        cwd=str(tmp_path),
        progress_bar=False,
    )
    cost = json.loads((tmp_path / "result.json").read_text())["speed"]
    assert (
        cost["devices"] == 2
        and [(e["hits"], e["misses"]) for e in cost["epochs"]] == [(0, 30), (30, 0)]
        and cost["step_seconds"] > 0
        and cost["peak_memory"] > 1e7
    )
    seed_everything(0)
    alone = create("dma_sap", image_size=SIZE, **options)
    index = synthetic_index(tmp_path / "data" / "synthetic-auxiliary", "auxiliary", SIZE, normal=1, defective=1)
    history = fit(
        alone,
        index,
        recipe_of("dma_sap", epochs=2, batch_size=8, lr_scale=5.0, seed=0),
        progress=False,
        cache=FeatureCache(tmp_path / "cache", "float16"),
    )
    pd.testing.assert_frame_equal(
        history.drop(columns="seconds"),
        pd.read_csv(tmp_path / "history.csv").drop(columns="seconds"),
        rtol=1e-4,
        atol=1e-5,
    )
    learned = load(tmp_path / "checkpoint.safetensors")
    assert (
        learned.trained_on == alone.trained_on
        and max((p - learned.learned()[k]).abs().max() for k, p in alone.learned().items()) < 1e-3
    )
