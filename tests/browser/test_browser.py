"The explorer and the upload in a real browser, in JupyterLab and in Voila: what a hand does, and what the page then shows."

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

CHROMIUM = os.environ.get("ZSAD_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("no Chromium here (apt-get install chromium, or set ZSAD_CHROMIUM)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
expect = sync_api.expect

from zsad_nb.explore.maps_store import make_store
from zsad_nb.methods.base import create
from zsad_nb.synthetic.benchmark import render, synthetic_index

PATIENCE = 180_000  # ms: the machine may be busy
EXPLORER = """from zsad_nb.explore.explorer import HeatmapExplorer
HeatmapExplorer({"one": STORES[0], "two": STORES[1]})
"""
UPLOAD = """from zsad_nb.methods.base import create
from zsad_nb.explore.upload import Upload
from zsad_nb.inspection.inspector import Inspector
Upload(Inspector(create("visualad", weights="random:0", image_size=64)), category="gear")
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Path:
    "A notebook with both widgets over a small index whose maps are there."
    folder = tmp_path_factory.mktemp("browser")
    torch.manual_seed(0)
    index = synthetic_index(folder / "set", "target", 64, normal=1, defective=2)
    index = (
        index[index.category.isin(["gear", "mesh"])]
        .reset_index(drop=True)
        .pipe(lambda t: (t.attrs.update(root=str(folder / "set")), t)[1])
    )
    stores = []
    for i in (0, 1):
        store = make_store(create("visualad", weights=f"random:{i}", image_size=64), index, folder / "maps")
        store.compute(progress=False)
        for row in range(len(store)):
            store.keep(row)  # so that no click waits for a model
        stores.append(str(store.folder))
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=s)
        for i, s in enumerate((EXPLORER.replace("STORES", repr(stores)), UPLOAD))
    ]
    path = folder / "look.ipynb"
    path.write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata=dict(kernelspec=dict(display_name="Python 3", language="python", name="python3")),
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )
    return path


@contextlib.contextmanager
def serving(command: list, folder: Path, wait_for: str):
    "A server on a free port, with settings of its own."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {
        name: str(folder / "own" / name.lower())
        for name in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
            "IPYTHONDIR",
        )
    }
    quiet = (
        Path(own["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    )
    quiet.parent.mkdir(parents=True, exist_ok=True)
    quiet.write_text('{"fetchNews": "false"}')
    environment = dict(
        os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", HF_HUB_OFFLINE="1", **own
    )
    with open(folder / "server.log", "w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, f"--port={port}"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            end = time.monotonic() + PATIENCE / 1000
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{wait_for}", timeout=PATIENCE / 1000).close()
                    break
                except urllib.error.HTTPError:
                    break  # it answers
                except OSError:
                    if server.poll() is not None or time.monotonic() > end:
                        pytest.fail(f"{command[0]} did not start:\n{(folder / 'server.log').read_text()[-2000:]}")
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def page_of(browser, **size):
    page = browser.new_page(viewport=size or dict(width=1300, height=1500))
    page.set_default_timeout(PATIENCE)
    page.route(
        lambda address: not address.startswith("http://127.0.0.1"), lambda route: route.abort()
    )  # Voila asks the net for icons and waits for them
    expect.set_options(timeout=PATIENCE)
    errors = []
    own = "reading 'schema'"  # of Notebook 7 itself, where it cannot reach the net
    page.on("pageerror", lambda e: errors.append(str(e)) if own not in str(e) else None)
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "anywidget" in m.text else None)
    try:
        yield page
        assert not errors, errors
    finally:
        page.close()


def run_all(page, url: str):
    "Open the notebook in JupyterLab and run it when the kernel is ready."
    page.goto(f"{url}/lab/tree/look.ipynb")
    page.wait_for_selector("#jp-main-statusbar >> text=| Idle")
    page.locator(".lm-MenuBar-item:has-text('Run')").click()
    page.locator(".lm-Menu-itemLabel:text-is('Run All Cells')").click()


class Hand:
    "What a person does on the page."

    def __init__(self, page):
        self.page, self.explorer, self.upload = page, page.locator(".zsad").nth(0), page.locator(".zsad").nth(1)
        expect(self.explorer.locator(".thumb")).to_have_count(3)
        self.settled(self.explorer)

    def settled(self, room):
        "All pictures that are to be seen are loaded."
        self.page.wait_for_function(
            "room => [...room.querySelectorAll('img:not([hidden])')].length > 3 &&"
            " [...room.querySelectorAll('img:not([hidden])')].every(i => i.complete && i.naturalWidth)",
            arg=room.element_handle(),
        )

    def frame(self, label: str, room=None):
        return (
            (room or self.explorer)
            .locator(".zsad-panel", has=self.page.locator(f"figcaption span:text-is('{label}')"))
            .locator(".frame")
        )

    def picture(self, label: str, room=None) -> str:
        return self.frame(label, room).locator("img:not([hidden])").last.get_attribute("src")

    def choose(self, thumb: int, shown: str):
        "Click a thumbnail; again if nothing came of it, as a person does: on a busy machine the page may move between press and release, and then the browser reports no click."
        for patience in (30_000, PATIENCE):
            self.explorer.locator(".thumb").nth(thumb).click()
            with contextlib.suppress(AssertionError):
                return expect(self.explorer.get_by_text(shown)).to_be_visible(timeout=patience)
        expect(self.explorer.get_by_text(shown)).to_be_visible(timeout=1)

    def slide(self, name: str, share: float, room=None) -> str:
        "Click a slider's track, and read what stands beside it."
        control = (room or self.explorer).locator(
            ".widget-hslider", has=self.page.locator(f".widget-label:text-is('{name}')")
        )
        control.scroll_into_view_if_needed()
        before = control.locator(".widget-readout").inner_text()
        track = control.locator(".noUi-base").bounding_box()
        self.page.mouse.click(track["x"] + share * track["width"], track["y"] + track["height"] / 2)
        expect(control.locator(".widget-readout")).not_to_have_text(before)
        return control.locator(".widget-readout").inner_text()

    def changed(self, label: str, before: str, room=None):
        self.page.wait_for_function(
            "([frame, before]) => [...frame.querySelectorAll('img:not([hidden])')].pop().src !== before",
            arg=[self.frame(label, room).element_handle(), before],
        )

    def click(self, label: str, x: float, y: float, room=None):
        self.frame(label, room).scroll_into_view_if_needed()
        box = self.frame(label, room).bounding_box()
        self.page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def use_explorer(hand, keys: bool = True):
    page = hand.page
    explorer = hand.explorer

    def step(key: str, thumb: int, shown: str):
        "To a neighbour, by a key where the focus is, or by its thumbnail."
        if not keys:
            return hand.choose(thumb, shown)
        page.keyboard.press(key)
        expect(explorer.get_by_text(shown)).to_be_visible()

    expect(explorer.get_by_text("1 / 3")).to_be_visible()
    for label in ("image", "mask", "heatmap", "overlay", "contour"):
        expect(hand.frame(label)).to_be_visible()

    for name in ("Opacity", "Smoothing, px", "Contour at", "Clip, %", "Threshold"):  # what a screen reader hears
        expect(explorer.get_by_role("slider", name=name, exact=True)).to_have_count(1)
    for name in ("Method", "Compare with", "Category", "Sort", "Shown"):
        expect(explorer.get_by_role("combobox", name=name, exact=True)).to_have_count(1)
    expect(explorer.get_by_role("group", name="Colours of", exact=True)).to_have_count(1)

    before = {n: hand.picture(n) for n in ("overlay", "heatmap")}  # sliders
    assert float(hand.slide("Opacity", 0.1)) == pytest.approx(0.1, abs=0.05)
    hand.changed("overlay", before["overlay"])
    assert hand.picture("heatmap") == before["heatmap"]
    hand.slide("Smoothing, px", 0.5)
    hand.changed("heatmap", before["heatmap"])
    numbers = explorer.locator(".numbers", has_text="precision")
    first = numbers.text_content()
    hand.slide("Threshold", 0.97)
    expect(numbers).not_to_have_text(first)
    explorer.get_by_role("button", name="largest F1").click()
    expect(numbers).to_have_text(first)

    before = hand.picture("image")  # thumbnails, and arrows where the focus is
    hand.choose(2, "3 / 3")
    expect(explorer.locator(".thumb").nth(2)).to_have_attribute("aria-pressed", "true")
    hand.changed("image", before)
    step("ArrowLeft", 1, "2 / 3")

    hand.click("heatmap", 0.25, 0.75)  # a pixel
    expect(explorer.get_by_text(re.compile(r"x 1[567], y 4[789] of 64"))).to_be_visible()
    expect(explorer.get_by_text("higher than")).to_be_visible()
    expect(hand.frame("image").locator(".ring")).to_be_visible()
    expect(hand.frame("similar places").locator("img:not([hidden])")).to_have_count(1)
    step("ArrowRight", 2, "3 / 3")

    explorer.get_by_label("Compare with", exact=True).select_option(label="two")  # the wipe
    bar = hand.frame("overlay").locator(".bar")
    expect(bar).to_be_visible()
    frame = hand.frame("overlay").bounding_box()
    wipe = explorer.locator(".widget-hslider", has_text="Wipe").locator(".widget-readout")
    page.mouse.move(frame["x"] + 0.5 * frame["width"], frame["y"] + 0.3 * frame["height"])
    page.mouse.down()
    page.mouse.move(frame["x"] + 0.35 * frame["width"], frame["y"] + 0.4 * frame["height"])
    page.mouse.move(frame["x"] + 0.2 * frame["width"], frame["y"] + 0.4 * frame["height"])
    page.mouse.up()
    expect(wipe).to_have_text(re.compile(r"0\.(19|20|21)"))
    assert "inset(0px 80" in hand.frame("overlay").locator("img").last.evaluate(
        "i => getComputedStyle(i).clipPath"
    ) or "inset(0 80" in hand.frame("overlay").locator("img").last.get_attribute("style")

    explorer.get_by_role("button", name="Code").click()
    expect(explorer.locator("pre")).to_contain_text("snapshot(store, ")
    assert explorer.evaluate("e => e.scrollWidth - e.clientWidth") <= 1  # nothing sticks out


def use_upload(hand, drop: bool):
    from PIL import Image

    page = hand.page
    upload = hand.upload
    data = io.BytesIO()
    Image.fromarray(render("gear", 7, 96, "crack").image).save(data, "PNG")
    zone = upload.locator(".drop")
    expect(zone).to_be_visible()
    if drop:
        files = page.evaluate_handle(
            "bytes => { const d = new DataTransfer(); d.items.add(new File([new Uint8Array(bytes)], 'my gear.png', {"
            " type: 'image/png' })); return d; }",
            list(data.getvalue()),
        )
        zone.dispatch_event("drop", dict(dataTransfer=files))
    else:
        upload.locator("input[type=file]").set_input_files(
            dict(name="my gear.png", mimeType="image/png", buffer=data.getvalue())
        )
    expect(upload.get_by_text("my gear.png, 96 x 96")).to_be_visible()
    expect(hand.frame("overlay", upload)).to_be_visible()
    hand.settled(upload)
    for name in ("Opacity", "Smoothing, px", "Contour at", "Clip, %"):
        expect(upload.get_by_role("slider", name=name, exact=True)).to_have_count(1)
    expect(upload.get_by_role("textbox", name="It is a", exact=True)).to_have_value("gear")
    before = hand.picture("overlay", upload)
    hand.slide("Opacity", 0.1, upload)
    hand.changed("overlay", before, upload)
    upload.locator("input[type=file]").set_input_files(
        dict(name="notes.png", mimeType="image/png", buffer=b"no picture")
    )
    expect(upload.get_by_role("alert")).to_contain_text("notes.png: not an image")


def test_jupyterlab(browser, notebook):
    with (
        serving(
            [
                "jupyter",
                "lab",
                "--no-browser",
                "--allow-root",
                "--ip=127.0.0.1",
                "--IdentityProvider.token=",
                "--ServerApp.root_dir=.",
            ],
            notebook.parent,
            "/api/status",
        ) as url,
        page_of(browser) as page,
    ):
        run_all(page, url)
        hand = Hand(page)
        use_explorer(hand)
        use_upload(hand, drop=False)
        assert page.locator(".jp-Notebook .jp-CodeCell").count() == 2  # arrows and keys never reached the notebook


def test_notebook_7(browser, notebook):
    pytest.importorskip("notebook", minversion="7", reason="Jupyter Notebook 7: pip install notebook")
    quiet = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.root_dir=."]
    with serving(["notebook", *quiet], notebook.parent, "/api/status") as url, page_of(browser) as page:
        page.goto(f"{url}/notebooks/look.ipynb")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        begun = page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"\[[*\d]+\]"))
        for _ in range(20):  # what is asked before the kernel is there is lost, and no text says that it is
            page.keyboard.press("Escape")  # a menu that is still open
            page.locator(".lm-MenuBar-item:has-text('Run')").click()
            page.locator(".lm-Menu-itemLabel:text-is('Run All Cells')").click()
            with contextlib.suppress(AssertionError):
                expect(begun.first).to_be_visible(timeout=4_000)
                break
        hand = Hand(page)
        use_explorer(hand, keys=False)
        use_upload(hand, drop=False)


TUTORIALS = Path(__file__).parents[2] / "nbs" / "tutorials"
WIDGET = "import ipywidgets as w\nw.FloatSlider(description='a slider')"


def with_widgets() -> list[str]:
    "Tutorials that show one."
    return [path.stem for path in sorted(TUTORIALS.glob("*.ipynb")) if "zsad_nb.explore" in path.read_text("utf-8")]


@pytest.mark.parametrize("name", with_widgets())
def test_tutorials_load_in_voila(browser, tmp_path, name):
    "The texts of a tutorial as they are, and a widget in place of its code: a picture outside of the served folder would keep the page waiting for ever."
    pytest.importorskip("voila", reason="voila serves notebooks as pages: pip install voila")
    book = json.loads((TUTORIALS / f"{name}.ipynb").read_text("utf-8"))
    texts = [cell for cell in book["cells"] if cell["cell_type"] == "markdown"]
    code = dict(cell_type="code", id="w", metadata={}, execution_count=None, outputs=[], source=WIDGET)
    (tmp_path / f"{name}.ipynb").write_text(json.dumps(book | dict(cells=[*texts, code])), "utf-8")
    command = ["voila", f"{name}.ipynb", "--no-browser", "--Voila.ip=127.0.0.1"]
    with serving(command, tmp_path, "/absent") as url, page_of(browser) as page:
        page.set_default_timeout(60_000)
        missing = []
        page.on("response", lambda r: missing.append(r.url) if r.status == 404 and "favicon" not in r.url else None)
        page.goto(url, wait_until="load")
        expect(page.locator(".widget-hslider")).to_be_visible()
        for picture in page.locator("img").all():
            picture.scroll_into_view_if_needed()
            assert picture.evaluate("i => i.complete && i.naturalWidth > 0"), picture.get_attribute("alt")
        assert not [address for address in missing if address.endswith((".png", ".jpg", ".svg"))], missing


def test_voila(browser, notebook):
    pytest.importorskip("voila", reason="voila serves notebooks as pages: pip install voila")
    with (
        serving(["voila", notebook.name, "--no-browser", "--Voila.ip=127.0.0.1"], notebook.parent, "/absent") as url,
        page_of(browser) as page,
    ):
        page.goto(url, wait_until="commit")
        hand = Hand(page)
        use_explorer(hand)
        use_upload(hand, drop=True)
