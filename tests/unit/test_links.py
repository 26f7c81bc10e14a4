"Links and pictures of notebooks and Markdown files, in the five places where the repository is read (nbs/site/links.py)."

import base64
import json
from pathlib import Path

import links
import pytest
from attach import attach

ROOT = Path(__file__).resolve().parents[2]


def test_every_link_and_picture_is_right_in_every_place():
    wrong = links.problems()
    assert not wrong, "\n".join(wrong)


def write_notebook(path: Path, *texts: str, attachments: dict | None = None) -> Path:
    "A notebook of Markdown cells; the first has the attachments."
    cells = [
        dict(cell_type="markdown", id=f"c{i}", metadata={}, source=text.splitlines(keepends=True))
        for i, text in enumerate(texts)
    ]
    if attachments:
        cells[0]["attachments"] = attachments
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return path


@pytest.fixture
def repository(tmp_path) -> Path:
    "A repository with one notebook that others may link to, a table and a picture outside nbs/."
    write_notebook(tmp_path / "nbs" / "core" / "01_other.ipynb", "# Other\n\n## The gates\n")
    (tmp_path / "paper_figures").mkdir()
    (tmp_path / "paper_figures" / "table.csv").write_text("a\n1\n")
    (tmp_path / "paper_figures" / "picture.png").write_bytes(b"png")
    (tmp_path / "README.md").write_text("# Read me\n\n## What is *here*, and where?\n")
    return tmp_path


@pytest.mark.parametrize(
    "text, said",
    [
        ("[other](01_other.ipynb)", None),
        ("[other](../core/01_other.ipynb 'a title')", None),
        ("[paper](https://arxiv.org/abs/2601.09147)", None),
        ("`[no](link.ipynb)` and\n\n```\n[no](link.ipynb)\n```\n", None),
        ("[gone](02_gone.ipynb)", "the link 02_gone.ipynb leads nowhere"),
        ("[by name][gone]\n\n[gone]: 02_gone.ipynb\n", "the link 02_gone.ipynb leads nowhere"),
        ('<a href="02_gone.ipynb">gone</a>', "the link 02_gone.ipynb leads nowhere"),
        ("[gates](01_other.ipynb#the-gates)", "leads to a heading, which JupyterLab and Voila name otherwise"),
        ("[below](#the-gates)", "leads to a heading, which JupyterLab and Voila name otherwise"),
        ("[table](../../paper_figures/table.csv)", "leaves nbs/"),
        ("[root](/nbs/core/01_other.ipynb)", "leaves nbs/"),
        ("![picture](../../paper_figures/picture.png)", "which Voila does not serve; attach it"),
        ("![picture](attachment:picture.png)", "is no attachment of its cell"),
        ('<img src="attachment:picture.png" alt="x">', "is an <img> tag"),
        ("[![picture](gone.png)](01_other.ipynb)", "the picture gone.png is a file beside the notebook"),
    ],
)
def test_rules_of_notebooks(repository, text, said):
    write_notebook(repository / "nbs" / "core" / "02_mine.ipynb", "# Mine", text)
    wrong = links.problems(repository)
    if said is None:
        assert wrong == []
    else:
        assert len(wrong) == 1 and wrong[0].startswith("nbs/core/02_mine.ipynb, cell 1: ") and said in wrong[0]


@pytest.mark.parametrize(
    "text, said",
    [
        ("[table](paper_figures/table.csv) ![picture](paper_figures/picture.png)", None),
        ('<img src="paper_figures/picture.png" alt="x">', None),
        ("[folder](nbs/core)", None),
        ("[here](#what-is-here-and-where)", None),
        ("[gates](nbs/core/01_other.ipynb#the-gates)", None),
        ("[gates](nbs/core/01_other.ipynb#the-doors)", "a heading that nbs/core/01_other.ipynb does not have"),
        ('<img src="paper_figures/gone.png" alt="x">', "the picture paper_figures/gone.png leads nowhere"),
        ("[above](../elsewhere.md)", "leaves the repository"),
        ("[root](/paper_figures/table.csv)", "is no relative path"),
    ],
)
def test_rules_of_markdown_files(repository, text, said):
    with (repository / "README.md").open("a") as file:
        file.write(text + "\n")
    wrong = links.problems(repository)
    assert (
        (wrong == []) if said is None else (len(wrong) == 1 and wrong[0].startswith("README.md: ") and said in wrong[0])
    )


def test_a_picture_is_attached_where_the_text_names_it(repository):
    path = write_notebook(repository / "nbs" / "core" / "02_mine.ipynb", "![one](../../paper_figures/picture.png)")
    for data in (b"png", b"another"):  # again, when the picture has changed
        (repository / "paper_figures" / "picture.png").write_bytes(data)
        assert attach(path, [repository / "paper_figures" / "picture.png"]) == 1
        cell = json.loads(path.read_text())["cells"][0]
        assert cell["source"] == ["![one](attachment:picture.png)"]
        assert base64.b64decode(cell["attachments"]["picture.png"]["image/png"]) == data
    assert links.problems(repository) == []
    with pytest.raises(ValueError, match="no cell of .* names table.csv"):
        attach(path, [repository / "paper_figures" / "table.csv"])


def test_attached_pictures_are_the_committed_ones():
    "`make screenshots` takes the pictures and attaches them; one without the other would show an old widget."
    for notebook in links.pages():
        if notebook.suffix != ".ipynb":
            continue
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            for name, kinds in cell.get("attachments", {}).items():
                beside = ROOT / "paper_figures" / "widgets" / name
                if beside.exists():
                    same = base64.b64decode(kinds["image/png"]) == beside.read_bytes()
                    assert same, f"{notebook.name} shows an older {name}: python nbs/site/attach.py {notebook} {beside}"
