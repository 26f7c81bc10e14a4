"WinCLIP, AnomalyCLIP, Crane, Crane+: equations by hand, independence of batch mates, blank images, gradients, checkpoints of ours and of the authors, options that act, errors."

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from zsad_nb.backbones.ensembles import ANOMALIB_TEMPLATES, WINCLIP_STATES, WINCLIP_TEMPLATES
from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.text import END, START, UNKNOWN, create_text
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.backbones.weights import WeightsError, import_vision_libraries, read_state
from zsad_nb.components.losses import dice, focal
from zsad_nb.components.maps import to_pixels
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods import anomalyclip, crane, winclip  # noqa: F401 (they register their methods)
from zsad_nb.methods.anomalyclip import import_released
from zsad_nb.methods.base import METHODS, create, describe, load, save
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.methods.winclip import association, harmonic, spread, window_embeddings, window_patches
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of

SIZE, SAME = 64, 1e-5
LEARNING = ["anomalyclip", "crane", "crane_plus"]
ALL = ["winclip", *LEARNING]


def small(name, **changes):
    seed_everything(0)
    return create(name, **{**dict(clip_weights="random:0", image_size=SIZE), **changes}).eval()


def shaken(name, **changes):
    "As after training: the prompts away from where they start."
    model = small(name, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for q in model.learned().values():
            q.add_(0.1 * torch.randn(q.shape, generator=generator))
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
    return small("winclip", **changes).set_references(images(2, 7))


def far(a, b) -> float:
    return (a - b).abs().max().item()


def label(changes):
    return ",".join(f"{k}={v}" for k, v in changes.items()) or "default" if isinstance(changes, dict) else None


# -------------------------------------------------------------------------------------------------------------- what all of them promise

BUILDS = {
    "winclip": lambda: small("winclip"),
    "winclip few-shot": few_shot,
    "winclip caoyunkang": lambda: small("winclip", **winclip.VARIANTS["caoyunkang"]),
    "anomalyclip": lambda: shaken("anomalyclip"),
    "anomalyclip four layers": lambda: shaken("anomalyclip", layers="quarters"),
    "crane": lambda: shaken("crane"),
    "crane with context": lambda: shaken("crane", context_test=True),
    "crane as released": lambda: shaken("crane", release_compat=True),
    "crane_plus": lambda: shaken("crane_plus"),
    "crane_plus other grid": lambda: shaken("crane_plus", dino_size=96),
    "crane_plus paper": lambda: shaken("crane_plus", value_from="input", centre=False),
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


def test_the_released_batch_mean_would_be_noticed(batch):
    model = shaken("crane_plus", batch_mean=True)
    other = Batch.cat([batch[:1], batch_of(torch.zeros(3, 3, SIZE, SIZE))])
    assert far(model.predict(other).map[:1], model.predict(batch).map[:1]) > 10 * SAME and model.encode_key() is None
    assert (
        far(
            shaken("crane_plus", release_compat=True).predict(batch[:1]).map,
            shaken("crane_plus", deep_half=True).predict(batch[:1]).map,
        )
        < SAME
    ), "alone, both means are one"


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
    if not model.param_groups():
        return
    model.train()
    losses = model.loss(model(model.encode(blank), blank), blank)
    losses["total"].backward()
    assert all(v.isfinite() for v in losses.values()) and all(q.grad.isfinite().all() for q in model.learned().values())


@pytest.mark.parametrize("shape", [(64, 64), (50, 81)])
def test_shapes(model, shape):
    "Images of other sizes than the towers' are resized for them; the map has the image's size."
    given = batch_of(torch.rand(3, 3, *shape))
    features = model.encode(given)
    prediction = model.predict(given)
    assert {len(v) for v in features.values()} == {3} and not any(v.requires_grad for v in features.values())
    assert prediction.map.shape == (3, *shape) and prediction.score.shape == (3,) and len(prediction.layers) >= 2
    assert {len(v) for v in prediction.layers.values()} == {3}
    assert ((prediction.score >= 0) & (prediction.score <= 1)).all() and (prediction.map >= 0).all()


@pytest.mark.slow
def test_save_and_load(model, batch, tmp_path):
    model.trained_on = ["mvtec/bottle"]
    path = save(model, tmp_path / "model.safetensors")
    back = load(path).eval()
    assert (
        back.p == model.p
        and back.trained_on == ["mvtec/bottle"]
        and list(read_header(path)["backbones"]) == list(model.backbones())
    )
    assert torch.equal(back.predict(batch).map, model.predict(batch).map) and torch.equal(
        back.predict(batch).score, model.predict(batch).score
    )
    assert next(iter(model.backbones())) == "clip"


@pytest.mark.slow
def test_cached_features_say_the_same(model, batch, tmp_path):
    "Every feature is one image's own, and what is kept on disk gives the same prediction."
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
@pytest.mark.parametrize("name", ALL)
def test_described(name):
    table = describe(name)
    assert table["source"].ne("").all() and table["help"].ne("").all() and table["parameter"].is_unique
    sets = [
        (f"{study}: {row}", c)
        for study, rows in {"ablations": METHODS[name].ablations, **METHODS[name].studies}.items()
        for row, c in rows.items()
    ]
    for row, changes in sets:
        assert small(name, **changes).predict(batch_of(images(1))).map.isfinite().all(), row
    with pytest.raises(TypeError, match="did you mean tau"):
        small(name, tauu=1.0)


# ------------------------------------------------------------------------------------------------------------------- encode and its key


@pytest.mark.slow
def test_encode_key():
    "Features of two settings may be shared exactly when their keys are equal."

    def key(name, **changes):
        return json.dumps(small(name, **changes).encode_key(), sort_keys=True)

    other = {
        "winclip": (
            [
                dict(clip_weights="random:1"),
                dict(image_size=80),
                dict(scales=(2,)),
                dict(quick_gelu=False),
                dict(release_compat=True),
            ],
            [dict(tau=0.1), dict(templates="anomalib"), dict(averaged="normal"), dict(score="map"), dict(at_once=3)],
        ),
        "anomalyclip": (
            [
                dict(clip_weights="random:1"),
                dict(image_size=80),
                dict(taps=(3, 5)),
                dict(layers="quarters"),
                dict(dual_blocks=2),
                dict(attention="qkv"),
                dict(cls_norm=True),
            ],
            [dict(tau=0.1), dict(sigma=0.0), dict(prompt_count=3), dict(release_compat=True)],
        ),
        "crane": (
            [
                dict(clip_weights="random:1"),
                dict(image_size=80),
                dict(taps=(3, 5)),
                dict(dual_blocks=2, taps=(5,)),
                dict(attention="vv"),
                dict(aliased=True),
            ],
            [dict(tau=0.1), dict(soft_mean=False), dict(context_test=True), dict(deep_half=True)],
        ),
        "crane_plus": (
            [
                dict(clip_weights="random:1"),
                dict(dino_weights="random:1"),
                dict(dino_size=96),
                dict(value_from="input"),
                dict(scale=2.0),
                dict(shift=1.0),
                dict(centre=False),
                dict(taps=(4, 5)),
                dict(batch_mean=True),
            ],
            [dict(tau=0.1), dict(soft_mean=True), dict(cls_weight=0.0)],
        ),
    }
    keys = {name: key(name) for name in ALL}
    assert len(set(keys.values())) == 4
    for name, (changing, keeping) in other.items():
        for changes in changing:
            assert key(name, **changes) != keys[name], (name, changes)
        for changes in keeping:
            assert key(name, **changes) == keys[name], (name, changes)


# ------------------------------------------------------------------------------------------------------------- gradients and what learns


@pytest.mark.parametrize(
    "name, changes",
    [(n, {}) for n in LEARNING]
    + [
        ("anomalyclip", dict(layers="quarters")),
        ("anomalyclip", dict(deep_tokens=0)),
        ("anomalyclip", dict(release_compat=True)),
        ("crane", dict(context_train=0.0)),
        ("crane", dict(release_compat=True)),
        ("crane", dict(upsampling="bilinear")),
        ("crane", dict(cls_weight=1.0)),
        ("crane_plus", dict(soft_mean=True)),
        ("crane_plus", dict(dino_size=96)),
    ],
    ids=label,
)
def test_gradient_reaches_the_prompts_and_nothing_else(batch, name, changes):
    model = shaken(name, **changes).train()
    model.loss(model(model.encode(batch), batch), batch)["total"].backward()
    assert set(model.learned()) == (
        {"prompts.context"} if changes.get("deep_tokens") == 0 else {"prompts.context", "prompts.deep"}
    )
    for n, q in model.learned().items():
        assert q.grad.isfinite().all() and (q.grad.abs().amax(-1) > 0).all(), n
    assert all(q.grad is None for b in model.backbones().values() for q in b.parameters()) and not any(
        b.training for b in model.backbones().values()
    )
    assert [g["lr"] for g in model.param_groups()] == [1e-3] and {
        id(q) for g in model.param_groups() for q in g["params"]
    } == {id(q) for q in model.learned().values()}


def test_recipes():
    "Epochs, batch, optimiser, betas and seed of the public codes."
    expected = dict(anomalyclip=(15, (0.5, 0.999)), crane=(5, (0.6, 0.999)), crane_plus=(5, (0.6, 0.999)))
    for name, (epochs, betas) in expected.items():
        r = recipe_of(name)
        assert (r.epochs, r.betas, r.batch_size, r.optimiser, r.weight_decay, r.schedule, r.warmup, r.seed) == (
            epochs,
            betas,
            8,
            "adam",
            0.0,
            "constant",
            0.0,
            111,
        ), name


def test_full_size_counts():
    "43,008 learned values at the papers' sizes; nothing is allocated."
    for name in LEARNING:
        with torch.device("meta"):
            model = create(
                name,
                clip="clip-vitl14-336",
                clip_weights="random:0",
                **(dict(dino="dinov2-vitb14-reg", dino_weights="random:0") if name == "crane_plus" else {}),
            )
        assert sum(q.numel() for q in model.learned().values()) == 43_008 == 2 * 12 * 768 + 8 * 4 * 768
        assert (model.dual_blocks, model.grid) == (19, (37, 37)) and model.clip.taps == dict(
            anomalyclip=(24,), crane=(6, 12, 18, 24), crane_plus=(24,)
        )[name]
        if name == "crane_plus":
            assert (model.dino.taps, model.dino_grid, model.dino.size, model.centre) == ((12,), (37, 37), 518, False)
    with torch.device("meta"):
        model = create("winclip", clip="clip-vitb16-plus-240", clip_weights="random:0")
    assert (
        model.grid,
        model.clip.width,
        model.clip.tower.proj.shape[1],
        len(window_patches(model.grid, 2)),
        len(window_patches(model.grid, 3)),
    ) == ((15, 15), 896, 640, 196, 169)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_fit_and_evaluate(name, tmp_path):
    "A short training through the trainer: the loss falls, the same seed gives the same numbers, and the rows trained on are known."
    index = synthetic_index(tmp_path, "auxiliary", SIZE, normal=2, defective=2)
    index = index[index["category"].isin(sorted(index["category"].unique())[:2])].reset_index(drop=True)
    recipe = recipe_of(name, epochs=6, batch_size=4)
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
            allow_seen="synthetic-auxiliary",
        )
    assert found.mean.filter(regex="^(image|pixel)_").notna().all()


def test_training_free(batch, tmp_path):
    model = small("winclip")
    assert (
        model.param_groups() == []
        and model.learned() == {}
        and list(model.parameters())
        and not any(q.requires_grad for q in model.parameters())
    )
    with pytest.raises(ValueError, match="training-free"):
        fit(model, synthetic_index(tmp_path, "auxiliary", SIZE, normal=1, defective=1), progress=False)
    with pytest.raises(NotImplementedError, match="training-free"):
        model.loss(model.predict(batch), batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device")
@pytest.mark.parametrize("name", ["winclip few-shot", "anomalyclip", "crane with context", "crane_plus"])
def test_another_device(name, batch):
    model = BUILDS[name]()
    here = model.predict(batch)
    there = model.to("cuda").predict(batch)
    assert there.map.is_cuda and far(there.map.cpu(), here.map) < 1e-3 and far(there.score.cpu(), here.score) < 1e-3
    assert far(model.to("cpu").predict(batch).map, here.map) < SAME


# --------------------------------------------------------------------------------------------------------------------------- WinCLIP


@pytest.mark.parametrize("grid, side", [((4, 4), 2), ((4, 4), 3), ((3, 5), 2), ((5, 3), 3), ((3, 3), 3), ((2, 2), 1)])
def test_windows_by_hand(grid, side):
    patches, (h, w) = window_patches(grid, side), grid
    assert patches.tolist() == [
        [(r + i) * w + c + j for i in range(side) for j in range(side)]
        for r in range(h - side + 1)
        for c in range(w - side + 1)
    ]
    values = torch.rand(2, len(patches), generator=torch.Generator().manual_seed(0)) + 0.01
    found = spread(values, grid, side)
    for p in range(h * w):
        covering = [i for i, patch in enumerate(patches.tolist()) if p in patch]
        for b in range(2):
            assert (
                abs(found[b, p // w, p % w].item() - len(covering) / sum(1 / values[b, i].item() for i in covering))
                < 1e-5
            )
    assert far(harmonic([values, values + 1]), 2 / (1 / values + 1 / (values + 1))) < 1e-6


def test_a_window_that_does_not_fit():
    for side in (0, 5):
        with pytest.raises(ValueError, match=f"windows of {side} x {side} patches in an image of 4 x 6"):
            window_patches((4, 6), side)
    with pytest.raises(ValueError, match="windows of 5 x 5 patches in an image of 4 x 4"):
        small("winclip", scales=(2, 5))


@pytest.mark.parametrize("zero", [0.0, 1e-40, 1e-35])
def test_a_score_of_zero(zero):
    "The harmonic mean with a zero is zero, never a not-a-number; a rounding below zero neither."
    values = torch.tensor([[zero, 0.5, 0.5, 0.5]])
    found = spread(values, (3, 3), 2)
    assert found.isfinite().all() and found[0, 1, 1] < 1e-20 and abs(found[0, 2, 2].item() - 0.5) < 1e-6
    assert (
        spread(-torch.full((1, 4), 1e-8), (3, 3), 2).abs().max() < 1e-20
        and harmonic([torch.zeros(1), torch.ones(1)]).item() < 1e-20
    )


@pytest.mark.slow
@torch.no_grad()
def test_window_by_window(batch):
    "All at once equals one after the other, whatever goes through at once."
    clip = create_backbone("tiny-clip", "random:0", size=SIZE)
    tokens, grid = clip.embed(batch.image)
    for side in (2, 3):
        by_hand = torch.stack(
            [
                clip.norm(clip.run(torch.cat([tokens[:, :1], tokens[:, 1:][:, p]], 1), grid, ())[1][:, 0])
                @ clip.tower.proj
                for p in window_patches(grid, side)
            ],
            1,
        )
        for at_once in (1, 5, 10**6):
            assert far(window_embeddings(clip, tokens, grid, side, at_once), by_hand) < SAME
    model = small("winclip", at_once=7)
    assert far(model.predict(batch).map, small("winclip").predict(batch).map) < SAME
    wrong = window_embeddings(clip, tokens, grid, 2, across=True)
    assert far(wrong, wrong[:1, :1].expand_as(wrong)) < SAME, "attention across windows tells them apart no more"


def numbers(model, batch) -> tuple:
    "Cosines of the image (B, 2) and of the windows (B, W, 2), from scratch."
    f = model.encode(batch)
    out = {}
    for row, category in enumerate(("screw", "metal nut", "screw", "printed circuit board")):
        text = []
        for s in ("normal", "abnormal"):
            templates = WINCLIP_TEMPLATES if model.p.templates == "paper" else ANOMALIB_TEMPLATES
            z = model.text.encode(
                [t.format(state.format(category)) for t in templates for state in WINCLIP_STATES[s]]
            ).mean(0)
            text.append(z / z.norm())
        for k, v in f.items():
            if k != "patches":
                out.setdefault(k, []).append(
                    F.cosine_similarity(v[row].reshape(-1, 1, v.shape[-1]), torch.stack(text)[None], dim=-1)
                )
    return torch.cat(out["cls"]), {s: torch.stack(out[f"windows_{s}"]) for s in model.p.scales}


@pytest.mark.slow
@torch.no_grad()
def test_the_two_codes_by_hand(batch):
    "The specification's table, row by row."
    for variant in ("paper", "anomalib", "caoyunkang"):
        model = small("winclip", **winclip.VARIANTS[variant])
        image, windows = numbers(model, batch)
        prediction = model.predict(batch)
        if variant == "caoyunkang":
            inverse = {
                s: 1 / (100 * c).softmax(-1)[..., 0] for s, c in windows.items()
            }  # one over the normal probability

            def mean(v, s):
                return torch.stack(
                    [
                        v[:, [i for i, w in enumerate(window_patches((4, 4), s).tolist()) if p in w]].mean(1)
                        for p in range(16)
                    ],
                    1,
                ).view(4, 4, 4)

            grid = 1 - 1 / torch.stack([mean(v, s) for s, v in inverse.items()]).mean(0)
            assert (
                far(
                    prediction.score,
                    F.interpolate(grid[:, None], (400, 400), mode="bilinear", align_corners=False).flatten(1).amax(1),
                )
                < SAME
            )
        else:
            score = (image / 0.07).softmax(-1)[:, 1]
            maps = [spread((c / 0.07).softmax(-1)[..., 1], (4, 4), s) for s, c in windows.items()]
            grid = 3 / (1 / score[:, None, None] + 1 / maps[0] + 1 / maps[1])
            assert far(prediction.score, score) < SAME
        assert (
            far(prediction.layers["grid"], grid) < SAME
            and far(
                prediction.map, F.interpolate(grid[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
            )
            < SAME
        )


@pytest.mark.slow
def test_winclip_options_act(batch):
    reference = small("winclip").predict(batch)
    for changes in (
        dict(templates="anomalib"),
        dict(tau=0.1),
        dict(averaged="normal"),
        dict(scales=(2,)),
        dict(scales=(3,)),
        dict(scales=()),
        dict(image_in_map=False),
        dict(score="map"),
        dict(class_agnostic=True),
        dict(release_compat=True),
        dict(quick_gelu=False),
    ):
        found = small("winclip", **changes).predict(batch)
        assert max(far(found.map, reference.map), far(found.score, reference.score)) > 1e-6, changes
    coarse, fine = (small("winclip", score="map", score_size=s).predict(batch).score for s in (7, 400))
    assert far(coarse, fine) > 1e-6
    assert (
        far(small("winclip", scales=()).predict(batch).map, reference.score[:, None, None].expand(-1, SIZE, SIZE))
        < SAME
    ), "the image alone says the same everywhere"


def test_class_names(batch):
    "Each image has the texts of its own class, made once."
    model = small("winclip")
    rows = []
    handle = model.text.register_forward_hook(lambda m, given, result: rows.append(len(result)))
    model.predict(batch)
    assert sum(rows) == 3 * (154 + 88) and set(model._texts) == {"screw", "metal nut", "printed circuit board"}
    model.predict(batch)
    assert sum(rows) == 3 * (154 + 88)
    handle.remove()
    other = model.predict(Batch(**{**vars(batch), "category": ["carpet"] * 4}))
    assert far(other.score, model.predict(batch).score) > 1e-4
    agnostic = small("winclip", class_agnostic=True)
    assert torch.equal(
        agnostic.predict(batch).score, agnostic.predict(Batch(**{**vars(batch), "category": ["carpet"] * 4})).score
    )


@pytest.mark.slow
def test_references(batch):
    model = small("winclip")
    zero = small("winclip").predict(batch)
    good = images(3, 7)
    few = model.set_references(good).predict(batch)
    assert (
        model.p.shots == 3
        and model.references()["patches"].shape == (48, 192)
        and model.references()["windows_3"].shape == (12, 128)
    )
    features = model.encode(batch)
    seen = model.encode(batch_of(good))
    by_hand = []
    for name, side in (("patches", None), ("windows_2", 2), ("windows_3", 3)):
        cosine = (
            F.cosine_similarity(features[name].flatten(0, 1)[:, None], seen[name].flatten(0, 1)[None], dim=-1)
            .amax(1)
            .view(4, -1)
        )
        by_hand.append(((1 - cosine) / 2).view(4, 4, 4) if side is None else spread((1 - cosine) / 2, (4, 4), side))
    term = sum(by_hand) / 3
    assert (
        far(few.layers["reference"], term) < SAME
        and far(few.map, (zero.map + to_pixels(term, SIZE)) / 2) < SAME
        and far(few.score, (zero.score + term.flatten(1).amax(1)) / 2) < SAME
    )
    assert far(model.set_references(good.flip(0)).predict(batch).map, few.map) < SAME, "references have no order"
    assert model.set_references(batch_of(good)[[1]]).p.shots == 1 and far(model.predict(batch).map, few.map) > 1e-4
    assert (model.predict(batch).layers["reference"] >= term - SAME).all(), "fewer references are never nearer"
    assert model.predict(batch_of(good[1:2])).layers["reference"].max() < SAME, (
        "a reference is at distance zero from itself"
    )
    ended = model.set_references(good[:0])
    assert ended.p.shots == 0 and torch.equal(ended.predict(batch).map, zero.map) and ended.references() == {}
    alone = small("winclip", scales=()).set_references(good).predict(batch)
    assert far(alone.layers["reference"], by_hand[0]) < SAME
    assert association(F.normalize(torch.randn(2, 5, 8), dim=-1), F.normalize(torch.randn(3, 8), dim=-1)).min() >= 0


def test_references_that_are_refused(batch, tmp_path):
    model = small("winclip")
    with pytest.raises(ValueError, match=r"must be normal, 0.png, 2.png are labelled anomalous"):
        model.set_references(batch)
    with pytest.raises(ValueError, match=r"several classes \(metal_nut, pcb1\)"):
        model.set_references(batch[[1, 3]])
    for shape in ((3, SIZE, SIZE), (2, 1, SIZE, SIZE)):
        with pytest.raises(ValueError, match=r"give \(k, 3, H, W\)"):
            model.set_references(torch.rand(shape))
    assert model.p.shots == 0
    with pytest.raises(ValueError, match=r"shots=2, but no reference image was set; call set_references"):
        small("winclip", shots=2).predict(batch)
    few = save(few_shot(), tmp_path / "few.safetensors")
    with pytest.raises(WeightsError, match=r"reference_patches is \(32, 192\), expected \(50, 192\)"):
        load(few, image_size=80)


# ------------------------------------------------------------------------------------------------------------- AnomalyCLIP, by hand


@torch.no_grad()
def test_anomalyclip_by_hand(batch):
    model = shaken("anomalyclip", layers="quarters", sigma=0.0)
    features = model.encode(batch)
    text = F.normalize(model.prompts(), dim=-1)
    assert list(features) == ["cls", "tap_2", "tap_3", "tap_4", "tap_5"]
    maps = [
        F.interpolate(
            (features[f"tap_{t}"] @ text.T / 0.07).softmax(-1).transpose(1, 2).unflatten(2, (4, 4)),
            (SIZE, SIZE),
            mode="bilinear",
            align_corners=False,
        )
        for t in (2, 3, 4, 5)
    ]
    fused = sum((m[:, 1] + 1 - m[:, 0]) / 2 for m in maps)
    prediction = model.predict(batch)
    assert (
        far(prediction.map, fused) < SAME
        and far(prediction.score, (features["cls"] @ text.T / 0.07).softmax(-1)[:, 1]) < SAME
    )
    assert far(shaken("anomalyclip", layers="quarters").predict(batch).map, to_pixels(fused, SIZE, 4.0)) < SAME
    losses = model.train().loss(model(features, batch), batch)
    g = batch.mask[:, 0]
    assert (
        abs(losses["dice_normal"] - sum(dice(m[:, 0], ~g) for m in maps)) < 1e-5
        and abs(losses["focal"] - sum(focal(m[:, 1], g) for m in maps)) < 1e-5
    )
    assert abs(losses["total"] - losses["ce"] - 4 * (losses["focal"] + losses["dice"] + losses["dice_normal"])) < 1e-4
    assert far(shaken("anomalyclip", layers="quarters").train()(features, batch).map, fused) < SAME, (
        "no Gaussian while training"
    )


@pytest.mark.slow
def test_anomalyclip_options_act(batch):
    base = shaken("anomalyclip")
    reference = base.predict(batch)
    features = base.encode(batch)
    for changes in (
        dict(layers="quarters"),
        dict(taps=(4,)),
        dict(dual_blocks=2),
        dict(dual_blocks=0),
        dict(attention="qkv"),
        dict(normal_words="thing."),
        dict(abnormal_words="broken object."),
        dict(cls_norm=True),
        dict(tau=0.1),
        dict(sigma=1.0),
        dict(release_compat=True),
    ):
        found = shaken("anomalyclip", **changes).predict(batch)
        assert max(far(found.map, reference.map), far(found.score, reference.score)) > 1e-7, changes
    total = base.train().loss(base(features, batch), batch)["total"].item()
    other = shaken("anomalyclip", weight_local=1.0).train()
    assert abs(other.loss(other(features, batch), batch)["total"].item() - total) > 0.1
    assert (
        shaken("anomalyclip", release_compat=True).prompts.deep_half
        and not shaken("anomalyclip", release_compat=True, deep_half=False).prompts.deep_half
    )


# ------------------------------------------------------------------------------------------------------------ Crane and Crane+, by hand


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["crane", "crane_plus"])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("context", [True, False])
def test_crane_by_hand(batch, name, soft, context):
    "From features to map, score and losses, without the method's shortcuts for two classes."
    model = shaken(name, sigma=0.0, soft_mean=soft, context_test=context)
    features = model.encode(batch)
    text = F.normalize(model.prompts(features["cls"]) if context else model.prompts().expand(4, -1, -1), dim=-1)
    local = [features[f] for f in model.local.values()]
    assert [n.split("_")[0] for n in model.local] == (["e"] * 4 if name == "crane" else ["d", "e"])
    logits = [torch.einsum("bnc,bkc->bnk", f, text) / 0.07 for f in local]

    def up(v):
        return F.interpolate(v.transpose(1, 2).unflatten(2, (4, 4)), (SIZE, SIZE), mode="bilinear", align_corners=False)

    by_hand = (
        sum(up(v.softmax(-1)) for v in logits) / len(local)
        if soft
        else (sum(up(v) for v in logits) / len(local)).softmax(1)
    )[:, 1]
    weights = (sum(logits) / len(local)).softmax(-1)[..., 1]
    pooled = F.normalize(torch.einsum("bn,bnc->bc", weights, sum(local) / len(local)), dim=-1)
    phi = F.normalize(0.5 * pooled + 0.5 * features["cls"], dim=-1)
    prediction = model.predict(batch)
    assert (
        far(prediction.map, by_hand) < SAME
        and far(prediction.score, (torch.einsum("bc,bkc->bk", phi, text) / 0.07).softmax(-1)[:, 1]) < SAME
    )
    assert (
        far(shaken(name, soft_mean=soft, context_test=context).predict(batch).map, to_pixels(by_hand, SIZE, 4.0)) < SAME
    ), "the Gaussian comes last"
    model = shaken(name, soft_mean=soft, context_train=float(context)).train()
    losses = model.loss(trained := model(features, batch), batch)
    g = batch.mask[:, 0]
    assert far(trained.map, by_hand) < SAME, "no Gaussian while training"
    near = [
        F.interpolate(v.softmax(-1).transpose(1, 2).unflatten(2, (4, 4)), (SIZE, SIZE), mode="nearest")[:, 1]
        for v in logits
    ]
    assert (
        abs(losses["focal"] - sum(focal(m, g) for m in near)) < 1e-5
        and abs(losses["dice"] - sum(dice(m, g) for m in near)) < 1e-5
    )
    assert (
        abs(losses["ce"] - F.cross_entropy(torch.einsum("bc,bkc->bk", phi, text) / 0.01, batch.anomalous.long())) < 1e-3
    )
    assert abs(losses["total"] - 2 * losses["focal"] - 2 * losses["dice"] - 0.2 * losses["ce"]) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_d_attention_by_hand(batch):
    "One image, one patch at a time; the threshold, and the patch that always sees itself."
    model = shaken("crane_plus", value_from="input", centre=False)
    clip, last = model.clip, model.clip.depth
    dino = model.dino(batch.image, norm=True).patches[0]
    stream, _ = clip.embed(batch.image)
    for block in list(clip._blocks(clip.tower))[:-1]:
        stream = block(stream)
    block = clip._blocks(clip.tower)[last - 1]
    value = F.linear(block.ln_1(stream), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)[2][:, 1:]
    for b in range(2):
        cosine = F.cosine_similarity(dino[b][:, None], dino[b][None], dim=-1)
        for i in range(16):
            kept = [j for j in range(16) if cosine[i, j] >= 1.2 * cosine.mean() or i == j]
            weight = torch.exp(3 * cosine[i, kept])
            mixed = block.attn.out_proj((weight / weight.sum()) @ value[b, kept])
            assert (
                far(model.encode(batch)["d_attn"][b, i], F.normalize(clip.norm(mixed) @ clip.tower.proj, dim=-1)) < SAME
            )


@pytest.mark.slow
def test_crane_options_act(batch):
    for name in ("crane", "crane_plus"):
        base = shaken(name)
        reference = base.predict(batch)
        features = base.encode(batch)
        options = [
            dict(dual_blocks=3, taps=(5,)),
            dict(dual_blocks=0),
            dict(attention="vv"),
            dict(normal_words="thing."),
            dict(abnormal_words="broken object."),
            dict(context_test=True),
            dict(cls_weight=0.2),
            dict(tau=0.1),
            dict(sigma=1.0),
            dict(release_compat=True),
        ]
        options += (
            [dict(taps=(2, 5)), dict(soft_mean=False), dict(aliased=True)]
            if name == "crane"
            else [
                dict(taps=(4, 5)),
                dict(soft_mean=True),
                dict(value_from="input"),
                dict(scale=6.0),
                dict(shift=-5.0),
                dict(centre=False),
                dict(batch_mean=True),
                dict(dino_size=96),
            ]
        )
        for changes in options:
            found = shaken(name, **changes).predict(batch)
            assert max(far(found.map, reference.map), far(found.score, reference.score)) > 1e-6, (name, changes)
        total = base.train().loss(base(features, batch), batch)["total"].item()
        for changes in (
            dict(context_train=0.0),
            dict(tau_train=0.07),
            dict(upsampling="bilinear"),
            dict(weight_focal=1.0),
            dict(weight_dice=1.0),
            dict(weight_ce=1.0),
        ):
            other = shaken(name, **changes).train()
            assert abs(other.loss(other(features, batch), batch)["total"].item() - total) > 1e-5, (name, changes)


def test_context_in_training(batch):
    "Probability 1: every step has the image in its prompts; 0: none; between: about that share. Evaluation is static whatever training does."
    features = small("crane").encode(batch)
    for probability, expected in ((1.0, (40, 40)), (0.0, (0, 0)), (0.5, (8, 32))):
        model = shaken("crane", context_train=probability).train()
        seed_everything(0)
        with torch.no_grad():
            drawn = sum(len(model.text_features(features["cls"])) == 4 for _ in range(40))
        assert expected[0] <= drawn <= expected[1], (probability, drawn)
        assert len(model.eval().text_features(features["cls"])) == 1
    seeds = []
    for _ in range(2):
        model = shaken("crane", context_train=0.5).train()
        seed_everything(3)
        with torch.no_grad():
            seeds.append([len(model.text_features(features["cls"])) for _ in range(10)])
    assert seeds[0] == seeds[1]


def test_aliased_layers(batch):
    "Four copies of the last layer: the map and score of that layer alone, and its loss four times."
    aliased = shaken("crane", aliased=True)
    last = shaken("crane", taps=(5,))
    assert set(aliased.encode(batch)) == set(last.encode(batch)) == {"cls", "e_attn_5"} and len(aliased.local) == 4
    assert (
        far(aliased.predict(batch).map, last.predict(batch).map) < SAME
        and far(aliased.predict(batch).score, last.predict(batch).score) < SAME
    )
    a, b = (m.train().loss(m(m.encode(batch), batch), batch) for m in (aliased, last))
    assert (
        abs(a["focal"] - 4 * b["focal"]) < 1e-4
        and abs(a["dice"] - 4 * b["dice"]) < 1e-4
        and abs(a["ce"] - b["ce"]) < 1e-4
    )


def test_release_compat_is_the_sum_of_its_parts(batch):
    for name, parts in (
        ("crane", dict(deep_half=True, aliased=True)),
        ("crane_plus", dict(deep_half=True, aliased=True, batch_mean=True)),
    ):
        assert torch.equal(
            shaken(name, release_compat=True).predict(batch).map, shaken(name, **parts).predict(batch).map
        )
        assert torch.equal(
            shaken(name, release_compat=True, **dict.fromkeys(parts, False)).predict(batch).map,
            shaken(name).predict(batch).map,
        )


# --------------------------------------------------------------------------------------------------------------- the authors' prompts


def released(model) -> dict:
    p = model.prompts
    generator = torch.Generator().manual_seed(2)
    words = p.text.embed(p.ids)
    state = {f"compound_prompts_text.{i}": torch.randn(s.shape, generator=generator) for i, s in enumerate(p.deep)}
    for row, s in enumerate(("pos", "neg")):
        state |= {
            f"ctx_{s}": torch.randn(1, 1, *p.context.shape[1:], generator=generator),
            f"token_prefix_{s}": words[None, row : row + 1, :1].clone(),
            f"token_suffix_{s}": words[None, row : row + 1, 1 + p.count :].clone(),
            f"tokenized_prompts_{s}": p.ids[None, row : row + 1].int(),
        }
    return state


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_import(name, suffix, tmp_path, batch):
    model = small(name)
    path = tmp_path / f"epoch{suffix}"
    state = released(model)
    before = model.predict(batch)
    torch.save(dict(prompt_learner=state), path) if suffix == ".pth" else save_file(state, path)
    assert import_released(model, path, trained_on=["mvtec/wood", "mvtec/bottle"]) is model and model.trained_on == [
        "mvtec/bottle",
        "mvtec/wood",
    ]
    assert torch.equal(model.prompts.context[1].data, state["ctx_neg"][0, 0]) and torch.equal(
        model.prompts.deep[1].data, state["compound_prompts_text.1"]
    )
    assert far(model.predict(batch).map, before.map) > 1e-4, "what was kept of the old prompts must be gone"


def without(key):
    return lambda s: s.pop(key)


def put(**values):
    return lambda s: s.update({k.replace("__", "."): v for k, v in values.items()})


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize(
    "change, words",
    [
        (without("ctx_pos"), "missing ctx_pos"),
        (without("compound_prompts_text.1"), "missing compound_prompts_text.1"),
        (put(compound_prompts_text__2=torch.ones(4, 128)), "unexpected compound_prompts_text.2"),
        (put(ctx_neg=torch.ones(1, 1, 12, 768)), "ctx_neg is (1, 1, 12, 768), expected (1, 1, 12, 128)"),
        (
            put(token_prefix_neg=torch.ones(1, 1, 1, 128)),
            "token_prefix_neg: the checkpoint was trained with another text tower",
        ),
        (
            put(tokenized_prompts_pos=torch.ones(1, 1, 40).int()),
            "tokenized_prompts_pos: the checkpoint's prompt ends in other words",
        ),
        (put(visual=torch.ones(2)), "unexpected visual"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_checkpoint_says_which_key(name, change, words, tmp_path):
    model = small(name)
    path = tmp_path / "epoch.pth"
    state = released(model)
    before = {k: v.clone() for k, v in model.learned().items()}
    change(state)
    torch.save(dict(prompt_learner=state), path)
    with pytest.raises(WeightsError) as caught:
        import_released(model, path)
    assert words in str(caught.value) and str(caught.value).startswith(f"epoch.pth does not fit {name}: ")
    assert all(torch.equal(v, before[k]) for k, v in model.learned().items()), "refused as a whole"


def test_files_that_are_none(tmp_path):
    with pytest.raises(WeightsError, match="no weights file"):
        import_released(small("crane"), tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(WeightsError, match="text.pth cannot be read"):
        import_released(small("crane"), tmp_path / "text.pth")
    path = save(shaken("anomalyclip"), tmp_path / "ours.safetensors")
    with pytest.raises(WeightsError, match="ours.safetensors does not fit crane: .*missing ctx_pos"):
        import_released(small("crane"), path)
    with pytest.raises(WeightsError, match="ours.safetensors does not fit anomalyclip: missing prompts.deep"):
        bare = save(shaken("anomalyclip", deep_tokens=0), path)
        header = read_header(bare)
        header["parameters"]["deep_tokens"] = 4
        save_file(read_state(bare), path, {"zsad_nb": json.dumps(header)})
        load(path)


# ---------------------------------------------------------------------------------------------------- the four checkpoints of Crane

REAL = {
    "trained_on_mvtec_default_epoch_5.pth": "crane_plus",
    "trained_on_visa_default_epoch_5.pth": "crane_plus",
    "trained_on_mvtec_woDattn_epoch_5.pth": "crane",
    "trained_on_visa_woDattn_epoch_5.pth": "crane",
}
SHAPES = {
    f"{k}_{s}": shape
    for s in ("pos", "neg")
    for k, shape in (
        ("ctx", (1, 1, 12, 768)),
        ("token_prefix", (1, 1, 1, 768)),
        ("token_suffix", (1, 1, 64, 768)),
        ("tokenized_prompts", (1, 1, 77)),
    )
} | {f"compound_prompts_text.{i}": (4, 768) for i in range(8)}


@pytest.fixture(scope="module")
def real(shared) -> dict:
    "File name -> the released prompt learner."
    missing = [f for f in REAL if not (shared / "checkpoints" / "crane" / f).is_file()]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} in {shared / 'checkpoints' / 'crane'}; the released checkpoints of Crane are not"
            " there"
        )
    return {f: read_state(shared / "checkpoints" / "crane" / f)["prompt_learner"] for f in REAL}


@pytest.fixture(scope="module")
def real_tower(real, tmp_path_factory) -> str:
    "A CLIP with the words of the checkpoints' own text tower, as wide, high enough for 8 deep sets, and random otherwise."
    import_vision_libraries()
    from open_clip.transformer import TextTransformer, VisionTransformer

    state = next(iter(real.values()))
    ids = torch.tensor(
        sorted({*state["tokenized_prompts_neg"].flatten().tolist(), *state["tokenized_prompts_pos"].flatten().tolist()})
        + [UNKNOWN]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = TextTransformer(
            context_length=77, vocab_size=len(ids), width=768, heads=12, layers=9, mlp_ratio=0.25, output_dim=768
        )
        vision = VisionTransformer(
            image_size=32, patch_size=16, width=64, layers=3, heads=1, mlp_ratio=2.0, output_dim=768
        )
    for s in ("pos", "neg"):
        tokens = state[f"tokenized_prompts_{s}"][0, 0].tolist()
        words = torch.cat([state[f"token_prefix_{s}"], torch.zeros(1, 1, 12, 768), state[f"token_suffix_{s}"]], 2)[0, 0]
        for i, (t, w) in enumerate(zip(tokens, words)):
            if not 1 <= i <= 12:
                text.token_embedding.weight.data[ids.tolist().index(t)] = (
                    w  # every word but the places of the learned ones
                )
    path = tmp_path_factory.mktemp("real") / "clip.safetensors"
    save_file(
        {
            **{k: v.contiguous() for k, v in text.state_dict().items()},
            **{f"visual.{k}": v.contiguous() for k, v in vision.state_dict().items()},
            "token_ids": ids,
        },
        path,
    )
    return str(path)


@pytest.mark.real
def test_real_checkpoints_hold_the_same_words(real):
    "Shapes, counts, and the frozen token embeddings: equal in all files, equal for equal words."
    first = next(iter(real.values()))
    for name, state in real.items():
        assert {k: tuple(v.shape) for k, v in state.items()} == SHAPES, name
        assert sum(v.numel() for k, v in state.items() if k.startswith(("ctx", "compound"))) == 43_008, name
        assert all(v.isfinite().all() for v in state.values()) and all(
            torch.equal(state[k], first[k]) for k in state if k.startswith("token")
        ), name
        ids = state["tokenized_prompts_neg"][0, 0].tolist()
        assert (ids[0], ids[16], ids[17:]) == (START, END, [0] * 60) and len(set(ids[1:13])) == 1
        assert torch.equal(state["token_prefix_pos"], state["token_prefix_neg"]) and torch.equal(
            state["token_suffix_pos"][0, 0, -1], state["token_suffix_neg"][0, 0, -1]
        ), "start and padding are the same words"
        assert torch.equal(state["token_suffix_pos"][0, 0, :3], state["token_suffix_neg"][0, 0, 1:4]), (
            '"object . end" stands behind "damaged"'
        )
    learned = [
        torch.cat([v.flatten() for k, v in s.items() if k.startswith(("ctx", "compound"))]) for s in real.values()
    ]
    assert all(far(a, b) > 0.01 for i, a in enumerate(learned) for b in learned[:i]), "four trainings"
    assert all(0.02 < v.std() < 0.06 for v in learned), "away from N(0, 0.02), not far"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("file", REAL)
def test_real_checkpoints_load(real, real_tower, shared, file, batch, tmp_path):
    "Into the method they belong to; the words agree with the tower's, and what was loaded predicts, saves and loads."
    name = REAL[file]
    model = create(name, clip="clip", clip_weights=real_tower, image_size=SIZE, taps=(3,)).eval()
    assert (model.prompts.deep.shape, sum(q.numel() for q in model.learned().values())) == ((8, 4, 768), 43_008)
    import_released(model, shared / "checkpoints" / "crane" / file, trained_on=["mvtec/bottle"])
    state = real[file]
    assert torch.equal(model.prompts.context.data, torch.cat([state["ctx_pos"][0], state["ctx_neg"][0]])) and all(
        torch.equal(d, state[f"compound_prompts_text.{i}"]) for i, d in enumerate(model.prompts.deep.data)
    )
    rows, end = model.prompts.embeddings()
    assert (
        end.tolist() == [15, 16]
        and far(rows[:, 13:], torch.cat([state["token_suffix_pos"], state["token_suffix_neg"]])[:, 0]) == 0
    )
    prediction = model.predict(batch)
    assert prediction.map.isfinite().all() and prediction.score.isfinite().all()
    assert torch.equal(load(save(model, tmp_path / "ours.safetensors")).eval().predict(batch).map, prediction.map)
    stranger = read_state(real_tower)
    stranger["token_embedding.weight"] = stranger["token_embedding.weight"] + 0.01
    save_file(stranger, tmp_path / "clip.safetensors")
    other = create(name, clip="clip", clip_weights=str(tmp_path / "clip.safetensors"), image_size=SIZE, taps=(3,))
    with pytest.raises(WeightsError, match=f"{file} does not fit {name}: token_prefix_pos: .*another text tower"):
        import_released(other, shared / "checkpoints" / "crane" / file)


# --------------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, changes, message",
    [
        *[(n, dict(tau=0.0), "tau=0.0; it must be above 0") for n in ALL],
        *[(n, dict(clip="tiny-dino"), "shared with text|no text tower") for n in ALL],
        *[(n, dict(image_size=70), "not a multiple") for n in ALL],
        *[(n, dict(sigma=-1.0), "sigma=-1.0; it must be 0 or more") for n in LEARNING],
        *[(n, dict(prompt_count=0), "prompt_count=0; it must be at least 1") for n in LEARNING],
        *[(n, dict(dual_blocks=6), "tiny-clip has 5 blocks") for n in LEARNING],
        *[(n, dict(dual_blocks=-1), "dual_blocks=-1; it must be 0 or more") for n in LEARNING],
        *[(n, dict(attention="qk"), "attention='qk'; use") for n in LEARNING],
        *[(n, dict(prompt_count=60), "shorten") for n in LEARNING],
        *[(n, dict(taps=(0, 5)), "outside 1..5") for n in LEARNING],
        ("winclip", dict(templates="mine"), "templates='mine'; use paper or anomalib"),
        ("winclip", dict(averaged="both"), "use abnormal or normal"),
        ("winclip", dict(score="max"), "use cls or map"),
        ("winclip", dict(scales=(), image_in_map=False), "nothing is left"),
        ("winclip", dict(scales=(2, 2)), "occurs twice"),
        ("winclip", dict(shots=-1), "shots=-1"),
        ("winclip", dict(at_once=0), "at least 1"),
        ("winclip", dict(image_size=32), "windows of 3 x 3 patches in an image of 2 x 2"),
        ("anomalyclip", dict(layers="all"), "layers='all'; use last or quarters"),
        ("crane", dict(taps=(1, 5)), r"\[1\] lie before the refined path, which runs through blocks 2 to 5"),
        ("crane", dict(upsampling="cubic"), "use nearest or bilinear"),
        ("crane", dict(cls_weight=1.5), "from 0 to 1"),
        ("crane", dict(context_train=-0.1), "context_train=-0.1; it must be from 0 to 1"),
        ("crane", dict(tau_train=0.0), "tau_train=0.0"),
        ("crane_plus", dict(value_from="output"), "use input or attended"),
        ("crane_plus", dict(dino_size=70), "not a multiple"),
    ],
)
def test_wrong_parameters(name, changes, message):
    with pytest.raises(ValueError, match=message):
        small(name, **changes)


def test_words_and_images_of_different_widths(tmp_path):
    "Without a common width an image cannot be a word; the rest of Crane works."
    text = create_text("tiny-clip", "random:0")
    image = create_backbone("tiny-clip", "random:0")
    state = {**text.tower.state_dict(), **{f"visual.{k}": v for k, v in image.tower.state_dict().items()}}
    state |= {"text_projection": state["text_projection"][:, :64], "visual.proj": state["visual.proj"][:, :64]}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "narrow.safetensors")
    options = dict(clip="clip", clip_weights=str(tmp_path / "narrow.safetensors"))
    for changes in ({}, dict(context_train=0.0, context_test=True)):
        with pytest.raises(ValueError, match="its embedding is 64 wide and a word of clip 128"):
            small("crane", **options, **changes)
    assert small("crane", **options, context_train=0.0).predict(batch_of(images(2))).map.isfinite().all()


def test_lists_from_json(batch):
    "Parameters that went through JSON are the same parameters."
    for name, changes in (
        ("winclip", dict(scales=[2, 3])),
        ("anomalyclip", dict(taps=[3, 5])),
        ("crane", dict(taps=[3, 5])),
        ("crane_plus", dict(taps=[4, 5])),
    ):
        model = small(name, **changes)
        assert small(name, **json.loads(json.dumps(dataclasses.asdict(model.p)))).p == model.p
        assert isinstance(METHODS[name](METHODS[name].Parameters(clip_weights="random:0", **changes)), nn.Module)
