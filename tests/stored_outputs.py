"""What notebooks show: made by executing them, and compared with what executing them gives now.

    python tests/stored_outputs.py [--write] [--jobs 2] [NOTEBOOK or FOLDER ...]

Without `--write` differences are printed, and the exit status is 1 where there are any; tests/system/test_stored_outputs.py
is the same for every notebook. A notebook is executed in a process of its own, in its folder, on one thread.

What counts as the same, and why (`differences`):
- Text: the same words in the same order. Durations ("3.2 s", "14 ms", "2 minutes") and paths below the system's temporary
  folder are masked: they are of a run, not of the notebook.
- Numbers: whole numbers are equal; others agree to 2 units of their last printed digit or to 1 percent, for processors round
  differently; two numbers below 1e-5 are both nothing but rounding.
- Pictures: as many, of the same kind, as wide and as high (to 2 percent: fonts).
- A cell that begins with `#| varies` shows measurements of a machine, such as times or throughputs: it must show as many
  texts and pictures as before, whatever they say.
"""

import argparse
import base64
import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
SHARED = ROOT / "../shared"
NEEDS = {"experiments/evidence.ipynb", "experiments/neu_seg.ipynb", "experiments/real_images.ipynb"}  # ../shared
LIMIT = 1800  # seconds of one notebook
ELSEWHERE = {"gpu", "weights"}  # cells that begin with one of these flags are for other machines
SLOW = ELSEWHERE | {"notest", "slow"}  # and these are executed where outputs are stored, not where they are compared
INLINE = "module://matplotlib_inline.backend_inline"
VARIES = re.compile(r"^#\|\s*varies\b", re.MULTILINE)
PICTURES = ("image/png", "image/jpeg")
WIDEST = 1400  # pixels of a stored picture: twice the width of a column, for sharp screens
LARGE = 200_000  # bytes of a PNG from which on a JPEG is stored instead
KEPT = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/jpeg", "image/svg+xml")


# ---------------------------------------------------------------------------------------------------------- executing


def notebooks(places: list[Path]) -> list[Path]:
    "All notebooks of files and folders, in reading order."
    found: list[Path] = []
    for place in places:
        inside = sorted(place.rglob("*.ipynb")) if place.is_dir() else [place]
        found += [p for p in inside if not p.name.startswith((".", "_")) and ".ipynb_checkpoints" not in p.parts]
    return found


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def left_out(path: Path) -> str:
    "Why a notebook is not executed here; empty: it is."
    name = path.relative_to(NBS).as_posix()
    if name in NEEDS and not SHARED.is_dir():
        return f"needs the real images and weights of {SHARED.name}"
    return ""


def shown(cell: dict) -> list[dict]:
    "The outputs of a cell, without what belongs to a run: identifiers of widgets, warnings, counters."
    outputs = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            if output["name"] == "stdout":
                outputs.append(dict(output_type="stream", name="stdout", text="".join(output["text"])))
            continue
        if output["output_type"] == "error":
            outputs.append(output)
            continue
        data = {kind: output["data"][kind] for kind in KEPT if kind in output["data"]}
        data = {kind: "".join(v) if isinstance(v, list) else v for kind, v in data.items()}
        if data:
            outputs.append(dict(output_type=output["output_type"], data=data))
    return outputs


def _work(path: str, flagged: bool, sender):
    "In a process of its own: execute a notebook, send the outputs of every cell, or the error."
    try:
        sender.send(_outputs(Path(path), flagged))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        sender.close()


def _outputs(path: Path, flagged: bool) -> list[list[dict] | None] | str:  # of every cell; an error's text
    "What executing a notebook shows."
    import torch
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.process import NBProcessor

    torch.set_num_threads(1)
    book = NBProcessor(path, process=True).nb
    needs_shared = path.resolve().is_relative_to(NBS) and path.relative_to(NBS).as_posix() in NEEDS
    sys.path.insert(0, str(ROOT))
    shell = CaptureShell(path)
    shell.run("import pandas; pandas.set_option('display.max_columns', 20)")  # as in a notebook, not as in a terminal
    found = []
    with working_directory(ROOT if needs_shared else path.parent), tempfile.TemporaryDirectory() as room:
        os.environ["TMPDIR"] = tempfile.tempdir = room
        for cell in book.cells:
            directives = getattr(cell, "directives_", None) or {}
            skipped = (SLOW if not flagged else ELSEWHERE) & set(directives)
            if cell.cell_type != "code" or skipped or directives.get("eval:", [""])[0].lower() == "false":
                found.append(None)
                continue
            shell.cell(cell)
            if shell.exc:
                return f"cell {len(found)}: {type(shell.exc).__name__}: {shell.exc}"
            if needs_shared and "parameters" in cell.metadata.get("tags", []):
                shell.run(f"output = {room!r}")  # what an earlier run left in the default folder is not shown
            found.append(shown(json.loads(json.dumps(dict(outputs=cell.get("outputs", []))))))
        os.environ.pop("TMPDIR")
        tempfile.tempdir = None
    hidden = {room: "TEMP", str(ROOT): "REPOSITORY"}  # whoever reads a notebook has other folders
    return [None if outputs is None else [without_places(output, hidden) for output in outputs] for outputs in found]


def without_places(output: dict, hidden: dict[str, str]) -> dict:
    "An output whose texts name no folder of this machine."

    def hide(text: str) -> str:
        for place, word in hidden.items():
            text = text.replace(place, word)
        return text

    if "text" in output:
        return output | dict(text=hide(output["text"]))
    if "data" in output:
        return output | dict(data={k: hide(v) if k.startswith("text/") else v for k, v in output["data"].items()})
    return output


_context = None


def context():
    "A server that has imported what every notebook imports; a notebook's process is a copy of it."
    global _context
    if _context is None:
        os.environ.update(MPLBACKEND=INLINE, TQDM_DISABLE="1", OMP_NUM_THREADS="1", IN_TEST="1")
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(["imported_once"])
    return _context


def executed(
    path: Path,
    flagged: bool = False,  # also the cells that are slow
) -> list[list[dict] | None]:  # the outputs of every cell; None: it was not executed
    "Execute a notebook; an error in it raises."
    receiver, sender = context().Pipe(duplex=False)
    process = context().Process(target=_work, args=(str(path), flagged, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT):
            raise TimeoutError(f"{path.name} takes more than {LIMIT} seconds")
        result = receiver.recv()
    except EOFError as error:
        process.join(5)
        raise RuntimeError(f"{path.name} ended its process, status {process.exitcode}") from error
    finally:
        process.kill()
        process.join()
    if isinstance(result, str):
        raise RuntimeError(f"{path.relative_to(ROOT)}, {result}")
    return result


# ---------------------------------------------------------------------------------------------------------- comparing

UNIT = r"(?:s|ms|µs|us|ns|min|h|seconds?|minutes?|hours?|milliseconds?)\b"
DURATION = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?\s*{UNIT}")
PLACE = re.compile(r"(?:/private)?/(?:tmp|var/folders)/[^\s'\",:<>)]+|0x[0-9a-f]{6,}|\btmp[a-z0-9_]{8}\b")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])", re.IGNORECASE)


def parts(text: str) -> tuple[str, list[str]]:
    "Text without what belongs to a run, its numbers taken out; the numbers."
    text = PLACE.sub("PLACE", DURATION.sub("DURATION", text))
    numbers = NUMBER.findall(text)
    words = NUMBER.sub("#", text)
    return re.sub(r"[ \t─-]+", " ", words).strip(), numbers  # columns are as wide as their numbers


def last_digit(number: str) -> float:
    "What one unit of the last printed digit is worth."
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def alike(one: str, other: str) -> bool:
    "Two printed numbers, as processors differ."
    if one == other:
        return True
    if not {".", "e", "E"} & {*one, *other}:
        return False
    a, b = (float(n.replace(",", "").replace("−", "-")) for n in (one, other))
    if max(abs(a), abs(b)) < 1e-5:
        return True
    unit = min(last_digit(n) for n in (one, other))
    return abs(a - b) <= 2.01 * unit or math.isclose(a, b, rel_tol=0.01)


def text_difference(one: str, other: str) -> str:
    "Where two texts differ; empty: nowhere that counts."
    words, numbers = parts(one)
    other_words, other_numbers = parts(other)
    if words != other_words:
        lines = [pair for pair in zip(words.splitlines(), other_words.splitlines()) if pair[0] != pair[1]]
        before, after = lines[0] if lines else (f"{words.count(chr(10))} lines", f"{other_words.count(chr(10))} lines")
        return f"stored {before[:100]!r}, now {after[:100]!r}"
    for a, b in zip(numbers, other_numbers):
        if not alike(a, b):
            return f"stored {a}, now {b}"
    return ""


def picture_size(data: str) -> tuple[int, int]:
    "Width and height in pixels, as stored."
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        width, height = picture.size
    return min(width, WIDEST), round(height * min(1.0, WIDEST / width))


def kinds_of(output: dict) -> set[str]:
    "What an output holds; a picture is one in either format."
    return {"picture" if kind in PICTURES else kind for kind in output["data"]}


def output_difference(one: dict, other: dict, varies: bool) -> str:
    "Between a stored output and one of today."
    if ("stream" in (one["output_type"], other["output_type"])) and one["output_type"] != other["output_type"]:
        return f"stored {one['output_type']}, now {other['output_type']}"
    if one["output_type"] == "stream":
        return "" if varies else text_difference(one["text"], other["text"])
    if kinds_of(one) != kinds_of(other):
        return f"stored {', '.join(sorted(kinds_of(one)))}, now {', '.join(sorted(kinds_of(other)))}"
    if "picture" in kinds_of(one):
        sizes = [picture_size(next(o["data"][k] for k in PICTURES if k in o["data"])) for o in (one, other)]
        if any(abs(a - b) > max(2, 0.02 * a) for a, b in zip(*sizes)):
            return "stored a picture of {} x {}, now {} x {}".format(*sizes[0], *sizes[1])
        return ""
    for kind, data in one["data"].items():
        if not varies and (difference := text_difference(data, other["data"][kind])):
            return difference
    return ""


def differences(path: Path, now: list[list[dict] | None]) -> list[str]:  # one sentence a cell
    "Between what a notebook stores and what executing it shows."
    found = []
    for number, (cell, outputs) in enumerate(zip(read(path)["cells"], now)):
        if outputs is None:
            continue
        stored = shown(cell)
        varies = bool(VARIES.search("".join(cell["source"])))
        if len(stored) != len(outputs):
            found.append(f"cell {number}: stored {len(stored)} outputs, now {len(outputs)}")
            continue
        for one, other in zip(stored, outputs):
            if difference := output_difference(one, other, varies):
                found.append(f"cell {number}: {difference}")
                break
    return found


# ------------------------------------------------------------------------------------------------------------ writing


def small_picture(data: str) -> tuple[str, str]:  # mime type, base64
    "A picture at most WIDEST pixels wide: with 8 bits a pixel, or as JPEG where that would be large."
    from PIL import Image

    before = base64.b64decode(data)
    with Image.open(io.BytesIO(before)) as picture:
        flat = Image.new("RGB", picture.size, "white")
        whole = picture.convert("RGBA")
        flat.paste(whole, mask=whole.getchannel("A"))
    if flat.width > WIDEST:
        flat = flat.resize((WIDEST, round(flat.height * WIDEST / flat.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    flat.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG).save(out, "PNG", optimize=True)
    if out.tell() < LARGE:
        return "image/png", base64.b64encode(out.getvalue()).decode()
    for quality in (85, 70, 55):
        out = io.BytesIO()
        flat.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() < 2 * LARGE:
            break
    return "image/jpeg", base64.b64encode(out.getvalue()).decode()


def stored_form(output: dict) -> dict:
    "An output as a notebook's file holds it."
    if output["output_type"] == "stream":
        return output | dict(text=output["text"].splitlines(keepends=True))
    data = {}
    for kind, value in output["data"].items():
        if kind == "image/png":
            kind, value = small_picture(value)
        data[kind] = value.splitlines(keepends=True) if kind.startswith("text/") else value
    form = dict(output_type=output["output_type"], data=data, metadata={})
    return form | (dict(execution_count=None) if output["output_type"] == "execute_result" else {})


def write(path: Path, now: list[list[dict] | None]):
    "Store outputs; a cell whose outputs are as before keeps them, to the byte."
    book = read(path)
    for cell, outputs in zip(book["cells"], now):
        if outputs is None:
            continue
        stored = shown(cell)
        varies = bool(VARIES.search("".join(cell["source"])))
        pictures = any("image/png" in output.get("data", {}) for output in outputs)
        same = len(stored) == len(outputs) and not any(output_difference(a, b, varies) for a, b in zip(stored, outputs))
        if not same or pictures:
            cell["outputs"] = [stored_form(output) for output in outputs]
        cell["execution_count"] = None
    text = json.dumps(book, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("places", nargs="*", type=lambda p: Path(p).resolve(), default=[NBS], metavar="NOTEBOOK")
    ask.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    ask.add_argument("--jobs", type=int, default=2, help="notebooks at the same time (default: 2)")
    asked = ask.parse_args()
    failed = 0

    def one(path: Path) -> tuple[Path, list[str]]:
        if why := left_out(path):
            return path, [f"left out: {why}"]
        try:
            now = executed(path, flagged=asked.write)
        except Exception as error:
            return path, [f"failed: {error}"]
        found = differences(path, now)
        if asked.write:
            write(path, now)
        return path, found

    context()
    with ThreadPoolExecutor(asked.jobs) as pool, contextlib.suppress(KeyboardInterrupt):
        for path, found in pool.map(one, notebooks(asked.places)):
            failed += any(not line.startswith("left out") for line in found) and not asked.write
            failed += any(line.startswith("failed") for line in found) and asked.write
            for line in found:
                print(f"{path.relative_to(ROOT)}: {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
