"What the plugin tells mypy: methods added with `@patch` are the class's own, and their mistakes are found."

import importlib.util
import re
from pathlib import Path

import pytest

if importlib.util.find_spec("mypy") is None:
    pytest.skip("mypy is a tool of developers", allow_module_level=True)

PLUGIN = Path(__file__).resolve().parents[1] / "mypy_plugin.py"
MODULE = """
from fastcore.basics import patch


class Box:
    def __init__(self, side: int):
        self.side = side

    def report(self) -> str:
        return f"{self.area()} {self.half} {Box.unit().side}"


@patch
def area(self: Box) -> int:
    return self.side**2 + self.height


@patch(as_prop=True)
def half(self: Box) -> float:
    return self.side / 2


@patch(cls_method=True)
def unit(cls: Box) -> Box:
    return cls(1)


def double(box: Box) -> str:
    return box.half


def longest(parts: list[str]) -> int:
    return sum(len(part) for part in parts)


Box(2).volume()
"""


@pytest.mark.slow
def test_patched_methods_are_methods(tmp_path):
    from mypy import api

    package = tmp_path / "zsad_nb"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "box.py").write_text(MODULE)
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\nplugins = {PLUGIN}\nignore_missing_imports = True\nfollow_imports = silent\n")
    text = api.run([str(package), "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")])[0]
    lines = MODULE.splitlines()
    found = {
        lines[int(number) - 1].strip(): code for number, code in re.findall(r":(\d+): error: .*\[([a-z-]+)\]", text)
    }
    assert found == {
        "return self.side**2 + self.height": "attr-defined",
        "return box.half": "return-value",
        "Box(2).volume()": "attr-defined",
    }, text
