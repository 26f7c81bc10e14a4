"SSVP: its equations against a second, literal writing; what must not matter does not; every learned number learns; every named choice exists."

import dataclasses
import inspect
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.components.hsvs import ATF, HSVS, HSVSParameters, head_count
from zsad_nb.components.losses import focal
from zsad_nb.components.vcpg import VAE, VCPG, VCPGParameters, scd, stay_close, tir_fg
from zsad_nb.components.vtam import VTAM, VTAMParameters
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.evaluation.published import printed_variants
from zsad_nb.methods.base import MODULES, create, describe, load, method_class, save
from zsad_nb.methods.ssvp import AUXILIARY, PAPER, SSVP, SWEEPS, SSVPParameters, alignment, paper_taps, static_text
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of

SIZE = 64
SMALL = dict(clip_weights="random:0", image_size=64)


def small(**changes):
    seed_everything(0)
    return create("ssvp", **{**SMALL, **changes})


def stirred(**changes):
    "A model whose every part acts: all learned numbers moved, the gate of the prompts open."
    method = small(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in method.learned().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
        if method.vcpg is not None:
            method.vcpg.alpha.fill_(0.7)
    return method.eval()


def batch_of(image, category=("bottle", "cable"), anomalous=()):
    n = len(image)
    mask = torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.bool)
    bad = torch.tensor([i in anomalous for i in range(n)])
    mask[bad, :, 10:30, 20:40] = True
    return Batch(
        image,
        mask,
        bad,
        bad.long(),
        [category[i % len(category)] for i in range(n)],
        [f"{i}.png" for i in range(n)],
        torch.ones(n, dtype=torch.bool),
    )


def mixed_batch(n=4, size=SIZE, **kw):
    return batch_of(
        torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n)), anomalous=range(0, n, 2), **kw
    )


def step(method, batch, optimiser=None):
    "One loss and its gradients; the names of the learned parameters that got none."
    for p in method.learned().values():
        p.grad = None
    with torch.no_grad():
        features = method.encode(batch)
    method.loss(method(features, batch), batch)["total"].backward()
    silent = {n for n, p in method.learned().items() if p.grad is None or p.grad.abs().max() == 0}
    assert all(p.grad.isfinite().all() for p in method.learned().values() if p.grad is not None)
    assert all(p.grad is None for b in method.backbones().values() for p in b.parameters()), (
        "a frozen tower got a gradient"
    )
    if optimiser is not None:
        optimiser.step()
    return silent


# ------------------------------------------------------------------------------------------------- the equations, written a second time


def attention(query, key, value, heads):
    "Eq. 3, a head at a time."
    width = query.shape[1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return torch.cat([torch.softmax(query[:, s] @ key[:, s].T / math.sqrt(width), -1) @ value[:, s] for s in parts], 1)


def literal(method, batch, size):
    "Eqs 2-5, 10-11 and 13-19 for one image after another, in loops, with interpolation and softmax as torch has them."
    p = method.p
    f = method.encode(batch)
    out = []
    for b in range(len(batch)):
        levels = []
        for i, (project, block) in enumerate(zip(method.hsvs.project, method.hsvs.local_blocks)):
            c = f[f"clip_{i}"][b] @ project.weight.T
            d = f[f"dino_{i}"][b]
            qc, kc, vc, qd, kd, vd = (
                x @ getattr(block, n).weight.T
                for x, n in (
                    (c, "clip_query"),
                    (c, "clip_key"),
                    (c, "clip_value"),
                    (d, "dino_query"),
                    (d, "dino_key"),
                    (d, "dino_value"),
                )
            )
            joined = torch.cat(
                [
                    block.norm_clip(attention(qc, kd, vd, block.heads)),
                    block.norm_dino(attention(qd, kc, vc, block.heads)),
                ],
                1,
            )
            levels.append(c + block.mlp(joined))
        g = f["clip_global"][b]
        block = method.hsvs.global_block
        seen = g + block.mlp(
            torch.cat([block.norm_clip(block.dino_value(f["dino_global"][b])), block.norm_dino(block.clip_value(g))])
        )
        init = method.prompts([batch.category[b]])[0]
        vcpg = method.vcpg
        noise = torch.randn(1, p.latents, vcpg.vae.latent, generator=torch.Generator().manual_seed(p.noise_seed))[0]
        z = vcpg.vae.mu(seen) + noise * torch.exp(vcpg.vae.logvar(seen) / 2)
        weights = torch.softmax(vcpg.query(init) @ vcpg.key(z).T / math.sqrt(vcpg.query.weight.shape[0]), -1)
        final = vcpg.norm(init + vcpg.alpha * (weights @ vcpg.value(z)))
        tau = method.vtam.log_tau.exp()
        K = p.prompts

        def up(x):
            return F.interpolate(x.reshape(1, 1, *method.grid), size, mode="bilinear", align_corners=False)[0, 0]

        gate = torch.softmax(method.vtam.global_gate(seen), -1)
        total = 0
        for w, v in zip(gate, levels):
            pairs = [
                torch.stack(
                    [up(F.cosine_similarity(v, final[k], dim=-1)), up(F.cosine_similarity(v, final[K + k], dim=-1))]
                )
                for k in range(K)
            ]
            expert = sum(torch.softmax(pair / tau, 0)[1] for pair in pairs) / K
            total = total + w * torch.sigmoid(up(method.vtam.local_gate(v)[:, 0])) * expert
        term = (
            sum(
                torch.softmax(
                    torch.stack(
                        [F.cosine_similarity(seen, final[k], dim=0), F.cosine_similarity(seen, final[K + k], dim=0)]
                    )
                    / tau[0],
                    0,
                )[1]
                for k in range(K)
            )
            / K
        )
        out.append((total, (1 - p.gamma) * term + p.gamma * total.max()))
    return torch.stack([m for m, _ in out]), torch.stack([s for _, s in out])


@pytest.mark.parametrize(
    "changes",
    [{}, dict(num_heads=1, prompts=2, latents=3, gamma=0.2, inner=48), dict(image_size=96)],
    ids=["defaults", "changed", "96 px"],
)
def test_forward_is_the_equations(changes):
    method = stirred(sigma=0.0, **changes)
    batch = mixed_batch(3, size=80)
    with torch.no_grad():
        maps, scores = literal(method, batch, (80, 80))
    found = method.predict(batch)
    assert torch.allclose(found.map, maps, atol=2e-5) and torch.allclose(found.score, scores, atol=2e-5)
    assert maps.std() > 1e-3, "nothing was compared"


def test_the_total_is_equation_22():
    method = stirred(xi=0.999).train()
    batch = mixed_batch()
    features = method.encode(batch)
    prediction = method(features, batch)
    got = method.loss(prediction, batch)
    found = prediction.layers
    mask = batch.mask[:, 0]
    y = batch.anomalous.float()
    s = torch.sigmoid(prediction.score)
    expected = dict(
        cls=-(y * s.log() + (1 - y) * (1 - s).log()).mean(),
        focal_map=focal(prediction.map, mask),
        focal_levels=sum(focal(found["experts"][:, i], mask) for i in range(4)) / 4,
        reconstruction=(method.vcpg.vae.decoder(found["z"][:, 0]) - found["seen"].detach()).square().mean(),
        kl=torch.distributions.kl_divergence(
            torch.distributions.Normal(found["mu"], (found["logvar"] / 2).exp()), torch.distributions.Normal(0.0, 1.0)
        ).mean(),
        margin=F.relu(0.999 - F.cosine_similarity(found["final"], found["init"], dim=-1)).mean(),
    )
    assert got.keys() - {"total"} == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=1e-5), name
    assert got["margin"] > 0
    e = expected
    assert torch.allclose(
        got["total"],
        e["focal_map"] + e["focal_levels"] + e["cls"] + e["reconstruction"] + 0.1 * e["kl"] + 0.5 * e["margin"],
        atol=1e-5,
    )


def test_focal_is_equation_20():
    p = torch.rand(2, 30, 30) * 0.98 + 0.01
    y = torch.rand(2, 30, 30) > 0.7
    printed = -torch.where(y, (1 - p) ** 2 * p.log(), p**2 * (1 - p).log()).mean()
    assert torch.allclose(focal(p, y), printed, atol=2e-4), "up to the smoothing of 1e-5"


def test_losses_that_are_options():
    method = stirred().train()
    batch = mixed_batch()
    features = method.encode(batch)

    def loss(**changes):
        method.p = dataclasses.replace(SSVPParameters(**SMALL), **changes)
        torch.manual_seed(3)
        return method.loss(method(features, batch), batch)

    both = loss()
    for seg, terms in (("map", {"focal_map"}), ("levels", {"focal_levels"})):
        found = loss(seg_on=seg)
        assert {k for k in found if k.startswith("focal")} == terms
        assert torch.allclose(
            found["total"], both["total"] - sum(both[k] for k in {"focal_map", "focal_levels"} - terms), atol=1e-6
        )
    probability = loss(image_loss="probability")["cls"]
    y = batch.anomalous.float()
    torch.manual_seed(3)
    s = method(features, batch).score
    assert torch.allclose(
        probability, -(y * s.log() + (1 - y) * (1 - s).log()).mean(), atol=1e-6
    ) and not torch.allclose(probability, both["cls"])
    zero = loss(weight_vae=0.0, weight_margin=0.0)
    assert torch.allclose(zero["total"], zero["focal_map"] + zero["focal_levels"] + zero["cls"], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize(
    "changes",
    [{}, *SSVP.ablations.values(), dict(z="mu"), dict(pool="mean", pairing="mean", global_score="difference")],
    ids=str,
)
def test_batch_mates_do_not_matter(changes):
    method = stirred(**changes)
    batch = mixed_batch(5, category=("bottle", "cable", "pcb1"))
    together = method.predict(batch)
    for rows in ([0], [3], [4, 1], [2, 2, 0]):
        alone = method.predict(batch[rows])
        assert torch.allclose(alone.map, together.map[rows], atol=1e-5) and torch.allclose(
            alone.score, together.score[rows], atol=1e-5
        ), rows


def test_evaluation_does_not_look_at_the_global_random_numbers():
    method = stirred()
    batch = mixed_batch()
    torch.manual_seed(1)
    first = method.predict(batch)
    torch.rand(13)
    again = method.predict(batch)
    state = torch.get_rng_state()
    assert torch.equal(first.map, again.map) and torch.equal(first.score, again.score)
    method.predict(batch)
    assert torch.equal(torch.get_rng_state(), state), "a prediction drew from the global generator"
    method.train()
    assert torch.equal(method.predict(batch).map, first.map), "predict is evaluation, whatever the mode"
    other = stirred(noise_seed=1).predict(batch)
    assert not torch.equal(other.map, first.map), "the seed of the latents does nothing"


def test_all_images_get_the_same_noise():
    method = stirred()
    image = torch.rand(1, 3, SIZE, SIZE)
    prediction = method.predict(batch_of(image.repeat(3, 1, 1, 1), category=("cable",)))
    assert (
        torch.allclose(prediction.layers["final"][0], prediction.layers["final"][2], atol=1e-6)
        and prediction.layers["z"].shape[1] == 10
    )
    assert (prediction.layers["z"][0, 0] - prediction.layers["z"][0, 1]).abs().max() > 0.1


def test_latents_in_training_are_new_each_time():
    method = stirred().train()
    batch = mixed_batch()
    features = method.encode(batch)
    a, b = (method(features, batch).layers["z"] for _ in range(2))
    assert a.shape == (4, 1, 128) and not torch.equal(a, b)
    assert stirred(train_latents=5).train()(features, batch).layers["z"].shape == (4, 5, 128)


def test_the_mean_latent():
    batch = mixed_batch()
    found = [stirred(z="mu", noise_seed=s).predict(batch) for s in (0, 1)]
    assert torch.equal(found[0].map, found[1].map) and torch.equal(found[0].layers["z"][:, 0], found[0].layers["mu"])
    many = stirred(latents=4000).predict(batch).layers["final"]
    few = stirred(latents=1).predict(batch).layers["final"]
    assert (many - found[0].layers["final"]).norm() < 0.5 * (few - found[0].layers["final"]).norm(), (
        "many samples should come near the mean"
    )


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("changes", [{}, dict(hsvs="none", vcpg=False, vtam=False)], ids=["full", "baseline"])
def test_black_and_uniform_images(level, changes):
    method = stirred(**changes)
    batch = batch_of(torch.full((2, 3, SIZE, SIZE), level), category=("bottle",), anomalous=[0])
    prediction = method.predict(batch)
    assert (
        prediction.map.isfinite().all()
        and prediction.score.isfinite().all()
        and torch.allclose(prediction.map[0], prediction.map[1], atol=1e-6)
    )
    step(method.train(), batch)  # asserts finite gradients


@pytest.mark.parametrize("size", [32, 80, 160])
def test_any_grid(size):
    method = stirred(image_size=size)
    batch = mixed_batch(2, size=size)
    grid = size // 16
    assert method.grid == (grid, grid) and method.dino.size == size
    features = method.encode(batch)
    assert all(features[f"{t}_{i}"].shape == (2, grid * grid, 192) for t in ("clip", "dino") for i in range(4))
    assert features["clip_global"].shape == (2, 128) and features["dino_global"].shape == (2, 192)
    found = method.predict(batch)
    shapes = {k: tuple(v.shape) for k, v in found.layers.items()}
    assert found.map.shape == (2, size, size) and found.score.shape == (2,)
    assert (
        shapes["experts"] == shapes["masks"] == (2, 4, size, size)
        and shapes["gate"] == (2, 4)
        and shapes["final"] == shapes["init"] == (2, 6, 128)
    )


def test_images_of_another_shape_than_the_towers():
    prediction = stirred().predict(batch_of(torch.rand(2, 3, 90, 40)))
    assert prediction.map.shape == (2, 90, 40) and prediction.map.isfinite().all()


def test_towers_with_different_patches_meet_on_one_grid():
    "The paper's case in small: 14-pixel patches of one tower, 16-pixel patches of the other."
    with torch.device("meta"):
        method = create("ssvp", clip="clip-vitl14", clip_weights="random:0", dino_weights="random:0", image_size=56)
        assert method.grid == (4, 4) and method.dino.size == 64
        with pytest.raises(
            ValueError,
            match=(
                r"4 x 4 patches \(56 px, patch 14\) and tiny-dino 3 x 3 \(48 px, patch 16\).*dino_size=64 or"
                r" image_size=42"
            ),
        ):
            create(
                "ssvp",
                clip="clip-vitl14",
                clip_weights="random:0",
                dino_weights="random:0",
                image_size=56,
                dino_size=48,
            )


def test_grids_that_differ():
    with pytest.raises(
        ValueError, match=r"4 x 4 patches \(64 px, patch 16\) and tiny-dino 8 x 8.*use dino_size=64 or image_size=128"
    ):
        small(dino_size=128)
    with pytest.raises(ValueError, match=r"level 1: CLIP has 16 patches and DINO 9.*518 px at 14 and 592 px at 16"):
        HSVS(torch.randn(24, 32), 48)(
            [torch.randn(1, 16, 24)] * 4, [torch.randn(1, 9, 48)] * 4, torch.randn(1, 32), torch.randn(1, 48)
        )


# --------------------------------------------------------------------------------------------------------------------- states at the start


def test_hsvs_starts_as_clip():
    batch = mixed_batch()
    proj = None
    for mode in ("atf", "concat", "none"):
        method = small(hsvs=mode).eval()
        features = method.encode(batch)
        proj = method.clip.tower.proj
        local, seen, *_ = method.condition(features, batch.category)
        for i, level in enumerate(local):
            assert torch.allclose(level, features[f"clip_{i}"] @ proj, atol=1e-5), (mode, i)
        assert torch.allclose(seen, features["clip_global"], atol=1e-6), mode
    native = method.clip(batch.image, norm=True)
    assert torch.equal(features["clip_3"], native.patches[3]) and torch.equal(
        features["clip_global"], native.cls @ proj
    )


def test_at_alpha_zero_only_the_normalisation_acts():
    batch = mixed_batch()
    for changes in ({}, dict(latents=3, noise_seed=9), dict(z="mu")):
        method = small(**changes).eval()
        found = method.predict(batch).layers
        assert torch.equal(found["final"], F.layer_norm(found["init"], (128,)))
    with_it = small().eval()
    without = small(vcpg=False).eval()
    with torch.no_grad():
        for p, q in zip(with_it.hsvs.parameters(), without.hsvs.parameters()):
            q.copy_(p)
        for p, q in zip(with_it.prompts.parameters(), without.prompts.parameters()):
            q.copy_(p)
        for p, q in zip(with_it.vtam.parameters(), without.vtam.parameters()):
            q.copy_(p)
    without.vcpg = lambda init, seen: (F.layer_norm(init, (128,)), {})
    assert torch.allclose(with_it.predict(batch).map, without.predict(batch).map, atol=1e-6)


def test_gates():
    batch = mixed_batch()
    start = small().eval().predict(batch)
    moved = stirred().predict(batch)
    assert torch.equal(start.layers["gate"], torch.full((4, 4), 0.25)) and start.layers[
        "masks"
    ].mean() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.05)
    for prediction in (start, moved):
        found = prediction.layers
        assert torch.allclose(found["gate"].sum(1), torch.ones(4), atol=1e-6) and (found["gate"] >= 0).all()
        for name in ("masks", "experts", "map"):
            assert (found[name] >= 0).all() and (found[name] <= 1).all(), name
        assert (prediction.score >= 0).all() and (prediction.score <= 1).all()
    assert moved.layers["gate"].std(0).max() > 1e-4, "the gate does not look at the image"
    assert moved.layers["masks"].flatten(2).std(-1).min() > 1e-4, "the mask does not look at the place"


def test_one_latent_moves_all_prompts_alike():
    torch.manual_seed(0)
    vcpg = VCPG(32, latents=1).eval()
    init = torch.randn(3, 6, 32)
    seen = torch.randn(3, 32)
    z = vcpg.vae(seen, vcpg.noise(seen))["z"]
    weights = vcpg.attend(init, z)
    assert (weights == 1).all()
    shift = weights @ vcpg.value(z)
    assert torch.allclose(shift, shift[:, :1].expand_as(shift)) and not torch.allclose(shift[0], shift[1])
    ten = VCPG(32).eval()
    assert ten.attend(init, ten.vae(seen, ten.noise(seen))["z"]).std(-1).min() > 1e-5


def test_smoothing_is_for_evaluation_and_not_for_the_score():
    batch = mixed_batch()
    smooth = stirred(sigma=4.0)
    raw = stirred(sigma=0.0)
    a = smooth.predict(batch)
    b = raw.predict(batch)
    assert torch.equal(a.score, b.score) and a.map.std() < b.map.std() and torch.equal(a.layers["map"], b.map)
    assert torch.allclose(b.score, 0.5 * b.layers["image_term"] + 0.5 * b.map.amax((1, 2)), atol=1e-6)
    features = smooth.encode(batch)
    trained = smooth.train()(features, batch)
    assert torch.equal(trained.map, trained.layers["map"])


def test_gamma_weighs_the_two_terms():
    batch = mixed_batch()
    scores = {g: stirred(gamma=g).predict(batch) for g in SWEEPS["gamma"]}
    assert torch.allclose(scores[0.0].score, scores[0.0].layers["image_term"]) and torch.allclose(
        scores[1.0].score, scores[1.0].layers["local_score"]
    )
    assert torch.allclose(scores[0.4].score, 0.6 * scores[0.0].score + 0.4 * scores[1.0].score, atol=1e-6)


def test_readings_of_the_score():
    batch = mixed_batch()
    found = {k: stirred(global_score=k).predict(batch).layers for k in ("probability", "difference", "cosine")}
    layers = found["cosine"]
    cosines = F.cosine_similarity(layers["seen"][:, None], layers["final"], dim=-1)
    assert torch.allclose(layers["image_term"], cosines[:, 3:].mean(1), atol=1e-6)
    assert torch.allclose(found["difference"]["image_term"], (cosines[:, 3:] - cosines[:, :3]).mean(1), atol=1e-6)
    assert (stirred(pool="mean").predict(batch).layers["local_score"] > found["probability"]["local_score"]).any()


# -------------------------------------------------------------------------------------------------------------------------------- learning

FIRST = {
    "vcpg.query.weight",
    "vcpg.key.weight",
    "vcpg.value.weight",
    "vtam.global_gate.0.weight",
    "vtam.global_gate.0.bias",
}  # behind alpha = 0, behind the gate's zero layer


def blocks(method):  # everything in front of the zero layers of the ATF blocks
    return {n for n in method.learned() if "_block" in n and "mlp.2" not in n}


@pytest.mark.parametrize(
    "changes,never",
    [
        ({}, ["vcpg.key.weight", "vcpg.query.weight"]),
        (dict(train_latents=3), []),
        (dict(num_heads=1, train_latents=2, shared_background=False), []),
        (dict(seg_on="map"), ["vcpg.key.weight", "vcpg.query.weight"]),
        (dict(image_loss="probability", train_latents=2), []),
    ],
    ids=str,
)
def test_gradient_reaches_every_learned_parameter(changes, never):
    "In the first step nothing in front of a zero layer or of alpha = 0 learns; from the second on everything does, but W_Q and W_K where one latent leaves a softmax nothing to choose."
    method = small(**changes).train()
    batch = mixed_batch()
    optimiser = torch.optim.Adam(method.param_groups(), betas=(0.5, 0.999))
    assert step(method, batch, optimiser) == FIRST | blocks(method)
    before = {n: p.clone() for n, p in method.learned().items()}
    assert step(method, batch, optimiser) == set(never)
    assert {n for n, p in method.learned().items() if torch.equal(p, before[n])} == set(never)


def test_gradient_of_the_ablations():
    for name, changes in SSVP.ablations.items():
        method = small(**changes).train()
        batch = mixed_batch()
        optimiser = torch.optim.Adam(method.param_groups(), betas=(0.5, 0.999))
        expected = (FIRST if method.p.vtam else {n for n in FIRST if method.p.vcpg and n.startswith("vcpg")}) | (
            blocks(method) if method.p.hsvs == "atf" else set()
        )
        assert step(method, batch, optimiser) == expected, name
        assert step(method, batch, optimiser) == (
            {"vcpg.query.weight", "vcpg.key.weight"} if method.p.vcpg else set()
        ), name


def test_gates_need_the_map_or_the_score():
    "With the levels' focal loss alone and no local term in the score, nothing trains the gates."
    method = small(seg_on="levels", gamma=0.0).train()
    assert {n for n in method.learned() if "_gate" in n} <= step(method, mixed_batch())


def test_groups_and_rates():
    method = small()
    groups = method.param_groups()
    assert [g["lr"] for g in groups] == [5e-4, 1e-4]
    assert {id(p) for p in groups[0]["params"]} == {
        id(p) for n, p in method.learned().items() if n in ("prompts.background", "prompts.state")
    } and len(groups[0]["params"]) == 2
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in method.learned().values())
    own = small(**SSVP.variants["the baseline's values"])
    assert (
        [g["lr"] for g in own.param_groups()] == [5e-4, 1e-4, 1e-2]
        and own.param_groups()[2]["params"] == [own.vtam.log_tau]
        and sum(len(g["params"]) for g in own.param_groups()) == len(own.learned())
    )
    assert (
        recipe_of("ssvp", **SSVP.variants["the baseline's values"].recipe).warmup == 0.1
        and SSVPParameters().lr_tau is None
        and SSVPParameters().state_mean == 0
    )
    assert list(method.backbones()) == ["clip", "text", "dino"] and not any(
        n.startswith(("clip.", "text.", "dino.")) for n in method.learned()
    )


def test_the_papers_recipe():
    r = recipe_of("ssvp")
    assert (r.epochs, r.batch_size, r.optimiser, r.betas, r.weight_decay, r.schedule, r.warmup, r.eta_min, r.seed) == (
        15,
        8,
        "adam",
        (0.5, 0.999),
        0.0,
        "cosine_steps",
        0.0,
        0.0,
        111,
    )
    p = SSVPParameters()
    assert (
        p.prompts,
        p.beta,
        p.weight_vae,
        p.weight_margin,
        p.xi,
        p.gamma,
        p.tau,
        p.latents,
        p.train_latents,
        p.focal_gamma,
    ) == (3, 0.1, 1.0, 0.5, 0.85, 0.5, 0.07, 10, 1, 2.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    full = synthetic_index(tmp_path_factory.mktemp("set"), "target", SIZE, normal=2, defective=2)
    part = full[full["category"].isin(sorted(full["category"].unique())[:2])].reset_index(drop=True)
    part.attrs = dict(full.attrs)
    return part


@pytest.mark.slow
def test_training_repeats_and_learns(index, tmp_path):
    recipe = recipe_of("ssvp", epochs=6, batch_size=4, lr_scale=10.0)
    found = []
    for _ in range(2):
        method = small()
        log = fit(method, index, recipe, progress=False)
        found.append((method, log))
    (a, log), (b, _) = found
    assert all(torch.equal(p, q) for p, q in zip(a.learned().values(), b.learned().values())), (
        "the same seed gave other numbers"
    )
    assert not log["skipped"].any() and log["total"].iloc[-2:].mean() < log["total"].iloc[:2].mean()
    assert {"total", "focal_map", "focal_levels", "cls", "reconstruction", "kl", "margin"} <= set(log.columns)
    filled = small()
    kept = small()
    first = fit(filled, index, recipe, progress=False, cache=FeatureCache(tmp_path))
    fit(kept, index, recipe, progress=False, cache=FeatureCache(tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(filled.learned().values(), kept.learned().values())), (
        "features from the cache train another model"
    )
    # a cache holds what one image alone gives; a whole batch rounds differently, and later steps carry that on
    assert abs(first["total"].iloc[0] - log["total"].iloc[0]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------- towers and prompts


def test_encode_is_frozen(tmp_path):
    method = small()
    batch = mixed_batch()
    before = method.encode(batch)
    with torch.no_grad():
        for p in method.learned().values():
            p.add_(1.0)
    after = method.encode(batch)
    assert before.keys() == after.keys() and all(
        torch.equal(before[k], after[k]) and len(before[k]) == 4 and not before[k].requires_grad for k in before
    )
    method = stirred()
    cache = FeatureCache(tmp_path)
    plain = method.predict(batch)
    first = method.predict(batch, cache)
    again = method.predict(batch, cache)
    assert torch.equal(first.map, again.map) and torch.allclose(plain.map, again.map, atol=1e-6) and cache.hits == 4


def test_the_cache_key_names_what_matters():
    key = small().encode_key()
    assert key == stirred(gamma=0.1, vcpg=False).encode_key(), "learned parts and scores do not change the features"
    for changes in (
        dict(image_size=32),
        dict(clip_taps=(1, 2, 3, 4)),
        dict(dino_layers="scaled"),
        dict(clip_weights="random:1"),
        dict(dino_weights="random:0"),
        dict(hsvs="none"),
    ):
        assert small(**changes).encode_key() != key, changes


def test_prompts_see_the_class_name():
    image = torch.rand(1, 3, SIZE, SIZE)

    def score(method, name):
        return method.predict(batch_of(image, category=(name,))).score

    named = stirred()
    agnostic = stirred(class_agnostic=True)
    assert not torch.equal(score(named, "bottle"), score(named, "cable"))
    assert torch.equal(score(named, "pcb1"), score(named, "pcb4")), "both are printed circuit boards"
    assert torch.equal(score(agnostic, "bottle"), score(agnostic, "cable")) and torch.equal(
        score(agnostic, "bottle"), score(named, "object")
    )


def test_prompts_are_not_stale():
    method = stirred()
    batch = mixed_batch()
    before = method.predict(batch).map
    with torch.no_grad():
        method.prompts.state.add_(0.5)
    assert not torch.equal(method.predict(batch).map, before), "the text embeddings are those of the old prompts"


def test_taps():
    assert paper_taps(24) == paper_taps(12) == (4, 7, 10, 12) and paper_taps(6) == (2, 4, 5, 6)
    assert (small().clip.taps, small().dino.taps, small(dino_layers="scaled").dino.taps) == (
        (2, 3, 4, 5),
        (2, 4, 5, 6),
        (2, 3, 5, 6),
    )
    two = stirred(clip_taps=[3, 5], dino_taps=[2, 6])
    assert two.p.clip_taps == (3, 5) and two.predict(mixed_batch()).layers["experts"].shape[1] == 2
    with pytest.raises(ValueError, match="as many of one as of the other"):
        small(clip_taps=(3, 5))


@pytest.mark.slow
def test_full_size():
    "The paper's towers, counted without memory: grids of 37 x 37, taps to the letter, 43,070,407 learned numbers."
    with torch.device("meta"):
        for name, changes in AUXILIARY.items():
            method = create("ssvp", clip_weights="random:0", dino_weights="random:0", **{**PAPER, **changes})
            assert method.grid == (37, 37) and method.clip.size == 518 and method.clip.taps == (6, 12, 18, 24), name
            assert method.dino.size == (518 if "DINOv2" in name else 592) and method.dino.taps == (4, 7, 10, 12), name
        scaled = create("ssvp", clip_weights="random:0", dino_weights="random:0", dino_layers="scaled", **PAPER)
    counts = method.parameter_counts()
    assert (
        sum(p.numel() for p in method.learned().values())
        == 43_070_407
        == sum(counts[k] for k in ("prompts", "hsvs", "vcpg", "vtam"))
    )
    assert scaled.dino.taps == (6, 12, 18, 24)
    v = method.vcpg
    assert (
        v.vae.latent,
        v.vae.mu[0].out_features,
        v.query.out_features,
        method.vtam.global_gate[0].out_features,
        method.hsvs.local_blocks[0].heads,
    ) == (768, 512, 256, 192, 8)
    assert [p.shape for p in (method.prompts.background, method.prompts.state)] == [(1, 5, 768), (2, 3, 5, 768)]


# ---------------------------------------------------------------------------------------------------------------- ablations, choices, files


def test_the_papers_ablations():
    assert (
        list(SSVP.ablations) == ["A baseline", "B naive concatenation", "C ATF", "D ATF, VCPG", "E full"]
        and SSVP.ablations["E full"] == {}
    )
    batch = mixed_batch()
    found = {}
    for name, changes in SSVP.ablations.items():
        method = stirred(**changes)
        found[name] = (sum(p.numel() for p in method.learned().values()), method.predict(batch).map)
        assert (method.dino is None) == (method.p.hsvs == "none") and list(method.backbones()) == ["clip", "text"] + [
            "dino"
        ] * (method.p.hsvs != "none")
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert found[a][0] != found[b][0] and not torch.allclose(found[a][1], found[b][1], atol=1e-4), (a, b)


@pytest.mark.slow
def test_studies_are_data():
    assert (
        SWEEPS["gamma"] == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        and SWEEPS["xi"] == (0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
        and len(AUXILIARY) == 5
    )
    fields = {f.name for f in dataclasses.fields(SSVPParameters)}
    for changes in (*SSVP.ablations.values(), *AUXILIARY.values(), PAPER, dict.fromkeys(SWEEPS)):
        assert set(changes) <= fields
    for name, values in SWEEPS.items():
        for v in values:
            assert getattr(small(**{name: v}).p, name) == v


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(hsvs="sum"), "atf, concat or none"),
        (dict(dino_layers="last"), "paper or scaled"),
        (dict(seg_on="pixels"), "map, levels or both"),
        (dict(image_loss="mse"), "paper or probability"),
        (dict(pairing="all"), "pairs or mean"),
        (dict(global_score="max"), "probability, difference or cosine"),
        (dict(pool="sum"), "max or mean"),
        (dict(z="zero"), "sample or mu"),
        (dict(vae_scale="max"), "mean, sum or unit"),
        (dict(gamma=1.1), "from 0 to 1"),
        (dict(tau=0.0), "above 0"),
        (dict(latents=0), "at least 1"),
        (dict(sigma=-1.0), "0 or more"),
        (dict(xi=1.5), "from -1 to 1"),
        (dict(num_heads=0), "at least 1"),
        (dict(prompts=0), "at least one prompt"),
        (dict(clip="tiny-dino"), "no text tower"),
        (dict(image_size=70), "not a multiple of the patch size"),
    ],
    ids=str,
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_every_parameter_has_a_source():
    table = describe("ssvp")
    assert (
        table["parameter"].is_unique and (table["source"].str.len() > 2).all() and (table["help"].str.len() > 2).all()
    )


def test_defaults_agree():
    "A component used by itself and the method have the same values: they are declared once, with the component."
    p = SSVPParameters()
    for own in (HSVSParameters, VCPGParameters, VTAMParameters):
        assert isinstance(p, own) and own.of(p) == own()
        again = set(vars(SSVPParameters)["__annotations__"]) & {f.name for f in dataclasses.fields(own)}
        assert not again, f"SSVP declares {sorted(again)} of {own.__name__} a second time"
    for component in (ATF(8, 8), HSVS(torch.zeros(8, 8), 8), VAE(8), VCPG(8), VTAM(8)):
        assert getattr(component, "p", None) in (None, VCPGParameters(), VTAMParameters())
    assert inspect.signature(stay_close).parameters["xi"].default == p.xi
    assert [head_count(w, 8) for w in (768, 128, 6, 35)] == [8, 8, 6, 7]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(hsvs="none", vcpg=False, vtam=False),
        dict(clip_taps=(2, 5), dino_taps=(3, 6), dino_layers="scaled", shared_background=False, latents=4),
    ],
    ids=str,
)
def test_save_and_load(changes, tmp_path):
    method = stirred(**changes)
    batch = mixed_batch()
    method.trained_on = ["a/b"]
    again = load(save(method, tmp_path / "m.safetensors"))
    a = method.predict(batch)
    b = again.predict(batch)
    assert (
        torch.equal(a.map, b.map)
        and torch.equal(a.score, b.score)
        and again.trained_on == ["a/b"]
        and again.p == method.p
    )
    with pytest.raises(Exception, match="pass the weights it was trained with"):
        load(tmp_path / "m.safetensors", clip_weights="random:1")


# ---------------------------------------------------------------------------------------------------------------------------------- Table 4


def test_scales_of_the_vae():
    torch.manual_seed(0)
    v = torch.randn(6, 40)
    losses = {}
    for scale in ("sum", "mean", "unit"):
        torch.manual_seed(1)
        vae = VAE(40, vae_scale=scale)
        losses[scale] = vae.loss(v, vae(v, torch.randn(6, 2, 40, generator=torch.Generator().manual_seed(2))))
    assert all(torch.allclose(a, 40 * b, rtol=1e-5) for a, b in zip(losses["sum"], losses["mean"]))
    assert losses["unit"][1] == losses["sum"][1] and losses["unit"][0] < losses["sum"][0]


def test_the_target_of_the_vae_is_detached():
    "Otherwise the image features could make the loss small by all being alike; the encoder's input stays attached."
    torch.manual_seed(0)
    for detach in (True, False):
        vae = VAE(40, detach_target=detach)
        seen = torch.randn(6, 40, requires_grad=True)
        drawn = {k: v.detach() for k, v in vae(seen, None).items()}
        (target,) = torch.autograd.grad(vae.loss(seen, drawn)[0], seen, allow_unused=True)
        assert (target is None) == detach
        (through,) = torch.autograd.grad(sum(vae.loss(seen, vae(seen, None))), seen)
        assert through.abs().max() > 0


@pytest.mark.slow
def test_alignment(index):
    method = small()
    init = alignment(method, index, "init")
    assert init.keys() == {"tir_fg", "scd_normal", "scd_abnormal"} and 0 < init["scd_normal"] < 0.15, (
        "alpha = 0: only the LayerNorm"
    )
    written = alignment(method, index)
    assert written["tir_fg"] == init["tir_fg"] and written["scd_normal"] > init["scd_normal"]
    assert alignment(small(vcpg=False), index, "init")["scd_normal"] == pytest.approx(0, abs=1e-5), (
        "without VCPG the text is static"
    )
    some = alignment(method, index)
    every = alignment(method, index, batch_size=3)
    assert some == pytest.approx(every, abs=1e-5), "depends on the batch size"
    assert method.training, "the mode was changed"
    with pytest.raises(ValueError, match="use written or init"):
        alignment(method, index, "none")
    text = static_text(method, ["cable", "bottle", "cable"])
    assert (
        text.shape == (3, 6, 128)
        and torch.equal(text[0], text[2])
        and torch.equal(text[0, 0], text[0, 2])
        and not torch.allclose(text[0, 0], text[0, 3])
    )


def test_measures_of_alignment():
    torch.manual_seed(0)
    patches = torch.randn(2, 16, 8)
    text = torch.randn(2, 3, 8)
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    assert len(tir_fg(patches, text, mask, (4, 4))) == 0
    mask[1, :, 16:32, 32:48] = True  # patch 6
    assert torch.allclose(
        tir_fg(patches, text, mask, (4, 4)), F.cosine_similarity(patches[1, 6], text[1], dim=-1).mean()[None]
    )
    mask[1, :, 30:34, 30:34] = True  # specks in its neighbours
    assert len(tir_fg(patches, text, mask, (4, 4))) == 1 and len(tir_fg(patches, text, mask, (4, 4), cover=0.001)) == 4
    a = torch.randn(5, 8)
    b = torch.randn(5, 8)
    assert torch.allclose(scd(a, b), (2 - 2 * F.cosine_similarity(a, b, dim=-1)).sqrt(), atol=1e-6) and torch.allclose(
        scd(a, b, unit=False), (a - b).norm(dim=-1)
    )
    assert stay_close(a, a, 1.0).item() == pytest.approx(0, abs=1e-6) and stay_close(
        a, -a, 0.85
    ).item() == pytest.approx(1.85, abs=1e-5)
    final = a.clone().requires_grad_()
    init = (a + 0.1).requires_grad_()
    stay_close(final, init, 1.0).backward()
    assert init.grad is None and final.grad is not None


STEPS = {  # image AUROC on MVTec AD, in the order of experiments/ablation
    ("dma_sap", "ablations"): {"A": 91.7, "B": 93.7, "C": 94.4, "D": 94.7},
    ("ssvp", "ablations"): {
        "A baseline": 91.3,
        "B naive concatenation": 90.8,
        "C ATF": 91.4,
        "D ATF, VCPG": 92.6,
        "E full": 93.0,
    },
    ("ssvp", "auxiliary"): {
        "MAE ViT-L": 90.5,
        "DINOv2 ViT-L": 91.1,
        "DINOv3 ViT-S": 90.9,
        "DINOv3 ViT-B": 92.2,
        "DINOv3 ViT-L": 93.0,
    },
}


def test_the_papers_tables_name_our_variants():
    "The published steps of experiments/ablation are found under our variants' names."
    for name in MODULES:
        for table, variants in method_class(name).tables().items():
            found = printed_variants(name, "mvtec", variants, ["image_auroc"]).set_index("name")["value"].to_dict()
            if table in ("ablations", "auxiliary"):
                assert list(found.items()) == list(STEPS.get((name, table), {}).items()), (name, table)
            else:
                assert set(found) <= set(variants)


def test_hsvs_without_dino_says_what_does_without_it():
    hsvs = HSVS(torch.randn(24, 32), 48, levels=1)
    with pytest.raises(ValueError, match="hsvs='none'"):
        hsvs([torch.randn(1, 4, 24)], [torch.randn(1, 4, 48)], torch.randn(1, 32), None)
