"Bayes-PFL: planes against numerical Jacobians, what must not matter does not, every learned number learns in its stage; recipe, stages and what an epoch is chosen by."

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.weights import WeightsError
from zsad_nb.components.losses import balanced_focal
from zsad_nb.components.prompt_flow import STATES, PromptFlows, density_gap, fixed_noise, invertible_direction, planar
from zsad_nb.components.text_attention import RCA
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch, batches
from zsad_nb.data.index import make_index
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods.base import create, describe, load, save
from zsad_nb.methods.bayes_pfl import BayesPFL
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of
from zsad_nb.training.stages import fit_stages

SIZE, SAME = 48, 1e-5
UNUSED = ("flows.decoders.", "flows.heads.")  # of the reconstruction, which is in no loss
LATER = ("class_mapping.", "image_mapping.", "fuse.")  # what the second stage trains


def small(**changes):
    seed_everything(0)
    return create("bayes_pfl", **{**dict(clip_weights="random:0", image_size=SIZE, samples=2), **changes}).eval()


def shaken(**changes):
    "As after training: every learned number moved."
    model = small(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for q in model.learned().values():
            q.add_(0.05 * torch.randn(q.shape, generator=generator))
    return model


def batch_of(image, categories=None) -> Batch:
    n = len(image)
    mask = torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.bool)
    mask[::2, :, 8:24, 16:40] = True
    bad = mask.flatten(1).any(1)
    return Batch(
        image,
        mask,
        bad,
        bad.long(),
        categories or ["screw"] * n,
        [f"{i}.png" for i in range(n)],
        torch.ones(n, dtype=torch.bool),
    )


def images(n, seed=0, size=SIZE):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(images(4), ["screw", "metal_nut", "screw", "pcb1"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Two categories to train on, two to judge by; a good and a defective image each."
    root = tmp_path_factory.mktemp("drawn")
    whole = synthetic_index(root, "auxiliary", SIZE, normal=1, defective=1)
    names = sorted(whole["category"].unique())
    return [make_index(whole[whole["category"].isin(names[i : i + 2])].to_dict("records"), root) for i in (0, 2)]


def far(a, b) -> float:
    return (a - b).abs().max().item()


def label(changes):
    return ",".join(f"{k}={v}" for k, v in changes.items()) or "default"


# --------------------------------------------------------------------------------------------------------------------------- the flows


@pytest.mark.parametrize("invertible", [False, True])
def test_log_determinants_are_the_jacobians(invertible):
    "All planes of a context flow, in double precision; the corrected ones never fold."
    torch.manual_seed(0)
    flows = PromptFlows(5, 4, flows=4, invertible=invertible).double()
    with torch.no_grad():
        for q in flows.planes["context"].parameters():
            q.normal_(0, 1)
        for part in ("weight", "bias"):
            getattr(flows.planes["context"].u, part).copy_(
                -getattr(flows.planes["context"].w, part)
            )  # w u below -1: planes that fold near their middle
    given = torch.randn(6, 5, dtype=torch.double)
    noise = torch.randn(6, 1, 5, dtype=torch.double)
    found = flows("context", noise, given)
    signs = []
    u, w, b = flows.planes["context"](given)

    def bent(z, i):
        for k in range(4):
            z = planar(z, invertible_direction(u[k, i], w[k, i]) if invertible else u[k, i], w[k, i], b[k, i])[0]
        return z

    for i in range(6):
        sign, expected = torch.linalg.slogdet(
            torch.autograd.functional.jacobian(lambda z, i=i: bent(z, i), found["start"][i, 0])
        )
        signs.append(sign.item())
        assert (
            abs(expected - found["logdet"][i, 0]) < 1e-2
            and far(bent(found["start"][i, 0], i), found["sample"][i, 0]) < 1e-12
        )
    assert (min(signs) > 0) == invertible and found["logdet"].abs().max() > 0.3


def test_kl_without_planes_is_the_closed_form():
    torch.manual_seed(0)
    flows = PromptFlows(6, 8, flows=0)
    given = torch.randn(3, 6)
    with torch.no_grad():
        flows.encoders["context"].mean[-1].bias.fill_(0.5)
        found = flows("context", torch.randn(3, 60000, 6), given)
    closed = kl_divergence(Normal(found["mean"], found["variance"].sqrt()), Normal(0.0, 1.0)).sum(-1)
    assert far(density_gap(found).mean(1), closed) < 0.03 and closed.min() > 0.5 and found["logdet"].abs().max() == 0


def test_sigma_starts_at_one_and_is_exp_of_a_quarter():
    torch.manual_seed(0)
    flows = PromptFlows(64, 32)
    given = torch.randn(5, 64)
    found = flows("context", torch.randn(5, 3, 64), given)
    assert (
        torch.allclose(found["variance"].sqrt(), (flows.encoders["context"].spread(given) / 4).exp(), rtol=1e-5)
        and far(found["variance"], torch.ones(5, 64)) < 0.2
    )
    assert flows.encoders.keys() == flows.decoders.keys() == {"context", "state"}, "one encoder for both states"


def test_fixed_noise():
    a = fixed_noise(10, 3, 16, 5)
    assert (
        a.shape == (3, 1, 10, 16)
        and torch.equal(a[:, :, :4], fixed_noise(4, 3, 16, 5))
        and not torch.equal(a, fixed_noise(10, 3, 16, 6))
        and far(a[0], a[1]) > 0.1
    )


def test_focal_without_pixels_of_a_kind():
    p = torch.rand(2, 8, 8).requires_grad_()
    for target in (torch.zeros(2, 8, 8, dtype=torch.bool), torch.ones(2, 8, 8, dtype=torch.bool)):
        loss = balanced_focal(p, target)
        loss.backward()
        assert loss > 0 and p.grad.isfinite().all()
    for v in (0.0, 1.0):
        assert balanced_focal(torch.full((2, 2), v), torch.eye(2, dtype=torch.bool)).isfinite()


def test_attention_does_not_know_where_a_patch_is():
    torch.manual_seed(0)
    rca = RCA(16, 1, 12)
    texts = F.normalize(torch.randn(2, 3, 16), dim=-1)
    patches = torch.randn(2, 9, 12)
    with torch.no_grad():
        keys = rca.projected(0, patches)
        assert (
            torch.allclose(rca(texts, keys).norm(dim=-1), torch.ones(2, 3), atol=1e-6)
            and far(rca(texts, keys), rca(texts, keys.flip(1))) < 1e-6
        )
        assert (
            far(rca(texts, keys), rca(texts, rca.projected(0, patches + 1))) > 1e-3
            and far(rca.read(texts, keys).sum(2), torch.ones(2, 3, 4)) < 1e-5
        )


# ----------------------------------------------------------------------------------------------------------------- what must not matter

CASES = [
    {},
    dict(image_specific=False),
    dict(image_agnostic=False),
    dict(image_specific=False, image_agnostic=False, rca=False),
    dict(flows=0),
    dict(invertible=True, bank=1),
    dict(second_stage=True),
]


@pytest.mark.parametrize("changes", CASES, ids=label)
def test_batch_mates_do_not_matter(batch, changes):
    model = shaken(**changes)
    together = model.predict(batch)
    assert {len(v) for v in together.layers.values()} == {4} and not model.transductive
    for rows in ([3], [2, 1]):
        alone = model.predict(batch[rows])
        assert far(alone.map, together.map[rows]) < SAME and far(alone.score, together.score[rows]) < SAME, rows
    strangers = Batch.cat([batch[1:2], batch_of(torch.zeros(2, 3, SIZE, SIZE), ["bottle", "pcb1"])])
    assert (
        far(model.predict(strangers).map[:1], together.map[1:2]) < SAME
        and far(model.predict(strangers).score[:1], together.score[1:2]) < SAME
    )


def test_predictions_draw_nothing(batch):
    model = shaken()
    first = model.predict(batch)
    torch.rand(13)
    state = torch.get_rng_state()
    model.train()
    again = model.predict(batch)
    assert (
        torch.equal(again.map, first.map)
        and torch.equal(again.score, first.score)
        and torch.equal(torch.get_rng_state(), state)
        and model.training
    )
    assert far(shaken(noise_seed=1).predict(batch).map, first.map) > 1e-4, "another seed, other samples"


def test_the_release_keeps_the_first_images_draws(batch):
    "Transductive, and the same for an image that comes twice; a new index begins anew."
    model = shaken(**BayesPFL.variants["released"])
    with pytest.raises(ValueError, match="stretches its score over the test images of a class"):
        model.predict(batch)
    torch.manual_seed(1)
    model.set_test_images(batch)
    first = model.predict(batch)
    assert model.transductive and torch.equal(first.map, model.predict(batch).map)
    for c in ("screw",):
        rows = [i for i, name in enumerate(batch.category) if name == c]
        parts = torch.stack([first.layers["probability"], first.layers["top_mean"]], 1)[rows]
        assert (
            far((((parts - parts.amin(0)) / (parts.amax(0) - parts.amin(0) + 1e-8)).mean(1)), first.score[rows]) < SAME
        )
    assert first.score[[1, 3]].tolist() == [0, 0], "a class of one image has no range"
    states = torch.stack([model.test_noise(batch.image[i : i + 1])["normal"] for i in range(4)])
    contexts = torch.stack([model.test_noise(batch.image[i : i + 1])["context"] for i in range(4)])
    assert far(states, states[:1]) == 0 and min(far(contexts[i], contexts[0]) for i in (1, 2, 3)) > 0.1
    model.prepare(None)
    assert far(model.test_noise(batch.image[:1])["normal"], states[0]) > 0.1


def test_the_released_score_over_an_index(drawn):
    "`evaluate` tells the method of the test images; what it predicts is marked."
    model = shaken(**BayesPFL.variants["released"])
    found = evaluate(model, drawn[1], progress=False, workers=0)
    for _, rows in found.per_image.groupby("category"):
        assert (rows["score"].min(), rows["score"].max()) == (0.0, 1.0) or rows["score"].between(0, 1).all()
    assert model.transductive and found.mean["image_auroc"] is not None


def test_training_draws(batch):
    "A context an image, a state a batch, a pair a step."
    model = shaken()
    noise = model.training_noise(4)
    assert {k: tuple(v.shape) for k, v in noise.items()} == dict(
        context=(4, 1, 128), normal=(1, 1, 128), abnormal=(1, 1, 128)
    )
    assert far(noise["context"][0], noise["context"][1]) > 0.1 and len({model.pair() for _ in range(60)}) == 3
    model.train()
    found = model(model.encode(batch), batch)
    assert (
        found.layers["image"].shape == (4, 2, 1)
        and found.layers["texts"].shape == (4, 3, 2, 128)
        and found.layers["levels"].shape == (4, 4, SIZE, SIZE)
    )
    assert (
        far(found.layers["gap_normal"], found.layers["gap_normal"][:1])
        == 0
        < far(found.layers["gap_context"], found.layers["gap_context"][:1])
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_blank_images(value):
    blank = batch_of(torch.full((2, 3, SIZE, SIZE), value))
    model = shaken()
    prediction = model.predict(blank)
    assert (
        all(v.isfinite().all() for v in (prediction.map, prediction.score, *prediction.layers.values()))
        and far(prediction.map[0], prediction.map[1]) < SAME
    )
    model.train()
    losses = model.loss(model(model.encode(blank), blank), blank)
    losses["total"].backward()
    assert all(v.isfinite() for v in losses.values()) and all(
        q.grad is None or q.grad.isfinite().all() for q in model.learned().values()
    )


def test_shapes_and_pooling():
    model = shaken()
    given = batch_of(torch.rand(2, 3, 50, 81), ["screw", "bottle"])
    found = model.predict(given)
    assert (
        found.map.shape == (2, 50, 81)
        and found.layers["levels"].shape == (2, 4, 50, 81)
        and ((found.score >= 0) & (found.score <= 1)).all()
    )
    raw = found.layers["levels"].mean(1).flatten(1)
    assert (
        far(found.layers["top_mean"], torch.stack([raw[0].topk(20).values.mean(), raw[1].topk(2000).values.mean()]))
        < SAME
    ), "20 pixels for a screw, 2000 for others, not smoothed"
    assert far(shaken(top_pixels=10**6, small_top_classes=()).predict(given).layers["top_mean"], raw.mean(1)) < SAME, (
        "never more than there are"
    )
    assert not torch.equal(found.map, found.layers["levels"].mean(1))


def test_class_names(batch):
    model = shaken()

    def map_of(name, model=model):
        return model.predict(Batch(**{**vars(batch[:1]), "category": [name]})).map

    assert (
        torch.equal(map_of("pcb1"), map_of("pcb4"))
        and torch.equal(map_of("metal_nut"), map_of("Metal_Nut"))
        and not torch.equal(map_of("hex_nut"), map_of("hex nut"))
    )
    words = shaken(names="words")
    assert torch.equal(map_of("hex_nut", words), map_of("hex nut", words))


# ------------------------------------------------------------------------------------------------------------- what learns, what is kept


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(weight_reconstruction=0.01),
        dict(image_specific=False),
        dict(image_agnostic=False),
        dict(rca=False),
        dict(flows=0),
        dict(state_logdet="whole", invertible=True),
    ],
    ids=label,
)
def test_gradient_reaches_what_the_first_stage_trains(batch, changes):
    model = shaken(**changes).train()
    model.loss(model(model.encode(batch), batch), batch)["total"].backward()
    silent = {n for n, q in model.learned().items() if q.grad is None or not q.grad.any()}
    expected = {n for n in model.learned() if n.startswith((*UNUSED, "image_mapping.", "fuse."))}
    if changes.get("weight_reconstruction"):
        expected -= {n for n in expected if n.startswith(("flows.decoders.context", "flows.heads.context"))}
    if not changes.get("image_specific", True):
        expected |= {n for n in model.learned() if "context" in n and n.startswith("flows.")}
    if not changes.get("image_agnostic", True):
        expected |= {n for n in model.learned() if any(k in n for k in ("state", *STATES)) and n.startswith("flows.")}
    if not changes.get("rca", True):
        expected |= {"rca.query.weight", "rca.query.bias"}
    if changes.get("flows") == 0:
        expected |= set()
    assert silent == expected
    assert all(q.grad is None for b in model.backbones().values() for q in b.parameters())
    groups = model.param_groups()
    assert [g["lr"] for g in groups] == [1e-3, 1e-4, 1e-2] and sum(len(g["params"]) for g in groups) == len(
        model.learned()
    ) == len({id(q) for g in groups for q in g["params"]})


def test_the_second_stage_moves_the_image_part_alone(batch):
    first = shaken().predict(batch)
    model = shaken()
    model.second_stage().train()
    found = model.loss(model(model.encode(batch), batch), batch)
    found["total"].backward()
    assert list(found) == ["total", "ce"] and {
        n for n, q in model.learned().items() if q.grad is not None and q.grad.any()
    } == {n for n in model.learned() if n.startswith(LATER)} | {"log_scale"}
    assert {id(q) for g in model.param_groups() for q in g["params"]} == {
        id(q) for n, q in model.learned().items() if n.startswith(LATER)
    }, "temperatures have a gradient, and no step"
    later = model.predict(batch)
    assert (
        torch.equal(first.map, later.map)
        and torch.equal(first.layers["top_mean"], later.layers["top_mean"])
        and far(first.score, later.score) > 1e-4
    )


@pytest.mark.slow
def test_fit_both_stages(drawn, tmp_path):
    "The same numbers twice; the second stage leaves every map as it was; a third of the epochs, rounded up."
    found = []
    for _ in range(2):
        model = small()
        history = fit_stages(
            model,
            drawn[0],
            recipe_of(model, epochs=2, batch_size=2, augment="none"),
            progress=False,
            workers=0,
            cache=tmp_path / "cache",
        )
        found.append((history["total"].tolist(), model.state_dict()))
    assert found[0][0] == found[1][0] and all(torch.equal(v, found[1][1][k]) for k, v in found[0][1].items())
    assert (
        history.groupby("stage")["epoch"].nunique().tolist() == [2, 1]
        and history["epoch"].tolist() == [0, 0, 1, 1, 2, 2]
        and model.p.second_stage
        and len(model.trained_on) == 2
    )
    one = small()
    fit(one, drawn[0], recipe_of(one, epochs=2, batch_size=2, augment="none"), progress=False, workers=0)
    whole = Batch.cat(batches(drawn[0], SIZE, 8))
    assert (
        far(one.predict(whole).layers["levels"], model.predict(whole).layers["levels"]) < 1e-3
        and not one.p.second_stage
    )
    assert found[0][1].keys() == one.state_dict().keys()


def test_training_images_are_changed(drawn):
    "By the recipe: other losses than without, the same ones again; a cache is of no use and is not filled."

    def losses(**changes):
        model = small()
        return fit(model, drawn[0], recipe_of(model, epochs=1, batch_size=2, **changes), progress=False, workers=0)[
            "total"
        ].tolist()

    assert recipe_of("bayes_pfl").augment == "bayes_pfl" and losses() == losses() != losses(augment="none")
    with pytest.raises(ValueError, match="augment='flip'; use none, bayes_pfl"):
        recipe_of("bayes_pfl", augment="flip")
    assert (recipe_of("bayes_pfl").mosaic, recipe_of("bayes_pfl").mosaic_rule) == ({"mvtec": 0.4}, "defective")


def test_changed_images_are_not_kept(drawn, tmp_path):
    model = small()
    cache = FeatureCache(tmp_path)
    fit(model, drawn[0], recipe_of(model, epochs=1, batch_size=4), progress=False, workers=0, cache=cache)
    assert (cache.hits, cache.misses) == (0, 0) and not any(tmp_path.rglob("*.safetensors"))


def test_an_epoch_is_chosen_by_other_images(drawn):
    "As the release chooses one: five samples, maps not smoothed; its best weights; its classes are marked as seen."
    model = small()
    seen = []

    def judge(m, index):
        assert (m.p.samples, m.p.sigma, m.training) == (5, 0.0, False) and index is drawn[1]
        seen.append({n: q.detach().clone() for n, q in m.learned().items()})
        return [0.2, 0.5, 0.4, 0.3][len(seen) - 1]

    history = fit_stages(
        model,
        drawn[0],
        recipe_of(model, epochs=4, batch_size=4, augment="none"),
        drawn[1],
        judge,
        patience=2,
        progress=False,
        workers=0,
    )
    assert history.attrs["judged"] == [0.2, 0.5, 0.4, 0.3] and (history["stage"] == 1).sum() == 4
    assert all(torch.equal(q, seen[1][n]) for n, q in model.learned().items() if not n.startswith(LATER)), (
        "the best epoch's weights"
    )
    assert (model.p.samples, model.p.sigma) == (2, 8.0) and {c.split("/")[1] for c in model.trained_on} == set(
        drawn[0]["category"]
    ) | set(drawn[1]["category"])


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_stages_go_on_where_they_were_stopped(drawn, tmp_path):
    "Killed in the second stage: the first is not trained again, and the result is the same to the last bit."

    def run(**options):
        model = small()
        return model, fit_stages(
            model,
            drawn[0],
            recipe_of(model, epochs=4, batch_size=4, augment="none"),
            progress=False,
            workers=0,
            **options,
        )

    whole, _ = run()
    stopped = small()
    count = []
    real = BayesPFL.loss

    def stop(self, *a):
        if self.p.second_stage:
            count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(self, *a)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BayesPFL, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_stages(
                stopped,
                drawn[0],
                recipe_of(stopped, epochs=4, batch_size=4, augment="none"),
                progress=False,
                workers=0,
                resume=tmp_path,
            )
    assert len(list(tmp_path.rglob("training-*"))) == 2, "a state a stage"
    again, history = run(resume=tmp_path)
    assert (
        all(torch.equal(q, whole.learned()[n]) for n, q in again.learned().items())
        and len(history) == 6
        and not tmp_path.exists()
    )


def test_save_and_load(batch, tmp_path):
    model = shaken(bank=2, noise_seed=3, clip_taps=(3, 5), small_top_classes=("screw",)).second_stage()
    model.trained_on = ["visa/pcb1"]
    path = save(model, tmp_path / "model.safetensors")
    back = load(path).eval()
    assert (
        back.p == model.p
        and back.p.second_stage
        and back.trained_on == ["visa/pcb1"]
        and list(read_header(path)["backbones"]) == ["clip", "text"] == list(model.backbones())
    )
    assert torch.equal(back.predict(batch).map, model.predict(batch).map) and torch.equal(
        back.predict(batch).score, model.predict(batch).score
    )
    more = load(path, samples=4).predict(batch).layers["image"]
    assert more.shape == (4, 2, 8) and far(more[..., :4], model.predict(batch).layers["image"]) < 1e-4, (
        "fewer samples are the first of many"
    )


def test_checkpoints_of_the_method_before_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save(small(), tmp_path / "new.safetensors")
    header = read_header(path)
    for name in ("quick_gelu", "names", "draws", "top_pixels", "lr_temperature"):
        header["parameters"].pop(name)
    header["parameters"] |= dict(
        patch_norm=True,
        start="proj",
        start_std=0.7,
        train_samples=1,
        positions="bicubic",
        top_share=0.0075,
        naming="words",
    )
    save_file(load_file(path), tmp_path / "old.safetensors", {"zsad_nb": json.dumps(header)})
    with pytest.raises(
        WeightsError,
        match="old.safetensors: its parameters .* are those of another method that was called bayes_pfl .* train again",
    ):
        load(tmp_path / "old.safetensors")


@pytest.mark.slow
def test_encode_is_frozen_and_cached(batch, tmp_path):
    model = shaken()
    cache = FeatureCache(tmp_path / "cache")
    features = model.encode(batch)
    assert not any(v.requires_grad for v in features.values()) and {len(v) for v in features.values()} == {4}
    filled, kept = (model.predict(batch, cache) for _ in range(2))
    assert (
        (cache.hits, cache.misses) == (4, 4)
        and torch.equal(kept.map, filled.map)
        and torch.equal(kept.score, filled.score)
    )

    def key(**changes):
        return json.dumps(small(**changes).encode_key(), sort_keys=True)

    for changes in (
        dict(clip_weights="random:1"),
        dict(image_size=80),
        dict(clip_taps=(3, 5)),
        dict(position_resize="bilinear"),
        dict(quick_gelu=None),
    ):
        assert key(**changes) != key(), changes
    for changes in (dict(tau=0.1), dict(rca=False)):
        assert key(**changes) == key(), changes


# ------------------------------------------------------------------------------------------------------------------ options and errors


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(bank=0), "bank=0; it must be at least 1"),
        (dict(context=0), "context=0"),
        (dict(num_heads=5), "num_heads=5 does not divide the joint width 128"),
        (dict(map_share=1.5), "from 0 to 1"),
        (dict(draws="new"), "use seeded or kept"),
        (dict(image_score="class"), "use image or test set"),
        (dict(flows=-1), "0 or more"),
        (dict(tau=0.0), "above 0"),
        (dict(clip_taps=(3, 9)), "outside 1..5"),
        (dict(image_size=70), "multiple of the patch size"),
        (dict(context=70), "reads 40"),
        (dict(clip="tiny-dino"), "has no text tower|no space shared"),
    ],
    ids=str,
)
def test_wrong_parameters(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.slow
def test_described(batch):
    table = describe("bayes_pfl")
    assert table["source"].ne("").all() and table["help"].ne("").all() and table["parameter"].is_unique
    for rows in (BayesPFL.ablations, *BayesPFL.studies.values()):
        for row, changes in rows.items():
            if changes:
                assert small(**changes).predict(batch[:1]).map.isfinite().all(), row
    with pytest.raises(TypeError, match="did you mean tau"):
        small(tauu=1.0)


def test_full_size():
    "The paper's sizes; nothing is allocated."
    with torch.device("meta"):
        model = create("bayes_pfl", clip="clip-vitl14-336", clip_weights="random:0")
    assert (model.clip.size, model.grid, model.clip.taps) == (518, (37, 37), (6, 12, 18, 24))
    shapes = {n: tuple(q.shape) for n, q in model.learned().items()}
    assert (
        shapes["rca.project.0.weight"] == (768, 1024)
        and shapes["rca.query.weight"] == (768, 768, 1)
        and shapes["fuse.gather.weight"] == (768, 4 * 1024)
        and shapes["class_mapping.weight"] == (768, 768)
    )
    assert (
        shapes["flows.encoders.context.mean.0.weight"] == (512, 768)
        and shapes["flows.planes.context.u.weight"] == (10 * 768, 768)
        and shapes["flows.planes.normal.u"] == (10, 768)
    )
    assert (
        shapes["prompts.context"] == (3, 5, 768)
        and shapes["prompts.state"] == (2, 3, 5, 768)
        and math.prod(shapes["log_scale"]) == 2
    )
