"Every stored output, loss and gradient of the visualad fixture, loaded through the public API."

import pytest
import torch
from safetensors.torch import save_file

from zsad_nb.components.maps import to_pixels
from zsad_nb.data.images import Batch
from zsad_nb.methods.base import create
from zsad_nb.methods.visualad import import_released, released_names

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def case(parity_fixture, tmp_path_factory):
    tensors, meta = parity_fixture("visualad")
    cfg = meta["cfg"]
    folder = tmp_path_factory.mktemp("visualad")
    save_file(
        {k.removeprefix("clip."): v.contiguous() for k, v in tensors.items() if k.startswith("clip.")},
        folder / "clip.safetensors",
    )
    ckpt = {k.removeprefix("ckpt."): v for k, v in tensors.items() if k.startswith("ckpt.")}
    # the layout of the real file: layer_transforms nested, cross_attn flat
    nested = {k: v for k, v in ckpt.items() if "." not in k} | dict(
        layer_transforms={}, cross_attn={}, features_list=list(cfg["taps_1based"])
    )
    for key, value in ckpt.items():
        room, _, rest = key.partition(".")
        if room == "cross_attn":
            nested[room][rest] = value
        elif room == "layer_transforms":
            nested[room].setdefault(rest.split(".")[0], {})[rest.partition(".")[2]] = value
    torch.save(nested, folder / "CLIP.pth")

    def build(ln_post="base", take_norm=True):
        method = create(
            "visualad",
            backbone="clip",
            weights=str(folder / "clip.safetensors"),
            image_size=cfg["image_size"],
            taps=tuple(cfg["taps_1based"]),
            anchors=cfg["anchors"],
            sca_rows=cfg["position_table_rows"],
            sigma=float(cfg["gaussian_sigma"]),
            top_share=cfg["topk_ratio"],
            ln_post=ln_post,
        )
        return import_released(method, folder / "CLIP.pth", ln_post=take_norm).eval()

    model = build()
    image = tensors["in.batch"] * model.backbone.std + model.backbone.mean  # the fixture's input is already normalised
    n = len(image)
    batch = Batch(
        image,
        tensors["in.masks"][:, None] > 0,
        tensors["in.labels"] > 0,
        tensors["in.labels"],
        ["x"] * n,
        ["x"] * n,
        torch.ones(n, dtype=torch.bool),
    )
    tolerance = {k.split(",")[0]: v for k, v in meta["tolerances_measured"]["suggested_absolute_tolerances"].items()}
    return tensors, meta, build, batch, tolerance


def difference(a, b):
    return (a.detach().double() - torch.as_tensor(b).double()).abs().max().item()


def test_token_features(case):
    tensors, meta, build, batch, tolerance = case
    model = build()
    taps = meta["cfg"]["taps_1based"]
    b = model.backbone
    with torch.no_grad():
        seen = b(batch.image, taps=b.taps + (b.depth,), extra=model.tokens, norm=True)
    for tap, prefix, patches in zip(taps, seen.prefix, seen.patches):
        assert (
            difference(torch.cat([prefix, patches], 1), tensors[f"out.layer_{tap}.tokens_ln_post"])
            < tolerance["token features"]
        )
    final = seen.prefix[-1]
    for i, name in enumerate(("anomaly", "normal", "class")):
        assert difference(final[:, i], tensors[f"out.{name}_features"]) < tolerance["token features"]


def test_sca_and_saf(case):
    tensors, meta, build, batch, tolerance = case
    model = build()
    b = model.backbone
    caught = {}
    for tap in b.taps:
        for ours, theirs in (("query_norm", "q_norm"), ("gate", "gate"), ("out", "out_proj")):
            getattr(model.sca[f"tap_{tap}"], ours).register_forward_hook(
                lambda m, i, o, key=(tap, theirs): caught.__setitem__(key, o.detach())
            )
        model.sca[f"tap_{tap}"].register_forward_hook(
            lambda m, i, o, key=(tap, "sca"): caught.__setitem__(key, o.detach())
        )
    with torch.no_grad():
        seen = b(batch.image, taps=b.taps + (b.depth,), extra=model.tokens, norm=True)
        model.predict(batch)
        for tap, prefix, patches in zip(b.taps, seen.prefix, seen.patches):
            saf = model.saf[f"tap_{tap}"](torch.cat([prefix, patches], 1))
            assert difference(saf, tensors[f"out.layer_{tap}.saf_out"]) < tolerance["token features"]
    for tap in b.taps:
        for i, call in enumerate(("anomaly", "normal")):
            assert (
                difference(caught[tap, "sca"][:, i], tensors[f"out.layer_{tap}.sca_{call}"])
                < tolerance["token features"]
            )
            assert (
                difference(caught[tap, "gate"][:, i].sigmoid(), tensors[f"out.sca.layer_{tap}.gate.{call}_call"])
                < tolerance["token features"]
            )
            assert (
                difference(caught[tap, "out_proj"][:, i], tensors[f"out.sca.layer_{tap}.out_proj.{call}_call"])
                < tolerance["token features"]
            )
            expected = tensors[f"out.sca.layer_{tap}.q_norm.{call}_call"]  # the reference repeats it for every image
            assert difference(caught[tap, "q_norm"].expand_as(expected), expected) < tolerance["token features"]


def test_maps_and_scores(case):
    tensors, meta, build, batch, tolerance = case
    model = build()
    size = meta["cfg"]["image_size"]
    prediction = model.predict(batch)
    maps = {tap: to_pixels(prediction.layers[f"tap_{tap}"], size) for tap in model.backbone.taps}
    for tap, m in maps.items():
        assert difference(m, tensors[f"out.layer_{tap}.map"]) < tolerance["maps"]
    assert difference(sum(maps.values()), tensors["out.fused_map"]) < tolerance["maps"]
    assert difference(prediction.map, tensors["out.smoothed_map"]) < tolerance["maps"]
    assert difference(prediction.score, tensors["out.image_score"]) < tolerance["image score"]
    assert difference(prediction.score, meta["scalars"]["image_score"]) < tolerance["image score"]


def test_trained_ln_post(case):
    tensors, meta, build, batch, tolerance = case
    model = build("trained")
    prediction = model.predict(batch)
    fused = sum(to_pixels(prediction.layers[f"tap_{tap}"], meta["cfg"]["image_size"]) for tap in model.backbone.taps)
    assert difference(fused, tensors["alt_ln_post.fused_map"]) < tolerance["maps"]
    assert difference(prediction.score, tensors["alt_ln_post.image_score"]) < tolerance["image score"]
    assert difference(fused, tensors["out.fused_map"]) > 100 * tolerance["maps"], (
        "the two norms must differ, or this test shows nothing"
    )


def test_losses_and_gradients(case):
    tensors, meta, build, batch, tolerance = case
    model = build("trained", take_norm=False)  # trainable copies that still equal the backbone's own norm
    losses = model.loss(model(None, batch), batch)
    losses["total"].backward()
    assert difference(losses["total"], tensors["loss.total"]) < tolerance["losses"]
    assert difference(losses["cls"], tensors["loss.cls"]) < tolerance["losses"]
    assert difference(losses["ctr"], tensors["loss.ctr"]) < tolerance["losses"]
    assert difference(losses["focal"] + losses["dice"], tensors["loss.seg"]) < tolerance["losses"]
    per_layer = tensors["loss.focal_dice_per_layer"].sum(0)
    assert (
        difference(losses["focal"], per_layer[0]) < tolerance["losses"]
        and difference(losses["dice"], per_layer[1]) < tolerance["losses"]
    )

    gradients = {n: p.grad for n, p in model.learned().items()}
    compared = {"anomaly_token": gradients["tokens"][0], "normal_token": gradients["tokens"][1]}
    compared |= {theirs: gradients[ours] for ours, theirs in released_names(model).items()}
    stored = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert set(stored) == set(compared)
    for name, expected in stored.items():
        got = compared[name]
        if name.endswith("pos_encoding"):
            assert got[:, expected.shape[1] :].abs().max() == 0
            got = got[:, : expected.shape[1]]
        if name.endswith("k_norm.bias"):
            assert got.abs().max() < 1e-6  # analytically zero: rounding noise on both sides
        else:
            assert (
                difference(got.flatten(), expected.flatten()) < tolerance["gradients"] * expected.abs().max().item()
            ), name
