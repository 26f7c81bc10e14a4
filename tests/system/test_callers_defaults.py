"Whatever the caller has set in PyTorch - default type, device, autocast, gradients, determinism, warnings as errors - no number changes, and everything stays as it was set."

import contextlib
import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from small_sets import bright_squares

from zsad_nb.backbones.text import create_text
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.core.settings import seed_everything, usual_defaults
from zsad_nb.data.method_images import batches_for
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods.base import MODULES, create, load, save
from zsad_nb.training.fit import fit, recipe_of

SIZE = 48
EVERY_METHOD = os.environ.get("ZSAD_EVERY_METHOD")  # the whole grid of methods and worlds: minutes


@contextlib.contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def everything():
    with (
        default_type(torch.bfloat16),
        default_device("meta"),
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        deterministic(),
        warnings_are_errors(),
    ):
        yield


WORLDS = {
    "float64": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
    "float16": lambda: default_type(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta default": lambda: default_device("meta"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic,
    "warnings": warnings_are_errors,
    "numpy raises": lambda: np.errstate(all="raise"),
    "everything": everything,
}


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    return bright_squares(tmp_path_factory.mktemp("world"), 4)


def job(name: str, index, out=None) -> dict:
    "Create, train where it trains, save and load, predict, evaluate: every number of it."
    seed_everything(0)
    method = create(name, image_size=SIZE)
    found = {}
    method.prepare(index)
    if hasattr(method, "set_references"):
        method.set_references(next(iter(batches_for(method, index[~index["anomalous"]], SIZE, 4))))
    if method.param_groups():
        history = fit(method, index, recipe_of(method, epochs=1, batch_size=4), size=SIZE, progress=False, workers=0)
        found = {
            f"loss {c}": torch.tensor(history[c].to_numpy(), dtype=torch.float64, device="cpu")
            for c in history
            if c not in ("seconds", "skipped")
        }
        found |= {n: p.detach() for n, p in method.learned().items()}
        if out is not None:
            method = load(save(method, out / "checkpoint.safetensors"))
        method.prepare(index)
    prediction = method.predict(next(iter(batches_for(method, index, SIZE, 4))))
    metrics = evaluate(method, index, size=SIZE, progress=False, workers=0, allow_seen="toy").per_image.select_dtypes(
        "number"
    )
    return found | dict(
        map=prediction.map,
        score=prediction.score,
        metrics=torch.tensor(metrics.to_numpy(), dtype=torch.float64, device="cpu"),
    )


@pytest.fixture(scope="module")
def usual(index):
    "name -> what a method gives where nothing was set; made when it is first asked for."
    made = {}

    def get(name):
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = job(name, index)
        return made[name]

    return get


def settings() -> tuple:
    return (
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        warnings.filters[:1],
        np.geterr(),
    )


GRID = [
    (name, world) for name in MODULES for world in WORLDS if EVERY_METHOD or world == "everything" or name == "dma_sap"
]


@pytest.mark.parametrize("name,world", GRID, ids=lambda x: x)
def test_the_same_numbers_in_every_world(name, world, index, usual, tmp_path):
    want = usual(name)
    with WORLDS[world]():
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*(zero-shot|has no images|defect type)", category=UserWarning
            )  # of this small index, not of the world
            before = settings()
            found = job(name, index, tmp_path)
            assert settings() == before, "what the caller has set is still set"
    assert found.keys() == want.keys()
    for n, t in want.items():
        assert (
            found[n].dtype == t.dtype
            and found[n].device == t.device
            and torch.equal(torch.nan_to_num(found[n]), torch.nan_to_num(t))
        ), n


@pytest.mark.parametrize("world", ["float64", "bfloat16", "autocast", "meta default", "inference_mode"])
def test_towers_alone(world):
    "A tower that is built without a method is the same tower."

    def made():
        return create_backbone("tiny-dino"), create_text("tiny-clip")

    want = made()
    with WORLDS[world]():
        found = made()
    for a, b in zip(want, found):
        assert a.hash == b.hash
        for n, t in (*a.named_parameters(), *a.named_buffers()):
            other = dict((*b.named_parameters(), *b.named_buffers()))[n]
            assert (
                other.dtype == t.dtype
                and other.device == t.device
                and torch.equal(t, other)
                and not other.is_inference()
            ), n


def test_a_block_is_a_request():
    "`with torch.device(...)` around `create` says where to; a default that was set long ago does not."
    with torch.device("meta"):
        assert create("self_distance", image_size=SIZE, weights="random:0").backbone.mean.is_meta
    with default_device("meta"):
        assert create("self_distance", image_size=SIZE).backbone.mean.device.type == "cpu"
        with torch.device("meta"):
            assert create("self_distance", image_size=SIZE, weights="random:0").backbone.mean.is_meta


def test_an_error_leaves_the_settings():
    before = settings()
    with everything():
        inside = settings()
        with pytest.raises(ValueError), usual_defaults(gradients=True):
            assert (
                torch.is_grad_enabled()
                and not torch.is_inference_mode_enabled()
                and torch.get_default_dtype() == torch.float32
            )
            raise ValueError
        assert settings() == inside
    assert settings() == before
