"The key of kept features: no two different features under one, for every method and every one of its parameters."

import dataclasses
import json
import warnings

import pytest
import torch

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.methods import base
from zsad_nb.methods.base import MODULES, Method, Prediction, create, method_class
from zsad_nb.methods.tower_parameters import ClipParameters

SIZE = 48
TOWERS = dict(weights="random:0", clip_weights="random:0", dino_weights="random:0", image_size=SIZE)
# values whose neighbours would not do: what they choose needs a valid word, size, list or file
OTHERS = dict(
    backbone="tiny-clip",
    clip="clip-tiny-none",  # there is one small CLIP only
    dino="tiny-clip",
    weights="random:1",
    clip_weights="random:1",
    dino_weights="random:1",
    image_size=64,
    dino_size=64,
    taps=(1, 2),
    clip_taps=(1, 2),
    dino_taps=(1, 2),
    tap=1,
    scales=(1,),
    neighbourhoods=(1,),
    levels=(0.5, 1.0, 0.5),
    tap_weights=(1.0, 0.5, 0.5, 0.5),
    templates=("a {}.", "the {}, seen from above, in good light."),
    textures=("screw",),
    small_top_classes=("screw",),
    types=("scratch",),
    words=("scratch",),
    phrases={"scratch": ["{} with a scratch"]},
    names="raw",
    types_from="given",
    num_heads=1,
    sca_grid=2,
    dual_blocks=1,
)
# where another value needs company to be allowed, or to reach the frozen part at all
COMPANY = dict(
    levels=dict(fusion="hierarchical"), sap_maps=dict(sap_weights="spatial"), words=dict(types=("dent",)), z={}
)


def batch():
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    return Batch(
        image,
        torch.zeros(1, 1, 40, 56, dtype=torch.bool),
        torch.zeros(1, dtype=torch.bool),
        torch.zeros(1, dtype=torch.long),
        ["screw"],
        ["0.png"],
        torch.ones(1, dtype=torch.bool),
    )


def made(name, **changes):
    fields = {f.name for f in dataclasses.fields(method_class(name).Parameters)}
    seed_everything(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create(name, **{k: v for k, v in TOWERS.items() if k in fields} | changes).eval()


def key_of(method) -> str:
    return json.dumps(method.encode_key(), sort_keys=True)


@torch.inference_mode()
def features_of(method) -> dict:
    return method.encode(batch())


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


def other_values(field) -> list:
    "Values besides the default that the parameter may take."
    allowed = field.metadata["allowed"]
    if field.name in OTHERS:
        return [OTHERS[field.name]]
    if isinstance(allowed, tuple):
        return [word for word in allowed if word != field.default]
    if isinstance(field.default, bool):
        return [not field.default]
    if "bool" in str(field.type):
        return [True, False]
    if isinstance(field.default, int):
        return [field.default + 1]
    if isinstance(field.default, float):
        return [0.5 if field.default != 0.5 else 0.25]
    if isinstance(field.default, str):
        return [field.default + "x"]
    return [2]


@pytest.mark.parametrize("name", [name for name in MODULES if method_class(name).encodes])
def test_every_parameter(name):
    "Other features, another key; and what is declared to be learned leaves both as they are."
    plain = made(name)
    key = key_of(plain)
    features = features_of(plain)
    moved = set()
    unusable = []
    for field in dataclasses.fields(plain.Parameters):
        for value in other_values(field):
            try:
                method = made(name, **{**COMPANY.get(field.name, {}), field.name: value})
            except (ValueError, TypeError) as error:
                unusable.append(f"{field.name}={value!r}: {error}")
                continue
            other = key_of(method)
            if not same(features_of(method), features):
                moved.add(field.name)
                assert other != key or method.encode_key() is None, f"{name}, {field.name}={value!r}: one key for two"
            if field.metadata["frozen"] is False and field.name not in ("hsvs",):
                assert other == key, f"{name}, {field.name}={value!r} is learned, and changes the key"
    assert len(unusable) <= 6, unusable
    declared = {f.name for f in dataclasses.fields(plain.Parameters) if f.metadata["frozen"] is not False}
    assert moved <= declared | {"hsvs"}, f"{name}: {sorted(moved - declared)} reach the frozen features"
    assert moved & {"weights", "clip_weights"}, "the check sees a difference"


def test_ssvp_without_its_second_tower():
    "`hsvs` is a choice of the learned part; without HSVS there is no second tower, and the towers are in the key."
    assert key_of(made("ssvp", hsvs="concat")) == key_of(made("ssvp"))
    assert key_of(made("ssvp", hsvs="none")) != key_of(made("ssvp"))


def test_no_two_methods_share_a_key():
    keys = [key_of(made(name)) for name in MODULES if method_class(name).encodes]
    assert len(set(keys)) == len(keys)


@dataclasses.dataclass(frozen=True)
class OwnParameters(ClipParameters):
    shade: float = base.param(1.0, "ours", "factor on the features")
    gain: float = base.param(1.0, "ours", "factor on the map", frozen=False)


class Own(Method):
    name = "own"
    Parameters = OwnParameters

    def __init__(self, parameters):
        super().__init__(parameters)
        self.clip, self.text = base_towers(parameters)

    def encode(self, batch):
        return dict(patches=self.p.shade * self.clip(batch.image).patches[0])

    def forward(self, features, batch):
        side = self.clip.size // self.clip.patch
        map = self.p.gain * features["patches"].norm(dim=-1).unflatten(1, (side, side))
        return Prediction(map, map.flatten(1).amax(1))


def base_towers(parameters):
    from zsad_nb.methods.tower_parameters import clip_towers

    return clip_towers(parameters)


def test_a_method_outside_the_package(tmp_path):
    "Its code is not in the key: its features are kept only where it states a version, and never across two versions."
    p = OwnParameters(clip_weights="random:0", image_size=SIZE)
    cache = FeatureCache(tmp_path)
    method = Own(p)
    assert method.encode_key() is None
    method.predict(batch(), cache)
    assert cache.counts["hits"] == cache.counts["misses"] == 0
    assert method.graph_key()["definition"] == Own._definition, "a traced graph is of this definition alone"

    class Second(Own):
        features_version = "2"

    second = Second(p)
    second.predict(batch(), cache)
    second.predict(batch(), cache)
    assert cache.counts["hits"] == cache.counts["misses"] == 1
    assert second.encode_key()["parameters"] == dict(shade=1.0), "what is not classified counts as frozen"
    keys = {key_of(second), key_of(Second(dataclasses.replace(p, shade=2.0)))}
    assert len(keys) == 2 and key_of(Second(dataclasses.replace(p, gain=2.0))) in keys
    Second.features_version = "3"
    assert key_of(second) not in keys


def test_a_key_of_one_s_own_has_the_towers(tmp_path):
    "A method may write its own key; the towers and the engine are added to it."

    class Hand(Own):
        def encode_key(self):
            return dict(shade=self.p.shade)

    one = Hand(OwnParameters(clip_weights="random:0", image_size=SIZE))
    other = Hand(OwnParameters(clip_weights="random:1", image_size=SIZE))
    assert one.encode_key()["shade"] == 1.0 and key_of(one) != key_of(other)
