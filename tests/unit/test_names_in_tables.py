"Names come back from every table as the text they were, no spreadsheet runs them, and no page, LaTeX or Markdown takes them for mark-up; a finished run is never lost for its names."

import contextlib
import csv
import dataclasses
import io
import json
import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsad_nb.cli.commands import main
from zsad_nb.core.tables import read_table, spreadsheet_safe, table_text, write_table
from zsad_nb.evaluation.evaluate import Evaluation, cases, put_together, require_categories, target_set
from zsad_nb.evaluation.metrics import pixel_metrics
from zsad_nb.evaluation.multi_type import TypeEvaluation
from zsad_nb.evaluation.results import read_runs
from zsad_nb.evaluation.study import ordering, summary
from zsad_nb.evaluation.tables import Cell, Table, html_text, markdown_text, results_table, tex
from zsad_nb.evaluation.variants_table import variants_table
from zsad_nb.evaluation.views import Views
from zsad_nb.inspection.journal import Journal, _seal, read_sealed_csv
from zsad_nb.inspection.verdicts import COLUMNS, COUNTS, NUMBERS, table_of
from zsad_nb.runs.run import collect

WORDS = [
    "NA",
    "None",
    "null",
    "nan",
    "NaN",
    "N/A",
    "inf",
    "True",
    "007",
    "1e5",
    "-1",
    "+1",
    "0.10",
    " x ",
    " ",
    "category",
    "Mean",
    "MEAN",
    "seed",
]
FORMULAS = [
    "=1+1",
    '=HYPERLINK("http://x","y")',
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "'=1",
    "''=1",
    "\t=1",
    "\r=1",
    "-",
    "\uff1d1",
]
MARKUP = [
    "a\rb",
    "a\r\nb",
    "a\nb",
    "a,b",
    "a;b",
    'a"b',
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "$\\foo$",
    "a|b",
    "`a`",
    "[a](javascript:x)",
    "**a**",
    "_a_",
    "a_b",
    "C:\\new",
    "#1",
    "50 %",
    "a&b",
    "&lt;",
    "{a}",
    "a~b^c",
    "瓶子",
    "한국어",
    "e\u0301",
    "\u202egnp",
    "--",
    "1. x",
    "- x",
]
NAMES = [*WORDS, *FORMULAS, *MARKUP]
DANGEROUS = tuple("=+-@\t\r\n")


def evaluation(categories, defect="d") -> Evaluation:
    "Two images a category: what `evaluate` puts together, without a model."
    rows = [
        dict(
            dataset="s",
            category=c,
            split="test",
            image=f"{n}-{k}.png",
            mask="",
            anomalous=bool(k),
            defect=defect if k else "good",
        )
        for n, c in enumerate(categories)
        for k in (0, 1)
    ]
    test = pd.DataFrame(rows)
    rng = np.random.default_rng(0)
    found = {
        c: (
            [dict(image=f"{n}-{k}.png", score=rng.random(), map_low=0.0, map_high=1.0, pixel_ap=0.5) for k in (0, 1)],
            pixel_metrics(rng.random((1, 8, 8)), np.eye(8, dtype=bool)[None], block=2**10),
        )
        for n, c in enumerate(categories)
    }
    return put_together(target_set(test), found, [])


def leave(folder: Path, ev: Evaluation, record=None, **more) -> Path:
    "A run's folder."
    ev.save(folder)
    (folder / "result.json").write_text(
        json.dumps(
            dict(
                notebook="evaluate",
                method="m",
                data="d",
                seed=0,
                **ev.mean.dropna().drop(["normal", "anomalous"]).to_dict(),
            )
            | more
        )
    )
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def cells(path: Path) -> list[str]:
    "Every cell of a CSV, as a spreadsheet reads it."
    return [cell for row in csv.reader(io.StringIO(path.read_bytes().decode(), newline="")) for cell in row]


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def no_formula(path: Path):
    "No cell that a spreadsheet would run; numbers stay numbers."
    assert [cell for cell in cells(path) if cell.startswith(DANGEROUS) and not is_number(cell)] == []


# ------------------------------------------------------------------------------------------------------------------- evaluations


def test_categories_come_back_from_every_file_of_an_evaluation(tmp_path):
    ev = evaluation(NAMES, "=d")
    ev.save(tmp_path)
    metrics = read_table(tmp_path / "metrics.csv", numbers="rest", text=["category"])
    assert metrics["category"].tolist() == [*NAMES, "mean"]
    pd.testing.assert_frame_equal(
        metrics.set_index("category"), ev.per_class, check_dtype=False, check_index_type=False, check_exact=True
    )
    scores = read_table(
        tmp_path / "scores.csv", numbers=("position", "anomalous", "score", "pixel_ap", "map_low", "map_high")
    )
    assert scores["category"].tolist() == ev.per_image["category"].tolist() and set(scores["defect"]) == {"=d", "good"}
    assert (
        scores["score"].tolist() == ev.per_image["score"].tolist()
        and scores["anomalous"].tolist() == ev.per_image["anomalous"].tolist()
    )
    assert len(cases(ev)) == 4 * len(NAMES) and set(cases(ev)["category"]) == set(NAMES)
    for name in ("metrics", "scores", "reasons"):
        no_formula(tmp_path / f"{name}.csv")
        assert (
            len(pd.read_csv(tmp_path / f"{name}.csv"))
            == {"metrics": len(NAMES) + 1, "scores": 2 * len(NAMES), "reasons": len(ev.reasons)}[name]
        )


@pytest.mark.slow
def test_names_come_back_from_runs_and_their_collections(tmp_path):
    leave(tmp_path / "runs" / "one", evaluation(NAMES))
    runs = read_runs(tmp_path / "runs")
    assert runs["category"].tolist() == [*NAMES, "mean"] and runs.attrs["skipped"] == []
    table = results_table(runs, rows="category", data="d")
    assert set(table.rows) == {*NAMES, "mean"} and len(table.rows) == len(NAMES) + 1
    for file in ("all.csv", "all.parquet"):
        written = write_table(collect(tmp_path / "runs"), tmp_path / file, csv_fallback=True)
        assert read_table(written)["category"].tolist() == [*NAMES, "mean"]
    no_formula(tmp_path / "all.csv")
    raw = pd.read_csv(tmp_path / "all.csv", keep_default_na=False)
    assert len(raw) == len(NAMES) + 1 and raw["image_auroc"].tolist() == runs["image_auroc"].tolist()


@pytest.fixture(scope="module")
def small() -> Evaluation:
    return evaluation(["c"])


@pytest.mark.parametrize("name", [*WORDS, *FORMULAS, "a\rb", 'a"b', "<b>", "a|b", "../../a", "a/b", "瓶子"])
def test_a_method_and_a_data_set_may_be_called_so(tmp_path, name, small):
    leave(tmp_path / "a", small, method=name, data=name)
    leave(tmp_path / "b", small, method="other", data=name)
    runs = read_runs(tmp_path)
    assert set(runs["method"]) == {name, "other"} and set(runs["data"]) == {name} and not runs.attrs["skipped"]
    table = results_table(runs)
    back = read_table(table.save(tmp_path / "out", name, ["csv"])[0])
    assert back["data set"].tolist()[0] == name and name in back.columns
    assert all(path.parent == tmp_path / "out" for path in table.save(tmp_path / "out", name))
    for path in table.save(tmp_path / "out", name, ["csv", "numbers"]):
        no_formula(path)


def test_collect_on_standard_output_is_the_same_table(tmp_path, capsys):
    leave(tmp_path / "runs" / "one", evaluation(NAMES))
    assert main(["collect", str(tmp_path / "runs")]) == 0
    (tmp_path / "out.csv").write_bytes(capsys.readouterr().out.encode())
    no_formula(tmp_path / "out.csv")
    assert read_table(tmp_path / "out.csv")["category"].tolist() == [*NAMES, "mean"]


def test_what_earlier_versions_wrote_is_read(tmp_path):
    "pandas' own CSV: a metric just above 1, names that look like nothing."
    table = pd.DataFrame(
        {
            "normal": [1.0, 1.0, 2.0],
            "anomalous": 1.0,
            "image_auroc": [0.25, 0.75, 0.5],
            "pixel_aupro": [1.0000000000000002, -1e-17, 0.5],
        },
        index=pd.Index(["NA", "007", "mean"], name="category"),
    )
    tmp_path.joinpath("old").mkdir()
    table.to_csv(tmp_path / "old" / "metrics.csv")
    (tmp_path / "old" / "result.json").write_text(json.dumps(dict(method="m", data="d", seed=0, pixel_aupro=0.5)))
    runs = read_runs(tmp_path)
    assert (
        runs["category"].tolist() == ["NA", "007", "mean"]
        and runs["pixel_aupro"].tolist() == [1.0, 0.0, 0.5]
        and runs["image_auroc"].tolist() == [0.25, 0.75, 0.5]
    )


@pytest.mark.parametrize(
    "column, value",
    [("image_auroc", "1.1"), ("pixel_aupro", "-0.001"), ("image_auroc", "inf"), ("image_auroc", "high")],
)
def test_what_is_no_fraction_is_still_named_and_left_out(tmp_path, column, value):
    leave(tmp_path / "bad", evaluation(["c"]))
    table = read_table(tmp_path / "bad" / "metrics.csv")
    table.loc[0, column] = value
    write_table(table, tmp_path / "bad" / "metrics.csv")
    ((path, why),) = read_runs(tmp_path).attrs["skipped"]
    assert path == "bad" and "no fractions of 1" in why and column in why and str(tmp_path) not in why


SPEC = dict(notebook="evaluate.ipynb", experiment="e", parameters={})
ODD = {
    "parameters named as columns": dict(
        record=dict(
            status="done",
            spec=dict(SPEC, parameters=dict(category="x", image_auroc=7, normal="NA", seen=True, path="=1")),
        )
    ),
    "parameters of any kind": dict(
        record=dict(
            status="done",
            spec=dict(SPEC, parameters=dict(a=[1, {"b": None}], c={"d": "=1"}, e=None, f="\udcff", g=True)),
        )
    ),
    "odd backbones": dict(backbones=["a"], frozen=7),
    "a seed as text": dict(seed="0"),
    "a seed as a float": dict(seed=0.0),
    "a number as a name": dict(method=7, data=1.5),
    "nothing trained on": dict(trained_on=None, seen=None),
    "a mean that is an integer": dict(pixel_auroc=1),
    "unknown fields": dict(category="x", seen_by=5, metrics=[1]),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_field_loses_no_run(tmp_path, kind):
    leave(tmp_path / "odd", evaluation(["a", "b"]), **ODD[kind])
    leave(tmp_path / "good", evaluation(["a", "b"]), method="other")
    runs = read_runs(tmp_path)
    assert runs.attrs["skipped"] == [] and len(runs) == 6 and list(runs["category"]) == ["a", "b", "mean"] * 2
    assert runs.columns.is_unique and set(runs["seed"]) == {0}
    for file in ("t.csv", "t.parquet"):
        assert len(read_table(write_table(runs, tmp_path / file, csv_fallback=True))) == 6
    no_formula(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "more, why",
    [
        (dict(seen=5), "seen 5, which is no list of names"),
        (dict(seen=[["a"]]), "no list of names"),
        (dict(trained_on="visa"), "no list of names"),
        (dict(seed=None), "seed null"),
        (dict(seed="x"), "no whole number"),
        (dict(seed=1.5), "no whole number"),
        (dict(seed=[0]), "no whole number"),
        (dict(seed=True), "no whole number"),
        (dict(method=None), "method null"),
        (dict(data=["d"]), "is no name"),
        (dict(method=""), "is no name"),
    ],
)
def test_a_field_that_marks_or_names_rows_is_not_guessed(tmp_path, more, why):
    leave(tmp_path / "odd", evaluation(["a"]), **more)
    leave(tmp_path / "good", evaluation(["a"]))
    runs = read_runs(tmp_path)
    ((path, said),) = runs.attrs["skipped"]
    assert path == "odd" and why in said and set(runs["path"]) == {"good"}


def test_two_rows_of_one_name_take_only_their_run(tmp_path):
    leave(tmp_path / "good", evaluation(["a", "b"]))
    leave(tmp_path / "bad", evaluation(["a", "b"]))
    file = tmp_path / "bad" / "metrics.csv"
    file.write_text(file.read_text().replace("\nb,", "\na,"))
    runs = read_runs(tmp_path)
    assert (
        [path for path, _ in runs.attrs["skipped"]] == ["bad"]
        and "'a' twice" in runs.attrs["skipped"][0][1]
        and len(results_table(runs).rows) == 1
    )


def test_names_that_no_table_could_keep_apart_are_refused_at_the_start():
    rows = pd.DataFrame(
        [dict(dataset="s", category="mean", split="test", image="a.png", mask="", anomalous=False, defect="good")]
    )
    for category, why in (
        ("mean", "called 'mean'"),
        ("", "has no category"),
        (None, "has no category"),
        (float("nan"), "has no category"),
    ):
        with pytest.raises(ValueError, match=why):
            require_categories(rows.assign(category=[category]))
    with pytest.raises(ValueError, match="several data sets"):
        require_categories(pd.concat([rows.assign(category="a"), rows.assign(category="a", dataset="t")]))
    runs = pd.DataFrame([dict(method="m", data="mean", seed=0, category="mean", image_auroc=0.5)])
    with pytest.raises(ValueError, match="a data set is called 'mean'"):
        results_table(runs, "image_auroc")


# ------------------------------------------------------------------------------------------------------------- types, views, studies


def test_types_come_back(tmp_path):
    types = [name for name in NAMES if name != "normal"] + ["truth", "truth_"]
    per_type = pd.DataFrame(
        dict(
            choice="filtered",
            category="NA",
            type=types,
            pixels=1,
            auroc=0.5,
            ap=0.5,
            f1=0.5,
            precision=0.5,
            recall=np.nan,
            reason="=x",
            novel=False,
        )
    )
    per_image = pd.DataFrame(dict(image="a.png", category="NA", type=types, said_filtered=types[::-1]))
    product = pd.DataFrame([dict(choice="filtered", category="NA", types=1, images=1, pixels=1, auroc=0.5)])
    confusion = pd.DataFrame(np.arange(len(types) ** 2).reshape(len(types), -1), index=types, columns=types)
    TypeEvaluation(product, per_type, per_image, dict(filtered=confusion)).save(tmp_path)
    assert read_table(tmp_path / "types.csv")["type"].tolist() == types and read_table(tmp_path / "types_products.csv")[
        "category"
    ].tolist() == ["NA"]
    said = read_table(tmp_path / "types_images.csv")
    assert said["said_filtered"].tolist() == types[::-1] and len(
        pd.crosstab(said["type"], said["said_filtered"])
    ) == len(types)
    file = tmp_path / "types_confusion_filtered.csv"
    first = read_table(file).columns[0]
    back = read_table(file, numbers="rest", text=[first]).set_index(first)
    assert (
        back.index.tolist() == types
        and back.columns.tolist() == types
        and (back.to_numpy() == confusion.to_numpy()).all()
    )
    for path in tmp_path.glob("*.csv"):
        no_formula(path)


def test_views_come_back(tmp_path):
    n = len(NAMES)
    rows = pd.DataFrame(
        dict(
            image=[f"{k}.png" for k in range(n)],
            has_mask=True,
            score=np.linspace(-1, 1, n),
            type=NAMES,
            guess=NAMES[::-1],
            dataset="NA",
            category=NAMES,
            defect=["", *NAMES[1:]],
            anomalous=True,
            area=[np.nan] + [0.5] * (n - 1),
            low=0.1 + 0.2,
            high=1.0,
        )
    )
    views = Views(
        rows, np.zeros((n, 2, 2, 3), np.uint8), np.zeros((n, 2, 2), bool), np.zeros((n, 2, 2), np.float32), tuple(NAMES)
    )
    views.save(tmp_path)
    back = Views.read(tmp_path)
    pd.testing.assert_frame_equal(back.rows, rows, check_dtype=False, check_exact=True)
    assert back.types == tuple(NAMES)
    no_formula(tmp_path / "views.csv")


def test_studies_come_back(tmp_path, monkeypatch):
    "A second call takes what the first one left, to the last digit."
    import zsad_nb.evaluation.study as module

    made = []
    names = [*WORDS[:9], *FORMULAS[:6]]

    class Small:
        def backbones(self):
            return {}

    def repetition(self, changes, seed, *rest):
        made.append(seed)
        return pd.DataFrame(
            [
                dict(
                    category=c,
                    **{m: np.random.default_rng(seed).random() for m in module.METRICS},
                    stage="trained",
                    seconds=0.5,
                )
                for c in [*names, "mean"]
            ]
        )

    monkeypatch.setattr(module._Study, "repetition", repetition)
    monkeypatch.setattr(module, "create", lambda *a, **k: Small())
    monkeypatch.setattr(module, "recipe_of", lambda *a, **k: _Recipe())
    monkeypatch.setattr(module, "fingerprint", lambda index: "x")
    variants = {name: dict(a=k) for k, name in enumerate(names)}

    def call():
        return module.study(
            "m",
            variants,
            pd.DataFrame(),
            pd.DataFrame(),
            (0, 1),
            out=tmp_path,
            progress=False,
            recipe=dict(x=float("nan")),
        )

    first = call()
    second = call()
    assert len(made) == 2 * len(names)
    pd.testing.assert_frame_equal(first, second, check_dtype=False, check_exact=True)
    assert (
        summary(second).index.tolist() == names and len(ordering(second, dict.fromkeys(names, 1.0))) == len(names) - 1
    )
    assert set(variants_table(second[second["category"] == "mean"], ["image_auroc"]).rows) == set(names)
    for path in tmp_path.glob("*.csv"):
        no_formula(path)
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@dataclasses.dataclass
class _Recipe:
    x: float = 0.0


# ----------------------------------------------------------------------------------------------------------------------- journals

ROWS = [
    dict(
        path=name,
        category=name,
        decision="score only",
        score=-0.1 - k,
        threshold=None,
        comparable=1e-7,
        peak=0.5,
        regions=0,
        area=0,
        boxes="[]",
        type=name,
        types="{}",
        width=4,
        height=4,
        scale=1.0,
        duplicate_of="",
        error=name,
        picture="",
        content="c",
        settings="s",
    )
    for k, name in enumerate([*NAMES, "caf\udce9.png", "-dash/-1.png"])
]


def test_a_journal_keeps_its_rows(tmp_path):
    journal = Journal(tmp_path / "r.sqlite", COLUMNS)
    for row in ROWS:
        journal.append(row)
    again = Journal(tmp_path / "r.sqlite", COLUMNS)
    assert (again.rows, again.dropped) == (journal.rows, 0) and [row["path"] for row in again.rows[:-2]] == NAMES
    journal.rewrite(journal.rows)
    assert Journal(tmp_path / "r.sqlite", COLUMNS).rows == again.rows
    assert table_of(again.rows)["score"].tolist() == [row["score"] for row in ROWS]
    write_table(table_of(again.rows), tmp_path / "r.csv")
    raw = pd.read_csv(tmp_path / "r.csv", keep_default_na=False)
    assert len(raw) == len(ROWS) and list(raw) == [*COLUMNS]
    for column in ("path", "category", "type", "error"):
        assert not [cell for cell in raw[column] if str(cell).startswith(DANGEROUS)], column
    assert raw["score"].tolist() == [row["score"] for row in ROWS]
    back = read_table(tmp_path / "r.csv", numbers=(*NUMBERS, *COUNTS))
    assert back["path"].tolist() == [row["path"] for row in again.rows]
    parquet = pd.read_parquet(write_table(table_of(again.rows), tmp_path / "r.parquet"))
    assert parquet["path"].tolist() == [row["path"] for row in again.rows]


any_rows = st.lists(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
        | st.sampled_from(FORMULAS + MARKUP + ["", "\x00", "'"]),
        min_size=2,
        max_size=2,
    ),
    max_size=4,
)


@pytest.mark.slow
@given(any_rows)
def test_any_text_comes_back_from_a_journal(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.sqlite"
    path.unlink(missing_ok=True)
    journal = Journal(path, ["a", "b"])
    for a, b in rows:
        journal.append(dict(a=a, b=b))
    again = Journal(path, ["a", "b"])
    assert [[row["a"], row["b"]] for row in again.rows] == rows and again.dropped == 0


def sealed(path, heading, rows, shield):
    "A journal as earlier versions wrote it."
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow([*heading, "seal"])
    for fields in rows:
        writer.writerow([*(shield(name, field) for name, field in zip(heading, fields)), _seal(fields)])
    path.write_bytes(text.getvalue().encode())


@given(any_rows)
def test_any_text_comes_back_from_a_journal_of_earlier_versions(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    sealed(path, ["a", "b"], rows, lambda name, field: spreadsheet_safe(field))
    back, dropped = read_sealed_csv(path, ["a", "b"])
    assert [[row["a"], row["b"]] for row in back] == rows and dropped == 0


@pytest.mark.parametrize("shielded", [False, True])
def test_journals_of_earlier_versions_are_believed(tmp_path, shielded):
    "Fields as they were, sealed as they were; the earliest versions shielded nothing from spreadsheets."
    fields = [["=1", "-0.5"], ["'=x", "1"], ["a,b", "2"], ["NA", ""]]

    def shield(name, field):
        return spreadsheet_safe(field) if shielded and name == "name" else field

    sealed(tmp_path / "old.csv", ["name", "score"], fields, shield)
    rows, dropped = read_sealed_csv(tmp_path / "old.csv", ["name", "score"], ["score"])
    assert [[row["name"], row["score"]] for row in rows] == fields and dropped == 0


def test_a_row_that_was_changed_is_not_believed(tmp_path):
    sealed(
        tmp_path / "r.csv",
        ["name", "score"],
        [["=1", "0.5"], ["b", "0.5"]],
        lambda name, field: spreadsheet_safe(field),
    )
    text = (tmp_path / "r.csv").read_text()
    (tmp_path / "r.csv").write_text(text.replace("'=1", "''=1").replace('"b","0.5"', '"b","0.6"'))
    assert read_sealed_csv(tmp_path / "r.csv", ["name", "score"], ["score"]) == ([], 2)
    journal = Journal(tmp_path / "r.sqlite", ["name", "score"])
    for name in ("=1", "b"):
        journal.append(dict(name=name, score=0.5))
    with contextlib.closing(sqlite3.connect(tmp_path / "r.sqlite")) as connection, connection:
        connection.execute("UPDATE rows SET name = '+' || name")
    again = Journal(tmp_path / "r.sqlite", ["name", "score"])
    assert (again.rows, again.dropped) == ([], 2)


# ------------------------------------------------------------------------------------------------------------- Parquet, other tables


@pytest.mark.parametrize(
    "values",
    [
        ["a", 1, None],
        [True, 0.5],
        ["\udcff", "b"],
        [[1], {"a": 2}],
        ["=1", 2],
        [None, None],
        [1, 2.5],
        [np.float32(1), None],
    ],
)
def test_columns_of_several_kinds_are_written_to_parquet(tmp_path, values):
    table = pd.DataFrame({"x": pd.Series(values, dtype=object), "n": range(len(values))})
    table.attrs = dict(root=Path("/x"))
    back = pd.read_parquet(write_table(table, tmp_path / "t.parquet"))
    assert len(back) == len(values) and back["n"].tolist() == list(range(len(values)))
    shown = [None if value is None else str(value).replace("\udcff", "\\udcff") for value in values]
    assert [None if value is None or value != value else str(value) for value in back["x"]] in (
        shown,
        [None if v is None else str(float(v)) for v in values if v is None or isinstance(v, (int, float, np.number))],
    )


@given(st.data())
def test_tables_of_results_come_back(data):
    "Digits and names of any table that is written."
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    values = data.draw(st.lists(st.floats(allow_nan=False), min_size=len(names), max_size=len(names)))
    text = table_text(pd.DataFrame(dict(name=names, value=values)))
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [float(row[1]) for row in rows[1:]] == values


# ---------------------------------------------------------------------------------------------------------------- pages and papers


class Page(HTMLParser):
    "Tags and text of a page."

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


def table_with(name: str) -> Table:
    return Table(
        name,
        [name, "mean"],
        [(name, name), ("b", "")],
        [[Cell([(name, True), ("1.0", False)], "†"), Cell([(name, False)])]] * 2,
        pd.DataFrame(dict(row=[name], method=name, mean=1.0)),
        name,
        [name, f"see {name}"],
    )


@pytest.mark.parametrize("name", MARKUP + FORMULAS + WORDS)
def test_html_shows_names_and_runs_none(name):
    page = Page(table_with(name)._repr_html_())
    assert not {"script", "img", "a"} & set(page.tags) and page.handlers == []
    assert "".join(page.words).count(html_seen(name)) >= 7


def html_seen(name: str) -> str:
    from zsad_nb.core.names import shown

    return shown(name)


@pytest.mark.parametrize("name", MARKUP + FORMULAS + WORDS)
def test_markdown_keeps_its_cells(name):
    lines = table_with(name).markdown().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 4 for row in rows), rows
    assert sum(line.startswith("- ") for line in lines) == 2 and len(lines) == 2 + 4 + 1 + 2
    assert "<" not in table_with(name).markdown()


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("a_b", "a_b"),
        ("_a_", r"\_a\_"),
        ("**a**", r"\*\*a\*\*"),
        ("a|b", r"a\|b"),
        ("`a`", r"\`a\`"),
        ("[a](b)", r"\[a\](b)"),
        ("<b>", "&lt;b&gt;"),
        ("&amp;", "&amp;amp;"),
        ("a & b", "a & b"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("84.6 ± 0.1", "84.6 ± 0.1"),
        ("$x$", r"\$x\$"),
        ("C:\\new", r"C:\\new"),
        ("a\nb", r"a\\nb"),
        ("~~a~~", r"\~\~a\~\~"),
    ],
)
def test_markdown_of_a_name(text, escaped):
    assert markdown_text(text) == escaped


@pytest.mark.parametrize("name", MARKUP + FORMULAS + WORDS)
def test_latex_has_no_command_of_a_name(name):
    text = table_with(name).latex(f"tab:{name}")
    for known in (
        r"\\textsuperscript\{\$\\dagger\$\}",
        r"\\text\w+\{\}",
        r"\\label\{tab:[A-Za-z0-9:.-]*\}",
        r"\$[<>-]\$",
        r"\{\\ttfamily\\char34\}",
        r"\{[\[*]\}",
        r"\\[&%$#_{}]",
        r"\\cmidrule\(lr\)\{[\d-]+\}",
    ):
        text = re.sub(known, "", text)
    assert not re.search(r"[%#~^_$\"`|<>\[](?!t\])", text), text
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= {
        "begin",
        "end",
        "centering",
        "footnotesize",
        "caption",
        "toprule",
        "midrule",
        "bottomrule",
        "multicolumn",
        "textbf",
        "par",
        "smallskip",
        "raggedright",
        "scriptsize",
    }
    assert text.count("{") == text.count("}") and "--" not in text and not re.search(r"\\\\\s*[\[*]", text)


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("--", "-{}-"),
        ("---", "-{}-{}-"),
        ("''", "'{}'"),
        ("a|b", r"a\textbar{}b"),
        ('"', r"{\ttfamily\char34}"),
        ("[x", "{[}x"),
        ("*x", "{*}x"),
        ("瓶", "瓶"),
        ("a\rb", r"a\textbackslash{}rb"),
    ],
)
def test_latex_of_a_name(text, escaped):
    assert tex(text) == escaped


@pytest.mark.slow
@given(st.text(max_size=20))
def test_any_text_is_inert_in_html(text):
    page = Page(f'<p title="{html_text(text)}">{html_text(text)}</p>')
    assert page.tags == ["p"] and "".join(page.words) == html_seen(text)
