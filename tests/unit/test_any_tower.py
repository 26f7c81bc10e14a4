"Any tower by its own name: each family of both libraries with random weights, held against the library's own pass."

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from zsad_nb.backbones.features import FeatureCache, key_hash
from zsad_nb.backbones.table import backbone_row, open_clip_tower
from zsad_nb.backbones.text import create_text
from zsad_nb.backbones.towers import BeitBackbone, ClipBackbone, create_backbone
from zsad_nb.backbones.weights import import_vision_libraries
from zsad_nb.core.sessions import available
from zsad_nb.data.images import Batch
from zsad_nb.methods.base import create
from zsad_nb.runs.plans import expand
from zsad_nb.runs.sweeps import tasks_of

timm, open_clip = import_vision_libraries()

# the smallest member of each family, its patch, the tokens before its patches, and whether one of them is the image's
TIMM = {
    "SigLIP 2": ("vit_base_patch16_siglip_224.v2_webli", 16, 0, False),
    "PE-Core": ("vit_pe_core_tiny_patch16_384.fb", 16, 1, True),
    "PE-Spatial": ("vit_pe_spatial_tiny_patch16_512.fb", 16, 1, True),
    "EVA-02": ("eva02_tiny_patch14_224.mim_in22k", 14, 1, True),
    "DINOv3": ("vit_small_plus_patch16_dinov3.lvd1689m", 16, 5, True),
    "MetaCLIP": ("vit_base_patch32_clip_224.metaclip_400m", 32, 1, True),
    "BEiT": ("beit_base_patch16_224.in22k_ft_in22k", 16, 1, True),
    "BEiT v2": ("beitv2_base_patch16_224.in1k_ft_in22k", 16, 1, True),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224.fb_in1k", 16, 2, True),
    "AIMv2": ("aimv2_large_patch14_224.apple_pt", 14, 0, False),
    "mixed rotations": ("vit_small_patch16_rope_mixed_224.naver_in1k", 16, 1, True),
    "TIPS v2": ("vit_base_patch14_reg1_tipsv2.webli", 14, 2, True),
}
SHORT = dict(depth=3)  # the pass is the same, block after block
WIDE = ("SigLIP 2", "MetaCLIP", "BEiT", "BEiT v2", "AIMv2", "TIPS v2")
FAMILIES = [pytest.param(f, marks=pytest.mark.slow) if f in WIDE else f for f in TIMM]


@pytest.fixture
def short(monkeypatch):
    "Architectures of three blocks: their first three, of the real width, heads and options."
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: real(*args, **{**options, **SHORT}))


def give_bias(backbone):
    "BEiT's tables of relative positions begin as zeros."
    if isinstance(backbone, BeitBackbone):
        for block in backbone.tower.blocks:
            block.attn.relative_position_bias_table.data.normal_()


def of_the_library(name: str, tower, pixels: int):
    "timm's own model of that size with the same weights, resized as timm does it."
    theirs = timm.create_model(name, pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(tower.state_dict())
    theirs.set_input_size(img_size=(pixels, pixels))
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_library_s_own(short, family):
    "At the size of its pretraining and at another, tap by tap, with timm's own resizing."
    name, patch, prefix, has_class = TIMM[family]
    torch.manual_seed(0)
    for grid in (4, 7):
        backbone = create_backbone(f"timm:{name}", "random:1", grid * patch, (1, 3))
        give_bias(backbone)
        assert (backbone.patch, backbone.prefix_count, backbone.has_class_token) == (patch, prefix, has_class)
        image = torch.rand(2, 3, backbone.size, backbone.size)
        theirs = of_the_library(name, backbone.tower, backbone.size)
        with torch.inference_mode():
            ours = backbone(image)
            expected = theirs.forward_intermediates(
                backbone.prepare(image), indices=[0, 2], output_fmt="NLC", intermediates_only=True
            )
        assert ours.grid == (grid, grid)
        for a, b in zip(ours.patches, expected):
            assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_normalisation_and_pooling_are_the_library_s(short, family):
    "Mean and deviation of the library's list; what stands for the image where there is no class token."
    name, patch, prefix, has_class = TIMM[family]
    row = backbone_row(f"timm:{name}")
    config = timm.get_pretrained_cfg(name)
    assert row.norm == dict(mean=config.mean, std=config.std) and row.hub == config.hf_hub_id
    assert row.size == config.input_size[-1] and row.name == f"timm:{name}"
    backbone = create_backbone(row.name, "random:1", 4 * patch)
    image = torch.rand(1, 3, backbone.size, backbone.size)
    assert_close(
        backbone.prepare(image)[0, :, 0, 0], (image[0, :, 0, 0] - torch.tensor(config.mean)) / torch.tensor(config.std)
    )
    theirs = of_the_library(name, backbone.tower, backbone.size)
    with torch.inference_mode():
        cls = backbone(image).cls
        last = theirs.forward_features(backbone.prepare(image))
        if has_class:
            expected = last[:, 0] if isinstance(theirs.fc_norm, torch.nn.Identity) else theirs.fc_norm(last[:, 0])
        else:
            expected = theirs.pool(last)
    assert_close(cls, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extra_token_is_a_token(short, family):
    "A copy of the class token gives the class token's own output; without one, the patches see the extra tokens."
    name, patch, prefix, has_class = TIMM[family]
    backbone = create_backbone(f"timm:{name}", "random:1", 4 * patch, (3,))
    give_bias(backbone)
    image = torch.rand(1, 3, backbone.size, backbone.size)
    tokens = backbone._positions((4, 4))[0][:1] if has_class else torch.randn(1, backbone.width)
    with torch.inference_mode():
        with_extra = backbone(image, extra=tokens)
        without = backbone(image)
    assert with_extra.prefix[0].shape == (1, 1 + prefix, backbone.width)
    assert with_extra.patches[0].shape == without.patches[0].shape
    assert not torch.equal(with_extra.patches[0], without.patches[0])
    if has_class:
        assert_close(with_extra.prefix[0][:, 0], with_extra.prefix[0][:, 1], atol=2e-5, rtol=1e-4)


OPEN_CLIP = (
    "ViT-B-32/metaclip_400m",
    "ViT-B-16-SigLIP2/webli",
    "PE-Core-T-16-384/meta",
    "EVA02-B-16/merged2b_s8b_b131k",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_s_image_towers(name):
    "Taps, grid at any size and normalisation of open_clip's list; weights under open_clip's own names."
    row = backbone_row(f"open_clip:{name}")
    model, _, tag = name.partition("/")
    config = open_clip.pretrained.get_pretrained_cfg(model, tag)
    assert row.norm == dict(mean=config["mean"], std=config["std"]) and row.hub == config["hf_hub"].rstrip("/")
    size = 3 * row.patch
    backbone = create_backbone(row.name, "random:1", size, (1, 12))
    image = torch.rand(1, 3, size, size)
    theirs = open_clip_tower(model, config.get("quick_gelu", False)).eval()
    with torch.inference_mode():
        ours = backbone(image)
        if isinstance(backbone, ClipBackbone):
            theirs.load_state_dict(backbone.tower.state_dict())
            tokens = backbone.embed(image)[0]
            expected = [t[:, 1:] for t in theirs.transformer.forward_intermediates(tokens, indices=[0, 11])[1]]
        else:
            theirs.trunk.load_state_dict(backbone.tower.state_dict())
            theirs.set_input_size(size)
            expected = theirs.forward_intermediates(
                backbone.prepare(image), indices=[0, 11], output_fmt="NLC", intermediates_only=True
            )["image_intermediates"]
    assert ours.grid == (3, 3)
    for a, b in zip(ours.patches, expected):
        assert_close(a, b, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- in methods


def pictures(size: int, count: int = 2) -> Batch:
    torch.manual_seed(3)
    return Batch(
        image=torch.rand(count, 3, size, size),
        mask=torch.zeros(count, 1, size, size, dtype=torch.bool),
        anomalous=torch.tensor([False, True] * (count // 2)),
        defect=torch.zeros(count, dtype=torch.long),
        category=["screw"] * count,
        path=[f"{i}.png" for i in range(count)],
        has_mask=torch.ones(count, dtype=torch.bool),
    )


INSIDE = ("SigLIP 2", "PE-Core", "EVA-02", "BEiT", "DeiT distilled", "mixed rotations")


@pytest.mark.parametrize("family", INSIDE)
def test_visualad_s_tokens_inside(short, family):
    "A map of its image's size, one pass, gradients through every block to both tokens."
    name, patch, _, _ = TIMM[family]
    method = create("visualad", backbone=f"timm:{name}", weights="random:0", image_size=4 * patch, taps=(1, 3))
    batch = pictures(4 * patch)
    found = method.predict(batch)
    assert found.map.shape == (2, 4 * patch, 4 * patch) and found.map.isfinite().all()
    method.train()
    method.loss(method(None, batch), batch)["total"].backward()
    assert (method.tokens.grad.abs().sum(1) > 0).all()


def test_the_cache_knows_the_towers_apart(short, tmp_path):
    "Each family's features under a key of its own, with name, hash and size; the second time they are read."
    keys = []
    for family in INSIDE:
        name, patch, _, _ = TIMM[family]
        method = create("self_distance", backbone=f"timm:{name}", weights="random:0", image_size=4 * patch)
        cache = FeatureCache(tmp_path)
        batch = pictures(4 * patch)
        first = method.predict(batch, cache).map
        assert (cache.hits, cache.misses) == (0, 2)
        assert torch.equal(method.predict(batch, cache).map, first) and cache.hits == 2
        towers = method.encode_key()["towers"]["backbone"]
        assert towers["name"] == f"timm:{name}" and towers["hash"] == method.backbone.hash
        keys.append(key_hash(method.encode_key()))
    assert len(set(keys)) == len(INSIDE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_run_them(short, tmp_path, engine):
    if not available(engine):
        pytest.skip(f"needs {engine}")
    for family in ("SigLIP 2", "EVA-02", "BEiT"):
        name, patch, _, _ = TIMM[family]
        method = create("self_distance", backbone=f"timm:{name}", weights="random:0", image_size=4 * patch)
        give_bias(method.backbone)
        batch = pictures(4 * patch)
        expected = method.predict(batch).map
        found = method.use_engine(engine, folder=tmp_path).predict(batch).map
        assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_what_a_method_lacks_is_named(short):
    "In one sentence, before anything is downloaded, and with what would serve."
    for family, words in (
        (
            "AIMv2",
            "ends in RmsNorm, and visualad trains a copy of the tower's last LayerNorm; use a tower that has one",
        ),
        ("PE-Spatial", "ends in Identity, and visualad trains a copy"),
    ):
        with pytest.raises(ValueError, match=words):
            create("visualad", backbone=f"timm:{TIMM[family][0]}", weights="random:0", taps=(1,))
    with pytest.raises(ValueError, match="siglip.* has no class token, which SSVP adds .* use a second tower that has"):
        create("ssvp", dino="timm:vit_base_patch16_siglip_224", dino_weights="random:0")
    for clip, words in (
        ("open_clip:ViT-B-16-SigLIP2/webli", "it pools by attention.* open_clip:ViT-B-16/metaclip_400m"),
        ("open_clip:EVA02-B-16/merged2b_s8b_b131k", "goes through a layer with a bias"),
        ("open_clip:RN50/openai", "which has no grid of patch tokens"),
        ("timm:vit_base_patch16_siglip_224", "has no text tower; those that have one: .*open_clip:NAME/TAG"),
    ):
        with pytest.raises(ValueError, match=words):
            create("winclip", clip=clip)


@pytest.mark.slow
def test_words_of_another_clip():
    "MetaCLIP in a method of words: QuickGELU as its weights were trained, and open_clip's own text vectors."
    name = "open_clip:ViT-B-32/metaclip_400m"
    text = create_text(name, "random:0")
    theirs = open_clip.create_model("ViT-B-32", pretrained=None, force_quick_gelu=True, load_weights=False).eval()
    assert not set(text.tower.state_dict()) - set(theirs.state_dict())
    theirs.load_state_dict(text.tower.state_dict(), strict=False)
    sentences = ["a photo of a screw.", "a photo of a damaged screw."]
    with torch.inference_mode():
        expected = theirs.encode_text(open_clip.get_tokenizer("ViT-B-32")(sentences))
        assert_close(text.encode(sentences), expected, atol=1e-5, rtol=1e-4)
    method = create("winclip", clip=name, clip_weights="random:0", image_size=96)
    found = method.predict(pictures(96))
    assert method.clip.quick_gelu and found.map.shape == (2, 96, 96) and found.score.isfinite().all()


NO_GRID = "which has no grid of patch tokens that all its blocks keep"
OTHER = "use a plain vision transformer, such as timm:vit_small_patch16_dinov3 or open_clip:ViT-B-16/metaclip_400m"
NO_MATRIX = "has no matrix that takes class token and patches into the space shared with text"
ANOTHER_CLIP = "use another CLIP, such as clip-vitb16 or open_clip:ViT-B-16/metaclip_400m"
CONVOLUTIONS = "makes its tokens with a convolutional network instead of cutting patches"
READ_MORE = "whose blocks read more than tokens and positions"
TOKENISER = "which needs another library \\(transformers\\); for words use another CLIP, such as open_clip:ViT-B-16"
REFUSED = [  # method, parameter, name, what is missing, what would serve
    ("winclip", "clip", "open_clip:RN50/openai", f"is a ModifiedResNet, {NO_GRID}", OTHER),
    ("winclip", "clip", "open_clip:convnext_base/laion400m_s13b_b51k", f"is a ConvNeXt, {NO_GRID}", OTHER),
    ("winclip", "clip", "open_clip:swin_base_patch4_window7_224", f"is a SwinTransformer, {NO_GRID}", OTHER),
    ("winclip", "clip", "open_clip:MobileCLIP-S1/datacompdr", f"is a FastVit, {NO_GRID}", OTHER),
    ("winclip", "clip", "open_clip:MobileCLIP-B/datacompdr", CONVOLUTIONS, OTHER),
    ("winclip", "clip", "open_clip:coca_ViT-B-32/laion2b_s13b_b90k", r"pools its tokens .* \(CoCa\)", OTHER),
    ("winclip", "clip", "open_clip:ViT-B-16-SigLIP2/webli", rf"{NO_MATRIX} \(it pools by attention\)", ANOTHER_CLIP),
    ("winclip", "clip", "open_clip:vit_medium_patch16_gap_256", rf"{NO_MATRIX} \(it pools the mean", ANOTHER_CLIP),
    ("winclip", "clip", "open_clip:EVA02-B-16/merged2b_s8b_b131k", rf"{NO_MATRIX} \(its class token", ANOTHER_CLIP),
    ("winclip", "clip", "open_clip:roberta-ViT-B-32/laion2b_s12b_b32k", "text tower .* is roberta-base,", TOKENISER),
    ("winclip", "clip", "open_clip:nllb-clip-base/v1", "text tower .* is facebook/nllb-200", TOKENISER),
    ("winclip", "clip", "open_clip:ViT-B-16/metaclip", "no weights 'metaclip' of ViT-B-16", "it has openai, "),
    ("winclip", "clip", "open_clip:ViT-B16/openai", "has no model 'ViT-B16'", "nearest: ViT-B-16, "),
    (
        "winclip",
        "clip",
        "timm:vit_base_patch16_siglip_224",
        "has no text tower",
        "those that have one: clip-vitl14-336",
    ),
    ("winclip", "clip", "dinov3-vits16", "has no text tower", "those that have one: clip-vitl14-336"),
    ("winclip", "clip", "clip-vitl14-337", "unknown backbone", "nearest: clip-vitl14-336"),
    ("winclip", "clip", "ViT-B-16", "unknown backbone", "write open_clip:ViT-B-16/TAG"),
    ("visualad", "backbone", "vit_small_patch16_dinov3", "unknown backbone", "write timm:vit_small_patch16_dinov3"),
    ("visualad", "backbone", "timm:resnet50", f"is a ResNet, {NO_GRID}", OTHER),
    ("visualad", "backbone", "timm:swin_tiny_patch4_window7_224", f"is a SwinTransformer, {NO_GRID}", OTHER),
    ("visualad", "backbone", "timm:hiera_tiny_224", f"is a Hiera, {READ_MORE}", OTHER),
    ("visualad", "backbone", "timm:vit_relpos_small_patch16_224", f"is a VisionTransformerRelPos, {READ_MORE}", OTHER),
    ("visualad", "backbone", "timm:vit_base_r50_s16_224", CONVOLUTIONS, OTHER),
    ("visualad", "backbone", "timm:vit_base_patch16_siglp_224", "has no model", "nearest: vit_base_patch16_siglip_224"),
    ("visualad", "backbone", "timm:dinov3", "has no model 'dinov3'", "nearest: vit_7b_patch16_dinov3, "),
    ("visualad", "backbone", "timm:vit_small_patch14_dinov2.v3", "no weights 'v3'", "it has lvd142m"),
    (
        "ssvp",
        "dino",
        "timm:vit_base_patch16_siglip_224",
        "has no class token",
        "such as dinov3-vits16 or .*hsvs='none'",
    ),
]


@pytest.mark.parametrize("method, role, name, missing, instead", REFUSED, ids=[f"{r[1]}={r[2]}" for r in REFUSED])
def test_a_refusal_says_what_is_missing_and_what_would_serve(monkeypatch, method, role, name, missing, instead):
    "One sentence, whichever family; nothing is downloaded, for the hub would be asked at an address where nobody is."
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    weights = {"clip": "clip_weights", "dino": "dino_weights", "backbone": "weights"}[role]
    towers = {role: name, weights: "random:0"} | (dict(clip="tiny-clip") if role == "dino" else {})
    with pytest.raises(ValueError, match=f"{missing}.*{instead}") as refused:
        create(method, **towers)
    assert re.split("[:/.]", name.partition(":")[2] or name)[0] in str(refused.value) and "\n" not in str(refused.value)


def test_a_sweep_calls_a_tower_by_its_whole_name():
    "The slash in open_clip:NAME/TAG is none of a path."
    specs = expand(Path(__file__).parents[2] / "nbs/experiments/sweeps/towers.yaml", dict(DATA="DATA"))
    labels = [task.label for task in tasks_of(specs)]
    assert any(" backbone=open_clip:ViT-L-14-quickgelu/metaclip_fullcc" in label for label in labels), labels[7]
    assert any(" data=visa root=visa " in label for label in labels)
