"Training refuses what cannot train, never returns weights that are not numbers, and an interruption leaves the method as it was after an epoch."

import copy
import math
import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_sets import bright_squares

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.stored import BadImage
from zsad_nb.evaluation.run_state import result_of
from zsad_nb.methods.base import create
from zsad_nb.runs.run import _clear
from zsad_nb.training import fit as training
from zsad_nb.training import resume as module
from zsad_nb.training.fit import Recipe, fit, recipe_of
from zsad_nb.training.resume import trained_state

SIZE = 32
NAN = math.nan
INF = math.inf


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    return bright_squares(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def fresh():
    "A new method: the same starting values every time."
    seed_everything(0)
    original = create("visualad", image_size=SIZE)
    return lambda: copy.deepcopy(original)


def run(method, index, epochs: int = 3, **options):
    changes = options.pop("changes", {})
    return fit(
        method,
        index,
        recipe_of(method, **{**dict(epochs=epochs, batch_size=2), **changes}),
        size=SIZE,
        progress=False,
        workers=0,
        **options,
    )


def weights(method) -> dict:
    return {n: t.detach().clone() for n, t in trained_state(method).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def columns(history) -> pd.DataFrame:
    return history.drop(columns="seconds")


# ------------------------------------------------------------------------------------------------------------------------------ recipes

RATES = [NAN, INF, -INF, -1e-3, True, "0.1", None, torch.tensor(0.1), 1j, [0.1]]
WRONG = (
    [(name, value) for name in ("lr_scale", "weight_decay", "eta_min", "warmup") for value in RATES]
    + [("lr_scale", 0), ("lr_scale", 0.0), ("warmup", 1.0)]
    + [
        (name, value)
        for name in ("epochs", "batch_size", "seed")
        for value in (-1, 1.0, 1.5, True, "2", None, NAN, INF, 10**30)
    ]
    + [("batch_size", 0)]
    + [
        ("betas", value)
        for value in (
            0.9,
            (0.9,),
            (0.9, 0.99, 0.9),
            (0.9, 1.0),
            (-0.1, 0.9),
            (NAN, 0.9),
            ("0.9", 0.9),
            None,
            (True, 0.9),
        )
    ]
    + [("optimiser", "sgd"), ("optimiser", None), ("schedule", "")]
)


@pytest.mark.parametrize("name,value", WRONG, ids=str)
def test_a_recipe_that_cannot_train(name, value):
    with pytest.raises(ValueError, match=name):
        recipe_of("visualad", **{name: value})


@pytest.mark.parametrize(
    "change",
    [
        dict(epochs=np.int64(3)),
        dict(lr_scale=np.float32(0.5)),
        dict(lr_scale=2),
        dict(betas=[0.5, 0.9]),
        dict(seed=2**40),
        dict(weight_decay=0),
        dict(epochs=0),
        dict(warmup=0.5),
    ],
    ids=str,
)
def test_a_recipe_that_can(change):
    assert all(np.allclose(getattr(Recipe(**change), n), v) for n, v in change.items())


@pytest.mark.parametrize("rate", [NAN, INF, -1.0, 0.0, "0.1", 1e308])
def test_a_methods_own_rates(rate, index, fresh, monkeypatch):
    method = fresh()
    groups = [dict(g, lr=rate) for g in method.param_groups()]
    monkeypatch.setattr(method, "param_groups", lambda: groups)
    before = weights(method)
    with pytest.raises(ValueError, match="learning rate"):
        run(method, index, changes=dict(lr_scale=10.0))
    assert same(before, weights(method)) and method.trained_on == []


def test_what_is_no_recipe(index, fresh):
    with pytest.raises(TypeError, match="use recipe_of"):
        fit(fresh(), index, dict(epochs=1), progress=False)


# ----------------------------------------------------------------------------------------------------------------- nothing learned, no mark


def test_no_epoch_leaves_no_mark(index, fresh):
    method = fresh()
    before = weights(method)
    history = run(method, index, epochs=0)
    assert (
        same(before, weights(method))
        and method.trained_on == []
        and len(history) == 0
        and {"step", "total", "skipped"} <= set(history.columns)
    )


def test_no_usable_image(index, fresh, monkeypatch):
    monkeypatch.setattr("zsad_nb.data.images.Batches._collect", lambda self, results: None)
    method = fresh()
    with pytest.raises(ValueError, match="no image of the index could be used"):
        run(method, index)
    assert method.trained_on == [] and not method.training
    with pytest.raises(ValueError, match="the index is empty"):
        run(method, index.iloc[:0])


def test_steps_that_were_left_out_are_counted(index, fresh, monkeypatch):
    real = training.Alone.backward
    count = [0]

    def sometimes(self, method, forward, features, batch, loader, scale, parameters):
        losses = real(self, method, forward, features, batch, loader, scale, parameters)
        count[0] += 1
        if count[0] in (2, 5):
            parameters[0].grad[0] = NAN
        return losses

    monkeypatch.setattr(training.Alone, "backward", sometimes)
    method = fresh()
    with pytest.warns(UserWarning, match=r"2 of 6 steps were left out.*first: step 1.*lower lr_scale"):
        history = run(method, index)
    assert history["skipped"].tolist() == [False, True, False, False, True, False] and method.trained_on == ["toy/wood"]
    count[0], other = 0, fresh()
    monkeypatch.setattr(training.Alone, "backward", lambda self, *a: [real(self, *a), a[-1][0].grad.fill_(NAN)][0])
    before = weights(other)
    with pytest.raises(FloatingPointError, match="6 of 6 steps .* the method is as it was before"):
        run(other, index)
    assert same(before, weights(other)) and other.trained_on == []


# -------------------------------------------------------------------------------------------------------------------- weights stay numbers


@pytest.mark.slow
@pytest.mark.parametrize("value,at", [(NAN, 1), (INF, 4)])
def test_weights_that_are_no_numbers_end_the_training(value, at, index, fresh, monkeypatch, tmp_path):
    "In the first epoch the method is as before; in the third it holds the second's weights, and says so."
    expected = fresh()
    run(expected, index, epochs=2, changes=dict(schedule="constant"))
    real = torch.optim.AdamW.step
    count = [0]

    def ruin(self, *a, **kw):
        found = real(self, *a, **kw)
        count[0] += 1
        if count[0] == at + 1:
            self.param_groups[0]["params"][0].data.view(-1)[0] = value
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    method = fresh()
    before = weights(method)
    with pytest.raises(FloatingPointError) as caught:
        run(method, index, changes=dict(schedule="constant"), resume=tmp_path / "state")
    text = str(caught.value)
    assert f"step {at} " in text and "NaN or infinite" in text and "lower lr_scale" in text
    if at == 1:
        assert same(before, weights(method)) and method.trained_on == [] and "as it was before" in text
    else:
        assert (
            same(weights(expected), weights(method))
            and method.trained_on == ["toy/wood"]
            and "after epoch 2 of 3" in text
        )
    assert all(
        t.isfinite().all()
        for f in tmp_path.rglob("*.safetensors")
        for n, t in load_file(f).items()
        if n.startswith("method.")
    ), "nor are they written anywhere"


@pytest.mark.parametrize("what", [KeyboardInterrupt, BadImage])
def test_every_interruption_leaves_an_epoch(what, index, fresh, monkeypatch):
    expected = fresh()
    run(expected, index, epochs=1, changes=dict(schedule="constant"))
    real = training._Loop._step
    count = [0]

    def interrupted(self, batch, epoch):
        count[0] += 1
        if count[0] == 4:
            raise BadImage("a.png", "broken", "mend it") if what is BadImage else what()
        return real(self, batch, epoch)

    monkeypatch.setattr(training._Loop, "_step", interrupted)
    method = fresh()
    with pytest.raises(what) as caught:
        run(method, index, changes=dict(schedule="constant"))
    assert same(weights(expected), weights(method)) and method.trained_on == ["toy/wood"] and not method.training
    assert "after epoch 1 of 3" in " ".join(caught.value.__notes__)


# ------------------------------------------------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    pass


def killed(method, index, after: int, **options):
    "Train until a state was written for the `after`-th time."
    real = module.TrainingState.write
    count = [0]

    def write(self, *a):
        real(self, *a)
        count[0] += 1
        if count[0] == after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.TrainingState, "write", write)
        with pytest.raises(Killed):
            run(method, index, **options)


@pytest.fixture(scope="module")
def whole(index, fresh):
    "A training that nobody disturbed."
    method = fresh()
    return columns(run(method, index)), weights(method)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3])
def test_the_same_call_goes_on(after, index, fresh, whole, tmp_path):
    "With the same bits, whatever the generators did meanwhile; the state goes when the training ends well."
    killed(fresh(), index, after, resume=tmp_path / "state")
    seed_everything(999)
    method = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = run(method, index, resume=tmp_path / "state")
    assert columns(history).equals(whole[0]) and same(whole[1], weights(method)) and history.attrs["resumed"] == after
    assert (
        not (tmp_path / "state").exists()
        and [e["epoch"] for e in history.attrs["epochs"]] == [0, 1, 2]
        and history["seconds"].is_monotonic_increasing
    )
    assert method.trained_on == ["toy/wood"]


@pytest.mark.slow
def test_the_generators_go_on_too(index, fresh, tmp_path):
    "What is drawn after the training is what would have been drawn."

    def drawn_after(**options):
        run(fresh(), index, **options)
        return torch.rand(3).tolist(), np.random.rand(3).tolist()

    want = drawn_after()
    killed(fresh(), index, 2, resume=tmp_path)
    assert drawn_after(resume=tmp_path) == want


@pytest.mark.slow
def test_a_kept_state_is_a_finished_training(index, fresh, whole, tmp_path, monkeypatch):
    run(fresh(), index, resume=tmp_path, keep_state=True)
    monkeypatch.setattr(training._Loop, "_step", None)
    method = fresh()
    assert (
        columns(run(method, index, resume=tmp_path)).equals(whole[0])
        and same(whole[1], weights(method))
        and not list(tmp_path.glob("*"))
    )


CHANGES = {
    "seed": dict(changes=dict(seed=5)),
    "epochs": dict(epochs=2),
    "rate": dict(changes=dict(lr_scale=2.0)),
    "precision": dict(precision="bf16"),
    "cache": dict(cache=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES, "start", "image", "code", "threads"])
def test_another_training_starts_from_its_beginning(change, index, fresh, tmp_path, monkeypatch):
    "The state of the one is named and left alone, and says nothing to the other."
    index = bright_squares(tmp_path / "images", 4)
    killed(fresh(), index, 1, epochs=1, resume=tmp_path / "state")
    method = fresh()
    options = dict(CHANGES.get(change, {}))
    if options.get("cache"):
        options["cache"] = FeatureCache(tmp_path / "cache")
    if change == "start":
        next(iter(method.learned().values())).data.add_(1e-3)
    if change == "image":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "images" / "0.png")
    if change == "code":
        monkeypatch.setattr(module, "code_hash", lambda *rooms: "other")
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    alone = copy.deepcopy(method)
    options.setdefault("epochs", 1)
    want = columns(run(alone, index, **options))
    with pytest.warns(UserWarning, match="state of another training .* starts from its beginning"):
        history = run(method, index, resume=tmp_path / "state", **options)
    assert history.attrs["resumed"] == 0 and columns(history).equals(want) and same(weights(alone), weights(method))
    assert len(list((tmp_path / "state").iterdir())) == 1, "its own is gone, the other's is still there"


@pytest.mark.slow
def test_moved_images_are_the_same_images(index, fresh, whole, tmp_path):
    killed(fresh(), index, 1, resume=tmp_path / "state")
    assert run(fresh(), bright_squares(tmp_path / "moved", 4), resume=tmp_path / "state").attrs["resumed"] == 1


def cut(f):
    f.write_bytes(f.read_bytes()[:-7])


def nothing(f):
    f.write_bytes(b"")


def noise(f):
    f.write_bytes(os.urandom(3000))


def foreign(f):
    save_file(dict(a=torch.zeros(3)), f)


def a_bit(f):
    data = bytearray(f.read_bytes())
    data[-3] ^= 1
    f.write_bytes(data)


def a_word(f):  # of the header, of the same length
    data = f.read_bytes()
    assert data.count(b'done\\": 1') == 1
    f.write_bytes(data.replace(b'done\\": 1', b'done\\": 2'))


def without_numbers(f):
    with safe_open(f, "pt") as opened:
        header = opened.metadata()
        tensors = {n: opened.get_tensor(n) for n in opened.keys()}
    tensors = {n: t * NAN if n.startswith("method.") and t.is_floating_point() else t for n, t in tensors.items()}
    save_file(tensors, f, dict(header, sha256=module.tensor_hash(tensors, header["about"])))


def a_link(f):
    os.replace(f, f.parent.parent / "elsewhere.safetensors")
    f.symlink_to(f.parent.parent / "elsewhere.safetensors")


def a_folder(f):
    f.unlink()
    f.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, nothing, noise, foreign, a_bit, a_word, without_numbers, a_link, a_folder])
def test_a_damaged_state_is_named_and_ignored(damage, index, fresh, whole, tmp_path):
    killed(fresh(), index, 1, resume=tmp_path / "state")
    file = next((tmp_path / "state").iterdir())
    damage(file)
    method = fresh()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = run(method, index, resume=tmp_path / "state")
    assert any(file.name in str(w.message) and "starts from its beginning" in str(w.message) for w in caught)
    assert columns(history).equals(whole[0]) and same(whole[1], weights(method)) and history.attrs["resumed"] == 0
    if damage is a_link:
        assert (tmp_path / "elsewhere.safetensors").exists() and file.is_symlink()


def test_a_state_that_cannot_be_written(index, fresh, whole, tmp_path):
    (tmp_path / "state").write_text("a file where a folder should be")
    method = fresh()
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        history = run(method, index, resume=tmp_path / "state")
    assert (
        columns(history).equals(whole[0]) and len(caught) == 1 and (tmp_path / "state").read_text().startswith("a file")
    )


def test_nothing_in_a_state_is_unpickled(index, fresh, tmp_path, monkeypatch):
    killed(fresh(), index, 1, resume=tmp_path)
    for name in ("load", "loads"):
        monkeypatch.setattr(f"pickle.{name}", lambda *a, **kw: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *a, **kw: pytest.fail("unpickled"))
    assert run(fresh(), index, resume=tmp_path).attrs["resumed"] == 1


def test_a_retried_run_keeps_the_state(tmp_path):
    "What an unfinished run left is taken away before a retry, the training's state is not."
    for name in (".resume/training-1.safetensors", "data/1.png", "run.json", ".half", "checkpoint.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    _clear(tmp_path, result_of(tmp_path))
    assert [p.name for p in tmp_path.iterdir() if p.name != "run.json.unreadable"] == [".resume"] and (
        tmp_path / ".resume" / "training-1.safetensors"
    ).exists()
