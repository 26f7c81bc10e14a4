"Every figure and table of the papers from a folder of runs: files, letters, bytes, what is missing and how to make it, real and drawn data, ambiguous and damaged runs, the notebooks behind them."

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from zsad_nb.cli.commands import main, parser
from zsad_nb.evaluation.evaluate import Evaluation
from zsad_nb.evaluation.methods_table import SYSTEMS
from zsad_nb.evaluation.multi_type import TypeEvaluation
from zsad_nb.evaluation.results import read_runs
from zsad_nb.evaluation.views import Views
from zsad_nb.figures import paper_figures
from zsad_nb.figures.chosen_runs import Runs, synthetic_remark
from zsad_nb.figures.paper_figures import BEGIN, END, build, write_index
from zsad_nb.figures.paper_plan import commands, plan, plan_rows, synthetic_like
from zsad_nb.figures.style import COLUMN, NOTE, PAGE
from zsad_nb.methods.base import method_class
from zsad_nb.runs.parameters import check_parameters, parameters_of, read_notebook
from zsad_nb.runs.plans import expand

METRICS = (
    "image_auroc",
    "image_ap",
    "image_f1max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "pixel_aupro",
    "pixel_aupro_200",
)
DPI, COARSE = 100, 40  # where letters are as wide as in print; where nobody looks
CATEGORIES, TYPES, SIZE = ("gear", "pill", "wood"), ("crack", "stain", "cut"), 40
LEVEL = dict(
    winclip=0.7, anomalyclip=0.8, crane=0.82, self_distance=0.75, dma_sap=0.9, ssvp=0.91, visualad=0.89, dapo=0.85
)
STUDIES = [
    ("dma_sap", "ablations", ["A", "B", "C", "D"]),
    ("ssvp", "ablations", list(method_class("ssvp").ablations)),
    ("ssvp", "gamma", [f"gamma = {g}" for g in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]),
    ("ssvp", "xi", [f"xi = {x}" for x in (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)]),
    ("ssvp", "dino", ["dino = tiny-dino", "dino = tiny-clip"]),
    ("visualad", "ablations", ["full", "no SCA", "no SAF", "neither"]),
    ("dapo", "alpha", [f"alpha = {a}" for a in (0.0, 0.01, 1.0)]),
    ("dapo", "weight_local", ["weight_local = 1.0", "weight_local = 4.0"]),
    ("dapo", "image_depth", ["image_depth = 0", "image_depth = 5"]),
]


def looked(sharp, types=False):
    "Views of three discs, by the package's own writer."
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1)
    d = [(x - 0.3 - 0.1 * k) ** 2 + (y - 0.5) ** 2 for k in range(3)]
    masks = np.stack([v < 0.02 for v in d])
    images = np.stack(
        [
            np.stack([0.4 + 0.1 * np.sin(20 * x + k), 0.5 + 0 * x, 0.4 + 0.1 * y], -1) + 0.3 * masks[k][..., None]
            for k in range(3)
        ]
    )
    rows = pd.DataFrame(
        [
            dict(
                dataset="d",
                category=c,
                image=f"{c}.png",
                defect="stain",
                anomalous=True,
                area=0.05,
                has_mask=True,
                score=1.0,
                low=0.0,
                high=1.0,
                **(dict(type=t, guess="cut") if types else {}),
            )
            for c, t in zip(CATEGORIES, TYPES)
        ]
    )
    labels = (masks * np.arange(1, 4)[:, None, None]).astype(np.uint8)
    typed = (
        dict(
            truth=labels,
            largest=labels[::-1].copy(),
            likely=np.maximum(labels, 1),
            heat=np.exp(-5 * np.stack(d)).astype(np.float32),
        )
        if types
        else {}
    )
    return Views(
        rows,
        (images.clip(0, 1) * 255).astype(np.uint8),
        masks,
        np.exp(-sharp * np.stack(d)).astype(np.float32),
        TYPES if types else (),
        typed,
    )


class Folder:
    "Runs as the notebooks leave them, with invented numbers."

    def __init__(self, root: Path, data="synthetic-2-target", train="synthetic-2-auxiliary", size=64):
        self.root = root
        self.data = data
        self.train = train
        self.size = size
        self.count = 0
        self.rng = np.random.default_rng(0)

    def leave(self, notebook, fill, given, after=None, **result):
        self.count += 1
        name = f"{self.count:016x}"[::-1]
        home = self.root / "synthetic" / name
        home.mkdir(parents=True)
        fill(home)
        own = dict(size=self.size, images=2, **given)
        record = dict(
            status="done",
            hash=name,
            spec=dict(
                notebook=f"/somewhere/nbs/experiments/{notebook}.ipynb",
                experiment="synthetic",
                parameters=dict(own, root="/somewhere/data", output=""),
                given=[*own, "root"],
            ),
            after={"train": dict(run="x", parameters=after)} if after else {},
            code=dict(commit="c0ffee", dirty=False, source="5ource"),
            versions=dict(zsad_nb="0"),
            seconds=1.0,
            peak_memory_mb=1,
            fingerprint="f",
        )
        (home / "run.json").write_text(json.dumps(record))
        (home / "result.json").write_text(json.dumps(dict(dict(notebook=notebook, fingerprint="f"), **result)))
        return home

    def training(self, method, seed, **more):
        steps = np.arange(24)
        parts = dict(focal=np.exp(-steps / 5), dice=1 / (steps + 1 + seed))
        history = pd.DataFrame(
            dict(step=steps, epoch=steps // 4, seconds=0.1, lr=1e-3, skipped=False, total=sum(parts.values()), **parts)
        )
        return self.leave(
            "train",
            lambda f: history.to_csv(f / "history.csv", index=False),
            dict(method=method, train_data=self.train, seed=seed, epochs=6, **more),
            method=method,
            data=self.train,
            seed=seed,
            backbones=dict(clip="tiny-clip"),
        )

    def evaluation(self, method, seed, trained=True, **more):
        table = pd.DataFrame(
            np.clip(self.rng.normal(LEVEL[method], 0.01, (3, len(METRICS))), 0, 1),
            index=pd.Index(CATEGORIES, name="category"),
            columns=METRICS,
        )
        table.loc["mean"] = table.mean()
        bad = np.arange(8) >= 4
        images = pd.concat(
            [
                pd.DataFrame(
                    dict(
                        image=[f"{c}/{k}.png" for k in range(8)],
                        category=c,
                        anomalous=bad,
                        score=np.arange(8) % 5 + bad + self.rng.normal(size=8),
                    )
                )
                for c in CATEGORIES
            ]
        )
        found = Evaluation(
            table.assign(normal=2, anomalous=2), images, pd.DataFrame(columns=["category", "metric", "reason"]), []
        )
        return self.leave(
            "evaluate",
            found.save,
            dict(method=method, data=self.data, seed=seed, **more),
            dict(seed=seed, epochs=6, train_data=self.train) if trained else None,
            method=method,
            data=self.data,
            seed=seed,
            seen=[],
            trained_on=[self.train] if trained else [],
            backbones=dict(clip="tiny-clip"),
            **table.loc["mean"],
        )

    def views(self, method, seed=0, data=None):
        return self.leave(
            "qualitative",
            lambda f: looked(5 + len(method), method == "dapo").save(f / "views" / method),
            dict(method=method, data=data or self.data, seed=seed, each=1),
            methods=[method],
            data=data or self.data,
            seed=seed,
            images=3,
            views={method: f"views/{method}"},
            backbones={method: dict(clip="tiny-clip")},
            size=self.size,
        )

    def study(self, method, table, variants):
        more = dict(ssvp=("tir_fg", "scd_normal", "scd_abnormal"), dapo=("type_auroc",)).get(method, ())
        rows = [
            dict(
                variant=v,
                seed=s,
                category=c,
                stage=stage,
                seconds=1.0,
                **{m: 0.6 + 0.05 * k + 0.01 * s for m in METRICS[:7]},
                **({m: 0.5 for m in more} if stage == "trained" and c == "mean" else {}),
            )
            for k, v in enumerate(variants)
            for s in (0, 1)
            for stage in ("untrained", "trained")
            for c in (*CATEGORIES, "mean")
        ]

        def fill(folder):
            pd.DataFrame(rows).to_csv(folder / "ablation.csv", index=False)
            for k, v in enumerate(variants):
                looked(3 + 4 * k).save(folder / "runs" / str(k))

        return self.leave(
            "ablation",
            fill,
            dict(method=method, table=table, epochs=1, train_data=self.train, test_data=self.data),
            method=method,
            table=table,
            variants=variants,
            seeds=[0, 1],
            data=self.data,
            train_data=self.train,
            views={v: f"runs/{k}" for k, v in enumerate(variants)},
            backbones=dict(clip="tiny-clip"),
        )

    def types(self):
        states = ["normal", *TYPES]
        confusion = pd.DataFrame(self.rng.integers(0, 90, (4, 4)), index=states, columns=states)

        def fill(folder):
            TypeEvaluation(
                pd.DataFrame(),
                pd.DataFrame(),
                pd.DataFrame(dict(image=range(9), type=[*TYPES] * 3, said_filtered=[TYPES[0]] * 5 + [TYPES[1]] * 4)),
                dict(filtered=confusion),
            ).save(folder / "dapo-seed0")
            pd.DataFrame(
                [
                    dict(
                        method=m,
                        seed=s,
                        stage=t,
                        auroc=0.8,
                        auroc_seen=0.85,
                        auroc_novel=0.7 + 0.01 * s,
                        ap=0.4,
                        f1=0.5,
                        guess_f1=0.2,
                        image_accuracy=0.6,
                    )
                    for m in ("dapo", "multiads")
                    for s in (0, 1)
                    for t in ("untrained", "trained")
                ]
            ).to_csv(folder / "types.csv", index=False)

        return self.leave(
            "defect_types",
            fill,
            dict(clip="tiny-clip", epochs=1, seeds=[0, 1], choice="filtered"),
            methods=["dapo", "multiads"],
            test=self.data,
            train=self.train,
            seeds=[0, 1],
        )

    def all(self):
        for method in SYSTEMS:
            for seed in (0, 1):
                self.training(method, seed)
                self.evaluation(method, seed)
        for method in ("winclip", "anomalyclip", "crane"):
            self.evaluation(method, 0, False)
        for method in (*SYSTEMS, "crane"):
            self.views(method)
        for study in STUDIES:
            self.study(*study)
        self.types()
        return self.root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("whole")).all()


@pytest.fixture(scope="module")
def drawn(whole, tmp_path_factory):
    "All runs, drawn."
    out = tmp_path_factory.mktemp("figures")
    (out / "README.md").write_text("# Ours\n\nA line of our own.\n")
    kept = {}
    save = paper_figures.save_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            paper_figures,
            "save_figure",
            lambda figure, path, dpi: kept.update({Path(path).name: figure}) or save(figure, path, dpi),
        )
        done = build(whole, out, dpi=DPI)
    assert {m["name"] for m in done.missing} == NEVER and not done.skipped and not any(m["wrong"] for m in done.missing)
    return out, done, kept


@pytest.fixture
def out(drawn):
    return drawn[0]


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


NEVER = set(plan_rows().query("maker == 'nothing'")["name"])  # diagrams, and measurements of a machine
TABLES = [
    i.name for i in plan() if re.fullmatch("(" + "|".join(SYSTEMS) + ")_(image|pixel)", i.name) or "table" in i.name
]
FIGURES = [i.name for i in plan() if i.name not in {*TABLES, *NEVER}]


# ------------------------------------------------------------------------------------------------------------------------------- files


def test_everything_is_made(out, whole):
    assert {i.name for i in plan()} - NEVER == {p.stem for p in out.glob("*.pdf")} | {
        p.stem for p in (out / "tables").glob("*.tex")
    }
    unmade = (out / "README.md").read_text().partition("## Not made")[2]
    assert (
        all(f"| {name} |" in unmade for name in NEVER)
        and unmade.count("a diagram: drawn by hand") == 4
        and unmade.count("zsad bench") == 4
        and len(FIGURES) == 24
        and len(TABLES) == 16
    )
    assert set(pd.read_csv(out / "runs.csv", dtype=str)["path"]) == {
        p.parent.relative_to(whole).as_posix() for p in whole.glob("*/*/run.json")
    }  # every run is used


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_printed(out, name):
    "A vector PDF whose letters are letters, a PNG that is not blank, at the width of a column or a page, without a date."
    pdf = (out / f"{name}.pdf").read_bytes()
    png = out / f"{name}.png"
    assert (
        pdf.startswith(b"%PDF")
        and b"/CIDFontType2" in pdf
        and b"/FontFile2" in pdf
        and b"/Type3" not in pdf
        and b"CreationDate" not in pdf
    )
    assert len(re.findall(rb"/Type /FontDescriptor", pdf)) == len(re.findall(rb"/FontFile2", pdf)), (
        "a font is not embedded"
    )
    width, height = (float(v) / 72 for v in re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf).groups())
    assert any(width == pytest.approx(w, abs=0.01) for w in (COLUMN, PAGE))
    assert height < 9.5
    with Image.open(png) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        assert "Software" not in picture.info and picture.width == pytest.approx(width * DPI, abs=2)
    ink = (pixels < 200).any(-1)
    assert ink.mean() > 0.01 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 40
    assert not ink[:, 0].any() and not ink[:, -1].any(), "something is cut off at the side"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_three_forms(out, name):
    text, tex, csv = ((out / "tables" / f"{name}.{end}").read_text() for end in ("md", "tex", "csv"))
    assert (
        "Synthetic benchmark" in text
        and r"\toprule" in tex
        and r"\pm" in tex
        and len(pd.read_csv(out / "tables" / f"{name}_numbers.csv")) > 1
        and csv.count("\n") > 1
    )


def test_twice_is_the_same(out, whole, tmp_path):
    "Everything but the index in a part of the plan, and the index with all of it: no clock, no order of a dictionary."
    again = build(
        whole,
        tmp_path,
        only=[
            "dma_sap_fig05",
            "dma_sap_fig07",
            "dma_sap_fig09",
            "dapo_types",
            "visualad_ablation",
            "ssvp_table",
            "ssvp_fig07",
        ],
        dpi=DPI,
    )
    first = files_of(out)
    second = files_of(tmp_path)
    assert len(second) > 25 and not again.missing
    assert {k: v == first[k] for k, v in second.items()} == dict.fromkeys(second, True)


@pytest.mark.parametrize("name", FIGURES)
def test_what_a_figure_says_of_its_data(drawn, name):
    "Drawn images: inside the figure, in letters that can be read."
    figure = drawn[2][name]
    said = figure._supxlabel
    assert (
        "Synthetic benchmark (images of 64 px" in " ".join(said.get_text().split()) and said.get_fontsize() >= NOTE > 5
    )
    letters = [
        t
        for ax in figure.axes
        for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
        if t.get_text()
    ]
    letters += [t for f in (figure, *figure.subfigs) for legend in f.legends for t in legend.get_texts()]
    assert letters and min(t.get_fontsize() for t in letters) >= 4.6


def test_real_runs_make_real_figures(tmp_path):
    "The same command; the data name themselves, published values stand beside, drawn runs take no part."
    root = Folder(tmp_path / "runs", "visa", "mvtec", 518).all()
    Folder(tmp_path / "runs" / "more").evaluation("winclip", 3, False)
    runs = Runs(root)
    assert runs.real and set(runs.evaluations["data"]) == {"visa"}
    done = build(
        root, tmp_path / "out", only=["dma_sap_fig07", "dma_sap_image", "visualad_table", "ssvp_table4"], dpi=COARSE
    )
    assert not done.missing and len(done.made) == 4
    assert "84.6" in (tmp_path / "out" / "tables" / "dma_sap_image.md").read_text()  # DMA+SAP on VisA, as published
    assert (
        "82.3" in (tmp_path / "out" / "tables" / "visualad_table_ablation.md").read_text()
        and "0.4425" in (tmp_path / "out" / "tables" / "ssvp_table4_alignment.md").read_text()
    )
    assert synthetic_remark(runs.matching) == "" and synthetic_remark(
        Runs(Folder(tmp_path / "drawn").views("crane").parent).matching
    ).startswith("Synthetic benchmark (images of 64 px; tiny-clip; seed 0)")
    assert not any("synthetic" in item.command for item in plan(runs))


def test_an_ablation_on_two_data_sets(tmp_path):
    "DMA+SAP's Table 7 and Figs 10-12: MVTec AD, BTAD and their average, each trained as in the paper, beside what is printed."
    for k, (data, train) in enumerate((("mvtec", "visa"), ("btad", "mvtec"))):
        folder = Folder(tmp_path / "runs", data, train, 518)
        folder.count = 50 * k
        folder.study(*STUDIES[0])
    runs = Runs(tmp_path / "runs")
    items = {i.name: i for i in plan(runs)}
    table, used = items["dma_sap_table7_ablation"].make(runs)
    assert [r["data"] for r in used] == ["mvtec", "btad"] and list(dict.fromkeys(h for h, _ in table.columns)) == [
        f"{d}, {m}, %" for d in ("MVTec AD", "BTAD", "Average") for m in ("image AUROC", "image AP")
    ]
    at = table.numbers.set_index(["method", "metric"])
    assert (
        at.loc[("C", "mvtec image_auroc"), "published"] == 94.4
        and at.loc[("C", "Average image_auroc"), "published"] == pytest.approx((94.4 + 96.1) / 2, abs=1e-9)
        and not table.numbers["unlike_published"].any()
    )
    figure, used = items["dma_sap_fig10_ablation_ab"].make(runs)
    labels = [t.get_text() for f in figure.subfigs for ax in f.axes for t in ax.get_xticklabels()]
    titles = [ax.get_title() for f in figure.subfigs for ax in f.axes]
    assert (
        len(used) == 2
        and {"MVTec AD\nAUROC", "BTAD\nAP", "Average\nAUROC"} <= set(labels)
        and {"MVTec AD", "BTAD"} <= {t.split("\n")[0] for t in titles}
    )


# ------------------------------------------------------------------------------------------------------------------------- what is missing


def test_what_is_missing_is_named_with_its_command(tmp_path, capsys):
    root = tmp_path / "runs"
    Folder(root, size=96).training("dma_sap", 0)
    assert main(["figures", str(root), "--out", str(tmp_path / "out"), "--dpi", str(COARSE)]) == 0
    said = capsys.readouterr().out
    assert "1 made in" in said and said.count("\nmissing  ") == len(plan()) - 1
    assert (
        "missing  ssvp_fig07_gamma  (SSVP, Fig. 7: share γ of the local score)\n  no finished run: the study 'gamma'"
        " of SSVP\n  zsad run nbs/experiments/ablation.ipynb -p method ssvp -p lr_scale 10.0 -p table gamma -p size 96"
        f" -p images 2 -p epochs 6 -p seeds '[0, 1, 2]' --root {root}" in said
    )
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| dma_sap_fig09_qualitative | DMA+SAP, Fig. 9: image, mask, a peer's heatmap, ours | no finished run: views of"
        " DMA+SAP | `zsad sweep nbs/experiments/sweeps/figures.yaml --set SIZE=96 --set IMAGES=2 --set EPOCHS=6 --root"
        in text
    )
    assert [p.name for p in (tmp_path / "out").glob("*.p*")] == [
        "dma_sap_fig05_loss.pdf",
        "dma_sap_fig05_loss.png",
    ] or len(list((tmp_path / "out").glob("*.p*"))) == 2
    (tmp_path / "none").mkdir()
    assert (
        main(["figures", str(tmp_path / "none"), "--out", str(tmp_path / "out2")]) == 1
        and not (tmp_path / "out2" / "runs.csv").exists()
    )
    assert main(["figures", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out2")]) == 2


@pytest.mark.parametrize("real", [False, True])
def test_every_command_of_the_plan_works(real, monkeypatch):
    "It parses, its files are there, and its values fit the notebook."
    monkeypatch.chdir(ROOT)
    runs = type("", (), dict(real=real, matching=[]))()
    for item in plan(runs):
        assert item.command or item.name in NEVER
        for command in filter(None, item.command.split("; ")):
            args = parser().parse_args(shlex.split(command)[1:])
            if args.command == "bench":
                assert [args.methods[0]] == args.methods and args.size
            elif args.command == "run":
                book = read_notebook(args.notebook)
                known = parameters_of(book)
                check_parameters(book, {k: known[k].parse(v) for k, v in args.parameter}, args.notebook)
            else:
                assert expand(
                    args.file, {k: int(v) if v.isdigit() else v for k, _, v in (t.partition("=") for t in args.set)}
                )


def test_sweeps_make_what_the_plan_needs():
    "Every study and view that a figure asks for is in a sweep file: of drawn images, and of the papers."
    specs = expand(ROOT / "nbs" / "experiments" / "sweeps" / "figures.yaml")

    def kind(s):
        return s.values["method"], s.values["sweep"] or s.values["table"]

    assert {kind(s) for s in specs if s.notebook.stem == "ablation"} == {(m, t) for m, t, _ in STUDIES}
    views = [s for s in specs if s.notebook.stem == "qualitative" and s.values["data"] == "synthetic-2-target"]
    assert {*SYSTEMS, "crane_plus", "winclip", "self_distance"} <= {s.values["method"] for s in views} and all(
        s.values["peer"] == "" for s in views
    )
    trained = {
        s.hash for s in expand(ROOT / "nbs" / "experiments" / "sweeps" / "synthetic.yaml") if s.notebook.stem == "train"
    }
    assert {s.hash for s in specs if s.notebook.stem == "train"} <= trained, (
        "the trainings of synthetic.yaml would be repeated"
    )
    papers = {
        n: expand(ROOT / "nbs" / "experiments" / "sweeps" / f"{n}.yaml", dict(DATA="folder"))
        for n in (*SYSTEMS, "baselines")
    }
    studies = {kind(s) for n in SYSTEMS for s in papers[n] if s.notebook.stem == "ablation"}
    assert studies == {(m, "auxiliary" if t == "dino" else t) for m, t, _ in STUDIES}
    assert any(s.notebook.stem == "defect_types" for s in papers["dapo"]) and all(
        any(s.notebook.stem == "qualitative" for s in p) for p in papers.values()
    )


def test_missing_runs_are_made_like_those_that_are_there(tmp_path):
    assert synthetic_like(None) == dict(size=256, images=6, epochs=3)
    folder = Folder(tmp_path / "runs", size=96)
    folder.training("ssvp", 0)
    assert synthetic_like(Runs(tmp_path / "runs")) == dict(size=96, images=2, epochs=6)
    folder.size = 64
    folder.training("ssvp", 1)
    assert synthetic_like(Runs(tmp_path / "runs"))["size"] == 256  # two sizes: neither
    sweep, study, types = commands(False, dict(size=96, images=2, epochs=6))
    assert (
        sweep("figures").count("--set") == 3
        and "-p sweep alpha -p values '[0.0, 0.01]'" in study("dapo", 1.0, sweep="alpha", values=[0.0, 0.01])
        and types().startswith("zsad run nbs/experiments/defect_types.ipynb -p size 96")
    )


# ------------------------------------------------------------------------------------------------------------- ambiguous and damaged runs


def test_two_runs_for_one_place_are_refused(tmp_path, capsys):
    "Nothing is chosen silently; the message says how to choose."
    for size in (64, 128):
        folder = Folder(tmp_path / "runs" / str(size), size=size)
        folder.training("dma_sap", 0)
        folder.views("dma_sap")
        folder.views("crane")
        folder.study(*STUDIES[0])
    done = build(
        tmp_path / "runs", tmp_path / "out", only=["dma_sap_fig05", "dma_sap_fig09", "dma_sap_fig10"], dpi=COARSE
    )
    assert not done.made and all(
        "differ in size (128, 64); choose with --where size=64" in m["why"] for m in done.missing
    )
    assert (
        main(
            [
                "figures",
                str(tmp_path / "runs"),
                "--out",
                str(tmp_path / "out"),
                "--where",
                "size=64",
                "--only",
                "dma_sap_fig05",
                "dma_sap_fig10",
                "--dpi",
                str(COARSE),
            ]
        )
        == 0
    )
    assert main(["figures", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--where", "size=65"]) == 2
    assert "no run has size=65; there are 128, 64" in capsys.readouterr().err


def test_a_method_on_two_backbones(tmp_path):
    "VisualAD's tables have two columns of it; its loss is that of the CLIP."
    folder = Folder(tmp_path / "runs", "visa", "mvtec")
    for backbone in ("dinov2-vitl14", "clip-vitl14-336"):
        for home in (
            folder.training("visualad", 0, backbone=backbone),
            folder.evaluation("visualad", 0, False, backbone=backbone),
        ):
            result = json.loads((home / "result.json").read_text())
            (home / "result.json").write_text(json.dumps(dict(result, backbones=dict(backbone=backbone))))
    runs = Runs(tmp_path / "runs")
    assert set(runs.evaluations["method"]) == {"visualad", "visualad (dinov2-vitl14)"}
    items = {i.name: i for i in plan(runs)}
    table, used = items["visualad_image"].make(runs)
    assert (
        len(used) == 2
        and ("VisualAD (dinov2-vitl14)", "ours") in table.columns
        and ("VisualAD", "published") in table.columns
    )
    assert len(items["visualad_loss"].make(runs)[1]) == 1


def test_each_paper_takes_the_training_of_its_printed_number(tmp_path):
    "One peer after MVTec AD and after VisA: DMA+SAP's table has the first, SSVP's the second, the table of all methods both; nothing is an error."
    folder = Folder(tmp_path / "runs", "btad", "mvtec", 518)
    folder.evaluation("anomalyclip", 0), folder.evaluation("dma_sap", 0)
    folder.train = "visa"
    folder.evaluation("anomalyclip", 0), folder.evaluation("ssvp", 0)
    runs = Runs(tmp_path / "runs")
    items = {i.name: i for i in plan(runs)}
    for paper, train in (("dma_sap", "mvtec"), ("ssvp", "visa")):
        table, used = items[f"{paper}_image"].make(runs)
        line = table.numbers[
            (table.numbers["method"] == "anomalyclip") & (table.numbers["metric"] == "image_auroc")
        ].iloc[0]
        assert (
            line["trained_on"] == line["published_trained_on"] == train
            and not table.numbers["unlike_published"].any()
            and not table.numbers["unlike_row"].any()
            and len(used) == 2
        )
    both, used = items["all_methods_table"].make(runs)
    assert len(used) == 4 and {"AnomalyCLIP (trained on MVTec AD)", "AnomalyCLIP (trained on VisA)"} <= {
        name.rstrip("‖") for name in both.rows
    }
    done = build(tmp_path / "runs", tmp_path / "out", only=["all_methods_table", "overview_methods"], dpi=COARSE)
    assert len(done.made) == 2
    for end in ("md", "tex", "csv"):
        text = (tmp_path / "out" / "tables" / f"all_methods_table.{end}").read_text()
        assert "trained on VisA)" in text and ("‖" in text or r"\Vert" in text)


def test_a_damaged_run_takes_no_figure_with_it(tmp_path, capsys):
    folder = Folder(tmp_path / "runs")
    views = folder.views("dma_sap")
    study = folder.study(*STUDIES[0])
    half = folder.training("ssvp", 0)
    folder.training("dma_sap", 0), folder.views("crane")
    (views / "views" / "dma_sap" / "views.npz").write_bytes(b"PK\x03\x04 cut off")
    (study / "ablation.csv").write_text("variant\n")
    (half / "run.json").write_text(json.dumps(dict(status="running")))
    assert (
        main(["figures", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--dpi", str(COARSE)]) == 1
    )  # one could have been drawn, and was not
    said = capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "1 made in" in said
        and re.search(r"dma_sap_fig09_qualitative .*\n  .*holds no views", said)
        and re.search(r"dma_sap_table7_ablation .*\n  it could not be rendered \(KeyError", said)
    )
    assert f"{half.relative_to(tmp_path / 'runs').as_posix()} (run.json says running)" in text


# --------------------------------------------------------------------------------------------------------------------------------- index


def test_the_index_says_what_made_what(drawn, whole, tmp_path):
    out, done, _ = drawn
    text = (out / "README.md").read_text()
    assert text.startswith("# Ours\n\nA line of our own.\n") and text.count(BEGIN) == text.count(END) == 1
    assert all(f"**{i.name}**" in text for i in plan() if i.name not in NEVER) and all(
        (out / link).is_file()
        for link in re.findall(r"\]\(((?!\.\.)[\w./]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    )
    assert "/somewhere" not in text + (out / "runs.csv").read_text() and str(whole) not in text
    row = next(line for line in text.splitlines() if line.startswith("| **ssvp_fig07_gamma**"))
    hashes = {
        p.parent.name[:8] for p in whole.glob("*/*/run.json") if "gamma = 0.2" in (p.parent / "result.json").read_text()
    }
    assert (
        "[ablation](../nbs/experiments/ablation.ipynb)" in row
        and "size 64" in row
        and "synthetic-2-target" in row
        and len(hashes) == 1
        and hashes.pop() in row
    )
    used = pd.read_csv(out / "runs.csv", dtype=str)
    assert set(used["source"]) == {"5ource"} and used.loc[used["figure"] == "dma_sap_fig05_loss", "seed"].tolist() == [
        "0",
        "1",
    ]
    (out / "README.md").write_text("before\n" + text.replace("| figure |", "| edited |") + "behind\n")
    write_index(done)
    assert (
        out / "README.md"
    ).read_text() == "before\n" + text + "behind\n"  # between its marks all is written anew, outside nothing
    (out / "README.md").write_text(text)


# ---------------------------------------------------------------------------------------------------------------- one reader of runs


def test_collect_is_read_runs(whole):
    from zsad_nb.runs.run import collect

    pd.testing.assert_frame_equal(collect(whole), read_runs(whole))
    table = read_runs(whole)
    assert (
        len(table) == 11 * 4
        and table["size"].unique().tolist() == [64]
        and set(table["hash"]) == {p.split("/")[-1] for p in table["path"]}
    )


# ------------------------------------------------------------------------------------------------------------------------- the notebooks


def execute(notebook, out, **parameters):
    "A notebook's cells in this process: a kernel takes longer than the run."
    space = {}
    for cell in read_notebook(ROOT / "nbs" / "experiments" / f"{notebook}.ipynb")["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], notebook, "exec"), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(parameters, output=str(out))


def test_the_notebooks_leave_what_the_figures_need(tmp_path):
    "Not an imitation: an ablation and views, made by the notebooks, drawn by the command."
    small = dict(size=64, images=1)
    execute(
        "ablation",
        tmp_path / "runs" / "a",
        **small,
        epochs=1,
        seeds=[0],
        variants=["A", "B"],
        options=dict(clip_weights="random:0", dino_weights="random:0"),
    )
    execute(
        "qualitative",
        tmp_path / "runs" / "q",
        **small,
        method="dapo",
        peer="self_distance",
        categories=["nut", "fan"],
        options=dict(clip_weights="random:0"),
    )
    done = build(
        tmp_path / "runs",
        tmp_path / "out",
        only=["dma_sap_fig06", "dma_sap_fig10", "dma_sap_table7", "dapo_qualitative", "dapo_types"],
        dpi=COARSE,
    )
    assert not done.missing and len(done.made) == 5
    assert (tmp_path / "out" / "tables" / "dma_sap_table7_ablation.csv").read_text().count("\n") == 3
