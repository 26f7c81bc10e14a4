"Pages of the site's API reference are read from the modules' text: they must say what fastcore's docments say."

import importlib
import inspect
import re
from pathlib import Path

import api
import pytest
import stage
from fastcore.docments import docments
from test_house import ROOMS

ROOT = Path(__file__).resolve().parents[2]
MODULES = api.modules(ROOT)


def plain(words: str) -> str:
    "A text without what protects it from Markdown."
    return re.sub(r"\\(.)", r"\1", words)


def test_rooms_are_read_in_the_order_of_the_house():
    assert stage.ROOMS == ROOMS
    assert {name.split(".")[1] for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", ["zsad_nb.components.maps", "zsad_nb.evaluation.published", "zsad_nb.data.masks"])
def test_comments_are_those_of_docments(name):
    module, page = importlib.import_module(name), plain(api.page(MODULES[name]))
    checked = 0
    for exported in module.__all__:
        function = getattr(module, exported)
        if not inspect.isfunction(function):
            continue
        for parameter, comment in docments(function, full=False).items():
            words = " ".join((comment or "").split())
            if words and parameter != "return":
                assert f"**{parameter}** – {words}" in page, f"{name}.{exported}: the comment of {parameter} is missing"
                checked += 1
            elif words:
                assert words in page
    assert checked >= 5


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_exported_name_is_on_its_page(name):
    page = api.page(MODULES[name])
    tree = MODULES[name].tree
    defined = {n.name for n in tree.body if hasattr(n, "name")}
    listed = re.search(r"^__all__ = \[(.*?)\]", MODULES[name].source, re.DOTALL | re.MULTILINE)
    for exported in re.findall(r"[\"'](\w+)[\"']", listed[1] if listed else ""):
        if exported in defined:
            assert re.search(rf"{{py:(function|class)}} {exported}\b", page), f"{exported} is missing"


def test_words_mean_nothing_to_markdown():
    assert api.text("(B, *N) of `a_b*` <x> [y] $z$") == r"(B, \*N) of `a_b*` \<x\> \[y\] \$z\$"


def test_directives_are_left_out_and_read():
    assert stage.directives("#| export\n#| eval: false\n\nx = 1\n") == ({"export": "", "eval": "false"}, "x = 1\n")
    found, code = stage.directives("#| default_exp core.names\n")
    assert found == {"default_exp": "core.names"} and not code


def test_the_line_below_a_title_leaves_what_follows_alone():
    text = "# Plans\n\n> From a file.\n\n    name: x   # indented code\n"
    assert stage._below_title(text, "LINE") == "# Plans\n\n> From a file.\n\nLINE\n\n    name: x   # indented code\n"


def test_files_named_as_code_become_links(tmp_path):
    "Of notebooks, which must not link to what lies outside nbs/."
    (tmp_path / "paper_figures").mkdir()
    (tmp_path / "paper_figures" / "a.csv").write_text("a\n")
    page = tmp_path / "nbs" / "core" / "01_x.ipynb"
    page.parent.mkdir(parents=True)
    laid_out = stage.Stage(tmp_path, tmp_path / "out", "https://host/zsad_nb")
    text = "See `paper_figures/a.csv`, not `paper_figures/b.csv`.\n\n```\n`paper_figures/a.csv`\n```\n"
    shown = stage.markdown(laid_out, text, page)
    assert shown == text.replace("See `paper_figures/a.csv`", "See [`paper_figures/a.csv`](../../paper_figures/a.csv)")
    assert (tmp_path / "out" / "paper_figures" / "a.csv").read_text() == "a\n"
    assert stage.markdown(laid_out, "[room](../core)", page) == "[room](https://host/zsad_nb/tree/main/nbs/core)"
