"The tutorials with trained systems, in small: every cell runs, every assertion holds, every picture is there."

import json
from configparser import ConfigParser

import papermill
import pytest
from conftest import ROOT

TUTORIALS = ROOT / "nbs" / "tutorials"
SMALL = dict(size=64, images=1, epochs=1, shown=1)
FIGURES = dict(inside_dma_sap=11, inside_ssvp=10, which_defect=6, explore_heatmaps=6)  # pictures a notebook draws


@pytest.fixture(scope="module", autouse=True)
def _pictures_inside(own_kernel):
    "Kernels draw into the notebook."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        yield


def code(notebook: dict) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def pictures(cell: dict) -> list[str]:
    return [
        o["data"][kind] for o in cell["outputs"] for kind in ("image/png", "image/jpeg") if kind in o.get("data", {})
    ]


def draws(cell: dict) -> bool:
    return any(word in source(cell) for word in ("plt.subplots(", "plt.figure(", "\nstill("))


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("name", FIGURES)
def test_runs_in_small(name, tmp_path):
    papermill.execute_notebook(
        TUTORIALS / f"{name}.ipynb",
        tmp_path / "out.ipynb",
        SMALL,
        cwd=str(tmp_path),
        progress_bar=False,
        kernel_name="python3",
    )
    cells = code(json.loads((tmp_path / "out.ipynb").read_text()))
    injected = [c for c in cells if "injected-parameters" in c["metadata"].get("tags", [])]
    assert len(injected) == 1 and "size = 64" in source(injected[0])
    assert all(c["execution_count"] for c in cells) and not [
        o for c in cells for o in c["outputs"] if o["output_type"] == "error"
    ]
    drawing = [c for c in cells if draws(c)]
    assert len(drawing) == FIGURES[name] and all(len(pictures(c)) == 1 for c in drawing)
    assert all(len(p) > 3000 for c in drawing for p in pictures(c))  # base64 of a PNG that shows something


@pytest.mark.parametrize("name", FIGURES)
def test_what_trains_is_marked_slow(name):
    "Whoever runs `nbdev_test` on such a notebook gets what comes before the training, in seconds; the tests above run it whole."
    cells = [source(c) for c in code(json.loads((TUTORIALS / f"{name}.ipynb").read_text()))]
    first = next(i for i, c in enumerate(cells) if "fit(model" in c)
    assert all(c.startswith("#| slow\n") for c in cells[first:]) and not any(
        c.startswith("#| slow") for c in cells[:first]
    )


@pytest.mark.parametrize("name", FIGURES)
def test_small_enough_to_keep(name):
    notebook = json.loads((TUTORIALS / f"{name}.ipynb").read_text())
    assert (TUTORIALS / f"{name}.ipynb").stat().st_size < 1_500_000 and "widgets" not in notebook["metadata"], (
        "keep no state of widgets: nbconvert --ExecutePreprocessor.store_widget_state=False"
    )


# ---- on Colab, and wherever the package is not installed
ALL = sorted(path.stem for path in TUTORIALS.glob("*.ipynb") if not path.name.startswith(("_", ".")))


@pytest.mark.parametrize("name", ALL)
def test_a_badge_and_a_first_cell_that_installs(name):
    cells = json.loads((TUTORIALS / f"{name}.ipynb").read_text())["cells"]
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    about = parser["DEFAULT"]
    place = about["git_url"].removeprefix("https://github.com/")
    page = f"https://colab.research.google.com/github/{place}/blob/{about['branch']}/nbs/tutorials/{name}.ipynb"
    assert f"[![Open in Colab](attachment:open_in_colab.png)]({page})" in source(cells[0])
    first = next(c for c in cells if c["cell_type"] == "code")
    assert first is cells[1] and "%pip install" in source(first) and not first["outputs"]
    assert sum("%pip" in source(c) for c in cells) == 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("there", [True, False])
def test_it_installs_only_where_the_package_is_missing(name, there, monkeypatch):
    "The cell as IPython runs it, in a kernel whose magics say what they were asked for."
    from IPython.core.inputtransformer2 import TransformerManager

    cells = json.loads((TUTORIALS / f"{name}.ipynb").read_text())["cells"]
    asked = []

    class Shell:
        def run_line_magic(self, magic, line):
            asked.append((magic, line))

    code = TransformerManager().transform_cell(source(cells[1]))
    monkeypatch.setattr("importlib.util.find_spec", lambda package: "here" if there else None)
    exec(code, {"get_ipython": Shell})
    assert asked == ([] if there else [("pip", "install -q zsad_nb")])
