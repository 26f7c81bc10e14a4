"What notebooks show is what executing them shows; every notebook shows something, in pictures that can be read."

import base64
import json
import os

import pytest
from stored_outputs import (
    NBS,
    PICTURES,
    alike,
    differences,
    executed,
    left_out,
    notebooks,
    output_difference,
    picture_size,
    read,
    shown,
    text_difference,
)

ALL = notebooks([NBS])
NAMES = [path.relative_to(NBS).as_posix() for path in ALL]
WIDTH = 640  # pixels: narrower pictures have letters that nobody can read
NARROW = {  # notebooks with pictures that are still to be made wider
    "backbones/10_graphs.ipynb",
    "components/06_vcpg.ipynb",
    "components/07_vtam.ipynb",
    "experiments/neu_seg.ipynb",
    "explore/12_explorer.ipynb",
    "figures/02_blending.ipynb",
    "figures/04_types.ipynb",
    "figures/07_grids.ipynb",
    "inspection/05_verdicts.ipynb",
    "inspection/08_inspector.ipynb",
    "inspection/09_predict.ipynb",
    "methods/19_adaclip.ipynb",
    "methods/20_anovl.ipynb",
    "methods/21_april_gan.ipynb",
    "synthetic/01_canvas.ipynb",
    "training/01_precision.ipynb",
    "training/03_devices.ipynb",
    "tutorials/quickstart.ipynb",
    "tutorials/your_own_images.ipynb",
}


def outputs_of(path):
    return [output for cell in read(path)["cells"] if cell["cell_type"] == "code" for output in shown(cell)]


@pytest.mark.parametrize("path", ALL, ids=NAMES)
def test_executed_again_it_shows_the_same(path):
    if not os.environ.get("ZSAD_STALE"):
        pytest.skip("executes every notebook: minutes; set ZSAD_STALE=1 (make notebooks stores what they show)")
    if why := left_out(path):
        pytest.skip(why)
    found = differences(path, executed(path))
    assert not found, f"make notebooks stores what {path.relative_to(NBS)} shows now:\n" + "\n".join(found)


@pytest.mark.parametrize("path", ALL, ids=NAMES)
def test_it_shows_something(path):
    found = outputs_of(path)
    assert found, "a notebook without outputs shows nothing to somebody who reads it"
    assert not [output["evalue"] for output in found if output["output_type"] == "error"]


@pytest.mark.parametrize("path", ALL, ids=NAMES)
def test_its_pictures_can_be_read(path):
    if path.relative_to(NBS).as_posix() in NARROW:
        pytest.skip("has pictures that are still to be made wider")
    for output in outputs_of(path):
        for kind in PICTURES:
            if kind in output.get("data", {}):
                width, height = picture_size(output["data"][kind])
                assert width >= WIDTH, f"a picture of {width} x {height} pixels; make it {WIDTH} wide"


# ---------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("stored", "now", "same"),
    [
        ("AUROC 91.7 of 12 images", "AUROC 91.7 of 12 images", True),
        ("AUROC 91.7 of 12 images", "AUROC 91.7 of 13 images", False),
        ("AUROC 91.7", "AUROC 91.8", True),  # the last digit, as processors differ
        ("AUROC 91.7", "AUROC 93.7", False),
        ("AUROC 0.917", "AUROC 0.971", False),
        ("largest difference 2.4e-08", "largest difference 7.1e-07", True),
        ("largest difference 2.4e-03", "largest difference 7.1e-03", False),
        ("3 s", "14.2 s", True),
        ("took 1,203 ms in /tmp/tmpabc12345/x.png", "took 4 ms in /tmp/tmpzzz99999/x.png", True),
        ("wood  good\n1  2.5", "wood      good\n1     2.5", True),  # columns are as wide as their numbers
        ("wood", "leather", False),
        ("version 2", "version 3", False),
        ("one\ntwo", "one", False),
        ("-0.52", "0.52", False),
    ],
)
def test_what_counts_as_the_same_text(stored, now, same):
    assert (text_difference(stored, now) == "") == same


def test_whole_numbers_are_exact_and_signs_count():
    assert alike("1,024", "1,024") and not alike("1024", "1025")
    assert alike("0.10", "0.11") and not alike("0.10", "0.15")
    assert not alike("1e-3", "2e-2")


def test_a_picture_of_another_size_is_another(tmp_path):
    import io

    from PIL import Image

    def picture(width):
        out = io.BytesIO()
        Image.new("RGB", (width, 300)).save(out, "PNG")
        data = {"image/png": base64.b64encode(out.getvalue()).decode()}
        return dict(output_type="display_data", data=data)

    assert output_difference(picture(700), picture(708), False) == ""
    assert "700 x 300, now 800 x 300" in output_difference(picture(700), picture(800), False)


def test_a_changed_digit_or_a_missing_output_fails(tmp_path):
    "A stored notebook whose numbers were of another run is stale."
    path = tmp_path / "one.ipynb"
    cell = dict(cell_type="code", source=["print('AUROC', 91.7)\n"], metadata={}, execution_count=None, id="a")
    cell["outputs"] = [dict(output_type="stream", name="stdout", text=["AUROC 91.7\n"])]
    book = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(book))
    now = executed(path)
    assert differences(path, now) == []
    path.write_text(json.dumps(book).replace("AUROC 91.7\\n", "AUROC 71.7\\n"))
    assert differences(path, now) == ["cell 0: stored 71.7, now 91.7"]
    cell["outputs"] = []
    path.write_text(json.dumps(book))
    assert differences(path, now) == ["cell 0: stored 0 outputs, now 1"]
    cell["source"] = ["#| varies\n", "print('AUROC', 91.7)\n"]
    cell["outputs"] = [dict(output_type="stream", name="stdout", text=["AUROC 12 in 3 s\n"])]
    path.write_text(json.dumps(book))
    assert differences(path, now) == []


def test_an_error_in_a_notebook_names_its_cell(tmp_path):
    path = NBS / "_raises.ipynb"
    cell = dict(cell_type="code", source=["1 / 0"], metadata={}, execution_count=None, id="a", outputs=[])
    path.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    try:
        with pytest.raises(RuntimeError, match=r"_raises.ipynb, cell 0: ZeroDivisionError"):
            executed(path)
    finally:
        path.unlink()
