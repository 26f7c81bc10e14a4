"What notebooks import, imported: `stored_outputs` copies a process that has this module."

import importlib
from pathlib import Path

from zsad_nb.backbones.weights import import_vision_libraries

import_vision_libraries()  # timm, open_clip and a torchvision that goes with this PyTorch

LIBRARIES = ("execnb.shell", "nbdev.process", "nbdev.showdoc", "fastcore.test", "ipywidgets", "matplotlib.pyplot")
LIBRARIES += ("pandas", "seaborn", "sklearn.cluster", "sklearn.metrics", "scipy.ndimage", "tifffile")
ROOT = Path(__file__).resolve().parents[1]

for name in LIBRARIES:
    importlib.import_module(name)
for path in sorted((ROOT / "zsad_nb").rglob("*.py")):
    place = path.relative_to(ROOT).with_suffix("")
    if place.name != "_modidx":
        importlib.import_module(".".join(place.parts).removesuffix(".__init__"))
