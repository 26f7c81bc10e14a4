"DAPO and MultiADS: the text encoder's modes, deep tokens, types that come and go, gradients, independence of batch mates, checkpoints, errors, a training run."

import warnings

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.text import create_text
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.backbones.weights import WeightsError
from zsad_nb.components.dapo_prompts import HybridPrompts, enlarge, focal_types, prototypes, true_and_normal
from zsad_nb.components.deep_tokens import deep_blocks, image_tokens, read_deep, see_deep, word_like
from zsad_nb.components.losses import dice
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch, batches
from zsad_nb.data.index import GOOD, make_index
from zsad_nb.data.taxonomy import type_words
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods import dapo, multiads  # noqa: F401 (registered by their import)
from zsad_nb.methods.base import Prediction, create, describe, load, save
from zsad_nb.methods.dapo import import_released, released_names, segment
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import fit, recipe_of

SIZE, TYPES = 64, ("scratch", "dent", "foreign particles")
SMALL = dict(clip_weights="random:0", image_size=SIZE)
SAME = 2e-5  # rounding of a batch of another size


def small(name="dapo", **changes):
    seed_everything(0)
    few = dict(prompts=2) if name == "dapo" else dict(templates=("a photo of a {}",))
    return create(name, **{**SMALL, **few, "types": TYPES, **changes}).eval()


def batch_of(image: torch.Tensor) -> Batch:
    n = len(image)
    mask = torch.zeros(len(image), 1, *image.shape[-2:], dtype=torch.bool)
    mask[::2, :, 8:24, 16:40] = True
    bad = mask.flatten(1).any(1)
    return Batch(
        image,
        mask,
        bad,
        torch.where(bad, torch.arange(n) // 2 % 3, 3),
        ["c"] * n,
        [f"{i}.png" for i in range(n)],
        torch.ones(n, dtype=torch.bool),
    )


def numbered() -> pd.DataFrame:
    "An Index whose defects are numbered as in `batch_of`."
    rows = [
        dict(dataset="own", category="c", split="test", image=f"{i}.png", anomalous=d != GOOD, defect=d)
        for i, d in enumerate(("dent", "foreign particles", "good", "scratch"))
    ]
    return make_index(rows, "root")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def text():
    return create_text("tiny-clip", "random:0")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return (
        synthetic_index(folder / "auxiliary", "auxiliary", SIZE, normal=1, defective=2),
        synthetic_index(folder / "target", "target", SIZE, normal=1, defective=2),
    )


# ------------------------------------------------------------------------------------------------------------- the text encoder's modes


def alike(text, a: str, b: str, tokens: bool = True, depth=None, **mode) -> torch.Tensor:
    "Cosines of two types under eight contexts of their own."
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        prompts = HybridPrompts(text, prompts=1, text_tokens=4 if tokens else 0, text_depth=depth, **mode)
        z, _ = prototypes(prompts.features([a, b]))
        found.append(z[1] @ z[2])
    return torch.stack(found)


def test_the_repaired_encoder_tells_types_apart(text):
    assert (alike(text, "scratch", "hole") < 0.99).all()


def test_mask_and_old_place_cannot_tell_short_words_apart(text):
    "With the mask, the place that the release reads stands before the defect's word (quirk Q1): one vector for all words of one token."
    assert (alike(text, "scratch", "hole", causal=True, true_end=False) > 1 - 1e-6).all()
    assert (
        alike(text, "foreign particles", "deformed spot", causal=True, true_end=False) < 0.99
    ).all()  # two tokens: the first of them is read


def test_the_release_sees_the_word_without_the_mask(text):
    found = alike(text, "scratch", "hole", causal=False, true_end=False)
    assert (found < 1 - 1e-4).all() and found.mean() > alike(text, "scratch", "hole").mean()  # it does, but faintly


@pytest.mark.parametrize("mode", [dict(tokens=False), dict(depth=2), dict(depth=0)])
def test_without_tokens_at_the_end_there_is_one_place(text, mode):
    "Deep tokens in fewer blocks than the tower has leave it before the end: both places are the same."
    assert torch.equal(
        alike(text, "scratch", "hole", true_end=True, **mode), alike(text, "scratch", "hole", true_end=False, **mode)
    )


def test_release_compat_is_both_quirks():
    for changes, expected in (
        (dict(), (True, True)),
        (dict(release_compat=True), (False, False)),
        (dict(release_compat=True, causal=True), (True, False)),
        (dict(true_end=False), (True, False)),
    ):
        prompts = small(**changes).prompts
        assert (prompts.p.causal, prompts.p.true_end) == expected


def test_padding_matters_only_without_the_mask(text):
    ids = text.tokenize(["X X scratch anomaly object"])
    rows = text.embed(ids)
    end = ids.argmax(1)
    tokens = word_like(text, 3, 4).detach()
    other = rows.clone()
    other[:, int(end) + 1 :] += torch.randn_like(other[:, int(end) + 1 :])
    with torch.no_grad():
        assert torch.equal(read_deep(text, rows, end, tokens), read_deep(text, other, end, tokens))
        assert (
            read_deep(text, rows, end, tokens, causal=False) - read_deep(text, other, end, tokens, causal=False)
        ).abs().max() > 1e-3


def test_words_keep_their_positions(text):
    "Positions are added before the tokens come in: moving the tokens' place leaves the words' positions alone."
    ids = text.tokenize(["X scratch object"])
    rows = text.embed(ids)
    end = ids.argmax(1)
    seen = []
    hook = text.tower.transformer.resblocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        read_deep(text, rows, end)
        read_deep(text, rows, end, torch.zeros(3, 4, text.width))
    hook.remove()
    plain, deep = seen
    assert torch.equal(torch.cat([deep[:, :1], deep[:, 5:]], 1), plain) and deep[:, 1:5].abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------------------- deep tokens


def test_alpha_0_is_a_set_of_its_own_for_every_block(text):
    "Against a loop written out: each block's tokens are replaced."
    ids = text.tokenize(["X X scratch object"])
    rows = text.embed(ids)
    end = ids.argmax(1)
    tokens = torch.randn(text.depth, 4, text.width)
    t = text.tower
    length = int(end) + 1
    x = rows[:, :length] + t.positional_embedding[:length]
    x = torch.cat([x[:, :1], tokens[:1], x[:, 1:]], 1)
    mask = torch.full((length + 4, length + 4), float("-inf")).triu_(1)
    with torch.no_grad():
        for i, block in enumerate(t.transformer.resblocks):
            x = block(torch.cat([x[:, :1], tokens[i : i + 1], x[:, 5:]], 1), attn_mask=mask)
        assert torch.allclose(
            read_deep(text, rows, end, tokens, alpha=0.0), t.ln_final(x[:, -1]) @ t.text_projection, atol=1e-6
        )


@pytest.mark.parametrize("alpha,used", [(1.0, 1), (0.01, 5), (0.0, 5)])
def test_which_sets_are_used(alpha, used):
    "alpha = 1: the first set alone travels through all blocks, whatever the others hold."
    b = create_backbone("tiny-clip", "random:0", SIZE)
    image = torch.rand(1, 3, SIZE, SIZE)
    tokens = image_tokens(b.depth, 4, b.width, b.patch).detach() * 10
    with torch.no_grad():
        base = see_deep(b, image, tokens, alpha).cls
        changed = []
        for i in range(b.depth):
            other = tokens.clone()
            other[i] += 1
            changed.append((see_deep(b, image, other, alpha).cls - base).abs().max().item() > 0)
    assert sum(changed) == used and changed[0]


def test_alpha_1_is_a_shallow_prompt():
    b = create_backbone("tiny-clip", "random:0", SIZE)
    image = torch.rand(2, 3, SIZE, SIZE)
    tokens = torch.randn(b.depth, 4, b.width)
    with torch.no_grad():
        x, grid = b.embed(image)
        kept, last = b.run(torch.cat([x[:, :1], tokens[:1].expand(2, -1, -1), x[:, 1:]], 1), grid, b.taps)
        seen = see_deep(b, image, tokens, alpha=1.0)
    for mine, other in zip(seen.patches, kept):
        assert torch.allclose(mine, other[:, 5:], atol=SAME)
    assert torch.allclose(seen.cls, b.norm(last[:, 0]), atol=SAME)


def test_tokens_leave_and_too_many_sets_raise():
    blocks = [torch.nn.Identity()] * 3
    assert [(x.shape[1], held) for _, x, held in deep_blocks(torch.zeros(1, 4, 2), blocks, torch.zeros(2, 5, 2))] == [
        (9, 5),
        (9, 5),
        (4, 0),
    ]
    with pytest.raises(ValueError, match="4 sets of deep tokens for 3 blocks"):
        list(deep_blocks(torch.zeros(1, 4, 2), blocks, torch.zeros(4, 5, 2)))


@pytest.mark.parametrize(
    "changes,gone",
    [
        (dict(text_tokens=0), "prompts.deep"),
        (dict(image_tokens=0), "image_tokens"),
        (dict(text_depth=0), "prompts.deep"),
        (dict(image_depth=0), "image_tokens"),
    ],
)
def test_without_deep_tokens(changes, gone, batch):
    model = small(**changes)
    assert gone not in model.learned() and model.predict(batch).map.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------- types come and go


def test_adding_a_type_leaves_the_others_similarities_alone(batch):
    model = small()
    few = model.predict(batch).layers
    more = model.set_types([*TYPES, "stain"]).predict(batch).layers
    for name in (*(f"tap_{t}" for t in model.clip.taps), "image_types"):
        assert torch.allclose(more[name][:, :4], few[name], atol=1e-4), name  # over tau: rounding times 14
        assert (more[name].softmax(1)[:, :4] - few[name].softmax(1)).abs().max() > 1e-3
    assert (
        torch.allclose(more["image"][:, 0], few["image"][:, 0], atol=1e-4)
        and (more["image"][:, 1] - few["image"][:, 1]).abs().max() > 1e-4
    )  # z_A is their mean


def test_order_of_types_is_the_order_of_maps(batch):
    model = small()
    a = model.predict(batch)
    b = model.set_types(TYPES[::-1]).predict(batch)
    assert (
        torch.allclose(a.type_map, b.type_map.flip(1), atol=1e-4)
        and torch.allclose(a.type_score, b.type_score.flip(1), atol=SAME)
        and torch.allclose(a.map, b.map, atol=1e-4)
    )


def test_filtered_is_a_method_with_these_types_only(batch):
    model = small()
    said = model.predict(batch)
    with torch.inference_mode():
        maps = model.type_maps(said.layers, (SIZE, SIZE), [1, 3])
        scores = model.type_scores(said.layers, maps, [1, 3])
    own = model.set_types([TYPES[0], TYPES[2]]).predict(batch)
    assert torch.allclose(maps[:, 1:], own.type_map, atol=1e-4) and torch.allclose(scores, own.type_score, atol=1e-4)


@pytest.mark.parametrize("name", ["dapo", "multiads"])
def test_one_type_only(name, batch):
    model = small(name, types=["scratch"]).prepare(
        numbered().assign(defect=["Scratch", "_scratch", "good", "scratch"]), training=True
    )  # one type, three spellings
    said = model.predict(batch)
    assert (
        said.type_map.shape == (4, 1, SIZE, SIZE)
        and torch.allclose(said.type_map[:, 0], said.map)
        and set(segment(said).unique().tolist()) <= {0, 1}
    )
    if name == "dapo":
        assert torch.allclose(said.layers["image"], said.layers["image_types"], atol=SAME)  # abnormal is the only type
    losses = model.train().loss(model(model.encode(batch), batch), batch)
    losses["total"].backward()
    assert losses["total"].isfinite()


def test_words_of_several_tokens(batch):
    long = ["misaligned faulty imprint", "scratch"]
    with pytest.warns(UserWarning, match="never read"):
        model = small(types=long)
    ids = model.text.tokenize(model.prompts.sentences(model.p.words))
    assert ids.argmax(1).tolist() == [8, 12, 9]
    assert model.predict(batch).type_map.isfinite().all()
    with pytest.raises(ValueError, match="shorten it"):
        small(types=["scratch " * 40]).predict(batch)


@pytest.mark.parametrize(
    "types,why",
    [
        ([], "no types"),
        ([""], "is no word"),
        (["dent", "DENT "], "occurs twice"),
        (["good"], "no defect"),
        ("mvtech", "no data set 'mvtech'"),
    ],
)
def test_impossible_types(types, why):
    with pytest.raises(ValueError, match=why):
        small(types=types)
    with pytest.raises(ValueError, match=why):
        small().set_types(types)


def test_equal_words_and_lost_words():
    with pytest.raises(ValueError, match="among the words"):
        small(types=["a", "b"], words=["dent", "Dent"])
    with pytest.raises(ValueError, match="1 words for 2 types"):
        small(types=["a", "b"], words=["dent"])
    with pytest.raises(ValueError, match="words belong to types"):
        small(types=None, words=["dent"])


@pytest.mark.parametrize("name", ["dapo", "multiads"])
def test_words_the_tower_never_read(name):
    with pytest.warns(UserWarning, match="never read 'rust'"):
        small(name, types=["scratch", "dent", "rust"])
    with pytest.warns(UserWarning, match="never read 'rust', 'flattening'.*'rust', 'flattening' cannot be told"):
        small(name, types=["rust", "scratch", "flattening"])
    with pytest.raises(ValueError, match="never read 'rust'.*use words it knows"):
        small(name, types=["scratch", "rust"], unknown_words="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small(name).types == TYPES and small(name, types=None).types == tuple(type_words("synthetic-target"))


def test_one_line():
    with pytest.warns(UserWarning):
        assert create("dapo", clip_weights="random:0", types=["scratch", "dent", "rust"]).types == (
            "scratch",
            "dent",
            "rust",
        )
    with pytest.warns(UserWarning):
        assert create("dapo", clip_weights="random:0", types="mvtec").p.words == tuple(type_words("mvtec").values())


# ------------------------------------------------------------------------------------------------------------------------- types and data


def test_types_follow_the_index_unless_given(drawn):
    auxiliary, target = drawn
    model = small(types=None)
    assert model.p.types_from == "index"
    assert model.prepare(auxiliary, training=True).types == tuple(type_words("synthetic-auxiliary"))
    assert model.prepare(target).types == tuple(type_words("synthetic-target"))
    own = small(types=["scratch"])
    assert own.prepare(target).types == ("scratch",) and own.p.types_from == "given"


def test_training_words_and_testing_words():
    rows = [
        dict(dataset="mvtec", category="screw", split="test", image=f"{i}.png", anomalous=d != GOOD, defect=d)
        for i, d in enumerate(("good", "manipulated_front", "scratch_neck", "thread_top"))
    ]
    index = make_index(rows, "root")
    model = small(types=None)
    some = Batch(
        torch.rand(4, 3, SIZE, SIZE),
        torch.zeros(4, 1, SIZE, SIZE, dtype=torch.bool),
        torch.tensor([False, True, True, True]),
        torch.arange(4),
        ["screw"] * 4,
        ["x"] * 4,
        torch.ones(4, dtype=torch.bool),
    )
    with pytest.warns(UserWarning):
        model.prepare(index, training=True)
    assert model.p.words == tuple(type_words("mvtec", "train").values()) and "puncture" in model.p.words
    assert [model.types[k - 1] for k in model.kinds(some).tolist()[1:]] == [
        "bent",
        "scratch",
        "thread",
    ] and model.kinds(some)[0] == 0
    with pytest.warns(UserWarning):
        model.prepare(index)
    assert model.p.words == tuple(type_words("mvtec", "test").values())
    assert [model.types[k - 1] for k in model.kinds(some).tolist()[1:]] == ["fabric", "scratch", "thread"]


def test_what_cannot_be_trained():
    rows = [
        dict(dataset="visa", category="candle", split="test", image=f"{i}.png", anomalous=True, defect=d)
        for i, d in enumerate(("burnt", "burnt,melt", ""))
    ]
    model = small(types=None)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="2 images have a defect that is none of the types.*'burnt,melt'"),
    ):
        model.prepare(make_index(rows, "root"), training=True)
    with pytest.raises(ValueError, match="visa has no label 'bad'"):
        model.prepare(make_index([dict(rows[0], defect="bad")], "root"), training=True)
    with pytest.warns(UserWarning):
        assert (
            len(model.prepare(make_index([dict(rows[0], defect="bad")], "root")).types) == 18
        )  # testing needs no labels


def test_the_loss_needs_to_know_the_index(batch):
    model = small().train()
    with pytest.raises(ValueError, match=r"call method.prepare\(index, training=True\)"):
        model.loss(model(None, batch), batch)
    model.prepare(numbered().assign(category="other"), training=True)
    with pytest.raises(ValueError, match="category c has a defect whose type is not known"):
        model.loss(model(None, batch), batch)
    assert model.prepare(numbered(), training=True).kinds(batch).tolist() == [2, 0, 3, 0]


# ------------------------------------------------------------------------------------------------------------------- shapes, independence


@pytest.mark.parametrize("name", ["dapo", "multiads"])
@pytest.mark.parametrize("image_size,taps,shape", [(64, None, (64, 64)), (96, (1, 5), (100, 72)), (16, (3,), (16, 40))])
def test_shapes(name, image_size, taps, shape):
    model = small(name, image_size=image_size, clip_taps=taps)
    batch = batch_of(torch.rand(2, 3, *shape))
    said = model.predict(batch)
    n = len(model.clip.taps)
    assert (
        said.map.shape == (2, *shape)
        and said.type_map.shape == (2, 3, *shape)
        and said.score.shape == (2,)
        and said.type_score.shape == (2, 3)
    )
    assert (
        torch.allclose(said.map + said.layers["normal"], torch.full_like(said.map, n), atol=1e-4)
        and (said.type_map >= 0).all()
    )
    assert segment(said).shape == (2, *shape)
    kept = said.cpu()
    assert torch.equal(kept.type_map, said.type_map) and torch.equal(kept.type_score, said.type_score)


def test_training_and_evaluation_show_the_same_map(batch):
    model = small()
    with torch.no_grad():
        trained = model.train()(None, batch)
    said = model.eval().predict(batch)
    assert (
        torch.allclose(trained.map, said.map, atol=1e-4)
        and torch.allclose(trained.score, said.score, atol=SAME)
        and trained.type_map is None
    )


@pytest.mark.parametrize(
    "name,tolerance", [("dapo", 1e-4), ("multiads", 1e-3)]
)  # a temperature multiplies rounding by 14 or 100, and up to 4 taps are added
def test_batch_mates_do_not_matter(name, tolerance, batch):
    model = small(name)
    for release in (False, True) if name == "dapo" else (False,):
        if release:
            model = small(release_compat=True)
        together = model.predict(batch)
        for i in (0, 3):
            alone = model.predict(batch[[i]])
            for part in ("map", "score", "type_map", "type_score"):
                assert torch.allclose(getattr(alone, part)[0], getattr(together, part)[i], atol=tolerance), part


def test_type_scores_from_maps(batch):
    image = small().predict(batch)
    maps = small(type_from="map", top_share=1e-9).predict(batch)
    assert torch.equal(image.map, maps.map) and torch.allclose(maps.type_score, maps.type_map.flatten(2).amax(-1))
    assert (image.type_score - maps.type_score).abs().max() > 1e-3


def test_smoothing_is_for_evaluation(batch):
    rough = small()
    smooth = small(sigma=4.0)
    assert smooth.predict(batch).map.std() < rough.predict(batch).map.std()
    with torch.no_grad():
        assert torch.equal(smooth.train()(None, batch).map, rough.train()(None, batch).map)


# ------------------------------------------------------------------------------------------------------------------- gradients and losses


@pytest.mark.parametrize("release", [False, True])
def test_gradient_reaches_every_learned_vector(release, batch):
    model = small(release_compat=release).prepare(numbered(), training=True).train()
    model.loss(model(None, batch), batch)["total"].backward()
    for name, q in model.learned().items():
        reach = q.grad.abs().amax(-1) if name.startswith(("prompts", "image_tokens")) else q.grad.abs().amax()
        assert (reach > 0).all(), name
    assert all(q.grad is None for b in model.backbones().values() for q in b.parameters())


def test_losses_the_long_way(batch):
    "All maps of all types at full size, one-hot targets (section 5)."
    model = small().prepare(numbered(), training=True).train()
    said = model(None, batch)
    losses = model.loss(said, batch)
    y = torch.where(batch.mask[:, 0], model.kinds(batch)[:, None, None], 0)
    focal = normal = abnormal = 0.0
    for t in model.clip.taps:
        s = enlarge(said.layers[f"tap_{t}"].softmax(1), (SIZE, SIZE))
        target = F.one_hot(y, 4).permute(0, 3, 1, 2).float().clamp(1e-5 / 3, 1 - 1e-5)
        p = (target * s).sum(1) + 1e-5
        focal = focal - ((1 - p) ** 2 * p.log()).mean()
        normal = normal + dice(s[:, 0], y == 0)
        abnormal = abnormal + dice(s[:, 1:].sum(1), y > 0)
    for got, expected in zip(
        (losses["focal"], losses["dice_normal"], losses["dice_abnormal"]), (focal, normal, abnormal)
    ):
        assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(
        losses["total"],
        4 * (focal + normal + abnormal) + F.cross_entropy(said.layers["image"], batch.anomalous.long()),
        atol=1e-4,
    )


def test_focal_prefers_the_truth():
    logits = torch.zeros(1, 3, 2, 2)
    kind = torch.tensor([2])
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    right = logits.clone()
    wrong = logits.clone()
    right[:, 2], wrong[:, 1] = 5, 5
    values = [focal_types(true_and_normal(x, kind, mask)[0], 3).item() for x in (right, logits, wrong)]
    assert values == sorted(values) and values[0] < 1e-3


def test_parameter_count():
    model = small(prompts=10)
    w = model.clip.width
    c = model.clip.tower.proj.shape[1]
    tw = model.text.width
    assert (
        sum(q.numel() for q in model.learned().values())
        == 2 * 10 * 5 * tw + 4 * model.text.depth * tw + 4 * model.clip.depth * w + 4 * (w + 1) * c
    )
    with torch.device("meta"):
        large = create("dapo", clip="clip-vitl14-336", clip_weights="random:0")  # counted without memory
    counts = {n: q.numel() for n, q in large.learned().items()}

    def total(start):
        return sum(v for n, v in counts.items() if n.startswith(start))

    assert (
        total("prompts.normal") + total("prompts.abnormal"),
        total("prompts.deep"),
        total("image_tokens"),
        total("adapters"),
    ) == (76_800, 36_864, 98_304, 3_148_800)
    assert sum(counts.values()) == 3_360_768 and large.clip.size == 518 and large.clip.taps == (6, 12, 18, 24)
    assert set(small("multiads").learned()) == {
        f"adapters.tap_{t}.{p}" for t in (2, 3, 4, 5) for p in ("weight", "bias")
    }


def test_the_papers_settings():
    defaults = describe("dapo").set_index("parameter")["default"]
    assert dict(
        defaults[
            ["prompts", "vectors", "text_tokens", "image_tokens", "alpha", "tau", "weight_local", "weight_global", "lr"]
        ]
    ) == dict(
        prompts=10,
        vectors=5,
        text_tokens=4,
        image_tokens=4,
        alpha=0.01,
        tau=0.07,
        weight_local=4.0,
        weight_global=1.0,
        lr=1e-3,
    )
    assert (defaults["normal_word"], defaults["noun"], defaults["thing"], defaults["causal"], defaults["true_end"]) == (
        "flawless",
        "anomaly",
        "object",
        True,
        True,
    )
    r = recipe_of("dapo")
    assert (r.optimiser, r.betas, r.weight_decay, r.schedule, r.batch_size, r.seed) == (
        "adam",
        (0.5, 0.999),
        0.0,
        "constant",
        8,
        42,
    )
    assert (
        describe("multiads").set_index("parameter")["default"]["tau"] == 0.01 and recipe_of("multiads").batch_size == 8
    )
    assert (
        small().clip.row.positions == "bicubic" and create_backbone("tiny-clip", "random:0").row.positions == "bilinear"
    )  # this method's own copy


@pytest.mark.parametrize(
    "changes,why",
    [
        (dict(tau=0), "tau=0"),
        (dict(alpha=1.5), "alpha=1.5"),
        (dict(prompts=0), "prompts=0"),
        (dict(text_depth=9), "has 3 blocks"),
        (dict(image_depth=6), "has 5 blocks"),
        (dict(type_from="x"), "use image or map"),
        (dict(types_from="x"), "use given or index"),
        (dict(unknown_words="x"), "use warn or error"),
        (dict(clip_taps=(9,)), "outside 1..5"),
        (dict(clip="tiny-dino"), "has no text tower"),
    ],
)
def test_impossible_parameters(changes, why):
    with pytest.raises(ValueError, match=why):
        small(**changes)


# ----------------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["dapo", "multiads"])
def test_round_trip(name, batch, tmp_path):
    model = small(name)
    with torch.no_grad():
        for q in model.learned().values():
            q.add_(0.1 * torch.randn_like(q))
    said = model.predict(batch)
    path = save(model, tmp_path / "m.safetensors")
    again = load(path)
    assert again.types == TYPES and again.p == model.p
    for part in ("map", "score", "type_map", "type_score"):
        assert torch.equal(getattr(again.predict(batch), part), getattr(said, part)), part
    other = (
        load(path, types=["stain", "hole"], words=["dark stain", "hole"], types_from="given")
        if name == "multiads"
        else load(path, types=["stain", "hole"], words=["stain", "hole"])
    )
    assert other.types == ("stain", "hole") and other.predict(batch).type_map.shape[1] == 2
    for n, q in model.learned().items():
        assert torch.equal(other.learned()[n], q)


def test_what_training_took_is_in_the_checkpoint(drawn, batch, tmp_path):
    "Types that came from an index are saved, and still follow the next index."
    model = small(types=None).prepare(drawn[0], training=True)
    again = load(save(model, tmp_path / "m.safetensors"))
    assert again.types == tuple(type_words("synthetic-auxiliary")) and torch.equal(
        again.predict(batch).map, model.predict(batch).map
    )
    assert again.prepare(drawn[1]).types == tuple(type_words("synthetic-target"))


def test_kept_features_follow_the_parameters(batch):
    model = small()
    before = model.predict(batch).map
    assert torch.equal(model.predict(batch).map, before)
    with torch.no_grad():
        model.prompts.abnormal.mul_(torch.linspace(-3, 3, model.text.width))
    after = model.predict(batch).map
    assert (after - before).abs().max() > 1e-4
    fresh = small()
    with torch.no_grad():
        fresh.prompts.abnormal.mul_(torch.linspace(-3, 3, model.text.width))
    assert torch.equal(fresh.predict(batch).map, after)


def released(model) -> dict:
    own = {n: q.detach() for n, q in model.learned().items()}
    return {
        theirs: (
            (
                own["prompts.deep"][int(ours.rsplit(".", 1)[1])] if ours.startswith("prompts.deep.") else own[ours]
            ).clone()
        )
        for ours, theirs in released_names(model).items()
    }


def test_released_layout(batch, tmp_path):
    model = small()
    flat = released(model) | {"prompt_learner.meta_net.0.weight": torch.zeros(2, 2)}
    torch.save(flat, tmp_path / "flat.pth")
    seed_everything(5)
    other = create("dapo", **SMALL, prompts=2, types=TYPES)
    assert torch.equal(import_released(other, tmp_path / "flat.pth").predict(batch).map, model.predict(batch).map)
    for change, why in (
        (lambda s: s.pop("visual_prompt.learnable_visual_tokens"), "missing visual_prompt.learnable_visual_tokens"),
        (
            lambda s: s.update({"linear_adapter.fc.9.weight": torch.zeros(2)}),
            r"unexpected linear_adapter.fc.9.weight \(released name\)",
        ),
        (lambda s: s.update({"prompt_learner.learnable_layer_tokens.0": torch.zeros(1, 2)}), "must be alike"),
        (lambda s: s.update({"prompt_learner.learnable_normal_tokens": torch.zeros(1, 2)}), "prompts.normal is"),
    ):
        state = dict(flat)
        change(state)
        torch.save(state, tmp_path / "bad.pth")
        with pytest.raises(WeightsError, match=why):
            import_released(small(), tmp_path / "bad.pth")


# -------------------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("name,rate", [("dapo", 3.0), ("multiads", 3.0)])
def test_training_learns_types(name, rate, drawn, tmp_path):
    "A few steps on eight images: the loss falls, the result repeats, evaluation runs."
    auxiliary, target = drawn
    rows = auxiliary[auxiliary["category"].isin(sorted(auxiliary["category"].unique())[:3])]
    recipe = recipe_of(name, epochs=6, batch_size=9, lr_scale=rate)
    logs = []
    for _ in range(2):
        model = small(name, types=None).prepare(rows, training=True)
        logs.append(
            fit(model, rows, recipe, progress=False, cache=FeatureCache(tmp_path / "cache")).drop(columns="seconds")
        )
    pd.testing.assert_frame_equal(*logs)
    assert logs[0]["total"].iloc[-1] < 0.9 * logs[0]["total"].iloc[0] and not logs[0]["skipped"].any()
    few = target[target["category"] == target["category"].iloc[0]]
    found = evaluate(model.prepare(few), few, progress=False)
    assert found.per_class["pixel_auroc"].notna().all() and model.trained_on == sorted(
        "synthetic-auxiliary/" + c for c in rows["category"].unique()
    )


@pytest.mark.slow
def test_types_are_learnable():
    "Two kinds of spot, one dark, one bright, on noise: after a short training the largest type inside the mask is the right one."
    g = torch.Generator().manual_seed(0)
    image = 0.5 + 0.05 * torch.rand(8, 3, SIZE, SIZE, generator=g)
    mask = torch.zeros(8, 1, SIZE, SIZE, dtype=torch.bool)
    for i in range(8):
        if i % 4 == 3:
            continue  # flawless
        y, x = (torch.randint(0, 3, (2,), generator=g) * 16).tolist()
        mask[i, :, y : y + 16, x : x + 16] = True
        image[i, :, y : y + 16, x : x + 16] = 0.95 if i % 2 else 0.05
    bad = mask.flatten(1).any(1)
    batch = Batch(
        image,
        mask,
        bad,
        torch.tensor([0 if i % 2 else 3 for i in range(8)]),
        ["c"] * 8,
        ["x"] * 8,
        torch.ones(8, dtype=torch.bool),
    )
    batch.defect[~bad] = 2
    model = small().prepare(numbered(), training=True).train()
    optimiser = torch.optim.Adam(model.param_groups(), lr=1e-3, betas=(0.5, 0.999))
    for _ in range(60):
        optimiser.zero_grad()
        model.loss(model(None, batch), batch)["total"].backward()
        optimiser.step()
    said = model.eval().predict(batch)
    inside = [said.type_map[i][:, mask[i, 0]].mean(1).argmax().item() + 1 for i in range(8) if bad[i]]
    assert inside == model.kinds(batch)[bad].tolist()
    assert said.score[bad].mean() > said.score[~bad].mean()


def test_nothing_to_encode(batch, drawn):
    model = small()
    assert model.encodes is False and model.encode(batch) is None and model.encode_key() is None
    other = small("multiads")
    features = other.encode(batch)
    assert set(features) == {f"tap_{t}" for t in other.clip.taps} and not any(
        v.requires_grad for v in features.values()
    )
    assert other.encode_key()["towers"]["clip"]["position_resize"] == "bicubic" and other.p.position_resize == "bicubic"


def test_multiads_reads_each_name_once():
    model = small("multiads")
    seen = []
    model.text.register_forward_hook(lambda *a: seen.append(1))
    image = torch.rand(3, 3, SIZE, SIZE)
    rows = Batch(
        image,
        torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.long),
        ["pcb1", "pcb2", "wood"],
        ["x"] * 3,
        torch.ones(3, dtype=torch.bool),
    )
    said = model.predict(rows)
    count = len(seen)
    assert count == 3 * 4  # three names as they are spelt, normal and three types
    model.predict(rows)
    assert len(seen) == count
    same = model.predict(
        Batch(image[[0, 0, 0]], rows.mask, rows.anomalous, rows.defect, rows.category, rows.path, rows.has_mask)
    )
    assert (
        torch.allclose(same.map[0], same.map[1], atol=1e-3) and (same.map[0] - same.map[2]).abs().max() > 1e-3
    )  # the name is part of the question
    assert torch.allclose(said.score, said.map.flatten(1).amax(1))


def test_batches_of_an_index(drawn):
    "Numbers of a real index end as the right types."
    auxiliary, _ = drawn
    model = small(types=None).prepare(auxiliary, training=True)
    for batch in batches(auxiliary, 32, 16):
        names = auxiliary.set_index("image").loc[batch.path, "defect"]
        assert [GOOD if k == 0 else model.types[k - 1] for k in model.kinds(batch).tolist()] == names.tolist()


def test_segments_need_types():
    with pytest.raises(ValueError, match="no types"):
        segment(Prediction(torch.zeros(1, 4, 4), torch.zeros(1), {"normal": torch.zeros(1, 4, 4)}))
