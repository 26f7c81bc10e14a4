"Any tower by its own name: each family of both libraries with random weights, held against the library's own pass."

import pytest
import torch
from torch.testing import assert_close

from zsad_nb.backbones.table import backbone_row, open_clip_tower
from zsad_nb.backbones.towers import BeitBackbone, ClipBackbone, create_backbone
from zsad_nb.backbones.weights import import_vision_libraries

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
SHORT = dict(depth=3)  # of every family but where the name fixes it: the pass is the same block after block


@pytest.fixture
def short(monkeypatch):
    "Architectures of three blocks: their first three, of the real width, heads and options."
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: real(*args, **{**options, **SHORT}))


def of_the_library(name: str, tower, pixels: int):
    "timm's own model of that size with the same weights, resized as timm does it."
    theirs = timm.create_model(name, pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(tower.state_dict())
    theirs.set_input_size(img_size=(pixels, pixels))
    return theirs


@pytest.mark.parametrize("family", TIMM)
def test_taps_are_the_library_s_own(short, family):
    "At the size of its pretraining and at another, tap by tap, with timm's own resizing."
    name, patch, prefix, has_class = TIMM[family]
    torch.manual_seed(0)
    for grid in (4, 7):
        backbone = create_backbone(f"timm:{name}", "random:1", grid * patch, (1, 3))
        if isinstance(backbone, BeitBackbone):  # they begin as zeros
            for block in backbone.tower.blocks:
                block.attn.relative_position_bias_table.data.normal_()
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


@pytest.mark.parametrize("family", TIMM)
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


@pytest.mark.parametrize("family", TIMM)
def test_an_extra_token_is_a_token(short, family):
    "A copy of the class token gives the class token's own output; without one, the patches see the extra tokens."
    name, patch, prefix, has_class = TIMM[family]
    backbone = create_backbone(f"timm:{name}", "random:1", 4 * patch, (3,))
    if isinstance(backbone, BeitBackbone):
        for block in backbone.tower.blocks:
            block.attn.relative_position_bias_table.data.normal_()
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
