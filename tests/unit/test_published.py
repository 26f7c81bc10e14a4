"Published numbers: every cell of the specification's tables, every number of its prose, sources and slips said, averages that do not follow from their rows."

import re
from importlib.resources import files

import pandas as pd
import pytest

from zsad_nb.data.readers import READERS
from zsad_nb.evaluation.published import (
    DATASET_NAMES,
    METHOD_NAMES,
    METRIC_NAMES,
    NOT_COMPARABLE,
    PUBLISHED_COLUMNS,
    SOURCES,
    TRANSDUCTIVE,
    averages,
    published,
    reference,
)

DATA = {
    "MVTec": "mvtec",
    "MVTec-AD": "mvtec",
    "VisA": "visa",
    "MPDD": "mpdd",
    "BTAD": "btad",
    "KSDD": "ksdd",
    "KSDD2": "ksdd2",
    "DAGM": "dagm",
    "DTD": "dtd",
    "DTD-Syn": "dtd",
    "DTD-Synthetic": "dtd",
    "RSDD": "rsdd",
    "mean": "mean",
}
METHODS = {v: k for k, v in METHOD_NAMES.items()} | {"VisualAD CLIP": "visualad", "VisualAD DINOv2": "visualad"}
OTHER = {
    "milliseconds_per_image",
    "parameters_million",
    "tir_fg",
    "scd_normal",
    "scd_abnormal",
    "gain_image",
    "gain_novel_types",
    "true_negatives",
    "false_positives",
    "false_negatives",
    "true_positives",
    "false_positive_rate",
    "recall",
}


@pytest.fixture(scope="module")
def specs(shared):
    folder = shared / "specs"
    missing = [n for n in ("published_numbers", "ssvp", "visualad", "dapo") if not (folder / f"{n}.md").is_file()]
    if missing:
        pytest.skip(
            f"the specifications {', '.join(missing)} are not in {folder}; set ZSAD_SHARED to compare with their text"
        )
    text = {
        n: (folder / f"{n}.md").read_text(encoding="utf-8") for n in ("published_numbers", "ssvp", "visualad", "dapo")
    }
    text["ssvp"] = text["ssvp"].split("## 6. Results")[1].split("\n## 7.")[0]
    text["visualad"] = text["visualad"].split("## 9. Results")[1].split("\n## 10.")[0]
    text["dapo"] = text["dapo"].split("## 11. Results recovered")[1].split("\n## 12.")[0]
    return text


def cells(text, heading):
    "(row, column, text) of the first Markdown table below a heading, without bold."
    lines = text[text.index(heading) :].split("\n")
    found = []
    for line in lines[1:]:
        if line.startswith("|"):
            found.append([c.strip().replace("**", "") for c in line.strip("| ").split("|")])
        elif found:
            break
    head, _, *body = found
    return [(row[0], name, cell) for row in body for name, cell in zip(head[1:], row[1:])]


def value(paper, table, dataset, method, metric, category="mean", variant=""):
    rows = published(paper, dataset, method, metric)
    rows = rows[(rows["table"] == table) & (rows["category"] == category) & (rows["variant"] == variant)]
    assert len(rows) == 1, (paper, table, dataset, method, metric, category, variant, len(rows))
    return rows["value"].iloc[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "metrics"),
    [
        ("Image (AUROC / AP / F1-max)", ["image_auroc", "image_ap", "image_f1max"]),
        ("Pixel (AUROC / AUPRO / F1-max)", ["pixel_auroc", "pixel_aupro_200", "pixel_f1max"]),
    ],
)
def test_every_cell_of_the_dma_sap_tables(specs, heading, metrics):
    compared = 0
    for row, column, cell in cells(specs["published_numbers"], heading):
        printed = re.findall(r"\d+\.\d", cell.split("(")[0])
        assert len(printed) == 3
        for metric, number in zip(metrics, printed):
            assert value("dma_sap", "1-6", DATA[row], METHODS[column], metric) == float(number), (row, column, metric)
            compared += 1
    assert compared == 8 * 6 * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "metrics"),
    [
        ("### Table 1 image level", ["image_auroc", "image_f1max", "image_ap"]),
        ("### Table 1 pixel level", ["pixel_auroc", "pixel_aupro_200", "pixel_ap"]),
    ],
)
def test_every_cell_of_ssvps_table_1(specs, heading, metrics):
    found = cells(specs["ssvp"], heading)
    for row, column, cell in found:
        assert [value("ssvp", "1", DATA[row], METHODS[column], m) for m in metrics] == [
            float(v) for v in cell.split()
        ], (row, column)
    assert len(found) == 7 * 6


def test_every_cell_of_ssvps_classes_and_components(specs):
    found = cells(specs["ssvp"], "### Table 2")
    for row, column, cell in found:
        assert [
            value("ssvp", "2", "mvtec", METHODS[column], m, row.replace(" ", "_"))
            for m in ("image_auroc", "pixel_auroc")
        ] == [float(v) for v in cell.split("/")], (row, column)
    assert len(found) == 16 * 5
    for row, column, cell in cells(specs["ssvp"], "### Table 3"):
        if column not in "IP":
            continue
        rows = published("ssvp", "mvtec", "ssvp", "image_auroc" if column == "I" else "pixel_auroc")
        rows = rows[(rows["table"] == "3") & (rows["variant"] == row.split()[0])]
        assert rows[["value", "std"]].to_numpy().tolist() == [[float(v) for v in cell.split("±")]]


@pytest.mark.parametrize(
    ("heading", "metrics", "sets"),
    [
        ("Image level, AUROC / F1-max / AP [R]", ["image_auroc", "image_f1max", "image_ap"], 6),
        (
            "Pixel level, AUROC / F1-max / AP / PRO [R]",
            ["pixel_auroc", "pixel_f1max", "pixel_ap", "pixel_aupro_200"],
            4,
        ),
    ],
)
def test_every_cell_of_visualads_tables(specs, heading, metrics, sets):
    found = cells(specs["visualad"], heading)
    for row, column, cell in found:
        assert [
            value("visualad", "README", DATA[row], METHODS[column], m, variant="DINOv2" if "DINO" in column else "")
            for m in metrics
        ] == [float(v) for v in cell.split("/")], (row, column)
    assert len(found) == sets * 6


def test_no_number_of_the_prose_is_left_out(specs):
    "Every decimal number of the results' text is a value, a deviation or said in a note; those that are differences of others are listed."
    table = published()
    known = (
        set(table["value"])
        | set(table["std"].dropna())
        | {float(n) for note in table["note"] for n in re.findall(r"\d+\.\d+", note)}
    )
    derived = dict(
        published_numbers={0.9, 3.1, 0.5, 0.2, 1.1, 1.7, 3.3, 5.1, 5.2},
        ssvp={0.7, 0.2, 0.0, 1.0, 90.61},
        visualad={2.0},
        dapo=set(),
    )  # differences, section numbers, versions
    assert 6.8 in known and 86.2 in known  # slips are said in notes
    for name, text in specs.items():
        text = re.sub(r"20\d\d-\d\d|§§? ?[\d.]+|Eq\. \d+|\b0\.…|γ swept.*|γ=0\.5", " ", text)
        numbers = {float(n) for n in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text)}
        assert len(numbers) > 3
        left = sorted(numbers - known - derived[name])
        if name == "ssvp":
            left = [
                n
                for n in left
                if n not in (0.0992, 28.88, 0.0099, 0.77, 0.0282, 2.16, 0.70, 0.95, 0.05, 0.85, 0.2, 1.6)
            ]
        assert not left, (name, left)


def test_numbers_of_the_prose_stand_where_they_belong():
    "By hand, from the specification's sentences."
    for (method, data, metric, paper), number in {
        ("winclip", "visa", "image_f1max", "winclip"): 79.0,
        ("winclip", "mvtec", "pixel_f1max", "winclip"): 31.65,
        ("winclip", "visa", "image_ap", "anomalyclip"): 81.2,
        ("winclip", "visa", "pixel_aupro_200", "zqhang"): 51.0,
        ("winclip", "mvtec", "image_auroc", "caoyunkang"): 70.2,
        ("winclip", "ksdd", "image_auroc", "adaclip"): 93.3,
        ("anomalyclip", "tn3k", "pixel_aupro_200", "anomalyclip"): 50.4,
        ("anomalyclip", "covid19", "image_ap", "anomalyclip"): 58.7,
        ("adaclip", "br35h", "image_f1max", "adaclip"): 92.4,
        ("crane", "dagm", "image_auroc", "crane"): 99.2,
        ("crane", "btad", "pixel_f1max", "crane"): 56.9,
        ("crane_plus", "isic", "pixel_aupro_200", "crane"): 83.2,
        ("april_gan", "dtd", "image_ap", "crane"): 94.6,
        ("april_gan", "dtd", "image_ap", "anomalyclip"): 95.0,
        ("april_gan", "btad", "pixel_aupro_200", "anomalyclip"): 25.0,
        ("anovl", "mpdd", "image_auroc", "anomaly_ov"): 68.9,
        ("bayes_pfl", "visa", "image_ap", "bayes_pfl"): 89.2,
        ("aa_clip", "kvasir", "pixel_ap", "aa_clip"): 55.77,
        ("visualad", "his", "image_auroc", "visualad"): 60.1,
        ("anomalyclip", "ksdd", "image_auroc", "faprompt"): 98.4,
    }.items():
        assert reference(method, data, metric, paper=paper).value == number, (method, data, metric, paper)


def test_shape_of_the_table():
    table = published()
    assert list(table.columns) == PUBLISHED_COLUMNS and len(table) > 1300
    assert not table.duplicated(["paper", "table", "dataset", "category", "method", "variant", "metric"]).any()
    unpublished = {"pixel_aupro", "pixel_spro", "pixel_spro@0.3"}  # exact, and of no paper that is here
    assert set(table["source"]) == set(SOURCES) and set(table["metric"]) == set(METRIC_NAMES) - unpublished | OTHER
    assert set(table["dataset"]) - {"mean", "all", "asic"} <= set(READERS) and set(DATASET_NAMES) - {"mean"} <= set(
        READERS
    )
    assert set(table["method"]) | set(TRANSDUCTIVE) <= set(METHOD_NAMES) and set(NOT_COMPARABLE) <= set(DATASET_NAMES)
    assert table.loc[table["metric"].isin(METRIC_NAMES), "value"].between(0, 100).all()
    mvtec = set(table.loc[(table["dataset"] == "mvtec") & (table["category"] != "mean"), "category"])
    assert mvtec == set(READERS["mvtec"].categories)
    own = table[table["source"] == "own"]
    assert (
        own["paper"] == own["method"].replace({"crane_plus": "crane"})
    ).all()  # nobody measures "own" numbers of others
    assert table.loc[table["dataset"] == "ksdd", "note"].str.contains("not comparable").all()


def test_packaged_as_data():
    file = files("zsad_nb") / "assets" / "published.csv"
    text = file.read_bytes()
    assert (
        text.endswith(b"\n")
        and b"\r" not in text
        and pd.read_csv(str(file), nrows=3).columns.tolist() == PUBLISHED_COLUMNS
    )


def test_filters():
    assert set(published(metric=["image_auroc", "image_ap"], method="winclip")["metric"]) == {"image_auroc", "image_ap"}
    assert published("dma_sap", "mvtec", "anovl", "pixel_auroc")["value"].tolist() == [90.6]
    assert published("dapo", "visa").empty  # both exist, not together
    for wrong in (dict(paper="dma-sap"), dict(dataset="mvtek"), dict(method="winklip"), dict(metric="image_auc")):
        with pytest.raises(ValueError, match=rf"has {next(iter(wrong))} '.*did you mean"):
            published(**wrong)
    changed = published("ssvp")
    changed["value"] = 0.0
    assert published("ssvp")["value"].gt(0).all()  # a caller cannot spoil the table


def test_reference_prefers_the_own_paper_and_never_a_variant():
    assert [
        reference("winclip", "visa", "image_f1max").value,
        reference("winclip", "visa", "image_f1max", paper="dma_sap").value,
    ] == [79.0, 80.7]
    assert reference("dma_sap", "mvtec", "image_auroc").value == 94.8  # Table 1, not the 94.7 of the ablation
    assert (
        reference("ssvp", "mvtec", "pixel_auroc").value == 92.2
        and reference("visualad", "mvtec", "pixel_aupro_200").value == 87.5
    )
    assert reference("adaclip", "mvtec", "pixel_aupro_200").paper == "dma_sap"  # its paper has none
    assert (
        reference("crane_plus", "visa", "pixel_auroc").paper == "crane"
        and reference("crane_plus", "visa", "pixel_auroc", paper="visualad") is None
    )


def test_averages_that_do_not_follow_from_their_rows():
    every = averages(every=True)
    wrong = averages()
    assert len(every) == 36 + 12 + 2 + 10 and (every.loc[every["dataset"] == "mean", "rows"] == 7).all()
    assert {(r.paper, r.method, r.metric, r.printed, round(r.recomputed, 2)) for r in wrong.itertuples()} == {
        ("dma_sap", "anomalyclip", "image_f1max", 87.2, 86.24),
        ("dma_sap", "adaclip", "pixel_aupro_200", 50.1, 50.16),
        ("crane", "crane", "image_ap", 93.7, 93.76),
        ("ssvp", "adaclip", "image_auroc", 90.7, 90.61),
    }
    assert wrong.loc[wrong["verdict"] == "does not follow from the rows", "method"].tolist() == [
        "anomalyclip"
    ]  # the others are within rounding of the rows
    assert (
        every.set_index(["paper", "method", "metric"]).loc[("dma_sap", "anovl", "pixel_f1max"), "verdict"] == "agrees"
    )  # with 46.8, not with the printed 6.8
    assert published("dma_sap", "mean", "anomalyclip", "image_f1max")["note"].iloc[0] == "slip: the rows give 86.2"
