"""From the repository to the folder that Sphinx reads: notebooks and Markdown files, with the same layout.

Nothing is executed: a notebook shows the outputs that it was committed with. What changes on the way is what only a
site needs: directives of nbdev (`#| export`) are left out, cells that are hidden in nbdev's sense are folded, a line
below the title leads to the module's API page, Mermaid diagrams and attachments become what a browser shows."""

import base64
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import links

FIRST = "00_start_here"
ROOMS = ("core", "data", "synthetic", "backbones", "components", "methods", "training", "evaluation") + (
    "figures",
    "inspection",
    "explore",
    "runs",
    "deploy",
    "cli",
)  # the order of reading; tests/unit/test_api_pages.py holds it to the one of the house
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?(?:\s+(.*))?$")
NAMED_FILE = re.compile(r"(?<![\[`])`((?:nbs|paper_figures)/[\w./-]+\.(?:csv|png|jpg|md|ipynb|yaml))`(?![\]`])")
WIDGET = "application/vnd.jupyter.widget-view+json"
FENCE = re.compile(r"^(```+|~~~+).*?^\1[^\S\n]*$", re.DOTALL | re.MULTILINE)
MERMAID = re.compile(r"^(```+)mermaid\s*\n(.*?)^\1\s*$", re.DOTALL | re.MULTILINE)
TAG = re.compile(r"(<(?:a|img)\b[^>]*?\b(?:href|src)=[\"'])([^\"']+)([\"'])", re.IGNORECASE)


@dataclass
class Stage:
    "Where the pages of the site are laid out."

    root: Path  # the repository
    out: Path  # emptied of what is not written again
    code_host: str  # https://.../zsad_nb
    written: set[Path] = field(default_factory=set)

    def write(self, name: str, content: str | bytes) -> Path:
        "A file of the stage; one that has not changed keeps its date, so that Sphinx does not read it again."
        path = self.out / name
        data = content.encode("utf-8") if isinstance(content, str) else content
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.written.add(path)
        return path

    def copy(self, source: Path, name: str | None = None):
        "A file of the repository, at its own place."
        name = name or source.relative_to(self.root).as_posix()
        target = self.out / name
        if target not in self.written:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
            self.written.add(target)

    def tidy(self):
        "Remove what an earlier build left."
        for path in self.out.rglob("*"):
            if path.is_file() and path not in self.written:
                path.unlink()


def page_name(
    path: str,  # of a file of the repository: "README.md", "nbs/core/02_files.ipynb"
) -> str:  # of its page, with the suffix of its source
    "The front page is README.md; every other page is where its file is."
    return "index.md" if path == "README.md" else path


def _html_name(path: str) -> str:
    return re.sub(r"\.(md|ipynb)$", ".html", page_name(path))


def _relative(target: str, page: str) -> str:
    "From a page to another place, both as paths from the top."
    return os.path.relpath(target, os.path.dirname(page) or ".").replace(os.sep, "/")


def _linked(stage: Stage, target: str, page: Path, html: bool) -> str:
    "What a link of the repository becomes on the site; files that it leads to are laid out."
    if links.ELSEWHERE.match(target) or target.startswith("#"):
        return target
    name, hashed, heading = target.partition("#")
    leads = (page.parent / links.unquote(name)).resolve()
    place = leads.relative_to(stage.root).as_posix()
    here = page.relative_to(stage.root).as_posix()
    if leads.is_dir():
        return f"{stage.code_host}/tree/main/{place}"
    if leads.suffix in (".md", ".ipynb"):
        renamed = _html_name(place) if html else page_name(place)
        return _relative(renamed, page_name(here)) + hashed + heading
    stage.copy(leads, f"_extra/{place}" if html else None)
    return target


def _outside(code: re.Pattern, text: str, change) -> str:
    "Apply a function to what is not code."
    parts, last = [], 0
    for match in code.finditer(text):
        parts += [change(text[last : match.start()]), match[0]]
        last = match.end()
    return "".join([*parts, change(text[last:])])


def markdown(
    stage: Stage,
    text: str,
    page: Path,  # the file that it stands in
) -> str:  # for MyST
    "A Markdown text of the repository, as the site reads it."

    def inline(match: re.Match) -> str:
        target = _linked(stage, match["target"], page, html=False)
        return match[0].replace(f"({match['target']}", f"({target}", 1)

    def change(part: str) -> str:
        part = links.INLINE.sub(inline, part)
        return TAG.sub(lambda m: m[1] + _linked(stage, m[2], page, html=True) + m[3], part)

    def named(match: re.Match) -> str:
        if not (stage.root / match[1]).is_file():
            return match[0]
        target = os.path.relpath(stage.root / match[1], page.parent).replace(os.sep, "/")
        return f"[`{match[1]}`]({_linked(stage, target, page, html=False)})"

    text = MERMAID.sub(lambda m: f'\n```{{raw}} html\n<pre class="mermaid">\n{m[2]}</pre>\n```\n', text)
    text = _outside(FENCE, text, lambda part: NAMED_FILE.sub(named, part))
    return _outside(links.CODE, text, change)


def directives(
    source: str,  # of a code cell
) -> tuple[dict[str, str], str]:  # {"export": ""}, the code behind them
    "nbdev's directives at the top of a cell, and what follows."
    lines = source.splitlines(keepends=True)
    found = {}
    while lines and ((match := DIRECTIVE.match(lines[0].rstrip())) or not lines[0].strip()):
        if match:
            found[match[1]] = match[2] or ""
        lines.pop(0)
    return found, "".join(lines)


def _pictured(cell: dict) -> str | None:
    "The words that a cell's picture was stored with (metadata of its output), if it has a picture."
    for output in cell["outputs"]:
        for kind in set(output.get("data", {})) & {"image/png", "image/jpeg", "image/svg+xml"}:
            return output["metadata"].get(kind, {}).get("alt") or output["metadata"].get("alt") or ""
    return None


def _shown(output: dict) -> bool:
    "False for a widget that was stored without a still: its text says nothing, and a site has no kernel for it."
    kinds = set(output.get("data", {}))
    return WIDGET not in kinds or bool(kinds - {WIDGET, "text/plain"})


def _code_cell(cell: dict, section: str) -> dict | None:
    "A code cell as it is shown, with tags that fold it or mark it as part of the module, and words for its picture."
    found, source = directives("".join(cell["source"]))
    if "default_exp" in found or not source.strip():
        return None
    cell = cell | dict(outputs=[output for output in cell["outputs"] if _shown(output)])
    tags = list(cell["metadata"].get("tags", []))
    if "hide" in found:
        tags.append("hide-input" if cell["outputs"] else "hide-cell")
    if {"export", "exports", "exporti"} & set(found):
        tags.append("exported")
    metadata = cell["metadata"] | dict(tags=tags)
    if (words := _pictured(cell)) is not None:
        metadata["mystnb"] = dict(image=dict(alt=words or f"Picture of the section: {section}"))
    return cell | dict(source=source, metadata=metadata)


def _attachments(stage: Stage, cell: dict, text: str, page: Path, number: int) -> str:
    "Attached pictures become files beside the page."
    for name, kinds in cell.get("attachments", {}).items():
        data = base64.b64decode(next(iter(kinds.values())))
        folder = f"{page.stem}_attachments"
        stage.write((page.parent / folder / f"{number}_{name}").relative_to(stage.root).as_posix(), data)
        text = text.replace(f"(attachment:{name})", f"({folder}/{number}_{name})")
    return text


def _below_title(text: str, line: str) -> str:
    "A line below the title and the sentence that sums the notebook up."
    head = re.match(r"\s*# .*\n(?:\s*\n)?(?:>.*(?:\n|$))*", text)
    return text[: head.end()].rstrip() + f"\n\n{line}\n\n" + text[head.end() :].lstrip("\n") if head else text


def notebook(
    stage: Stage,
    path: Path,
    module: str | None = None,  # "zsad_nb.components.vtam": its API page is linked
    contents: list[str] = (),  # pages that belong below this one
):
    "Lay out a notebook."
    nb = json.loads(path.read_text(encoding="utf-8"))
    place = path.relative_to(stage.root).as_posix()
    cells, section = [], path.stem
    for number, cell in enumerate(nb["cells"]):
        if cell["cell_type"] == "markdown":
            section = (re.findall(r"^#+ (.+)$", "".join(cell["source"]), re.MULTILINE) or [section])[-1]
            text = markdown(stage, "".join(cell["source"]), path)
            text = _attachments(stage, cell, text, path, number)
            cell = {k: v for k, v in cell.items() if k != "attachments"} | dict(source=text)
        elif cell["cell_type"] == "code":
            cell = _code_cell(cell, re.sub(r"[`*$]", "", section))
        if cell is not None:
            cells.append(cell)
    about = f"[{place}]({stage.code_host}/blob/main/{place})"
    if module:
        about = f"[API of {module}]({_relative(f'api/{module}.md', place)}) · {about}"
    first = next(c for c in cells if c["cell_type"] == "markdown")
    first["source"] = _below_title(first["source"], f"{{.about}}\n{about}")
    if contents:
        tree = "\n".join(["```{toctree}", ":hidden:", "", *contents, "```"])
        cells.append(dict(cell_type="markdown", id="contents", metadata={}, source=tree))
    nb["metadata"].setdefault("language_info", dict(name="python", pygments_lexer="ipython3"))
    stage.write(place, json.dumps(nb | dict(cells=cells), ensure_ascii=False))


def title_and_summary(
    path: Path,  # a notebook
) -> tuple[str, str]:  # "# Title" and "> one line", without their marks
    "What a notebook says of itself in its first cell."
    text = next((t for _, t, _ in links.texts(path, path.parent)), "")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    summary = re.search(r"^> (.+)$", text, re.MULTILINE)
    return title[1] if title else path.stem, summary[1] if summary else ""


def in_order(
    folder: Path,  # a room, tutorials or experiments
    gallery: str = "",  # text of the gallery: its order, where notebooks have no numbers
) -> list[Path]:
    "The notebooks of a folder in the order of reading."
    names = [p for p in folder.glob("*.ipynb") if not p.name.startswith(("_", "."))]
    return sorted(names, key=lambda p: (gallery.find(f"/{p.name})") % (len(gallery) + 1), p.name))
