"What the parity tests of the released baselines share: a fixture as towers and batches, and the comparison that lets no stored number unchecked."

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zsad_nb.backbones.table import OPENAI
from zsad_nb.backbones.weights import WeightsError
from zsad_nb.data.images import Batch
from zsad_nb.data.masks import resize_mask
from zsad_nb.data.pixels import resize
from zsad_nb.methods.base import import_released

INPUTS = (
    "clip.",
    "clip_sparse.",
    "ckpt.",
    "in.",
    "visa.in.",
)  # these prefixes and the 8-bit picture and mask; everything else in a fixture is a result
PICTURES = ("pre.image", "pre.mask")


class Fixture:
    "Tensors, sizes and tolerances of one stored case, its CLIP and its released checkpoint as files."

    def __init__(
        self, parity_fixture, folder, name, given=()
    ):  # given: patterns of results that a fixture says to take as inputs, since what makes them is not stored
        self.tensors, self.meta = parity_fixture(name)
        self.cfg = self.meta["cfg"]
        self.folder = folder
        self.given = given
        self.worst = {}
        self.limits = self.meta["tolerances_measured"]["suggested_absolute_tolerances"]
        table = torch.zeros(self.cfg["vocab"], self.cfg["text_width"])
        table[self.tensors["clip_sparse.token_embedding.ids"]] = self.tensors["clip_sparse.token_embedding.rows"]
        save_file(self.part("clip.") | {"token_embedding.weight": table}, folder / "clip.safetensors")
        self.towers = dict(
            clip="clip", clip_weights=str(folder / "clip.safetensors"), image_size=self.cfg["image_size"]
        )
        state = {}
        for key, tensor in self.part("ckpt.").items():
            module, _, rest = key.partition(".")
            state.setdefault(module, {})[rest] = tensor
        torch.save(state, folder / "released.pth")
        self.released = folder / "released.pth"

    def part(self, prefix) -> dict:
        "The tensors below a prefix, without it."
        return {k.removeprefix(prefix): v.contiguous() for k, v in self.tensors.items() if k.startswith(prefix)}

    def stored(self) -> dict:
        "Every result that must be reproduced."
        return {
            k: v
            for k, v in self.tensors.items()
            if not k.startswith(INPUTS) and k not in PICTURES and not any(re.fullmatch(g, k) for g in self.given)
        }

    def batch(self, images, categories, masks=None, kinds=None) -> Batch:
        "Normalised images as a batch in [0, 1]."
        mean, std = (torch.tensor(OPENAI[k]).view(3, 1, 1) for k in ("mean", "std"))
        n = len(images)
        mask = torch.zeros(n, 1, *images.shape[-2:], dtype=torch.bool) if masks is None else masks[:, None] > 0
        bad = mask.flatten(1).any(1) if kinds is None else kinds > 0
        return Batch(
            images * std + mean,
            mask,
            bad,
            bad.long() if kinds is None else kinds,
            list(categories),
            [f"{i}.png" for i in range(n)],
            torch.ones(n, dtype=torch.bool),
        )

    def preprocessed(self, **options) -> dict:
        "The 8-bit picture and mask as this project reads them; `options` of `resize`."
        size, mean, std = self.cfg["image_size"], *(torch.tensor(OPENAI[k]) for k in ("mean", "std"))
        pixels = (
            torch.from_numpy(resize(Image.fromarray(self.tensors["pre.image"].numpy()), size, **options).copy()).float()
            / 255
        )
        mask = resize_mask(self.tensors["pre.mask"].numpy() > 0, size)
        return {
            "pre.batch": ((pixels - mean) / std).permute(2, 0, 1)[None],
            "pre.masks": torch.from_numpy(mask).float()[None],
        }

    def difference(
        self, ours, theirs, relative=False, share=1.0
    ) -> float:  # share of the entries that count, the nearest ones
        ours = torch.as_tensor(ours).detach().double()
        theirs = torch.as_tensor(theirs).double()
        assert ours.shape == theirs.shape, f"{tuple(ours.shape)} for {tuple(theirs.shape)}"
        scale = theirs.abs().max().clamp(min=1e-30) if relative else 1
        return ((ours - theirs).abs().flatten().sort().values[int(share * (ours.numel() - 1))] / scale).item()

    def compare(
        self, found: dict, tolerance_of
    ):  # key -> (group of tolerances, limit, relative to the largest value?, and the share of the entries that must keep it, if not all)
        "Each stored number has one of ours within its tolerance, and none of ours is without a stored one."
        stored = self.stored()
        assert not (missing := sorted(set(stored) - set(found))), f"stored, but not checked: {missing}"
        assert not (unknown := sorted(set(found) - set(stored))), f"checked, but not stored: {unknown}"
        wrong = {}
        for key, theirs in stored.items():
            group, limit, relative, *share = tolerance_of(key)
            d = self.difference(found[key], theirs, relative, *share)
            self.worst[group] = max(self.worst.get(group, 0.0), d)
            if not d <= limit:
                wrong[key] = f"{d:.2e} > {limit:.0e}"
        print(
            f"{self.meta['fixture']}, largest difference of {len(stored)} stored results: "
            + ", ".join(f"{k} {v:.1e}" for k, v in self.worst.items())
        )
        assert not wrong, wrong


def gradients(losses, parameters) -> list:
    "Of a total, by parameter; none where nothing depends on it."
    for q in parameters:
        q.grad = None
    losses["total"].backward()
    return [None if q.grad is None else q.grad.clone() for q in parameters]


def trained(method, batch, optimiser, steps, before=lambda: None) -> dict:
    "The learned values after some steps on one batch."
    method.train()
    for _ in range(steps):
        before()
        optimiser.zero_grad()
        method.loss(method(method.encode(batch), batch), batch)["total"].backward()
        optimiser.step()
    return method.learned()


def require_refused(case, model, tmp_path, change, why, part=None):
    "A released file that was changed (or one part of it) is refused by name, and nothing of it is copied."
    state = torch.load(case.released, weights_only=True)
    change(state if part is None else state[part])
    torch.save(state, tmp_path / "wrong.pth")
    before = {k: v.clone() for k, v in model.learned().items()}
    with pytest.raises(WeightsError, match=f"wrong.pth does not fit {model.name}: .*{why}"):
        import_released(model, tmp_path / "wrong.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.learned().items()), (
        "nothing is copied from a file that does not fit"
    )
