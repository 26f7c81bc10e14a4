"Every command that the README, a page, a notebook or a sweep prints is taken from the text and executed at toy size; what cannot be run here is listed with its reason and checked as far as possible."

import contextlib
import io
import json
import re
import shlex
import time
import warnings
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

from zsad_nb.cli.commands import main, parser
from zsad_nb.figures.paper_plan import plan
from zsad_nb.methods.base import create, save
from zsad_nb.methods.visualad import export_released
from zsad_nb.runs.library import find_notebook, find_sweep
from zsad_nb.runs.parameters import check_parameters, parameters_of, read_notebook
from zsad_nb.runs.plans import expand

FIRST = ("zsad", "papermill", "make", "python", "pip", "dask", "git", "conda", "mkdir", "voila", "pytest")
NOT_RUN = {  # beginning of a command -> why it is not run here, and what is looked at instead
    "git clone": "needs the network",
    "pip ": "changes the environment",
    "conda ": "changes the environment; its file must be there",
    "make ": (
        "minutes to hours; its target must be in the Makefile, and what the demo's and the tables' targets run is"
        " tested by itself"
    ),
    "python tests/": "a measurement of minutes; its file must be there",
    "dask ": "runs until it is stopped, on several machines; tests/system/test_cluster.py starts schedulers and workers",
    "pytest ": "a part of this very suite",
    "voila ": "a server; its notebook must be there",
    "zsad demo": "minutes; make test runs it",
    "zsad export": "half a minute of tracing; tests/system/test_export.py runs it",
}
THE_PLAN = "the plan of the figures"
CHECKED = {  # whose parameters are checked one by one, against their notebooks, but which are not executed: why
    THE_PLAN: "the notebooks that the README's and the notebooks' own lines execute, with other values",
    "sweep": (
        "dozens to hundreds of runs; each is checked, the notebooks are executed below, sweeping is tested in"
        " tests/system/test_runs.py"
    ),
}
TOY = dict(
    clip="tiny-clip",
    dino="tiny-dino",
    backbone="tiny-dino",
    device="cpu",
    size=64,
    epochs=1,
    images=1,
    targets=0,
    scenes=2,
    auxiliary=1,
    seeds=[0],
    shards=1,
    scheduler="",
)  # instead of what a command gives or leaves to the paper


def texts() -> list[tuple[str, str]]:
    "Name and prose of everything that prints commands."
    found = [
        (path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in (ROOT / "README.md", *sorted((ROOT / "paper_figures").glob("*.md")))
    ]
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found.append(
            (
                path.relative_to(ROOT).as_posix(),
                "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"),
            )
        )
    for path in sorted((ROOT / "nbs").rglob("*.yaml")):
        lines = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# zsad")]
        found.append((path.relative_to(ROOT).as_posix(), "\n".join(f"`{line.partition(' is ')[0]}`" for line in lines)))
    return found


def commands(text: str) -> list[str]:
    "Lines of code blocks and spans of code that begin with a program, one command each, without comments."
    lines = [
        line.strip() for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    parts = [
        part.strip()
        for line in [*lines, *spans]
        for part in re.split(r"\s+&&\s+|;\s+(?=zsad )|\s+\|\s+head", re.sub(r"\s#.*", "", line))
    ]
    return [part for part in parts if part.split(" ")[0] in FIRST and part != "python"]


def printed() -> dict[str, str]:  # command -> where it stands
    "Every printed command once, in the order of the texts; the plan's, which tables print, too."
    found = {}
    for name, text in texts():
        for command in commands(text):
            found.setdefault(command, name)
    for real in (False, True):
        for item in plan(type("", (), dict(real=real, matching=[]))()):
            for command in filter(None, item.command.split("; ")):
                found.setdefault(command.replace("RUNS", "runs").replace("FOLDER", "DATA"), THE_PLAN)
    return found


def picture(path: Path, kind: str, number: int):
    "A small image, a mask, or nothing marked."
    pixels = np.random.default_rng(number).integers(90, 110, (64, 64, 3)).astype("uint8")
    mask = np.zeros((64, 64), "uint8")
    mask[20:40, 24:44] = 255
    if kind == "defect":
        pixels[mask > 0] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask if kind == "mask" else pixels).save(path)


def data_sets(root: Path):
    "MVTec AD and VisA in their layouts, two categories each; folders of one's own photographs."
    for c, category in enumerate(("bottle", "cable")):
        for k in range(2):
            picture(root / f"DATA/mvtec/{category}/test/good/{k:03}.png", "good", 10 * c + k)
            picture(
                root / f"DATA/mvtec/{category}/test/{('broken_large', 'cut_inner_insulation')[c]}/{k:03}.png",
                "defect",
                10 * c + k + 5,
            )
            picture(
                root
                / f"DATA/mvtec/{category}/ground_truth/{('broken_large', 'cut_inner_insulation')[c]}/{k:03}_mask.png",
                "mask",
                0,
            )
    rows = ["object,split,label,image,mask"]
    for category in ("candle", "pcb1"):
        for k in range(2):
            good, bad, mask = (
                f"{category}/Data/{place}/{k:04}.{end}"
                for place, end in (("Images/Normal", "JPG"), ("Images/Anomaly", "JPG"), ("Masks/Anomaly", "png"))
            )
            for path, kind in ((good, "good"), (bad, "defect"), (mask, "mask")):
                picture(root / "DATA/visa" / path, kind, k)
            rows += [f"{category},test,normal,{good},", f"{category},test,anomaly,{bad},{mask}"]
    (root / "DATA/visa/split_csv").mkdir()
    (root / "DATA/visa/split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    for folder, count in dict(
        PHOTOS=2, GOOD=110, FEW=20, good=60, today=2
    ).items():  # a threshold of one in a hundred needs more than a hundred good images
        for k in range(count):
            picture(root / folder / f"{k}.png", "good", 50 + k)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A place where every printed name exists: data, checkpoints, a released file, a folder of runs."
    root = tmp_path_factory.mktemp("commands")
    (root / "nbs").symlink_to(ROOT / "nbs")
    data_sets(root)
    model = create("visualad", image_size=64)
    peer = create("crane", image_size=64)
    for place in (
        "CHECKPOINT.safetensors",
        "visualad.safetensors",
        "runs/demo/visualad.safetensors",
        "runs/ours/checkpoint.safetensors",
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        save(model, root / place)
    (root / "runs/crane").mkdir()
    save(peer, root / "runs/crane/checkpoint.safetensors")
    torch.save(export_released(model), root / "CLIP.pth")
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()):
        for place, method in (("runs/synthetic/one", "self_distance"), ("runs/sweep/one", "winclip")):
            run_notebook(
                "nbs/experiments/evaluate.ipynb",
                dict(method=method, data="mvtec", root="DATA/mvtec", output=place),
                root,
            )
    return root


def option(words: list[str]) -> tuple[list[str], dict]:
    "Places and parameters of a papermill command line."
    places, values, k = [], {}, 0
    while k < len(words):
        if words[k] == "-p":
            values[words[k + 1]] = (
                yaml.safe_load(words[k + 2]) if not words[k + 2].startswith(("[", "{")) else words[k + 2]
            )
            k += 3  # papermill takes lists for text
        elif words[k] == "-y":
            values |= yaml.safe_load(words[k + 1])
            k += 2
        else:
            places.append(words[k])
            k += 1
    return places, values


def run_notebook(path: str, given: dict, root: Path):
    "A notebook's cells in this process, with toy values for what is large; the values that were given are checked first, as papermill's and a sweep's are."
    path = str(find_notebook(path.removeprefix("zsad://")))
    book = read_notebook(path)
    known = parameters_of(book, path)
    output = given.pop("output", "")
    check_parameters(book, given, path)
    values = {
        **given,
        **{k: v for k, v in TOY.items() if k in known and (k in given or k not in ("backbone", "clip", "dino"))},
    }
    if values.get("root", "").endswith("real_iad"):
        values |= dict(data="mvtec", root="DATA/mvtec")
    if values.get("checkpoint") == "CHECKPOINT":
        values["checkpoint"] = "CHECKPOINT.safetensors"
    if values.get("released"):
        values["backbone"] = "tiny-dino"  # instead of the tower of its authors
    if values.get("categories"):
        values["categories"] = ["candle", "pcb1"]
    if path.endswith("ablation.ipynb") and not values.get("sweep"):
        values["variants"] = ["A baseline"]  # of SSVP, whose line it is
    if path.endswith("ablation.ipynb"):
        values |= dict(values=values.get("values", [])[:2], measure=False, each=0)
    if path.endswith("defect_types.ipynb"):
        values["methods"] = ["dapo"]
    for half, name in (("train", "visa"), ("test", "mvtec")):  # eight pictures instead of a drawn set
        if {f"{half}_data", f"{half}_root"} <= set(known) and not values.get(f"{half}_root"):
            values |= {f"{half}_data": name, f"{half}_root": f"DATA/{name}"}
    if values.get("size") and values.get("checkpoint"):
        values["size"] = 0  # the checkpoint's own
    space = {"__name__": "notebook"}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], path, "exec"), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(values, output=str(root / output) if output else "")
    plt.close("all")


def run_zsad(words: list[str], root: Path) -> str:
    "A line of our own command; how it was treated."
    if not words:
        return "named"
    named = len(words) == 1 or all(w.startswith("--") for w in words[1:]) and words[0] not in ("bench",)
    if words[0] == "--help" or named:  # a command's name, or one of its options
        with contextlib.suppress(SystemExit):
            parser().parse_args([words[0] if words[0] != "--help" else "check", "--help"])
        return "named"
    words = [
        dict(FILE="nbs/experiments/sweeps/synthetic.yaml", RUNS="runs", FOLDER="DATA/mvtec").get(
            w, "DATA/mvtec" if w == "DATA" else w
        )
        for w in words
    ]
    args = parser().parse_args(words)
    if args.command == "sweep":
        expand_all(args)
        return "checked"
    if args.command == "predict" and args.model.startswith("released:"):
        return "checked"  # it needs the tower of its authors; tests/unit/test_released.py runs it with a small one
    if args.command == "submit":
        return "checked"  # it needs the eight classes of MVTec AD 2; tests/unit/test_map_files.py makes small ones
    if args.command in ("run", "train", "evaluate"):
        notebook = args.notebook if args.command == "run" else args.command
        texts = dict(args.parameter) if args.command == "run" else args.given
        known = parameters_of(read_notebook(find_notebook(notebook)))
        run_notebook(notebook, {k: known[k].parse(v) for k, v in texts.items()}, root)
        return "executed"
    if args.command == "bench":
        words = [
            "bench",
            "--methods",
            *(args.methods or ["visualad"])[:2],
            "--size",
            "64",
            "--seconds",
            "0.01",
            "--images",
            "2",
            "--out",
            "bench",
        ]
    if args.command == "figures":
        words += ["--only", "overview", "dma_sap_fig05", "ssvp_image", "dma_sap_table7", "dapo_diagram"]
    assert main(words) in (
        0,
        1,
    ), words  # 1: something is wrong with the data, or a figure lacks its runs, as it is in a toy folder
    return "executed"


def check(command: str) -> str:
    "A command of the plan: it parses, its files are there, and its values fit the notebook or expand to runs that do."
    args = parser().parse_args(shlex.split(command)[1:])
    if args.command == "run":
        book = read_notebook(find_notebook(args.notebook))
        known = parameters_of(book)
        check_parameters(book, {k: known[k].parse(v) for k, v in args.parameter})
    elif args.command == "sweep":
        expand_all(args)
    else:
        assert args.command == "bench" and args.methods
    return "checked"


def expand_all(args):
    "Every run of a sweep, its parameters held against its notebook."
    given = {k: v if k == "DATA" else yaml.safe_load(v) for k, _, v in (t.partition("=") for t in args.set)}
    assert all(s.values is not None for s in expand(find_sweep(args.file), given))


def treat(command: str, root: Path) -> str:
    "Execute one printed command; how it was treated."
    for references in ("--references GOOD", '"references: [GOOD]"'):  # each is judged by all the others
        command = command.replace(references, references.replace("GOOD", "FEW"))
    words = shlex.split(command)
    for beginning in NOT_RUN:
        if not (command + " ").startswith(beginning):
            continue
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        for word in words[1:]:
            if word.startswith(("tests/", "nbs/")) or word == "environment.yml":
                assert (ROOT / word).exists(), command
        return "not run"
    if words[0] == "mkdir":
        for folder in words[2:]:
            (root / folder).mkdir(parents=True, exist_ok=True)
        return "executed"
    if words[0] == "papermill":
        (path, out), values = option(words[1:])
        assert (root / out).parent.is_dir(), f"papermill writes to no folder that is not there: {out}"
        run_notebook(path, values, root)
        return "executed"
    return run_zsad(words[1:], root)


def test_every_printed_command(world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    everything = printed()
    counts = Counter()
    wrong = []
    took = []
    assert len(everything) > 70
    for command, where in everything.items():
        begun = time.process_time()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                how = check(command) if where == THE_PLAN else treat(command, world)
            counts[how] += 1
            took.append((time.process_time() - begun, how, command))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append(f"{where}: {command}\n    {type(error).__name__}: {str(error)[:300]}")
    with capfd.disabled():
        print(
            f"\nprinted commands: {len(everything)}; executed {counts['executed']}, expanded and checked"
            f" {counts['checked']}, only named {counts['named']}, not run {counts['not run']}"
        )
        for seconds, how, command in sorted(took, reverse=True)[:3]:
            print(f"  {seconds:.1f} s of CPU: {command[:100]}")
    assert not wrong, "\n".join(wrong)
    assert counts["executed"] >= 20 and sum(counts.values()) == len(everything)


def test_what_is_not_run_says_why():
    assert all(NOT_RUN.values()) and all(CHECKED.values())
    assert commands("`zsad check X`, ```\nmake demo   # minutes\nzsad status a && zsad collect b\n```") == [
        "make demo",
        "zsad status a",
        "zsad collect b",
        "zsad check X",
    ]
