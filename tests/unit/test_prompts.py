"The text tower, hand-written and learned prompts: against open_clip, against the stored numbers of AnomalyCLIP, Crane and WinCLIP, and when something does not fit."

import copy
import functools
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from zsad_nb.backbones.ensembles import (
    ADACLIP_STATES,
    ADACLIP_TEMPLATES,
    ANOMALIB_TEMPLATES,
    WINCLIP_STATES,
    WINCLIP_TEMPLATES,
    ensemble,
    sentences,
)
from zsad_nb.backbones.prompts import ObjectPrompts, StatePrompts, import_prompts
from zsad_nb.backbones.table import BACKBONES, BackboneRow
from zsad_nb.backbones.text import END, START, TOKENS, UNKNOWN, TextTower, create_text, tokenizer, vocabulary
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.backbones.weights import WeightsError, import_vision_libraries, read_state
from zsad_nb.backbones.words import rewrite
from zsad_nb.components.dual_path import dual_path, joint
from zsad_nb.evaluation.metrics import image_metrics
from zsad_nb.methods.base import Method, save
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.synthetic.benchmark import render
from zsad_nb.synthetic.versions import categories, defects

_, open_clip = import_vision_libraries()
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
SENTENCES = [
    "a photo of a damaged screw.",
    "flawless",
    "a bright photo of the metal nut without flaw for visual inspection",
    "",
]


def largest(a, b) -> float:
    return (a.detach().double() - torch.as_tensor(b).double()).abs().max().item()


@pytest.fixture(scope="module")
def text() -> TextTower:
    return create_text("tiny-clip", "random:0")


@pytest.fixture
def calls(text):
    "Number of rows of every call of the tower."
    rows = []
    handle = text.register_forward_hook(lambda m, given, result: rows.append(len(result)))
    yield rows
    handle.remove()


def clip(gelu=True, text_layers=2, width=64, **text_cfg) -> nn.Module:
    "A small CLIP of open_clip, every tensor random."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        cfg = dict(
            context_length=20, vocab_size=TOKENS, width=width, heads=max(1, width // 64), layers=text_layers, **text_cfg
        )
        model = open_clip.CLIP(
            48, dict(image_size=32, patch_size=16, width=64, layers=1, head_width=64), cfg, quick_gelu=gelu
        ).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape))
    return model


def put(state: dict, path: Path) -> str:
    state = {k: v.detach().clone().contiguous() for k, v in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------- the tower


@pytest.mark.slow
@pytest.mark.parametrize("gelu", [True, False], ids=["quick", "exact"])
@pytest.mark.parametrize(
    "shape", [dict(), dict(text_layers=3, width=128), dict(mlp_ratio=2.0)], ids=["small", "two heads", "narrow mlp"]
)
@torch.no_grad()
def test_equals_open_clip(tmp_path, gelu, shape):
    "Sizes from shapes, both towers in one file, sentences of different lengths."
    model = clip(gelu, **shape)
    tower = create_text("clip", put(model.state_dict(), tmp_path / "clip.safetensors"), quick_gelu=gelu)
    ids = tower.tokenize(SENTENCES)
    assert torch.equal(ids, tokenizer()(SENTENCES, 20)) and ids.shape == (4, tower.context) == (4, 20)
    assert (tower.width, tower.depth, tower.embed_dim) == (shape.get("width", 64), shape.get("text_layers", 2), 48)
    assert largest(tower.encode(SENTENCES), model.encode_text(ids)) < TOLERANCE
    assert largest(tower(tower.embed(ids), ids.argmax(1)), model.encode_text(ids)) < TOLERANCE
    other = create_text("clip", str(tmp_path / "clip.safetensors"), quick_gelu=not gelu)
    assert largest(other.encode(SENTENCES), model.encode_text(ids)) > 10 * TOLERANCE, (
        "the activation must matter, or this test shows nothing"
    )
    assert (
        create_backbone("clip", str(tmp_path / "clip.safetensors"), quick_gelu=gelu).tower.proj.shape[1]
        == tower.embed_dim
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, expected, gelu",
    [("clip-vitb32", (512, 12, 77, 512), "QuickGELU"), ("clip-vitb16-plus-240", (640, 12, 77, 640), "GELU")],
)
@torch.no_grad()
def test_named_rows(name, expected, gelu):
    tower = create_text(name, "random:5")
    assert (tower.width, tower.depth, tower.context, tower.embed_dim) == expected
    assert (
        type(tower.tower.transformer.resblocks[0].mlp.gelu).__name__ == gelu
        and tower.tower.token_embedding.num_embeddings == TOKENS
    )
    ids = tower.tokenize(SENTENCES)
    assert tower.unknown(["xylophone"]) == [] and largest(tower.encode(SENTENCES), tower.tower(ids)) < TOLERANCE
    assert (tower.row.name, tower.weights, tower.size, tower.taps) == (name, "random:5", 77, ())


def test_seeds():
    a, b, c = (create_text("tiny-clip", f"random:{s}") for s in (1, 1, 2))
    assert a.hash == b.hash != c.hash and len(a.hash) == 16
    state = torch.random.get_rng_state()
    create_text("tiny-clip", "random:1")
    assert torch.equal(torch.random.get_rng_state(), state), (
        "building a tower must not disturb the caller's random numbers"
    )
    for weights in ("random:", "random:x", "random:-1"):
        with pytest.raises(ValueError, match="random:SEED"):
            create_text("tiny-clip", weights)


def test_names_without_a_text_tower():
    for name in ("tiny-dino", "dinov2-vits14", "timm:vit_base_patch16_siglip_224"):
        with pytest.raises(
            ValueError, match=rf"'{name}' has no text tower; those that have one: clip-vitl14-336, .*tiny-clip"
        ):
            create_text(name, "random:0")
    with pytest.raises(ValueError, match="unknown backbone 'tiny-clp'; known: .*; nearest: tiny-clip"):
        create_text("tiny-clp", "random:0")
    for weights in ("random:0", "pretrained"):
        with pytest.raises(WeightsError, match="clip.*weights=PATH"):
            create_text("clip", weights)
    with pytest.raises(WeightsError, match="no weights file"):
        create_text("clip", "nowhere.safetensors")


def test_pretrained_reads_the_image_tower_s_file(tmp_path, monkeypatch):
    path = put(clip().state_dict(), tmp_path / "open_clip_model.safetensors")
    asked = []
    monkeypatch.setattr("zsad_nb.backbones.table._pretrained_file", lambda row, revision: asked.append(row) or path)
    with pytest.raises(WeightsError, match=r"text tower of clip-vitb32: .*missing transformer\.resblocks\.2"):
        create_text("clip-vitb32")
    assert asked == [BACKBONES["clip-vitb32"]]


def without(key):
    return lambda s: {k: v for k, v in s.items() if k != key}


def plus(**extra):
    return lambda s: {**s, **{k.replace("__", "."): v for k, v in extra.items()}}


@pytest.mark.parametrize(
    "change, word",
    [
        (without("token_embedding.weight"), "no key token_embedding.weight"),
        (without("positional_embedding"), "no key positional_embedding"),
        (without("text_projection"), "no key text_projection"),
        (without("transformer.resblocks.0.mlp.c_fc.weight"), "no key transformer.resblocks.0.mlp.c_fc.weight"),
        (without("transformer.resblocks.1.attn.in_proj_weight"), "missing transformer.resblocks.1.attn.in_proj_weight"),
        (without("ln_final.bias"), "missing ln_final.bias"),
        (plus(transformer__bogus=torch.ones(2)), "unexpected transformer.bogus"),
        (plus(ln_final__bias=torch.ones(2)), r"ln_final.bias is (2,), expected (64,)"),
        (plus(positional_embedding=torch.ones(20)), "positional_embedding is (20,), expected two dimensions"),
        (plus(token_embedding__weight=torch.ones(TOKENS, 200)), "no multiple of 64"),
        (plus(token_embedding__weight=torch.ones(9, 64)), "missing token_ids"),
        (lambda s: {k: v for k, v in s.items() if k.startswith("visual.")}, "no key token_embedding.weight"),
        (lambda s: {}, "no key token_embedding.weight"),
    ],
    ids=[
        "no table",
        "no positions",
        "no projection",
        "no first mlp",
        "no attention",
        "no norm",
        "extra",
        "shape",
        "flat positions",
        "heads",
        "small table",
        "image tower only",
        "empty",
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_file_that_does_not_fit(tmp_path, change, word, suffix):
    with pytest.raises(WeightsError) as caught:
        create_text("clip", put(change(clip().state_dict()), tmp_path / f"clip{suffix}"))
    assert word in str(caught.value)


def test_what_else_a_file_holds(tmp_path):
    "Temperature, sizes of OpenAI's archives and the image tower are no part of the text tower; half precision is read as float32."
    state = clip().state_dict()
    state |= dict(
        logit_scale=torch.tensor(4.6),
        input_resolution=torch.tensor(32),
        context_length=torch.tensor(20),
        vocab_size=torch.tensor(TOKENS),
    )
    tower = create_text(
        "clip", put({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "clip.pt")
    )
    assert all(p.dtype == torch.float32 for p in tower.parameters())
    assert largest(tower.tower.text_projection, state["text_projection"]) < 1e-3
    wrapped = {"state_dict": {f"module.{k}": v.half() if v.is_floating_point() else v for k, v in state.items()}}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    assert create_text("clip", tmp_path / "wrapped.pt").hash == tower.hash


@torch.no_grad()
def test_end_of_text_and_causality(text):
    ids = text.tokenize(["a photo of a screw", "a photo of a damaged screw"])
    end = ids.argmax(1)
    assert end.tolist() == [6, 7] and ids[0, 6] == END and ids[0, 0] == START and ids[0, 7:].abs().sum() == 0
    rows = text.embed(ids)
    base = text(rows, end)
    behind = rows.clone()
    before = rows.clone()
    behind[0, 7:] += torch.randn(behind[0, 7:].shape)
    before[0, 2] += torch.randn(128)
    assert largest(text(behind, end), base) < TOLERANCE < largest(text(before, end)[0], base[0])
    open_ = text(rows, end, causal=False)
    open_behind = text(behind, end, causal=False)
    assert largest(open_[0], base[0]) > 100 * TOLERANCE and largest(open_behind[0], open_[0]) > 100 * TOLERANCE
    assert largest(text(rows[:, :9], end), base) < TOLERANCE, "a shorter row of the same words"
    assert largest(text(rows, end - 1)[0], base[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("sets, tokens", [(1, 4), (2, 4), (2, 1), (2, 12)])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_deep_tokens(text, half, sets, tokens, causal):
    "Against the whole context, written out block by block."
    ids = text.tokenize(SENTENCES)
    deep = torch.randn(sets, tokens, text.width)
    x = text.embed(ids) + text.tower.positional_embedding
    for i, block in enumerate(text.tower.transformer.resblocks):
        if i in range(1, sets + 1):
            x[:, 1 : 1 + tokens] = deep[i - 1].half().float() if half else deep[i - 1]
        x = block(x, attn_mask=torch.full((40, 40), -torch.inf).triu(1) if causal else None)
    expected = text.tower.ln_final(x)[range(4), ids.argmax(1)] @ text.tower.text_projection
    assert largest(text(text.embed(ids), ids.argmax(1), deep, causal, half), expected) < TOLERANCE
    assert largest(text(text.embed(ids), ids.argmax(1), causal=causal), expected) > 100 * TOLERANCE


def test_what_the_tower_refuses(text):
    ids = text.tokenize(SENTENCES)
    rows = text.embed(ids)
    end = ids.argmax(1)
    with pytest.raises(ValueError, match="40 x 64; the text tower tiny-clip takes at most 40 x 128"):
        text(torch.zeros(4, 40, 64), end)
    with pytest.raises(ValueError, match="41 x 128"):
        text(torch.zeros(4, 41, 128), end)
    with pytest.raises(ValueError, match="end of text is at position 14 of 10"):
        text(rows[:, :10], torch.full((4,), 14))
    for deep in (torch.zeros(3, 4, 128), torch.zeros(1, 4, 64), torch.zeros(1, 40, 128)):
        with pytest.raises(ValueError, match="takes at most 2 sets of fewer than 40 tokens, 128 wide"):
            text(rows, end, deep)


def test_too_long(text):
    fits = "scratch " * 38
    long = "scratch " * 39
    assert text.tokenize([fits]).argmax(1).item() == 39
    with pytest.raises(
        ValueError, match=r"'scratch scratch .*' has 41 tokens with start and end, the text tower tiny-clip reads 40"
    ):
        text.tokenize(["fine", long])
    with pytest.raises(ValueError, match="has 41 tokens"):
        text.encode([long])
    assert torch.equal(text.tokenize("a screw"), text.tokenize(["a screw"])), (
        "one sentence is one sentence, not its letters"
    )


def test_company_of_sentences(text):
    together = text.encode(SENTENCES)
    for i, s in enumerate(SENTENCES):
        assert largest(text.encode([s])[0], together[i]) < TOLERANCE
    assert largest(text.encode(SENTENCES * 100)[-4:], together) < TOLERANCE  # more than go through at once


def test_frozen(text):
    nn.ModuleList([text]).train()
    assert not any(p.requires_grad for p in text.parameters()) and not any(m.training for m in text.modules())
    assert not text.encode(["a screw"]).requires_grad


# ------------------------------------------------------------------------------------------------------------------ reduced tables


def test_vocabulary():
    ids = vocabulary(["a damaged hazelnut.", "A hazelnut"])
    assert ids.dtype == torch.int64 and ids.tolist() == sorted(
        {0, START, END, *tokenizer().encode("a damaged hazelnut.")}
    )
    assert vocabulary([]).tolist() == [0, START, END]


@torch.no_grad()
def test_reduced_table_equals_the_whole_one(tmp_path):
    "Rows picked out of a whole table say the same, as long as they know the words; what they do not know is one vector."
    model = clip()
    state = model.state_dict()
    ids = torch.cat([vocabulary(SENTENCES), torch.tensor([UNKNOWN])])
    rows = torch.cat([state["token_embedding.weight"][ids[:-1]], torch.randn(1, 64)])
    path = put({**state, "token_embedding.weight": rows, "token_ids": ids}, tmp_path / "reduced.safetensors")
    whole = create_text("clip", put(state, tmp_path / "whole.safetensors"))
    reduced = create_text("clip", path)
    assert torch.equal(reduced.tokenize(SENTENCES), whole.tokenize(SENTENCES)), "ids are CLIP's, whatever the table"
    assert largest(reduced.encode(SENTENCES), whole.encode(SENTENCES)) < TOLERANCE
    assert reduced.unknown(["a screw with a scratch"]) == ["with", "scratch"] and whole.unknown(["a scratch"]) == []
    strange = reduced.embed(reduced.tokenize(["scratch dented"]))[0]
    assert torch.equal(strange[1], rows[-1]) and torch.equal(strange[2], rows[-1])
    assert reduced.hash != whole.hash


@pytest.mark.parametrize(
    "ids",
    [
        [0, START, END],
        [UNKNOWN, 0, START, END],
        [0, START, START, END, UNKNOWN],
        [0, START, 17, UNKNOWN],
        [0, START, END, TOKENS, UNKNOWN],
        [0, START, END, -7, UNKNOWN],
    ],
    ids=["no unknown", "unknown first", "twice", "no end", "too large", "negative"],
)
def test_token_ids_that_are_none(tmp_path, ids):
    path = put(
        {**clip().state_dict(), "token_embedding.weight": torch.ones(len(ids), 64), "token_ids": torch.tensor(ids)},
        tmp_path / "reduced.safetensors",
    )
    with pytest.raises(WeightsError, match="token_ids of clip must be different ids"):
        create_text("clip", path)
    with pytest.raises(WeightsError, match="token_ids of tiny-clip must be different ids"):
        create_text("tiny-clip", "random:0", token_ids=torch.tensor(ids))


def test_token_ids_of_another_table(tmp_path):
    state = {**clip().state_dict(), "token_embedding.weight": torch.ones(5, 64)}
    for ids, word in (
        (torch.tensor([0, START, END, UNKNOWN]), r"token_ids is \(4,\), expected \(5,\)"),
        (torch.tensor([0.0, 5.0, START, END, UNKNOWN]), "float32, expected int64"),
    ):
        with pytest.raises(WeightsError, match=word):
            create_text("clip", put({**state, "token_ids": ids}, tmp_path / "reduced.safetensors"))
    with pytest.raises(ValueError, match="a file brings its own"):
        create_text("clip", tmp_path / "reduced.safetensors", token_ids=vocabulary([]))


def test_tiny_clip_from_a_file(tmp_path):
    "As the shipped file will be: half precision, both towers, its own words."
    ids = torch.cat([vocabulary(["a photo of a screw.", "damaged"]), torch.tensor([UNKNOWN])])
    own = create_text("tiny-clip", "random:4", token_ids=ids)
    image = create_backbone("tiny-clip", "random:4")
    assert own.tower.token_embedding.num_embeddings == len(ids) == 10
    state = {
        **own.tower.state_dict(),
        **{f"visual.{k}": v for k, v in image.tower.state_dict().items()},
        "logit_scale": torch.tensor(2.6),
    }
    path = put(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "tiny_clip.safetensors"
    )
    tower = create_text("tiny-clip", path)
    assert (tower.width, tower.depth, tower.context, tower.embed_dim) == (128, 3, 40, 128) and tower.unknown(
        "a damaged carpet"
    ) == ["carpet"]
    assert largest(tower.encode(["a damaged screw"]), own.encode(["a damaged screw"])) < 1e-2
    assert create_backbone("tiny-clip", path).tower.proj.shape[1] == tower.embed_dim
    with pytest.raises(WeightsError, match="text tower of tiny-clip: missing token_ids"):
        create_text("tiny-clip", put(without("token_ids")(state), tmp_path / "bare.safetensors"))


@pytest.mark.parametrize(
    "states, templates",
    [(WINCLIP_STATES, WINCLIP_TEMPLATES), (WINCLIP_STATES, ANOMALIB_TEMPLATES), (ADACLIP_STATES, ADACLIP_TEMPLATES)],
)
def test_random_table_knows_the_ensembles(text, states, templates):
    for name in ("bottle", "metal_nut", "pcb1", "chewinggum", "object"):
        for s in states.values():
            assert text.unknown(sentences(name, s, templates)) == []


@pytest.mark.slow
def test_words_without_a_network(tmp_path):
    "Tokens, tower and prompts on a machine that reaches nothing."
    code = """
        import socket
        def refuse(*_, **__): raise OSError("no network")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from zsad_nb.backbones.prompts import ObjectPrompts
        from zsad_nb.backbones.text import create_text
        text = create_text("tiny-clip", "random:0")
        print(tuple(ObjectPrompts(text).features().shape), text.tokenize(["a damaged screw."])[0, :7].tolist())"""
    env = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")} | dict(
        PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0 and run.stdout.startswith(f"(2, 128) [{START}, "), run.stderr


# ------------------------------------------------------------------------------------------------------------ class names, ensembles


@pytest.mark.parametrize(
    "name, words",
    [
        ("pcb1", "printed circuit board"),
        ("pcb4", "printed circuit board"),
        ("macaroni1", "macaroni"),
        ("metal_nut", "metal nut"),
        ("Metal Nut", "metal nut"),
        ("pipe_fryum", "pipe fryum"),
        ("bracket_black", "bracket black"),
        ("Woven_001", "woven"),
        ("01", "object"),
        ("Class10", "object"),
        ("", "object"),
        ("electrical commutators", "electrical commutators"),
        ("toothbrush", "toothbrush"),
        ("  hazel__nut ", "hazel nut"),
    ],
)
def test_rewrite(name, words):
    assert rewrite(name) == rewrite(rewrite(name)) == words


@torch.no_grad()
def test_ensemble(text):
    states, templates = ("flawless {}", "{} without flaw"), ("a photo of a {}.", "a bright photo of the {}.")
    said = sentences("metal_nut", states, templates)
    assert said == [
        "a photo of a flawless metal nut.",
        "a bright photo of the flawless metal nut.",
        "a photo of a metal nut without flaw.",
        "a bright photo of the metal nut without flaw.",
    ]
    z = text.encode(said)
    assert (
        largest(ensemble(text, "metal_nut", states, templates), F.normalize(F.normalize(z, dim=1).mean(0), dim=0))
        < TOLERANCE
    )
    raw = ensemble(text, "metal_nut", states, templates, normalise_each=False)
    assert largest(raw, F.normalize(z.mean(0), dim=0)) < TOLERANCE and raw.shape == (text.embed_dim,)


# ---------------------------------------------------------------------------------------------------------------- learned prompts


def kinds(text):
    return [
        (ObjectPrompts(text), ()),
        (ObjectPrompts(text, 3, deep_tokens=0), ()),
        (ObjectPrompts(text, deep_half=True), ()),
        (StatePrompts(text), (["screw", "metal_nut"],)),
        (StatePrompts(text, 2, 3, 4, shared_background=False, state_mean=0.5), (["screw", "pcb1"],)),
        (StatePrompts(text, background=0), (["screw"],)),
    ]


KINDS = ["object", "without deep tokens", "float16", "states", "a background a pair", "without background"]


@pytest.fixture(params=range(len(KINDS)), ids=KINDS)
def prompts(request, text):
    torch.manual_seed(1)
    return kinds(text)[request.param]


def test_gradients_reach_prompts_and_nothing_else(text, prompts):
    learned, given = prompts
    learned(*given).square().sum().backward()
    for name, p in learned.named_parameters():
        assert p.grad.isfinite().all() and (p.grad.abs().amax(-1) > 0).all(), name
    assert all(p.grad is None for p in text.parameters())
    holder = nn.Module()
    holder.text = text
    holder.prompts = learned
    names = [n for n, _ in holder.named_parameters() if not n.startswith("text.")]
    assert names == [f"prompts.{n}" for n, _ in learned.named_parameters()]
    assert set(learned.state_dict()) == {n for n, _ in learned.named_parameters()} and list(learned.children()) == [], (
        "the tower is no part of its prompts"
    )


def test_features_are_forward_without_gradients(prompts):
    learned, given = prompts
    forward = learned(*given)
    kept = learned.features(*given)
    assert forward.requires_grad and not kept.requires_grad and largest(forward, kept) < TOLERANCE


def through_an_optimiser(kind, **options):
    def step(p):
        optimiser = kind(p.parameters(), lr=1e-2, **options)
        p(*p.given).square().sum().backward()
        optimiser.step()

    return step


def last(p):
    return list(p.parameters())[-1]


def copy_in(p):
    with torch.no_grad():
        last(p).copy_(torch.randn_like(last(p)))


def part(p):
    with torch.no_grad():
        last(p)[0, 0].mul_(2)


def reload_(p):
    p.load_state_dict({k: v + 1 for k, v in p.state_dict().items()})


def replace_(p):
    name, old = list(p.named_parameters())[-1]
    setattr(p, name, nn.Parameter(old.detach() * 2))


def exchange(p):
    last(p).data = torch.randn_like(last(p))


def write_through(p):
    last(p).data.mul_(2)


CHANGES = dict(
    adam=through_an_optimiser(torch.optim.Adam),
    foreach=through_an_optimiser(torch.optim.AdamW, foreach=True),
    fused=through_an_optimiser(torch.optim.Adam, fused=True),
    sgd=through_an_optimiser(torch.optim.SGD),
    copy_=copy_in,
    part=part,
    load_state_dict=reload_,
    replaced=replace_,
    exchanged=exchange,
    data=write_through,
)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_parameter_is_noticed(text, calls, prompts, change):
    learned, given = prompts
    learned.given = given
    before = learned.features(*given)
    change(learned)
    calls.clear()
    after = learned.features(*given)
    assert len(calls) == 1 and largest(before, after) > 0 and largest(after, learned(*given)) < TOLERANCE
    learned.features(*given)
    assert len(calls) == 2  # one of them is the comparison's own


def test_computed_once(text, calls, prompts):
    learned, given = prompts
    first = learned.features(*given)
    first_calls = len(calls)
    (
        learned.train(),
        learned.eval(),
        learned.zero_grad(),
        learned.requires_grad_(False),
        learned.requires_grad_(True),
        learned.load_state_dict(learned.state_dict()),
    )
    copy_of_it = learned.features(*given)
    copy_of_it.mul_(0)  # whoever asks gets a copy
    with torch.inference_mode():
        again = learned.features(*given)
    assert (
        first_calls == 1
        and len(calls) == 1
        and torch.equal(first, again)
        and largest(again, learned(*given)) < TOLERANCE
    )


def test_asked_for_in_inference_mode(text, prompts):
    "What is first computed in inference mode can be used for training afterwards."
    learned, given = prompts
    with torch.inference_mode():
        first = learned.features(*given)
    weight = nn.Parameter(torch.ones(text.embed_dim))
    for seen in (first, learned.features(*given)):
        assert not seen.is_inference()
        (seen * weight).sum().backward()
    assert weight.grad.isfinite().all()
    with torch.inference_mode():  # made of tensors whose changes torch does not count
        born = ObjectPrompts(text)
        before = born.features()
        born.context.mul_(2)
        assert largest(before, born.features()) > 0


def test_another_dtype_and_back(calls):
    own = create_text("tiny-clip", "random:0")
    learned = ObjectPrompts(own)
    before = learned.features()
    own.double(), learned.double()
    wide = learned.features()
    assert wide.dtype == torch.float64 and largest(wide, before) < 1e-4
    own.float(), learned.float()
    assert learned.features().dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device")
def test_another_device():
    holder = nn.Module()
    holder.text = create_text("tiny-clip", "random:0")
    holder.object = ObjectPrompts(holder.text)
    holder.state = StatePrompts(holder.text)
    before = holder.object.features(), holder.state.features(["screw"])
    holder.to("cuda")
    after = holder.object.features(), holder.state.features(["screw"])
    for a, b in zip(before, after):
        assert b.is_cuda and largest(a, b.cpu()) < 1e-4
    assert holder.object(torch.randn(2, 128, device="cuda")).is_cuda and holder.text.encode(["a screw"]).is_cuda
    holder.to("cpu")
    assert not holder.object.features().is_cuda


def test_a_copy_answers_for_itself(prompts):
    "A copy made between two steps must not answer with what was kept before them, nor for its original afterwards."
    learned, given = prompts
    old = learned.features(*given)
    copy_in(learned)
    twin = copy.deepcopy(learned)
    assert (
        largest(twin.features(*given), old) > 0 and largest(twin.features(*given), learned.features(*given)) < TOLERANCE
    )
    copy_in(twin)
    assert largest(twin.features(*given), learned.features(*given)) > 0


def test_object_prompts(text):
    p = ObjectPrompts(text)
    assert p.context.shape == (2, 12, 128) and p.deep.shape == (2, 4, 128), "8 deep sets, cut to the blocks there are"
    assert (
        ObjectPrompts(text, deep_sets=1).deep.shape == (1, 4, 128)
        and ObjectPrompts(text, deep_sets=0).deep is None
        and ObjectPrompts(text, deep_tokens=0).deep is None
    )
    rows, end = p.embeddings()
    ids = text.tokenize(["object.", "damaged object."])
    assert rows.shape == (2, 40, 128) and end.tolist() == [15, 16] and torch.equal(rows[:, 1:13], p.context)
    assert torch.equal(rows[:, 13:], text.embed(ids)[:, 1:28]) and torch.equal(rows[:, 0], text.embed(ids)[:, 0])
    torch.manual_seed(0)
    big = ObjectPrompts(create_text("tiny-clip", "random:0"), std=0.02)
    assert abs(big.context.std().item() - 0.02) < 2e-3 and abs(big.deep.std().item() - 0.02) < 2e-3
    with pytest.raises(ValueError, match="normal and of the abnormal"):
        ObjectPrompts(text, suffixes=("object.",))
    with pytest.raises(
        ValueError, match=r"'X X .* object\.' has 41 tokens with start and end, the text tower tiny-clip reads 40"
    ):
        ObjectPrompts(text, count=37)


def test_image_in_the_prompt(text):
    p = ObjectPrompts(text)
    images = torch.randn(3, 128)
    rows, end = p.embeddings(images)
    static, static_end = p.embeddings()
    assert rows.shape == (3, 2, 40, 128) and torch.equal(end, (static_end + 1).expand(3, 2))
    assert torch.equal(rows[:, :, :13], static[:, :13].expand(3, -1, -1, -1)) and torch.equal(
        rows[:, :, 14:], static[:, 13:-1].expand(3, -1, -1, -1)
    )
    assert largest(rows[:, 0, 13], F.normalize(images, dim=1)) < 1e-6
    together = p(images)
    assert together.shape == (3, 2, 128) and largest(p(images * 7), together) < TOLERANCE, (
        "only the direction of the image counts"
    )
    for i in range(3):
        assert largest(p(images[i : i + 1])[0], together[i]) < TOLERANCE
    assert largest(p.features(images), together) < TOLERANCE and largest(p.features(), p()) < TOLERANCE
    for bad in (torch.randn(3, 64), torch.randn(128)):
        with pytest.raises(ValueError, match=r"context_image must be \(B, 128\), the text tower's width"):
            p(bad)
    full = ObjectPrompts(text, count=36, suffixes=("object.", "object."))
    full()
    with pytest.raises(ValueError, match="cut off"):
        full(images)


def test_half_precision_is_part_of_what_is_kept(text):
    p = ObjectPrompts(text)
    exact = p.features()
    p.deep_half = True
    assert 0 < largest(p.features(), exact) < 1e-3 and largest(p.features(), p()) < TOLERANCE
    p.deep_half = False
    assert torch.equal(p.features(), exact)


def test_state_prompts(text, calls):
    names = ["screw", "metal_nut", "screw", "pcb1", "pcb3", "Screw"]
    p = StatePrompts(text)
    found = p(names)
    assert found.shape == (6, 6, 128) and calls == [18], "three distinct names, six prompts each, one pass"
    for i, j in ((0, 2), (0, 5), (3, 4)):
        assert torch.equal(found[i], found[j])
    assert largest(found[0], found[1]) > 1e-3
    for i, n in enumerate(names):
        assert largest(p([n])[0], found[i]) < TOLERANCE
    calls.clear()
    assert largest(p.features(["bottle", "screw"])[1], found[0]) < TOLERANCE and calls == [12]
    p.features(["screw", "bottle", "pcb1", "pcb2"])
    assert calls == [12, 6], "only the new name"
    assert p.features(["screw"] * 5).shape == (5, 6, 128) and calls == [12, 6]


@pytest.mark.parametrize("shared", [True, False], ids=["one background", "one a pair"])
def test_state_prompts_row_by_row(text, shared):
    "Every prompt alone, written out; first the normal ones, then the abnormal ones; a pair shares its background."
    torch.manual_seed(0)
    p = StatePrompts(text, 2, 3, 4, shared_background=shared)
    for q in p.parameters():
        q.data.normal_()
    assert p.background.shape == (1 if shared else 4, 2, 128) and p.state.shape == (2, 4, 3, 128)
    found = p(["metal_nut"])[0]
    words = text.embed(text.tokenize(["metal nut"]))[0]
    for s in range(2):
        for i in range(4):
            row = torch.cat([words[:1], p.background[0 if shared else i], p.state[s, i], words[1:4]])[
                None
            ]  # the name's two words and the end
            assert largest(text(row, torch.tensor([8]))[0], found[4 * s + i]) < TOLERANCE


def test_state_prompts_start(text):
    torch.manual_seed(0)
    p = StatePrompts(text, 30, 5)
    bayes = StatePrompts(text, state_mean=0.5)
    for q in p.parameters():
        assert abs(q.mean().item()) < 2e-3 and abs(q.std().item() - 0.02) < 2e-3
    assert [round(s.mean().item(), 2) for s in bayes.state] == [0.5, -0.5] and abs(
        bayes.background.mean().item()
    ) < 5e-3
    with pytest.raises(ValueError, match="at least one prompt"):
        StatePrompts(text, count=0)
    with pytest.raises(ValueError, match="the text tower tiny-clip reads 40"):
        StatePrompts(text, 20, 20)
    with pytest.raises(ValueError, match="'X X X X X X X X X X very long .*' has 42 tokens"):
        StatePrompts(text)(["screw", "very long " * 15])


@torch.no_grad()
def test_a_mean_over_the_channels_says_nothing(text):
    "Every block reads through a LayerNorm: Bayes-PFL's +-0.5 cannot be seen."
    p = StatePrompts(text, shared_background=False, state_mean=0.5)
    before = p.features(["screw"])
    p.state -= torch.tensor([0.5, -0.5])[:, None, None, None]
    assert 0 < largest(p.features(["screw"]), before) < 10 * TOLERANCE


@dataclass(frozen=True)
class Nothing:
    pass


def test_a_method_of_both_towers(text, tmp_path):
    "Towers are backbones, prompts are learned; a checkpoint names both towers."
    method = Method(Nothing())
    method.name = "both"
    method.clip = create_backbone("tiny-clip", "random:0")
    method.text = text
    method.prompts = ObjectPrompts(method.text)
    assert list(method.backbones()) == ["clip", "text"] and set(method.learned()) == {"prompts.context", "prompts.deep"}
    save(method, tmp_path / "both.safetensors")
    assert read_header(tmp_path / "both.safetensors")["backbones"]["text"] == dict(
        name="tiny-clip", weights="random:0", hash=text.hash, size=40, taps=[]
    )


# --------------------------------------------------------------------------------------------------------------- the authors' prompts


def released(p: ObjectPrompts) -> dict:
    words = p.text.embed(p.ids)
    state = {f"compound_prompts_text.{i}": torch.randn(s.shape) for i, s in enumerate(p.deep)}
    for row, s in enumerate(("pos", "neg")):
        state |= {
            f"ctx_{s}": torch.randn(1, 1, *p.context.shape[1:]),
            f"token_prefix_{s}": words[None, row : row + 1, :1],
            f"token_suffix_{s}": words[None, row : row + 1, 1 + p.count :],
            f"tokenized_prompts_{s}": p.ids[None, row : row + 1].int(),
        }
    return state


def test_import(text):
    p = ObjectPrompts(text)
    state = released(p)
    before = p.features()
    for layout in (
        state,
        {"prompt_learner": state},
        {f"prompt_learner.{k}": v for k, v in state.items()},
        {**state, "compound_prompt_projections.0.weight": torch.ones(2, 2)},
        {k: v for k, v in state.items() if not k.startswith("token")},
    ):
        with torch.no_grad():
            p.context.zero_()
        assert import_prompts(p, layout) is p
        assert torch.equal(p.context.data, torch.cat([state["ctx_pos"][0], state["ctx_neg"][0]]))
        assert all(torch.equal(p.deep[i].data, state[f"compound_prompts_text.{i}"]) for i in range(2))
    assert largest(p.features(), before) > 0
    bare = ObjectPrompts(text, deep_tokens=0)
    import_prompts(bare, {k: v for k, v in state.items() if not k.startswith("compound")})


@pytest.mark.parametrize(
    "change, word",
    [
        (without("ctx_neg"), "missing ctx_neg"),
        (without("compound_prompts_text.1"), "missing compound_prompts_text.1"),
        (plus(compound_prompts_text__2=torch.ones(4, 128)), "unexpected compound_prompts_text.2"),
        (plus(bogus=torch.ones(1)), "unexpected bogus"),
        (plus(epoch=5), "unexpected epoch"),
        (plus(ctx_pos=torch.ones(1, 1, 10, 128)), r"ctx_pos is (1, 1, 10, 128), expected (1, 1, 12, 128)"),
        (plus(ctx_pos="text"), r"ctx_pos is (), expected (1, 1, 12, 128)"),
        (plus(compound_prompts_text__0=torch.ones(4, 64)), r"compound_prompts_text.0 is (4, 64), expected (4, 128)"),
        (
            plus(token_suffix_pos=torch.ones(1, 1, 64, 128)),
            r"token_suffix_pos is (1, 1, 64, 128), expected (1, 1, 27, 128)",
        ),
        (
            plus(tokenized_prompts_neg=torch.ones(1, 1, 40).int()),
            "tokenized_prompts_neg: the checkpoint's prompt ends in other words",
        ),
        (
            plus(token_prefix_pos=torch.ones(1, 1, 1, 128)),
            "token_prefix_pos: the checkpoint was trained with another text tower",
        ),
        (lambda s: {}, "missing ctx_pos"),
        (lambda s: {"tokens": torch.ones(2, 3)}, "missing ctx_pos; missing ctx_neg"),
    ],
)
def test_import_that_does_not_fit(text, change, word):
    p = ObjectPrompts(text)
    before = p.context.detach().clone()
    with pytest.raises(WeightsError) as caught:
        import_prompts(p, change(released(p)))
    assert word in str(caught.value) and torch.equal(p.context, before), "refused as a whole"


def test_import_onto_another_tower(text):
    state = released(ObjectPrompts(text))
    other = ObjectPrompts(create_text("tiny-clip", "random:9"))
    with pytest.raises(
        WeightsError,
        match=r"token_prefix_pos: .*another text tower than tiny-clip \(weights='random:9'\).*verify=False",
    ):
        import_prompts(other, state)
    assert torch.equal(import_prompts(other, state, verify=False).context[1].data, state["ctx_neg"][0, 0])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["mvtec_default", "mvtec_woDattn", "visa_default", "visa_woDattn"])
def test_real_checkpoints(shared, name):
    "Crane's own prompts, on a thin tower that has the token embeddings the file says they were trained with."
    path = shared / "checkpoints" / "crane" / f"trained_on_{name}_epoch_5.pth"
    if not path.is_file():
        pytest.skip(f"no checkpoint at {path}")
    state = read_state(path)
    from open_clip.transformer import QuickGELU, TextTransformer

    inner = state["prompt_learner"]
    rows = vocabulary(["X damaged object."])
    torch.manual_seed(0)
    tower = TextTransformer(
        vocab_size=len(rows) + 1, width=768, heads=12, layers=9, mlp_ratio=1 / 12, output_dim=768, act_layer=QuickGELU
    )
    tower.register_buffer("token_ids", torch.cat([rows, torch.tensor([UNKNOWN])]))
    with torch.no_grad():
        for s in ("pos", "neg"):
            ids = inner[f"tokenized_prompts_{s}"][0, 0].long()
            words = torch.cat(
                [inner[f"token_prefix_{s}"][0, 0], torch.zeros(12, 768), inner[f"token_suffix_{s}"][0, 0]]
            )
            for i in (0, *range(13, 77)):
                tower.token_embedding.weight[rows.tolist().index(ids[i].item())] = words[i]
    text = TextTower(BackboneRow("thin", "open_clip", "", "", 14, 518, (), "ours"), tower)
    p = import_prompts(ObjectPrompts(text), state)
    assert (
        p.deep.shape == (8, 4, 768)
        and torch.equal(p.context[0].data, inner["ctx_pos"][0, 0])
        and torch.equal(p.deep[7].data, inner["compound_prompts_text.7"])
    )
    normal, abnormal = F.normalize(p.features(), dim=1)
    assert normal.isfinite().all() and normal @ abnormal < 0.999
    with torch.no_grad():
        tower.token_embedding.weight[rows.tolist().index(END)] += 0.01
    with pytest.raises(WeightsError, match="token_suffix_pos: the checkpoint was trained with another text tower"):
        import_prompts(p, state)


# ----------------------------------------------------------------------------------------------------- the papers' numbers (fixtures)


def fixture_tower(tensors: dict, meta: dict, folder: Path) -> TextTower:
    cfg = meta["cfg"]
    table = torch.zeros(cfg["vocab"], cfg["text_width"])
    table[tensors["clip_sparse.token_embedding.ids"]] = tensors["clip_sparse.token_embedding.rows"]
    state = {k.removeprefix("clip."): v for k, v in tensors.items() if k.startswith("clip.")} | {
        "token_embedding.weight": table
    }
    tower = create_text(
        "clip",
        put(state, folder / f"{meta['fixture']}.safetensors"),
        quick_gelu="exact" not in cfg.get("activation", ""),
    )
    assert (tower.width, tower.depth, tower.context, tower.embed_dim) == tuple(
        cfg[k] for k in ("text_width", "text_layers", "context", "embed_dim")
    )
    assert tower.tower.transformer.resblocks[0].attn.num_heads == cfg["text_heads"]
    return tower


def fixture_prompts(tensors: dict, meta: dict, tower: TextTower, deep_half: bool) -> ObjectPrompts:
    cfg = meta["cfg"]
    p = ObjectPrompts(tower, cfg["n_ctx"], deep_tokens=cfg["t_n_ctx"], deep_sets=cfg["depth"] - 1, deep_half=deep_half)
    return import_prompts(p, {k.removeprefix("ckpt."): v for k, v in tensors.items() if k.startswith("ckpt.")})


@pytest.fixture(scope="module")
def read(parity_fixture, tmp_path_factory):
    "name -> (tensors, meta, build(deep_half) -> prompts, tolerances)"

    @functools.cache
    def case(name):
        tensors, meta = parity_fixture(name)
        tower = fixture_tower(tensors, meta, tmp_path_factory.mktemp(name))
        return (
            tensors,
            meta,
            lambda half=True: fixture_prompts(tensors, meta, tower, half),
            meta["tolerances_measured"]["suggested_absolute_tolerances"],
        )

    return case


RUNS = [("anomalyclip", ""), ("crane", "base."), ("crane", "plus.")]


def check_gradients(p: ObjectPrompts, tensors: dict, prefix: str, context: float, deep: float):
    stored = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    got = {
        "ctx_pos": p.context.grad[0],
        "ctx_neg": p.context.grad[1],
        **{f"compound_prompts_text.{i}": g for i, g in enumerate(p.deep.grad)},
    }
    assert set(stored) == set(got)
    for name, expected in stored.items():
        assert (
            largest(got[name].flatten(), expected.flatten())
            < (context if name.startswith("ctx") else deep) * expected.abs().max().item()
        ), name


def focal(p, g):
    hot = torch.stack([1 - g, g], 1).clamp(1e-5, 1 - 1e-5)
    pt = (hot * p).sum(1) + 1e-5
    return (-((1 - pt) ** 2) * pt.log()).mean()


def dice(p, g):
    return 1 - ((2 * (p * g).sum((1, 2)) + 1) / (p.sum((1, 2)) + g.sum((1, 2)) + 1)).mean()


@pytest.mark.parity
@pytest.mark.parametrize("name, prefix", RUNS)
def test_prompt_rows(read, name, prefix):
    tensors, meta, build, tolerance = read(name)
    p = build()
    rows, end = p.embeddings()
    assert torch.equal(p.ids, tensors[f"{prefix}out.tokenized_prompts"]) and torch.equal(end, p.ids.argmax(1))
    assert largest(rows, tensors[f"{prefix}out.prompt_embeddings"]) == 0


@pytest.mark.parity
@pytest.mark.parametrize("name, prefix", RUNS)
def test_text_features(read, name, prefix):
    tensors, meta, build, tolerance = read(name)
    assert (
        largest(F.normalize(build().features(), dim=1), tensors[f"{prefix}out.text_features"][0])
        < tolerance["features"]
    )


@pytest.mark.parity
def test_text_features_with_and_without_the_cast(read):
    tensors, meta, build, tolerance = read("anomalyclip")
    assert largest(build()(), tensors["out.text_features_raw"]) < tolerance["features"]
    exact, cast = (
        largest(F.normalize(build(half).features(), dim=1), tensors["nohalf.out.text_features"][0])
        for half in (False, True)
    )
    assert exact < tolerance["features"] and exact < cast, "without the cast the numbers without it must be nearer"


@pytest.mark.parity
@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
def test_anomalyclip_losses_and_gradients(read, half):
    "The text side of a training step, on the stored image features."
    tensors, meta, build, tolerance = read("anomalyclip")
    p = build(half)
    side = meta["cfg"]["patches_per_side"]
    g = tensors["in.masks"].float()
    prefix = "" if half else "nohalf."
    t = F.normalize(p(), dim=1)

    def logits(x):
        return F.normalize(x, dim=-1) @ t.T / meta["cfg"]["temperature"]

    ce = F.cross_entropy(logits(tensors["out.image_features_raw"]), tensors["in.labels"].long())
    local = 0
    for layer in meta["cfg"]["features_list_1based"]:
        share = (
            logits(tensors[f"out.layer_{layer}.patch_features_raw"][:, 1:])
            .softmax(-1)
            .transpose(1, 2)
            .unflatten(2, (side, side))
        )
        share = F.interpolate(share, g.shape[-2:], mode="bilinear", align_corners=False)
        local = local + focal(share, g) + dice(share[:, 1], g) + dice(share[:, 0], 1 - g)
    (total := meta["cfg"]["lambda_local"] * local + ce).backward()
    assert (
        largest(ce, tensors[f"{prefix}loss.image_ce"]) < tolerance["losses"]
        and largest(total, tensors[f"{prefix}loss.total"]) < tolerance["losses"]
    )
    if half:
        check_gradients(
            p,
            tensors,
            "grad.",
            tolerance["gradients ctx (relative)"],
            tolerance["gradients compound_prompts_text (relative)"],
        )
    else:
        check_gradients(p, tensors, "nohalf.grad.", *[tolerance["nohalf gradients (relative)"]] * 2)


def crane_image_logits(patches: list, cls, t):
    "t (B, 2, C) or (2, C), normalised; cosines of the pooled image feature, before any temperature."
    t = t.expand(len(cls), 2, -1)
    unit = [F.normalize(f, dim=-1) for f in patches]
    per = [f @ t.transpose(1, 2) / 0.07 for f in unit]
    weight = (sum(per) / len(per)).softmax(-1)[..., 1:]
    pooled = F.normalize((weight * (sum(unit) / len(unit))).sum(1), dim=-1)
    image = F.normalize(0.5 * pooled + 0.5 * F.normalize(cls, dim=-1), dim=-1)
    return per, (t @ image[..., None])[..., 0]


def crane_patches(tensors, meta, m):
    if m == "base":
        return [tensors["base.out.feature_0.patch_features_raw"]] * len(meta["cfg"]["base"]["features_list"])
    return [
        v for k, v in sorted(tensors.items()) if k.startswith("plus.out.feature_") and k.endswith(".patch_features_raw")
    ]


@pytest.mark.parity
@pytest.mark.parametrize("m", ["base", "plus"])
def test_crane_with_the_image_in_the_prompt(read, m):
    tensors, meta, build, tolerance = read("crane")
    p = build()
    cls = tensors[f"{m}.out.image_features_raw"]
    rows, end = p.embeddings(cls)
    assert (
        largest(rows.flatten(0, 1), tensors[f"{m}.train.prompt_embeddings"].transpose(0, 1).flatten(0, 1))
        < tolerance["features"]
    )
    assert torch.equal(end, p.ids.argmax(1)[None].expand(len(cls), 2) + 1)
    assert torch.equal(end, tensors[f"{m}.train.tokenized_prompts"].argmax(-1).T)
    t = F.normalize(p.features(cls), dim=-1)
    assert largest(t, tensors[f"{m}.train.text_features"]) < tolerance["features"]
    _, cosines = crane_image_logits(crane_patches(tensors, meta, m), cls, t)
    assert largest((cosines / 0.07).softmax(-1)[:, 1], tensors[f"{m}.context.image_score"]) < tolerance["image score"]
    _, cosines = crane_image_logits(crane_patches(tensors, meta, m), cls, F.normalize(p.features(), dim=-1))
    assert largest((cosines / 0.07).softmax(-1)[:, 1], meta["scalars"][m]["image_score"]) < tolerance["image score"]


@pytest.mark.parity
@pytest.mark.parametrize("m", ["base", "plus"])
def test_crane_losses_and_gradients(read, m):
    tensors, meta, build, tolerance = read("crane")
    p = build()
    cls = tensors[f"{m}.out.image_features_raw"]
    side = meta["cfg"]["patches_per_side"]
    g = tensors["in.masks"].float()
    per, cosines = crane_image_logits(crane_patches(tensors, meta, m), cls, F.normalize(p(cls), dim=-1))
    ce = F.cross_entropy(cosines / 0.01, tensors["in.labels"].long())
    local = 0
    for logits in per:
        share = F.interpolate(
            logits.softmax(-1).transpose(1, 2).unflatten(2, (side, side)), g.shape[-2:], mode="nearest"
        )
        local = local + focal(share, g) + dice((1 - share[:, 0] + share[:, 1]) / 2, g)
    (total := 2 * local + 0.2 * ce).backward()
    assert (
        largest(ce, tensors[f"{m}.train.loss.image_ce"]) < tolerance["losses"]
        and largest(total, tensors[f"{m}.train.loss.total"]) < tolerance["losses"]
    )
    check_gradients(
        p,
        tensors,
        f"{m}.train.grad.",
        tolerance["gradients ctx (relative)"],
        tolerance["gradients compound_prompts_text (relative)"],
    )


@pytest.mark.parity
@torch.no_grad()
def test_winclip_ensemble(parity_fixture, tmp_path):
    tensors, meta = parity_fixture("winclip")
    tower = fixture_tower(tensors, meta, tmp_path)
    name = meta["cfg"]["class_name"]
    tolerance = meta["tolerances_measured"]["suggested_absolute_tolerances"]["embeddings"]
    for row, s in enumerate(("normal", "abnormal")):
        said = sentences(name, WINCLIP_STATES[s], ANOMALIB_TEMPLATES)
        assert len(said) == meta["cfg"][f"n_{s}_prompts"]
        assert sorted(tower.tokenize(said).tolist()) == sorted(tensors[f"out.tokens_{s}"].tolist())
        ids = tensors[f"out.tokens_{s}"]
        assert largest(tower(tower.embed(ids), ids.argmax(1)), tensors[f"out.prompt_embeddings_{s}"]) < tolerance
        found = ensemble(tower, name, WINCLIP_STATES[s], ANOMALIB_TEMPLATES, normalise_each=False)
        assert largest(found, F.normalize(tensors["out.text_embeddings"][row], dim=0)) < tolerance


# ------------------------------------------------------------------------------------------------------------- what the embedded pair knows


@pytest.mark.slow
def test_the_embedded_pair_tells_damaged_from_flawless():
    "Two sentences, nothing trained: new images of the pretraining's categories and defects. Its model card says 79.0."
    tower = create_backbone("tiny-clip")
    words = create_text("tiny-clip")
    pair = F.normalize(words.encode(["a photo of a flawless object", "a photo of a damaged object"]), dim=-1)
    kinds = defects("pretrain", version=2)
    scores, anomalous = [], []
    for i, category in enumerate(categories("pretrain", version=2)):
        shown = [None, kinds[i % len(kinds)], None, kinds[(i + 5) % len(kinds)]]
        samples = [render(category, 900_000 + k, 256, defect) for k, defect in enumerate(shown)]
        images = torch.stack([torch.from_numpy(s.image) for s in samples]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            seen = F.normalize(joint(tower, dual_path(tower, images, (tower.depth,), 0).cls), dim=-1)
        scores += (seen @ (pair[1] - pair[0])).tolist()
        anomalous += [s.defect is not None for s in samples]
    found = image_metrics(torch.tensor(scores).numpy(), anomalous)["image_auroc"]
    print(f"image AUROC {found:.3f} of {len(scores)} images")
    assert found > 0.7
