"Bayes-PFL: the flow against numerical Jacobians and integrals, the method against a second, literal writing; what must not matter does not; every learned number learns."
import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch.distributions import Normal, kl_divergence

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.text import create_text
from zsad_nb.backbones.weights import WeightsError
from zsad_nb.components.prompt_flow import PromptFlow, fixed_noise, planar
from zsad_nb.core import seed_everything
from zsad_nb.data.images import Batch, batches
from zsad_nb.data.synthetic import synthetic_index
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.learning.losses import dice
from zsad_nb.learning.training import fit, rate, recipe_of
from zsad_nb.methods.base import METHODS, create, describe, load, read_header, save
from zsad_nb.methods.bayes_pfl import RCA, BayesPFL, SampledPrompts, balanced_focal, not_orthogonal

SIZE, SAME = 64, 1e-5


def small(**changes):
    seed_everything(0)
    return create("bayes_pfl", **{**dict(clip_weights="random:0", image_size=SIZE), **changes}).eval()


def shaken(**changes):
    "As after training: every learned number moved."
    model, generator = small(**changes), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for q in model.learned().values(): q.add_(0.05 * torch.randn(q.shape, generator=generator))
    return model


def batch_of(image, categories=None) -> Batch:
    n, mask = len(image), torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.bool)
    mask[::2, :, 8:24, 16:40] = True
    bad = mask.flatten(1).any(1)
    return Batch(image, mask, bad, bad.long(), categories or ["screw"] * n, [f"{i}.png" for i in range(n)], torch.ones(n, dtype=torch.bool))


def images(n, seed=0, size=SIZE): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def batch() -> Batch: return batch_of(images(4), ["screw", "metal_nut", "screw", "pcb1"])


def far(a, b) -> float: return (a - b).abs().max().item()


def label(changes): return ",".join(f"{k}={v}" for k, v in changes.items()) or "default"


# --------------------------------------------------------------------------------------------------------------------------- the flow

def wild(width=5, flows=4, given=3, seed=0):
    "A flow far from the identity, in double precision."
    torch.manual_seed(seed)
    flow = PromptFlow(width, given, flows=flows).double()
    with torch.no_grad():
        for q in (flow.u, flow.w, flow.b): q.normal_(0, 1.5)
    return flow


@pytest.mark.parametrize("seed", range(3))
def test_log_determinant_is_the_jacobians(seed):
    flow, z = wild(seed=seed), torch.randn(6, 5, dtype=torch.double)
    found, logdet = flow.bend(z)
    for i in range(6):
        sign, expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(lambda x: flow.bend(x)[0], z[i]))
        assert sign > 0 and abs(expected - logdet[i]) < 1e-9
    assert logdet.abs().max() > 0.3, "nothing was bent"


def test_planes_stay_invertible():
    "Any u: order along the plane's normal is kept, and u = 0 changes nothing."
    w, line = torch.tensor([1.0, -2.0]), torch.linspace(-4, 4, 400)
    for factor in (-100.0, -3.0, 0.0, 3.0):
        points = line[:, None] * w / w.norm()
        found, logdet = planar(points, factor * w, w, torch.tensor(0.2))
        assert ((found @ w).diff() >= 0).all() and logdet.isfinite().all()
        assert (far(found, points) < 1e-6) == (factor == 0)
    naive = line + torch.tanh(5 * line) * -3 / math.sqrt(5)
    assert (naive.diff() < 0).any(), "without the correction it would fold"


def test_kl_without_planes_is_the_closed_form():
    torch.manual_seed(0)
    flow, given = PromptFlow(6, 4, flows=0), torch.randn(3, 4)
    with torch.no_grad(): found = flow(torch.randn(1, 60000, 6), given)
    closed = kl_divergence(Normal(found["mean"], found["std"]), Normal(0.0, 1.0)).sum(-1)
    assert far(flow.kl(found), closed) < 0.02 and closed.min() > 0.1 and found["logdet"].abs().max() == 0


def test_kl_with_planes_is_monte_carlo_with_densities():
    "log q_K by the change of variables with numerical Jacobians, log p by torch: the same number, sample by sample, up to the entropy's closed form."
    flow = wild(width=3, given=2)
    given, noise = torch.randn(2, 2, dtype=torch.double), torch.randn(2, 4000, 3, dtype=torch.double)
    with torch.no_grad(): found = flow(noise, given)
    few = 40
    for i in range(2):
        q0 = Normal(found["mean"][i], found["std"][i])
        z0 = found["mean"][i] + found["std"][i] * noise[i]
        jacobians = torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(lambda x: flow.bend(x)[0], z)).logabsdet for z in z0[:few]])
        assert far(jacobians, found["logdet"][i, :few]) < 1e-9
        monte_carlo = (q0.log_prob(z0).sum(-1) - found["logdet"][i] - Normal(0.0, 1.0).log_prob(found["sample"][i]).sum(-1))
        assert abs(flow.kl(found)[i] - monte_carlo.mean()) < 4 * q0.log_prob(z0).sum(-1).std() / math.sqrt(4000)
        by_hand = (found["sample"][i].square().sum(-1) / 2 + 1.5 * math.log(2 * math.pi) - found["logdet"][i]).mean() - q0.entropy().sum()
        assert abs(flow.kl(found)[i] - by_hand) < 1e-9


def test_minimising_the_kl_gives_the_prior():
    torch.manual_seed(0)
    flow = PromptFlow(4, 3, hidden=16, flows=3, start_std=0.1)
    given, optimiser = torch.randn(8, 3), torch.optim.Adam(flow.parameters(), lr=2e-2)
    first = flow.kl(flow(torch.randn(8, 16, 4), given)).mean().item()
    for _ in range(220):
        optimiser.zero_grad(); flow.kl(flow(torch.randn(8, 16, 4), given)).mean().backward(); optimiser.step()
    with torch.no_grad(): sample = flow(torch.randn(8, 2000, 4), given)["sample"].flatten(0, 1)
    assert flow.kl(flow(torch.randn(8, 200, 4), given)).mean() < 0.1 < first and sample.mean(0).abs().max() < 0.15 and (sample.std(0) - 1).abs().max() < 0.15


def test_softplus_std():
    flow, given = PromptFlow(4, 3), torch.randn(5, 3)
    found = flow(torch.randn(5, 2, 4), given)
    assert torch.allclose(found["std"], torch.log1p(flow.rho(given).exp()) + 1e-5, atol=1e-6)
    with torch.no_grad(): flow.rho[-1].bias.fill_(-200)
    found = flow(torch.randn(5, 2, 4), given)
    assert (found["std"] > 0).all() and flow.kl(found).isfinite().all()
    assert abs(PromptFlow(64, 8, start_std=0.02)(torch.zeros(1, 1, 64), torch.zeros(1, 8))["std"].mean().item() - 0.02) < 0.01


def test_fixed_noise():
    a = fixed_noise(10, 3, 16, 5)
    assert a.shape == (3, 1, 10, 16) and torch.equal(a[:, :, :4], fixed_noise(4, 3, 16, 5)) and not torch.equal(a, fixed_noise(10, 3, 16, 6)) and far(a[0], a[1]) > 0.1


# --------------------------------------------------------------------------------------------------------------------- the equations again

def flow_by_hand(flow, given, noise):
    "One sample of one image."
    mean, std = flow.mu(given), F.softplus(flow.rho(given)) + 1e-5
    z = mean + noise * std
    kl = -std.log() - 0.5
    logdet = 0
    for k in range(0 if flow.u is None else len(flow.u)):
        u, w, b = flow.u[k], flow.w[k], flow.b[k]
        m = torch.log(1 + (math.e - 1) * (w @ u).exp()) - 1
        u = u + (m - w @ u) * w / (w @ w)
        t = torch.tanh(w @ z + b)
        z, logdet = z + u * t, logdet + torch.log(1 + (1 - t * t) * (u @ w))
    return z, kl.sum() + z.square().sum() / 2 - logdet


def sentence(model, words, category, pair, state, context, offset):
    "One prompt, written out: start, moved context, moved state vectors, class, end."
    ids = model.text.tokenize([" ".join(["X"] * 10 + [words[category]])])
    row = model.text.embed(ids)[0].clone()
    row[1:6] = model.prompts.background[pair] + context
    row[6:11] = model.prompts.state[state, pair] + offset
    return model.text(row[None], ids.argmax(1))[0]


def look(rca, text, patches, count):
    "One text reads the patches, a head at a time."
    heads, width = [], len(text) // count
    for h in range(count):
        part = slice(h * width, (h + 1) * width)
        q, k, v = (rca.query.weight @ text)[part], (patches @ rca.key.weight.T)[:, part], (patches @ rca.value.weight.T)[:, part]
        heads.append(torch.softmax(k @ q / math.sqrt(width), 0) @ v)
    moved = text + rca.out.weight @ torch.cat(heads)
    return moved / moved.norm()


@torch.no_grad()
def literal(model, batch, size):
    "Map, score and KL for one image after another, in loops over samples, pairs, layers and heads."
    p, f, out = model.p, model.encode(batch), []
    noise = torch.randn(p.samples, 3, 128, generator=torch.Generator().manual_seed(p.noise_seed))
    words = {"screw": "screw", "metal_nut": "metal nut", "pcb1": "printed circuit board"}
    s_image, s_map = model.log_scale.exp().clamp(max=100).tolist()
    for b, category in enumerate(batch.category):
        g, texts, kls = f["cls"][b], [], []
        for r in range(p.samples):
            context, kl_c = flow_by_hand(model.flows["context"], g, noise[r, 0])
            normal, kl_n = flow_by_hand(model.flows["normal"], model.flows["normal"].vector, noise[r, 1])
            abnormal, kl_a = flow_by_hand(model.flows["abnormal"], model.flows["abnormal"].vector, noise[r, 2])
            kls.append(torch.stack([kl_c, kl_n, kl_a]))
            texts += [(sentence(model, words, category, k, 0, context, normal), sentence(model, words, category, k, 1, context, abnormal)) for k in range(p.bank)]
        image = sum(torch.softmax(s_image * torch.stack([F.cosine_similarity(g, t, dim=0) for t in pair]), 0)[1] for pair in texts) / len(texts)
        total = torch.zeros(size)
        for tap in model.clip.taps:
            patches, rca = f[f"tap_{tap}"][b] @ model.project[f"tap_{tap}"].weight.T, model.rca[f"tap_{tap}"]
            for pair in texts:
                logits = s_map * torch.stack([F.cosine_similarity(patches, look(rca, t, patches, p.num_heads), dim=-1) for t in pair])
                total += F.interpolate(logits.view(1, 2, *model.grid), size, mode="bilinear", align_corners=True)[0].softmax(0)[1]
        found = total / (len(texts) * len(model.clip.taps))
        if p.sigma: found = torch.from_numpy(gaussian_filter(found.numpy(), p.sigma))
        top = found.flatten().sort(descending=True).values[:math.ceil(p.top_share * found.numel())].mean()
        out.append((found, (1 - p.map_share) * image + p.map_share * top, torch.stack(kls).mean(0)))
    return [torch.stack(x) for x in zip(*out)]


@pytest.mark.parametrize("changes", [dict(samples=3), dict(samples=2, bank=2, num_heads=1, sigma=2.0, map_share=0.3, top_share=0.05, flows=3, clip_taps=(2, 5), noise_seed=4)], ids=label)
def test_forward_is_the_equations(batch, changes):
    model = shaken(**changes)
    found = model.predict(batch)
    maps, scores, kls = literal(model, batch, (SIZE, SIZE))
    assert far(found.map, maps) < 2e-5 and far(found.score, scores) < 2e-5
    for i, name in enumerate(("context", "normal", "abnormal")): assert torch.allclose(found.layers[f"kl_{name}"], kls[:, i], rtol=1e-4, atol=1e-3), name
    assert maps.std() > 1e-4 and far(scores[:1], scores[1:2]) > 1e-4, "nothing was compared"


@pytest.mark.parametrize("per_dimension", [True, False])
def test_the_loss_is_its_terms(batch, per_dimension):
    model = shaken(weight_kl=0.03, weight_reconstruction=0.7, weight_orthogonal=1.3, per_dimension=per_dimension).train()
    prediction = model(features := model.encode(batch), batch)
    got, found, mask = model.loss(prediction, batch), prediction.layers, batch.mask[:, 0]
    y, divide = batch.anomalous, 128 if per_dimension else 1
    image = found["image"].sigmoid()
    def focal(m): return -0.5 * (((1 - m[mask]) ** 2 * m[mask].log()).mean() + (m[~mask] ** 2 * (1 - m[~mask]).log()).mean())
    def orthogonal(v):
        flat = (v - v.mean(-1, keepdim=True)).flatten(1)
        return sum(F.cosine_similarity(flat[i], flat[j], dim=0) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    expected = dict(ce=-torch.cat([image[y].log(), (1 - image[~y]).log()]).mean(), focal=sum(focal(found["levels"][:, i]) for i in range(4)),
                    dice=sum(dice(found["levels"][:, i], mask) for i in range(4)), orthogonal=sum(orthogonal(v) for v in (model.prompts.background, model.prompts.state[0], model.prompts.state[1])),
                    kl=sum(found[f"kl_{k}"].mean() for k in ("context", "normal", "abnormal")) / divide, reconstruction=found["reconstruction"].mean() / divide)
    assert got.keys() - {"total"} == expected.keys()
    for name, value in expected.items(): assert torch.allclose(got[name], value, rtol=2e-3, atol=1e-4), name
    total = got["ce"] + got["focal"] + got["dice"] + 0.03 * got["kl"] + 0.7 * got["reconstruction"] + 1.3 * got["orthogonal"]
    assert torch.allclose(got["total"], total, rtol=1e-5) and far(prediction.map, found["levels"].mean(1)) < 1e-6, "maps in training are not smoothed"
    torch.manual_seed(7)
    drawn = model.draw(features["cls"])
    assert torch.allclose(model.flows["context"].reconstruction(drawn["context"], features["cls"]), torch.stack([(model.flows["context"].decoder(drawn["context"]["sample"][i, 0]) - features["cls"][i]).square().sum() for i in range(4)]), rtol=1e-4)


def test_focal_is_balanced():
    p, y = torch.rand(2, 40, 40) * 0.9 + 0.05, torch.zeros(2, 40, 40, dtype=torch.bool)
    y[0, :4, :4] = True
    p.requires_grad_()
    gradient, = torch.autograd.grad(balanced_focal(p, y, gamma=0.0), p)
    assert abs((gradient[y] * p[y]).sum() + 0.5) < 1e-3 and abs((gradient[~y] * (1 - p[~y])).sum() - 0.5) < 1e-3, "cross-entropy: each side weighs one half"
    for v in (0.0, 1.0): assert balanced_focal(torch.full((2, 2), v), torch.eye(2, dtype=torch.bool)).isfinite()


def test_not_orthogonal():
    v = torch.randn(3, 2, 8)
    assert far(not_orthogonal(v + 5), not_orthogonal(v)) < 1e-5 and not_orthogonal(v[:1].expand(3, -1, -1)) > 0.999 and not_orthogonal(v[:1]) == 0
    orthogonal = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]])[:, None]
    assert not_orthogonal(orthogonal) < 1e-12


def test_rca_is_attention_with_a_residual():
    torch.manual_seed(0)
    rca, texts, patches = RCA(16, 4), torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    with torch.no_grad():
        assert torch.allclose(rca(texts, patches).norm(dim=-1), torch.ones(2, 3), atol=1e-6)
        assert far(rca(texts, patches), rca(texts, patches.flip(1))) < 1e-6 and far(rca(texts, patches), rca(texts, patches + 1)) > 1e-3
        rca.out.weight.zero_()
        assert far(rca(texts, patches), F.normalize(texts, dim=-1)) < 1e-6


def test_samples_move_all_vectors_of_their_kind():
    text = create_text("tiny-clip", "random:0")
    prompts, rows = SampledPrompts(text, 2, 3, 2, shared_background=False), []
    handle = text.register_forward_pre_hook(lambda m, given: rows.append(given[0]))
    context, states = torch.randn(1, 2, 128), torch.randn(1, 2, 2, 128)
    prompts(["screw", "metal_nut"], context, states)
    handle.remove()
    got = rows[0].view(2, 2, 2, 2, -1, 128)  # image, sample, pair, state, token, channel
    for r in range(2):
        for k in range(2):
            for s in range(2):
                assert torch.equal(got[1, r, k, s, 1:3], prompts.background[k] + context[0, r]) and torch.equal(got[1, r, k, s, 3:6], prompts.state[s, k] + states[0, r, s])


# ----------------------------------------------------------------------------------------------------------------- what must not matter

CASES = [{}, dict(image_specific=False), dict(image_agnostic=False), dict(rca=False), dict(flows=0), dict(start="random", patch_norm=False), dict(context=0), dict(samples=1, bank=1)]


@pytest.mark.parametrize("changes", CASES, ids=label)
def test_batch_mates_do_not_matter(batch, changes):
    model = shaken(**changes)
    together = model.predict(batch)
    for rows in ([0], [3], [2, 1], [1, 1, 0]):
        alone = model.predict(batch[rows])
        assert far(alone.map, together.map[rows]) < SAME and far(alone.score, together.score[rows]) < SAME, rows
    strangers = Batch.cat([batch[1:2], batch_of(torch.zeros(3, 3, SIZE, SIZE), ["bottle", "a very long name of an object", "pcb1"])])
    assert far(model.predict(strangers).map[:1], together.map[1:2]) < SAME and far(model.predict(strangers).score[:1], together.score[1:2]) < SAME
    assert {len(v) for v in together.layers.values()} == {4}


def test_predictions_are_deterministic(batch):
    model = shaken()
    torch.manual_seed(1)
    first = model.predict(batch)
    torch.rand(13)
    state = torch.get_rng_state()
    again = model.predict(batch)
    assert torch.equal(again.map, first.map) and torch.equal(again.score, first.score) and torch.equal(torch.get_rng_state(), state), "a prediction drew from the global generator"
    model.train()
    assert torch.equal(model.predict(batch).map, first.map) and model.training, "predict is evaluation, whatever the mode"


def test_the_noise_seed_matters(batch):
    first, other = (shaken(noise_seed=s).predict(batch) for s in (0, 1))
    assert far(first.map, other.map) > 1e-4 and far(first.score, other.score) > 1e-4
    first, other = (shaken(noise_seed=s, image_specific=False, image_agnostic=False).predict(batch) for s in (0, 1))
    assert torch.equal(first.map, other.map) and first.layers["image"].shape == (4, 3), "without samples there is nothing to seed"
    spread = {r: torch.stack([shaken(noise_seed=s, samples=r, flows=0).predict(batch[:1]).map for s in range(4)]).std(0).mean() for r in (1, 16)}
    assert spread[16] < 0.6 * spread[1], "many samples agree"


def test_training_draws_anew_for_every_image(batch):
    model = shaken().train()
    twice = batch[[0, 0]]
    features = model.encode(twice)
    a, b = (model(features, twice).layers["image"] for _ in range(2))
    assert a.shape == (2, 3) and not torch.equal(a, b) and not torch.equal(a[0], a[1])
    assert shaken(train_samples=2).train()(features, twice).layers["image"].shape == (2, 6)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_blank_images(value):
    blank, model = batch_of(torch.full((2, 3, SIZE, SIZE), value)), shaken()
    prediction = model.predict(blank)
    assert all(v.isfinite().all() for v in (prediction.map, prediction.score, *prediction.layers.values())) and far(prediction.map[0], prediction.map[1]) < SAME
    model.train()
    losses = model.loss(model(model.encode(blank), blank), blank)
    losses["total"].backward()
    assert all(v.isfinite() for v in losses.values()) and all(q.grad.isfinite().all() for q in model.learned().values())


@pytest.mark.parametrize("shape", [(64, 64), (50, 81)])
def test_shapes(shape):
    model, given = shaken(samples=2), batch_of(torch.rand(3, 3, *shape))
    features, prediction = model.encode(given), model.predict(given)
    assert {len(v) for v in features.values()} == {3} and not any(v.requires_grad for v in features.values())
    assert prediction.map.shape == (3, *shape) and prediction.score.shape == (3,) and prediction.layers["levels"].shape == (3, 4, *shape)
    assert ((prediction.score >= 0) & (prediction.score <= 1)).all() and ((prediction.map >= 0) & (prediction.map <= 1)).all()


def test_class_names_are_rewritten(batch):
    model = shaken(samples=2)
    def map_of(name): return model.predict(Batch(**{**vars(batch[:1]), "category": [name]})).map
    assert torch.equal(map_of("pcb1"), map_of("pcb4")) and torch.equal(map_of("metal_nut"), map_of("metal nut")) and far(map_of("pcb1"), map_of("screw")) > 1e-6


# ------------------------------------------------------------------------------------------------------------- what learns, what is kept

@pytest.mark.parametrize("changes", CASES + [dict(train_samples=2), dict(per_dimension=False), dict(state_mean=0.0)], ids=label)
def test_gradient_reaches_what_is_learned_and_nothing_else(batch, changes):
    model = small(**changes).train()
    model.loss(model(model.encode(batch), batch), batch)["total"].backward()
    for n, q in model.learned().items():
        if q.numel(): assert q.grad is not None and q.grad.isfinite().all() and q.grad.abs().max() > 0, n
    assert all(q.grad is None for b in model.backbones().values() for q in b.parameters()) and not any(b.training for b in model.backbones().values())
    groups = model.param_groups()
    assert [g["lr"] for g in groups] == [1e-3, 1e-4, 1e-2] and sum(len(g["params"]) for g in groups) == len(model.learned()) == len({id(q) for g in groups for q in g["params"]})


def test_groups_and_recipe():
    model = small(lr=1.0, lr_linear=2.0, lr_scale=3.0)
    rates = {id(q): g["lr"] for g in model.param_groups() for q in g["params"]}
    for n, q in model.learned().items(): assert rates[id(q)] == dict(prompts=1.0, flows=1.0, project=2.0, rca=2.0, log_scale=3.0)[n.split(".")[0]], n
    r = recipe_of("bayes_pfl")
    assert (r.epochs, r.batch_size, r.optimiser, r.schedule, r.warmup, r.weight_decay) == (30, 32, "adam", "cosine_steps", 0.1, 0.0)
    assert rate(r, 1.0, 0, 0, 100) == 0.1 and rate(r, 1.0, 9, 0, 100) == rate(r, 1.0, 10, 1, 100) == 1.0 and rate(r, 1.0, 99, 29, 100) < 1e-3


def test_one_step_lowers_the_loss(batch):
    "On the same draw, a small step downhill."
    model = small().train()
    features = model.encode(batch)
    def loss():
        torch.manual_seed(5)
        return model.loss(model(features, batch), batch)
    first = loss()
    first["total"].backward()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    optimiser.step()
    assert loss()["total"] < first["total"] - 1e-5


def test_fit_and_evaluate(tmp_path):
    index = synthetic_index(tmp_path, "auxiliary", SIZE, normal=2, defective=2)
    index = index[index["category"].isin(sorted(index["category"].unique())[:2])].reset_index(drop=True)
    losses = []
    for _ in range(2):
        model = small()
        rows = fit(model, index, recipe_of(model, epochs=6, batch_size=4), progress=False, workers=0, cache=tmp_path / "cache")
        losses.append(rows["total"].tolist())
    assert losses[0] == losses[1] and rows["total"][-3:].mean() < rows["total"][:3].mean() and not rows["skipped"].any() and len(model.trained_on) == 2
    found = evaluate(model, synthetic_index(tmp_path / "target", "target", SIZE, normal=1, defective=1), progress=False, workers=0)
    assert found.mean.filter(regex="^(image|pixel)_").notna().all()


def test_save_and_load(batch, tmp_path):
    model = shaken(samples=4, bank=2, noise_seed=3, clip_taps=(3, 5))
    model.trained_on = ["visa/pcb1"]
    path = save(model, tmp_path / "model.safetensors")
    back = load(path).eval()
    assert back.p == model.p and back.trained_on == ["visa/pcb1"] and list(read_header(path)["backbones"]) == ["clip", "text"] == list(model.backbones())
    assert torch.equal(back.predict(batch).map, model.predict(batch).map) and torch.equal(back.predict(batch).score, model.predict(batch).score)
    more = load(path, samples=2).predict(batch)
    assert more.layers["image"].shape == (4, 4) and far(more.layers["image"], model.predict(batch).layers["image"][:, :4]) < 1e-4, "fewer samples are the first of many"


def test_encode_is_frozen_and_cached(batch, tmp_path):
    model, cache = shaken(samples=2), FeatureCache(tmp_path / "cache")
    before, fresh, other = model.encode(batch), model.predict(batch), copy.deepcopy(model)
    with torch.no_grad():
        for q in other.learned().values(): q.normal_()
    assert all(torch.equal(v, before[k]) for k, v in other.encode(batch).items())
    filled, kept = (model.predict(batch, cache) for _ in range(2))
    assert (cache.hits, cache.misses) == (4, 4) and torch.equal(kept.map, filled.map) and torch.equal(kept.score, filled.score)
    # what is kept was encoded image by image, whatever its company; a whole batch rounds differently
    assert torch.allclose(kept.map, fresh.map, rtol=1e-4, atol=1e-5) and torch.allclose(kept.score, fresh.score, rtol=1e-4, atol=1e-5)
    key = lambda **changes: json.dumps(small(**changes).encode_key(), sort_keys=True)
    for changes in (dict(clip_weights="random:1"), dict(image_size=80), dict(clip_taps=(3, 5)), dict(positions="bilinear"), dict(patch_norm=False)): assert key(**changes) != key(), changes
    for changes in (dict(tau=0.1), dict(start="random", rca=False)): assert key(**changes) == key(), changes


# ------------------------------------------------------------------------------------------------------------------- the second stage

HEAD = {"image_head.linear.weight", "image_head.log_gain"}


def second(**changes):
    "A trained-looking method in its second stage."
    return shaken(**changes).second_stage()


def moved(**changes):
    "The same, its head away from the start."
    model = second(**changes)
    with torch.no_grad():
        model.image_head.linear.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
        model.image_head.log_gain.fill_(0.3)
    return model


def test_the_second_stage_begins_where_the_first_ended(batch):
    first, later = shaken(samples=2).predict(batch), second(samples=2).predict(batch)
    assert torch.equal(first.map, later.map) and torch.equal(first.score, later.score) and all(torch.equal(v, later.layers[k]) for k, v in first.layers.items())
    assert set(second().learned()) - set(shaken().learned()) == HEAD and not shaken().p.second_stage
    model = second()
    head = model.image_head
    assert model.second_stage().image_head is head, "asked twice, the head stays"


def test_the_head_moves_the_image_part_alone(batch):
    first, later = shaken(samples=2).predict(batch), moved(samples=2).predict(batch)
    assert torch.equal(first.map, later.map) and {k for k, v in first.layers.items() if not torch.equal(v, later.layers[k])} == {"image"}
    assert far(first.score, later.score) > 1e-4
    assert torch.equal(shaken(samples=2, map_share=1.0).predict(batch).score, moved(samples=2, map_share=1.0).predict(batch).score), "a score from the map does not know the head"


def test_the_head_by_hand(batch):
    model = moved(samples=3)
    with torch.no_grad():
        features = model.encode(batch)
        texts, said = model.texts(model.draw(features["cls"]), batch.category), model.predict(batch).layers["image"]
        for i in range(len(batch)):
            g = features["cls"][i] + model.image_head.linear.weight @ features["cls"][i]
            for pair in range(9):
                normal, abnormal = (t / t.norm() for t in texts[i, pair])
                expected = model.log_scale[0].exp() * torch.tensor(0.3).exp() * ((g / g.norm()) @ abnormal - (g / g.norm()) @ normal)
                assert abs(expected - said[i, pair]) < SAME
    with torch.no_grad(): model.image_head.log_gain.fill_(50)
    assert model.predict(batch).layers["image"].abs().max() <= 2 * model.p.max_scale, "the factor ends at the largest temperature"


def test_gradient_reaches_the_head_and_nothing_else(batch):
    model = second().train()
    found = model.loss(model(model.encode(batch), batch), batch)
    assert list(found) == ["total", "ce"]
    found["total"].backward()
    assert {n for n, q in model.learned().items() if q.grad is not None and q.grad.abs().max() > 0} == HEAD and all(q.grad is None for n, q in model.learned().items() if n not in HEAD)
    assert all(q.grad is None for b in model.backbones().values() for q in b.parameters())
    assert [[g["lr"], *map(tuple, [q.shape for q in g["params"]])] for g in model.param_groups()] == [[1e-4, (128, 128)], [1e-2, ()]]
    assert [g["lr"] for g in second(lr_linear=2.0, lr_scale=3.0).param_groups()] == [2.0, 3.0]


def test_the_loss_is_the_images_cross_entropy(batch):
    model = moved().train()
    torch.manual_seed(4)
    features = model.encode(batch)
    with torch.no_grad(): prediction = model(features, batch)
    expected = -torch.stack([(p if bad else 1 - p).log() for row, bad in zip(prediction.layers["image"].double().sigmoid(), batch.anomalous) for p in row]).mean()
    assert abs(model.loss(prediction, batch)["total"] - expected) < 1e-5 and prediction.layers.keys() == {"image"}
    torch.manual_seed(4)
    model.p = replace(model.p, second_stage=False)
    with torch.no_grad(): assert torch.equal(model(features, batch).layers["image"], prediction.layers["image"]), "the same draws as in the first stage"


def test_fit_twice(tmp_path):
    "The second training changes the head, keeps all else to the last bit, lowers the cross-entropy, and repeats."
    index = synthetic_index(tmp_path, "auxiliary", SIZE, normal=2, defective=2)
    index = index[index["category"].isin(sorted(index["category"].unique())[:2])].reset_index(drop=True)
    whole, states = Batch.cat(batches(index, SIZE, 8)), []
    for _ in range(2):
        model = small(bank=1)
        fit(model, index, recipe_of(model, epochs=1, batch_size=4), progress=False, workers=0, cache=tmp_path / "cache")
        first, before = model.predict(whole), {n: q.detach().clone() for n, q in model.learned().items()}
        rows = fit(model.second_stage(), index, recipe_of(model, **{**BayesPFL.second_recipe, "epochs": 15, "batch_size": 4}), progress=False, workers=0, cache=tmp_path / "cache")
        later = model.predict(whole)
        assert all(torch.equal(q, before[n]) for n, q in model.learned().items() if n not in HEAD) and all(q.abs().max() > 0 for n, q in model.learned().items() if n in HEAD)
        assert torch.equal(first.map, later.map) and not torch.equal(first.score, later.score) and set(rows.columns) >= {"ce", "total"} and "focal" not in rows
        ce = [F.binary_cross_entropy_with_logits(x, whole.anomalous.float()[:, None].expand_as(x)).item() for x in (first.layers["image"], later.layers["image"])]
        assert ce[1] < ce[0] - 1e-3 and len(model.trained_on) == 2
        states.append(model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_the_second_stage_is_saved(batch, tmp_path):
    model = moved(samples=2)
    back = load(save(model, tmp_path / "second.safetensors")).eval()
    assert back.p.second_stage and torch.equal(back.predict(batch).score, model.predict(batch).score)
    first = load(save(shaken(samples=2), tmp_path / "first.safetensors"))
    assert not first.p.second_stage and first.image_head is None and torch.equal(first.second_stage().eval().predict(batch).score, shaken(samples=2).predict(batch).score)
    with pytest.raises(WeightsError, match="missing image_head"): load(tmp_path / "first.safetensors", second_stage=True)


def test_batch_mates_do_not_matter_to_the_head(batch):
    model = moved(samples=2)
    together = model.predict(batch)
    for rows in ([0], [2, 1]): assert far(model.predict(batch[rows]).score, together.score[rows]) < SAME


# ------------------------------------------------------------------------------------------------------------------ options and errors

def test_options_act(batch):
    reference = shaken(samples=2).predict(batch)
    for changes in (dict(positions="bilinear"), dict(patch_norm=False), dict(start="random"), dict(bank=2), dict(image_specific=False), dict(image_agnostic=False), dict(rca=False), dict(num_heads=2), dict(flows=3),
                    dict(start_std=0.1), dict(samples=3), dict(tau=0.1), dict(max_scale=5.0), dict(sigma=2.0), dict(map_share=0.2), dict(top_share=0.1)):
        found = shaken(**{**dict(samples=2), **changes}).predict(batch)
        assert max(far(found.map, reference.map), far(found.score, reference.score)) > 1e-6, changes
    assert far(shaken(samples=2, map_share=0.0).predict(batch).score, reference.layers["image"].sigmoid().mean(1)) < SAME
    peak = shaken(samples=2, map_share=1.0, top_share=1e-6).predict(batch)
    assert torch.equal(peak.score, peak.map.flatten(1).amax(1))


def test_no_image_knows_the_others_range(batch):
    "The released min-max over a test class is not here: adding a brighter image changes no score."
    model = shaken(samples=2)
    scores = model.predict(batch).score
    more = model.predict(Batch.cat([batch, batch_of(torch.ones(2, 3, SIZE, SIZE))])).score
    assert far(more[:4], scores) < SAME and not (scores.min() == 0 or scores.max() == 1) and "release_compat" not in describe("bayes_pfl")["parameter"].tolist()


@pytest.mark.parametrize("changes, message", [(dict(bank=0), "bank=0; it must be at least 1"), (dict(samples=0), "samples=0"), (dict(train_samples=0), "train_samples=0"), (dict(num_heads=5), "num_heads=5 does not divide the joint width 128"),
                                              (dict(map_share=1.5), "from 0 to 1"), (dict(top_share=0.0), "above 0, at most 1"), (dict(start="clip"), "use proj or random"), (dict(flows=-1), "0 or more"),
                                              (dict(start_std=0.0), "above 0"), (dict(tau=0.0), "above 0"), (dict(clip_taps=(3, 9)), "outside 1..5"), (dict(image_size=70), "multiple of the patch size"), (dict(context=40), "reads 40"), (dict(clip="tiny-dino"), "has no text tower|no space shared")], ids=str)
def test_wrong_parameters(changes, message):
    with pytest.raises(ValueError, match=message): small(**changes)


def test_described():
    table = describe("bayes_pfl")
    assert table["source"].ne("").all() and table["help"].ne("").all() and table["parameter"].is_unique
    for rows in (BayesPFL.ablations, *BayesPFL.studies.values()):
        for row, changes in rows.items():
            if changes: assert small(**changes).predict(batch_of(images(1))).map.isfinite().all(), row
    with pytest.raises(TypeError, match="did you mean tau"): small(tauu=1.0)
    assert METHODS["bayes_pfl"] is BayesPFL


def test_full_size():
    "The paper's sizes; nothing is allocated."
    with torch.device("meta"): model = create("bayes_pfl", clip="clip-vitl14-336", clip_weights="random:0")
    assert (model.clip.size, model.grid, model.clip.taps) == (518, (37, 37), (6, 12, 18, 24))
    shapes = {n: tuple(q.shape) for n, q in model.learned().items()}
    assert shapes["project.tap_6.weight"] == (768, 1024) and not any(n.startswith("project") and n.endswith("bias") for n in shapes)
    assert shapes["flows.context.mu.0.weight"] == (512, 768) and shapes["flows.normal.u"] == (10, 768) and shapes["prompts.background"] == (3, 5, 768) and shapes["prompts.state"] == (2, 3, 5, 768)
    assert math.ceil(model.p.top_share * 518 ** 2) == 2013
