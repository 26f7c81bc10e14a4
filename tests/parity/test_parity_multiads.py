"Every stored number of the MultiADS fixture, from the method as anybody would create it and from its released checkpoint."

import pytest
import torch
import torch.nn.functional as F
from parity_tools import Fixture, gradients, require_refused

from zsad_nb.backbones.ensembles import as_spelt, sentences
from zsad_nb.components.dapo_prompts import enlarge
from zsad_nb.data.index import GOOD, make_index
from zsad_nb.methods.base import create, describe, import_released
from zsad_nb.methods.class_range import ClassRange, stretch
from zsad_nb.methods.dapo import segment
from zsad_nb.methods.multiads import MultiADS, released_names
from zsad_nb.training.fit import recipe_of

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def case(parity_fixture, tmp_path_factory):
    return Fixture(parity_fixture, tmp_path_factory.mktemp("multiads"), "multiads")


def build(case, **changes):
    "The method with the fixture's sentences and checkpoint, told how its batches number the types."
    cfg = case.cfg
    options = dict(
        clip_taps=tuple(cfg["taps_1based"]),
        types=cfg["types"],
        phrases=cfg["states"],
        templates=cfg["templates"],
        tau=cfg["temperature"],
    )
    model = import_released(create("multiads", **{**case.towers, **options, **changes}), case.released).eval()
    rows = [
        dict(dataset="own", category=c, split="test", image=f"{c}{d}.png", anomalous=d != GOOD, defect=d)
        for c in set(cfg["train_names"])
        for d in (GOOD, *cfg["types"])
    ]
    return model.prepare(make_index(rows, "root"), training="types" not in changes)


def training_batch(case):
    "Its defects are numbered as those of the index."
    names = sorted([GOOD, *case.cfg["types"]])
    kinds = torch.tensor([names.index((GOOD, *case.cfg["types"])[k]) for k in case.tensors["in.train.types"].tolist()])
    batch = case.batch(case.tensors["in.train.batch"], case.cfg["train_names"], case.tensors["in.train.masks"])
    batch.defect = kinds
    return batch


def target_batch(case):
    return case.batch(case.tensors["in.test.batch"], case.cfg["test_names"])


@torch.no_grad()
def stages(case, model) -> dict:
    batch = training_batch(case)
    size = case.tensors["in.train.batch"].shape[-2:]
    found = {}
    for name in dict.fromkeys([*case.cfg["train_names"], *case.cfg["test_names"]]):
        said = [
            s for word in ("", *model.p.words) for s in sentences(name, model.states(word), model.p.templates, as_spelt)
        ]
        found |= {
            f"out.text.{name}.tokens": model.text.tokenize(said),
            f"out.text.{name}.features": model.text_features(name),
        }
    seen = model.clip(batch.image)
    found["out.train.image_features_raw"] = seen.cls @ model.clip.tower.proj
    layers = model(model.encode(batch), batch).layers
    for tap, x, prefix in zip(model.clip.taps, seen.patches, seen.prefix):
        found |= {
            f"out.train.tap_{tap}.tokens": torch.cat([prefix, x], 1),
            f"out.train.tap_{tap}.adapted": model.adapters[f"tap_{tap}"](x),
            f"out.train.tap_{tap}.logits": layers[f"tap_{tap}"],
            f"out.train.tap_{tap}.defect_map": enlarge(layers[f"tap_{tap}"], size).softmax(1)[:, 1:].sum(1),
        }
    return found


def judged(case, model) -> dict:
    batch = target_batch(case)
    said = model.predict(batch)
    later = build(case, **MultiADS.variants["later"]).predict(batch)
    found = {
        "out.test.type_maps": torch.cat([said.layers["normal"][:, None], said.type_map], 1),
        "out.test.map": said.map,
        "out.test.score_max": said.score,
        "out.test.score_top3": later.score,
    }
    for key in ("score_max", "score_top3"):  # over the test images of a class; metrics of a class do not change
        ranges = ClassRange("multiads")
        ranges.set_from(found[f"out.test.{key}"], batch.category)
        found[f"out.test.{key}_minmax"] = stretch(found[f"out.test.{key}"], *ranges(batch.category, None, None))
    cls = model.clip(batch.image).cls @ model.clip.tower.proj
    found["out.test.image_features_raw_0"] = cls[:1]
    texts = torch.stack([model.text_features(c) for c in batch.category])
    cosines = (F.normalize(cls, dim=-1)[:, None] @ texts.transpose(1, 2))[:, 0]
    found["out.test.clip_probability_unused"] = (cosines / case.cfg["temperature"]).softmax(-1)[:, 1:].sum(-1)
    for i, name in enumerate(batch.category):
        keep = case.cfg["types_of_class"][name]
        found[f"multi.out.test_{i}.type_maps"] = model.type_maps(
            {k: v[i : i + 1] for k, v in said.layers.items()}, batch.image.shape[-2:], keep
        )[0]
    found["multi.out.prediction_0"] = found["multi.out.test_0.type_maps"].argmax(0)
    alone = build(
        case, types=[case.cfg["types"][k - 1] for k in case.cfg["types_of_class"][batch.category[0]]]
    ).predict(batch[[0]])
    assert torch.equal(segment(alone)[0], found["multi.out.prediction_0"]), (
        "a method that knows the product's own types alone says the same"
    )
    return found


def training(case, **changes) -> tuple:
    "Losses and gradients of one batch, under the released names."
    model = build(case, **changes).train()
    batch = training_batch(case)
    names = released_names(model)
    values = model.learned()
    losses = model.loss(model(model.encode(batch), batch), batch)
    grads = gradients(losses, [values[k] for k in names])
    return model, losses, {theirs.removeprefix("trainable_linearlayer."): g for theirs, g in zip(names.values(), grads)}


def totals(case) -> dict:
    found = {}
    for name, changes in dict(
        first={}, later=MultiADS.variants["later"], multi_seg=MultiADS.variants["multi-type"]
    ).items():
        _, losses, grads = training(case, **changes)
        found |= {f"loss.total_{name}": losses["total"].detach(), **{f"grad.{name}.{k}": g for k, g in grads.items()}}
    return found


@torch.no_grad()
def each_tap(case, model) -> torch.Tensor:  # (taps, 2)
    batch = training_batch(case)
    adapters = model.adapters
    found = []
    prediction = model(model.encode(batch), batch)
    for name in list(adapters):
        model.adapters = torch.nn.ModuleDict({name: adapters[name]})
        parts = model.loss(prediction, batch)
        found.append(torch.stack([parts["focal"], parts["dice"]]))
    model.adapters = adapters
    return torch.stack(found)


def numbers(case) -> dict:
    model = build(case)
    with torch.no_grad():
        found = stages(case, model) | judged(case, model)
    found |= totals(case) | {"loss.focal_dice_per_tap": each_tap(case, model)}
    quick = build(case, quick_gelu=True)
    batch = training_batch(case)
    with torch.no_grad():
        said, (_, losses, _) = quick.predict(target_batch(case)), training_quick(case)
        more = {
            "out.test.map": said.map[:2],
            "out.test.score_max": said.score,
            "loss.focal_dice_per_tap": each_tap(case, quick),
            "loss.total_first": losses["total"].detach(),
            "out.train.image_features_raw": quick.clip(batch.image).cls @ quick.clip.tower.proj,
        }
        more |= {
            f"out.text.{name}.features": quick.text_features(name)
            for name in dict.fromkeys([*case.cfg["train_names"], *case.cfg["test_names"]])
        }
    return found | {f"quick.{k}": v for k, v in more.items()}


def training_quick(case):
    with torch.enable_grad():
        return training(case, quick_gelu=True)


@pytest.mark.slow
def test_multiads_every_stored_number(case):
    def tolerance(key):
        t = case.limits
        if "tokens" in key and "text" in key or "prediction" in key:
            return "ids", 0, False
        if "grad." in key:
            return "gradients (relative)", t["gradients (relative)"], True
        if key.endswith("minmax"):
            return "scores stretched by min-max", t["scores stretched by min-max"], False
        for word, group in (
            ("loss", "losses"),
            ("score", "scores"),
            ("probability", "scores"),
            ("logits", "logits"),
            ("map", "maps"),
        ):
            if word in key.rpartition("tap_")[2]:
                return group, t[group], False
        return "features", t["features"], False

    case.compare(numbers(case), tolerance)
    scalars = case.meta["scalars"]
    said = build(case).predict(target_batch(case))
    assert case.difference(said.score, scalars["score_max"]) < case.limits["scores"]
    for name, changes in dict(
        first={}, later=MultiADS.variants["later"], multi_seg=MultiADS.variants["multi-type"]
    ).items():
        assert (
            case.difference(training(case, **changes)[1]["total"], scalars[f"loss_total_{name}"])
            < case.limits["losses"]
        ), name


@pytest.mark.slow
def test_multiads_what_was_set_matters(case):
    "Or the check above would show nothing."
    batch = target_batch(case)
    limits = case.limits
    for changes in (
        dict(quick_gelu=True),
        dict(position_resize="bilinear"),
        dict(names="words"),
        dict(phrases=None),
        dict(phrases=None, patterns=1),
        dict(templates=case.cfg["templates"][:2]),
        dict(tau=0.011),
        dict(sigma=2.0),
    ):
        assert (
            case.difference(build(case, **changes).predict(batch).map, case.tensors["out.test.map"])
            > 10 * limits["maps"]
        ), changes
    for changes in (dict(dice_target=1.0), dict(dice=False), dict(total="mean")):
        assert (
            case.difference(training(case, **changes)[1]["total"], case.tensors["loss.total_first"])
            > 10 * limits["losses"]
        ), changes
    assert (case.tensors["loss.focal_dice_per_tap"][:, 1] < training(case, dice_target=1.0)[1]["dice"]).all(), (
        "five times the mask"
    )


def test_multiads_recipes_of_the_releases():
    "One epoch: files are numbered from 1."
    recipes = {
        name: recipe_of("multiads", **MultiADS.variants[name].recipe) for name in ("later", "multi-type", "ours")
    }
    first = recipe_of("multiads")
    assert (first.epochs, first.batch_size, first.seed, first.betas) == (1, 8, 42, (0.5, 0.999))
    assert [(r.epochs, r.batch_size, r.seed) for r in recipes.values()] == [(1, 4, 42), (1, 16, 111), (2, 4, 42)]
    assert (
        len(MultiADS.variants["visa, binary"]["types"]) == 20
        and not describe("multiads").variants["transductive"].any()
    )


@pytest.mark.parametrize(
    "content, why",
    [
        ('{"dent": []}', "'dent': .* is no list of phrases"),
        ('{"dent": "{} with a dent"}', "'dent'"),
        ('{"dent": ["a dent"]}', "'a dent' must have one"),
        ("[1]", "holds a list"),
        ("{", "is not JSON"),
    ],
)
def test_multiads_phrases_with_a_fault(case, tmp_path, content, why):
    (tmp_path / "phrases.json").write_text(content)
    with pytest.raises(ValueError, match=f"phrases.json.*{why}"):
        create("multiads", **case.towers, phrases=str(tmp_path / "phrases.json"))


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda s: s["trainable_linearlayer"].pop("fc.1.bias"), r"missing trainable_linearlayer\.fc\.1\.bias"),
        (
            lambda s: s["trainable_linearlayer"].update({"fc.9.weight": torch.zeros(2, 2)}),
            r"unexpected trainable_linearlayer\.fc\.9\.weight",
        ),
        (
            lambda s: s["trainable_linearlayer"].update({"fc.0.weight": torch.zeros(2, 2)}),
            r"trainable_linearlayer\.fc\.0\.weight is \(2, 2\), expected",
        ),
    ],
    ids=["missing", "too many", "shape"],
)
def test_multiads_a_file_that_does_not_fit(case, tmp_path, change, why):
    require_refused(case, build(case), tmp_path, change, why)
