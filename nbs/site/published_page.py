"""Pages of the published numbers: a table a data set, methods beside metrics; and one with every number and its source.

Columns sort by a click on their head (static/tables.js); nothing is asked of a server."""

from html import escape

import pandas as pd

from zsad_nb.evaluation.published import DATASET_NAMES, METHOD_NAMES, METRIC_NAMES, published

ORDER = [
    *("image_auroc", "image_ap", "image_f1max"),
    *("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro", "pixel_aupro_200"),
]
KEY = ["method", "variant", "trained_on", "source", "paper", "table"]
WHOLE = ["method", "variant", "dataset", "category", "metric", "value", "std", "trained_on", "training"]
WHOLE += ["source", "paper", "table", "note"]
LONG = {"note", "training"}  # columns of sentences


def named(
    names: dict,  # of the package: key -> name in a table
    key: str,
) -> str:
    "A name as tables print it."
    return str(names.get(key, key)).replace("_", " ")


def cell(
    value: float | str,
    numeric: bool,
    long: bool,
) -> str:  # HTML
    "A cell; a number has the decimals that it is printed with, one at least."
    if pd.isna(value):
        return "<td></td>"
    if numeric:
        decimals = max(1, len(f"{value:g}".partition(".")[2]))
        return f'<td class="number">{value:.{decimals}f}</td>'
    return f"<td{' class=long' * long}>{escape(str(value))}</td>"


def cells(
    table: pd.DataFrame,
    numeric: set[str],  # columns that sort by value
) -> str:  # HTML
    "A table whose columns sort."
    head = "".join(f"<th{' data-kind=number' * (c in numeric)}>{escape(str(c))}</th>" for c in table.columns)
    rows = []
    for row in table.itertuples(index=False):
        rows.append("<tr>" + "".join(cell(v, c in numeric, c in LONG) for v, c in zip(row, table.columns)) + "</tr>")
    return (
        '<div class="pst-scrollable-table-container"><table class="table sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def raw(html: str) -> str:
    "HTML in MyST."
    return f"```{{raw}} html\n{html}\n```\n"


def readable(
    table: pd.DataFrame,  # of `published`
) -> pd.DataFrame:
    "Names instead of keys."
    names = dict(method=METHOD_NAMES, dataset=DATASET_NAMES, metric=METRIC_NAMES)
    table = table.copy()
    for column, words in names.items():
        if column in table:
            table[column] = [named(words, v) for v in table[column]]
    return table.rename(columns=lambda c: c.replace("_", " "))


def of_set(
    numbers: pd.DataFrame,  # of one data set, means over its categories
) -> str:  # MyST
    "Methods beside metrics."
    wide = numbers.pivot_table(index=KEY, columns="metric", values="value", aggfunc="first", dropna=False)
    wide = wide.dropna(how="all")
    columns = [m for m in ORDER if m in wide] + sorted(m for m in wide if m not in ORDER)
    wide = wide[columns].rename(columns=lambda m: named(METRIC_NAMES, m))
    metrics = list(wide.columns)
    table = wide.reset_index()
    first = ["method"] + ["variant"] * bool((table.variant != "").any())
    table = table[[*first, *metrics, *(k for k in KEY if k not in ("method", "variant"))]]
    return raw(cells(readable(table), set(metrics)))


def front(
    numbers: pd.DataFrame,  # of `published`
) -> str:  # MyST
    "One table a data set."
    papers = numbers.paper.nunique()
    lines = [
        "# Published numbers",
        "",
        f"> {len(numbers):,} numbers of {papers} papers and repositories, as they print them.",
        "",
        "Percent, unless the [whole list](all.md) says otherwise. A click on a column's head sorts; a second click turns"
        " the order. *source* says who measured: *own* is the paper's own method, *quoted* copied from an earlier paper,"
        " *rerun* somebody else's method run by the authors, *peer* printed for comparison without its origin, *third"
        " party* quoted without the original at hand. *trained on* is the auxiliary set. How the numbers were collected"
        " and which are known slips: [the notebook](../nbs/evaluation/07_published.ipynb).",
        "",
    ]
    means = numbers[numbers.category == "mean"]
    for dataset, part in sorted(means.groupby("dataset"), key=lambda item: (-len(item[1]), item[0])):
        title = "Mean over a paper's data sets" if dataset == "mean" else named(DATASET_NAMES, dataset)
        lines += [f"## {title}", "", of_set(part)]
    return "\n".join(lines) + "\n```{toctree}\n:hidden:\n\nall.md\n```\n"


def whole(
    numbers: pd.DataFrame,  # of `published`
) -> str:  # MyST
    "Every number with its source."
    lines = [
        "# Every published number",
        "",
        "> One row a number: where it is printed, who measured, what it was trained on, and what to know about it.",
        "",
        raw(
            '<input class="table-filter" type="search" placeholder="Filter: visa pixel_auroc winclip …"'
            ' aria-label="Show only rows that contain every word">'
        ),
        raw(cells(readable(numbers[WHOLE]), {"value", "std"})),
    ]
    return "\n".join(lines)


def pages() -> dict[str, str]:  # name of the page -> MyST
    "The pages of the published numbers."
    numbers = published()
    return {"numbers/index.md": front(numbers), "numbers/all.md": whole(numbers)}
