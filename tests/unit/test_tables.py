"From runs' folders to tables and bars: broken runs named, seeds aggregated with n - 1, bold, marks, missing cells, published values, LaTeX that is balanced and escaped, the experiment notebook."

import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from zsad_nb.core.tables import read_table
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.published import METRIC_NAMES, PROTOCOLS, published
from zsad_nb.evaluation.results import read_runs
from zsad_nb.evaluation.tables import DASH, Cell, Table, results_table, tex
from zsad_nb.figures.bars import bar_figure, render_bars
from zsad_nb.figures.style import COLUMN, bar_colours

METRICS = [m for m in METRIC_NAMES]


def training_of(method, data):
    "What the papers train a method on before they test it on a data set."
    if method in ("winclip", "anovl", "self_distance"):
        return []
    first, second = PROTOCOLS.get(method, PROTOCOLS["dma_sap"])
    return [second if data == first else first]


def leave_scores(folder: Path, classes: str, seed: int, noise: float = 0.0):
    "Results of twelve images a class, equally hard for every run but for `noise`: without it any two different means are told apart."
    bad = np.arange(12) >= 6
    rows = []
    for name in classes:
        hard = np.random.default_rng(ord(name)).normal(size=12) + bad
        rows.append(
            pd.DataFrame(
                dict(
                    image=[f"{name}/{k:02}.png" for k in range(12)],
                    category=name,
                    anomalous=bad,
                    score=hard + noise * np.random.default_rng([seed, ord(name)]).normal(size=12),
                )
            )
        )
    pd.concat(rows).to_csv(folder / "scores.csv", index=False)


def leave(folder: Path, method="winclip", data="mvtec", seed=0, values=(0.9, 0.8), seen=(), noise=0.0, **more):
    "A run's folder as `evaluate` leaves it; `values` is every metric of the classes a, b, ...; noise=None leaves no results of single images"
    table = pd.DataFrame(
        {m: values for m in METRICS},
        index=pd.Index([chr(97 + i) for i in range(len(values))], name="category"),
        dtype=float,
    )
    table.loc["mean"] = table.mean()
    table.insert(0, "anomalous", 3.0)
    table.insert(0, "normal", 4.0)
    folder.mkdir(parents=True)
    table.to_csv(folder / "metrics.csv")
    mean = {m: v for m, v in table.loc["mean", METRICS].items() if v == v}
    if noise is not None:
        leave_scores(folder, "abcdefgh"[: len(values)], len(str(folder)) + seed, noise)
    more = dict(dict(trained_on=training_of(method, data)), **more)
    (folder / "result.json").write_text(
        json.dumps(
            dict(
                notebook="evaluate",
                method=method,
                checkpoint="",
                data=data,
                seed=seed,
                seen=list(seen),
                frozen={},
                **mean,
                **more,
            )
        )
    )
    return folder


def at(table, row, method, metric="image_auroc"):
    return table.numbers.set_index(["row", "method", "metric"]).loc[(row, method, metric)]


def legend(table, start):
    return next((n for n in table.notes if n.startswith(start)), None)


# ------------------------------------------------------------------------------------------------------------------------------ reading


def test_reads_what_evaluate_leaves(tmp_path):
    "The real thing, not an imitation of its files."
    from zsad_nb.methods.base import create
    from zsad_nb.synthetic.benchmark import synthetic_index

    index = synthetic_index(tmp_path / "data", "target", 64, 1, 1)
    index = index.loc[index["category"].isin(sorted(index["category"].unique())[:2])]
    index.attrs["root"] = tmp_path / "data"
    evaluation = evaluate(create("self_distance", weights="random:0", image_size=64, tap=1), index, progress=False)
    evaluation.save(tmp_path / "runs" / "deep" / "one")
    (tmp_path / "runs" / "deep" / "one" / "result.json").write_text(
        json.dumps(
            dict(
                notebook="evaluate",
                method="self_distance",
                data="synthetic-target",
                seed=0,
                seen=[],
                **evaluation.mean.dropna(),
            )
        )
    )
    runs = read_runs(tmp_path / "runs")
    assert (
        runs.attrs["skipped"] == []
        and list(runs["category"]) == [*sorted(index["category"].unique()), "mean"]
        and set(runs["path"]) == {"deep/one"}
    )
    assert results_table(runs).numbers["mean"].iloc[0] == pytest.approx(100 * evaluation.mean["image_auroc"], abs=1e-9)


BROKEN = {
    "cut": (
        lambda f: (f / "result.json").write_text((f / "result.json").read_text()[:40]),
        "result.json cannot be read",
    ),
    "binary": (lambda f: (f / "result.json").write_bytes(b"\xff\x00\x12"), "result.json cannot be read"),
    "list": (lambda f: (f / "result.json").write_text("[1, 2]"), "not an object"),
    "unfinished": (lambda f: (f / "result.json").unlink(), "did not finish"),
    "no metrics": (lambda f: (f / "metrics.csv").unlink(), "without metrics.csv"),
    "no seed": (lambda f: (f / "result.json").write_text('{"method": "x", "data": "y"}'), "has no seed"),
    "cut table": (
        lambda f: (f / "metrics.csv").write_text("".join((f / "metrics.csv").read_text().splitlines(True)[:-1])),
        "cut off",
    ),
    "empty table": (lambda f: (f / "metrics.csv").write_text(""), "metrics.csv cannot be read"),
    "percent": (
        lambda f: (f / "metrics.csv").write_text((f / "metrics.csv").read_text().replace(",0.9,", ",90.0,")),
        "no fractions of 1",
    ),
    "words": (
        lambda f: (f / "metrics.csv").write_text((f / "metrics.csv").read_text().replace(",0.9,", ",high,")),
        "no fractions of 1",
    ),
    "two runs": (
        lambda f: (f / "metrics.csv").write_text((f / "metrics.csv").read_text().replace("0.85", "0.86")),
        "disagree on the mean",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_run_is_skipped_and_named(tmp_path, kind):
    leave(tmp_path / "good", seed=1)
    spoil, reason = BROKEN[kind]
    spoil(leave(tmp_path / "sweep" / "bad", seed=2))
    runs = read_runs(tmp_path)
    ((path, said),) = runs.attrs["skipped"]
    assert path == "sweep/bad" and reason in said
    assert set(runs["seed"]) == {1} and str(tmp_path) not in said
    table = results_table(runs)
    assert "sweep/bad" in legend(table, "Skipped folders") and at(table, "mvtec", "winclip")["seeds"] == 1


def test_other_results_are_no_evaluations(tmp_path):
    leave(tmp_path / "one")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "result.json").write_text(json.dumps(dict(notebook="train", method="ssvp", steps=3)))
    runs = read_runs(tmp_path)
    assert len(runs) == 3 and runs.attrs["skipped"] == []


def test_nothing_to_show(tmp_path):
    assert read_runs(tmp_path).empty
    (tmp_path / "metrics.csv").write_text("half")
    with pytest.raises(ValueError, match="no finished evaluations.*did not finish"):
        results_table(read_runs(tmp_path))
    with pytest.raises(ValueError, match="is not a folder"):
        read_runs(tmp_path / "nowhere")


def test_repetitions_must_be_repetitions(tmp_path):
    leave(tmp_path / "a", values=(0.9, 0.8))
    leave(tmp_path / "copy", values=(0.9, 0.8))
    assert (
        at(results_table(read_runs(tmp_path)), "mvtec", "winclip")["seeds"] == 1
    )  # the same numbers twice are one run
    leave(tmp_path / "other", values=(0.9, 0.7))
    with pytest.raises(
        ValueError, match=r"winclip on mvtec with seed 0 has 2 runs with different numbers \(a, other\)"
    ):
        results_table(read_runs(tmp_path))


# -------------------------------------------------------------------------------------------------------------------------- aggregation


@pytest.fixture
def sweep(tmp_path):
    "Three methods, three data sets, three seeds; dma_sap's visa run with seed 2 is lost, winclip has one seed and no btad."
    for k, (method, level) in enumerate(dict(winclip=0.80, visualad=0.90, dma_sap=0.91).items()):
        for j, data in enumerate(("mvtec", "visa", "btad")):
            for seed in range(1 if method == "winclip" else 3):
                if (method, data, seed) == ("dma_sap", "visa", 2) or (method, data) == ("winclip", "btad"):
                    continue
                leave(
                    tmp_path / f"{method}-{data}-{seed}",
                    method,
                    data,
                    seed,
                    (level + 0.01 * seed * (k + 1) - 0.02 * j, level - 0.03),
                    ["visa/a"] if (method, data) == ("visualad", "visa") else (),
                )
    return tmp_path


def test_means_and_sample_deviations(sweep):
    table = results_table(read_runs(sweep), "image_auroc")
    values = [100 * ((0.91 + 0.03 * s) + 0.88) / 2 for s in range(3)]
    cell = at(table, "mvtec", "dma_sap")
    assert cell["mean"] == pytest.approx(statistics.mean(values), abs=1e-9) and cell["std"] == pytest.approx(
        statistics.stdev(values), abs=1e-9
    )
    assert (
        table.frame.loc["MVTec AD", "DMA+SAP"]
        == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({cell['image_std']:.1f})"
    )
    assert "±" not in table.frame.loc["MVTec AD", "WinCLIP"] and np.isnan(at(table, "mvtec", "winclip")["std"])
    assert legend(table, "Mean ± standard deviation (n - 1) over 3 seeds; fewer: WinCLIP 1, DMA+SAP on VisA 2")


def test_the_mean_row_is_a_mean_over_data_sets_seed_by_seed(sweep):
    runs = read_runs(sweep)
    table = results_table(runs, "image_auroc")
    wide = (
        runs[(runs["method"] == "dma_sap") & (runs["category"] == "mean")].pivot(
            index="seed", columns="data", values="image_auroc"
        )
        * 100
    )
    cell = at(table, "mean", "dma_sap")
    assert cell["mean"] == pytest.approx(wide.mean().mean(), abs=1e-9) and cell["seeds"] == 2
    assert cell["std"] == pytest.approx(wide.loc[[0, 1]].mean(axis=1).std(ddof=1), abs=1e-9)


@pytest.mark.slow
def test_missing_runs_are_a_dash_and_a_line(sweep):
    table = results_table(read_runs(sweep), ["image_auroc", "pixel_ap"], methods=["winclip", "ssvp", "dma_sap"])
    assert (
        table.frame.loc["BTAD", "WinCLIP"]
        == table.frame.loc["mean", "WinCLIP"]
        == table.frame.loc["MVTec AD", "SSVP"]
        == DASH
    )
    said = legend(table, DASH)
    assert (
        said
        == f"{DASH} Missing runs: WinCLIP on BTAD, SSVP on MVTec AD, SSVP on VisA, SSVP on BTAD; no mean where a row is"
        " missing."
    )
    assert legend(results_table(read_runs(sweep), methods=["visualad"]), DASH) is None


def test_undefined_is_not_missing(tmp_path):
    leave(tmp_path / "a", data="isic", values=(0.9,))
    leave(tmp_path / "b", data="visa", values=(0.7,))
    for name in ("metrics.csv",):
        table = pd.read_csv(tmp_path / "a" / name, index_col=0)
        table.loc[:, "image_auroc"] = np.nan  # no normal images
        table.to_csv(tmp_path / "a" / name)
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    del result["image_auroc"]
    (tmp_path / "a" / "result.json").write_text(json.dumps(result))
    table = results_table(read_runs(tmp_path), ["image_auroc", "pixel_auroc"])
    assert table.frame.loc["ISIC", "WinCLIP"] == "n/a / 90.0" and re.fullmatch(
        r"70\.0 \(\d+\.\d\) / 80\.0", table.frame.loc["mean", "WinCLIP"]
    )  # no pixel digests: no deviation of pixel metrics
    assert "image AUROC is undefined on ISIC" in legend(table, "n/a") and legend(table, DASH) is None


# ------------------------------------------------------------------------------------------------------------------------- bold and marks


def test_bold_is_the_best_zero_shot_value(sweep):
    table = results_table(read_runs(sweep), "image_auroc")
    bold = {(r.row, r.method) for r in table.numbers[table.numbers["best"]].itertuples()}
    assert (
        bold
        == {
            ("mvtec", "dma_sap"),
            ("visa", "dma_sap"),
        }
    )  # on BTAD and in the mean it has no competitor: WinCLIP is missing, VisualAD was trained on another set or has seen a class
    lines = table.markdown().splitlines()
    assert sum(line.count("**") for line in lines if line.startswith("|")) == 2 * 2
    for line in lines[2:]:
        if line.startswith("| MVTec"):
            assert re.fullmatch(r"\*\*\d\d\.\d ± \d\.\d \(\d+\.\d\)\*\*", line.split("|")[4].strip())


@pytest.mark.slow
def test_bold_only_where_the_best_is_told_apart(tmp_path):
    "The same means: once all methods agree on every image, once they differ more than their means do, once nothing is known of single images."

    def table(noise):
        folder = tmp_path / str(noise)
        for method, level in (("winclip", 0.80), ("crane", 0.83), ("dma_sap", 0.84)):
            for seed in range(2):
                leave(folder / f"{method}{seed}", method, "visa", seed, (level, level), noise=noise)
        return results_table(read_runs(folder), "image_auroc")

    alike = table(0.0)
    apart = table(2.0)
    unknown = table(None)
    assert (
        alike.numbers.query("best")["method"].tolist() == ["dma_sap"]
        and legend(alike, "Not told apart") is None
        and at(alike, "visa", "dma_sap")["lead_low"] == pytest.approx(1.0, abs=1e-9)
    )
    assert not apart.numbers["best"].any() and legend(
        apart, "Not told apart from the best (95 %, paired, over test images): DMA+SAP, Crane"
    )
    line = at(apart, "visa", "dma_sap")
    assert (
        line["against"] == "crane"
        and line["lead_low"] < 0 < line["lead_high"]
        and line["lead"] == pytest.approx(1.0, abs=1e-9)
    )
    assert (
        not unknown.numbers["best"].any()
        and unknown.numbers["image_std"].isna().all()
        and legend(unknown, "Nothing is bold")
    )
    assert "**8" not in apart.markdown() and r"\textbf" not in apart.latex() and "<b>" not in apart._repr_html_()


@pytest.mark.slow
def test_pixel_metrics_are_told_apart_from_their_digests(tmp_path):
    "The same pixels: a difference that is the exact metrics' alone; one image more in one run: no pair."
    from zsad_nb.evaluation.pixel_digests import pixel_digest, save_digests

    mask = np.zeros((9, 9), bool)
    mask[2:5, 3:7] = True
    for k, method in enumerate(("crane", "dma_sap")):
        home = leave(tmp_path / method, method, "visa", 0, (0.8 + 0.1 * k, 0.8 + 0.1 * k))
        maps = np.random.default_rng(0).normal(size=(24, 9, 9))
        save_digests([pixel_digest(m + mask, mask & (i % 12 >= 6)) for i, m in enumerate(maps)], home / "pixels.npz")
    table = results_table(read_runs(tmp_path), ["pixel_auroc", "pixel_aupro", "pixel_aupro_200"])
    assert table.numbers.query("best")["metric"].tolist() == [
        "pixel_auroc",
        "pixel_aupro",
    ]  # the 200 steps are not of ranks alone
    assert at(table, "visa", "crane", "pixel_auroc")["image_std"] > 0
    scores = pd.read_csv(tmp_path / "crane" / "scores.csv")
    scores.assign(image=scores["image"].str.replace("a/00", "a/99")).to_csv(
        tmp_path / "crane" / "scores.csv", index=False
    )
    assert not results_table(read_runs(tmp_path), ["pixel_auroc"]).numbers["best"].any()


@pytest.mark.slow
def test_two_trainings_of_a_method_are_two_columns(tmp_path):
    "BTAD after VisA and after MVTec AD: both are shown, named by what they were trained on; what differs from the row or the published number is marked in every format."
    leave(tmp_path / "a", "crane", "btad", values=(0.9, 0.9), trained_on=["mvtec"])
    leave(tmp_path / "b", "crane", "btad", values=(0.95, 0.95), trained_on=["visa"])
    leave(tmp_path / "c", "dma_sap", "btad", values=(0.97, 0.97), trained_on=["mvtec"])
    leave(tmp_path / "d", "winclip", "btad", values=(0.7, 0.7))
    leave(tmp_path / "e", "adaclip", "btad", values=(0.8, 0.8), trained_on=["mvtec"])
    table = results_table(
        read_runs(tmp_path), "image_auroc", published="dma_sap", methods=["winclip", "adaclip", "crane", "dma_sap"]
    )
    assert [m for m, what in table.columns if what == "ours"] == [
        "WinCLIP",
        "AdaCLIP",
        "Crane (trained on MVTec AD)",
        "Crane (trained on VisA)",
        "DMA+SAP",
    ]
    assert (
        table.frame.loc["BTAD", "Crane (trained on VisA) ours"].endswith("‖") and at(table, "btad", "dma_sap")["best"]
    )
    assert (
        table.frame.loc["BTAD", "AdaCLIP published"] == "88.6¶"
        and table.frame.loc["BTAD", "AdaCLIP difference"] == DASH
    )  # printed: trained on two sets
    assert (
        table.frame.loc["BTAD", "DMA+SAP published"] == "96.4"
        and table.frame.loc["BTAD", "DMA+SAP difference"] == "+0.6"
    )
    assert legend(table, "¶").endswith(
        "AdaCLIP on BTAD (here MVTec AD, published MVTec AD and CVC-ColonDB)."
    ) and legend(table, "‖").endswith("Crane (trained on VisA) on BTAD (VisA).")
    for text, mark in (
        (table.markdown(), "¶"),
        (table.latex(), r"\textsuperscript{\P}"),
        (table._repr_html_(), "<sup>¶</sup>"),
        (table.frame.to_csv(), "88.6¶"),
    ):
        assert mark in text
    well_formed(table.latex())
    assert (
        results_table(read_runs(tmp_path), "image_auroc", published=True, methods=["adaclip"]).frame.loc[
            "BTAD", "AdaCLIP published"
        ]
        == "88.6"
    )  # its Table 6, of the same training
    assert {t.get_text() for t in bar_figure(table, row="btad").legends[0].get_texts()} >= {
        "Crane (trained on VisA)‖",
        "AdaCLIP",
    }
    whole = json.loads((tmp_path / "c" / "result.json").read_text())
    (tmp_path / "c" / "result.json").write_text(json.dumps({k: v for k, v in whole.items() if k != "trained_on"}))
    unknown = results_table(read_runs(tmp_path), "image_auroc", published="dma_sap", methods=["dma_sap"])
    assert unknown.frame.loc["BTAD", "DMA+SAP published"] == "96.4¶" and "here an unknown set" in legend(unknown, "¶")


def test_what_is_seen_takes_no_part(tmp_path):
    for method, level, seen in (("visualad", 0.99, ["visa/a"]), ("winclip", 0.7, []), ("crane", 0.8, [])):
        leave(tmp_path / method, method, "visa", 0, (level, level), seen)
    table = results_table(read_runs(tmp_path), "image_auroc")
    assert [c.marks for c in table.cells[0]] == ["", "", "†"] and [c.parts[0][1] for c in table.cells[0]] == [
        False,
        True,
        False,
    ]
    assert legend(table, "†").endswith("VisualAD on VisA.")
    classes = results_table(read_runs(tmp_path), "image_auroc", rows="category", data="visa")
    assert [line[2].marks for line in classes.cells] == ["†", "", "†"] and classes.rows == [
        "a",
        "b",
        "mean",
    ]  # class b was not trained on; the mean holds a
    assert classes.cells[1][2].parts[0][1] and classes.cells[1][2].parts[0][0].startswith("99.0 (")


def test_transductive_runs_are_marked_and_take_no_part(tmp_path):
    for method, level, far in (("bayes_pfl", 0.99, True), ("winclip", 0.7, False), ("crane", 0.8, False)):
        leave(tmp_path / method, method, "visa", 0, (level,), transductive=far)
    table = results_table(read_runs(tmp_path), "image_auroc", published=True)
    ours, printed, _ = [c for c, (name, _) in zip(table.cells[0], table.columns) if name == "Bayes-PFL"]
    assert (ours.marks, printed.marks) == ("‡", "‡") and not ours.parts[0][1] and not printed.parts[0][1]
    assert "Bayes-PFL (scales scores by the range of the test class)" in legend(table, "‡")
    leave(tmp_path / "plain", "bayes_pfl", "btad", 0, (0.9,))  # this run says nothing of it
    assert not at(results_table(read_runs(tmp_path), "image_auroc", data="btad"), "btad", "bayes_pfl")["transductive"]


def test_ties_are_never_bold_nor_is_one_method(tmp_path):
    for method, level in (("winclip", 0.9), ("crane", 0.9), ("anovl", 0.5)):
        leave(tmp_path / method, method, "mvtec", 0, (level,))
    runs = read_runs(tmp_path)
    assert not results_table(runs, "image_auroc").numbers["best"].any()
    assert not results_table(runs, methods=["winclip"]).numbers["best"].any()


# ---------------------------------------------------------------------------------------------------------------------------- published


@pytest.mark.slow
def test_published_beside_ours(sweep):
    table = results_table(
        read_runs(sweep), "image_auroc", published="dma_sap", methods=["winclip", "visualad", "dma_sap"]
    )
    assert [what for _, what in table.columns] == ["ours", "published", "difference"] * 3
    cell = at(table, "mvtec", "dma_sap")
    assert (cell["published"], cell["paper"]) == (94.8, "dma_sap 1-6") and cell["difference"] == pytest.approx(
        cell["mean"] - 94.8, abs=1e-9
    )
    assert table.frame.loc["MVTec AD", "VisualAD published"] == DASH  # that paper prints no VisualAD
    assert at(results_table(read_runs(sweep), "image_auroc", published=True), "mvtec", "visualad")["published"] == 92.2
    mean = at(table, "mean", "dma_sap")  # over the rows of this table, not the paper's seven
    assert mean["published"] == pytest.approx((94.8 + 84.6 + 96.4) / 3, abs=1e-9) and mean[
        "difference"
    ] == pytest.approx(mean["mean"] - mean["published"], abs=1e-9)
    assert re.fullmatch(r"[+−]\d+\.\d", table.frame.loc["mean", "DMA+SAP difference"])


def test_ksdd_is_not_compared(tmp_path):
    for data, level in (("mvtec", 0.9), ("ksdd", 0.5)):
        leave(tmp_path / data, "dma_sap", data, 0, (level,))
    table = results_table(read_runs(tmp_path), "image_auroc", published=True)
    assert (
        table.frame.loc["KSDD", "DMA+SAP published"] == "98.0§"
        and table.frame.loc["KSDD", "DMA+SAP difference"] == DASH
    )
    assert at(table, "mean", "dma_sap")["difference"] == pytest.approx(90.0 - 94.8, abs=1e-9) and table.frame.loc[
        "mean", "DMA+SAP difference"
    ].endswith("§")
    assert "not comparable" in legend(table, "§") and "leaves it out" in legend(table, "§")
    assert (
        legend(results_table(read_runs(tmp_path), "image_auroc"), "§") is None
    )  # nothing published, nothing to warn of


def test_published_aupro_is_the_200_step_one(tmp_path):
    leave(tmp_path / "a", "dma_sap")
    runs = read_runs(tmp_path)
    assert (
        at(results_table(runs, "pixel_aupro_200", published=True), "mvtec", "dma_sap", "pixel_aupro_200")["published"]
        == 87.0
    )
    exact = results_table(runs, "pixel_aupro", published=True)
    assert exact.frame.iloc[0, 1] == DASH and legend(exact, "Published AUPRO")


def test_slips_are_said_where_they_are_shown(tmp_path):
    leave(tmp_path / "a", "anovl", "dtd")
    table = results_table(read_runs(tmp_path), "pixel_f1max", published=True)
    assert any("printed 6.8" in n for n in table.notes)


# --------------------------------------------------------------------------------------------------------------------------------- text


def well_formed(text):
    "What LaTeX would stop at: braces, environments, columns, special characters."
    bare = re.sub(r"\\[\\&%$#_{}]", "", text)
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        assert depth >= 0, "a brace is closed that was not opened"
    assert depth == 0, "a brace is left open"
    assert re.findall(r"\\begin\{(\w+)\}", text) == list(reversed(re.findall(r"\\end\{(\w+)\}", text)))
    assert bare.count("$") % 2 == 0 and not re.search(r"[%#~]", bare)
    assert "_" not in re.sub(r"\\label\{[^}]*\}|\\cmidrule\S*", "", bare) and "^" not in bare
    spec = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    for line in re.findall(r"^(.*)\\\\$", body, re.MULTILINE):
        spans = [int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
        assert len(re.findall(r"(?<!\\)&", line)) + sum(spans) == len(spec) - 1, line
    assert [text.count(rf"\{r}") for r in ("toprule", "bottomrule")] == [1, 1]
    assert text.isascii(), {c for c in text if not c.isascii()}


@pytest.mark.slow
def test_latex(sweep, tmp_path):
    runs = read_runs(sweep)
    for options in (
        dict(),
        dict(published=True),
        dict(rows="category", data="visa"),
        dict(metrics="pixel_aupro_200", published="dma_sap", caption="50 % of a_b & c"),
    ):
        well_formed(results_table(runs, **options).latex())
    odd = runs.assign(method=runs["method"].replace({"winclip": "mine_100%#1 {a}^~\\"}))
    text = results_table(odd, "image_auroc").latex()
    well_formed(text)
    assert r"mine\_100\%\#1 \{a\}\textasciicircum{}\textasciitilde{}\textbackslash{}" in text
    with pytest.raises(AssertionError):
        well_formed(text.replace(r"\_100", "_100"))  # the check itself can fail
    with pytest.raises(AssertionError):
        well_formed(text.replace(r"\end{tabular}", ""))
    with pytest.raises(AssertionError):
        well_formed(text.replace(" & ", " ", 1))
    assert tex("–±†‡§−") == r"--$\pm$\textsuperscript{$\dagger$}\textsuperscript{$\ddagger$}\textsuperscript{\S}$-$"


@pytest.mark.slow
def test_the_same_numbers_in_all_languages(sweep, tmp_path):
    table = results_table(read_runs(sweep), published=True)
    numbers = [re.findall(r"\d+\.\d", c.plain) for line in table.cells for c in line]
    for text in (table.markdown(), table.latex(), table._repr_html_()):
        body = (
            text.split(r"\toprule")[1].split(r"\bottomrule")[0]
            if "toprule" in text
            else (
                "\n".join(s for s in text.splitlines() if s.startswith("|"))
                if text.startswith("**")
                else text.split("<tbody>")[1].split("</tbody>")[0]
            )
        )
        assert re.findall(r"\d+\.\d", re.sub(r"id=\S+|class=\S+|row\d+", "", body)) == [
            n for cell in numbers for n in cell
        ]
    assert table.styler().to_html() == table.styler().to_html()  # no random ids in committed outputs
    assert table._repr_html_().count("<b>") == table.markdown().count("**") // 2 - 1  # all but the caption
    written = table.save(tmp_path / "out", "t")
    assert sorted(p.name for p in written) == ["t.csv", "t.html", "t.md", "t.tex", "t_numbers.csv"]
    raw = pd.read_csv(tmp_path / "out" / "t_numbers.csv")
    assert raw["mean"].tolist() == pytest.approx(table.numbers["mean"].tolist(), abs=1e-9, nan_ok=True)
    assert (
        read_table(tmp_path / "out" / "t.csv").set_index(table.corner).equals(table.frame)
    )  # differences begin with +, which a spreadsheet would run


def test_names_cannot_break_the_page():
    cell = Cell([("a|<b>", True)], "†")
    assert (cell.markdown, cell.html) == (r"**a\|&lt;b&gt;**†", "<b>a|&lt;b&gt;</b><sup>†</sup>")
    table = Table("x", ["r|s"], [("<m>", "")], [[cell]], pd.DataFrame(), "<c>", ["1 < 2"])
    assert "&lt;c&gt;" in table._repr_html_() and r"r\|s" in table.markdown() and "1 &lt; 2" in table._repr_html_()


@pytest.mark.slow
def test_collected_runs_with_lists_and_without_marks(sweep):
    "Tables of other readers: `seen` as the run's list, no column transductive."
    runs = read_runs(sweep)
    other = runs.drop(columns=["transductive", "checkpoint", "normal"]).assign(
        seen=[["visa/a"] if (m, d) == ("visualad", "visa") else [] for m, d in zip(runs["method"], runs["data"])], tap=3
    )
    assert results_table(other).frame.equals(results_table(runs).frame)


def test_user_errors(sweep):
    runs = read_runs(sweep)
    for options, said in (
        (dict(metrics="image_auc"), "unknown metric image_auc"),
        (dict(rows="seed"), "must be 'data' or 'category'"),
        (dict(rows="category"), "pass data=NAME"),
        (dict(data="mpdd"), "no run of .* on mpdd; there are runs of"),
        (dict(methods=["ssvp"]), "no run of ssvp"),
    ):
        with pytest.raises(ValueError, match=said):
            results_table(runs, **options)
    with pytest.raises(ValueError, match="the runs have no metric pixel_aupro;"):
        results_table(runs.drop(columns="pixel_aupro"), "pixel_aupro")


# --------------------------------------------------------------------------------------------------------------------------------- bars


@pytest.fixture(scope="module")
def paper():
    "The rows of the DMA+SAP paper as runs."
    rows = published("dma_sap")
    rows = rows[(rows["table"] == "1-6") & (rows["dataset"] != "mean")]
    table = (
        rows.pivot(index=["method", "dataset", "trained_on"], columns="metric", values="value")
        .div(100)
        .reset_index()
        .rename(columns={"dataset": "data"})
    )
    return table.assign(seed=0, category="mean")


def test_bars_are_the_papers_mean_row(paper):
    table = results_table(paper, ("image_auroc", "image_ap", "image_f1max"))
    bars = bar_figure(table).axes[0].containers
    printed = published("dma_sap", "mean").query("table == '1-6'").set_index(["method", "metric"])["value"]
    for container, method in zip(bars, ["winclip", "anovl", "anomalyclip", "adaclip", "crane_plus", "dma_sap"]):
        for bar, metric in zip(container, ("image_auroc", "image_ap", "image_f1max")):
            slip = (method, metric) == ("anomalyclip", "image_f1max")
            assert bar.get_height() == pytest.approx(86.2 if slip else printed[method, metric], abs=0.06)
    assert [c[0].get_facecolor() for c in bars] == bar_colours(6)


@pytest.mark.slow
def test_text_of_the_bars_does_not_overlap(paper):
    "At the width of a column every number is readable: no two labels touch, none leaves the figure."
    for metrics in (("image_auroc", "image_ap", "image_f1max"), ("pixel_auroc", "pixel_aupro_200", "pixel_f1max")):
        figure = bar_figure(results_table(paper, metrics))
        assert figure.get_figwidth() == COLUMN and 2.3 <= figure.get_figheight() < 2.5
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = figure.axes[0].texts
        boxes = [t.get_window_extent(renderer) for t in texts]
        assert len(boxes) == 18 and min(t.get_fontsize() for t in texts) >= 4.6
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        everything = [*boxes, figure.legends[0].get_window_extent(renderer)]
        assert all(
            figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and figure.bbox.y0 <= b.y0 and b.y1 <= figure.bbox.y1
            for b in everything
        )


@pytest.mark.slow
def test_files_of_the_bars(paper, tmp_path):
    files = render_bars(paper, tmp_path)
    assert [p.name for p in files] == ["bars_image.pdf", "bars_image.png", "bars_pixel.pdf", "bars_pixel.png"]
    first = [p.read_bytes() for p in files]
    time.sleep(1.1)  # no clock in the files
    assert [p.read_bytes() for p in render_bars(paper, tmp_path)] == first
    assert b"/Subtype /Image" not in first[0] and b"/FontFile2" in first[0]  # vectors and letters
    with Image.open(files[1]) as image:
        assert image.width == pytest.approx(COLUMN * 400, abs=2)


@pytest.mark.slow
def test_bars_of_one_set_and_refusals(sweep, tmp_path):
    runs = read_runs(sweep)
    assert len(render_bars(runs, tmp_path, data="btad", methods=["visualad", "dma_sap"], published=True)) == 4
    figure = bar_figure(results_table(runs, "image_auroc"))
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {
        "WinCLIP (runs missing)",
        "VisualAD†‖",
        "DMA+SAP",
        "± over seeds",
        "± over test images",
    }
    table = results_table(runs, "image_auroc", methods=["winclip"])
    with pytest.raises(ValueError, match="no method has a value .* Missing runs: WinCLIP on BTAD"):
        bar_figure(table)
    with pytest.raises(ValueError, match="no row 'mpdd'"):
        bar_figure(table, row="mpdd")
    with pytest.raises(ValueError, match="no metric pixel_ap"):
        bar_figure(table, ["pixel_ap"])


# --------------------------------------------------------------------------------------------------------------------------- the notebook


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def run(**parameters):
        papermill.execute_notebook(
            ROOT / "nbs" / "experiments" / "tables.ipynb",
            tmp_path / "out.ipynb",
            dict(parameters, output=str(tmp_path / "tables")),
            cwd=str(tmp_path),
            progress_bar=False,
            kernel_name="python3",
        )
        return tmp_path / "tables", json.loads((tmp_path / "tables" / "result.json").read_text())

    return run


@pytest.mark.slow
def test_the_notebook_with_its_defaults(notebook):
    out, result = notebook()
    assert (
        result["runs"] == 2 and result["skipped"] == [] and all((out / f).stat().st_size > 0 for f in result["files"])
    )
    assert {
        "data_image.tex",
        "data_pixel.md",
        "data_image_numbers.csv",
        "figures/bars_image.pdf",
        "figures/bars_pixel.png",
    } <= set(result["files"])
    assert set(pd.read_csv(out / "data_image_numbers.csv")["method"]) == {"winclip", "self_distance"}
    well_formed((out / "data_pixel.tex").read_text())


@pytest.mark.slow
def test_the_notebook_on_runs(notebook, sweep):
    (sweep / "dma_sap-visa-2").mkdir()
    (sweep / "dma_sap-visa-2" / "result.json").write_text("{")
    out, result = notebook(
        runs=str(sweep),
        layout="category",
        data=["visa", "mvtec"],
        metrics=["image_auroc", "pixel_aupro_200"],
        together=False,
        published="own",
        methods=["visualad", "dma_sap"],
    )
    assert result["runs"] == 2 + 9 + 8
    assert [s[0] for s in result["skipped"]] == ["dma_sap-visa-2"]
    assert {"visa_image_auroc.md", "mvtec_pixel_aupro_200.tex"} <= set(result["files"])
    assert "87.5" in (out / "mvtec_pixel_aupro_200.md").read_text()  # VisualAD's published mean over classes
    assert "dma_sap-visa-2 (result.json cannot be read" in (out / "visa_image_auroc.md").read_text()
