"Refined paths, D-Attn, pooling, maps and scores of the anomalyclip and crane fixtures, with their stored text features."

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from zsad_nb.backbones.prompts import import_prompts
from zsad_nb.backbones.table import IMAGENET
from zsad_nb.backbones.towers import create_backbone
from zsad_nb.components.dma import similarity_attention
from zsad_nb.components.dual_path import dual_path, joint, values_to_joint
from zsad_nb.components.losses import dice, focal
from zsad_nb.components.maps import to_pixels
from zsad_nb.components.sap import image_feature, pool, pooling_weights
from zsad_nb.data.images import Batch
from zsad_nb.methods import dma_sap  # noqa: F401 (registered by its import)
from zsad_nb.methods.base import create

pytestmark = pytest.mark.parity
TAU = 0.07


def difference(a, b):
    return (a.detach().double() - torch.as_tensor(b).double()).abs().max().item()


def towers(tensors, cfg, folder):
    "The fixture's image towers through the public API, its images as RGB in [0, 1] and the tolerances."
    save_file(
        {k.removeprefix("clip."): v.contiguous() for k, v in tensors.items() if k.startswith("clip.")},
        folder / "clip.safetensors",
    )
    clip = create_backbone("clip", str(folder / "clip.safetensors"), size=cfg["image_size"])
    dino = None
    if "dino" in cfg:
        save_file(
            {k.removeprefix("dino."): v.contiguous() for k, v in tensors.items() if k.startswith("dino.")},
            folder / "dino.safetensors",
        )
        dino = create_backbone("vit", str(folder / "dino.safetensors"), size=cfg["image_size"])
        for own, name in ((dino.mean, "mean"), (dino.std, "std")):
            own.copy_(
                torch.tensor(IMAGENET[name]).view(1, 3, 1, 1)
            )  # the generic "vit" does not know what it was trained with
    return clip, dino, tensors["in.batch"] * clip.std + clip.mean


def load(parity_fixture, tmp_path_factory, name):
    tensors, meta = parity_fixture(name)
    return (
        tensors,
        meta,
        meta["cfg"],
        *towers(tensors, meta["cfg"], tmp_path_factory.mktemp(name)),
        meta["tolerances_measured"]["suggested_absolute_tolerances"],
    )


@pytest.fixture(scope="module")
def anomalyclip(parity_fixture, tmp_path_factory):
    return load(parity_fixture, tmp_path_factory, "anomalyclip")


@pytest.fixture(scope="module")
def crane(parity_fixture, tmp_path_factory):
    return load(parity_fixture, tmp_path_factory, "crane")


def logits(features, text):
    "Cosines to (normal, abnormal) over the temperature: (B, ..., 2)."
    return F.normalize(features, dim=-1) @ F.normalize(text, dim=-1).T / TAU


def grids(values, grid):
    return values.transpose(1, 2).unflatten(2, tuple(grid))  # (B, N, K) -> (B, K, h, w)


# ----------------------------------------------------------------------------------------------------------------------- AnomalyCLIP


def seen_by_anomalyclip(case):
    tensors, meta, cfg, clip, _, image, tolerance = case
    with torch.no_grad():
        return dual_path(clip, image, tuple(cfg["features_list_1based"]), len(cfg["dual_path_blocks_1based"]), "vv")


def test_sizes_are_the_fixtures(anomalyclip, crane):
    for _, _, cfg, clip, _, image, _ in (anomalyclip, crane):
        assert (clip.width, clip.depth, clip.patch, clip.tower.proj.shape[1]) == (
            cfg["vit_width"],
            cfg["vit_layers"],
            cfg["patch"],
            cfg["embed_dim"],
        )
        assert [b.attn.num_heads for b in clip._blocks(clip.tower)] == [cfg["vit_heads"]] * cfg[
            "vit_layers"
        ] and image.shape == (cfg["batch"], 3, cfg["image_size"], cfg["image_size"])
        assert cfg["dual_path_blocks_1based"][-1] == clip.depth


def test_vv_path(anomalyclip):
    tensors, meta, cfg, clip, _, image, tolerance = anomalyclip
    seen = seen_by_anomalyclip(anomalyclip)
    first = cfg["dual_path_blocks_1based"][0]
    assert seen.grid == (cfg["patches_per_side"],) * 2
    for tap, tokens, plain in zip(cfg["features_list_1based"], seen.layers, seen.plain):
        assert (
            difference(joint(clip, tokens), tensors[f"out.layer_{tap}.patch_features_raw"]) < tolerance["features"]
        ), tap
        assert torch.equal(tokens, plain) == (tap < first), "before the dual blocks there is one path, after that two"
    assert difference(joint(clip, seen.cls, post_norm=False), tensors["out.image_features_raw"]) < tolerance["features"]
    assert difference(joint(clip, seen.cls), tensors["out.image_features_raw"]) > 100 * tolerance["features"], (
        "with and without ln_post must differ, or this test shows nothing"
    )


def test_vv_maps_and_score(anomalyclip):
    tensors, meta, cfg, clip, _, image, tolerance = anomalyclip
    seen = seen_by_anomalyclip(anomalyclip)
    size = cfg["image_size"]
    text = tensors["out.text_features"][0]
    maps = []
    for tap, tokens in zip(cfg["features_list_1based"], seen.layers):
        p = grids(logits(joint(clip, tokens[:, 1:]), text).softmax(-1), seen.grid)
        maps.append((p[:, 1] + 1 - p[:, 0]) / 2)
        assert difference(to_pixels(maps[-1], size), tensors[f"out.layer_{tap}.map"]) < tolerance["maps"]
    assert difference(to_pixels(sum(maps), size), tensors["out.fused_map"]) < tolerance["maps"]
    assert difference(to_pixels(sum(maps), size, cfg["sigma"]), tensors["out.smoothed_map"]) < tolerance["maps"]
    assert (
        difference(to_pixels(maps[-1], size, cfg["sigma"]), tensors["out.smoothed_map_last_layer_only"])
        < tolerance["maps"]
    )
    score = logits(joint(clip, seen.cls, post_norm=False), text).softmax(-1)[:, 1]
    assert difference(score, tensors["out.image_score"]) < tolerance["image score"]
    assert difference(score, meta["scalars"]["image_score"]) < tolerance["image score"]


def test_other_attention_is_not_the_same(anomalyclip):
    tensors, meta, cfg, clip, _, image, tolerance = anomalyclip
    with torch.no_grad():
        other = dual_path(clip, image, (clip.depth,), len(cfg["dual_path_blocks_1based"]), "qkv")
    assert (
        difference(joint(clip, other.layers[0]), tensors[f"out.layer_{clip.depth}.patch_features_raw"])
        > 100 * tolerance["features"]
    )


# ------------------------------------------------------------------------------------------------------------------ Crane and Crane+


def seen_by_crane(case, value_from="attended"):
    tensors, meta, cfg, clip, _, image, _ = case
    taps = tuple(cfg["base"]["features_list"])
    deep = clip.depth
    with torch.no_grad():
        return dual_path(clip, image, taps, len(cfg["dual_path_blocks_1based"]), "qkv", (deep,), value_from)


def dino_patches(case):
    tensors, meta, cfg, _, dino, image, _ = case
    with torch.no_grad():
        return dino(image.clamp(0, 1), taps=(dino.depth,), norm=True).patches[
            0
        ]  # random "images" leave [0, 1]; the reference clamps for DINO only


def d_attention(case, value_from="attended", mean="image"):
    "Crane+'s first local feature; the mean cosine of each image, or of the whole batch as released."
    tensors, meta, cfg, clip, _, _, _ = case
    patches = dino_patches(case)
    unit = F.normalize(patches, dim=-1)
    batch_mean = (unit @ unit.transpose(1, 2)).mean() if mean == "batch" else None
    with torch.no_grad():
        return values_to_joint(
            clip,
            similarity_attention(patches, mean=batch_mean) @ seen_by_crane(case, value_from).values[clip.depth],
            clip.depth,
        )


def read_crane(features, cls, text, cfg, soft_mean, grid):
    "Map before the blur, pooled feature and score out of local features (B, N, C)."
    each = torch.stack([logits(f, text) for f in features])  # (F, B, N, 2)
    mean = each.mean(0)
    weights = pooling_weights(mean[..., 1] - mean[..., 0], "class")
    pooled = pool(torch.stack([F.normalize(f, dim=-1) for f in features]).mean(0), weights, "class")

    def up(values):
        return to_pixels(grids(values, grid), cfg["image_size"])

    pixels = torch.stack([up(p) for p in each.softmax(-1)]).mean(0)[:, 1] if soft_mean else up(mean).softmax(1)[:, 1]
    return pixels, pooled, logits(image_feature(pooled, cls, 0.5), text).softmax(-1)[:, 1]


def test_e_attention(crane):
    tensors, meta, cfg, clip, _, image, tolerance = crane
    seen = seen_by_crane(crane)
    features = [joint(clip, t[:, 1:]) for t in seen.layers]
    for i, f in enumerate(features):
        assert difference(f, tensors[f"base.alt.out.feature_{i}.patch_features_raw"]) < tolerance["features"], i
    assert difference(features[-1], tensors["base.out.feature_0.patch_features_raw"]) < tolerance["features"], (
        "released: every listed layer is the last one"
    )
    assert difference(features[-1], tensors["plus.out.feature_1.patch_features_raw"]) < tolerance["features"]
    assert difference(features[0], features[-1]) > 100 * tolerance["features"]
    for name in ("base", "plus"):
        assert difference(joint(clip, seen.cls), tensors[f"{name}.out.image_features_raw"]) < tolerance["features"]


def test_base_maps_pooling_and_score(crane):
    tensors, meta, cfg, clip, _, image, tolerance = crane
    seen = seen_by_crane(crane)
    text = tensors["base.out.text_features"][0]
    size = cfg["image_size"]
    features = [joint(clip, t[:, 1:]) for t in seen.layers]
    cls = joint(clip, seen.cls)
    soft = cfg["base"]["soft_mean"]
    pixels, _, score = read_crane(features, cls, text, cfg, soft, seen.grid)
    assert difference(pixels, tensors["base.alt.out.map"]) < tolerance["maps"]
    assert difference(to_pixels(pixels, size, cfg["sigma"]), tensors["base.alt.out.smoothed_map"]) < tolerance["maps"]
    assert (
        difference(score, tensors["base.alt.out.image_score"]) < tolerance["image score"]
        and difference(score, meta["scalars"]["base"]["alt_image_score"]) < tolerance["image score"]
    )
    last = [features[-1]] * len(features)
    pixels, pooled, score = read_crane(last, cls, text, cfg, soft, seen.grid)
    assert difference(logits(features[-1], text), tensors["base.out.feature_0.logits"]) < tolerance["features"]
    assert difference(pixels, tensors["base.out.map"]) < tolerance["maps"]
    assert (
        difference(read_crane(last, cls, text, cfg, not soft, seen.grid)[0], tensors["base.out.map_other_averaging"])
        < tolerance["maps"]
    )
    assert difference(to_pixels(pixels, size, cfg["sigma"]), tensors["base.out.smoothed_map"]) < tolerance["maps"]
    assert difference(pooled, tensors["base.out.pooled_feature"]) < tolerance["features"]
    assert difference(score, tensors["base.out.image_score"]) < tolerance["image score"]


def test_dino(crane):
    tensors, meta, cfg, clip, dino, image, tolerance = crane
    patches = dino_patches(crane)
    assert (dino.width, dino.depth, dino.patch, dino.prefix_count) == (
        cfg["dino"]["width"],
        cfg["dino"]["layers"],
        cfg["dino"]["patch"],
        1 + cfg["dino"]["registers"],
    )
    assert (
        difference(grids(patches, (cfg["dino"]["grid"],) * 2), tensors["plus.out.dino_features"])
        < tolerance["features"]
    )
    unit = F.normalize(patches, dim=-1)
    mean = (unit @ unit.transpose(1, 2)).mean((1, 2))
    assert (
        difference(mean, tensors["plus.out.dino_cos_mean_per_image"]) < tolerance["features"]
        and difference(mean.mean(), tensors["plus.out.dino_cos_mean_batch"]) < tolerance["features"]
    )


def test_d_attention_as_released(crane):
    "Values after the in-place addition, mean cosine over the whole batch."
    tensors, meta, cfg, clip, _, image, tolerance = crane
    seen = seen_by_crane(crane)
    text = tensors["plus.out.text_features"][0]
    size = cfg["image_size"]
    soft = cfg["plus"]["soft_mean"]
    features = [d_attention(crane, mean="batch"), joint(clip, seen.layers[-1][:, 1:])]
    cls = joint(clip, seen.cls)
    for i, f in enumerate(features):
        assert difference(f, tensors[f"plus.out.feature_{i}.patch_features_raw"]) < tolerance["features"], i
        assert difference(logits(f, text), tensors[f"plus.out.feature_{i}.logits"]) < tolerance["features"], i
    pixels, pooled, score = read_crane(features, cls, text, cfg, soft, seen.grid)
    assert difference(pixels, tensors["plus.out.map"]) < tolerance["maps"]
    assert (
        difference(
            read_crane(features, cls, text, cfg, not soft, seen.grid)[0], tensors["plus.out.map_other_averaging"]
        )
        < tolerance["maps"]
    )
    assert difference(to_pixels(pixels, size, cfg["sigma"]), tensors["plus.out.smoothed_map"]) < tolerance["maps"]
    assert difference(pooled, tensors["plus.out.pooled_feature"]) < tolerance["features"]
    assert (
        difference(score, tensors["plus.out.image_score"]) < tolerance["image score"]
        and difference(score, meta["scalars"]["plus"]["image_score"]) < tolerance["image score"]
    )


def test_d_attention_of_each_image(crane):
    "The default: every image has its own mean, as in a batch of one."
    tensors, meta, cfg, clip, _, image, tolerance = crane
    seen = seen_by_crane(crane)
    text = tensors["plus.out.text_features"][0]
    features = [d_attention(crane), joint(clip, seen.layers[-1][:, 1:])]
    cls = joint(clip, seen.cls)
    pixels, _, score = read_crane(features, cls, text, cfg, cfg["plus"]["soft_mean"], seen.grid)
    assert difference(pixels, tensors["plus.alone.map"]) < tolerance["maps"]
    assert (
        difference(score, tensors["plus.alone.image_score"]) < tolerance["image score"]
        and difference(score, meta["scalars"]["plus"]["alone_image_score"]) < tolerance["image score"]
    )
    assert difference(pixels, tensors["plus.out.map"]) > 10 * tolerance["maps"], (
        "the two means must differ, or this test shows nothing"
    )


def test_values_of_the_block_input(crane):
    tensors, meta, cfg, clip, _, image, tolerance = crane
    seen = seen_by_crane(crane)
    text = tensors["plus.out.text_features"][0]
    size = cfg["image_size"]
    features = [d_attention(crane, "input", "batch"), joint(clip, seen.layers[-1][:, 1:])]
    cls = joint(clip, seen.cls)
    pixels, _, score = read_crane(features, cls, text, cfg, cfg["plus"]["soft_mean"], seen.grid)
    assert difference(pixels, tensors["plus.alt.out.map"]) < tolerance["maps"]
    assert difference(to_pixels(pixels, size, cfg["sigma"]), tensors["plus.alt.out.smoothed_map"]) < tolerance["maps"]
    assert (
        difference(score, tensors["plus.alt.out.image_score"]) < tolerance["image score"]
        and difference(score, meta["scalars"]["plus"]["alt_image_score"]) < tolerance["image score"]
    )


@pytest.mark.parametrize("name", ["base", "plus"])
def test_training_loss_of_stored_prompts(crane, name):
    "Focal and dice of every local feature on nearest-upsampled maps; each image has a prompt of its own in training."
    tensors, meta, cfg, clip, _, image, tolerance = crane
    seen = seen_by_crane(crane)
    text = tensors[f"{name}.train.text_features"]  # (B, 2, C)
    last = joint(clip, seen.layers[-1][:, 1:])
    cls = joint(clip, seen.cls)
    features = (
        [last] * len(cfg["base"]["features_list"]) if name == "base" else [d_attention(crane, mean="batch"), last]
    )
    each = [F.normalize(f, dim=-1) @ F.normalize(text, dim=-1).transpose(1, 2) / TAU for f in features]
    mask = tensors["in.masks"] > 0
    expected = tensors[f"{name}.train.loss.focal_dice_per_feature"]
    parts = []
    for row in each:
        p = F.interpolate(grids(row.softmax(-1), seen.grid), cfg["image_size"], mode="nearest")[:, 1]
        parts.append(torch.stack([focal(p, mask), dice(p, mask)]))
    assert difference(torch.stack(parts), expected) < tolerance["losses"]
    mean = torch.stack(each).mean(0)
    pooled = pool(
        torch.stack([F.normalize(f, dim=-1) for f in features]).mean(0),
        pooling_weights(mean[..., 1] - mean[..., 0], "class"),
        "class",
    )
    phi = image_feature(pooled, cls, 0.5)
    ce = F.cross_entropy(
        (phi.unsqueeze(1) @ F.normalize(text, dim=-1).transpose(1, 2)).squeeze(1) / 0.01, tensors["in.labels"]
    )
    assert difference(ce, tensors[f"{name}.train.loss.image_ce"]) < tolerance["losses"]
    assert (
        difference(2 * torch.stack(parts).sum() + 0.2 * ce, tensors[f"{name}.train.loss.total"]) < tolerance["losses"]
    )


# -------------------------------------------------------------------------------------------------- DMA+SAP set to what Crane+ does


@pytest.fixture(scope="module")
def as_crane(crane, tmp_path_factory):
    "DMA+SAP with one depth, theta 0, Crane's pooling and prompts: Crane+ with every image's own mean."
    tensors, meta, cfg, clip, dino, image, tolerance = crane
    folder = tmp_path_factory.mktemp("as_crane")
    state = {k.removeprefix("clip."): v.contiguous() for k, v in tensors.items() if k.startswith("clip.")}
    table = torch.zeros(cfg["vocab"], cfg["text_width"])
    table[tensors["clip_sparse.token_embedding.ids"]] = tensors["clip_sparse.token_embedding.rows"]
    save_file({**state, "token_embedding.weight": table}, folder / "clip.safetensors")
    save_file(
        {k.removeprefix("dino."): v.contiguous() for k, v in tensors.items() if k.startswith("dino.")},
        folder / "dino.safetensors",
    )

    def build(**changes):
        model = create(
            "dma_sap",
            **{
                **dict(
                    clip="clip",
                    clip_weights=str(folder / "clip.safetensors"),
                    dino="vit",
                    dino_weights=str(folder / "dino.safetensors"),
                    image_size=cfg["image_size"],
                    clip_taps=(clip.depth,),
                    dino_taps=(dino.depth,),
                    dual_blocks=len(cfg["dual_path_blocks_1based"]),
                    fusion="deep",
                    value_from="attended",
                    pooling="map",
                    sap_weights="class",
                    sigma=float(cfg["sigma"]),
                    soft_mean=cfg["plus"]["soft_mean"],
                    prompt_count=cfg["n_ctx"],
                    deep_tokens=cfg["t_n_ctx"],
                    deep_sets=cfg["depth"] - 1,
                ),
                **changes,
            },
        ).eval()
        for own, other in ((model.dino.mean, dino.mean), (model.dino.std, dino.std)):
            own.copy_(other)
        prepare = model.dino.prepare
        model.dino.prepare = lambda x: prepare(x.clamp(0, 1))
        import_prompts(
            model.prompts,
            {
                k.removeprefix("ckpt.prompt_learner."): v
                for k, v in tensors.items()
                if k.startswith("ckpt.prompt_learner.")
            },
        )
        model.prompts.deep_half = True  # as the reference casts
        return model

    n = len(image)
    return build, Batch(
        image,
        tensors["in.masks"][:, None] > 0,
        tensors["in.labels"] > 0,
        tensors["in.labels"],
        ["x"] * n,
        ["x"] * n,
        torch.ones(n, dtype=torch.bool),
    )


@pytest.mark.parametrize("project_first", [False, True])
def test_method_as_crane_plus(crane, as_crane, project_first):
    "From pixels and the checkpoint's vectors to maps and scores; the untrained projection must not change them."
    tensors, meta, cfg, clip, _, _, tolerance = crane
    build, batch = as_crane
    if project_first and cfg["dino"]["width"] > cfg["vit_width"]:
        pytest.skip("a projection to fewer dimensions cannot keep every cosine")
    model = build(project_first=project_first)
    assert difference(model.text_features(), tensors["plus.out.text_features"][0]) < tolerance["features"]
    prediction = model.predict(batch)
    assert (
        difference(prediction.map, to_pixels(tensors["plus.alone.map"], cfg["image_size"], cfg["sigma"]))
        < tolerance["maps"]
    )
    assert difference(prediction.score, tensors["plus.alone.image_score"]) < tolerance["image score"]
    assert (
        difference(build(project_first=project_first, sigma=0.0).predict(batch).map, tensors["plus.alone.map"])
        < tolerance["maps"]
    )


@pytest.mark.slow
def test_method_as_crane_plus_notices(crane, as_crane):
    "Everything that was set to get there matters."
    tensors, meta, cfg, clip, _, _, tolerance = crane
    build, batch = as_crane
    for changes in (
        dict(value_from="input"),
        dict(threshold=False),
        dict(attention="vv"),
        dict(dual_blocks=1),
        dict(self_map=False),
        dict(soft_mean=not cfg["plus"]["soft_mean"]),
        dict(sigma=0.0),
    ):
        assert (
            difference(
                build(**changes).predict(batch).map,
                to_pixels(tensors["plus.alone.map"], cfg["image_size"], cfg["sigma"]),
            )
            > 10 * tolerance["maps"]
        ), changes
    for changes in (
        dict(sap_weights="spatial"),
        dict(pooling="cls"),
        dict(pooling="sap"),
        dict(cls_weight=0.4),
        dict(tau=0.06),
    ):
        assert (
            difference(build(**changes).predict(batch).score, tensors["plus.alone.image_score"])
            > 10 * tolerance["image score"]
        ), changes
