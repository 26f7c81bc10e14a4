"Names in figures are text and never a formula, in letters that a font has or as codes; their files lie in their folder, one each; pages and pictures of widgets take them for text."

import io
import logging
import os
import shutil
import unicodedata
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from zsad_nb.core.names import same_name, shown
from zsad_nb.data.index import make_index
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.tables import results_table
from zsad_nb.evaluation.views import Views
from zsad_nb.explore.controls import decision_html, message_html, numbers_html, shares_html
from zsad_nb.explore.explorer import HeatmapExplorer
from zsad_nb.explore.gallery import Gallery
from zsad_nb.explore.screen import name_part
from zsad_nb.explore.upload import Upload
from zsad_nb.figures import style as paper_style
from zsad_nb.figures.bars import bar_figure, render_bars
from zsad_nb.figures.blending import sheet
from zsad_nb.figures.curves import loss_figure, methods_figure, sweep_figure
from zsad_nb.figures.grids import ablation_figure, grid_figure, samples_figure, side_by_side
from zsad_nb.figures.heatmaps import render_cases
from zsad_nb.figures.paper_figures import _cell, _code
from zsad_nb.figures.style import letters, save_figure, style
from zsad_nb.figures.types import confusion_figure, render_types, type_figure
from zsad_nb.inspection.verdicts import NO_THRESHOLD, Inspection
from zsad_nb.methods.base import create

NAMES = [
    r"$\foo$",
    "$a$",
    "$$",
    r"C:\new",
    "a_b",
    "a^b",
    "#1 50%",
    "a&b",
    "{a}",
    "~",
    "<b>x</b>",
    "a|b",
    "`a`",
    "a\nb",
    "a\r\tb",
    'a"b',
    "\u202egnp",
    "_dent",
    "e\u0301",
    "NA",
    "=1",
    " x ",
    "x" * 60,
    "Ελληνικά",
    "Кириллица",
    "a\x00b",
]
HAN, EMOJI = ["瓶子", "ひらがな", "한국어"], ["👍", "\ue000"]


@pytest.fixture(autouse=True)
def no_other_fonts(monkeypatch):
    "As on a machine where only matplotlib's own fonts are."
    monkeypatch.setattr(paper_style, "families", lambda: ("DejaVu Sans",))
    for remembered in (paper_style.font_files, paper_style.font_of):
        remembered.cache_clear()
    yield
    for remembered in (paper_style.font_files, paper_style.font_of):
        remembered.cache_clear()


def texts(figure) -> list[str]:
    "Everything that is written in a figure; none of it may be a formula."
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if text.get_text()]
    assert not [text for text in found if text.get_parse_math() and "$" in text.get_text()]
    return [text.get_text() for text in found]


def seen(name: str) -> str:
    "A name as it stands in a figure without other fonts."
    return letters(name)


def some_views(names, count=2) -> Views:
    n = len(names)
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        dict(
            dataset="d",
            category=names,
            image=[f"{k}.png" for k in range(n)],
            defect=names,
            anomalous=True,
            area=0.1,
            has_mask=True,
            score=0.5,
            low=0.0,
            high=1.0,
        )
    )
    masks = np.zeros((n, 8, 8), bool)
    masks[:, 2:5, 2:5] = True
    return Views(
        rows, rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8), masks, rng.random((n, 8, 8)).astype(np.float32)
    )


def numbers_of(names, metrics=("image_auroc", "pixel_auroc")) -> pd.DataFrame:
    return pd.DataFrame(
        [
            dict(method=name, data="d", seed=0, category="mean", **dict.fromkeys(metrics, 0.5 + k / 100))
            for k, name in enumerate(names)
        ]
    )


def every_figure(names):
    "Every function that puts a name into a figure: name of the function, the figure."
    few = names[:5]
    picture = np.full((8, 8, 3), 0.5)
    labels = np.arange(64).reshape(8, 8) % (len(names[:6]) + 1)
    table = results_table(numbers_of(few), ["image_auroc", "pixel_auroc"])
    numbers = table.numbers[table.numbers["row"] == table.numbers["row"].iloc[0]]
    history = pd.DataFrame(dict(step=range(6), epoch=[0, 1, 2, 3, 4, 5], total=1.0, **{name: 0.5 for name in few[:3]}))
    views = some_views(few)
    yield "bars", bar_figure(table, row="d", title=few[0], remark=few[0])
    yield (
        "types",
        type_figure([dict(image=picture, truth=labels, largest=labels, left=letters(few[0]))], names[:6], few[0]),
    )
    yield (
        "confusion",
        confusion_figure(pd.DataFrame(np.eye(len(few), dtype=int), index=few, columns=few), few[0], few[1]),
    )
    yield (
        "grid",
        grid_figure(
            [dict(column, data=few[0]) for column in side_by_side({few[0]: views, few[1]: views})], remark=few[0]
        ),
    )
    yield (
        "ablation",
        ablation_figure(
            side_by_side({few[0]: views, few[1]: views}, 5), numbers[numbers["method"].isin(few[:2])], remark=few[0]
        ),
    )
    yield "samples", samples_figure({few[0]: views, few[1]: views}, remark=few[0])
    yield "loss", loss_figure({few[0]: [history], few[1]: [history]}, {few[2]: few[3]}, remark=few[0])
    yield (
        "sweep",
        sweep_figure(
            numbers,
            {name: float(k) for k, name in enumerate(few)},
            few[0],
            metrics=("image_auroc",),
            names=dict(image_auroc=few[1]),
        ),
    )
    yield "overview", methods_figure(numbers, own=few[:1], remark=few[0])


@pytest.mark.slow
@pytest.mark.parametrize("names", [NAMES[:6], [NAMES[10], NAMES[13], NAMES[15], NAMES[16], "a\x00b", "caf\udce9"]])
def test_names_are_text_in_every_figure(names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "constrained_layout not applied|.*collapsed"
        )  # a long name leaves little room
        for function, figure in every_figure(names):
            found = " ".join(texts(figure))
            assert seen(names[0]).split()[0] in found, function


@pytest.mark.slow
@pytest.mark.parametrize("function", ["bars", "types"])
def test_pdf_and_svg_hold_the_names(tmp_path, function):
    names = [r"$\foo$", "a<b>&", "a_b^c", "#%~{}", "\\"]
    figure = next(figure for name, figure in every_figure(names) if name == function)
    save_figure(figure, tmp_path / "f", 60)
    figure.savefig(tmp_path / "f.svg")
    assert "$\\foo$" in (tmp_path / "f.svg").read_text() and (tmp_path / "f.pdf").stat().st_size > 1000


@pytest.mark.slow
def test_one_warning_a_call():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with style():
            for _, figure in every_figure([HAN[0], HAN[2], EMOJI[0], EMOJI[1]]):
                figure.draw_without_rendering()
    assert len(caught) == 1 and "no font of this machine has 7 of the letters" in str(caught[0].message)


@pytest.mark.parametrize(
    "name, words",
    [
        ("瓶子", "install Noto Sans CJK (Debian, Ubuntu: apt install fonts-noto-cjk)"),
        ("👍", "install Noto Sans, Symbola or Unifont"),
        ("瓶👍", "install Noto Sans CJK and Noto Sans, Symbola or Unifont"),
    ],
)
def test_the_warning_names_the_font_to_install(name, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        letters(name)
    assert len(caught) == 1 and words in str(caught[0].message) and "Glyph" not in str(caught[0].message)


@given(st.text(max_size=12))
def test_any_text_is_readable_or_a_code(text):
    with warnings.catch_warnings(), style():
        warnings.simplefilter("ignore")
        made = letters(text)
        assert len(made.splitlines()) <= 1 and letters(made) == made
        assert all(paper_style.font_of(letter) for letter in made if not letter.isascii())
        figure = Figure(figsize=(1, 1))
        figure.text(0, 0, made)
        figure.draw_without_rendering()


@pytest.mark.parametrize(
    "a, b", [("瓶", "子"), ("\ue000", "\ue001"), ("a\nb", "a\rb"), ("\udcff", "\udcfe"), ("👍", "👎")]
)
def test_two_names_never_look_the_same(a, b):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert letters(a) != letters(b)


def test_hangul_and_accents_of_a_mac_are_whole_letters():
    assert letters(unicodedata.normalize("NFD", "é")) == "é"
    with pytest.warns(UserWarning, match="ubcd1"):
        assert letters(unicodedata.normalize("NFD", "병")) == "\\ubcd1"


def test_a_font_that_is_found_is_used(monkeypatch, tmp_path):
    "One font lacks a letter, the next has it."
    monkeypatch.setattr(paper_style, "families", lambda: ("cmtt10", "DejaVu Sans"))
    for remembered in (paper_style.font_files, paper_style.font_of):
        remembered.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with style():
            assert (
                matplotlib.rcParams["font.family"] == ["cmtt10", "DejaVu Sans"]
                and letters("Ж") == "Ж"
                and paper_style.font_of("Ж") != paper_style.font_of("a")
            )
            figure = Figure(figsize=(2, 1))
            figure.suptitle(letters("aЖ"))
        figure.savefig(tmp_path / "x.png")


def test_a_font_installed_since_is_found(monkeypatch, tmp_path):
    "matplotlib remembers which fonts there were; one that came later is looked for."
    monkeypatch.undo()
    manager = matplotlib.font_manager.fontManager
    monkeypatch.setattr(
        manager, "ttflist", [font for font in manager.ttflist if font.name not in paper_style.FALLBACKS]
    )
    added = tmp_path / "new.ttf"
    shutil.copy(matplotlib.font_manager.findfont("DejaVu Serif"), added)
    monkeypatch.setattr(paper_style, "FALLBACKS", ("DejaVu Serif",))
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.name != "DejaVu Serif"])
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: [str(added), str(tmp_path / "absent.ttf")])
    paper_style.families.cache_clear()
    logger = logging.getLogger("matplotlib.font_manager")
    before = logging.getLogger("matplotlib.font_manager").filters[:]
    try:
        assert paper_style.families() == ("DejaVu Sans", "DejaVu Serif")
    finally:
        logger.filters[:] = before
        paper_style.families.cache_clear()


# ---------------------------------------------------------------------------------------------------------------- files of figures


def images(folder: Path, categories, defect="d"):
    "A normal and a defective image a category."
    for name, colour in (("g.png", 9), ("b.png", 99), ("m.png", 255)):
        Image.new("L", (40, 30), colour).save(folder / name)
    rows = [
        row
        for c in categories
        for row in (
            dict(category=c, split="test", image="g.png", anomalous=False),
            dict(category=c, split="test", image="b.png", mask="m.png", anomalous=True, defect=defect),
        )
    ]
    return make_index(rows, folder, "set")


PLACES = ["overview", "Overview", "a/b", "a_b", "A_B", "../../esc", "é", "e\u0301", "瓶子"]


@pytest.fixture(scope="module")
def method():
    return create("self_distance", weights="random:0", image_size=32, tap=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no font", "ignore:constrained_layout not applied")
def test_every_class_has_a_file_of_its_own_in_the_folder(tmp_path, method):
    folder = tmp_path / "in" / "figures"
    categories = PLACES
    index = images(tmp_path, categories, r"$\foo$")
    files = render_cases(method, index, evaluate(method, index, progress=False), folder, size=32, dpi=20)
    assert len(files) == len(categories) + 1 and files[0].name == "overview.png"
    assert len({same_name(file.name) for file in files}) == len(files)
    assert all(file.parent == folder and file.is_file() and not file.is_symlink() for file in files)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [*(file.name for file in files), "b.png", "g.png", "m.png"]
    )
    assert {"瓶子.png", "A_B.png"} <= {file.name for file in files}


def test_nothing_is_written_through_a_link(tmp_path, method):
    index = images(tmp_path, ["c"])
    (tmp_path / "figures").mkdir()
    (tmp_path / "away.png").write_bytes(b"kept")
    os.symlink(tmp_path / "away.png", tmp_path / "figures" / "c.png")
    with pytest.raises(ValueError, match="leads outside .* by a link"):
        render_cases(method, index, evaluate(method, index, progress=False), tmp_path / "figures", size=32, dpi=20)
    assert (tmp_path / "away.png").read_bytes() == b"kept"


@pytest.mark.filterwarnings("ignore:no font")
def test_types_and_products_of_any_name(tmp_path):
    from zsad_nb.evaluation.multi_type import evaluate_types

    model = create("dapo", clip_weights="random:0", image_size=32, prompts=2)
    products = ["confusion", "Confusion", "../../esc"]
    index = images(tmp_path, products, r"$\foo$")
    found = evaluate_types(model, index, size=32, progress=False, choices=("unfiltered",))
    files = render_types(model, index, found, tmp_path / "in" / "figures", "unfiltered", size=32, dpi=20)
    assert len({same_name(file.name) for file in files}) == 4 and all(
        file.parent == tmp_path / "in" / "figures" for file in files
    )


@pytest.mark.slow
@pytest.mark.parametrize("level", ["../../esc", "a/b", "/abs", "..", "ok"])
def test_levels_of_bars_stay_in_the_folder(tmp_path, level):
    files = render_bars(numbers_of(["a", "b"]), tmp_path / "in" / "bars", levels={level: ["image_auroc"]})
    assert {file.suffix for file in files} == {".pdf", ".png"} and all(
        file.parent == tmp_path / "in" / "bars" for file in files
    )


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
        | st.sampled_from(["a/b", "a-b", "a_b", "a", "b", "a b"]),
        min_size=2,
        max_size=4,
        unique=True,
    )
)
def test_two_views_never_share_a_picture(names):
    made = {"--".join(name_part(part, path) for part, path in zip((a, b), (False, True))) for a in names for b in names}
    assert len(made) == len(names) ** 2


# --------------------------------------------------------------------------------------------------------------- widgets and pages

BAD = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"


def inert(text: str):
    assert (
        "<script" not in text
        and "<img src=x" not in text
        and "onerror=alert(1)>" not in text.replace("onerror=alert(1)&gt;", "")
    )


def test_what_widgets_say_is_text():
    for text in (
        shares_html({BAD: 0.5, "normal": 0.5}, [BAD]),
        message_html(BAD),
        message_html(BAD, True),
        decision_html(1.0, 0.5, True, BAD),
        numbers_html({BAD: BAD, "note": BAD}),
    ):
        inert(text)
    found = Inspection(
        BAD,
        BAD,
        0.6,
        "score only",
        NO_THRESHOLD,
        None,
        0.5,
        0.9,
        np.zeros((4, 4), np.float32),
        None,
        [],
        BAD,
        {BAD: 1.0},
        (4, 4),
        (0, 1),
        np.zeros((4, 4, 3), np.uint8),
    )
    inert(found._repr_html_())
    inert(
        Inspection(
            BAD + "\n",
            BAD,
            0.6,
            "score only",
            BAD,
            None,
            0.5,
            0.9,
            np.zeros((4, 4), np.float32),
            None,
            [],
            BAD,
            {BAD: 1.0},
            (4, 4),
            (0, 1),
            None,
        )._repr_html_()
    )
    inert(_cell(BAD))
    assert _code("a`b``c|d") == "``` a`b``c\\|d ```" and _code("zsad run") == "`zsad run`" and "\n" not in _code("a\nb")


@pytest.fixture(scope="module")
def explored(tmp_path_factory, method):
    room = tmp_path_factory.mktemp("explored")
    (room / "a\nimport os; os._exit(3) #").mkdir()
    index = images(room, [BAD, "b"], BAD)
    shutil.copy(room / "b.png", room / "a\nimport os; os._exit(3) #" / "x.png")
    index.loc[1, "image"] = "a\nimport os; os._exit(3) #/x.png"
    return HeatmapExplorer({BAD: method}, index, room / "maps", out=room / "out", progress=False)


@pytest.mark.filterwarnings("ignore:no font")
def test_the_explorer_shows_names_as_text(explored):
    explored.open(1)
    explored.touch(0.5, 0.5)
    explored.code_button.value = True
    for html in (
        explored.where,
        explored.pages,
        explored.verdict,
        explored.numbers,
        explored.pixel,
        explored.inside,
        explored.message,
        explored.shown_code,
        explored.missing,
    ):
        inert(html.value)
    assert "a\\nimport os" in explored.verdict.value
    compile(explored.code(), "code", "exec")
    assert len([line for line in explored.code().splitlines() if line.startswith("import os")]) == 0
    path = explored.save()
    assert path.parent == explored.out and path.is_file() and shown(path.name) == path.name
    exec(
        explored.code().replace("picture.save", "(lambda name: None)"), {}
    )  # the name of the image is a remark, not a line of code


def test_thumbnails_take_names_as_attributes(explored):
    gallery = Gallery(explored.index, lambda row: None)
    gallery.set(np.arange(len(explored.index)), np.zeros(len(explored.index)), 0.5)
    assert all(isinstance(item["title"], str) for item in gallery.widget.items)


@pytest.mark.parametrize("name", ["<b>", "Ελληνικά", "瓶子", "a\nb", "👍", "caf\udce9", "$x$"])
def test_pictures_of_widgets_show_any_name(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = sheet({name: np.zeros((40, 120, 3), np.uint8)}, name, (name, name))
    assert len(caught) == (name in ("瓶子", "👍")) and (np.asarray(made) < 200).any(axis=2)[:30].any()


def test_ascii_pictures_did_not_change():
    "Latin letters are drawn as ever."
    from PIL import ImageDraw, ImageFont

    made = np.asarray(sheet({"overlay": np.full((40, 120, 3), 255, np.uint8)}, "a heading"))
    page = Image.new("RGB", made.shape[1::-1], "white")
    ImageDraw.Draw(page).text((10, 10), "a heading", "#1f2328", ImageFont.load_default(15))
    assert (np.asarray(page)[:30] == made[:30]).all()


def test_uploads_are_told_as_text():
    upload = Upload(create("self_distance", weights="random:0", image_size=32, tap=1))
    data = io.BytesIO()
    upload.open_file(BAD, b"no picture")
    inert(upload.message.value)
    assert "not an image" in upload.message.value
    Image.new("RGB", (40, 40)).save(data, "PNG")
    upload.open_file(BAD, data.getvalue(), BAD)
    assert "onerror" in upload.verdict.value
    for html in (upload.verdict, upload.types, upload.pixel, upload.message):
        inert(html.value)
    upload.snapshot()
