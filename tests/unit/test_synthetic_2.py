"Version 2 of the synthetic benchmark: split renderers, strengths, pairs, names; nothing of the target in the pretraining."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad_nb.data.taxonomy import novel_types, type_words
from zsad_nb.synthetic.benchmark import render, synthetic_index
from zsad_nb.synthetic.categories import CATEGORIES, SETS, TEXTURES
from zsad_nb.synthetic.datasets import load_dataset
from zsad_nb.synthetic.defects_pretraining import DEFECTS
from zsad_nb.synthetic.shapes import object_preview
from zsad_nb.synthetic.spots import STRENGTHS
from zsad_nb.synthetic.versions import ALL_DEFECTS, SYNTHETIC_SETS, categories, defects, synthetic_name

EXPERIMENTS = Path(__file__).parents[2] / "nbs" / "experiments"
TRAINED_ON = [n for n in SYNTHETIC_SETS if n.startswith("synthetic-2")]


def some_categories(which: str, number: int, count: int = 2) -> list[str]:
    "Others for every defect, so that all are rendered somewhere"
    names = categories(which, version=2)
    return [names[(number * 5 + k * 7) % len(names)] for k in range(count)]


PAIRS = [
    (name, defect)
    for which in ("auxiliary", "target")
    for k, defect in enumerate(defects(which, 2))
    for name in some_categories(which, k)
]


def test_no_renderer_and_no_category_in_two_sets():
    shown = {which: [ALL_DEFECTS[d].render for d in defects(which, 2)] for which in SETS}
    assert len({f for fs in shown.values() for f in fs}) == sum(map(len, shown.values())) == len(ALL_DEFECTS)
    names = {which: categories(which, version=2) for which in SETS}
    assert sorted(sum(names.values(), [])) == sorted(CATEGORIES)
    for which, least in (("pretrain", 40), ("auxiliary", 15), ("target", 12)):
        assert len(names[which]) >= least and all(categories(which, kind, 2) for kind in ("texture", "object"))
    assert not set(defects("auxiliary", 2) + defects("target", 2)) & set(DEFECTS)
    assert names["pretrain"] == categories("pretrain")  # version 1 shows the towers the same


def source_of(notebook: str) -> str:
    cells = json.loads((EXPERIMENTS / f"{notebook}.ipynb").read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_the_towers_see_neither_the_renderers_nor_a_mask():
    "Their notebooks render the pretraining categories with the defects of version 1, and use masks only after training"
    clip = source_of("pretrain_tiny_clip")
    dino = source_of("pretrain_tiny")
    names = {}
    start = clip.index("NAMES = dict(")
    exec(clip[start : clip.index("\nnames = ", start)], names)
    assert set(names["NAMES"]) == set(DEFECTS)
    training, after = clip.split("def see(array)")
    assert ".mask" not in training and ".mask" in after
    for text in (clip, dino):
        assert 'categories("pretrain")' in text and "auxiliary" not in text and '"target"' not in text
        assert "ALL_DEFECTS" not in text and "version=2" not in text
    assert "render(names[i % len(names)], 10_000 + i, 256)" in dino  # flawless, all of them


@pytest.mark.parametrize("name, defect", PAIRS)
def test_masks_are_exact_at_every_strength(name, defect):
    "Outside the mask the pair is equal, inside it differs; the stronger, the more"
    clean = render(name, 900, 96).image.astype(int)
    changes = []
    for strength in STRENGTHS:
        spoilt = render(name, 900, 96, defect, strength)
        change = np.abs(spoilt.image - clean).max(2)
        assert spoilt.mask.any() and not change[~spoilt.mask].any()
        assert (change[spoilt.mask] > 4).mean() > 0.5
        assert spoilt.mask.mean() < 0.16
        changes.append(int(change.sum()))
    assert changes[0] < changes[1] < changes[2]


def test_the_size_does_not_matter():
    for name, defect in PAIRS[::9]:
        small, large = (render(name, 4, size, defect).mask for size in (96, 192))
        assert abs(small.mean() - large.mean()) < 0.02


@pytest.mark.slow
def test_pairs_on_disk(tmp_path):
    index = synthetic_index(tmp_path, "target", 32, normal=12, defective=12, version=2)
    assert set(index["dataset"]) == {"synthetic-2-target"} and set(index["category"]) == set(
        categories("target", version=2)
    )
    bad = index[index["anomalous"]]
    assert set(bad["defect"]) == set(defects("target", 2))
    for row in bad.iloc[::11].itertuples():
        number = row.image.rsplit("/", 1)[-1]
        spoilt, clean = (
            np.array(Image.open(tmp_path / image)) for image in (row.image, f"{row.category}/test/good/{number}")
        )
        mask = np.array(Image.open(tmp_path / row.mask)) > 0
        assert np.array_equal(spoilt[~mask], clean[~mask]) and not np.array_equal(spoilt, clean)


def test_the_auxiliary_set_shows_all_strengths(tmp_path, monkeypatch):
    from zsad_nb.synthetic import benchmark as synthetic

    asked = []
    monkeypatch.setattr(
        synthetic,
        "render",
        lambda name, seed, size, kind, power: asked.append((kind, power)) or render(name, seed, 32, kind, power),
    )
    synthetic_index(tmp_path, "auxiliary", 32, normal=0, defective=6, version=2)
    assert {power for kind, power in asked if kind != "good"} == set(STRENGTHS)


def test_names(tmp_path):
    weak = load_dataset("synthetic-2-target-weak", tmp_path / "weak", size=32, normal=1, defective=1)
    middle = load_dataset("synthetic-2-target", tmp_path / "middle", size=32, normal=1, defective=1)
    assert set(weak["dataset"]) == {"synthetic-2-target-weak"} and list(weak["image"]) == list(middle["image"])
    with pytest.raises(ValueError, match="other parameters"):
        load_dataset("synthetic-2-target-strong", tmp_path / "weak", size=32, normal=1, defective=1)
    with pytest.raises(ValueError, match="no synthetic set 'synthetic-3-target'"):
        load_dataset("synthetic-3-target", tmp_path / "none")
    with pytest.raises(ValueError, match="no strength 'huge'"):
        render("nut", 0, 32, "burn", "huge")
    with pytest.raises(ValueError, match="only the target set of version 2"):
        synthetic_name("target", 1, "weak")
    with pytest.raises(ValueError, match="no version 3"):
        categories("target", version=3)


@pytest.mark.parametrize("name", TRAINED_ON)
def test_the_taxonomy_knows_them(name):
    row = SYNTHETIC_SETS[name]
    assert type_words(name) == {d: ALL_DEFECTS[d].words.removeprefix("a ") for d in defects(row.which, 2)}


def test_most_types_of_the_target_are_novel():
    novel = novel_types("synthetic-2-target", ["synthetic-2-auxiliary"])
    assert novel == ["blister", "burn", "corrosion", "liquid", "puncture", "shatter", "slip", "thread"]


def test_a_preview_needs_an_object():
    with pytest.raises(ValueError, match="no outline"):
        object_preview(next(iter(TEXTURES.values())), 0, size=32)
