"Words from names: the rule, any text, what the text tower sees of it, and every method that writes class names into sentences."

import dataclasses
import unicodedata
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from zsad_nb.backbones.ensembles import (
    RELEASED_NAMES,
    anovl_templates,
    as_spelt,
    blank_for_dash,
    macaroni,
    sentences,
    spelling,
    table_of_nine,
)
from zsad_nb.backbones.text import END, START, create_text
from zsad_nb.backbones.words import NAMES, rewrite
from zsad_nb.data.images import Batch
from zsad_nb.data.index import make_index
from zsad_nb.data.readers import READERS
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.methods.base import MODULES, create, describe, load, method_class, save
from zsad_nb.methods.checkpoint_files import read_header

READ_NAMES = {
    "winclip": dict(image_size=64),
    "april_gan": dict(image_size=64),
    "adaclip": dict(image_size=64, clusters=4),
    "anovl": dict(image_size=64, augment=False, crops=1),
    "multiads": dict(image_size=64, types=["scratch"]),
    "ssvp": {},
    "bayes_pfl": dict(image_size=64),
}

SAME = [  # names of one thing
    (
        "bottle",
        [
            "bottle-001",
            "bottle_001",
            "bottle 001",
            "bottle.001",
            "bottle001",
            "Bottle-001",
            "BOTTLE_01",
            "001_bottle",
            "bottle-001-002",
            "  bottle--007 ",
            "bottle(003)",
            "bottle[0001]",
        ],
    ),
    (
        "metal nut",
        [
            "metal_nut",
            "metal-nut",
            "Metal Nut",
            "metalNut",
            "MetalNut",
            "metal.nut",
            "metal/nut",
            "metal\\nut",
            "metal\r\nnut",
            "metal\tnut",
            "metal\x00nut",
            "METAL_NUT",
        ],
    ),
    ("type 2", ["type-2", "type_2", "type 2", "Type2", "type.2", "type(2)", "type#2", "TYPE-2"]),
    ("m8", ["M8", "m8", "M8_", "-M8-", "(M8)"]),
    (
        "object",
        [
            "",
            " ",
            "01",
            "2",
            "007-1",
            "--",
            "...",
            "{}",
            "%",
            "()",
            "\x00",
            "\x7f",
            "\u202e",
            "\ud800",
            "Class1",
            "Class10",
            "class_03",
            "object",
        ],
    ),
    ("öse", ["Öse", "O\u0308se", "ÖSE", "o\u0308se", "öse_01"]),
    ("printed circuit board", ["pcb1", "pcb2", "pcb3", "pcb4", "PCB", "pcb", "PCB-001"]),
]
DIFFERENT = [
    ("M6", "M8"),
    ("M6", "M10"),
    ("type-1", "type-2"),
    ("type-2", "type-12"),
    ("screw.v1", "screw.v2"),
    ("din_912", "din_933"),
    ("A1", "B1"),
    ("M06", "M08"),
    ("M-06", "M-08"),
    ("pcb5", "pcb6"),
    ("bottle-1", "bottle-2"),
    ("3_adapter", "4_adapter"),
    ("10mm", "12mm"),
    ("v1.2", "v1.3"),
    ("瓶子", "杯子"),
    ("🔩", "🔧"),
    ("ä", "a"),
    ("straße", "strase"),
    ("macaroni3", "macaroni"),
    ("left_shoe", "shoe_left"),
    ("usb", "usb_adaptor"),
    ("螺丝1", "螺丝2"),
]
SPELT = {
    "M8": "m8",
    "3.5mm-jack": "3.5mm jack",
    "USBCable": "usb cable",
    "iPhone": "iphone",
    "LEDs": "leds",
    "o'ring": "o'ring",
    "O’Ring": "o'ring",
    "50% cotton": "50 cotton",
    "x-ray": "x ray",
    "瓶-001": "瓶",
    "瓶子": "瓶子",
    "カップ_02": "カップ",
    "컵": "컵",
    "<b>nut</b>": "b nut b",
    "&amp;": "amp",
    "%s": "s",
    "[cls]": "cls",
    "{0.__class__}": "0 class",
    "nut\u200b": "nut",
    "ﬁlter": "ﬁlter",
    "90°bend": "90°bend",
    "🔩": "🔩",
    "2nd_gear": "2nd gear",
    "3d_print": "3d print",
    "part_20231105": "part 20231105",
    "İzmir": "i̇zmir",
    "ﾎﾞﾄﾙ": "ﾎﾞﾄﾙ",
}
PUBLISHED = {  # every class of the readers, as sentences have always called them
    "metal_nut": "metal nut",
    "chewinggum": "chewing gum",
    "macaroni1": "macaroni",
    "macaroni2": "macaroni",
    **{f"pcb{n}": "printed circuit board" for n in (1, 2, 3, 4)},
    "pipe_fryum": "pipe fryum",
    "bracket_black": "bracket black",
    "bracket_brown": "bracket brown",
    "bracket_white": "bracket white",
    "metal_plate": "metal plate",
    "01": "object",
    "02": "object",
    "03": "object",
    **{f"Class{n}": "object" for n in range(1, 11)},
    "pcb": "printed circuit board",
}
REAL_IAD = (
    "audiojack bottle_cap button_battery end_cap eraser fire_hood mint mounts pcb phone_battery plastic_nut"
    " plastic_plug porcelain_doll regulator rolled_strip_base sim_card_set switch tape terminalblock toothbrush toy"
    " toy_brick transistor1 u_block usb usb_adaptor vcpill wooden_beads woodstick zipper"
).split()


@pytest.mark.parametrize("words, name", [(words, name) for words, names in SAME for name in names])
def test_one_thing_has_one_name(words, name):
    assert rewrite(name) == words


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_kinds_stay_different(one, other):
    "In the words and in the tokens that a whole text tower sees."
    tower = create_text("tiny-clip", "random:0")
    assert rewrite(one) != rewrite(other)
    assert tower.tokenize(f"a {rewrite(one)}").tolist() != tower.tokenize(f"a {rewrite(other)}").tolist()


@pytest.mark.parametrize("name", SPELT)
def test_any_spelling(name):
    assert rewrite(name) == SPELT[name] == rewrite(SPELT[name])


def test_published_classes_keep_their_words():
    for reader in READERS.values():
        for name in reader.categories:
            expected = PUBLISHED.get(
                name, name.split("_")[0].lower() if name[-3:].isdigit() else name.replace("_", " ").lower()
            )
            assert rewrite(name) == expected, name
    for name in REAL_IAD:
        assert rewrite(name) == {"pcb": "printed circuit board", "transistor1": "transistor"}.get(
            name, name.replace("_", " ")
        ), name


TEXT = st.one_of(
    st.text(max_size=24),
    st.text(alphabet="aB8 0_-.M螺é'{}<>&;/\\\u0301\u200b🔩", max_size=16),
    st.from_regex(r"[A-Za-z]{1,8}[-_. ]?[0-9]{0,4}", fullmatch=True),
)


@given(TEXT)
@example("A\u030a1")
@example("ﬀX")
def test_any_text_becomes_words(name):
    "Something is always said; saying it again changes nothing; nothing in it is markup, a mark or a place for something else."
    words = rewrite(name)
    assert words and words == words.strip() and rewrite(words) == words
    assert not set(words) & set("{}<>%[]_-\\/\n\r\t\x00") and "  " not in words
    assert not any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in words)
    assert rewrite(unicodedata.normalize("NFD", name)) == rewrite(unicodedata.normalize("NFC", name))
    assert rewrite(name, "raw") == (name.strip() or "object")


@given(st.from_regex(r"[a-z]{3,9}", fullmatch=True), st.integers(0, 999), st.sampled_from("-_ ."))
def test_serial_numbers(word, number, between):
    "A leading zero makes a serial number, and only that."
    plain = rewrite(word)
    assert rewrite(f"{word}{between}{number:04d}") == plain if number else True
    kept = rewrite(f"{word}{between}{number}")
    published = kept in ("object", "printed circuit board", "macaroni", "transistor") or f"{word} {number}" in (
        "woven 104",
        "woven 125",
        "woven 127",
        "mesh 114",
    )
    assert published or kept == f"{plain} {number}"


@given(TEXT)
def test_sentences_hold_the_name_as_it_is(name):
    "No brace or percent of a name is ever interpreted, however it is written; what was written once stays."
    for names, released in [
        *((n, None) for n in NAMES),
        *(("released", f) for f in (as_spelt, blank_for_dash, macaroni, table_of_nine)),
    ]:
        spell = spelling(names, released)
        said = sentences(name, ("flawless {}", "{} with flaw"), ("a photo of a {}.", "{}"), spell)
        word = spell(name)
        assert word and spell(word) == word
        assert said == [
            f"a photo of a flawless {word}.",
            f"flawless {word}",
            f"a photo of a {word} with flaw.",
            f"{word} with flaw",
        ]
    assert len(anovl_templates(name)) == 66


@pytest.mark.parametrize(
    "states, templates, word",
    [
        (["a"], ["{}"], "state 'a'"),
        (["{}"], ["a photo"], "template 'a photo'"),
        (["{}"], ["{0}"], "template '{0}'"),
        (["{} {}"], ["{}"], "state '{} {}'"),
    ],
)
def test_sentences_without_a_place_for_the_name(states, templates, word):
    with pytest.raises(ValueError) as caught:
        sentences("nut", states, templates)
    assert word in str(caught.value) and "must hold {} once" in str(caught.value)


@pytest.fixture(scope="module")
def text():
    return create_text("tiny-clip", "random:0")


@given(TEXT)
def test_the_tower_reads_every_name(text, name):
    "Start and end are where they belong, whatever the name holds."
    ids = text.tokenize([f"a photo of a {rewrite(name[:6])}"])[0].tolist()
    assert ids[0] == START and ids.count(START) == ids.count(END) == 1 and not any(ids[ids.index(END) + 1 :])


@pytest.mark.parametrize(
    "mark",
    [
        "<end_of_text>",
        "<start_of_text>",
        "a <end_of_text> b",
        "&lt;end_of_text&gt;",
        "&amp;lt;end_of_text&amp;gt;",
        "<END_OF_TEXT>",
    ],
)
def test_marks_of_the_tower_do_not_cut_a_sentence_off(text, mark):
    with pytest.raises(ValueError, match="own marks for start and end of text"):
        text.tokenize([f"a photo of a {mark} with flaw"])
    assert text.tokenize([f"a photo of a {rewrite(mark)} with flaw"])[0].tolist().count(END) == 1
    assert (
        text.tokenize(["a \udcff"])[0].tolist().count(END) == 1
    )  # half a surrogate pair, from a file name that is not UTF-8


# ------------------------------------------------------------------------------------------------------------------------ methods


def small(name, **changes):
    return create(
        name,
        **{
            **dict(clip_weights="random:0"),
            **({"dino_weights": "random:0"} if name == "ssvp" else {}),
            **READ_NAMES[name],
            **changes,
        },
    ).eval()


@pytest.fixture(scope="module")
def methods():
    return {
        name: small(name, names="words") for name in READ_NAMES
    }  # four of them spell names as released unless they are told


def batch_of(categories):
    n = len(categories)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return Batch(
        image.expand(n, -1, -1, -1),
        torch.zeros(n, 1, 64, 64, dtype=torch.bool),
        torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.long),
        list(categories),
        [f"{i}.png" for i in range(n)],
        torch.zeros(n, dtype=torch.bool),
    )


def index_of(categories, dataset="own"):
    return make_index(
        [
            dict(
                category=c,
                split="test",
                image=f"{i}/{k}.png",
                mask="",
                anomalous=bool(k),
                defect="scratch" if k else "good",
            )
            for i, c in enumerate(categories)
            for k in (0, 1)
        ],
        "root",
        dataset,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_NAMES)
def test_names_of_one_thing_get_one_prediction(methods, name):
    method = methods[name]
    found = method.predict(batch_of(["metal_nut", "Metal-Nut", "metalNut", "wood"]))
    assert torch.equal(found.score[0], found.score[1]) and torch.equal(found.map[0], found.map[2])
    assert not torch.equal(found.score[0], found.score[3])


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_NAMES)
def test_raw_names(name, tmp_path):
    "As spelt; kept in the checkpoint; another method than the one of words."
    raw = small(name, names="raw")
    found = raw.predict(batch_of(["metal_nut", "metal nut"]))
    assert not torch.equal(found.score[0], found.score[1])
    assert all("metal_nut" in s for s in raw.class_sentences(raw.p, "metal_nut"))
    path = save(raw, tmp_path / "raw.safetensors")
    assert read_header(path)["parameters"]["names"] == "raw" and load(path).p.names == "raw"
    with pytest.raises(ValueError, match="names='free'; use (released, )?words or raw"):
        small(name, names="free")


def test_the_earlier_name_of_the_parameter(tmp_path):
    "`naming` is still read, from a call and from a checkpoint; in a checkpoint it decides."
    model = small("april_gan", naming="words")
    assert model.p.names == "words" and describe("winclip", "metal_nut", naming="raw")["words"].tolist() == [
        "metal_nut"
    ]
    assert (
        method_class("april_gan").from_older(dict(naming="raw"))["names"] == "raw"
        and method_class("april_gan").from_older({})["names"] == "words"
    )
    assert load(save(model, tmp_path / "m.safetensors"), naming="raw").p.names == "raw"


RELEASED = {
    "april_gan": "hex-head_nut macaroni1 metal_nut",
    "multiads": "hex-head_nut macaroni1 metal_nut",
    "adaclip": "hex~head_nut macaroni1 metal_nut",
    "anovl": "hex-head_nut macaroni metal_nut",
    "bayes_pfl": "hex-head_nut macaroni metal~nut",
}  # of hex-head_nut, macaroni1 and metal_nut; ~ is a blank
TOLD = {
    "adaclip": ["a b", "a-b"],
    "anovl": ["macaroni1", "macaroni2"],
    "bayes_pfl": ["Nut_A", "nut_a"],
}  # classes that a release calls the same


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_names(name):
    "The default of a method with a released spelling: the table shows it, the check sees it, the prediction is made with it."
    model = small(name)
    table = describe(model, ["hex-head_nut", "macaroni1", "metal_nut"])
    words = [word.replace("~", " ") for word in RELEASED[name].split()]
    assert model.p.names == "released" and table["words"].tolist() == words
    assert all(words[0] in s for s in model.class_sentences(model.p, "hex-head_nut"))
    spelt = ["metal_nut", "metal nut", "metal-nut"]
    found = model.predict(batch_of(spelt)).map
    said = [model.spell(model.p)(c) for c in spelt]
    assert (
        all(torch.equal(found[i], found[j]) == (said[i] == said[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
        and len(set(said)) > 1
    )
    with pytest.warns(
        UserWarning,
        match=(
            "classes (a b, a-b, as 'a b'|macaroni1, macaroni2|Nut_A, nut_a)"
            if name in TOLD
            else "has never read what differs"
        ),
    ):
        model.prepare(index_of(TOLD.get(name, ["M6", "M8"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare(index_of(["pcb1", "pcb2", "macaroni1", "macaroni2"], "visa"))


@pytest.mark.parametrize("name", ["winclip", "ssvp"])
def test_no_released_names(name):
    with pytest.raises(ValueError, match="names='released'; use words or raw"):
        small(name, names="released")


def test_what_a_type_says_is_in_the_table(tmp_path):
    "Phrases and patterns of one's own count; a file of sentences that nobody has read yet, too."
    (tmp_path / "frames.txt").write_text("this is a {}.")
    table = describe(
        "multiads",
        ["nut"],
        words=("scratch",),
        phrases={"scratch": ["{} with a long scratch"]},
        templates=str(tmp_path / "frames.txt"),
    )
    assert table["prompts"].tolist() == [7 + 1] and table["prompt"].tolist() == ["this is a nut."]
    parameters = method_class("multiads").Parameters(
        words=("scratch",), phrases={"scratch": ["{} with a long scratch"]}
    )
    assert any("nut with a long scratch" in s for s in method_class("multiads").class_sentences(parameters, "nut"))


@pytest.mark.parametrize("name", MODULES)
def test_describe_shows_the_words(name):
    table = describe(
        name, ["pcb1", "pcb2", "metal_nut", "bottle-001", "瓶子"], **({"names": "words"} if name in READ_NAMES else {})
    )
    assert table.columns.tolist() == ["category", "words", "prompt", "prompts", "shared_with", "unread"]
    if name not in READ_NAMES:
        assert (table["words"] == "").all() and (table["prompts"] == 0).all()
        return
    assert table["words"].tolist() == ["printed circuit board", "printed circuit board", "metal nut", "bottle", "瓶子"]
    assert all(words in prompt for words, prompt in zip(table["words"], table["prompt"])) and table[
        "shared_with"
    ].tolist() == ["pcb2", "pcb1", "", "", ""]
    assert describe(name, "metal_nut", names="raw")["words"].tolist() == ["metal_nut"]
    row = describe(name).set_index("parameter").loc["names"]
    assert (row["default"], row["allowed"]) == (
        ("released", " | ".join(RELEASED_NAMES)) if name in RELEASED else ("words", "words | raw")
    ) and "bottle-001" in row["help"]


@pytest.mark.parametrize("name", READ_NAMES)
def test_an_index_of_ones_own(methods, name):
    "Shared sentences are told, published ones are not, and a name that does not fit is an error that names the class."
    method = methods[name]
    with pytest.warns(
        UserWarning, match="says the same of the classes bottle-001, bottle-002, as 'bottle'; names='raw'"
    ):
        method.prepare(index_of(["bottle-001", "bottle-002", "wood"]))
    with pytest.warns(UserWarning, match="classes M6, M8, because the text tower tiny-clip has never read"):
        method.prepare(index_of(["M6", "M8"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.prepare(
            index_of(["pcb1", "pcb2", "macaroni1"], "visa") if name != "multiads" else index_of(["01", "02"], "btad")
        )
        method.prepare(index_of(["bottle", "wood"]))
    with pytest.raises(
        ValueError,
        match=(
            r"class very long very long .* tokens with start and end, the text tower tiny-clip reads 40; shorten it;"
            r" rename the class"
        ),
    ):
        method.prepare(index_of(["bottle", "very long " * 20]))


def test_describe_a_method_that_was_made(methods):
    table = describe(methods["winclip"], index_of(["bottle", "M6", "M8"]))
    assert table["unread"].tolist() == ["", "m, 6", "m, 8"] and table["shared_with"].tolist() == ["", "M8", "M6"]
    assert [f.name for f in dataclasses.fields(methods["winclip"].p)] == describe(methods["winclip"])[
        "parameter"
    ].tolist()
    with pytest.raises(TypeError, match="did you mean names"):
        describe("winclip", ["nut"], name_s="raw")


def test_inspected_folders_are_checked(methods, tmp_path):
    from PIL import Image

    for folder in ("bottle-001", "bottle-002"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / folder / "a.png")
    with pytest.warns(UserWarning, match="says the same of the classes bottle-001, bottle-002"):
        found = Inspector(methods["winclip"], category="folder").predict(
            [tmp_path / "bottle-001" / "a.png", tmp_path / "bottle-002" / "a.png"]
        )
    assert len(found) == 2
    with pytest.raises(ValueError, match="class very long"):
        Inspector(methods["winclip"], category="very long " * 20).predict(tmp_path / "bottle-001" / "a.png")


@pytest.mark.slow
@pytest.mark.parametrize("word", ["{}", "{0}", "100%", "<end_of_text>", "%s"])
def test_words_of_types_are_not_interpreted(word):
    "A defect's folder may be called anything; what a sentence cannot hold is an error."
    if word == "{}":
        with pytest.raises(ValueError, match="must hold {} once"):
            small("multiads", types=[word]).predict(batch_of(["nut"]))
    else:
        method = small("multiads", types=[word])
        assert (
            any(word.replace("_", " ") in s for s in method.class_sentences(method.p, "nut"))
            and method.predict(batch_of(["nut"])).score.isfinite().all()
        )
