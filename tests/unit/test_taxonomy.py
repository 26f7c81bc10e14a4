"The table of defect types: counts and lists of the specification, labels of whole data sets, conflicts, several labels, unknown labels, own words, packaging."

import warnings
from importlib.resources import files

import pandas as pd
import pytest

from zsad_nb.data.index import GOOD, make_index
from zsad_nb.data.taxonomy import (
    USES,
    binary_words,
    check_types,
    concepts,
    index_types,
    label_types,
    novel_types,
    plain,
    product_types,
    taxonomy,
    type_of,
    type_words,
    typed,
)
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.synthetic.categories import SETS
from zsad_nb.synthetic.defects_pretraining import DEFECTS
from zsad_nb.synthetic.versions import defects

# the folders of MVTec AD, product by product
MVTEC = {
    "bottle": "broken_large broken_small contamination",
    "cable": (
        "bent_wire cable_swap combined cut_inner_insulation cut_outer_insulation missing_cable missing_wire"
        " poke_insulation"
    ),
    "capsule": "crack faulty_imprint poke scratch squeeze",
    "carpet": "color cut hole metal_contamination thread",
    "grid": "bent broken glue metal_contamination thread",
    "hazelnut": "crack cut hole print",
    "leather": "color cut fold glue poke",
    "metal_nut": "bent color flip scratch",
    "pill": "color combined contamination crack faulty_imprint pill_type scratch",
    "screw": "manipulated_front scratch_head scratch_neck thread_side thread_top",
    "tile": "crack glue_strip gray_stroke oil rough",
    "toothbrush": "defective",
    "transistor": "bent_lead cut_lead damaged_case misplaced",
    "wood": "color combined hole liquid scratch",
    "zipper": "broken_teeth combined fabric_border fabric_interior rough split_teeth squeezed_teeth",
}


def row(dataset, category, number, defect, split="test"):
    return dict(
        dataset=dataset,
        category=category,
        split=split,
        image=f"{category}/{number}.png",
        anomalous=defect != GOOD,
        defect=defect,
    )


def test_shape_of_the_table():
    table = taxonomy()
    counts = table[table["type"].ne("")].groupby("dataset")["type"].nunique()
    assert counts[["mvtec", "visa", "mpdd", "mad_real", "mad_sim", "real_iad"]].tolist() == [20, 18, 7, 2, 3, 8]
    assert not table.duplicated(["dataset", "category", "label", "use"]).any()
    for dataset, rows in table[table["type"].ne("")].groupby("dataset"):
        ids = rows.groupby("type")[["id", "train_word", "test_word", "concept"]].nunique()
        assert (ids == 1).all().all(), dataset  # one number, word and concept a type
        assert sorted(rows["id"].astype(int).unique()) == list(range(1, rows["type"].nunique() + 1)), dataset
        for use in USES:
            check_types(type_words(dataset, use), type_words(dataset, use).values())  # words that make prompts
    assert set(table["use"]) == {"", "train", "test"}


def test_packaged_as_data():
    for name in ("taxonomy.csv", "taxonomy_products.csv"):
        file = files("zsad_nb") / "assets" / name
        assert file.is_file() and file.read_text().endswith("\n") and b"\r" not in file.read_bytes()


def test_mvtec_folders_make_the_products_lists():
    "Every folder has a type, and the types of a product's folders are its public list."
    assert len({f for text in MVTEC.values() for f in text.split()}) == taxonomy("mvtec")["label"].nunique() == 48
    for category, text in MVTEC.items():
        assert {type_of("mvtec", f, category) for f in text.split()} == set(product_types("mvtec", category)), category
    trained = {type_of("mvtec", f, c, "train") for c, text in MVTEC.items() for f in text.split()}
    assert trained == set(type_words("mvtec", "train"))


def test_words_of_the_specification():
    train = type_words("mvtec", "train")
    test = type_words("mvtec", "test")
    assert (
        list(train)
        == list(test)
        == (
            "bent,broken,color,combined,contamination,crack,cut,fabric,faulty"
            " imprint,glue,hole,missing,poke,rough,scratch,squeeze,thread,liquid,misplaced,damaged"
        ).split(",")
    )
    assert {t: w for t, w in train.items() if t != w} == dict(
        color="discoloration",
        combined="compound",
        glue="gluing",
        poke="puncture",
        squeeze="compressed",
        thread="threading",
        misplaced="misaligned",
        damaged="wear",
    )
    assert all(t == w for t, w in test.items())
    assert [t for t, w in type_words("visa").items() if t != w] == ["weird wick"] and "partical" in type_words("visa")
    assert binary_words("real_iad") == ["hole", "deformed", "scratch", "damage", "missing parts", "contamination"]
    assert (binary_words("mad_real"), binary_words("mad_sim")) == (
        ["stains", "missing"],
        ["missing", "stains", "burrs"],
    )


def test_conflict_is_marked():
    rows = taxonomy("mvtec").query("label == 'manipulated_front'")
    assert (
        dict(zip(rows["use"], rows["type"])) == dict(train="bent", test="fabric")
        and rows["note"].str.startswith("conflict").all()
        and set(rows["category"]) == {"screw"}
    )
    with pytest.raises(ValueError, match="no label 'manipulated_front'"):
        type_of("mvtec", "manipulated_front", "bottle")


def test_visa_labels():
    index = make_index(
        [
            row("visa", "candle", 0, GOOD),
            row("visa", "candle", 1, "chunk of wax missing"),
            row("visa", "candle", 2, "weird candle wick,extra wax in candle"),
            row("visa", "pcb1", 0, "scratch"),
            row("visa", "pcb1", 1, "scratch,dirt"),
            row("visa", "pcb1", 2, "leak"),
            row("visa", "pcb1", 3, ""),
        ],
        "root",
    )
    with pytest.warns(UserWarning, match="4 of 6 anomalous images"):
        kept = typed(index)
    assert kept["defect"].tolist() == [GOOD, "missing", "scratch"] and kept.attrs["root"] == index.attrs["root"]
    with pytest.warns(UserWarning, match="2 of 6"):
        kept = typed(index, multi_label="first")
    assert kept["defect"].tolist() == [GOOD, "missing", "weird wick", "scratch", "scratch"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert typed(kept)["defect"].tolist() == kept["defect"].tolist()  # translating twice changes nothing
    assert list(index_types(index)) == list(type_words("visa"))  # the whole list, whatever occurs


@pytest.mark.parametrize("which", SETS)
def test_synthetic_sets(which, tmp_path):
    assert type_words(f"synthetic-{which}") == {n: DEFECTS[n].words.removeprefix("a ") for n in defects(which)}
    index = synthetic_index(tmp_path, which, 32, normal=1, defective=1)
    assert label_types(index).tolist() == index["defect"].tolist()


def test_every_label_is_read_in_any_spelling():
    for r in taxonomy().itertuples():
        use = r.use or "test"
        for label in (r.label, r.label.upper(), f" {r.label.replace(' ', '_')}"):
            assert type_of(r.dataset, label, r.category, use) == r.type, r


def test_unlisted_data_set_speaks_for_itself():
    index = make_index(
        [row("screws", "m4", 0, GOOD), row("screws", "m4", 1, "Thread_Torn"), row("screws", "m4", 2, "no-head")], "root"
    )
    assert label_types(index).tolist() == [GOOD, "thread torn", "no head"] and index_types(index) == {
        "no head": "no head",
        "thread torn": "thread torn",
    }
    both = pd.concat([index, make_index([row("mpdd", "tubes", 0, "flattening")], "root")], ignore_index=True)
    assert list(index_types(both)) == ["no head", "thread torn", *type_words("mpdd")]


def test_unknown_labels_are_errors():
    for rules, expected in ((dict(unknown="own"), "dust"), (dict(unknown="drop"), "")):
        assert type_of("mpdd", "dust", **rules) == expected
    with pytest.raises(ValueError, match="mpdd has no label 'dust'.*unknown='own'"):
        type_of("mpdd", "dust")
    with pytest.raises(ValueError, match="unknown='x'"):
        type_of("mpdd", "hole", unknown="x")
    with pytest.raises(ValueError, match="multi_label='x'"):
        type_of("mpdd", "hole", multi_label="x")
    with pytest.raises(ValueError, match="use='x'"):
        type_of("mpdd", "hole", use="x")
    with pytest.raises(ValueError, match="no data set 'mvtec ad'"):
        type_words("mvtec ad")


def test_novel_types():
    assert len(novel_types("visa", ["mvtec"])) == 9 and len(novel_types("mpdd", ["mvtec"])) == 4
    assert novel_types("mvtec", ["mvtec/bottle"]) == [] and novel_types("mvtec", []) == list(type_words("mvtec"))
    assert "color" in novel_types("mvtec", ["visa"]) and "contamination" not in novel_types("mvtec", ["visa"])
    assert novel_types("screws", ["mvtec"], ["crack", "rust"]) == ["rust"] and concepts("screws") == {}


@pytest.mark.parametrize(
    "types,why",
    [
        ([], "no types"),
        ([" "], "is no word"),
        (["a", 3], "is no word"),
        (["dent", "Dent"], "'dent' occurs twice"),
        ("dent", "with brackets"),
        (["normal"], "no defect"),
    ],
)
def test_own_words_that_cannot_work(types, why):
    with pytest.raises(ValueError, match=why):
        check_types(types)


def test_own_words():
    assert check_types(["Bent_Pin", "no head"], ["bent  pin", "Missing head"]) == (
        ("bent pin", "no head"),
        ("bent pin", "missing head"),
    )
    assert plain("A_b-c  d") == "a b c d"
