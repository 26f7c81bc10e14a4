"What a mask marks: soft edges do not grow a defect, labels keep it, and what cannot be known is refused."

import numpy as np
import pytest
from hypothesis import given, strategies
from image_files import encoded, png16, tiff
from PIL import Image, ImageFilter
from scipy import ndimage

from zsad_nb.data.crops import cut_crops
from zsad_nb.data.images import Batch, batches, check
from zsad_nb.data.index import make_index
from zsad_nb.data.masks import load_mask, marks_anything
from zsad_nb.data.readers import read
from zsad_nb.data.stored import BadImage
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.methods.base import create

HARD = np.zeros((64, 96), "uint8")
HARD[20:30, 20:30] = 255


def soft(sigma: float = 1.0, top: float = 255) -> np.ndarray:
    "A defect of 100 pixels with soft edges."
    return ndimage.gaussian_filter(HARD.astype(float), sigma) * top / 255


def labels(*numbers: int) -> np.ndarray:
    found = np.zeros((64, 96), "int64")
    for i, n in enumerate(numbers):
        found[4 + 3 * i : 6 + 3 * i, 5:80] = n
    return found


def layer(values: np.ndarray, colour: tuple = (255, 255, 255)) -> np.ndarray:
    "Drawn on a transparent layer."
    return np.dstack([np.full((*values.shape, 3), colour, "uint8"), values.astype("uint8")])


SOFT = {
    "8-bit png": lambda v: encoded(np.rint(v).astype("uint8")),
    "16-bit png": lambda v: png16(np.rint(v * 257).astype("uint16")),
    "16-bit rgb png": lambda v: png16(np.dstack([np.rint(v * 257).astype("uint16")] * 3)),
    "big-endian 16-bit tiff": lambda v: tiff(np.rint(v * 257).astype("uint16"), ">"),
    "float tiff": lambda v: tiff((v / 255).astype("float32")),
    "rgb": lambda v: encoded(np.dstack([np.rint(v).astype("uint8")] * 3)),
    "red": lambda v: encoded(np.dstack([np.rint(v).astype("uint8"), HARD * 0, HARD * 0])),
    "white on a layer": lambda v: encoded(layer(np.rint(v))),
    "black on a layer": lambda v: encoded(layer(np.rint(v), (0, 0, 0))),
    "grey palette": lambda v: encoded(
        Image.fromarray(np.rint(v).astype("uint8")).convert("P", palette=Image.Palette.ADAPTIVE)
    ),
    "jpeg": lambda v: encoded(np.rint(v).astype("uint8"), "JPEG", quality=85),
    "webp": lambda v: encoded(np.dstack([np.rint(v).astype("uint8")] * 3), "WEBP", quality=85),
}


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("kind", SOFT)
def test_soft_edges_do_not_grow_a_defect(kind, sigma):
    assert abs(load_mask(SOFT[kind](soft(sigma))).sum() - 100) <= 12


@pytest.mark.parametrize(
    "resample", [Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]
)
@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5, 2, 3])
def test_nor_do_masks_that_were_resized(resample, factor):
    size = round(96 * factor), round(64 * factor)
    area = load_mask(encoded(Image.fromarray(HARD).resize(size, resample))).sum()
    assert abs(area / factor**2 - 100) <= 100 * 0.25 / factor


LABELS = {
    "8-bit png": lambda v: encoded(v.astype("uint8")),
    "16-bit png": lambda v: png16(v.astype("uint16")),
    "int32 tiff": lambda v: tiff(v.astype("int32")),
    "float tiff": lambda v: tiff(v.astype("float32")),
    "rgb": lambda v: encoded(np.dstack([v.astype("uint8")] * 3)),
    "rgba": lambda v: encoded(np.dstack([v.astype("uint8")] * 3 + [np.full(v.shape, 255, "uint8")])),
    "bmp": lambda v: encoded(v.astype("uint8"), "BMP"),
    "palette": lambda v: encoded(Image.fromarray(v.astype("uint8")).convert("P")),
    "16-bit rgb": lambda v: png16(np.dstack([v.astype("uint16")] * 3)),
}


@pytest.mark.parametrize(
    "numbers",
    [(1,), (3,), (128,), (255,), (1, 2), (1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (2, 31), (40, 80, 120)],
    ids=str,
)
@pytest.mark.parametrize("kind", LABELS)
def test_labels_count_above_zero(kind, numbers):
    values = labels(*numbers)
    assert np.array_equal(load_mask(LABELS[kind](values)), values > 0)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_labels_stored_with_few_bits(depth):
    "A PNG optimised for size keeps 0 to 3 in 2 bits; the decoder spreads them to 0, 85, 170, 255."
    import struct
    import zlib

    from image_files import _chunk

    values = labels(*range(1, 2**depth)[:12]).astype("uint8")[:, :96]
    rows = b""
    for row in values:
        rows += b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, -depth:].ravel()).tobytes()
    data = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", 96, 64, depth, 0, 0, 0, 0))
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )
    assert np.array_equal(load_mask(data), values > 0)


@pytest.mark.parametrize(
    "palette", [[0, 0, 0, 64, 0, 0, 0, 64, 0, 64, 64, 0], [0] * 12, [0, 0, 0, 255, 0, 0, 0, 9, 0, 3, 0, 3]]
)
def test_colours_of_a_palette_are_labels(palette):
    image = Image.fromarray(labels(1, 2, 3).astype("uint8")).convert("P")
    image.putpalette(palette + [0] * (768 - len(palette)))
    assert np.array_equal(load_mask(encoded(image)), labels(1, 2, 3) > 0)


REFUSED = {
    "labels that reach beyond one half": (
        encoded(labels(80, 160, 240).astype("uint8")),
        0,
        "even areas of grey below one half",
    ),
    "a void beside labels": (encoded(labels(1, 2, 255).astype("uint8")), 0, "even areas of grey"),
    "dim soft edges": (encoded(np.rint(soft(2, 90)).astype("uint8")), 45, "its brightest value is"),
    "8-bit shades in 16 bits": (png16(np.rint(soft(2)).astype("uint16")), 127, "its brightest value is"),
    "many instances": (png16(labels(*range(1, 19)).astype("uint16") * 20), 0, "its brightest value is 360 of 65535"),
    "floats up to 255": (tiff(soft(2).astype("float32")), 127.5, "different values up to"),
    "32-bit shades": (tiff(np.rint(soft(2)).astype("int32")), 127.5, "different values up to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_either_is_refused_until_it_is_stated(tmp_path, case):
    data, threshold, message = REFUSED[case]
    with pytest.raises(BadImage, match=f"{message}.*state mask_threshold") as error:
        load_mask(data)
    assert (
        error.value.code == "unclear_mask"
        and load_mask(data, mask_threshold=threshold).sum() > 20
        and marks_anything(data)
    )
    (tmp_path / "a.png").write_bytes(encoded(HARD))
    (tmp_path / "m.png").write_bytes(data)
    index = make_index([dict(category="c", split="test", image="a.png", mask="m.png", anomalous=True)], tmp_path, "t")
    assert check(index).problem.tolist() == ["unclear_mask"] and len(check(index, mask_threshold=threshold)) == 0
    with pytest.raises(BadImage, match="m.png.*state mask_threshold"):
        list(batches(index, 8))


@pytest.mark.parametrize("threshold", [0, 0.5, 1, 100, 127, 254, 255])
def test_what_is_stated_wins(threshold):
    values = np.arange(256, dtype="uint8").reshape(16, 16)
    for data in (
        encoded(values),
        encoded(np.dstack([values] * 3)),
        tiff(values.astype("float32")),
        tiff(values.astype("int32")),
        png16(values.astype("uint16")),
    ):
        assert np.array_equal(load_mask(data, mask_threshold=threshold), values > threshold)


@given(
    top=strategies.sampled_from([1, 2, 3, 7, 31, 100, 128, 200, 255]),
    where=strategies.lists(strategies.tuples(strategies.integers(0, 15), strategies.integers(0, 15)), max_size=30),
)
def test_two_values_are_what_they_look_like(top, where):
    "Scattered or not, whatever the value."
    values = np.zeros((16, 16), "uint8")
    for y, x in where:
        values[y, x] = top
    for data in (encoded(values), png16(values.astype("uint16")), tiff(values.astype("float32"))):
        assert np.array_equal(load_mask(data), values > 0)


@pytest.mark.parametrize("value, message", [(np.nan, "not numbers"), (np.inf, "not numbers"), (-1, "negative")])
def test_masks_of_impossible_values(tmp_path, value, message):
    values = HARD / np.float32(255)
    values[0, 0] = value
    (tmp_path / "m.tif").write_bytes(tiff(values.astype("float32")))
    (tmp_path / "a.png").write_bytes(encoded(HARD))
    with pytest.raises(BadImage, match=message):
        load_mask(tmp_path / "m.tif")
    index = make_index([dict(category="c", split="test", image="a.png", mask="m.tif", anomalous=True)], tmp_path, "t")
    assert check(index).problem.tolist() == ["bad_mask"]


def problems(folder, mask: np.ndarray | bytes) -> list[str]:
    (folder / "a.png").write_bytes(encoded(np.roll(HARD, 3)))
    (folder / "m.png").write_bytes(mask if isinstance(mask, bytes) else encoded(mask))
    return check(
        make_index([dict(category="c", split="test", image="a.png", mask="m.png", anomalous=True)], folder, "t")
    ).problem.tolist()


@pytest.mark.parametrize(
    "case, found",
    [
        ("plain", []),
        ("inverted", ["inverted_mask"]),
        ("full", ["inverted_mask"]),
        ("border", ["inverted_mask"]),
        ("large", []),
        ("three edges", []),
        ("none", ["empty_mask"]),
        ("alpha", ["alpha_mask"]),
        ("opaque", []),
    ],
)
def test_check_reports_masks_that_look_wrong(tmp_path, case, found):
    border = HARD * 0 + 255
    border[1:-1, 1:-1] = 0
    edges = border.copy()
    edges[0] = 0
    large = HARD * 0
    large[4:-1] = 255
    made = dict(
        plain=HARD,
        inverted=255 - HARD,
        full=HARD * 0 + 255,
        border=border,
        large=large,
        none=HARD * 0,
        alpha=layer(HARD),
        opaque=np.dstack([HARD] * 3 + [HARD * 0 + 255]),
    )
    assert problems(tmp_path, made.get(case, edges)) == found


def test_the_threshold_reaches_evaluation_and_crops(tmp_path):
    for name, data in {
        "a.png": encoded(np.roll(HARD, 9)),
        "b.png": encoded(np.roll(HARD, 5, 0)),
        "m.png": encoded(labels(80, 240).astype("uint8")),
    }.items():
        (tmp_path / name).write_bytes(data)
    index = make_index(
        [
            dict(category="c", split="test", image="a.png", mask="m.png", anomalous=True),
            dict(category="c", split="test", image="b.png", anomalous=False),
        ],
        tmp_path,
        "t",
    )
    method = create("self_distance", image_size=32).eval()
    found = {}
    for threshold in (0, 127):
        found[threshold] = evaluate(method, index, progress=False, mask_threshold=threshold)
        assert found[threshold].reading["mask_threshold"] == threshold
    assert found[0].mean.pixel_ap != found[127].mean.pixel_ap
    sizes = {t: float(Batch.cat(batches(index, (64, 96), mask_threshold=t)).mask.sum()) for t in (0, 127)}
    assert sizes == {0: 300, 127: 150}
    crops = {
        t: cut_crops(index[:1], tmp_path / f"crops{t}", 16, per_image_normal=0, mask_threshold=t) for t in (0, 127)
    }
    assert all(len(c) for c in crops.values())
    with pytest.raises(BadImage, match="state mask_threshold"):
        cut_crops(index, tmp_path / "out", 16)


@pytest.mark.slow
def test_real_masks_mark_what_they_marked(shared):
    "Above 0, as before: NEU-Seg's labels of 1 to 3, DeepPCB's boxes, CrackForest's lines."
    for name in ("neu_seg", "deeppcb", "crackforest"):
        index = read(name, shared / "data" / name)
        masks = [m for m in index["mask"] if m][::20]
        for mask in masks:
            path = shared / "data" / name / mask
            assert np.array_equal(load_mask(path), load_mask(path, mask_threshold=0)) and load_mask(path).any()


def test_a_blurred_png_is_that_of_the_filter():
    assert abs(load_mask(encoded(Image.fromarray(HARD).filter(ImageFilter.GaussianBlur(1)))).sum() - 100) <= 10
