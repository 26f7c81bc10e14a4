"""The site: every notebook as it was committed, the API reference, the gallery, the published numbers, and a search.

    make docs                        # or: python nbs/site/build_site.py --out runs/site
    python -m http.server -d runs/site/html

Nothing is executed and nothing is fetched. A broken link, a missing picture or a warning of Sphinx ends the build with
a sentence that names the notebook and the link, and with status 1."""

import argparse
import re
import shutil
import sys
from configparser import ConfigParser
from functools import lru_cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).parent))

import api
import links
import stage as stages

ROOT = links.ROOT
PACKAGED = {
    "mathjax.js": ("mathjax", "static/mathjax/es5/tex-svg-full.js"),
    "mermaid.js": ("mermaidx", "assets/mermaid.js"),
}
FOLDERS = {"tutorials": "Tutorials", "experiments": "Experiments"}
READ_ON = ("nbs/tutorials/index.md", "nbs/index.md", "nbs/experiments/index.md", "api/index.md")
READ_ON += (
    "paper_figures/gallery.md",
    "numbers/index.md",
    "paper_figures/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)


@lru_cache
def settings(
    root: Path = ROOT,
) -> dict[str, str]:  # of settings.ini
    "Name, version and addresses: where they are for everything else, too."
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def tree(
    pages: list[str],  # relative to the page that lists them
    caption: str = "",
) -> str:  # MyST
    "A table of contents that stands at the side only."
    options = [":hidden:"] + ([f":caption: {caption}"] if caption else [])
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])


def lay_out_room(stage: stages.Stage, room: str, modules: dict[str, api.Module]):
    "A room's notebooks: the opening one lists the others."
    folder = stage.root / "nbs" / room
    by_notebook = {m.notebook: name for name, m in modules.items()}
    paths = stages.in_order(folder)
    for path in paths:
        place = path.relative_to(stage.root).as_posix()
        below = [p.name for p in paths if p != path] if path.stem == stages.FIRST else []
        stages.notebook(stage, path, by_notebook.get(place), below)


def lay_out_folder(stage: stages.Stage, folder: str, title: str, gallery: str):
    "Tutorials or experiments: notebooks without numbers, in the order of the gallery."
    paths = stages.in_order(stage.root / "nbs" / folder, gallery)
    lines = [f"# {title}", "", "| notebook | what it shows |", "|---|---|"]
    for path in paths:
        stages.notebook(stage, path)
        name, summary = stages.title_and_summary(path)
        lines.append(f"| [{name}]({path.name}) | {summary} |")
    lines += ["", "With pictures, and how long each takes: [the gallery](../../paper_figures/gallery.md)."]
    stage.write(f"nbs/{folder}/index.md", "\n".join(lines) + tree([p.name for p in paths]))


def lay_out_rooms(stage: stages.Stage, rooms: list[str]):
    "The page that lists the rooms."
    lines = [
        "# Notebooks",
        "",
        "> The source of the package, a room a folder: each builds on the rooms above it.",
        "",
        "A bar at the left of a cell marks code that the module consists of; everything else explains, shows or proves it.",
        "",
        "| room | what lives there |",
        "|---|---|",
    ]
    for room in rooms:
        _, summary = stages.title_and_summary(stage.root / "nbs" / room / f"{stages.FIRST}.ipynb")
        lines.append(f"| [{room}]({room}/{stages.FIRST}.ipynb) | {summary} |")
    pages = [f"{room} <{room}/{stages.FIRST}.ipynb>" for room in rooms]
    stage.write("nbs/index.md", "\n".join(lines) + "\n" + tree(pages))


def lay_out_api(stage: stages.Stage, modules: dict[str, api.Module]):
    "A page a module, a page a room, and one that lists the rooms."
    rooms: dict[str, list[api.Module]] = {}
    for module in sorted(modules.values(), key=lambda m: m.notebook):
        rooms.setdefault(module.notebook.split("/")[1], []).append(module)
        stage.write(f"api/{module.name}.md", api.page(module))
    front = ["# API", "", "> Every public function and class, with the comment of each parameter.", ""]
    rooms = {room: rooms[room] for room in stages.ROOMS if room in rooms}
    for room, found in rooms.items():
        lines = [f"# {room}", "", "| module | |", "|---|---|"]
        lines += [f"| [{m.name.split('.')[-1]}]({m.name}.md) | {api.text(api.summary(m))} |" for m in found]
        names = [f"{m.name.split('.')[-1]} <{m.name}.md>" for m in found]
        stage.write(f"api/{room}.md", "\n".join(lines) + "\n" + tree(names))
        front += [f"## [{room}]({room}.md)", "", *lines[2:], ""]
    front += ["Every name, from A to Z: {ref}`genindex`.", ""]
    stage.write("api/index.md", "\n".join(front) + tree([f"{room}.md" for room in rooms]))


def lay_out_markdown(stage: stages.Stage):
    "The gallery and the other texts where they are, and README.md as the front page that lists everything."
    texts = {}
    for path in links.pages(stage.root):
        if path.suffix == ".md":
            place = path.relative_to(stage.root).as_posix()
            text = stages.markdown(stage, path.read_text(encoding="utf-8"), path)
            title = "" if re.search(r"^# ", text, re.MULTILINE) else f"# {path.stem.replace('_', ' ')}\n\n"
            texts[stages.page_name(place)] = title + text
    front = texts.pop("index.md")
    for place, text in texts.items():
        stage.write(place, text if place in READ_ON else f"---\norphan: true\n---\n{text}")
    stage.write("index.md", front + tree([name for name in READ_ON if stage.out / name in stage.written]))


def lay_out(
    out: Path,  # the folder that Sphinx will read
    root: Path = ROOT,
) -> stages.Stage:
    "Everything that the site consists of, as MyST and notebooks."
    import published_page

    stage = stages.Stage(root, out, settings(root)["git_url"])
    modules = api.modules(root)
    gallery = (root / "paper_figures" / "gallery.md").read_text(encoding="utf-8")
    rooms = [room for room in stages.ROOMS if (root / "nbs" / room / f"{stages.FIRST}.ipynb").is_file()]
    for room in rooms:
        lay_out_room(stage, room, modules)
    lay_out_rooms(stage, rooms)
    for folder, title in FOLDERS.items():
        if (root / "nbs" / folder).is_dir():
            lay_out_folder(stage, folder, title, gallery)
    lay_out_api(stage, modules)
    for name, text in published_page.pages().items():
        stage.write(name, text)
    lay_out_markdown(stage)
    stage.tidy()
    return stage


def packaged(
    into: Path,  # a folder of static files
):
    "MathJax and Mermaid, out of the packages that ship them."
    into.mkdir(parents=True, exist_ok=True)
    for name, (package, file) in PACKAGED.items():
        spec = find_spec(package)
        if spec is None:
            raise SystemExit(f"{package}, which ships {name}, is not installed: make docs, or pip install -e '.[docs]'")
        shutil.copy2(Path(next(iter(spec.submodule_search_locations)), file), into / name)


class _Page(HTMLParser):
    "What an HTML page links to, and what can be linked to in it."

    def __init__(self):
        super().__init__()
        self.targets: list[tuple[str, bool]] = []  # address, and whether the page needs it to be shown
        self.names: set[str] = set()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names |= {attributes[k] for k in ("id", "name") if attributes.get(k)}
        relation = set((attributes.get("rel") or "").split())
        needed = tag in ("img", "script", "source", "iframe")
        needed = needed or (tag == "link" and bool(relation & {"stylesheet", "icon", "preload"}))
        for key in ("href", "src"):
            if attributes.get(key):
                self.targets.append((attributes[key], needed))


def output_problems(
    html: Path,  # the built site
) -> list[str]:  # one sentence each
    "Links of the built pages that lead nowhere, and parts that would come from a network."
    pages = {}
    for path in html.rglob("*.html"):
        if path.is_relative_to(html / "_static"):  # templates of the theme
            continue
        pages[path] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    found, files = [], {p for p in html.rglob("*") if p.is_file()}
    for path, page in pages.items():
        name = path.relative_to(html).as_posix()
        for target, needed in dict.fromkeys(page.targets):
            if links.ELSEWHERE.match(target) or target.startswith("//"):
                if needed and not target.startswith("data:"):
                    found.append(f"{name}: {target} would be fetched from a network to show the page.")
                continue
            file, _, heading = target.partition("#")
            file = file.partition("?")[0]
            leads = Path(path.parent, unquote(file)).resolve() if file else path
            leads = leads / "index.html" if leads.is_dir() else leads
            if leads not in files:
                found.append(f"{name}: {target} leads nowhere: the site has no such file.")
            elif heading and leads in pages and unquote(heading) not in pages[leads].names:
                found.append(f"{name}: {target} leads to a heading that the page does not have.")
    return found


def build(
    out: Path,  # gets source/ and html/
    root: Path = ROOT,
    jobs: int = 1,
) -> int:  # 0 where the site is complete
    "Check, lay out, build, check again."
    if wrong := links.problems(root):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    from sphinx.cmd.build import main as sphinx_build

    out = out.resolve()
    lay_out(out / "source", root)
    packaged(out / "packaged")
    here = Path(__file__).parent
    arguments = [
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-j",
        str(jobs),
        "-c",
        str(here),
        "-d",
        str(out / "doctrees"),
    ]
    arguments += ["-D", f"html_static_path={here / 'static'},{out / 'packaged'}"]
    arguments += ["-D", f"html_extra_path={out / 'source' / '_extra'}"]
    if status := sphinx_build([*arguments, str(out / "source"), str(out / "html")]):
        return status
    if wrong := output_problems(out / "html"):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    (out / "html" / ".nojekyll").touch()  # the code host's pages leave folders out whose names begin with _
    print(f"{len(list((out / 'html').rglob('*.html')))} pages: {out / 'html' / 'index.html'}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "site")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    sys.exit(build(options.out, jobs=options.jobs))
