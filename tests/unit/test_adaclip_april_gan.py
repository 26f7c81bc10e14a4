"AdaCLIP and APRIL-GAN: their equations written out a second time in slow loops, k-means, independence of batch mates, blank images, gradients, checkpoints, options that act, errors."

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.cluster import KMeans

from zsad_nb.backbones.ensembles import ADACLIP_TEMPLATES, PHOTO_TEMPLATES
from zsad_nb.backbones.features import FeatureCache
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods import adaclip, april_gan  # noqa: F401 (they register their methods)
from zsad_nb.methods.adaclip import fuse, kmeans
from zsad_nb.methods.base import create, describe, load, save
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of

SIZE, SAME, BOTH = 64, 1e-5, ["adaclip", "april_gan"]
NORMAL = [
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
]
ABNORMAL = ["damaged {}", "{} with flaw", "{} with defect", "{} with damage", "broken {}"]


def small(name, **changes):
    seed_everything(0)
    return create(name, **{**dict(clip_weights="random:0", image_size=SIZE), **changes}).eval()


def shaken(name, **changes):
    "As after training: everything learned away from where it starts."
    model = small(name, **changes)
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


def few_shot(**changes):
    return shaken("april_gan", **changes).set_references(images(2, 7))


def far(a, b) -> float:
    return (a - b).abs().max().item()


def label(changes):
    return ",".join(f"{k}={v}" for k, v in changes.items()) or "default" if isinstance(changes, dict) else None


# -------------------------------------------------------------------------------------------------------------- what both of them promise

BUILDS = {
    "adaclip": lambda: shaken("adaclip"),
    "adaclip few groups": lambda: shaken("adaclip", clusters=3, candidates=2),
    "adaclip fusion of the paper": lambda: shaken("adaclip", clusters=3, candidates=0, fusion="most abnormal"),
    "adaclip static": lambda: shaken("adaclip", kinds="static", fusion="none"),
    "adaclip one pass an image": lambda: shaken("adaclip", at_once=1, branches="text", kinds="dynamic"),
    "april_gan": lambda: shaken("april_gan"),
    "april_gan few-shot": few_shot,
    "april_gan smooth": lambda: shaken("april_gan", sigma=2.0, taps=(2, 4)),
}


@pytest.fixture(params=BUILDS.values(), ids=BUILDS)
def model(request):
    return request.param()


@pytest.mark.slow
def test_batch_mates_do_not_matter(model, batch):
    together = model.predict(batch)
    for i in range(len(batch)):
        alone = model.predict(batch[i : i + 1])
        assert far(alone.map, together.map[i : i + 1]) < SAME and far(alone.score, together.score[i : i + 1]) < SAME
    strangers = Batch.cat([batch[1:2], batch_of(torch.zeros(3, 3, SIZE, SIZE))])
    assert (
        far(model.predict(strangers).map[:1], together.map[1:2]) < SAME
        and far(model.predict(strangers).score[:1], together.score[1:2]) < SAME
    )
    assert far(together.map[0], together.map[2]) > 10 * SAME, "two images of a class are two images"


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_blank_images(model, value):
    "Black, grey and white: finite, in a training pass too."
    blank = batch_of(torch.full((2, 3, SIZE, SIZE), value))
    prediction = model.predict(blank)
    assert (
        prediction.map.isfinite().all()
        and prediction.score.isfinite().all()
        and all(v.isfinite().all() for v in prediction.layers.values())
    )
    assert torch.equal(prediction.map[0], prediction.map[1])
    model.train()
    losses = model.loss(model(model.encode(blank), blank), blank)
    losses["total"].backward()
    assert all(v.isfinite() for v in losses.values()) and all(
        q.grad.isfinite().all() for g in model.param_groups() for q in g["params"]
    )


@pytest.mark.parametrize("shape", [(64, 64), (50, 81)])
def test_shapes(model, shape):
    "Images of other sizes than the tower's are resized for it; the map has the image's size."
    given = batch_of(torch.rand(3, 3, *shape))
    features = model.encode(given)
    prediction = model.predict(given)
    assert {len(v) for v in features.values()} == {3} and not any(v.requires_grad for v in features.values())
    assert (
        prediction.map.shape == (3, *shape)
        and prediction.score.shape == (3,)
        and {v.shape for v in prediction.layers.values()} == {(3, 4, 4)}
    )
    assert ((prediction.score >= 0) & (prediction.score <= 1)).all() and (prediction.map >= 0).all()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("side", [16, 32, 96])
def test_any_grid(name, side):
    "One patch, four, thirty-six: fewer positions than groups too."
    given = batch_of(images(2, size=side))
    model = shaken(name, image_size=side)
    found = model.predict(given)
    assert (
        found.map.shape == (2, side, side)
        and found.map.isfinite().all()
        and found.score.isfinite().all()
        and found.layers["tap_5"].shape == (2, side // 16, side // 16)
    )
    losses = model.train().loss(model(model.encode(given), given), given)
    assert losses["total"].isfinite()


@pytest.mark.slow
def test_save_and_load(model, batch, tmp_path):
    model.trained_on = ["mvtec/bottle"]
    path = save(model, tmp_path / "model.safetensors")
    back = load(path).eval()
    assert (
        back.p == model.p
        and back.trained_on == ["mvtec/bottle"]
        and list(read_header(path)["backbones"]) == list(model.backbones()) == ["clip", "text"]
    )
    assert torch.equal(back.predict(batch).map, model.predict(batch).map) and torch.equal(
        back.predict(batch).score, model.predict(batch).score
    )


@pytest.mark.slow
def test_the_same_again(model, batch):
    "Predictions do not depend on the state of the random numbers."
    first = model.predict(batch)
    torch.manual_seed(99)
    torch.rand(7)
    again = model.predict(batch)
    assert torch.equal(first.map, again.map) and torch.equal(first.score, again.score)


@pytest.mark.slow
def test_cached_features_say_the_same(model, batch, tmp_path):
    cache = FeatureCache(tmp_path)
    fresh = model.predict(batch)
    filled, kept = (model.predict(batch, cache) for _ in range(2))
    assert (
        (cache.hits, cache.misses) == (4, 4)
        and torch.equal(kept.map, filled.map)
        and torch.equal(kept.score, filled.score)
    )
    # what is kept was encoded image by image, whatever its company; a whole batch rounds differently
    assert far(kept.map, fresh.map) < SAME and torch.allclose(kept.score, fresh.score, rtol=1e-4, atol=SAME)
    assert far(model.predict(batch[[2, 0]], cache).map, fresh.map[[2, 0]]) < SAME and cache.hits == 6


def test_encode_reads_nothing_learned(model, batch):
    before = model.encode(batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for q in other.learned().values():
            q.normal_()
    assert all(torch.equal(v, before[k]) for k, v in other.encode(batch).items())


@pytest.mark.slow
def test_encode_key():
    "Features of two settings may be shared exactly when their keys are equal."

    def key(name, **changes):
        return json.dumps(small(name, **changes).encode_key(), sort_keys=True)

    assert key("adaclip") != key("april_gan")
    other = {
        "adaclip": (
            [dict(clip_weights="random:1"), dict(image_size=80), dict(positions="bilinear")],
            [dict(taps=(3, 5)), dict(tau=0.1), dict(fusion="none"), dict(kinds="static"), dict(length=2)],
        ),
        "april_gan": (
            [dict(clip_weights="random:1"), dict(image_size=80), dict(positions="bilinear"), dict(taps=(3, 5))],
            [dict(tau=0.1), dict(sigma=1.0), dict(templates=("a {}",))],
        ),
    }
    for name, (changing, keeping) in other.items():
        for changes in changing:
            assert key(name, **changes) != key(name), (name, changes)
        for changes in keeping:
            assert key(name, **changes) == key(name), (name, changes)


@pytest.mark.parametrize("name", BOTH)
def test_described(name, batch):
    table = describe(name)
    assert table["source"].ne("").all() and table["help"].ne("").all() and table["parameter"].is_unique
    found = {
        row: small(name, **changes).predict(batch[:1])
        for row, changes in adaclip.AdaCLIP.ablations.items()
        if name == "adaclip"
    }
    for row, said in found.items():
        assert said.map.isfinite().all() and (
            row == "full" or max(far(said.map, found["full"].map), far(said.score, found["full"].score)) > 1e-6
        ), row
    with pytest.raises(TypeError, match="did you mean tau"):
        small(name, tauu=1.0)


# --------------------------------------------------------------------------------------------- AdaCLIP, word by word, patch by patch


def block_by_hand(block, x, mask=None):
    "One pre-norm block on one sequence (L, D), head by head, with a plain softmax."
    heads = block.attn.num_heads
    width = x.shape[1]
    d = width // heads
    out = []
    q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    for h in range(heads):
        at = slice(h * d, (h + 1) * d)
        scores = q[:, at] @ k[:, at].T / math.sqrt(d)
        if mask is not None:
            scores = scores + mask
        out.append(scores.softmax(-1) @ v[:, at])
    x = x + block.attn.out_proj(torch.cat(out, -1))
    return x + block.mlp(block.ln_2(x))


def dynamic_by_hand(tokens, cls):
    "Five linear heads, one after the other."
    weights = tokens.heads.weight.split(tokens.shape[2])
    biases = tokens.heads.bias.split(tokens.shape[2])
    return torch.stack([w @ cls + b for w, b in zip(weights, biases)])


def image_by_hand(model, image, tokens=None):
    "Raw patches of the taps and the class token, with tokens at the end of the sequence at blocks 1 to 4."
    x = model.clip.embed(image[None])[0][0]
    clip = model.clip
    n = len(x)
    taps = []
    for i, block in enumerate(clip.tower.transformer.resblocks, 1):
        if tokens is not None and i == 1:
            x = torch.cat([x, tokens[0]])
        elif tokens is not None and i <= 4:
            x = torch.cat([x[:-5], tokens[i - 1]])
        x = block_by_hand(block, x)
        if i in clip.taps:
            taps.append(x[1:n])
    return taps, clip.tower.ln_post(x[0]) @ clip.tower.proj


def sentence_by_hand(model, sentence, tokens=None):
    "One sentence alone, the first five words overwritten at blocks 2 to 4."
    t = model.text.tower
    ids = model.text.tokenize([sentence])[0]
    end = int((ids > 0).sum()) - 1
    x = model.text.embed(ids[None])[0, : end + 1] + t.positional_embedding[: end + 1]
    mask = torch.zeros(end + 1, end + 1)
    for i in range(end + 1):
        for j in range(i + 1, end + 1):
            mask[i, j] = -math.inf
    for i, block in enumerate(t.transformer.resblocks, 1):
        if tokens is not None and 2 <= i <= 4:
            x = x.clone()
            for place in range(1, 6):
                x[place] = tokens[i - 2, place - 1]
        x = block_by_hand(block, x, mask)
    return t.ln_final(x[end]) @ t.text_projection


def texts_by_hand(read, name, templates):
    "Each sentence normalised, averaged, normalised: (2, C)."
    out = []
    for states in (NORMAL, ABNORMAL):
        total, count = 0, 0
        for state in states:
            for template in templates:
                z = read(template.format(state.format(name)))
                total = total + z / z.norm()
                count = count + 1
        out.append(total / count / (total / count).norm())
    return torch.stack(out)


def kmeans_by_hand(x, k, seed):
    "scikit-learn's groups of some rows, asked for as the release does."
    return KMeans(n_clusters=min(k, len(x)), random_state=seed).fit(x.double().numpy()).labels_.tolist()


def adaclip_by_hand(model, batch):
    "Map and score of every image, and the two-class logits (T, 2, h, w) of its taps."
    maps, scores, logits = [], [], []
    for image, category in zip(batch.image, batch.category):
        plain = image_by_hand(model, image)[1]
        dynamic = {n: dynamic_by_hand(t, plain) for n, t in model.tokens.items()}
        tokens = {n: torch.stack([s + dynamic[n] for s in t.static]).half().float() for n, t in model.tokens.items()}
        text = texts_by_hand(lambda s, k=tokens["text"]: sentence_by_hand(model, s, k), category, model.p.templates)
        taps, cls = image_by_hand(model, image, tokens["image"])
        adapted = [
            [a / a.norm() for a in model.adapters[f"tap_{t}"](x)] for t, x in zip(model.clip.taps, taps)
        ]  # [tap][patch]
        side = math.isqrt(len(adapted[0]))
        cosines = torch.stack(
            [
                torch.stack([100 * torch.stack([p @ text[0], p @ text[1]]) for p in tap]).T.view(2, side, side)
                for tap in adapted
            ]
        )
        pixels = F.interpolate(cosines, batch.image.shape[-2:], mode="bilinear", align_corners=True).mean(0).softmax(0)
        maps.append(torch.from_numpy(gaussian_filter(((pixels[1] + 1 - pixels[0]) / 2).detach().numpy(), 4)))
        abnormal = cosines.mean(0).double().softmax(0)[1].flatten()
        positions = sorted(range(side * side), key=lambda i: -abnormal[i].item())[: 5 * model.p.clusters]
        joined = torch.stack([torch.cat([tap[i] for tap in adapted]) for i in positions])
        labels = kmeans_by_hand(joined.detach(), model.p.clusters, 0)
        centres = [
            torch.stack([joined[i] for i, m in enumerate(labels) if m == j]).mean(0).view(len(adapted), -1).mean(0)
            for j in sorted(set(labels))
        ]
        c = torch.stack(centres).mean(0)
        whole = model.adapter_cls(cls)
        phi = 0.2 * c / c.norm() + 0.8 * whole / whole.norm()
        scores.append((100 * torch.stack([phi @ text[0], phi @ text[1]]) / phi.norm()).softmax(0)[1])
        logits.append(cosines)
    return torch.stack(maps), torch.stack(scores), torch.stack(logits)


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [20, 2])
def test_adaclip_by_hand(batch, clusters):
    "Everything from pixels to map and score, in loops; 16 patches for 20 groups, and the 10 most abnormal in 2 groups."
    model = shaken("adaclip", clusters=clusters)
    maps, scores, logits = adaclip_by_hand(model, batch)
    found = model.predict(batch)
    assert far(found.map, maps) < SAME and far(found.score, scores) < SAME
    for i, t in enumerate(model.clip.taps):
        assert far(found.layers[f"tap_{t}"], (logits[:, i, 1] - logits[:, i, 0]).detach()) < 2e-4, "100 times a cosine"
    assert found.map.std() > 0.01 and found.score.std() > 1e-3, "there is something to compare"


def focal_by_hand(p_abnormal, truth):
    values = []
    for p, g in zip(p_abnormal.flatten().double(), truth.flatten()):
        hot = [min(max(float(g == k), 1e-5), 1 - 1e-5) for k in (0, 1)]
        p_t = hot[0] * (1 - p) + hot[1] * p + 1e-5
        values.append(-((1 - p_t) ** 2) * torch.log(p_t))
    return sum(values) / len(values)


def dice_by_hand(p, g):
    return sum(1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p.double(), g.double())) / len(p)


def maps_of(model, prediction, size):
    "Each tap's abnormal probability, softmax over two classes."
    out = []
    for t in model.clip.taps:
        d = prediction.layers[f"tap_{t}"][:, None]
        out.append(
            F.interpolate(torch.cat([torch.zeros_like(d), d], 1), size, mode="bilinear", align_corners=True)
            .softmax(1)[:, 1]
            .detach()
        )
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes, rows",
    [("adaclip", {}, True), ("adaclip", dict(dice_over="image"), False), ("april_gan", {}, False)],
    ids=["adaclip", "adaclip repaired", "april_gan"],
)
def test_losses_by_hand(name, changes, rows, batch):
    model = shaken(name, tau=0.05, **changes).train()
    part = batch[:2]
    prediction = model(model.encode(part), part)
    found = model.loss(prediction, part)
    mask = part.mask[:, 0]
    maps = maps_of(model, prediction, mask.shape[-2:])

    def ratio(m, truth):
        return dice_by_hand(m.flatten(0, 1), truth.flatten(0, 1)) if rows else dice_by_hand(m, truth)

    expected = dict(focal=sum(focal_by_hand(m, mask) for m in maps), dice=sum(ratio(m, mask) for m in maps))
    if name == "adaclip":
        expected |= dict(
            image=focal_by_hand(prediction.score.detach(), part.anomalous),
            dice_normal=sum(ratio(1 - m, ~mask) for m in maps),
        )
    assert set(found) == {*expected, "total"} and abs(found["total"].item() - sum(expected.values()).item()) < 1e-4
    for k, v in expected.items():
        assert abs(found[k].item() - v.item()) < 1e-5 * max(1, v.item()), k


def test_the_plain_pass_is_clip(batch):
    "The source of the dynamic tokens is what open_clip itself says of the image, at its own size."
    model = small("adaclip", image_size=256)
    image = images(2, size=256)
    with torch.no_grad():
        assert (
            far(model.encode(batch_of(image))["cls"], model.clip.tower((image - model.clip.mean) / model.clip.std))
            < SAME
        )


def test_text_features(batch):
    "In passes of any size, each row its own; static tokens need one text a class; block 1 is read once a class."
    model = shaken("adaclip")
    cls = model.encode(batch)["cls"]
    found = model.text_features(batch.category, cls)
    for at_once in (1, 96, 100, 10**6):
        assert far(shaken("adaclip", at_once=at_once).text_features(batch.category, cls), found) < SAME
    assert far(found[0], found[2]) > 1e-4 and far(found.norm(dim=-1), torch.ones(4, 2)) < SAME
    swapped = model.text_features([batch.category[i] for i in (3, 0, 2, 1)], cls[[3, 0, 2, 1]])
    assert far(swapped, found[[3, 0, 2, 1]]) < SAME
    static = shaken("adaclip", kinds="static")
    passes = []
    handle = static.text.tower.transformer.resblocks[1].register_forward_hook(
        lambda m, given, out: passes.append(len(out))
    )
    texts = static.text_features(batch.category, cls)
    handle.remove()
    assert passes == [48] * 3 and torch.equal(texts[0], texts[2])
    first = []
    handle = model.text.tower.transformer.resblocks[0].register_forward_hook(
        lambda m, given, out: first.append(len(out))
    )
    model.text_features(["screw", "carpet", "carpet"], cls[:3])
    handle.remove()
    assert first == [48], "screw was known"


@pytest.mark.slow
def test_training_after_predicting(batch):
    "What was kept while predicting serves a training step."
    for name in BOTH:
        model = shaken(name)
        model.predict(batch)
        model.train()
        model.loss(model(model.encode(batch), batch), batch)["total"].backward()


# ------------------------------------------------------------------------------------------------------------------ k-means and fusion


@pytest.mark.parametrize("n, d, k", [(40, 3, 5), (100, 12, 20), (7, 2, 3), (16, 8, 20), (5, 2, 1)])
@pytest.mark.parametrize("seed", [0, 3])
def test_kmeans_by_hand(n, d, k, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n + seed))
    by_hand = kmeans_by_hand(x, k, seed)
    found = kmeans(x, k, seed)
    assert torch.equal(found, torch.tensor(by_hand).unique(return_inverse=True)[1]) and found.max() + 1 == len(
        found.unique()
    ) <= min(k, n)
    assert torch.equal(kmeans(x.float(), k, seed), found) and torch.equal(
        kmeans(x.clone().requires_grad_(), k, seed), found
    )


def test_kmeans_finds_groups():
    "Groups far apart are found; rows that are equal share one; nothing to tell apart is one group."
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (60,), generator=generator)
    x = 10 * torch.eye(4)[truth] + 0.1 * torch.randn(60, 4, generator=generator)
    for seed in range(5):
        found = kmeans(x, 4, seed)
        assert len({(a, b) for a, b in zip(truth.tolist(), found.tolist())}) == 4, seed
    assert kmeans(torch.full((9, 3), 0.3), 5).tolist() == [0] * 9 == kmeans(torch.zeros(9, 3), 5).tolist()
    repeated = torch.tensor([[0.0, 1], [1, 0], [0, 1], [1, 0], [1, 1]])
    found = kmeans(repeated, 5)
    assert found[0] == found[2] and found[1] == found[3] and len(found.unique()) == 3


def test_fusion():
    "Only the candidates count, all groups alike; the paper's is one group; gradients reach the patches that were chosen."
    x = F.normalize(torch.randn(2, 12, 3, 5, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    alone = fuse(x, logits, clusters=1, candidates=4)
    top = [sorted(range(12), key=lambda i, row=row: -row[i])[:4] for row in logits.tolist()]
    assert far(alone, F.normalize(torch.stack([v[t].mean((0, 1)) for v, t in zip(x, top)]), dim=-1)) < SAME
    every = fuse(x, logits, clusters=12, candidates=1)
    assert far(every, F.normalize(x.mean((1, 2)), dim=-1)) < SAME, "twelve groups of one are all patches"
    alone.sum().backward()
    for i, t in enumerate(top):
        assert (x.grad[i].flatten(1).abs().sum(1) > 0).nonzero().flatten().tolist() == sorted(t)
    uneven = torch.zeros(1, 8, 1, 2)
    uneven[0, :6, 0, 0], uneven[0, 6:, 0, 1] = 1, 1
    assert far(fuse(uneven, torch.zeros(1, 8), 2, 0), torch.full((1, 2), math.sqrt(0.5))) < SAME, (
        "a mean of centres, not of patches"
    )
    for high, expected in ((0, [1.0, 0]), (6, [0.0, 1])):
        suspicious = torch.zeros(1, 8)
        suspicious[0, high : high + 2] = 5
        assert far(fuse(uneven, suspicious, 2, 0, "most abnormal"), torch.tensor([expected])) < SAME
    assert torch.equal(fuse(x, logits, 3, 2)[1:], fuse(x[1:], logits[1:], 3, 2))


def test_saturated_candidates():
    "The order of logits decides where probabilities are all one."
    x = F.normalize(torch.randn(1, 6, 1, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    logits = torch.tensor([[100.0, 140, 120, 130, 150, 110]])
    assert (
        len(logits.sigmoid().unique()) == 1
        and far(fuse(x, logits, 1, 2), F.normalize(x[:, [1, 4], 0].mean(1), dim=-1)) < SAME
    )


# ---------------------------------------------------------------------------------------------------------------- APRIL-GAN by hand


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("shots", [0, 2])
def test_april_gan_by_hand(batch, shots):
    model = few_shot() if shots else shaken("april_gan")
    found = model.predict(batch)
    names = ["screw", "metal_nut", "screw", "pcb1"]
    memory = [torch.cat(m) for m in zip(*(image_by_hand(model, i)[0] for i in images(2, 7)))]
    for i, image in enumerate(batch.image):
        text = (
            texts_by_hand(lambda s: sentence_by_hand(model, s), names[i], PHOTO_TEMPLATES)
            if i in (0, 1)
            else model.text_features([names[i]])[0]
        )
        (taps, cls), total, distance = image_by_hand(model, image), 0, 0
        for t, x, kept in zip(model.clip.taps, taps, memory):
            y = model.adapters[f"tap_{t}"](x)
            logits = 100 * torch.stack([F.cosine_similarity(y, z[None], dim=-1).view(4, 4) for z in text])
            total = (
                total + F.interpolate(logits[None], (SIZE, SIZE), mode="bilinear", align_corners=True).softmax(1)[0, 1]
            )
            distance = distance + torch.tensor(
                [min(1 - F.cosine_similarity(p, r, dim=0).item() for r in kept) for p in x]
            ).view(4, 4)
        score = (100 * torch.stack([F.cosine_similarity(cls, z, dim=0) for z in text])).softmax(0)[1]
        if shots:
            total = total + F.interpolate(distance[None, None], (SIZE, SIZE), mode="bilinear", align_corners=True)[0, 0]
            score = score
        if shots:
            score = (score + total.max() / 2 / len(taps)) / 2
        assert far(found.map[i], total) < SAME and far(found.score[i], score) < SAME


@pytest.mark.slow
def test_references(batch, tmp_path):
    model = few_shot()
    zero = shaken("april_gan").predict(batch)
    itself = model.predict(batch_of(images(2, 7)))
    assert itself.layers["reference"].abs().max() < SAME and model.predict(batch).layers["reference"].min() > 100 * SAME
    assert {n for n in model.learned() if n.startswith("reference")} == {
        f"reference_tap_{t}" for t in model.clip.taps
    } and {q.requires_grad for g in model.param_groups() for q in g["params"]} == {True}
    model.train()
    trained = model(model.encode(batch), batch)
    assert "reference" not in trained.layers and far(trained.map, zero.map) < SAME, (
        "training does not look at the memory"
    )
    model.eval().set_references(batch_of(images(1, 8))[[0]].image)
    assert model.p.shots == 1 and len(model.reference_tap_5) == 16
    assert torch.equal(model.set_references(images(0)).predict(batch).map, zero.map) and model.p.shots == 0
    with pytest.raises(ValueError, match="must be normal.*0.png"):
        model.set_references(batch)
    with pytest.raises(ValueError, match="several classes .metal_nut, pcb1"):
        model.set_references(batch[[1, 3]])
    with pytest.raises(ValueError, match=r"\(3, 64, 64\); give \(k, 3, H, W\)"):
        model.set_references(batch.image[0])
    with pytest.raises(ValueError, match="shots=2, but no reference image was set"):
        small("april_gan", shots=2).predict(batch)


def test_april_gan_texts_are_read_once(batch):
    model = small("april_gan")
    rows = []
    handle = model.text.register_forward_hook(lambda m, given, result: rows.append(len(result)))
    for _ in range(2):
        model.predict(batch)
    handle.remove()
    assert sum(rows) == 3 * (7 + 5) * 35


# ------------------------------------------------------------------------------------------------------------- gradients and what learns

ADACLIP = {
    "tokens.image.static",
    "tokens.image.heads.weight",
    "tokens.image.heads.bias",
    "tokens.text.static",
    "tokens.text.heads.weight",
    "tokens.text.heads.bias",
    "adapter_cls.weight",
    "adapter_cls.bias",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes, gone",
    [
        ("adaclip", {}, ()),
        ("adaclip", dict(kinds="static"), ("heads",)),
        ("adaclip", dict(kinds="dynamic"), ("static",)),
        ("adaclip", dict(branches="image"), ("text",)),
        ("adaclip", dict(branches="text"), ("image",)),
        ("adaclip", dict(branches="none"), ("tokens",)),
        ("adaclip", dict(fusion="none"), ()),
        ("adaclip", dict(depth=1), ("text",)),
        ("april_gan", {}, ("tokens", "cls")),
    ],
    ids=label,
)
def test_gradient_reaches_all_that_learns_and_nothing_else(batch, name, changes, gone):
    model = shaken(name, **changes, tau=0.05).train()
    model.loss(model(model.encode(batch), batch), batch)["total"].backward()
    adapters = {f"adapters.tap_{t}.{k}" for t in model.clip.taps for k in ("weight", "bias")}
    assert set(model.learned()) == {n for n in ADACLIP if not any(g in n for g in gone)} | adapters
    for n, q in model.learned().items():
        assert q.grad.isfinite().all(), n
        assert (
            (q.grad.abs().flatten(2).amax(-1) > 0).all()
            if n.endswith("static")
            else (q.grad.abs() > 0).float().mean() > 0.9
        ), n  # every token of every block
    assert all(q.grad is None for b in model.backbones().values() for q in b.parameters()) and not any(
        b.training for b in model.backbones().values()
    )
    assert [g["lr"] for g in model.param_groups()] == [dict(adaclip=1e-2, april_gan=1e-3)[name]] and {
        id(q) for g in model.param_groups() for q in g["params"]
    } == {id(q) for q in model.learned().values()}


def test_the_score_teaches_the_patches(batch):
    "Through the fusion the image loss alone reaches the adapters of the patches."
    for fusion, reached in (("all", True), ("most abnormal", True), ("none", False)):
        model = shaken("adaclip", tau=0.05, fusion=fusion, clusters=2, candidates=3).train()
        model.loss(model(model.encode(batch), batch), batch)["image"].backward()
        assert all(
            (q.grad is not None and bool(q.grad.abs().max() > 0)) is reached for q in model.adapters.parameters()
        ), fusion


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_one_step_lowers_the_loss(name, batch):
    model = small(name).train()
    features = model.encode(batch)
    before = model.loss(model(features, batch), batch)["total"]
    before.backward()
    with torch.no_grad():
        norm = sum(q.grad.square().sum() for q in model.learned().values()).sqrt()
        for q in model.learned().values():
            q.sub_(1e-2 * q.grad / norm)
    after = model.loss(model(features, batch), batch)["total"]
    assert after.item() < before.item() - 1e-4


def test_recipes():
    "Epochs, batch, optimiser, betas of the public codes."
    for name, (epochs, batch_size, optimiser, decay) in dict(
        adaclip=(5, 1, "adamw", 0.01), april_gan=(3, 8, "adam", 0.0)
    ).items():
        r = recipe_of(name)
        assert (r.epochs, r.batch_size, r.optimiser, r.weight_decay, r.betas, r.schedule, r.warmup) == (
            epochs,
            batch_size,
            optimiser,
            decay,
            (0.5, 0.999),
            "constant",
            0.0,
        ), name


def test_full_size_counts():
    "At the papers' sizes; nothing is allocated."
    with torch.device("meta"):
        ada, april = (create(n, clip="clip-vitl14-336", clip_weights="random:0") for n in BOTH)
    adapters = 4 * (1024 * 768 + 768)
    assert sum(q.numel() for q in april.learned().values()) == adapters == 3_148_800
    tokens = 4 * 5 * 1024 + 3 * 5 * 768 + 5 * (768 * 1024 + 1024) + 5 * (768 * 768 + 768)
    assert sum(q.numel() for q in ada.learned().values()) == adapters + 768 * 768 + 768 + tokens
    for m, positions in ((ada, "bicubic_plain"), (april, "bicubic")):
        assert (
            m.clip.taps == (6, 12, 18, 24)
            and m.clip.size == 518
            and m.clip.row.positions == positions
            and not m.clip.quick_gelu
        )
    assert (
        ada.tokens["image"].shape == (4, 5, 1024) and ada.tokens["text"].shape == (3, 5, 768) and april.grid == (37, 37)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_fit_and_evaluate(name, tmp_path):
    "A short training through the trainer: the loss falls, the same seed gives the same numbers, and the rows trained on are known."
    index = synthetic_index(tmp_path, "auxiliary", SIZE, normal=2, defective=2)
    index = index[index["category"].isin(sorted(index["category"].unique())[:2])].reset_index(drop=True)
    recipe = recipe_of(name, epochs=4, batch_size=4)
    losses = []
    for _ in range(2):
        model = small(name)
        rows = fit(model, index, recipe, progress=False, workers=0, cache=tmp_path / "cache")
        losses.append(rows["total"].tolist())
    assert (
        losses[0] == losses[1]
        and rows["total"][-2:].mean() < rows["total"][:2].mean()
        and not rows["skipped"].any()
        and len(model.trained_on) == 2
    )
    with pytest.warns(UserWarning, match="not zero-shot"):
        found = evaluate(
            model,
            index.assign(split="test"),
            progress=False,
            workers=0,
            cache=tmp_path / "cache",
            allow_seen=index["dataset"].iloc[0],
        )
    assert found.mean.filter(regex="^(image|pixel)_").notna().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device")
@pytest.mark.parametrize("name", ["adaclip", "adaclip few groups", "april_gan few-shot"])
def test_another_device(name, batch):
    model = BUILDS[name]()
    here = model.predict(batch)
    there = model.to("cuda").predict(batch)
    assert there.map.is_cuda and far(there.map.cpu(), here.map) < 1e-3 and far(there.score.cpu(), here.score) < 1e-3
    model.train()
    given = batch.to("cuda")
    model.loss(model(model.encode(given), given), given)["total"].backward()


# --------------------------------------------------------------------------------------------------- options that act, and what is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes",
    [
        ("adaclip", c)
        for c in (
            dict(templates=ADACLIP_TEMPLATES[:2]),
            dict(length=3),
            dict(depth=2),
            dict(depth=3),
            dict(fusion_weight=0.5),
            dict(clusters=2),
            dict(clusters=2, candidates=3),
            dict(clusters=3, kmeans_seed=5),
            dict(tau=0.1),
            dict(sigma=0.0),
            dict(positions="bilinear"),
            dict(taps=(3, 5)),
            dict(token_std=0.5),
        )
    ]
    + [
        ("april_gan", c)
        for c in (
            dict(templates=("a {}",)),
            dict(tau=0.1),
            dict(sigma=2.0),
            dict(positions="bilinear"),
            dict(taps=(3, 5)),
        )
    ],
    ids=label,
)
def test_options_act(batch, name, changes):
    reference = small(name).predict(batch)
    found = small(name, **changes).predict(batch)
    assert max(far(found.map, reference.map), far(found.score, reference.score)) > 1e-6
    assert small(name, **changes, lr=0.5).param_groups()[0]["lr"] == 0.5


def test_deeper_than_the_towers():
    model = small("adaclip", depth=40)
    assert (
        model.tokens["image"].shape[0] == model.clip.depth == 5
        and model.tokens["text"].shape[0] == model.text.depth - 1 == 2
    )
    assert model.predict(batch_of(images(1))).map.isfinite().all()


@pytest.mark.parametrize(
    "name, changes, message",
    [
        *[(n, dict(tau=0.0), "tau=0.0; it must be above 0") for n in BOTH],
        *[(n, dict(sigma=-1.0), "sigma=-1.0; it must be 0 or more") for n in BOTH],
        *[(n, dict(clip="tiny-dino"), "shared with text|no text tower") for n in BOTH],
        *[(n, dict(image_size=70), "not a multiple") for n in BOTH],
        *[(n, dict(taps=(0, 5)), "outside 1..5") for n in BOTH],
        *[(n, dict(templates=()), "it must be one or more") for n in BOTH],
        *[(n, dict(positions="cubic"), "use bilinear, bicubic or bicubic_plain") for n in BOTH],
        ("adaclip", dict(length=0), "length=0; it must be at least 1"),
        ("adaclip", dict(depth=0), "depth=0; it must be at least 1"),
        ("adaclip", dict(branches="vision"), "use both, image, text or none"),
        ("adaclip", dict(kinds="deep"), "use hybrid, static or dynamic"),
        ("adaclip", dict(fusion="max"), "use all, most abnormal or none"),
        ("adaclip", dict(fusion_weight=1.5), "from 0 to 1"),
        ("adaclip", dict(clusters=0), "clusters=0; it must be at least 1"),
        ("adaclip", dict(candidates=-1), "candidates=-1; it must be 0 or more"),
        ("adaclip", dict(at_once=0), "at_once=0; it must be at least 1"),
        (
            "adaclip",
            dict(templates=("a {}",)),
            (
                "5 tokens overwrite the first 5 places of a sentence, which is all there is of 'a object'; use longer"
                " templates or a smaller length"
            ),
        ),
        ("adaclip", dict(length=30), "use longer templates or a smaller length"),
        ("april_gan", dict(shots=-1), "shots=-1; it must be 0 or more"),
    ],
)
def test_wrong_parameters(name, changes, message):
    with pytest.raises(ValueError, match=message):
        small(name, **changes)


def test_lists_from_json(batch):
    "Parameters that went through JSON are the same parameters."
    for name in BOTH:
        model = small(name, taps=[3, 5], templates=list(ADACLIP_TEMPLATES))
        assert small(
            name, **json.loads(json.dumps(dict(taps=model.p.taps, templates=model.p.templates)))
        ).p == model.p and model.p.taps == (3, 5)


# -------------------------------------------------------------------------------------------------------- the released few-shot score


@pytest.mark.slow
def test_the_released_few_shot_score_needs_the_test_set(tmp_path):
    "Stretched over a class's test images: the same for every batch size, and refused where nobody said which images these are."
    index = synthetic_index(tmp_path, "target", SIZE, normal=2, defective=2)
    index = index[index["category"].isin(sorted(index["category"].unique())[:2])].reset_index(drop=True)
    model = few_shot(few_shot_score="test set")
    assert (
        model.transductive
        and not few_shot().transductive
        and not shaken("april_gan", few_shot_score="test set").transductive
    )
    with pytest.raises(ValueError, match="april_gan stretches its score over the test images.*call prepare.index."):
        model.predict(batch_of(images(1)))
    one, four = (
        evaluate(model, index, size=SIZE, batch_size=n, workers=0, progress=False).per_image.set_index("image")["score"]
        for n in (1, 4)
    )
    assert (one - four).abs().max() < SAME
    rows = index[index["category"] == index["category"].iloc[0]]
    other = evaluate(
        model, rows[rows["image"].isin(rows["image"].iloc[1:])], size=SIZE, workers=0, progress=False
    ).per_image.set_index("image")["score"]
    assert (other - one[other.index]).abs().max() > 1e-3, "without one image the others' scores change"


def test_a_template_file(tmp_path):
    (tmp_path / "frames.txt").write_bytes("a photo of a {}.\r\nthe {}, seen from above.\r\n".encode("utf-8-sig"))
    model = small("april_gan", templates=str(tmp_path / "frames.txt"))
    assert model.p.templates == ("a photo of a {}.", "the {}, seen from above.")
    back = load(save(model, tmp_path / "model.safetensors"))
    (tmp_path / "frames.txt").unlink()
    assert load(tmp_path / "model.safetensors").p == back.p, "the checkpoint has the sentences, and needs no file"


@pytest.mark.parametrize(
    "content, why",
    [
        (b"a photo.\n", "line 1: 'a photo.' must have one"),
        (b"a photo of a {}.\n{} of {}\n", "line 2"),
        (b"a {0}\n", "line 1"),
        (b"a {x} {}", "line 1"),
        (b"\n \n", "holds no sentence"),
        (b"\xff\xfe{}", "not UTF-8"),
    ],
)
def test_a_template_file_with_a_fault(tmp_path, content, why):
    (tmp_path / "frames.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"frames.txt.*{why}"):
        small("april_gan", templates=str(tmp_path / "frames.txt"))


def test_templates_that_are_none():
    with pytest.raises(ValueError, match="templates='nowhere.txt' is no file"):
        small("april_gan", templates="nowhere.txt")
    with pytest.raises(ValueError, match="templates, sentence 2: 'a photo' must have one"):
        small("april_gan", templates=["a {}", "a photo"])
