"Methods that live outside the package: by path, by entry point, in a checkpoint, and what is refused."

import importlib
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zsad_nb.backbones.weights import WeightsError
from zsad_nb.inspection.sources import method_from
from zsad_nb.methods import base
from zsad_nb.methods.base import create, describe, load, method_class, method_names, read_header, recorded_class, save
from zsad_nb.synthetic.datasets import load_dataset
from zsad_nb.training.fit import fit, recipe_of

SOURCE = """
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from zsad_nb.backbones.towers import create_backbone
from zsad_nb.components.losses import image_bce
from zsad_nb.components.maps import to_pixels
from zsad_nb.methods.base import Method, ParameterSet, Prediction, param
from zsad_nb.methods.tower_parameters import BackboneParameters

Path(__file__).with_suffix(".imported").touch()


@dataclass(frozen=True)
class PlainParameters(BackboneParameters, frozen=False):
    gain: float = param(1.0, "ours", "factor on the map", "above 0")
    lr: float = param(1e-2, "ours", "learning rate")


class Plain(Method):
    "A learned direction."

    name = "plain"
    Parameters = PlainParameters
    recipe = dict(epochs=1)

    def __init__(self, parameters):
        super().__init__(parameters)
        p = self.p
        self.backbone = create_backbone(p.backbone, p.weights, p.image_size)
        self.direction = nn.Parameter(torch.randn(self.backbone.width))

    def encode(self, batch):
        return dict(patches=F.normalize(self.backbone(batch.image).patches[-1], dim=-1))

    def forward(self, features, batch):
        side = self.backbone.size // self.backbone.patch
        map = self.p.gain * (features["patches"] @ self.direction).unflatten(1, (side, side))
        return Prediction(to_pixels(map, tuple(batch.image.shape[-2:])), map.flatten(1).amax(1), {})

    def loss(self, prediction, batch):
        return dict(total=image_bce(prediction.score, batch.anomalous))

    def param_groups(self):
        return [dict(params=[self.direction], lr=self.p.lr)]


class NoMethod:
    pass


class NoParameters(Method):
    name = "no-parameters"


def a_function():
    pass
"""
SMALL = dict(weights="random:0", image_size=32)


@pytest.fixture
def module(tmp_path, monkeypatch):
    "A module of one's own, importable and not imported; a new name a test."
    name = f"own_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield name
    forget(name)


def imported(module) -> bool:
    return module in sys.modules


def forget(module):
    "As in a new process."
    sys.modules.pop(module, None)
    for name in [n for n, cls in base.METHODS.items() if cls.__module__ == module]:
        del base.METHODS[name]


def declare(folder, module, name="plain", target="Plain"):
    "An installed package with an entry point, as pip leaves it."
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[zsad_nb.methods]\n{name} = {module}:{target}\n")
    importlib.invalidate_caches()


def test_by_path(module, tmp_path):
    "Created, described, trained, evaluated, saved and loaded by package.module:Class."
    path = f"{module}:Plain"
    assert not imported(module)
    method = create(path, **SMALL)
    assert imported(module) and method.name == "plain" and method_class(path) is type(method)
    assert describe(path).set_index("parameter").loc["gain", "help"] == "factor on the map"
    assert list(describe(method)["parameter"]) == list(describe(path)["parameter"])
    assert type(method_from(path, **SMALL)) is type(method)
    index = load_dataset("synthetic-auxiliary", tmp_path / "data", size=32, normal=1, defective=1)
    before = method.direction.detach().clone()
    fit(method, index, recipe_of(path, epochs=1), progress=False, workers=0)
    assert not torch.equal(before, method.direction)
    file = save(method, tmp_path / "plain.safetensors")
    assert read_header(file)["method"] == path, "so that it can be found again"
    again = load(file)
    assert torch.equal(again.direction, method.direction), "its module was imported by whoever made it"


@pytest.mark.parametrize(
    "name, why",
    [
        ("no_such_module_here:Plain", "the module no_such_module_here cannot be imported"),
        ("{module}:Plan", "has no Plan; methods in it: Plain, NoParameters"),
        ("{module}:NoMethod", "is the class NoMethod, which does not inherit from zsad_nb.methods.base.Method"),
        ("{module}:a_function", "is a function, which does not inherit"),
        ("{module}:NoParameters", "NoParameters.Parameters is no ParameterSet"),
        ("{module}.Plain", "unknown method"),
        ("{module}:Plain:x", "unknown method"),
        ("{module}:", "unknown method"),
        ("../{module}:Plain", "unknown method"),
    ],
)
def test_what_is_no_method(module, name, why):
    with pytest.raises(ValueError, match=why):
        create(name.format(module=module))


def test_a_module_with_a_mistake(module, tmp_path):
    (tmp_path / "package" / f"{module}.py").write_text("import torch\n1 / 0\n")
    with pytest.raises(ValueError, match=rf"the module {module} cannot be imported \(ZeroDivisionError"):
        create(f"{module}:Plain")


def test_by_entry_point(module, tmp_path):
    "An installed package brings a method under a name of its own, and its checkpoints load without further words."
    declare(tmp_path / "package", module)
    assert "plain" in method_names() and not imported(module), "to list the names imports nothing"
    method = create("plain", **SMALL)
    file = save(method, tmp_path / "plain.safetensors")
    forget(module)
    assert torch.equal(load(file).direction, method.direction) and imported(module)


def test_an_entry_point_does_not_replace_a_method_of_the_package(module, tmp_path):
    declare(tmp_path / "package", module, name="visualad")
    assert method_class("visualad").__module__ == "zsad_nb.methods.visualad" and not imported(module)


def test_an_entry_point_that_is_no_method(module, tmp_path):
    declare(tmp_path / "package", module, name="odd", target="NoMethod")
    with pytest.raises(ValueError, match="method='odd' is the class NoMethod"):
        create("odd")


def test_a_checkpoint_imports_nothing_by_itself(module, tmp_path):
    "The path in a header is data: the caller must name it."
    path = f"{module}:Plain"
    method = create(path, **SMALL)
    file = save(method, tmp_path / "plain.safetensors")
    flag = tmp_path / "package" / f"{module}.imported"
    forget(module)
    flag.unlink()
    with pytest.raises(WeightsError, match="its module was not imported. If you trust it, name it yourself"):
        load(file)
    assert not imported(module) and not flag.exists()
    with pytest.raises(WeightsError, match="its method is"):
        load(file, method="visualad")
    assert not imported(module)
    with pytest.raises(ValueError, match="its module was not imported"):
        method_from(file)
    assert torch.equal(method_from(file, method=path).direction, method.direction)
    assert torch.equal(load(file, method=path).direction, method.direction)
    assert torch.equal(load(file, method=method_class(path)).direction, method.direction)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "shutil:rmtree", "antigravity:fly", "this:s"])
def test_a_hostile_header(module, tmp_path, name):
    file = save(create(f"{module}:Plain", **SMALL), tmp_path / "plain.safetensors")
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["zsad_nb"])
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}
    save_file(tensors, file, {"zsad_nb": json.dumps({**header, "method": name})})
    before = set(sys.modules)
    with pytest.raises(WeightsError, match="its module was not imported"):
        load(file)
    assert set(sys.modules) == before
    with pytest.raises(ValueError, match="was not imported"):
        recorded_class(name)


def test_an_entry_point_for_another_class_opens_nothing(module, tmp_path):
    "The declared class, and no other one of its module."
    file = save(create(f"{module}:Plain", **SMALL), tmp_path / "plain.safetensors")
    declare(tmp_path / "package", module, name="other", target="NoParameters")
    forget(module)
    with pytest.raises(WeightsError, match="its module was not imported"):
        load(file)
    assert not imported(module)
