"""Links and pictures of notebooks and Markdown files: are they there, and right wherever the repository is served?

A notebook is read in five places: JupyterLab rooted at the repository or at nbs/, Voila, VS Code, the code host, the
site. What is right in all of them:

- a link leads to a file that exists, and from a notebook to one below nbs/ (JupyterLab rooted there serves nothing else);
- a notebook links to files, not to headings: JupyterLab and Voila call `## The gates` "The-gates", the others "the-gates";
- a picture of a notebook is part of it, an attachment or an output: Voila serves a notebook without the files beside it.

Markdown files (README.md, the gallery) are read on the code host and on the site: their links and pictures lead
anywhere in the repository, and to headings too. `python nbs/site/links.py` prints what breaks a rule."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(
    r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[^\S\n]*$|(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`)", re.DOTALL | re.MULTILINE
)
INLINE = re.compile(
    r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*<?(?P<target>[^)\s>]+)>?(?:\s+[\"'][^)]*)?\)"
)
NESTED = re.compile(r"!\[[^\[\]]*\]\([^)]*\)")  # a picture that is the text of a link
DEFINED = re.compile(r"^ {0,3}\[[^\]^]+\]:\s*<?(?P<target>[^\s>]+)", re.MULTILINE)
HTML = re.compile(r"<(?P<tag>a|img|source)\b[^>]*?\b(?:href|src)=[\"'](?P<target>[^\"']+)[\"']", re.IGNORECASE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    "Where a notebook or a Markdown file points."

    place: str  # "nbs/x.ipynb, cell 3" or "README.md"
    target: str  # as written
    picture: bool
    html: bool = False  # a tag, not Markdown's brackets


def without_code(
    text: str,  # Markdown
) -> str:  # the same without fenced blocks and code spans: what looks like a link there is none
    "Markdown without code."
    return CODE.sub("", text)


def links_of(
    text: str,  # Markdown
    place: str = "",  # what a message calls the text
) -> Iterator[Link]:  # of Markdown and of HTML tags
    "Every link and picture of a text."
    text = without_code(text)
    for nested in NESTED.findall(text):
        match = INLINE.match(nested)
        if match:
            yield Link(place, match["target"], True)
    for match in INLINE.finditer(NESTED.sub("picture", text)):
        yield Link(place, match["target"], False)
    for match in DEFINED.finditer(text):
        yield Link(place, match["target"], False)
    for match in HTML.finditer(text):
        yield Link(place, match["target"], match["tag"].lower() != "a", html=True)


@lru_cache(maxsize=1)
def _read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def texts(
    path: Path,  # .ipynb or .md
    root: Path = ROOT,
) -> Iterator[tuple[str, str, set[str]]]:  # what a message calls the place, the Markdown, names of attachments
    "The Markdown of a file: a notebook's cells, counted from 0 as nbdev counts them, or the whole text."
    name = path.relative_to(root).as_posix()
    if path.suffix == ".md":
        yield name, path.read_text(encoding="utf-8"), set()
        return
    for number, cell in enumerate(_read(path)):
        if cell["cell_type"] == "markdown":
            yield f"{name}, cell {number}", "".join(cell["source"]), set(cell.get("attachments", {}))


def slug(
    heading: str,  # "## What is *here*?" without the hashes
) -> str:  # "what-is-here"
    "How the code host and the site name a heading."
    words = re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def headings(
    path: Path,  # .ipynb or .md
    root: Path = ROOT,
) -> set[str]:
    "Names of a file's headings."
    found = set()
    for _, text, _ in texts(path, root):
        text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
        found |= {slug(h) for h in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE)}
    return found


def _of_notebook(link: Link, path: Path, attached: set[str], root: Path) -> str | None:
    "What is wrong with a link of a notebook, beyond what is wrong anywhere."
    if link.picture:
        if link.html:
            return "is an <img> tag, which shows no attachment; write ![words](attachment:NAME)"
        if not link.target.startswith("attachment:"):
            return (
                "is a file beside the notebook, which Voila does not serve; attach it"
                " (python nbs/site/attach.py NOTEBOOK PICTURE), or show it as an output"
            )
        if unquote(link.target.removeprefix("attachment:")) not in attached:
            return "is no attachment of its cell"
        return None
    if ELSEWHERE.match(link.target):
        return None
    target, _, heading = link.target.partition("#")
    if heading or not target:
        return "leads to a heading, which JupyterLab and Voila name otherwise than the code host; link to the notebook"
    leads = (path.parent / unquote(target)).resolve()
    if not leads.is_relative_to(root / "nbs"):
        return (
            "leaves nbs/, so it is missing in a JupyterLab or Voila rooted there;"
            " name the file as code (`paper_figures/...`), which the site makes a link"
        )
    return None


def problem(
    link: Link,
    path: Path,  # of the file that it stands in
    attached: set[str] = frozenset(),  # names of the cell's attachments
    root: Path = ROOT,
) -> str | None:  # why it is wrong, to be read behind its target
    "What is wrong with a link or picture, if anything."
    if path.suffix == ".ipynb" and (wrong := _of_notebook(link, path, attached, root)):
        return wrong
    if ELSEWHERE.match(link.target):
        return None
    target, _, heading = link.target.partition("#")
    if target.startswith(("/", "\\")) or "\\" in target:
        return "is no relative path with forward slashes"
    leads = (path.parent / unquote(target)).resolve() if target else path
    if not leads.is_relative_to(root):
        return "leaves the repository"
    if not leads.exists():
        return "leads nowhere: there is no such file"
    if heading and leads.suffix in (".md", ".ipynb") and heading not in headings(leads, root):
        return f"leads to a heading that {leads.relative_to(root).as_posix()} does not have"
    return None


def pages(
    root: Path = ROOT,
) -> list[Path]:  # notebooks below nbs/ and the Markdown files that people read
    "Every file whose links are checked."
    notebooks = [p for p in (root / "nbs").rglob("*.ipynb") if not p.name.startswith((".", "_"))]
    notebooks = [p for p in notebooks if ".ipynb_checkpoints" not in p.parts]
    markdown = [
        *root.glob("*.md"),
        *(root / "paper_figures").rglob("*.md"),
        *(root / "zsad_nb" / "assets").glob("*.md"),
    ]
    return sorted({*notebooks, *markdown})


def problems(
    root: Path = ROOT,
    paths: list[Path] | None = None,  # default: `pages`
) -> list[str]:  # one sentence each
    "What breaks a rule: which notebook, which cell, which link, and what to do."
    found = []
    for path in pages(root) if paths is None else paths:
        for place, text, attached in texts(path, root):
            for link in links_of(text, place):
                if wrong := problem(link, path, attached, root):
                    found.append(f"{place}: the {'picture' if link.picture else 'link'} {link.target} {wrong}.")
    return found


if __name__ == "__main__":
    said = problems()
    print("\n".join(said) or f"{len(pages())} files: every link and picture is there")
    sys.exit(bool(said))
