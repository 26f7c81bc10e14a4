"One word for a method's named parameter sets; a CLIP tower's activation and positions as parameters of every method that has one."

import dataclasses
import json

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from small_sets import bright_squares

from zsad_nb.backbones.table import BACKBONES
from zsad_nb.backbones.text import create_text
from zsad_nb.backbones.towers import create_backbone, resize_positions
from zsad_nb.backbones.weights import WeightsError
from zsad_nb.evaluation import study
from zsad_nb.methods.base import MODULES, create, describe, import_released, load, method_class, save
from zsad_nb.methods.variants import Variant

CLIPS = [
    "anomalyclip",
    "crane",
    "crane_plus",
    "dapo",
    "dma_sap",
    "ssvp",
    "winclip",
    "anovl",
    "adaclip",
    "april_gan",
    "multiads",
    "bayes_pfl",
]


def small(name, **changes):
    return create(name, **{**dict(clip_weights="random:0", image_size=48), **changes})


# ----------------------------------------------------------------------------------------------------------------------- named sets


@pytest.mark.parametrize("name", MODULES)
def test_variants_can_be_created_and_are_described(name):
    cls = method_class(name)
    table = describe(name).variants
    fields = {f.name for f in dataclasses.fields(cls.Parameters)}
    assert (
        table["variant"].tolist() == list(cls.variants)
        and table["what"].str.endswith(".").all()
        and table["variant"].is_unique
    )
    for row, variant in cls.variants.items():
        assert isinstance(variant, Variant) and set(variant) <= fields, row
        if "pretrained" not in str(variant) and not {"clip", "dino"} & set(variant):
            cls.Parameters(**variant)
    sets = [changes for rows in cls.tables().values() for changes in rows.values() if changes]
    assert all(changes in cls.variants.values() for changes in sets), "every row of every table can be had by name"


def test_two_tables_with_one_name_for_two_sets():
    class Both(method_class("self_distance")):
        readings = {"strong": Variant("More.", sigma=9.0)}
        ablations = {"full": {}, "strong": dict(sigma=8.0), "more": dict(sigma=9.0)}
        studies = {"blur": {"strong": dict(sigma=8.0), "none": dict(sigma=0.0)}}

    assert Both.variants == {"strong": dict(sigma=9.0), "ablations: strong": dict(sigma=8.0), "none": dict(sigma=0.0)}
    assert Both.variants["none"].note == "A row of the table 'blur'." and Both.variants["strong"].recipe == {}


def test_a_variant_that_looks_at_other_images_says_so():
    cls = method_class("crane_plus")
    assert not small("crane_plus").transductive and small("crane_plus", **cls.variants["released"]).transductive
    assert (
        not small("crane_plus", release_compat=True, batch_mean=False).transductive
        and small("crane_plus", batch_mean=True).transductive
    )
    marks = describe("crane_plus").variants.set_index("variant")["transductive"]
    assert (
        marks["released"] == "yes" and marks["values of the input"] == "" and "float16" in repr(describe("crane_plus"))
    )
    assert (
        create("mutual", weights="random:0").transductive
        and describe("mutual").variants["transductive"].eq("yes").all()
    )


def test_a_released_file_without_a_reader():
    with pytest.raises(WeightsError, match="winclip has no released checkpoints.*april_gan"):
        import_released(small("winclip"), "some.pth")


# ----------------------------------------------------------------------------------------------------------- activation and positions


@pytest.mark.parametrize("name", CLIPS)
def test_activation(name):
    "Both towers at once; a cache keeps the two apart."
    towers = {gelu: small(name, quick_gelu=gelu) for gelu in (True, False)}
    for gelu, model in towers.items():
        assert model.clip.quick_gelu is gelu and {
            type(b.mlp.gelu).__name__ for b in model.text.tower.transformer.resblocks
        } == {"QuickGELU" if gelu else "GELU"}
    keys = [m.encode_key() or m.graph_key() for m in towers.values()]
    assert keys[0] != keys[1]
    assert small(name, quick_gelu=None).clip.quick_gelu, "tiny-clip was trained with QuickGELU"


@pytest.mark.parametrize("name", CLIPS)
def test_position_resize(name):
    seen = {}
    for mode in ("bilinear", "bicubic", "bicubic_plain"):
        model = small(name, position_resize=mode)
        assert model.clip.row.positions == mode
        seen[mode] = model.encode_key() or model.graph_key()
    assert len({str(v) for v in seen.values()}) == 3
    with pytest.raises(ValueError, match="position_resize='cubic'; use bilinear, bicubic or bicubic_plain"):
        small(name, position_resize="cubic")


@pytest.mark.parametrize("name", CLIPS)
def test_both_parameters_have_a_source(name):
    rows = describe(name).set_index("parameter").loc[["quick_gelu", "position_resize"]]
    assert rows["source"].str.contains("code|ours").all()


@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (5, 7)])
def test_three_ways_to_resize_positions(grid):
    table = torch.randn(16, 8)
    square = table.T.view(1, 8, 4, 4)
    ways = dict(
        bilinear=dict(mode="bilinear"), bicubic=dict(mode="bicubic", antialias=True), bicubic_plain=dict(mode="bicubic")
    )
    found = {mode: resize_positions(table, grid, mode) for mode in ways}
    for mode, options in ways.items():
        assert torch.equal(found[mode], F.interpolate(square, grid, align_corners=False, **options)[0].flatten(1).T)
    assert not any(
        torch.allclose(found[a], found[b], atol=1e-3)
        for a, b in (("bilinear", "bicubic"), ("bicubic", "bicubic_plain"))
    )
    assert all(torch.equal(resize_positions(table, (4, 4), mode), table) for mode in ways)


def test_a_named_tower_can_be_told_another_activation():
    "The checkpoint's name decides unless it is told; ViT-L of OpenAI is QuickGELU, LAION's ViT-B plus is not."
    with torch.device("meta"):
        for name, own in (("clip-vitb32", True), ("clip-vitb16-plus-240", False)):
            assert create_backbone(name, "random:0").quick_gelu is own
            assert create_backbone(name, "random:0", quick_gelu=not own).quick_gelu is not own
            assert (
                type(create_text(name, "random:0").tower.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
            ) is own
            assert (
                type(create_text(name, "random:0", quick_gelu=not own).tower.transformer.resblocks[0].mlp.gelu).__name__
                == "QuickGELU"
            ) is not own
        assert create_backbone("clip-vitb32", "random:0").row == BACKBONES["clip-vitb32"]


def test_settings_a_tower_does_not_have():
    with pytest.raises(ValueError, match="tiny-dino is no CLIP: .*no activation to choose .quick_gelu=True."):
        create("visualad", weights="random:0", quick_gelu=True)
    with pytest.raises(ValueError, match="position_resize='nearest'; use"):
        create_backbone("tiny-clip", "random:0", position_resize="nearest")
    assert create("visualad", backbone="tiny-clip", weights="random:0", quick_gelu=False).backbone.quick_gelu is False


# -------------------------------------------------------------------------------------------------------------- checkpoints of before


def test_older_names_and_silent_values():
    "A checkpoint says what it was trained with; what its version could not say is what that version did."
    dapo = method_class("dapo")
    winclip = method_class("winclip")
    assert dapo.from_older(dict(clip="tiny-clip", positions="bilinear")) == dict(
        clip="tiny-clip", position_resize="bilinear"
    )
    for clip, saved, today in (
        ("tiny-clip", True, None),
        ("tiny-clip", False, False),
        ("clip-vitb16-plus-240", True, None),
        ("clip-vitb16-plus-240", False, None),
    ):
        assert winclip.from_older(dict(clip=clip, quick_gelu=saved))["quick_gelu"] is today
    new = dict(clip="clip-vitb16-plus-240", quick_gelu=True, position_resize=None)
    assert winclip.from_older(new) == new
    assert small("dapo", positions="bilinear").p.position_resize == "bilinear", "the older name still works"
    with pytest.raises(TypeError, match="position"):
        create("self_distance", weights="random:0", position="bilinear")


def test_settings_are_saved(tmp_path):
    model = small("dapo", quick_gelu=False, position_resize="bicubic_plain")
    back = load(save(model, tmp_path / "dapo.safetensors"))
    assert back.p == model.p and back.clip.quick_gelu is False and back.clip.row.positions == "bicubic_plain"


def test_a_variant_brings_its_training(monkeypatch, tmp_path):
    "Its recipe trains it, but for what was asked of all, and belongs to what a finished pair is known by."
    recipes = []

    def repetition(self, changes, seed, training, shown, files):
        recipes.append(training)
        return pd.DataFrame([dict(category="mean", stage="trained", **dict.fromkeys(study.METRICS, 0.5), seconds=0.1)])

    monkeypatch.setattr(study._Study, "repetition", repetition)
    rows = {"plain": {}, "cosine": Variant("Another schedule.", recipe=dict(schedule="cosine_steps", epochs=7))}
    index = bright_squares(tmp_path / "images", 2)
    towers = dict(clip_weights="random:0", dino_weights="random:0", image_size=48)
    study.study(
        "dma_sap",
        rows,
        index,
        index,
        seeds=(0,),
        recipe=dict(epochs=2),
        options=towers,
        out=tmp_path / "out",
        progress=False,
    )
    assert recipes == [dict(epochs=2), dict(schedule="cosine_steps", epochs=2)]
    keys = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
    assert {key["variant"]: (key["recipe"]["schedule"], key["recipe"]["epochs"]) for key in keys} == {
        "plain": ("constant", 2),
        "cosine": ("cosine_steps", 2),
    }
