"Callbacks of training, evaluation and sweeps: what they are told, what they may end, and that no number depends on them."

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from zsad_nb.core.callbacks import Callback, Callbacks
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.index import make_index
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods.base import create
from zsad_nb.runs.run import Spec
from zsad_nb.runs.sweeps import sweep
from zsad_nb.training.fit import fit, recipe_of
from zsad_nb.training.trackers import MLflow, TensorBoard, Tracker, WeightsAndBiases, plain_numbers, plain_parameters

SIZE = 64


class Notes(Callback):
    "Keeps everything; ends a training after some epochs."

    def __init__(self, epochs=99):
        self.events = []
        self.epochs = epochs

    def on_start(self, about):
        self.events.append(("start", about))

    def on_step(self, row):
        self.events.append(("step", row))

    def on_epoch(self, row, method):
        assert not method.training
        torch.rand(3), np.random.rand(3)  # a callback may draw random numbers
        self.events.append(("epoch", row))
        return row["epoch"] + 1 >= self.epochs

    def on_result(self, row):
        self.events.append(("result", row))

    def on_end(self, about):
        self.events.append(("end", about))

    def kinds(self):
        return [kind for kind, _ in self.events]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("callbacks")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4):
        picture = rng.integers(0, 255, (SIZE, SIZE, 3)).astype("uint8")
        mask = np.zeros((SIZE, SIZE), "uint8")
        mask[10:30, 10:30] = 255
        Image.fromarray(picture).save(root / f"{number}.png")
        Image.fromarray(mask).save(root / f"{number}_mask.png")
        bad = number % 2 == 1
        rows.append(
            dict(
                dataset="toy",
                category="wood",
                split="test",
                image=f"{number}.png",
                mask=f"{number}_mask.png" if bad else "",
                anomalous=bad,
                defect="hole" if bad else "good",
            )
        )
    return make_index(rows, root)


def trained(index, epochs=2, **options):
    seed_everything(0)
    method = create("visualad", backbone="tiny-dino", image_size=SIZE)
    recipe = recipe_of(method, epochs=epochs, batch_size=2, seed=0)
    return method, fit(method, index, recipe, progress=False, **options)


def test_a_training_is_told_and_does_not_depend_on_it(index):
    notes = Notes()
    method, history = trained(index, callbacks=[notes])
    alone, expected = trained(index)
    assert notes.kinds() == ["start", "step", "step", "epoch", "step", "step", "epoch", "end"]
    about = notes.events[0][1]
    assert about["work"] == "fit" and about["method"] == "visualad" and about["steps"] == 4 and about["resumed"] == 0
    assert [row["total"] for kind, row in notes.events if kind == "step"] == history["total"].tolist()
    assert notes.events[-1][1] == dict(work="fit", epochs=2, steps=4)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert all(torch.equal(p, q) for p, q in zip(method.learned().values(), alone.learned().values()))


def test_one_of_them_may_end_a_training(index):
    notes = Notes(epochs=1)
    _, history = trained(index, epochs=3, callbacks=notes)  # one alone needs no list
    assert len(history) == 2 and notes.kinds()[-2:] == ["epoch", "end"]


def test_an_error_is_told_and_stays_the_one_that_is_raised(index):
    class Stops(Notes):
        is_needed = True

        def on_epoch(self, row, method):
            raise RuntimeError("enough")

        def on_end(self, about):
            super().on_end(about)
            raise OSError("disk full")

    notes = Stops()
    with pytest.raises(RuntimeError, match="enough"):
        trained(index, callbacks=[notes])
    assert notes.events[-1] == ("end", dict(work="fit", error="RuntimeError: enough"))


@pytest.mark.parametrize("event", ["on_start", "on_step", "on_epoch", "on_end"])
def test_a_broken_one_costs_nothing(index, event):
    class Broken(Callback):
        pass

    def fails(self, *_):
        raise ConnectionError("no server")

    setattr(Broken, event, fails)
    notes = Notes()
    with pytest.warns(UserWarning, match=f"Broken.{event} failed .ConnectionError: no server.; it is left out"):
        _, history = trained(index, callbacks=[Broken(), notes])
    assert len(history) == 4 and notes.kinds()[-1] == "end"


def test_what_cannot_look_on_is_refused(index, tmp_path):
    with pytest.raises(ValueError, match="devices=1"):
        trained(index, callbacks=[Notes()], devices=2)
    whole = type("Whole", (Callback,), dict(knows_the_past=False))
    with pytest.raises(ValueError, match="Whole has to see a training from its beginning: it goes without resume"):
        trained(index, callbacks=[whole()], resume=tmp_path)
    with pytest.raises(TypeError, match="subclasses of Callback"):
        trained(index, callbacks=[print])


def test_a_resumed_training_says_where_it_goes_on(index, tmp_path):
    class Killed(Notes):
        is_needed = True

        def on_epoch(self, row, method):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(index, epochs=3, callbacks=[Killed()], resume=tmp_path)
    notes = Notes()
    _, history = trained(index, epochs=3, callbacks=[notes], resume=tmp_path)
    assert notes.events[0][1]["resumed"] == 1
    assert [row["step"] for kind, row in notes.events if kind == "step"] == [2, 3, 4, 5]
    assert len(history) == 6


def test_an_evaluation_tells_every_class_and_the_mean(index):
    notes = Notes()
    method = create("self_distance", image_size=SIZE)
    evaluation = evaluate(method, index, size=SIZE, progress=False, callbacks=[notes])
    assert notes.kinds() == ["start", "result", "result", "end"]
    assert notes.events[0][1] == dict(work="evaluate", method="self_distance", images=4, size=SIZE)
    rows = [row for kind, row in notes.events if kind == "result"]
    assert [row["name"] for row in rows] == ["wood", "mean"]
    assert rows[0]["image_auroc"] == evaluation.per_class.loc["wood", "image_auroc"]


@pytest.mark.slow
def test_a_sweep_tells_every_run(tmp_path):
    from test_runs import WRITE, notebook

    book = notebook(tmp_path / "toy.ipynb", "seed: int = 0", "assert seed != 1", WRITE.format("dict(seed=seed)"))
    notes = Notes()
    assert not sweep([Spec(book, dict(seed=seed)) for seed in range(3)], tmp_path / "runs", callbacks=[notes]).ok
    assert notes.kinds() == ["start", "result", "result", "result", "end"]
    rows = {row["name"]: row for kind, row in notes.events if kind == "result"}
    assert rows["toy seed=1"]["status"] == "failed" and rows["toy seed=2"]["status"] == "done"
    assert notes.events[-1][1] == dict(work="sweep", done=2, failed=1)
    lines = (tmp_path / "runs" / "toy" / "progress.log").read_text().splitlines()
    assert [sum(word in line for line in lines) for word in ("] done", "] failed")] == [2, 1]
    assert all(line[:4].isdigit() and line[10] == "T" for line in lines)
    planned = [Spec(book, dict(seed=seed)) for seed in (0, 2)]
    sweep(planned, tmp_path / "runs", dry_run=True)
    assert len((tmp_path / "runs" / "toy" / "progress.log").read_text().splitlines()) == len(lines)
    assert sweep(planned, tmp_path / "runs").ok
    longer = (tmp_path / "runs" / "toy" / "progress.log").read_text().splitlines()
    assert longer[: len(lines)] == lines and len(longer) > len(lines), "appended to"


def test_what_is_sent():
    about = dict(work="fit", betas=(0.5, 0.9), path=None, size=64, schedule="constant")
    assert plain_parameters(about) == dict(work="fit", betas="[0.5, 0.9]", size=64, schedule="constant")
    row = dict(total=1.5, skipped=True, defect="crack", aupro=float("nan"), top=float("inf"))
    assert plain_numbers(row, "train") == {"train/total": 1.5, "train/skipped": 1.0}


@pytest.mark.parametrize(
    "package, make", [("tensorboard", TensorBoard), ("mlflow", MLflow), ("wandb", lambda folder: WeightsAndBiases())]
)
def test_without_its_package_a_tracker_names_the_extra(package, make, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'zsad_nb\[trackers\]'"):
        make(str(tmp_path))


def test_tensorboard_has_every_loss_and_metric(index, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    method, history = trained(index, callbacks=[TensorBoard(tmp_path / "fit")])
    events = EventAccumulator(str(tmp_path / "fit"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/total")] == pytest.approx(history["total"].tolist(), rel=1e-6)
    board = TensorBoard(tmp_path / "evaluate")
    evaluation = evaluate(method, index, size=SIZE, progress=False, callbacks=[board], allow_seen=("toy",))
    events = EventAccumulator(str(tmp_path / "evaluate"))
    events.Reload()
    sent = events.Scalars("evaluate/wood/pixel_auroc")[0].value
    assert sent == pytest.approx(evaluation.per_class.loc["wood", "pixel_auroc"], rel=1e-6)


def test_mlflow_has_every_loss_and_how_it_ended(index, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database needs the whole of MLflow
    tracker = MLflow((tmp_path / "runs").as_uri(), "toy", "first")
    _, history = trained(index, callbacks=[tracker])
    run = tracker.client.get_run(tracker.id)
    sent = tracker.client.get_metric_history(tracker.id, "train/total")
    assert [m.value for m in sorted(sent, key=lambda m: m.step)] == pytest.approx(history["total"].tolist())
    assert run.data.params["method"] == "visualad" and run.info.status == "FINISHED"

    class Stops(Callback):
        is_needed = True

        def on_step(self, row):
            raise RuntimeError("enough")

    tracker = MLflow((tmp_path / "runs").as_uri(), "toy", "second")
    with pytest.raises(RuntimeError):
        trained(index, callbacks=[tracker, Stops()])
    run = tracker.client.get_run(tracker.id)
    assert run.info.status == "FAILED" and run.data.tags["error"] == "RuntimeError: enough"


def test_a_tracker_of_ones_own_needs_three_functions():
    class Mine(Tracker):
        def __init__(self):
            super().__init__()
            self.sent = []

        def open(self, about):
            self.sent.append(about)

        def note(self, numbers, step):
            self.sent.append((step, numbers))

        def close(self, error):
            self.sent.append(error)

    mine = Mine()
    with Callbacks([mine]).work(dict(work="sweep", runs=2)):
        mine.on_result(dict(name="toy seed=1", status="done", seconds=2.0))
    assert mine.sent == [dict(work="sweep", runs=2), (0, {"sweep/toy seed=1/seconds": 2.0}), ""]
