"A part of a sweep: the runs with a value, the first few; what `zsad status` calls a run."

import pytest
from test_runs import WRITE, notebook

from zsad_nb.cli.commands import main
from zsad_nb.runs.run import Spec, run, status
from zsad_nb.runs.sweeps import chosen, sweep


@pytest.fixture
def specs(tmp_path):
    "Three trainings, each tested twice."
    train = notebook(tmp_path / "train.ipynb", "seed: int = 0\nsize: int = 64", WRITE.format("dict(seed=seed)"))
    test = notebook(tmp_path / "test.ipynb", "data: str = ''\nbefore: str = ''", WRITE.format("dict(data=data)"))
    out = []
    for seed in range(3):
        first = Spec(train, dict(seed=seed), "toy")
        out += [first]
        out += [Spec(test, dict(data=data, before="{train}"), "toy", dict(train=first)) for data in ("visa", "mvtec")]
    return out


def test_only_and_what_it_comes_after(specs, tmp_path):
    done = sweep(specs, tmp_path / "runs", only=dict(data="visa"), dry_run=True)
    assert sorted(done.table["label"].str.split().str[0]) == ["test"] * 3 + ["train"] * 3
    done = sweep(specs, tmp_path / "runs", only=dict(seed="1"), dry_run=True)  # as a command line gives it
    assert len(done.table) == 1 and "train" in done.table["label"][0]
    assert chosen(specs, {}) == specs
    with pytest.raises(TypeError, match="did you mean data?"):
        chosen(specs, dict(dat="visa"))
    with pytest.raises(ValueError, match="no run of this sweep has data=btad; the values are mvtec, visa"):
        chosen(specs, dict(data="btad"))


@pytest.mark.slow
def test_the_first_few_and_then_the_rest(specs, tmp_path, capsys):
    root = tmp_path / "runs"
    assert sweep(specs, root, first=2).ok
    assert (status(root)["status"] == "done").sum() == 2
    assert sweep(specs, root, first=3).ok, "what they come after had its result"
    assert (status(root)["status"] == "done").sum() == 5
    assert sweep(specs, root).ok
    table = status(root)
    assert (table["status"] == "done").all() and len(table) == 9
    assert {"train seed=1", "test data=visa seed=1"} <= set(table["label"])
    main(["status", str(root)])
    assert "test data=mvtec seed=2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_alone_is_called_by_what_it_was_given(tmp_path):
    book = notebook(tmp_path / "train.ipynb", "seed: int = 0\nclip: str = ''", WRITE.format("dict(seed=seed)"))
    assert run(Spec(book, dict(seed=4, clip="open_clip:ViT-B-16/openai")), tmp_path / "runs").ok
    assert status(tmp_path / "runs")["label"].tolist() == ["train clip=open_clip:ViT-B-16/openai seed=4"]
