"`import zsad_nb as zsad`: the names of the front door, loaded when they are used."

import importlib
import subprocess
import sys

import pytest

import zsad_nb as zsad

NAMES = "create describe load save fit evaluate predict load_dataset check Inspector HeatmapExplorer".split()


def child(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_loads_nothing_heavy():
    "No torch, no pandas, no package but the standard library's."
    heavy = "{'torch', 'numpy', 'pandas', 'matplotlib', 'timm', 'open_clip', 'PIL'}"
    assert child(f"import sys, zsad_nb; print(sorted({heavy} & set(sys.modules)))") == "[]"
    assert child(f"import sys, zsad_nb; dir(zsad_nb); print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("name", zsad.__all__)
def test_every_name_is_that_of_its_room(name):
    value = getattr(zsad, name)
    assert value is getattr(importlib.import_module(f"zsad_nb.{zsad._HOMES[name]}"), name)
    assert value.__doc__, "help(zsad) shows what it is for"


def test_names_are_listed_and_typed():
    assert set(NAMES) <= set(zsad.__all__) == set(zsad._HOMES) and set(zsad.__all__) <= set(dir(zsad))
    source = open(zsad.__file__, encoding="utf-8").read()
    block = source.split("if TYPE_CHECKING:")[1].split("\n\n\n")[0]
    for name, home in zsad._HOMES.items():
        line = next(line for line in block.splitlines() if f"from .{home} import" in line)
        assert name in line.replace(",", " ").split(), f"{name} is unknown to type checkers"


def test_completion_offers_the_front_door_alone():
    "Neither rooms, imported here already, nor what the module itself needs."
    importlib.import_module("zsad_nb.core.names")
    assert [name for name in dir(zsad) if not name.startswith("_")] == sorted(zsad.__all__)
    assert {"__version__", "__doc__", "__path__"} <= set(dir(zsad)), "tools ask for these"


def test_a_wrong_name_says_which_there_are():
    with pytest.raises(AttributeError, match="no attribute 'creat'; its names are create, describe"):
        zsad.creat  # noqa: B018
