"Every stored number of the Bayes-PFL fixture, from the method as anybody would create it and from its released checkpoint."

import copy

import pytest
import torch
from parity_tools import Fixture, gradients, require_refused

from zsad_nb.backbones.weights import WeightsError
from zsad_nb.components.maps import to_pixels
from zsad_nb.components.prompt_flow import STATES
from zsad_nb.methods.base import create, describe, import_released
from zsad_nb.methods.bayes_pfl import released_names
from zsad_nb.methods.class_range import stretch
from zsad_nb.training.fit import rate, recipe_of

pytestmark = pytest.mark.parity
FLOWS = ("context", *STATES)


@pytest.fixture(scope="module")
def case(parity_fixture, tmp_path_factory):
    "With the file as the release writes it: modules that it knows by two names are there twice."
    case = Fixture(parity_fixture, tmp_path_factory.mktemp("bayes_pfl"), "bayes_pfl")
    state = torch.load(case.released, weights_only=True)
    state["MyModel"] |= {alias: state["MyModel"][own] for alias, own in case.meta["aliases"].items()}
    torch.save(state, case.released)
    return case


def build(case, second_stage=False, **changes):
    "The method with the fixture's checkpoint, and the draws that the fixture's own run made."
    cfg = case.cfg
    noise = case.part("in.noise.")
    sizes = dict(
        clip_taps=tuple(cfg["features_list_1based"]),
        bank=cfg["prompt_num"],
        context=cfg["prompt_context_len"],
        state=cfg["prompt_state_len"],
        flows=cfg["num_flows"],
        num_heads=cfg["num_heads"],
        samples=cfg["sample_num"],
        sigma=float(cfg["sigma"]),
        map_share=1 - cfg["alpha"],
        top_pixels=cfg["top_k"],
        small_top_pixels=cfg["top_k_small"],
        small_top_classes=tuple(cfg["classes_with_the_small_top_k"]),
        image_score="test set",
    )
    model = create("bayes_pfl", **{**case.towers, **sizes, **changes}).eval()
    import_released(model, case.released, second_stage=second_stage)
    images = {image_key(image): i for i, image in enumerate(batch_of(case, "test").image)}
    model.training_noise = lambda count: {name: noise[f"train.{name}"][:, None] for name in FLOWS}
    model.test_noise = lambda image: {
        "context": noise["test.context"][images[image_key(image[0])]][None],
        **{name: noise[f"test.{name}"][None] for name in STATES},
    }
    model.pair = lambda: cfg["index_prompt"]
    return model


def image_key(image) -> bytes:
    return image.contiguous().numpy().tobytes()


def batch_of(case, kind):
    names = case.cfg[f"{kind}_class_names"]
    images = case.tensors[f"in.{kind}.batch"]
    if kind == "test":
        return case.batch(images, names)
    batch = case.batch(images, names, case.tensors["in.train.masks"])
    assert (
        batch.anomalous.tolist()
        == (case.tensors["in.train.labels"] > 0).tolist()
        == [bool(v) for v in case.cfg["train_labels"]]
    )
    return batch


@torch.no_grad()
def stages(case, model) -> dict:
    "A training step, from the towers to the logits."
    cfg = case.cfg
    batch = batch_of(case, "train")
    found = {}
    features = model.encode(batch)
    count = len(batch)
    bank = cfg["prompt_num"]
    words = [model.spell(model.p)(c) for c in batch.category]
    assert [f"X {w}" for w in words] == cfg["train_sentences"]
    found |= {
        "out.train.image_features_raw": features["cls"],
        "out.train.tokenized_names": model.text.tokenize([f"X {w}" for w in words]),
    }
    drawn = model.sampled(model.training_noise(count), features["cls"])
    for name, d in drawn.items():
        z, logdet = ([s[i][:, 0] for s in d["steps"]] for i in (0, 1))
        found |= {
            f"out.train.{name}.{k}": v
            for k, v in dict(
                mu=d["mean"],
                var=d["variance"],
                z0=d["start"][:, 0],
                zk=d["sample"][:, 0],
                flow_z=torch.stack(z),
                flow_logdet=torch.stack(logdet),
                logdet_sum=d["logdet"][:, 0],
                decoded=model.flows.decoded(name, d["sample"])[:, 0],
            ).items()
        }
    found |= {f"out.train.context.{k}": v for k, v in zip("uwb", model.flows.planes["context"](features["cls"]))}
    states = torch.stack([drawn[name]["sample"] for name in STATES], 2)
    rows, end = model.prompts.rows(batch.category, drawn["context"]["sample"], states)
    shown = case.tensors["out.train.prompt_embeddings"].shape[3]
    found["out.train.prompt_embeddings"] = rows[:, 0].transpose(1, 2)[..., :shown, :]
    raw = model.prompts(batch.category, drawn["context"]["sample"], states)
    texts = model.texts(drawn, batch.category)  # (N, B, 2, C)

    def side_by_side(t):
        return t.transpose(1, 2).flatten(1, 2)  # all normal, then all abnormal

    found |= {"out.train.text_raw": raw.transpose(1, 2), "out.train.text_features": side_by_side(texts)}
    logits = model.image_logits(features, texts)
    found |= {
        "out.train.image_logits": logits.flatten(1),
        "out.train.selected_image_logits": logits[..., cfg["index_prompt"]],
    }
    size = tuple(batch.image.shape[-2:])
    pair = [cfg["index_prompt"]]
    scale = model.log_scale[1].exp()
    for i, t in enumerate(model.clip.taps):
        patches, attended = model.attended(i, features[f"tap_{t}"], texts)
        found |= {
            f"out.train.tap_{t}.patches": features[f"tap_{t}"],
            f"out.train.tap_{t}.projected": patches,
            f"out.train.tap_{t}.texts": side_by_side(attended),
            f"out.train.tap_{t}.logits": scale * patches @ side_by_side(attended).mT,
            f"out.train.tap_{t}.selected_map": model.level(i, features[f"tap_{t}"], texts[:, pair], size),
        }
    assert len(found["out.train.image_logits"][0]) == 2 * bank
    return found


@torch.no_grad()
def judged(case, model) -> dict:
    "The test set: draws, texts, maps and scores."
    cfg = case.cfg
    batch = batch_of(case, "test")
    found = {}
    features = model.encode(batch)
    words = [model.spell(model.p)(c) for c in batch.category]
    assert [f"X {w}" for w in words] == cfg["test_sentences"]
    found |= {
        "out.test.tokenized_names": model.text.tokenize([f"X {w}" for w in words]),
        "out.test.image_features_raw_0": features["cls"][:1],
    }
    for i in range(len(batch)):
        drawn = model.sampled(model.test_noise(batch.image[i : i + 1]), features["cls"][i : i + 1])
        found[f"out.test_{i}.text_features"] = (
            model.texts(drawn, batch.category[i : i + 1])[0].transpose(0, 1).flatten(0, 1)
        )
        if (key := f"out.test_{i}.context.zk") in case.tensors:
            found[key] = drawn["context"]["sample"][0]
    found |= {f"out.test.{name}.zk": drawn[name]["sample"][0] for name in STATES}
    plain = build(case, sigma=0.0).set_test_images(batch).predict(batch)
    found |= results(model, batch) | {"out.test.map": plain.map, "out.test_0.level_maps": plain.layers["levels"][0]}
    found["out.test.smoothed_map"] = model.predict(batch).map
    assert torch.allclose(
        to_pixels(plain.map, plain.map.shape[-2:], float(cfg["sigma"])), found["out.test.smoothed_map"]
    )
    for name, changes in dict(large=dict(small_top_classes=()), small=dict(top_pixels=cfg["top_k_small"])).items():
        found[f"out.test.top_mean_{name}"] = build(case, **changes).measure(batch)[:, 1]
    found["out.test.top_mean_used"] = model.measure(batch)[:, 1]
    return found


def results(model, batch) -> dict:
    "Scores and what they are made of; the score again by hand."
    said = model.set_test_images(batch).predict(batch)
    parts = torch.stack([said.layers["probability"], said.layers["top_mean"]], 1)
    for c in set(batch.category):
        rows = [i for i, name in enumerate(batch.category) if name == c]
        low, high = (getattr(parts[rows], f)(0, keepdim=True).expand(len(rows), -1) for f in ("amin", "amax"))
        by_hand = stretch(parts[rows].flatten(), low.flatten(), high.flatten(), smooth=1e-8).view(-1, 2) @ torch.tensor(
            [1 - model.p.map_share, model.p.map_share]
        )
        assert torch.allclose(said.score[rows], by_hand, atol=1e-6)
    return {
        "out.test.probability": said.layers["probability"],
        "out.test.image_score": said.score,
        **{f"out.test_{i}.image_logits": said.layers["image"][i].flatten() for i in range(len(batch))},
    }


def training(case, **options) -> tuple:
    "Losses and gradients of one batch, under the released names."
    model = build(case, **options).train()
    batch = batch_of(case, "train")
    names = released_names(model)
    values = model.learned()
    prediction = model(model.encode(batch), batch)
    losses = model.loss(prediction, batch)
    grads = gradients(losses, [values[k] for k in names])
    found = {}
    for theirs, ours, g in zip(names.values(), names, grads):
        pieces = {theirs: g} if isinstance(theirs, str) else dict(zip(theirs, g if g is not None else (None, None)))
        found |= {k.removeprefix("MyModel."): v for k, v in pieces.items()}
    return model, losses, prediction, found


def as_released(case, grads: dict) -> dict:
    "Gradients in the shapes of the file."
    return {k: g if g is None else g.reshape(case.tensors[f"ckpt.MyModel.{k}"].shape) for k, g in grads.items()}


def first_stage(case) -> dict:
    model, losses, prediction, grads = training(case)
    grads = as_released(case, grads)
    nothing = [k for k, g in grads.items() if g is None or not g.any()]
    assert sorted(nothing) == sorted(case.meta["scalars"]["without_gradient_in_stage_1"])
    found = {f"grad.{k}": g for k, g in grads.items() if k not in nothing}
    batch = batch_of(case, "train")
    each = []
    with torch.no_grad():
        for i in range(len(model.clip.taps)):  # one tap at a time
            alone = copy.copy(prediction)
            alone.layers = {**prediction.layers, "levels": prediction.layers["levels"][:, i : i + 1]}
            parts = model.loss(alone, batch)
            each.append(torch.stack([parts["focal"], parts["dice"]]))
        features = model.encode(batch)
        drawn = model.sampled(model.training_noise(len(batch)), features["cls"])
        found["loss.reconstruction_unused"] = model.reconstruction(drawn["context"], features["cls"]).mean()
    kl = torch.stack([losses[f"kl_{name}"] for name in FLOWS]).detach()
    return found | {
        "loss.focal_dice_per_tap": torch.stack(each),
        "loss.image_ce": losses["ce"].detach(),
        "loss.orthogonal": losses["orthogonal"].detach(),
        "loss.kl": kl,
        "loss.kl_times_001_sum": model.p.weight_kl * kl.sum(),
        "loss.total": losses["total"].detach(),
    }


@torch.no_grad()
def second_stage(case, **options) -> dict:
    model = build(case, second_stage=True, **options)
    batch = batch_of(case, "train")
    features = model.encode(batch)
    texts = model.texts(model.sampled(model.training_noise(len(batch)), features["cls"]), batch.category)
    found = {
        "out.train.fused_patches": model.fuse([features[f"tap_{t}"] for t in model.clip.taps]),
        "out.train.image_logits": model.image_logits(features, texts).flatten(1),
    }
    found |= results(model, batch_of(case, "test"))
    with torch.enable_grad():
        trained, losses, _, grads = training(case, second_stage=True, **options)
    moved = {id(q) for group in trained.param_groups() for q in group["params"]}
    names = {
        theirs.removeprefix("MyModel."): trained.learned()[ours]
        for ours, theirs in released_names(trained).items()
        if isinstance(theirs, str)
    }
    moved = {
        k for k, q in names.items() if id(q) in moved and k != "fuse.compress.bias"
    }  # whose gradient is zero but for rounding: a softmax does not know what all patches share
    found |= {f"grad.{k}": g for k, g in as_released(case, grads).items() if k in moved}
    return found | {"loss.total": losses["total"].detach()}


def numbers(case) -> dict:
    model = build(case)
    found = (
        stages(case, model)
        | judged(case, model)
        | first_stage(case)
        | {f"stage2.{k}": v for k, v in second_stage(case).items()}
    )
    quick = build(case, quick_gelu=True)
    seen = stages(case, quick)
    more = {k: seen[k] for k in ("out.train.image_features_raw", "out.train.image_logits", "out.train.text_features")}
    said = results(quick, batch_of(case, "test"))
    more |= {k: said[k] for k in ("out.test.image_score", "out.test.probability")} | {
        "loss.total": training(case, quick_gelu=True)[1]["total"].detach()
    }
    more["out.test.map"] = (
        build(case, quick_gelu=True, sigma=0.0)
        .set_test_images(batch_of(case, "test"))
        .predict(batch_of(case, "test"))
        .map[: len(case.tensors["quick.out.test.map"])]
    )
    more["stage2.out.test.image_score"] = second_stage(case, quick_gelu=True)["out.test.image_score"]
    return found | {f"quick.{k}": v for k, v in more.items()}


@pytest.mark.slow
def test_bayes_pfl_every_stored_number(case):
    def tolerance(key):
        t = case.limits
        if "grad." in key:
            return "gradients (relative)", t["gradients (relative)"], True
        if key.endswith("tokenized_names"):
            return "ids", 0, False
        if "image_score" in key:
            return "image score", t["image score"], False
        for words, group in (
            (("loss",), "losses"),
            (("probability", "top_mean"), "probability and top means"),
            (("logits",), "logits"),
            (("map",), "maps"),
            (
                (".mu", ".var", ".z0", ".zk", ".flow_", "logdet", ".decoded", "context.u", "context.w", "context.b"),
                "flows",
            ),
        ):
            if any(word in key for word in words):
                return group, t[group], False
        return "features", t["features"], False

    case.compare(numbers(case), tolerance)


@pytest.mark.slow
def test_bayes_pfl_scalars(case):
    scalars = case.meta["scalars"]
    limits = case.limits
    _, losses, _, _ = training(case)
    for name, found in dict(
        loss_total=losses["total"],
        loss_image_ce=losses["ce"],
        loss_orthogonal=losses["orthogonal"],
        loss_kl=torch.stack([losses[f"kl_{n}"] for n in FLOWS]),
        stage2_loss=training(case, second_stage=True)[1]["total"],
        quick_loss_total=training(case, quick_gelu=True)[1]["total"],
    ).items():
        assert case.difference(found, scalars[name]) < limits["losses"], name
    for name, stage in (("image_score", False), ("stage2_image_score", True)):
        batch = batch_of(case, "test")
        assert (
            case.difference(build(case, second_stage=stage).set_test_images(batch).predict(batch).score, scalars[name])
            < limits["image score"]
        ), name


@pytest.mark.slow
def test_bayes_pfl_what_was_set_matters(case):
    "Or the check above would show nothing."
    batch = batch_of(case, "test")
    limits = case.limits
    cfg = case.cfg
    parts = torch.stack([case.tensors[f"out.test.{k}"] for k in ("probability", "top_mean_used")], 1)
    resized = [dict(position_resize="bilinear")] if cfg["pretrain_grid"] != cfg["patches_per_side"] else []
    for changes in (
        dict(quick_gelu=True),
        dict(invertible=True),
        dict(num_heads=2 if cfg["num_heads"] == 1 else 1),
        dict(rca=False),
        dict(image_specific=False),
        dict(image_agnostic=False),
        *resized,
    ):
        assert (
            case.difference(
                build(case, sigma=0.0, image_score="image", **changes).predict(batch).map, case.tensors["out.test.map"]
            )
            > 2 * limits["maps"]
        ), changes
    for changes in (dict(top_pixels=10, small_top_pixels=10), dict(second_stage=True), dict(image_agnostic=False)):
        assert (
            case.difference(build(case, **changes).measure(batch), parts) > 2 * limits["probability and top means"]
        ), changes
    assert (
        case.difference(build(case, image_score="image").predict(batch).score, case.tensors["out.test.image_score"])
        > 2 * limits["image score"]
    )
    for changes in (
        dict(weight_reconstruction=0.01),
        dict(weight_kl=0.02),
        dict(focal_gamma=1.0),
        *([dict(weight_orthogonal=0.5)] if cfg["prompt_num"] > 1 else []),
    ):
        assert (
            case.difference(training(case, **changes)[1]["total"], case.tensors["loss.total"]) > 2 * limits["losses"]
        ), changes
    if len(case.tensors["in.train.labels"]) > 1:
        whole = training(case, state_logdet="whole")[1]
        assert (
            case.difference(torch.stack([whole[f"kl_{name}"] for name in FLOWS]), case.tensors["loss.kl"])
            > 2 * limits["losses"]
        )


@pytest.mark.slow
def test_bayes_pfl_default_looks_at_one_image(case):
    "The release to the letter is a variant with a mark, and its noise depends on who came first."
    table = describe("bayes_pfl").variants.set_index("variant")
    batch = batch_of(case, "test")
    assert table["transductive"].eq("yes").sum() == 1 and table.loc["released", "transductive"] == "yes"
    options = dict(case.towers, num_heads=case.cfg["num_heads"])
    default = create("bayes_pfl", **options)
    assert not default.transductive and torch.allclose(
        default.predict(batch[[-1]]).map, default.predict(batch).map[-1:], atol=1e-5
    )

    def run(order, seed):
        torch.manual_seed(0)  # the same learned values
        model = create("bayes_pfl", **options, **type(default).variants["released"])
        torch.manual_seed(seed)
        found = model.set_test_images(batch[order]).predict(batch[order])
        assert (
            model.transductive
            and torch.equal(model.predict(batch[order]).score, found.score)
            and 0 <= found.score.min()
            and found.score.max() <= 1
        )
        return found.map[[order.index(0)]]

    forward = list(range(len(batch)))
    assert not torch.equal(run(forward, 1), run(forward, 2)) and not torch.equal(run(forward, 1), run(forward[::-1], 1))


def test_bayes_pfl_recipe():
    "Rates of the groups, a tenth of the steps rising, a step a batch; the second stage at one constant rate."
    model = create("bayes_pfl", clip_weights="random:0", image_size=48)
    recipe = recipe_of(model)
    assert (recipe.epochs, recipe.batch_size, recipe.optimiser, recipe.betas, recipe.seed, recipe.augment) == (
        30,
        32,
        "adam",
        (0.5, 0.999),
        111,
        "bayes_pfl",
    )
    assert [rate(recipe, 1.0, step, 0, 100) for step in (0, 9, 10)] == [0.1, 1.0, 1.0] and rate(
        recipe, 1.0, 99, 29, 100
    ) < 1e-3
    rates = {id(q): g["lr"] for g in model.param_groups() for q in g["params"]}
    kinds = {n: rates[id(q)] for n, q in model.learned().items()}
    assert set(kinds.values()) == {1e-3, 1e-4, 1e-2} and {n for n, lr in kinds.items() if lr == 1e-2} == {"log_scale"}
    assert {".".join(n.split(".")[:2]) for n, lr in kinds.items() if lr == 1e-3} == {
        "prompts.context",
        "prompts.state",
        "flows.planes",
        "flows.heads",
    }
    later = model.next_stage(recipe)
    assert (later.epochs, later.schedule, later.warmup, later.batch_size) == (
        10,
        "constant",
        0.0,
        32,
    ) and model.next_stage(later) is None
    own = model.learned()
    assert [g["lr"] for g in model.param_groups()] == [1e-4] and {id(q) for q in model.param_groups()[0]["params"]} == {
        id(q) for n, q in own.items() if n.startswith(("class_mapping", "image_mapping", "fuse"))
    }


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda s: s.pop("RCA.q_proj_pre.bias"), r"missing MyModel\.RCA\.q_proj_pre\.bias"),
        (lambda s: s.update({"RCA.k_proj.bias": torch.zeros(2)}), r"unexpected MyModel\.RCA\.k_proj\.bias"),
        (
            lambda s: s.update(
                {
                    "context_encoder.weight_mean.module.0.weight": torch.zeros(2, 2),
                    "PFL_context.encoder.weight_mean.module.0.weight": torch.zeros(2, 2),
                }
            ),
            r"MyModel\.context_encoder\.weight_mean\.module\.0\.weight is \(2, 2\), expected",
        ),
        (
            lambda s: s["PFL_normal.amor_u"].fill_(float("nan")),
            r"MyModel\.PFL_normal\.amor_u holds numbers that are not finite",
        ),
        (
            lambda s: s.update(
                {"PFL_abnormal.encoder.weight_mean.module.0.bias": s["state_encoder.weight_mean.module.0.bias"] + 1}
            ),
            r"MyModel\.PFL_abnormal\.encoder\.weight_mean\.module\.0\.bias and .* are one module",
        ),
    ],
    ids=["missing", "too many", "shape", "not a number", "two encoders"],
)
def test_bayes_pfl_a_file_that_does_not_fit(case, tmp_path, change, why):
    require_refused(case, build(case), tmp_path, change, why, part="MyModel")


def test_bayes_pfl_another_file(case, tmp_path):
    torch.save({"MyModel": {"ctx": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth does not fit bayes_pfl: missing MyModel\..*"):
        import_released(build(case), tmp_path / "other.pth")
