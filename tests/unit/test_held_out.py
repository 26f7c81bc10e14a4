"An epoch chosen on a held-out part of the auxiliary set: which images, which epoch, and killed at any moment the same bits."

import re

import pytest
import torch
from small_sets import bright_squares

from zsad_nb.core.callbacks import Callback
from zsad_nb.core.progress_log import ProgressLog
from zsad_nb.core.settings import seed_everything
from zsad_nb.methods.base import create
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.training.fit import fit, recipe_of
from zsad_nb.training.stages import BestEpoch, fit_stages, held_out_part

SIZE = 32


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return bright_squares(tmp_path_factory.mktemp("held_out"), 8)


@pytest.fixture(scope="module")
def parts(index):
    return held_out_part(index, 0.25)


# ---- which images
def test_both_kinds_are_held_out_and_the_order_does_not_matter(index):
    trained, held = held_out_part(index, 0.25)
    assert sorted([*trained["image"], *held["image"]]) == sorted(index["image"])
    assert held["anomalous"].value_counts().to_dict() == {True: 1, False: 1}
    assert set(held_out_part(index[::-1].reset_index(drop=True), 0.25)[1]["image"]) == set(held["image"])
    assert held.attrs == trained.attrs == index.attrs
    most = held_out_part(index, 0.99)[0]["anomalous"]
    assert most.nunique() == 2, "one of each kind is always left to train on"


@pytest.mark.parametrize("share", [1, -0.1, 1.5])
def test_what_is_no_share(index, share):
    with pytest.raises(ValueError, match="share between 0 and 1"):
        held_out_part(index, share)


def test_off_holds_nothing_out(index):
    trained, held = held_out_part(index, 0.0)
    assert trained is index and held is None
    with pytest.raises(ValueError, match="patience=3 ends a training by images that are held out: give held_out"):
        held_out_part(index, 0.0, 3)


def test_too_few_of_a_kind(index):
    few = index.groupby("anomalous").head(1)
    with pytest.raises(ValueError, match="no category has two normal and two anomalous"):
        held_out_part(few, 0.5)


# ---- which epoch
class Judge:
    "Counts its calls; a number of the learned weights, whose best is neither the first nor the last epoch."

    def __init__(self, stop_at=None, target=None):
        self.calls = 0
        self.stop_at = stop_at
        self.target = target
        self.seen = []

    def __call__(self, method, images):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        torch.rand(7)  # what judges may draw random numbers
        state = method.tokens.detach().clone()
        self.seen.append(state)
        return 0.0 if self.target is None else -(state - self.target).norm().item()


class Stop(Callback):
    "Ends the process, as it were, at a step."

    is_needed = True

    def __init__(self, step):
        self.step = step

    def on_step(self, row):
        if row["step"] == self.step:
            raise KeyboardInterrupt


def trained(parts, judge, patience=0, epochs=5, resume=None, callbacks=(), **options):
    seed_everything(0)
    method = create("visualad", image_size=SIZE)
    recipe = recipe_of(method, epochs=epochs, batch_size=4, lr_scale=20.0)
    how = dict(size=SIZE, progress=False, workers=0, resume=resume, callbacks=callbacks)
    return method, fit_stages(method, parts[0], recipe, parts[1], judge, patience, "my number", **how, **options)


@pytest.fixture(scope="module")
def middle(parts):
    "The tokens after the third of five epochs."
    judge = Judge()
    trained(parts, judge)
    return judge.seen[2]


@pytest.fixture(scope="module")
def whole(parts, middle):
    "Undisturbed, ended by patience: method, history, number of judgements."
    judge = Judge(target=middle)
    return *trained(parts, judge, patience=1), judge.calls


def same(a, b):
    return all(torch.equal(p, b.learned()[n]) for n, p in a.learned().items())


def test_the_best_epoch_counts_and_is_recorded(parts, middle, tmp_path):
    judge = Judge(target=middle)
    method, history = trained(parts, judge)
    assert judge.calls == 5 and history["epoch"].max() == 4, "without patience every epoch is trained"
    assert torch.equal(method.tokens, middle)
    chosen = method.fitted["chosen"]
    assert chosen == dict(epoch=3, by="my number", judged=history.attrs["judged"], patience=0, images=2)
    from zsad_nb.methods.base import save

    assert read_header(save(method, tmp_path / "a.safetensors"))["fitted"]["chosen"] == chosen


def test_patience_ends_it(whole, middle):
    method, history, calls = whole
    assert calls == 4 and history["epoch"].max() == 3 and torch.equal(method.tokens, middle)


def test_off_is_as_before(parts):
    "Without held-out images nothing of it is written, and a callback without a memory does not change the key."
    method, _ = trained((parts[0], None), None)
    alone = create("visualad", image_size=SIZE)
    assert "chosen" not in method.fitted and set(method.fitted) == {
        *recipe_of(alone).__dataclass_fields__,
        "size",
        "precision",
    }


@pytest.mark.parametrize("place, when", [("judge", 1), ("judge", 4), ("step", 4)])
def test_killed_and_resumed(parts, whole, middle, tmp_path, place, when):
    "In the training or while an epoch is judged: the same weights, values and epoch, to the last bit."
    method, history, calls = whole
    first = Judge(when if place == "judge" else None, middle)
    stop = Stop(when if place == "step" else -1)
    with pytest.raises(KeyboardInterrupt):
        trained(parts, first, patience=1, resume=tmp_path / "state", callbacks=[stop])
    second = Judge(target=middle)
    again, resumed = trained(parts, second, patience=1, resume=tmp_path / "state")
    assert same(method, again) and resumed["total"].tolist() == history["total"].tolist()
    assert again.fitted == method.fitted and not (tmp_path / "state").exists()
    assert second.calls == calls - (when - 1 if place == "judge" else when // 2), "no epoch is judged again"


def test_what_has_ended_does_not_go_on(parts, whole, middle, tmp_path):
    "Killed after the last epoch that patience allows and before the checkpoint: nothing is trained again."
    trained(parts, Judge(target=middle), patience=1, resume=tmp_path, keep_state=True)
    judge = Judge(target=middle)
    again, resumed = trained(parts, judge, patience=1, resume=tmp_path, keep_state=True)
    assert judge.calls == 0 and len(resumed) == len(whole[1]) and same(whole[0], again)


def test_another_choice_does_not_use_the_state(parts, middle, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(parts, Judge(3, middle), patience=2, resume=tmp_path)
    with pytest.warns(UserWarning, match="of another training .*patience"), pytest.raises(KeyboardInterrupt):
        trained(parts, Judge(2, middle), patience=3, resume=tmp_path)
    with pytest.warns(UserWarning, match="state of another training .*callbacks"):
        trained((parts[0], None), None, epochs=1, resume=tmp_path)


def test_it_looks_in_this_process_only(parts):
    method = create("visualad", image_size=SIZE)
    with pytest.raises(ValueError, match="devices=1"):
        fit(method, parts[0], callbacks=[BestEpoch(lambda m: 1.0)], devices=2, progress=False)
    with pytest.raises(ValueError, match="patience=-1"):
        BestEpoch(lambda m: 1.0, -1)


# ---- the log
def test_a_resumed_training_appends_to_its_log(parts, tmp_path):
    def run(step):
        path = tmp_path / "progress.log"
        trained((parts[0], None), None, epochs=3, resume=tmp_path / "state", callbacks=[ProgressLog(path), Stop(step)])

    with pytest.raises(KeyboardInterrupt):
        run(3)
    run(99)
    lines = (tmp_path / "progress.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d  \S", line) for line in lines)
    words = [re.sub(r", [\d.]+ s, loss .*", "", line.split("  ", 1)[1]) for line in lines]
    assert words == [
        "fit visualad: 3 epochs, 6 steps",
        "epoch 1 of 3: 2 steps",
        "fit ended: KeyboardInterrupt: ",
        "fit visualad: 3 epochs, 6 steps, goes on after epoch 1",
        "epoch 2 of 3: 2 steps",
        "epoch 3 of 3: 2 steps",
        "fit is done",
    ]


def test_a_log_is_no_way_to_another_file(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "progress.log").symlink_to(tmp_path / "mine.txt")
    log = ProgressLog(tmp_path / "progress.log")
    with pytest.warns(UserWarning, match="goes on without it"):
        log.write("a line")
    assert (tmp_path / "mine.txt").read_text() == "mine"
