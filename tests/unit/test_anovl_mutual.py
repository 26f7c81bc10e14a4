"AnoVL and the mutual control: equations by hand, independence of batch mates and order, blank images, labels that are not read, defects of the release, errors."

import copy
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from zsad_nb.backbones.ensembles import ANOVL_STATES, WINCLIP_TEMPLATES, macaroni
from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.products import fast_products
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch, batches
from zsad_nb.data.index import make_index
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods import anovl, mutual  # noqa: F401 (they register their methods)
from zsad_nb.methods.anovl import adaptation_loss, adapted, contrast, kind_of, moved, squares, state_sentences, views
from zsad_nb.methods.base import METHODS, create, describe, load, save
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.methods.mutual import mutual_distance, neighbourhood
from zsad_nb.training.fit import fit

SIZE, SAME = 64, 1e-5
SAID = {}  # sentences are read once for all models of the same text tower


def small(name, **changes):
    seed_everything(0)
    weights = "weights" if name == "mutual" else "clip_weights"
    model = create(name, **{weights: "random:0", "image_size": SIZE, **changes}).eval()
    if name == "anovl":
        model._texts = SAID.setdefault((model.p.clip_weights, model.p.quick_gelu, model.p.textures, model.p.names), {})
    return model


def batch_of(image, categories=None, paths=None) -> Batch:
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
        paths or [f"{i}.png" for i in range(n)],
        torch.ones(n, dtype=torch.bool),
    )


def images(n, seed=0, size=SIZE):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def far(a, b) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(images(4), ["screw", "carpet", "screw", "pcb1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pd.DataFrame:
    "Two categories of six test images each, stripes and checks; one of each has an odd patch. Files a.png, b.png, ... and labels that say so."
    root = tmp_path_factory.mktemp("mutual")
    rows = []
    for category, period in (("checks", 8), ("stripes", 16)):
        for i in range(6):
            generator = torch.Generator().manual_seed(i)
            x, y = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="xy")
            pattern = ((x // period + (y // period if category == "checks" else 0)) % 2).float()
            picture = (0.3 + 0.4 * pattern)[..., None].expand(-1, -1, 3) + 0.02 * torch.randn(
                SIZE, SIZE, 3, generator=generator
            )
            odd = i == 4
            if odd:
                picture[16:32, 32:48] = torch.tensor([0.9, 0.1, 0.1])  # one patch of the grid: row 1, column 2
            name = f"{category}/{'abcdef'[i]}.png"
            mask = ""
            (root / category).mkdir(exist_ok=True)
            Image.fromarray((picture.clamp(0, 1) * 255).byte().numpy()).save(root / name)
            if odd:
                mask = f"{category}/{'abcdef'[i]}_mask.png"
                marked = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
                marked[16:32, 32:48] = 255
                Image.fromarray(marked.numpy()).save(root / mask)
            rows.append(
                dict(
                    dataset="drawn",
                    category=category,
                    split="test",
                    image=name,
                    mask=mask,
                    anomalous=odd,
                    defect="patch" if odd else "good",
                )
            )
    return make_index(rows, root)


@pytest.fixture(scope="module")
def everything(folder) -> Batch:
    return next(iter(batches(folder, SIZE, 12)))


# ------------------------------------------------------------------------------------------------------------ what both of them promise

BUILDS = {
    "anovl": {},
    "anovl text start": dict(start="text"),
    "anovl linear": dict(adapter="linear"),
    "anovl training-free": dict(adapter="none"),
    "anovl two crops": dict(crops=2, augment=False),
    "mutual": {},
    "mutual two taps, few references": dict(taps=(2, 4), references=3, neighbourhoods=(1, 3)),
}


@pytest.fixture(params=BUILDS)
def model(request, folder):
    name = request.param.split()[0]
    built = small(name, **BUILDS[request.param])
    return built.prepare(folder)


@pytest.mark.slow
def test_batch_mates_do_not_matter(model, everything):
    "Alone, among others, among strangers, in another order."
    some = everything[[0, 4, 7, 10]]
    together = model.predict(some)
    for i in range(len(some)):
        alone = model.predict(some[i : i + 1])
        assert far(alone.map, together.map[i : i + 1]) < SAME and far(alone.score, together.score[i : i + 1]) < SAME
    back = model.predict(some[[3, 2, 1, 0]])
    assert far(back.map.flip(0), together.map) < SAME and far(back.score.flip(0), together.score) < SAME
    strangers = batch_of(torch.zeros(2, 3, SIZE, SIZE), ["checks"] * 2, ["p.png", "q.png"])
    assert far(model.predict(Batch.cat([some[1:2], strangers])).map[:1], together.map[1:2]) < SAME
    again = model.predict(some)
    assert torch.equal(again.map, together.map) and torch.equal(again.score, together.score)
    assert far(together.map[:1], together.map[1:2]) > 10 * SAME, "or the same number would be said of every image"


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_blank_images(model, value):
    prediction = model.predict(batch_of(torch.full((2, 3, SIZE, SIZE), value), ["checks"] * 2, ["p.png", "q.png"]))
    assert (
        prediction.map.isfinite().all()
        and prediction.score.isfinite().all()
        and all(v.isfinite().all() for v in prediction.layers.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64), (50, 81), (81, 50)])
def test_shapes(model, shape):
    given = batch_of(torch.rand(3, 3, *shape), ["stripes"] * 3)
    features = model.encode(given)
    prediction = model.predict(given)
    assert {len(v) for v in features.values()} == {3} and not any(v.requires_grad for v in features.values())
    assert (
        prediction.map.shape == (3, *shape)
        and prediction.score.shape == (3,)
        and {len(v) for v in prediction.layers.values()} == {3}
    )
    assert not prediction.map.requires_grad and (prediction.map >= 0).all()


@pytest.mark.slow
def test_nothing_is_learned(model, everything, folder, tmp_path):
    "No parameters of its own, so nothing saved; a loaded one says the same."
    some = everything[[0, 4]]
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    found = model.predict(some)
    assert model.param_groups() == [] and model.learned() == {} and not any(q.requires_grad for q in model.parameters())
    assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items()), "the towers are as before"
    back = load(save(model, tmp_path / "model.safetensors")).eval().prepare(folder)
    assert back.p == model.p and list(read_header(tmp_path / "model.safetensors")["backbones"]) == list(
        model.backbones()
    )
    assert torch.equal(back.predict(some).map, found.map)
    assert (
        METHODS[model.name](METHODS[model.name].Parameters(**json.loads(json.dumps(dataclasses.asdict(model.p))))).p
        == model.p
    ), "lists from JSON"
    with pytest.raises(ValueError, match="training-free"):
        fit(model, folder, progress=False)
    with pytest.raises(NotImplementedError, match="training-free"):
        model.loss(found, some)


@pytest.mark.slow
def test_cached_features_say_the_same(model, everything, tmp_path):
    cache = FeatureCache(tmp_path)
    some = everything[[0, 4, 7]]
    fresh = model.predict(some)
    for _ in range(2):
        kept = model.predict(some, cache)
    assert torch.equal(kept.map, fresh.map) and torch.equal(kept.score, fresh.score) and cache.hits >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anovl", "mutual"])
def test_described(name, folder, everything):
    table = describe(name)
    assert table["source"].ne("").all() and table["help"].ne("").all() and table["parameter"].is_unique
    for row, changes in {
        **METHODS[name].ablations,
        **{k: v for rows in METHODS[name].studies.values() for k, v in rows.items()},
    }.items():
        assert small(name, **changes).prepare(folder).predict(everything[[0, 4]]).map.isfinite().all(), row
    with pytest.raises(TypeError, match="did you mean"):
        small(name, seeds=1)


@pytest.mark.slow
def test_encode_key(folder):
    "Features of two settings may be shared exactly when their keys are equal."

    def key(name, **changes):
        return json.dumps(small(name, **changes).encode_key(), sort_keys=True)

    other = {
        "anovl": (
            [
                dict(clip_weights="random:1"),
                dict(image_size=80),
                dict(quick_gelu=False),
                dict(dual_blocks=2),
                dict(augment=False),
                dict(crops=2),
            ],
            [dict(steps=1), dict(adapter="linear"), dict(textures=()), dict(seed=1), dict(noise=0.0)],
        ),
        "mutual": (
            [dict(weights="random:1"), dict(image_size=80), dict(taps=(2,)), dict(norm=True)],
            [dict(share=1.0), dict(references=3), dict(neighbourhoods=(1,)), dict(sigma=0.0)],
        ),
    }
    for name, (changing, keeping) in other.items():
        own = key(name)
        for changes in changing:
            assert key(name, **changes) != own, (name, changes)
        for changes in keeping:
            assert key(name, **changes) == own, (name, changes)


@pytest.mark.slow
def test_evaluate(folder):
    "Through the evaluation, at two batch sizes."
    for name in ("anovl", "mutual"):
        a, b = (evaluate(small(name), folder, batch_size=n, progress=False, workers=0) for n in (1, 5))
        assert (
            far(torch.tensor(a.per_image["score"]), torch.tensor(b.per_image["score"])) < SAME
            and a.mean.filter(regex="^(image|pixel)_").notna().all()
        )


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("anovl", dict(adapter="mlp"), "adapter='mlp'; use text, linear or none"),
        ("anovl", dict(start="one"), "use random, zero or text"),
        ("anovl", dict(keep=1.5), "keep=1.5; it must be from 0 to 1"),
        ("anovl", dict(steps=-1), "steps=-1; it must be 0 or more"),
        ("anovl", dict(lr=0.0), "lr=0.0; it must be above 0"),
        ("anovl", dict(noise=-1.0), "noise=-1.0"),
        ("anovl", dict(crops=0), "crops=0; it must be at least 1"),
        ("anovl", dict(dual_blocks=6), "tiny-clip has 5 blocks"),
        ("anovl", dict(dual_blocks=-1), "0 or more"),
        ("anovl", dict(clip="tiny-dino"), "no text tower"),
        ("anovl", dict(image_size=70), "not a multiple"),
        ("mutual", dict(share=0.0), "share=0.0; it must be above 0, at most 1"),
        ("mutual", dict(share=1.1), "above 0, at most 1"),
        ("mutual", dict(references=1), "use at least 2"),
        ("mutual", dict(references=0), "at least 1"),
        ("mutual", dict(neighbourhoods=()), "one or more"),
        ("mutual", dict(neighbourhoods=(1, 4)), "4 has no centre"),
        ("mutual", dict(neighbourhoods=(-1,)), "-1 has no centre"),
        ("mutual", dict(taps=(0, 3)), "outside 1..6"),
        ("mutual", dict(categories=0), "categories=0"),
        ("mutual", dict(sigma=-1.0), "sigma=-1.0"),
    ],
)
def test_wrong_parameters(name, changes, message):
    with pytest.raises(ValueError, match=message):
        small(name, **changes)


# ------------------------------------------------------------------------------------------------------------------- AnoVL: sentences


def test_sentences():
    for category, kind, words in (
        ("carpet", "texture", ("industrial photo", "textural photo", "surface picture")),
        ("screw", "object", ("industrial photo", "industrial image", "manufacturing image")),
    ):
        said = state_sentences(category, kind)
        assert len(said) == len(set(said)) == 924 == 2 * 7 * 66 and all(category in s for s in said)
        assert [sum(w in s for s in said) for w in words] == [308] * 3 and len(WINCLIP_TEMPLATES) == 22
        sides = said[:462], said[462:]
        assert all(
            sum(
                any(
                    s.replace("{}", "").strip() in x
                    for s in ("unblemished", "flawless", "perfect ", "normal", "without")
                )
                for x in side
            )
            > 0
            for side in sides
        )
        assert (
            sum("without" in s for s in sides[0]) == 3 * 66
            and not any("without" in s for s in sides[1])
            and sum("damaged" in s for s in sides[1]) == 66
        )
    assert all("macaroni " in f"{s} " and "1" not in s for s in state_sentences("macaroni1", "object", macaroni))
    assert all("pcb1" in s for s in state_sentences("pcb1", "object", macaroni)) and not any(
        "pcb1" in s for s in state_sentences("pcb1", "object")
    )
    said = state_sentences("screw", "object")
    assert [s for s in said[:7] if "without damage" in s] == said[6:7], "templates outside, states inside"
    assert [len(ANOVL_STATES[k]) for k in ("normal", "abnormal")] == [7, 7]


def test_kinds():
    assert {
        c: kind_of(c)
        for c in ("carpet", "leather", "grid", "tile", "wood", "mesh", "brick", "screw", "gear", "pcb1", "nowhere seen")
    } == {
        **dict.fromkeys(("carpet", "leather", "grid", "tile", "wood", "mesh", "brick"), "texture"),
        **dict.fromkeys(("screw", "gear", "pcb1", "nowhere seen"), "object"),
    }
    assert (
        kind_of("carpet", ()),
        kind_of("metal_nut", ("metal_nut",)),
        kind_of("screw", ("screw",)),
        kind_of("grid", ("screw",)),
    ) == ("object", "texture", "texture", "object")


@pytest.mark.slow
def test_textures_get_other_sentences(batch):
    "A texture's and an object's sentences differ, for the same image and the same name."
    ours, none, all_ = (
        small("anovl", **c) for c in ({}, dict(textures=()), dict(textures=("screw", "carpet", "pcb1")))
    )
    a, b, c = (m.predict(batch) for m in (ours, none, all_))
    for i, texture in enumerate((False, True, False, False)):
        assert (far(a.map[i], b.map[i]) > SAME) == texture and (far(a.score[i], b.score[i]) > 1e-7) == texture, i
        assert (far(a.map[i], c.map[i]) > SAME) == (not texture), i


@pytest.mark.slow
@torch.no_grad()
def test_text_features_by_hand(batch):
    "Rows of length 1; the mean of the raw embeddings, normalised; read once a class."
    model = small("anovl")
    counts = []
    model._texts = {}
    handle = model.text.register_forward_hook(lambda m, given, result: counts.append(len(result)))
    words, text = model.sentence_features(batch.category)
    assert words.shape == (4, 924, 128) and text.shape == (4, 2, 128) and sum(counts) == 3 * 924
    model.predict(batch)
    assert sum(counts) == 3 * 924
    handle.remove()
    raw = model.text.encode(state_sentences("carpet", "texture"))
    assert far(words[1], raw / raw.norm(dim=-1, keepdim=True)) < SAME
    for row, part in enumerate((raw[:462], raw[462:])):
        assert far(text[1, row], part.mean(0) / part.mean(0).norm()) < SAME
    assert far(text[0], text[2]) == 0 and far(text[0], text[1]) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------- AnoVL: views


def test_views():
    "Twenty-one, all different; quarter turns, mirror and grey exactly; of images normalised or not."
    image = images(2)
    seen = list(views(image))
    assert len(seen) == 21 and all(v.shape == image.shape and 0 <= v.min() and v.max() <= 1 + 1e-6 for v in seen)
    everything = [image, *seen]
    assert min(far(a, b) for i, a in enumerate(everything) for b in everything[:i]) > 0.1
    assert (
        torch.equal(seen[16], image.flip(-1))
        and torch.equal(seen[20], image.rot90(3, (2, 3)))
        and far(seen[17][:, 0], seen[17][:, 2]) == 0
    )
    assert far(moved(image), image) < 1e-4 and far(moved(image, math.pi / 2), image.rot90(1, (2, 3))) < 1e-3
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    assert abs((moved(ramp, x=0.2)[..., :32] - ramp[..., :32]).mean().item() - 0.2 * 31.5 / 63) < 1e-3, (
        "0.2 of half an image between the outer pixels' centres, 6.3 pixels"
    )


@torch.no_grad()
def test_score_by_hand(batch):
    "Mean of the probabilities of 22 class tokens, raw cosines, no temperature."
    model = small("anovl")
    text = model.sentence_features(batch.category)[1]
    shares = []
    mean = model.clip.mean
    std = model.clip.std
    for v in (batch.image, *(v * std + mean for v in views((batch.image - mean) / std))):
        z = F.normalize(model.clip(v).cls @ model.clip.tower.proj, dim=-1)
        shares.append(torch.stack([(z[i] @ text[i].T).softmax(-1)[1] for i in range(4)]))
    assert far(model.predict(batch).score, torch.stack(shares).mean(0)) < SAME
    assert far(small("anovl", augment=False).predict(batch).score, shares[0]) < SAME
    assert far(shares[0], torch.stack(shares).mean(0)) > 1e-5


# ----------------------------------------------------------------------------------------------------------------- AnoVL: adaptation


@pytest.mark.slow
@torch.no_grad()
def test_training_free_map_by_hand(batch):
    "Refined path through all blocks, raw cosines, 3x3 mean with a repeated border, corners aligned."
    model = small("anovl", adapter="none")
    x = model.encode(batch)["patches"]
    text = model.sentence_features(batch.category)[1]
    p = torch.stack([(F.normalize(x[i], dim=-1) @ text[i].T).softmax(-1)[:, 1] for i in range(4)]).view(4, 4, 4)
    padded = F.pad(p[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    mean = sum(padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)) / 9
    prediction = model.predict(batch)
    assert (
        far(prediction.map, F.interpolate(mean[:, None], (SIZE, SIZE), mode="bilinear", align_corners=True)[:, 0])
        < SAME
    )
    assert (
        far(prediction.map[:, 0, 0], mean[:, 0, 0]) < SAME
        and far(prediction.map, small("anovl", steps=0, start="zero").predict(batch).map) < SAME
        and far(prediction.map, small("anovl", keep=1.0).predict(batch).map) < SAME
    )
    assert (
        model.dual_blocks == 5
        and far(prediction.map, small("anovl", adapter="none", dual_blocks=0).predict(batch).map) > 1e-4
    )


def loop(model, x, words, text):
    "The adaptation of one image as the specification tells it: torch's own AdamW, softmax and logarithms."
    p = model.p

    def unit(v):
        return v / v.norm(dim=-1, keepdim=True)

    generator = torch.Generator().manual_seed(p.seed)
    rows = x.shape[1] if p.adapter == "linear" else len(words)
    W = (
        torch.eye(x.shape[1])
        if p.adapter == "linear"
        else words.clone()
        if p.start == "text"
        else torch.zeros_like(words)
    )
    b = torch.zeros(rows)
    if p.start == "random":
        W, b = (
            (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(x.shape[1])
            for shape in ((rows, x.shape[1]), (rows,))
        )
    W = W.requires_grad_()
    b = b.requires_grad_(p.bias)
    optimiser = torch.optim.AdamW([W, b] if p.bias else [W], lr=p.lr, weight_decay=p.weight_decay)

    def predict(v):
        inner = unit(v) @ W.T + b
        return (
            unit(p.keep * v + (1 - p.keep) * (inner if p.adapter == "linear" else torch.tanh(inner) @ words)) @ text.T
        ).softmax(-1)

    for _ in range(p.steps):
        length = x.norm(dim=-1, keepdim=True) if p.noise_scale == "length" else 1
        clean = predict(x)
        noisy = predict(x + p.noise * length * torch.randn(x.shape, generator=generator))
        loss = (-(clean * clean.log()).sum(-1) - p.cross * (noisy[:, 1].log() + clean[:, 0].log())).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return predict(x)[:, 1].detach()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(start="text"),
        dict(adapter="linear"),
        dict(adapter="linear", start="zero"),
        dict(start="zero", bias=False, noise_scale="length"),
        dict(keep=0.8, steps=2, noise=0.2, cross=1.5, lr=1e-2, weight_decay=0.1, seed=3),
    ],
    ids=str,
)
def test_adaptation_one_by_one(batch, changes):
    model = small("anovl", augment=False, **changes)
    with torch.no_grad():
        x = model.encode(batch)["patches"]
    words, text = model.sentence_features(batch.category)
    found = model.predict(batch).layers["adapted"].flatten(1)
    for i in range(4):
        assert far(found[i], loop(model, x[i], words[i], text[i])) < SAME
    assert far(found, model.predict(batch).layers["plain"].flatten(1)) > 1e-4


def test_the_loss_falls_and_its_parts_pull(batch):
    model = small("anovl", augment=False, start="zero", noise_scale="length")
    with torch.no_grad():
        x = model.encode(batch)["patches"]
    words, text = model.sentence_features(batch.category)
    before = contrast(adapted(x, torch.zeros_like(words), words.new_zeros(words.shape[:2]), words), text)
    after, losses = model.adapt(x, words, text, batch.category, (SIZE, SIZE))
    assert losses.shape == (4, model.p.steps) and losses.isfinite().all()
    low = torch.full_like(before, float("inf"))  # noise that is abnormal for certain: entropy and the clean half remain
    assert (adaptation_loss(after, low) < adaptation_loss(before, low)).all() and (
        after.mean(1) < before.mean(1)
    ).all(), "more certain, and more normal"
    assert not after.requires_grad and not torch.is_inference(after)
    z = torch.tensor([[0.7, -0.2]])
    p = z.sigmoid()
    q = (2 * z).sigmoid()
    assert (
        far(
            adaptation_loss(z, 2 * z, 0.25),
            (-(p * p.log() + (1 - p) * (1 - p).log()) - 0.25 * (q.log() + (1 - p).log())).mean(1),
        )
        < 1e-6
    )


def test_without_noise_the_terms_cancel():
    "At the paper's weight of one half nothing but the noise moves a patch that is undecided."
    z = torch.tensor([[0.02, -0.03]], requires_grad=True)

    def slope(weight):
        return torch.autograd.grad(adaptation_loss(z, z, weight).sum(), z)[0].abs().max().item()

    assert slope(0.5) < 1e-5 and slope(0.4) > 1e-4 and slope(0.6) > 1e-4


def test_works_in_every_mode(batch):
    "Inference mode, no_grad, and with gradients on: the same numbers, and the caller's mode is untouched."
    model = small("anovl", augment=False)
    found = model.predict(batch)
    with torch.no_grad(), fast_products():
        assert torch.equal(model(model.encode(batch), batch).map, found.map) and not torch.is_grad_enabled()
    with fast_products():
        free = model(model.encode(batch), batch)
    assert torch.equal(free.map, found.map) and not free.map.requires_grad and torch.is_grad_enabled()
    with torch.inference_mode():
        model.predict(batch)
        assert torch.is_inference_mode_enabled()


def test_the_global_seed_does_not_matter(batch):
    model = small("anovl", augment=False)
    maps = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        maps.append(model.predict(batch).map)
        assert torch.initial_seed() == seed
    assert torch.equal(*maps) and far(small("anovl", augment=False, seed=1).predict(batch).map, maps[0]) > 1e-7


@pytest.mark.slow
def test_release_compat(batch):
    "The optimiser of a class is carried, the noise unseeded: order and history matter; prepare forgets."
    batch = batch_of(batch.image, ["screw"] * 4)
    zero = dict(augment=False, start="zero", bias=False, noise_scale="length")
    model = small("anovl", release_compat=True, **zero)
    ours = small("anovl", **zero)
    assert model.transductive and not ours.transductive

    def run(part, seed=0):
        torch.manual_seed(seed)
        return model.prepare(None).predict(part).map

    forward = run(batch)
    repeated = run(batch)
    assert torch.equal(forward, repeated), "the same start, the same numbers"
    assert far(run(batch, 1), forward) > 1e-6, "unseeded noise"
    swapped = run(batch[[1, 0, 3, 2]])[[1, 0, 3, 2]]
    assert far(swapped, forward) > 1e-4, "order"
    torch.manual_seed(0)
    assert far(model.predict(batch).map, forward) > 1e-4, "history across batches"
    quiet, same = (
        small("anovl", noise=0.0, cross=1.5, release_compat=r, **zero) for r in (True, False)
    )  # at 0.5 entropy and cross term cancel without noise
    first = quiet.prepare(None).predict(batch).map
    fresh = same.predict(batch).map
    assert far(first[0], fresh[0]) < SAME and far(first[1:], fresh[1:]) > 1e-4, (
        "without noise only the first image is what it should be"
    )
    assert (
        far(quiet.prepare(None).predict(batch[[1, 0, 3, 2]]).map[[1, 0, 3, 2]], first) > 1e-4
        and far(same.predict(batch[[1, 0, 3, 2]]).map[[1, 0, 3, 2]], fresh) < SAME
    ), "order, by the optimiser alone"
    one_by_one = torch.cat([(quiet.prepare(None) if i == 0 else quiet).predict(batch[[i]]).map for i in range(4)])
    assert far(one_by_one, first) < SAME, "as released: image after image, whatever the batch"
    assert torch.equal(model.predict(batch).score, ours.predict(batch).score), "the score is not adapted"
    kinds = batch_of(batch.image, ["screw", "carpet", "pcb1", "screw"])
    first = quiet.prepare(None).predict(kinds).map
    fresh = same.predict(kinds).map
    assert far(first[:3], fresh[:3]) < SAME and far(first[3], fresh[3]) > 1e-4, "one optimiser a class"


@pytest.mark.slow
def test_options_act(batch):
    reference = small("anovl").predict(batch)
    for changes in (
        dict(adapter="linear"),
        dict(adapter="none"),
        dict(start="text"),
        dict(keep=0.7),
        dict(steps=2),
        dict(lr=1e-2),
        dict(noise=0.5),
        dict(cross=2.0),
        dict(dual_blocks=2),
        dict(quick_gelu=False),
    ):
        assert far(small("anovl", **changes).predict(batch).map, reference.map) > 1e-6, changes
    assert far(small("anovl", augment=False).predict(batch).score, reference.score) > 1e-6
    assert (
        far(
            small("anovl", start="text", weight_decay=0.5).predict(batch).map,
            small("anovl", start="text").predict(batch).map,
        )
        > 1e-8
    )


# --------------------------------------------------------------------------------------------------------------------- AnoVL: crops


def test_squares():
    image = torch.arange(2 * 3 * 4 * 10.0).view(2, 3, 4, 10)
    for wide, swap in ((image, False), (image.transpose(2, 3), True)):
        crops, spots = squares(wide, 3)
        assert [s[::-1] if swap else s for s in spots] == [(0, 0), (0, 3), (0, 6)] and {c.shape for c in crops} == {
            (2, 3, 4, 4)
        }
        for crop, (y, x) in zip(crops, spots):
            assert torch.equal(crop, wide[..., y : y + 4, x : x + 4])
        assert squares(wide, 1)[1] == [(0, 0)] and torch.equal(squares(wide, 1)[0][0], wide)
        with pytest.raises(ValueError, match="2 square crops do not cover an image of .*; use crops=3"):
            squares(wide, 2)
    assert squares(image[..., :8], 2)[1] == [(0, 0), (0, 4)] and squares(image[..., :4], 2)[1] == [(0, 0), (0, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("wide", [True, False])
def test_two_crops(wide):
    "Without an adapter a crop is an image of its own; the stitched map is theirs, and their mean where they overlap; the score their mean, or the larger."
    picture = images(2, 5, 2 * SIZE)[..., :SIZE, : SIZE + 40]
    first, second = (batch_of(picture[..., a : a + SIZE]) for a in (0, 40))
    if not wide:
        picture, first.image, second.image = (t.transpose(2, 3) for t in (picture, first.image, second.image))
    one = small("anovl", adapter="none")
    two = small("anovl", adapter="none", crops=2)
    a = one.predict(first)
    b = one.predict(second)
    found = two.predict(batch_of(picture))
    maps = [m if wide else m.transpose(1, 2) for m in (a.map, b.map, found.map)]
    assert (
        far(maps[2][..., :40], maps[0][..., :40]) < SAME and far(maps[2][..., SIZE:], maps[1][..., SIZE - 40 :]) < SAME
    )
    assert far(maps[2][..., 40:SIZE], (maps[0][..., 40:] + maps[1][..., : SIZE - 40]) / 2) < SAME
    assert far(found.score, (a.score + b.score) / 2) < SAME and found.layers["crops"].shape == (2, 2)
    together = small("anovl", crops=2).predict(batch_of(picture)).layers["adapted"]
    assert far(together[:, 0], small("anovl").predict(first).layers["adapted"][:, 0]) > 1e-6, "one adapter for both"


# ------------------------------------------------------------------------------------------------------------------------------ mutual


def test_distance_by_hand():
    generator = torch.Generator().manual_seed(0)
    a, bank = (F.normalize(torch.randn(*s, generator=generator), dim=-1) for s in ((5, 8), (7, 6, 8)))
    for share, count in ((0.3, 2), (0.43, 3), (1.0, 7), (0.01, 1), (3 / 7, 3)):
        found = mutual_distance(a, bank, share)
        for i in range(5):
            each = sorted(min(1 - float(a[i] @ v) for v in other) for other in bank)
            assert abs(found[i].item() - sum(each[:count]) / count) < 1e-5, share
    assert mutual_distance(bank[2], bank, 0.01).abs().max() < 1e-6


def test_neighbourhood_by_hand():
    x = torch.randn(2, 12, 5)
    for side in (1, 3, 5):
        found = neighbourhood(x, (3, 4), side)
        for p in range(12):
            r = p // 4
            c = p % 4
            h = side // 2
            mean = torch.stack(
                [
                    x[:, 4 * i + j]
                    for i in range(max(0, r - h), min(3, r + h + 1))
                    for j in range(max(0, c - h), min(4, c + h + 1))
                ]
            ).mean(0)
            assert far(found[:, p], mean / mean.norm(dim=-1, keepdim=True)) < SAME


def test_finds_the_planted_patch(folder, everything):
    "The odd image of each category scores highest, and its highest patch is the odd one; the index's labels say which it is."
    model = small("mutual", weights="pretrained", neighbourhoods=(1,)).prepare(folder)
    found = model.predict(everything)
    for category in ("checks", "stripes"):
        rows = [i for i, c in enumerate(everything.category) if c == category]
        top = max(rows, key=lambda i: found.score[i].item())
        assert everything.anomalous[top] and [i for i in rows if everything.anomalous[i]] == [top]
        assert found.layers["distance"][top].argmax().item() == 1 * 4 + 2
        assert found.map[top][everything.mask[top, 0]].mean() > 2 * found.map[top][~everything.mask[top, 0]].mean()


def test_labels_are_not_read(folder, everything):
    "Labels, defect names, masks and the order of the rows: none of them changes a number."
    reference = small("mutual", references=4).prepare(folder).predict(everything)
    nowhere = folder.assign(anomalous=~folder["anomalous"], defect="?", mask="not/there.png")
    mixed = pd.DataFrame(folder, copy=True)
    for column in ("anomalous", "defect", "mask"):
        mixed[column] = folder[column].sample(frac=1, random_state=1).to_numpy()
    for other in (nowhere, mixed, folder.sample(frac=1, random_state=2), folder[["category", "split", "image"]].copy()):
        other.attrs["root"] = folder.attrs["root"]
        found = small("mutual", references=4).prepare(other).predict(everything)
        assert torch.equal(found.map, reference.map) and torch.equal(found.score, reference.score)
    blind = Batch(
        **{
            **vars(everything),
            "anomalous": ~everything.anomalous,
            "mask": ~everything.mask,
            "defect": everything.defect + 1,
        }
    )
    assert torch.equal(small("mutual", references=4).prepare(folder).predict(blind).map, reference.map)
    fewer = folder[folder["image"] != "checks/b.png"].copy()
    fewer.attrs["root"] = folder.attrs["root"]
    assert (
        far(
            small("mutual").prepare(fewer).predict(everything).map,
            small("mutual").prepare(folder).predict(everything).map,
        )
        > 1e-7
    ), "other images, other numbers: transductive"


def test_training_rows_are_no_references(folder, everything):
    more = pd.concat([folder, folder.assign(split="train", image="nothing/" + folder["image"])], ignore_index=True)
    more.attrs["root"] = folder.attrs["root"]
    assert torch.equal(
        small("mutual").prepare(more).predict(everything).map, small("mutual").prepare(folder).predict(everything).map
    )


def test_itself_is_left_out(folder, everything):
    "The same picture under a name that is not in the index finds itself."
    model = small("mutual", share=0.01, neighbourhoods=(1,), sigma=0.0).prepare(folder)
    own = model.predict(everything[[0, 4]])
    renamed = everything[[0, 4]]
    renamed.path = ["x.png", "y.png"]
    assert (
        model.predict(renamed).layers["distance"].abs().max() < 1e-5
        and own.layers["distance"].flatten(1).mean(1).min() > 1e-4
    )


def test_all_images_by_hand(folder, everything):
    "Map of one image from its definition, over two taps and neighbourhoods."
    model = small("mutual", taps=(2, 4), neighbourhoods=(1, 3), share=0.4, sigma=0.0).prepare(folder)
    rows = [i for i, c in enumerate(everything.category) if c == "stripes"]
    with torch.no_grad():
        levels = model.levels(model.encode(everything[rows]))
    want = sum(mutual_distance(v[2], v[[0, 1, 3, 4, 5]], 0.4) for v in levels) / 4
    assert len(levels) == 4 and far(model.predict(everything[[rows[2]]]).layers["distance"].flatten(), want) < SAME


def test_the_bank_is_bounded(folder, everything):
    for references, categories in ((3, 1), (64, 2)):
        model = small("mutual", references=references, categories=categories).prepare(folder)
        before = list(model.state_dict())
        model.predict(everything)
        assert len(model._banks) == categories
        for paths, levels in model._banks.values():
            assert (
                len(paths) == min(references, 6)
                and {v.shape for v in levels} == {(len(paths), 16, 192)}
                and len(levels) == 3
            )
        assert list(model.state_dict()) == before
    picks = [
        small("mutual", references=3, seed=s).prepare(folder)._tables["checks"]["image"].tolist()
        for s in (0, 0, 1, 2, 3)
    ]
    assert picks[0] == picks[1] and len({tuple(p) for p in picks}) > 1


def test_references_are_read_once(folder, everything, tmp_path):
    model = small("mutual").prepare(folder)
    counts = []
    handle = model.backbone.register_forward_hook(lambda m, given, result: counts.append(len(result.cls)))
    for _ in range(2):
        model.predict(everything[:6])
    assert sum(counts) == 6 + 6 + 6, "two batches and one bank"
    counts.clear()
    cache = FeatureCache(tmp_path)
    fresh = small("mutual").prepare(folder)
    model.prepare(folder).predict(everything[:6], cache)
    assert sum(counts) == 6 and torch.equal(
        model.predict(everything[:6], cache).map, fresh.predict(everything[:6]).map
    ), "with a cache every image is seen once"
    handle.remove()


def test_another_size(folder):
    "Images are compared at the size they are judged at; a second size does not use the first one's bank."
    model = small("mutual", share=0.01, neighbourhoods=(1,), sigma=0.0).prepare(folder)
    model.predict(next(iter(batches(folder, SIZE, 2))))
    other = next(iter(batches(folder, (50, 80), 2)))
    found = model.predict(other)
    other.path = ["x.png", "y.png"]
    assert (
        found.map.shape == (2, 50, 80)
        and model.predict(other).layers["distance"].max() < 1e-5 < found.layers["distance"].max()
    )


def test_what_is_refused(folder, everything):
    model = small("mutual")
    with pytest.raises(ValueError, match=r"call prepare\(index\) first"):
        model.predict(everything)
    with pytest.raises(ValueError, match=r"call prepare\(index\) first"):
        model.prepare(folder, training=True).predict(everything)
    one = folder[folder["category"].ne("checks") | folder["image"].eq("checks/a.png")].copy()
    one.attrs["root"] = folder.attrs["root"]
    with pytest.raises(ValueError, match="category checks has one test image, checks/a.png: .*at least two"):
        model.prepare(one)
    with pytest.raises(ValueError, match="none of the 12 rows has the split 'test'"):
        model.prepare(folder.assign(split="train"))
    with pytest.raises(
        ValueError, match="category screw is not in the index given to prepare, which has checks, stripes"
    ):
        model.prepare(folder).predict(batch_of(images(1)))
    lost = folder.copy()
    lost.attrs = {}
    with pytest.raises(ValueError, match="lost its root"):
        model.prepare(lost)


def test_it_says_that_it_is_transductive(folder, everything):
    assert METHODS["mutual"].transductive is True and not getattr(METHODS["anovl"], "transductive", False)
    pair = small("mutual").prepare(
        folder[folder["image"].isin(["checks/a.png", "checks/b.png"])]
        .assign(root=1)
        .drop(columns="root")
        .pipe(lambda t: t.attrs.update(folder.attrs) or t)
    )
    assert pair.predict(everything[[0]]).map.isfinite().all(), "two images are enough"
    assert (
        far(
            copy.deepcopy(pair).predict(everything[[0]]).map,
            small("mutual").prepare(folder).predict(everything[[0]]).map,
        )
        > 1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("tall", [False, True])
def test_the_visa_procedure_through_evaluate(tmp_path, tall):
    "Images read as they lie, shorter side resized to the tower's, two squares; a square image is told."
    rows = []
    size = (90, 60) if tall else (60, 90)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        mask = np.zeros(size, np.uint8)
        mask[10:30, 20:40] = 255 * i
        Image.fromarray(mask).save(tmp_path / f"m{i}.png")
        rows.append(
            dict(
                dataset="own",
                category="gear",
                split="test",
                image=f"{i}.png",
                mask=f"m{i}.png" if i else "",
                anomalous=bool(i),
                defect="dent" if i else "good",
            )
        )
    index = make_index(rows, tmp_path)
    model = create("anovl", clip_weights="random:0", image_size=32, **METHODS["anovl"].variants["visa"])
    found = evaluate(model, index, size=size, progress=False).per_image.set_index("image")
    batch = next(iter(batches(index, size)))
    said = model.predict(batch)
    assert said.layers["adapted"].shape[1] == 2 and not model._warned
    assert found["score"].tolist() == pytest.approx(said.score.tolist(), abs=1e-6) and found[
        "map_high"
    ].tolist() == pytest.approx(said.map.flatten(1).amax(1).tolist(), abs=1e-6)
    with pytest.warns(
        UserWarning, match="crops=2, but these images are square .32 x 32.: every crop is the whole image"
    ):
        evaluate(model, index, progress=False)
