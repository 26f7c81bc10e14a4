"The papers' sweeps against the papers' tables: every printed row of a method of this package has its run, trained on what the row was trained on; defaults are the paper's."

import pandas as pd
import pytest
from conftest import ROOT

from zsad_nb.backbones.table import backbone_row
from zsad_nb.evaluation.published import NOTHING, protocol_set, published
from zsad_nb.figures.paper_plan import MEDICAL, TABLE_METHODS, TABLE_SETS
from zsad_nb.methods.base import MODULES, method_class
from zsad_nb.runs.parameters import parameters_of, read_notebook
from zsad_nb.runs.plans import expand

SWEEPS = ROOT / "nbs" / "experiments" / "sweeps"
FILES = ("baselines", "dma_sap", "ssvp", "visualad", "dapo")
TABLES = dict(
    dma_sap=("1-6", "7"), ssvp=("1", "2", "3", "5"), visualad=("README", "medical", "ablation")
)  # Table 4 names no data set


@pytest.fixture(scope="module")
def specs():
    return [s for name in FILES for s in expand(SWEEPS / f"{name}.yaml", dict(DATA="folder"))]


def training(spec) -> tuple:  # method, backbone, what it is trained on
    "Of an evaluation: its own, where it comes after no training."
    before = [s for s in spec.after.values() if s.notebook.stem == "train"]
    values = before[0].values if before else spec.values
    sets = [values["train_data"], *values["train_more"]] if before else []
    return values["method"], values["backbone"], "+".join(sets) or NOTHING


@pytest.fixture(scope="module")
def evaluated(specs):
    "(method, backbone, training set, tested set) of every evaluation."
    return {(*training(s), s.values["data"]) for s in specs if s.notebook.stem == "evaluate"}


@pytest.fixture(scope="module")
def studied(specs):
    "(method, training set, tested set, variant) of every study."
    found = set()
    for s in specs:
        v = s.values
        if s.notebook.stem == "ablation" and not v["sweep"]:
            found |= {
                (v["method"], v["train_data"], v["test_data"], name)
                for name in v["variants"] or method_class(v["method"]).tables()[v["table"]]
            }
    return found


def rows(paper) -> pd.DataFrame:
    "Printed rows: method, variant, data set, training set."
    table = published(paper)
    table = table[
        table["table"].isin(TABLES[paper]) & ~table["dataset"].isin(["mean", "all"]) & table["method"].isin(MODULES)
    ]
    return table.drop_duplicates(["table", "method", "variant", "dataset", "trained_on"])


@pytest.mark.parametrize("paper", TABLES)
def test_every_row_of_every_table_has_its_run(paper, evaluated, studied):
    printed = rows(paper)
    missing = []
    for r in printed.itertuples():
        if r.variant and r.variant != "DINOv2":
            there = any(
                (m, t, d) == (r.method, r.trained_on, r.dataset) and r.variant in (name, name.split()[0])
                for m, t, d, name in studied
            )
        else:
            there = any(
                (m, t, d) == (r.method, r.trained_on, r.dataset)
                and b.startswith("dinov2") == (r.variant == "DINOv2")
                or (m, t, d) == (r.method, r.trained_on, r.dataset)
                and r.method == "self_distance"
                for m, b, t, d in evaluated
            )
        if not there:
            missing.append((r.table, r.method, r.variant, r.dataset, r.trained_on))
    assert not missing, missing
    assert len(printed) == dict(dma_sap=6 * 7 + 8, ssvp=6 * 7 + 5 + 5 + 5, visualad=6 * 6 + 3 * 4 + 4)[paper]


def test_dapo_and_its_peers_and_the_medical_sets(evaluated):
    "DAPO's tables were not found: the data sets that it names, for the methods of its columns; VisualAD's medical sets of pixels."
    wanted = {(m, protocol_set("dapo", d), d) for m in TABLE_METHODS["dapo"] for d in TABLE_SETS["dapo"]}
    wanted |= {("visualad", "visa", d) for d in MEDICAL}
    assert not wanted - {(m, t, d) for m, _, t, d in evaluated}


def test_no_run_is_trained_on_what_it_is_tested_on(evaluated):
    assert not [e for e in evaluated if e[3] in e[2].split("+")]
    assert ("visualad", "visa", "ksdd") not in {(m, t, d) for m, _, t, d in evaluated}  # its paper has KSDD2


@pytest.mark.parametrize("notebook", ["train", "evaluate", "ablation"])
def test_defaults_are_the_papers(notebook):
    "Nothing is scaled or shortened unless it is asked for; such a notebook is not executed with its defaults by nbdev_test."
    book = read_notebook(ROOT / "nbs" / "experiments" / f"{notebook}.ipynb")
    defaults = {name: p.default for name, p in parameters_of(book).items()}
    expected = dict(
        train=dict(lr_scale=1.0, size=0, epochs=0, batch=0, seed=None),
        ablation=dict(lr_scale=1.0, size=0, epochs=0, batch=0, seeds=[]),
        evaluate=dict(size=0, names="", engine="", precision="", options={}, seed=None),
    )[notebook]
    assert {name: defaults[name] for name in expected} == expected
    assert book["cells"][0]["cell_type"] == "raw" and "skip_exec: true" in book["cells"][0]["source"]


def test_papers_sweeps_shorten_nothing(specs):
    for s in specs:
        assert s.values.get("lr_scale", 1.0) == 1.0
        if s.notebook.stem == "train":
            assert (
                s.values["size"] == 0
                and s.values["seed"] is None
                and s.values["epochs"]
                == {("visualad", "mvtec"): 2, ("visualad", "visa"): 1, ("april_gan", "visa"): 15}.get(
                    (s.values["method"], s.values["train_data"]), 0
                )
            )


def test_towers_by_their_own_names():
    "Every name of that sweep is one of a library's own that can serve, at 37 x 37 patches like the papers' towers."
    specs = expand(SWEEPS / "towers.yaml", dict(DATA="folder", WEIGHTS="random:0"))
    by_stem: dict = {}
    for spec in specs:
        by_stem.setdefault((spec.notebook.stem, spec.values["method"]), []).append(spec.values)
    for values in by_stem["train", "visualad"] + by_stem["evaluate", "self_distance"]:
        row = backbone_row(values["backbone"])
        assert values["size"] == 37 * row.patch and values["weights"] == "random:0"
    second = [backbone_row(values["dino"]).name for values in by_stem["train", "ssvp"]]
    assert len(second) == len(set(second)) == 8 and {"mae-vitl16", "dinov2-vitl14", "dinov3-vits16"} <= set(second)
    ways = {(v["backbone"], v["train_data"]) for v in by_stem["train", "visualad"]}
    assert len(by_stem["train", "visualad"]) == len(ways) == 16 and len({backbone for backbone, _ in ways}) == 8
