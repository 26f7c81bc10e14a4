"""Zero-shot anomaly detection in notebooks.

    import zsad_nb as zsad

    zsad.describe("visualad")                       # a method's parameters, and where each default comes from
    index = zsad.load_dataset("mvtec", "data/mvtec")
    zsad.check(index)                               # what is wrong with the files
    method = zsad.create("visualad")
    zsad.fit(method, zsad.load_dataset("visa", "data/visa"))
    zsad.evaluate(method, index).table()
    zsad.save(method, "visualad.safetensors")
    zsad.save_pretrained(method, "mine")            # a folder with a card; push_to_hub(method, "OWNER/NAME") shares it
    zsad.from_pretrained("OWNER/NAME")
    zsad.predict("photos", zsad.load("visualad.safetensors"), out="results")
    zsad.HeatmapExplorer(...)                       # in a notebook

These names are loaded when they are first used: importing the package imports no torch. Everything else lives in the
rooms: core, data, synthetic, backbones, components, methods, training, evaluation, figures, inspection, explore, runs,
deploy and cli.
"""

from typing import TYPE_CHECKING

from .core.moved import keep_old_names

__version__ = "0.1.0"

keep_old_names()  # imports of older notebooks and scripts

_HOMES = {  # name -> the module that has it
    "create": "methods.base",
    "describe": "methods.base",
    "load": "methods.base",
    "load_released": "methods.base",
    "save": "methods.base",
    "fit": "training.fit",
    "evaluate": "evaluation.evaluate",
    "predict": "inspection.predict",
    "save_pretrained": "evaluation.pretrained",
    "from_pretrained": "evaluation.pretrained",
    "push_to_hub": "evaluation.pretrained",
    "load_dataset": "synthetic.datasets",
    "check": "data.images",
    "Inspector": "inspection.inspector",
    "HeatmapExplorer": "explore.explorer",
}
__all__ = [
    "create",
    "describe",
    "load",
    "load_released",
    "save",
    "fit",
    "evaluate",
    "predict",
    "save_pretrained",
    "from_pretrained",
    "push_to_hub",
    "load_dataset",
    "check",
    "Inspector",
    "HeatmapExplorer",
]

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from .data.images import check
    from .evaluation.evaluate import evaluate
    from .evaluation.pretrained import from_pretrained, push_to_hub, save_pretrained
    from .explore.explorer import HeatmapExplorer
    from .inspection.inspector import Inspector
    from .inspection.predict import predict
    from .methods.base import create, describe, load, load_released, save
    from .synthetic.datasets import load_dataset
    from .training.fit import fit


def __getattr__(name: str):
    "A name of the front door, imported when it is first asked for."
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(_HOMES)}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    "The front door alone: what `zsad.<TAB>` offers is meant to be used. Rooms are found by importing them."
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
