"Every stored output, loss and gradient of the dapo fixture, released and repaired text encoder, loaded through the public API."

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from zsad_nb.components.dapo_prompts import enlarge, focal_types, true_and_normal
from zsad_nb.components.deep_tokens import see_deep
from zsad_nb.components.losses import dice
from zsad_nb.data.images import Batch, defect_names
from zsad_nb.data.index import GOOD, make_index
from zsad_nb.methods.base import create
from zsad_nb.methods.dapo import DAPO, import_released, released_names

pytestmark = pytest.mark.parity
MODES = {"released": "", "fixed": "fixed."}


@pytest.fixture(scope="module")
def case(parity_fixture, tmp_path_factory):
    tensors, meta = parity_fixture("dapo")
    cfg = meta["cfg"]
    folder = tmp_path_factory.mktemp("dapo")
    table = torch.zeros(cfg["vocab"], cfg["text_width"])
    table[tensors["clip_sparse.token_embedding.ids"]] = tensors["clip_sparse.token_embedding.rows"]
    clip = {k.removeprefix("clip."): v.contiguous() for k, v in tensors.items() if k.startswith("clip.")}
    save_file(clip | {"token_embedding.weight": table}, folder / "clip.safetensors")
    # the layout of the released trainer: three state dicts in one file
    nested = dict(prompt_learner={}, visual_prompt={}, linear_adapter={})
    for key, value in tensors.items():
        if key.startswith("ckpt."):
            room, _, rest = key.removeprefix("ckpt.").partition(".")
            nested[room][rest] = value
    torch.save(nested, folder / "epoch_1.pth")
    kinds = [GOOD, *cfg["defect_words"]]
    index = make_index(
        [
            dict(dataset="own", category="x", split="test", image=f"{k}.png", anomalous=k != GOOD, defect=k)
            for k in kinds
        ],
        folder,
    )

    def build(mode: str) -> DAPO:
        method = create(
            "dapo",
            clip="clip",
            clip_weights=str(folder / "clip.safetensors"),
            image_size=cfg["image_size"],
            clip_taps=tuple(cfg["taps_1based"]),
            types=cfg["defect_words"],
            prompts=cfg["prompt_count"],
            vectors=cfg["n_ctx"],
            text_tokens=cfg["n_text_tokens"],
            text_depth=cfg["text_depth"],
            image_tokens=cfg["n_visual_tokens"],
            image_depth=cfg["visual_depth"],
            alpha=cfg["alpha"],
            tau=cfg["temperature"],
            weight_local=float(cfg["lambda_local"]),
            release_compat=mode == "released",
        )
        return import_released(method, folder / "epoch_1.pth").prepare(index, training=True).eval()

    b = build("fixed").clip
    image, n = (
        tensors["in.batch"] * b.std + b.mean,
        len(tensors["in.batch"]),
    )  # the fixture's input is already normalised
    defect = torch.tensor([defect_names(index).index(kinds[d]) for d in tensors["in.defect_ids"].tolist()])
    batch = Batch(
        image,
        tensors["in.masks"][:, None] > 0.5,
        tensors["in.labels"] > 0,
        defect,
        ["x"] * n,
        ["x"] * n,
        torch.ones(n, dtype=torch.bool),
    )
    return tensors, meta, build, batch, meta["tolerances_measured"]["suggested_absolute_tolerances"]


def difference(a, b):
    return (a.detach().double() - torch.as_tensor(b).double()).abs().max().item()


def test_prompts(case):
    tensors, meta, build, batch, tolerance = case
    cfg = meta["cfg"]
    prompts = build("fixed").prompts
    ids = prompts.text.tokenize(prompts.sentences(cfg["defect_words"]))
    assert ids.repeat_interleave(cfg["prompt_count"], 0).tolist() == tensors["out.tokenized_prompts"].tolist()
    rows, end = prompts.embeddings(cfg["defect_words"])
    assert end.tolist() == cfg["eot_index_per_state"]
    assert difference(rows, tensors["out.prompt_embeddings"]) < tolerance["features"]


@pytest.mark.parametrize("mode", MODES)
def test_text_features(case, mode):
    tensors, meta, build, batch, tolerance = case
    prompts = build(mode).prompts
    key = MODES[mode] + "out."
    raw = prompts.features(meta["cfg"]["defect_words"])
    z = F.normalize(raw, dim=-1)
    assert difference(raw, tensors[key + "text_features_raw"]) < tolerance["features"]
    assert difference(z, tensors[key + "text_features"]) < tolerance["features"]
    assert difference(z[0], tensors[key + "z_N"]) < tolerance["features"]
    assert difference(F.normalize(z[1:].mean(0), dim=0), tensors[key + "z_A"]) < tolerance["features"]
    assert difference(z @ z.T, meta["scalars"][f"cosines_between_text_features_{mode}"]) < tolerance["features"]
    other = next(prefix for name, prefix in MODES.items() if name != mode)
    assert difference(z, tensors[other + "out.text_features"]) > 100 * tolerance["features"], (
        "the two modes must differ, or this test shows nothing"
    )


def test_image_tokens(case):
    tensors, meta, build, batch, tolerance = case
    model = build("fixed")
    with torch.no_grad():
        seen = see_deep(model.clip, batch.image, model.image_tokens, model.p.alpha)
        for tap, prefix, patches in zip(meta["cfg"]["taps_1based"], seen.prefix, seen.patches):
            assert difference(torch.cat([prefix, patches], 1), tensors[f"out.tap_{tap}.tokens"]) < tolerance["features"]
            assert (
                difference(model.adapters[f"tap_{tap}"](patches), tensors[f"out.tap_{tap}.adapted"])
                < tolerance["features"]
            )
        assert difference(seen.cls @ model.clip.tower.proj, tensors["out.image_features_raw"]) < tolerance["features"]


@pytest.mark.parametrize("mode", MODES)
def test_maps_and_scores(case, mode):
    tensors, meta, build, batch, tolerance = case
    model = build(mode)
    prefix = MODES[mode]
    size = (meta["cfg"]["image_size"],) * 2
    prediction = model.predict(batch)
    for tap in meta["cfg"]["taps_1based"]:
        s = prediction.layers[f"tap_{tap}"].softmax(1)
        assert difference(s.flatten(2).transpose(1, 2), tensors[f"{prefix}out.tap_{tap}.S"]) < tolerance["maps"]
        if mode == "released":
            assert difference(enlarge(s, size)[:, 1:].sum(1), tensors[f"out.tap_{tap}.map"]) < tolerance["maps"]
    assert difference(prediction.map, tensors[prefix + "out.fused_map"]) < tolerance["maps"]
    assert (
        difference(
            torch.cat([prediction.layers["normal"][:, None], prediction.type_map], 1),
            tensors[prefix + "out.multi_type_map"],
        )
        < tolerance["maps"]
    )
    assert difference(prediction.score, tensors[prefix + "out.image_score"]) < tolerance["image score"]
    assert (
        difference(prediction.score, meta["scalars"][("fixed_" if mode == "fixed" else "") + "image_score"])
        < tolerance["image score"]
    )
    if mode == "released":
        assert difference(prediction.layers["image"], tensors["out.image_logits"]) < tolerance["features"]


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients(case, mode):
    tensors, meta, build, batch, tolerance = case
    model = build(mode).train()
    prefix = MODES[mode]
    prediction = model(None, batch)
    losses = model.loss(prediction, batch)
    losses["total"].backward()
    assert difference(losses["total"], tensors[prefix + "loss.total"]) < tolerance["losses"]
    assert difference(losses["image"], tensors[prefix + "loss.image_ce"]) < tolerance["losses"]
    stored = tensors[prefix + "loss.focal_diceN_diceA_per_tap"]
    for i, name in enumerate(("focal", "dice_normal", "dice_abnormal")):
        assert difference(losses[name], stored[:, i].sum()) < tolerance["losses"]
    local = losses["focal"] + losses["dice_normal"] + losses["dice_abnormal"]
    assert difference(meta["cfg"]["lambda_local"] * local, tensors[prefix + "loss.local_times_4"]) < tolerance["losses"]
    mask = batch.mask[:, 0]
    kind = model.kinds(batch)
    assert kind.tolist() == tensors["in.defect_ids"].tolist()
    for tap, row in zip(meta["cfg"]["taps_1based"], stored):
        logits = prediction.layers[f"tap_{tap}"]
        true, normal = true_and_normal(logits, kind, mask)
        for got, expected in zip(
            (focal_types(true, logits.shape[1]), dice(normal, ~mask), dice(1 - normal, mask)), row
        ):
            assert difference(got, expected) < tolerance["losses"]
    if mode == "fixed":
        assert difference(losses["total"], meta["scalars"]["fixed_loss_total"]) < tolerance["losses"]
    else:
        assert difference(losses["total"], meta["scalars"]["loss_total"]) < tolerance["losses"]

    gradients = {n: q.grad for n, q in model.learned().items()}
    names = released_names(model)
    compared = {
        theirs: (
            gradients["prompts.deep"][int(ours.rsplit(".", 1)[1])]
            if ours.startswith("prompts.deep.")
            else gradients[ours]
        )
        for ours, theirs in names.items()
    }
    stored = {k.removeprefix(prefix + "grad."): v for k, v in tensors.items() if k.startswith(prefix + "grad.")}
    assert set(stored) == set(compared) and gradients.keys() - {"prompts.deep"} == set(names) - {
        n for n in names if n.startswith("prompts.deep.")
    }
    for name, expected in stored.items():
        assert difference(compared[name], expected) < tolerance["gradients (relative)"] * expected.abs().max().item(), (
            name
        )
