"DMA, SAP and their method: shapes at any grid, independence of batch mates, blank images, gradients, equations by hand, ablations, checkpoints, errors."

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from zsad_nb.components.dma import DMA, LevelFusion, resize_tokens, similarity_attention
from zsad_nb.components.dual_path import dual_path, joint, values_to_joint
from zsad_nb.components.losses import dice, focal
from zsad_nb.components.maps import to_pixels
from zsad_nb.components.sap import SAP, image_feature, pool, pooling_weights
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.methods.base import METHODS, create, describe, load, save
from zsad_nb.methods.dma_sap import DMASAP, thirds

SIZE = 64
SMALL = dict(clip_weights="random:0", dino_weights="pretrained", image_size=SIZE)
SAME = 2e-5  # rounding of a batch of another size


def small(**changes) -> DMASAP:
    seed_everything(0)
    return create("dma_sap", **{**SMALL, **changes}).eval()


def shaken(**changes) -> DMASAP:
    "As after training: theta, gate, levels and prompts away from where they start."
    model = small(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, q in model.learned().items():
            if name.endswith(("theta", "gate")):
                q.fill_(0.4)
            elif name == "levels.weights":
                q.mul_(torch.tensor([1.3, 0.7, 0.9]))
            elif name.startswith("prompts"):
                q.add_(0.1 * torch.randn(q.shape, generator=generator))
    return model


def batch_of(image: torch.Tensor) -> Batch:
    n = len(image)
    mask = torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.bool)
    mask[::2, :, 8:24, 16:40] = True
    bad = mask.flatten(1).any(1)
    return Batch(
        image, mask, bad, bad.long(), ["c"] * n, [f"{i}.png" for i in range(n)], torch.ones(n, dtype=torch.bool)
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def model() -> DMASAP:
    return shaken()


# ------------------------------------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    "image_size,dino_size,shape,grids",
    [
        (64, None, (64, 64), (4, 4)),
        (64, 96, (64, 64), (4, 6)),
        (96, 48, (100, 72), (6, 3)),
        (32, 144, (31, 57), (2, 9)),
        (16, 16, (16, 40), (1, 1)),
    ],
)
def test_shapes_at_any_grid(image_size, dino_size, shape, grids):
    "CLIP and DINO on different grids, images of other sizes than the towers'."
    model = shaken(image_size=image_size, dino_size=dino_size)
    batch = batch_of(torch.rand(2, 3, *shape))
    features = model.encode(batch)
    assert {len(v) for v in features.values()} == {2} and not any(v.requires_grad for v in features.values())
    assert features["clip_0"].shape == (2, grids[0] ** 2, model.clip.width) and features["dino_0"].shape == (
        2,
        grids[1] ** 2,
        model.dino.width,
    )
    assert features["self"].shape == (2, grids[0] ** 2, 128) and features["cls"].shape == (2, 128)
    prediction = model.predict(batch)
    assert (
        prediction.map.shape == (2, *shape)
        and prediction.score.shape == (2,)
        and prediction.map.isfinite().all()
        and prediction.score.isfinite().all()
    )
    assert prediction.layers["fusion"].shape == (2, grids[1], grids[1]) and prediction.layers["self"].shape == (
        2,
        grids[0],
        grids[0],
    )
    assert prediction.layers["weights"].shape == (2, grids[1], grids[1]) and prediction.layers["image"].shape == (2, 2)
    assert ((prediction.map > 0) & (prediction.map < 1)).all() and (
        (prediction.score > 0) & (prediction.score < 1)
    ).all()
    model.train()
    losses = model.loss(model(features, batch), batch)
    assert all(v.ndim == 0 and v.isfinite() for v in losses.values())


def test_default_depths():
    assert [thirds(d) for d in (24, 12, 6, 5)] == [(8, 16, 24), (4, 8, 12), (2, 4, 6), (2, 4, 5)]
    model = small()
    assert (model.clip.taps, model.dino.taps, model.dual_blocks, model.pairs) == (
        (2, 4, 5),
        (2, 4, 6),
        4,
        [(2, 2), (4, 4), (5, 6)],
    )
    assert small(image_size=80).dino.size == 80, "DINO gets as many patches as CLIP"
    assert set(METHODS["dma_sap"].recipe) <= {
        "epochs",
        "batch_size",
        "optimiser",
        "weight_decay",
        "betas",
        "schedule",
        "warmup",
        "eta_min",
        "lr_scale",
        "seed",
    }


@pytest.mark.slow
def test_full_size_counts():
    "The paper's 436 M: CLIP ViT-L/14@336 with its text tower and 8.4 M new; DINO left out. Nothing is allocated."
    counts = {}
    for row, changes in DMASAP.ablations.items():
        with torch.device("meta"):
            model = create(
                "dma_sap",
                clip="clip-vitl14-336",
                clip_weights="random:0",
                dino="dinov2-vitb14-reg",
                dino_weights="random:0",
                **changes,
            )
        counts[row] = sum(q.numel() for q in model.learned().values())
    parts = model.parameter_counts()
    print(
        "\nlearned:",
        counts,
        "\nparts:",
        parts,
        f"\ntotal without DINO: {(parts['clip'] + parts['text'] + counts['D']) / 1e6:.1f} M",
    )
    assert (model.clip.taps, model.dino.taps, model.dual_blocks, model.grid, model.dino_grid) == (
        (8, 16, 24),
        (4, 8, 12),
        19,
        (37, 37),
        (37, 37),
    )
    assert parts["clip"] + parts["text"] == 427_944_192 and parts["dino"] == 86_582_016  # without CLIP's logit scale
    prompts = 2 * 12 * 768 + 8 * 4 * 768
    dma = 3 * ((768 + 1) * 1024 + (768 + 1) * 1024 + (1024 + 1) * 1024 + 1)
    sap = (768 + 1) * 768 + 1
    assert (parts["prompts"], parts["fuse"], parts["levels"], parts["sap"]) == (prompts, dma, 3, sap) and counts[
        "D"
    ] == prompts + dma + 3 + sap
    assert round((parts["clip"] + parts["text"] + counts["D"]) / 1e6) == 436
    assert counts["A"] < counts["B"] < counts["C"] < counts["D"]


# --------------------------------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(query="cls"),
        dict(centre=False),
        dict(threshold=False),
        dict(sap_weights="class"),
        dict(dma=False, pooling="map"),
        dict(dino_size=96),
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default",
)
def test_batch_mates_do_not_matter(batch, changes):
    model = shaken(**changes)
    together = model.predict(batch)
    for i in range(len(batch)):
        alone = model.predict(batch[i : i + 1])
        assert (alone.map - together.map[i : i + 1]).abs().max() < SAME and (
            alone.score - together.score[i : i + 1]
        ).abs().max() < SAME
    strangers = Batch.cat([batch[1:2], batch_of(torch.zeros(3, 3, SIZE, SIZE))])
    assert (model.predict(strangers).map[:1] - together.map[1:2]).abs().max() < SAME


def test_a_batch_mean_would_matter():
    "The check above can fail: with the mean cosine of the whole batch an attention depends on its batch mates."
    torch.manual_seed(0)
    patches = torch.cat([torch.randn(1, 30, 8), torch.randn(1, 30, 8) + 2])
    unit = F.normalize(patches, dim=-1)
    batch_mean = (unit @ unit.transpose(1, 2)).mean()
    assert (similarity_attention(patches)[:1] - similarity_attention(patches[:1])).abs().max() < 1e-6
    assert (similarity_attention(patches, mean=batch_mean)[:1] - similarity_attention(patches[:1])).abs().max() > 1e-2


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_blank_images(centre, value):
    "Black, grey and white: finite maps and scores, in a pass with gradients too."
    model = shaken(centre=centre)
    batch = batch_of(torch.full((2, 3, SIZE, SIZE), value))
    prediction = model.predict(batch)
    assert prediction.map.isfinite().all() and prediction.score.isfinite().all()
    model.train()
    losses = model.loss(model(model.encode(batch), batch), batch)
    losses["total"].backward()
    assert losses["total"].isfinite() and all(
        q.grad.isfinite().all() for q in model.learned().values() if q.grad is not None
    )


@pytest.mark.parametrize(
    "patches",
    [
        torch.zeros(1, 12, 8),
        torch.ones(1, 12, 8),
        -torch.ones(1, 12, 8),
        torch.eye(12, 8)[None],
        torch.full((1, 12, 8), 1e-30),
    ],
)
@pytest.mark.parametrize("options", [{}, dict(threshold=False), dict(centre=True)])
def test_similarity_attention_is_always_an_attention(patches, options):
    a = similarity_attention(patches, **options)
    assert a.isfinite().all() and (a.sum(-1) - 1).abs().max() < 1e-5 and (a.diagonal(dim1=1, dim2=2) > 0).all()


# --------------------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(query="cls"),
        dict(project_first=False),
        dict(threshold=False),
        dict(sap_weights="class"),
        dict(loss_maps="mean", upsampling="bilinear"),
        dict(fusion="deep"),
        dict(pooling="map"),
        dict(dma=False, pooling="map"),
        dict(fusion="deep", dma=False, pooling="map"),
        dict(self_map=False),
        dict(soft_mean=True),
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default",
)
def test_gradient_reaches_every_parameter(batch, changes):
    "All but `key.bias`: it adds the same number to every logit of A_clip, and a softmax does not see that."
    model = shaken(**changes).train()
    features = model.encode(batch)
    model.loss(model(features, batch), batch)["total"].backward()
    dead = {n for n, q in model.learned().items() if q.grad is None or q.grad.abs().max() == 0}
    assert not {n for n in dead if not n.endswith("key.bias")}, dead
    largest = {n: q.grad.abs().max().item() for n, q in model.learned().items() if q.grad is not None}
    assert all(g < 1e-3 * max(largest.values()) for n, g in largest.items() if n.endswith("key.bias")), (
        "key.bias should be silent"
    )
    assert all(q.grad is None for b in model.backbones().values() for q in b.parameters())
    assert not any(b.training for b in model.backbones().values())


def test_who_waits_at_the_start(batch):
    "At theta = 0 the text branch of the attention has no gradient; theta has one, so it opens after one step."
    model = small().train()
    waiting = []
    optimiser = torch.optim.Adam(model.param_groups(), betas=model.recipe["betas"])
    for _ in range(2):
        optimiser.zero_grad()
        model.loss(model(model.encode(batch), batch), batch)["total"].backward()
        waiting.append({n for n, q in model.learned().items() if q.grad is None or q.grad.abs().max() == 0})
        optimiser.step()
    assert waiting[0] == {
        f"fuse.{i}.{part}" for i in range(3) for part in ("query.weight", "query.bias", "key.weight", "key.bias")
    }
    assert not {n for n in waiting[1] if not n.endswith("key.bias")}
    raw = small(project_first=False).train()
    raw.loss(raw(raw.encode(batch), batch), batch)["total"].backward()
    assert raw.fuse[0].dino_proj.weight.grad.abs().max() == 0, (
        "the raw cosines leave the projection to the text branch alone"
    )


# ------------------------------------------------------------------------------------------------------------------ equations by hand


def test_literal_formula(batch):
    "theta = 0, threshold off: F_fusion is softmax(3 cos) V through the frozen projections, summed with the level weights."
    model = small(threshold=False, project_first=False, centre=False)
    features = model.encode(batch)
    text = model.text_features()
    by_hand = 0
    for i, ((tap, _), weight) in enumerate(zip(model.pairs, (0.5, 0.5, 1.0))):
        f = features[f"dino_{i}"]
        cosine = torch.einsum("bid,bjd->bij", f, f) / f.norm(dim=-1)[:, :, None] / f.norm(dim=-1)[:, None]
        weights = torch.exp(3.0 * (cosine - 1.2 * cosine.mean((1, 2), keepdim=True)))
        mixed = weights / weights.sum(-1, keepdim=True) @ features[f"clip_{i}"]
        block = model.clip.tower.transformer.resblocks[tap - 1]
        tower = model.clip.tower
        by_hand = by_hand + weight * (
            tower.ln_post(mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias) @ tower.proj
        )
    assert (model.fused(features, text) - F.normalize(by_hand, dim=-1)).abs().max() < 1e-5
    assert (
        model.fused(features, text) - small(project_first=False, centre=False, shift=0.9).fused(features, text)
    ).abs().max() > 1e-3
    assert torch.equal(
        model.fused(features, text),
        small(threshold=False, project_first=False, centre=False, theta=0.0, query="cls").fused(features, text),
    ), "no theta, no query"


def test_text_term(batch):
    "(A_dino + theta A_clip) V, with A_clip one row for all patches."
    torch.manual_seed(0)
    dma = DMA(24, 32, 16, theta=0.6)
    f = torch.randn(2, 20, 24)
    v = torch.randn(2, 20, 32)
    g = torch.randn(2, 16)
    dino, clip = dma.attend(f, g)
    projected = f @ dma.dino_proj.weight.T + dma.dino_proj.bias
    logits = (
        (g @ dma.query.weight.T + dma.query.bias)[:, None]
        @ (projected @ dma.key.weight.T + dma.key.bias).transpose(1, 2)
        / 32**0.5
    )
    assert (clip - logits.softmax(-1)).abs().max() < 1e-6 and (
        dino - similarity_attention(projected)
    ).abs().max() < 1e-6
    assert (dma(f, (4, 5), v, (4, 5), g, lambda x: x) - (dino + 0.6 * clip) @ v).abs().max() < 1e-5
    assert (clip[0] - dma.attend(f[:1], g[1])[1][0]).abs().max() > 1e-4, "another query, another attention"


def test_threshold_by_hand():
    torch.manual_seed(0)
    f = torch.randn(1, 15, 6) + 0.4
    a = similarity_attention(f, 3.0, 1.2)
    for i in range(15):
        cosine = F.cosine_similarity(f[0, i], f[0], dim=-1)
        mean = F.cosine_similarity(f[0, :, None], f[0, None], dim=-1).mean()
        kept = {j: torch.exp(3 * cosine[j]).item() for j in range(15) if cosine[j] >= 1.2 * mean or j == i}
        expected = torch.tensor([kept.get(j, 0.0) / sum(kept.values()) for j in range(15)])
        assert (a[0, i] - expected).abs().max() < 1e-5
    assert 0 < (a == 0).float().mean() < 1


def test_resized_values():
    v = torch.arange(12.0).view(1, 12, 1)
    grid = F.interpolate(v.view(1, 1, 3, 4), (5, 2), mode="bilinear", align_corners=False)
    assert (
        torch.equal(resize_tokens(v, (3, 4), (5, 2)).flatten(), grid.flatten())
        and resize_tokens(v, (3, 4), (3, 4)) is v
    )


def test_sap_by_hand(batch):
    torch.manual_seed(0)
    sap = SAP(16, gate=0.7)
    p = F.normalize(torch.randn(2, 9, 16), dim=-1)
    d = torch.randn(2, 9)
    cls = torch.randn(2, 16)
    for b in range(2):
        w = torch.exp(d[b]) / torch.exp(d[b]).sum()
        base = sum(w[i] * p[b, i] for i in range(9))
        q = sap.query.weight @ base + sap.query.bias
        a = torch.stack([(q * w[i] * p[b, i]).sum() / 4 for i in range(9)]).softmax(0)
        gate = torch.tensor(0.7).sigmoid()
        expected = (1 - gate) * base + gate * sum(a[i] * p[b, i] for i in range(9))
        assert (sap(p, d)[b] - expected).abs().max() < 1e-6
        phi = 0.5 * expected + 0.5 * cls[b] / cls[b].norm()
        assert (image_feature(sap(p, d), cls)[b] - phi / phi.norm()).abs().max() < 1e-6
    crane = pool(p, pooling_weights(d, "class"), "class")
    assert (crane - F.normalize((d.sigmoid().unsqueeze(-1) * p).sum(1), dim=-1)).abs().max() < 1e-6


def test_prediction_by_hand(batch):
    "From features to map and score, without the method's shortcuts for two classes."
    model = shaken(sigma=0.0)
    features = model.encode(batch)
    text = model.text_features()
    tau = 0.07
    local = [model.fused(features, text), features["self"]]
    logits = [(f @ text.T / tau).transpose(1, 2).unflatten(2, (4, 4)) for f in local]
    prediction = model.predict(batch)
    by_hand = (
        torch.stack([F.interpolate(m, SIZE, mode="bilinear", align_corners=False) for m in logits])
        .mean(0)
        .softmax(1)[:, 1]
    )
    assert (prediction.map - by_hand).abs().max() < 1e-5
    soft = torch.stack([F.interpolate(m.softmax(1), SIZE, mode="bilinear", align_corners=False) for m in logits]).mean(
        0
    )[:, 1]
    assert (shaken(sigma=0.0, soft_mean=True).predict(batch).map - soft).abs().max() < 1e-5 and (
        soft - by_hand
    ).abs().max() > 1e-4
    mean = torch.stack([m.flatten(2) for m in logits]).mean(0)
    pooled = model.sap(torch.stack(local).mean(0), mean[:, 1] - mean[:, 0])
    score = (F.normalize(0.5 * pooled + 0.5 * features["cls"], dim=-1) @ text.T / tau).softmax(-1)[:, 1]
    assert (prediction.score - score).abs().max() < 1e-5
    assert (shaken().predict(batch).map - to_pixels(by_hand, SIZE, 4.0)).abs().max() < 1e-5, "the Gaussian comes last"
    training = shaken().train()
    assert (training(features, batch).map - by_hand).abs().max() < 1e-5, "no Gaussian while training"


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_losses_by_hand(batch, upsampling):
    model = shaken(upsampling=upsampling, weight_focal=2.0, weight_dice=3.0, weight_ce=0.2).train()
    prediction = model(model.encode(batch), batch)
    losses = model.loss(prediction, batch)
    mask = batch.mask[:, 0]
    maps = [
        F.interpolate(
            prediction.layers[k][:, None],
            SIZE,
            mode=upsampling,
            **({} if upsampling == "nearest" else dict(align_corners=False)),
        )[:, 0].sigmoid()
        for k in ("fusion", "self")
    ]
    assert (losses["focal"] - sum(focal(m, mask) for m in maps)).abs() < 1e-5 and (
        losses["dice"] - sum(dice(m, mask) for m in maps)
    ).abs() < 1e-5
    log = (prediction.layers["image"] / 0.01).log_softmax(-1)
    assert (losses["ce"] + log[torch.arange(4), batch.anomalous.long()].mean()).abs() < 1e-4
    assert (losses["total"] - (2 * losses["focal"] + 3 * losses["dice"] + 0.2 * losses["ce"])).abs() < 1e-4 and set(
        losses
    ) == {"total", "focal", "dice", "ce"}
    fused = shaken(upsampling=upsampling, loss_maps="mean", sigma=0.0).train()
    assert (
        fused.loss(fused(fused.encode(batch), batch), batch)["dice"]
        - dice(sum(m.logit() for m in maps).div(2).sigmoid(), mask)
    ).abs() < 1e-5


def test_encode_is_the_frozen_part(batch, model):
    "Values, tokens, F_self and class token as the dual path gives them; nothing learned is read."
    features = model.encode(batch)
    with torch.no_grad():
        seen = dual_path(model.clip, batch.image, (5,), 4, "qkv", (2, 4, 5))
        assert all(torch.equal(features[f"clip_{i}"], seen.values[t]) for i, t in enumerate((2, 4, 5)))
        assert torch.equal(
            features["self"], F.normalize(joint(model.clip, seen.layers[0][:, 1:]), dim=-1)
        ) and torch.equal(features["cls"], F.normalize(joint(model.clip, seen.cls), dim=-1))
        assert torch.equal(features["dino_1"], model.dino(batch.image, (4,), norm=True).patches[0])
        assert values_to_joint(model.clip, seen.values[2], 2).shape == (4, 16, 128)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for q in other.learned().values():
            q.normal_()
    assert all(torch.equal(v, features[k]) for k, v in other.encode(batch).items())
    summed = shaken(dma=False, pooling="map").encode(batch)
    assert (
        summed["clip_2"] - model.clip(batch.image, (5,)).patches[0]
    ).abs().max() < 1e-5 and summed.keys() == features.keys()


@pytest.mark.slow
def test_encode_key(model):
    "Features of two settings may be shared exactly when their keys are equal."

    def key(**changes):
        return json.dumps(small(**changes).encode_key())

    base = key()
    for changes in (
        dict(clip_weights="random:1"),
        dict(dino_weights="random:0"),
        dict(image_size=80),
        dict(dino_size=96),
        dict(clip_taps=(1, 2, 5)),
        dict(dino_taps=(1, 2, 6)),
        dict(dino_norm=False),
        dict(dual_blocks=2),
        dict(attention="vv"),
        dict(value_from="attended"),
        dict(dma=False),
        dict(fusion="deep"),
        dict(self_map=False),
    ):
        assert key(**changes) != base, changes
    for changes in (
        dict(pooling="map"),
        dict(theta=0.5),
        dict(prompt_count=3),
        dict(tau=0.1),
        dict(threshold=False),
        dict(sigma=0.0),
    ):
        assert key(**changes) == base, changes


# ---------------------------------------------------------------------------------------------------------------- parameters that act


def test_level_weights(batch):
    model = shaken()
    before = model.predict(batch).map
    with torch.no_grad():
        model.levels.weights.mul_(3.0)
    assert (model.predict(batch).map - before).abs().max() < SAME, (
        "a common factor has no effect: features are compared by their direction"
    )
    changed = []
    for i in range(3):
        other = shaken()
        with torch.no_grad():
            other.levels.weights[i] = 0.0
        changed.append(other.predict(batch).map)
        assert (changed[-1] - before).abs().max() > 1e-4, i
    assert (changed[0] - changed[2]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="2 depths for 3 level weights"):
        LevelFusion()([torch.zeros(1, 2, 3)] * 2)


@pytest.mark.slow
def test_every_option_acts(batch):
    "Each option changes the prediction of the same learned values, or the loss where it belongs to training."
    base = shaken()
    reference = base.predict(batch)
    features = base.encode(batch)
    for changes in (
        dict(clip_taps=(1, 3, 5)),
        dict(dino_taps=(1, 3, 5)),
        dict(dino_norm=False),
        dict(dual_blocks=1),
        dict(attention="vv"),
        dict(value_from="attended"),
        dict(self_map=False),
        dict(scale=5.0),
        dict(shift=-5.0),
        dict(threshold=False),
        dict(centre=False),
        dict(query="cls"),
        dict(sap_weights="class"),
        dict(cls_weight=0.2),
        dict(tau=0.1),
        dict(soft_mean=True),
        dict(sigma=1.0),
        dict(pooling="map"),
        dict(pooling="cls"),
        dict(normal_words="thing."),
        dict(abnormal_words="broken object."),
    ):
        other = shaken(**changes)
        with torch.no_grad():
            for n, q in other.learned().items():
                q.copy_(base.learned()[n])
        found = other.predict(batch)
        assert max((found.map - reference.map).abs().max(), (found.score - reference.score).abs().max()) > 1e-6, changes
    base.train()
    total = base.loss(base(features, batch), batch)["total"].item()
    for changes in (
        dict(tau_train=0.07),
        dict(loss_maps="mean"),
        dict(upsampling="bilinear"),
        dict(weight_focal=2.0),
        dict(weight_dice=2.0),
        dict(weight_ce=1.0),
    ):
        other = shaken(**changes).train()
        assert abs(other.loss(other(features, batch), batch)["total"].item() - total) > 1e-5, changes


def test_projection_keeps_or_ignores_the_raw_cosines(batch):
    "Untrained, both orders agree (Crane's D-Attn); once the projection is trained, only one follows it."
    first = small()
    raw = small(project_first=False)
    assert (first.predict(batch).map - raw.predict(batch).map).abs().max() < SAME
    with torch.no_grad():
        for m in (first, raw):
            m.fuse[2].dino_proj.weight.mul_(torch.linspace(0, 3, 192)[:, None])
    assert (first.predict(batch).map - raw.predict(batch).map).abs().max() > 1e-4
    assert (raw.predict(batch).map - small(project_first=False).predict(batch).map).abs().max() < SAME


def test_ablations(batch):
    maps, learned = {}, {}
    assert list(DMASAP.ablations) == ["A", "B", "C", "D"]
    for row, changes in DMASAP.ablations.items():
        model = shaken(**changes)
        if not model.p.dma:
            with torch.no_grad():
                for f in model.fuse:
                    f.weight.add_(0.1)
        found, learned[row] = model.predict(batch), set(model.learned())
        maps[row] = found
        assert found.map.isfinite().all() and found.map.shape == (4, SIZE, SIZE)
    for a, b in ("AB", "BC", "AC"):
        assert (maps[a].map - maps[b].map).abs().max() > 1e-4, (a, b)
    assert (maps["C"].map - maps["D"].map).abs().max() < SAME and (
        maps["C"].score - maps["D"].score
    ).abs().max() > 1e-4, "SAP changes the score alone"
    assert (
        "levels.weights" in learned["B"] - learned["A"]
        and any("theta" in n for n in learned["C"] - learned["B"])
        and learned["D"] - learned["C"] == {"sap.query.weight", "sap.query.bias", "sap.gate"}
    )
    untrained = small(**DMASAP.ablations["A"])
    features = untrained.encode(batch)
    assert (
        untrained.fused(features, untrained.text_features())
        - F.normalize(joint(untrained.clip, features["clip_0"]), dim=-1)
    ).abs().max() < 1e-6, "untrained, the sum is CLIP alone"


def test_evaluation_after_training_after_evaluation(batch):
    "What evaluation keeps is renewed when a parameter moves, and does not stand in the way of gradients."
    model = small()
    before = model.predict(batch)
    model.train()
    optimiser = torch.optim.Adam(model.param_groups())
    model.loss(model(model.encode(batch), batch), batch)["total"].backward()
    optimiser.step()
    after = model.predict(batch)
    assert model.training and (after.map - before.map).abs().max() > 1e-4
    model.eval()
    image = batch.image.clone().requires_grad_()
    again = model(model.encode(Batch(image, *list(vars(batch).values())[1:])), batch)
    assert (again.map - after.map).abs().max() < SAME
    again.score.sum().backward()
    assert image.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------------------------ checkpoints, errors


def test_save_and_load(batch, tmp_path):
    model = shaken(clip_taps=(1, 3, 5), levels=(0.2, 0.3, 1.0))
    model.trained_on = ["set/a"]
    back = load(save(model, tmp_path / "m.safetensors")).eval()
    one = model.predict(batch)
    two = back.predict(batch)
    assert torch.equal(one.map, two.map) and torch.equal(one.score, two.score)
    assert (back.clip.taps, back.p.levels, back.trained_on) == ((1, 3, 5), (0.2, 0.3, 1.0), ["set/a"]) and set(
        back.backbones()
    ) == {"clip", "text", "dino"}
    assert all(torch.equal(q, back.learned()[n]) for n, q in model.learned().items())
    with pytest.raises(ValueError, match="was trained on tiny-clip weights"):
        load(tmp_path / "m.safetensors", clip_weights="random:1")


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(fusion="late"), "fusion='late'; use hierarchical or deep"),
        (dict(query="image"), "use text or cls"),
        (dict(pooling="mean"), "use sap, map or cls"),
        (dict(attention="qk"), "use qkv or vv"),
        (dict(value_from="output"), "use input or attended"),
        (dict(sap_weights="pixels"), "use spatial or class"),
        (dict(upsampling="cubic"), "use nearest or bilinear"),
        (dict(loss_maps="all"), "use each or mean"),
        (dict(tau=0.0), "tau=0.0; it must be above 0"),
        (dict(sigma=-1.0), "sigma=-1.0"),
        (dict(cls_weight=1.5), "from 0 to 1"),
        (dict(prompt_count=0), "prompt_count=0"),
        (dict(dual_blocks=0), "at least 1"),
        (dict(dual_blocks=6), "tiny-clip has 5 blocks"),
        (dict(clip_taps=(2, 5)), "pairs of depths"),
        (dict(clip_taps=(2, 5), dino_taps=(3, 6)), "give one weight a depth"),
        (dict(levels=(1, 1)), "for 3 depths"),
        (dict(clip_taps=(0, 3, 5)), "outside 1..5"),
        (dict(image_size=70), "not a multiple"),
        (dict(dino_size=70), "not a multiple"),
        (dict(clip="tiny-dino"), "shared with text|no text tower"),
        (dict(prompt_count=60), "shorten"),
    ],
)
def test_wrong_parameters(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_unknown_parameter_and_descriptions():
    with pytest.raises(TypeError, match="did you mean theta"):
        small(thetta=1.0)
    table = describe("dma_sap")
    assert table["source"].ne("").all() and table["help"].ne("").all() and table["parameter"].is_unique


def test_upsampled_attention_by_hand():
    "Both axes of A_dino and the one of A_clip are enlarged bilinearly, and rows sum to one again."
    torch.manual_seed(0)
    dma = DMA(24, 32, 16, theta=0.6, dma_upsample="attention")
    patches = torch.randn(2, 6, 24)
    values = torch.randn(2, 35, 32)
    query = torch.randn(2, 16)

    def enlarged(rows):  # (..., 2, 3) -> (..., 5, 7)
        flat = F.interpolate(rows.reshape(-1, 1, 2, 3), (5, 7), mode="bilinear", align_corners=False)
        return flat.reshape(*rows.shape[:-2], 35)

    dino, clip = dma.attend(patches, query)
    keys = enlarged(dino.unflatten(2, (2, 3)))  # (2, 6, 35)
    both = enlarged(keys.transpose(1, 2).unflatten(2, (2, 3))).transpose(1, 2)  # (2, 35, 35)
    text = enlarged(clip.unflatten(2, (2, 3)))
    expected = (both / both.sum(-1, keepdim=True) + 0.6 * text / text.sum(-1, keepdim=True)) @ values
    out = dma(patches, (2, 3), values, (5, 7), query, lambda x: x)
    assert out.shape == (2, 35, 32)
    assert (out - expected).abs().max() < 1e-5
    same = DMA(24, 32, 16)
    same.load_state_dict(dma.state_dict())
    square = torch.randn(2, 6, 32)
    assert torch.equal(
        same(patches, (2, 3), square, (2, 3), query, lambda x: x),
        dma(patches, (2, 3), square, (2, 3), query, lambda x: x),
    ), "one grid, nothing to resize"


@pytest.mark.parametrize(
    "changes",
    [
        dict(dma_projections="learned"),
        dict(sap_input="tokens"),
        dict(sap_maps="probabilities"),
        dict(dma_upsample="attention"),
    ],
)
def test_a_reading_changes_what_it_names(changes, batch):
    "Learned projections start as nothing; the others change score or map where their part has a say."
    usual = shaken()
    other = small(**changes)
    other.load_state_dict(usual.state_dict(), strict=False)
    a = usual.predict(batch)
    b = other.predict(batch)
    if changes in (dict(dma_projections="learned"), dict(dma_upsample="attention")):
        assert (a.map - b.map).abs().max() < 1e-5, "a projection that starts as the identity, and one grid"
    else:
        assert (a.score - b.score).abs().max() > 1e-6
        assert torch.equal(a.map, b.map), "SAP has no say in the map"


def test_dino_is_silent(batch):
    "dino_proj frozen at zero: it is not trained, and the map is CLIP's."
    silent = small(dma=False, pooling="map", dino_frozen=True)
    assert not [name for name, p in silent.learned().items() if name.startswith("fuse") and p.requires_grad]
    features = silent.encode(batch)
    text = silent.text_features()
    before = silent.fused(features, text)
    for name in features:
        if name.startswith("dino_"):
            features[name] = torch.randn_like(features[name])
    assert torch.equal(before, silent.fused(features, text))
    with pytest.raises(ValueError, match="sap_weights='spatial'"):
        small(sap_maps="probabilities", sap_weights="class")
