"A checkpoint of a method's authors by name, METHOD=FILE: in Python, on the command line and in the notebooks; its hash in every record; a wrong file names its key."

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zsad_nb.backbones.weights import WeightsError
from zsad_nb.cli.commands import main
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.sources import method_from
from zsad_nb.methods import adaclip, april_gan, multiads, visualad
from zsad_nb.methods.base import MODULES, create, describe, load, load_released, method_class, save
from zsad_nb.methods.checkpoint_files import read_header
from zsad_nb.methods.released_files import file_record
from zsad_nb.methods.variants import Variant
from zsad_nb.synthetic.benchmark import synthetic_index
from zsad_nb.training.fit import recipe_of

SIDE = 48
TOWER = dict(clip="tiny-clip", clip_weights="random:0", image_size=SIDE)
LAYOUTS = {
    "april_gan": (april_gan, TOWER),
    "multiads": (multiads, {**TOWER, "types": ["hole", "scratch"]}),
    "adaclip": (adaclip, TOWER),
    "visualad": (visualad, dict(backbone="tiny-dino", weights="random:0", image_size=SIDE)),
}


def author_file(name: str, folder: Path) -> tuple:
    "A method with learned values of its own, and these in its authors' layout."
    module, towers = LAYOUTS[name]
    torch.manual_seed(3)
    method = create(name, **towers).eval()
    for value in method.learned().values():
        torch.nn.init.normal_(value, std=0.1)
    if name == "visualad":
        state = visualad.export_released(method)
    else:
        state = {}
        for ours, theirs in module.released_names(method).items():
            value = method.learned()[ours].detach()
            if isinstance(theirs, str):
                state[theirs] = value
            else:
                state |= dict(zip(theirs, value if len(value) == len(theirs) else value.chunk(len(theirs))))
    torch.save(state, folder / f"{name}.pth")
    return method, towers, folder / f"{name}.pth"


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    return author_file("april_gan", tmp_path_factory.mktemp("authors"))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return synthetic_index(tmp_path_factory.mktemp("target"), "target", SIDE, normal=1, defective=1)


# ------------------------------------------------------------------------------------------------------------------------- in Python


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_by_name(tmp_path, name):
    method, towers, file = author_file(name, tmp_path)
    found = load_released(f"{name}={file}", "visa", **towers)
    for k, value in method.learned().items():
        assert torch.equal(found.learned()[k], value), k
    assert (
        found.released == file_record(file)
        and found.released["file"] == f"{name}.pth"
        and len(found.released["sha256"]) == 64
    )
    assert found.trained_on == ["visa/*"]
    path = save(found, tmp_path / "kept.safetensors")
    assert load(path).released == read_header(path)["released"] == found.released, "a checkpoint says where it began"
    assert load(save(method, path)).released is None


def test_a_file_is_built_for_its_towers(linear, monkeypatch):
    "Without a word on the towers they are those of the paper; another tower takes its own size and taps."
    _, towers, file = linear
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("april_gan", "adaclip", "multiads", "dapo", "visualad", "anomalyclip", "crane", "crane_plus"):
        asked = method_class(name).released_towers
        assert asked.get("clip", asked.get("backbone")) == "clip-vitl14-336" and asked["image_size"] == 518
        method_class(name).Parameters(**asked)
    with pytest.raises(
        WeightsError,
        match=(
            "april_gan.pth holds what april_gan learned, not its frozen towers.*clip='clip-vitl14-336', image_size=518,"
            " taps=.6, 12, 18, 24.*cannot be built.*clip_weights=FILE"
        ),
    ):
        load_released(f"april_gan={file}", clip_weights="/nowhere/ViT-L-14-336px.pt")
    assert load_released(f"april_gan={file}", **towers).clip.taps == create("april_gan", **towers).clip.taps


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("april_gan", ValueError, "released='april_gan': write METHOD=FILE"),
        ("=a.pth", ValueError, "write METHOD=FILE"),
        ("april_gan=", ValueError, "write METHOD=FILE"),
        ("aprilgan=a.pth", WeightsError, "no released file a.pth|unknown method 'aprilgan'"),
        ("april_gan=/nowhere/a.pth", WeightsError, "no released file .*nowhere.a.pth"),
        ("winclip={file}", WeightsError, "winclip has no released checkpoints.*those that have: .*april_gan.*"),
        ("bayes={file}", ValueError, "unknown method 'bayes'; known: "),
    ],
)
def test_what_is_no_released_file(linear, text, error, message):
    with pytest.raises((error, ValueError), match=message):
        load_released(text.replace("{file}", str(linear[2])), **TOWER)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("trainable_linearlayer.fc.1.bias"),
            r"missing trainable_linearlayer.fc.1.bias, expected \(128,\)",
        ),
        (
            lambda s: s.update({"trainable_linearlayer.fc.9.bias": torch.zeros(3)}),
            "unexpected trainable_linearlayer.fc.9.bias",
        ),
        (
            lambda s: s.update({"trainable_linearlayer.fc.0.weight": torch.zeros(2, 2)}),
            r"trainable_linearlayer.fc.0.weight is \(2, 2\), expected \(128, 192\)",
        ),
        (
            lambda s: s.update({"trainable_linearlayer.fc.0.bias": torch.zeros(128, dtype=torch.int64)}),
            "trainable_linearlayer.fc.0.bias is int64, expected numbers with a fraction",
        ),
        (
            lambda s: s.update({"trainable_linearlayer.fc.0.bias": torch.full((128,), torch.nan)}),
            "trainable_linearlayer.fc.0.bias holds numbers that are not finite",
        ),
    ],
)
@pytest.mark.parametrize("name", ["april_gan", "multiads"])
def test_a_wrong_file_names_its_key(linear, tmp_path, name, change, message):
    state = torch.load(linear[2], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match=f"wrong.pth does not fit {name}: .*{message}"):
        load_released(f"{name}={tmp_path / 'wrong.pth'}", **LAYOUTS[name][1])


def test_method_from_and_inspector(linear, tmp_path):
    method, towers, file = linear
    found = method_from(released=f"april_gan={file}", **towers)
    assert torch.equal(found.learned()["adapters.tap_2.weight"], method.learned()["adapters.tap_2.weight"])
    with pytest.raises(TypeError, match="released='april_gan=.* is a method already; leave 'winclip' out"):
        method_from("winclip", released=f"april_gan={file}")
    inspector = Inspector.load(released=f"april_gan={file}", category="gear", **towers)
    picture = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    assert inspector.predict(picture).score == Inspector(method, category="gear").predict(picture).score
    assert inspector.settings["released"] == file_record(file) and "released" not in Inspector(method).settings


# ------------------------------------------------------------------------------------------------------------------- command line, notebooks


def test_predict(linear, tmp_path, capsys):
    method, _, file = linear
    for i in range(2):
        Image.fromarray(np.full((SIDE, SIDE, 3), 60 + 90 * i, "uint8")).save(tmp_path / f"{i}.png")
    words = [
        "-p",
        "clip",
        "tiny-clip",
        "-p",
        "clip_weights",
        "random:0",
        "-p",
        "image_size",
        str(SIDE),
        "--pictures",
        "none",
    ]
    assert (
        main(
            ["predict", str(tmp_path), "--out", str(tmp_path / "out"), "--model", f"released:april_gan={file}", *words]
        )
        == 0
    )
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert [s["released"] for s in settings.values()] == [file_record(file)]
    for more, message in (
        (["--model", "released:april_gan"], "write METHOD=FILE"),
        (["--model", f"released:adaclip={file}", *words], r"april_gan.pth does not fit adaclip: missing clip_model"),
    ):
        capsys.readouterr()
        assert main(["predict", str(tmp_path), "--out", str(tmp_path / "other"), *more]) == 2
        assert message in capsys.readouterr().err


def cells_of(name: str) -> list:
    path = Path(__file__).parents[2] / "nbs" / "experiments" / f"{name}.ipynb"
    return [
        ("parameters" in c["metadata"].get("tags", []), "".join(c["source"]))
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]


def execute(name: str, **parameters) -> dict:
    "A notebook's cells in this process: its result.json."
    room: dict = {}
    for tagged, text in cells_of(name):
        exec(compile(text, name, "exec"), room)  # the notebook's own code
        if tagged:
            assert set(parameters) <= set(room)
            room.update(parameters)
        room["display"] = lambda *_: None
    return json.loads((Path(parameters["output"]) / "result.json").read_text())


@pytest.mark.filterwarnings("ignore")
def test_evaluate_with_a_released_file(linear, target, tmp_path, monkeypatch):
    method, towers, file = linear
    monkeypatch.setattr("zsad_nb.figures.heatmaps.render_cases", lambda *_, **__: [])
    few = target.groupby("category").head(2).head(4)
    monkeypatch.setattr(
        "zsad_nb.synthetic.datasets.load_dataset",
        lambda *_, **__: few.copy().pipe(lambda t: t.__class__(t).pipe(_rooted, target)),
    )
    settings = dict(size=SIDE, clip="tiny-clip", options=dict(clip_weights="random:0"))
    result = execute("evaluate", released=f"april_gan={file}", trained_on=["visa"], output=str(tmp_path), **settings)
    assert (
        result["method"] == "april_gan"
        and result["released"] == file_record(file)
        and result["trained_on"] == ["visa/*"]
        and result["names"] == "released"
    )
    raw = execute(
        "evaluate",
        method="april_gan",
        output=str(tmp_path),
        size=SIDE,
        clip="tiny-clip",
        options=dict(clip_weights="random:0", names="words"),
    )
    assert raw["released"] is None and raw["names"] == "words" and result["image_auroc"] is not None
    with pytest.raises(ValueError, match="give one of checkpoint and released"):
        execute("evaluate", checkpoint="a.safetensors", released=f"april_gan={file}", output=str(tmp_path), **settings)


def _rooted(table, index):
    table.attrs = dict(index.attrs)
    return table


@pytest.mark.filterwarnings("ignore")
def test_qualitative_with_a_released_file(linear, tmp_path):
    file = linear[2]
    result = execute(
        "qualitative",
        method="",
        released=f"april_gan={file}",
        trained_on=["visa"],
        size=SIDE,
        clip="tiny-clip",
        options=dict(clip_weights="random:0"),
        categories=["nut"],
        context=1,
        output=str(tmp_path),
    )
    assert result["released"] == {"self_distance": None, "april_gan": file_record(file)} and result["names"] == {
        "self_distance": None,
        "april_gan": "released",
    }


def test_a_run_with_a_released_file_gives_its_method(linear, tmp_path):
    "Whoever looks at such a run again has the method that it evaluated, or is told that the file is another one."
    method, _, file = linear
    folder = tmp_path / "evaluate" / "0123456789abcdef"
    folder.mkdir(parents=True)
    parameters = dict(
        method="visualad",
        released=f"april_gan={file.name}",
        clip="tiny-clip",
        size=SIDE,
        options=dict(clip_weights="random:0"),
    )
    (folder / "run.json").write_text(
        json.dumps(
            dict(
                status="done",
                hash=folder.name,
                cwd=str(file.parent),
                spec=dict(notebook="evaluate.ipynb", parameters=parameters),
            )
        )
    )
    (folder / "result.json").write_text(
        json.dumps(dict(notebook="evaluate", released=file_record(file), trained_on=["visa/*"]))
    )
    found = method_from(folder)
    assert torch.equal(
        found.learned()["adapters.tap_2.weight"], method.learned()["adapters.tap_2.weight"]
    ) and found.trained_on == ["visa/*"]
    (folder / "result.json").write_text(
        json.dumps(dict(notebook="evaluate", released=dict(file_record(file), sha256="0" * 64)))
    )
    with pytest.raises(ValueError, match="april_gan.pth with the SHA-256 0000.*restore that file"):
        method_from(folder)


# ------------------------------------------------------------------------------------------------------------- names and variants of all methods

NAMED = [
    "ssvp",
    "winclip",
    "anovl",
    "adaclip",
    "april_gan",
    "multiads",
    "bayes_pfl",
]  # those that name classes in sentences


@pytest.mark.parametrize("name", NAMED)
def test_class_names_are_recorded(tmp_path, name):
    fields = describe(name).set_index("parameter")
    words = fields.loc["names", "allowed"].split(" | ")
    assert {"words", "raw"} <= set(words) and ("released" in words) == (method_class(name).released_name is not None)
    for word in words:
        method = create(name, clip_weights="random:0", image_size=SIDE, names=word)
        assert read_header(save(method, tmp_path / f"{name}.safetensors"))["parameters"]["names"] == word
        assert load(tmp_path / f"{name}.safetensors").p.names == word


def test_the_notebooks_record_them():
    for name in ("train", "evaluate", "qualitative", "ablation", "defect_types"):
        last = next(text for _, text in reversed(cells_of(name)) if "result = dict(" in text)
        assert "names=" in last, name


@pytest.mark.parametrize("name", MODULES)
def test_one_convention(name):
    "No method has a switch for its release beside its variants; every variant says by how much, or where it is from."
    cls = method_class(name)
    assert not {"release_compat", "released", "ablation", "reading"} & set(describe(name)["parameter"])
    for row, variant in cls.variants.items():
        assert isinstance(variant, Variant) and variant.by_how_much() not in ("", "not measured"), row
        recipe_of(name, **variant.recipe)
    if cls.compat:
        assert any(dict(variant) == cls.compat for variant in cls.variants.values()), (
            "what the old switch did is a variant"
        )


@pytest.mark.parametrize("name", [n for n in MODULES if method_class(n).compat])
def test_checkpoints_with_the_old_switch(tmp_path, name):
    "release_compat of older versions, and None for what it decided."
    cls = method_class(name)
    own = dict(clip_weights="random:0", image_size=SIDE)
    defaults = {k: describe(name).set_index("parameter").loc[k, "default"] for k in cls.compat}
    for switch, expected in ((True, cls.compat), (False, defaults)):
        found = create(name, **own, release_compat=switch, **dict.fromkeys(cls.compat, None)).p
        assert {k: getattr(found, k) for k in cls.compat} == expected
    first = next(iter(cls.compat))
    assert getattr(create(name, **own, release_compat=True, **{first: defaults[first]}).p, first) == defaults[first], (
        "what was said one by one counts"
    )
    with pytest.raises(TypeError, match="release_compat"):
        create("april_gan", release_compat=True)
