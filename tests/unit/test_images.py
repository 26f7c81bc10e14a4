"Reading images: every kind of bad file, every mode, batches that do not depend on how they were made."

import itertools
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

from zsad_nb.data.images import Batch, batches, check, defect_names
from zsad_nb.data.index import make_index
from zsad_nb.data.masks import load_mask, resize_mask
from zsad_nb.data.pixels import load_image, load_pair, resize
from zsad_nb.data.stored import BadImage, open_image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 60, 3)).astype("uint8")
MASK = np.zeros((40, 60), "uint8")
MASK[10:20, 15:40] = 255


def row(image="a.png", mask="", anomalous=False, category="bolt", **more):
    return dict(category=category, split="test", image=image, mask=mask, anomalous=anomalous, **more)


def save(path, pixels=NOISE, mode=None, **options):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


# ---- files that cannot be read ----

FORMATS = {
    "jpg": {},
    "progressive.jpg": dict(progressive=True),
    "png": {},
    "bmp": {},
    "tif": {},
    "lzw.tif": dict(compression="tiff_lzw"),
    "deflate.tif": dict(compression="tiff_adobe_deflate"),
    "webp": dict(lossless=True),
    "gif": {},
}


@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_found(tmp_path, kind, part):
    path = save(tmp_path / f"a.{kind}", **FORMATS[kind])
    load_image(path)  # whole it is fine
    path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * part)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about damaged TIFF tags before it fails
        with pytest.raises(BadImage) as error:
            load_image(path)
        problems = check(make_index([row(path.name)], tmp_path, "t"))
    assert path.name in str(error.value) and "copy it again" in str(error.value) or "convert it" in str(error.value)
    assert problems[["row", "image"]].values.tolist() == [[0, path.name]] and problems.problem[0] in (
        "truncated",
        "unreadable",
    )


def test_truncated_is_called_so(tmp_path):
    for suffix in ("jpg", "png", "bmp", "tif"):
        path = save(tmp_path / f"a.{suffix}")
        path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(BadImage, match="truncated"):
                load_image(path)


@pytest.mark.parametrize(
    "name, content, code",
    [
        ("text.png", b"hello", "unreadable"),
        ("zero.jpg", b"", "unreadable"),
        ("gone.png", None, "missing"),
        ("noise.bmp", bytes(RNG.integers(0, 256, 500).astype("uint8")), "unreadable"),
        ("page.jpg", b"<html>404</html>", "unreadable"),
        ("riff.webp", b"RIFF\x00\x00\x00\x00WEBP", "unreadable"),
    ],
)
def test_not_an_image(tmp_path, name, content, code):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadImage, match=name) as error:
        load_image(tmp_path / name)
    assert error.value.code == code and ";" in str(error.value)  # what is wrong; what to do
    assert check(make_index([row(name)], tmp_path, "t")).problem.tolist() == [code]


def test_a_folder_is_not_an_image(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(BadImage, match="no such file"):
        load_image(tmp_path / "a.png")


def test_damage_never_escapes_as_another_error(tmp_path):
    rng = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for suffix in ("jpg", "png", "bmp", "gif", "webp"):
            raw = save(tmp_path / f"a.{suffix}").read_bytes()
            for _ in range(40):
                broken = bytearray(raw)
                for at in rng.integers(0, min(len(raw), 400), 4):
                    broken[at] = rng.integers(256)
                (tmp_path / f"b.{suffix}").write_bytes(broken)
                try:
                    load_image(tmp_path / f"b.{suffix}")
                except BadImage:
                    pass


# ---- modes ----


def test_eight_bit_modes_agree(tmp_path):
    grey = NOISE[..., 0]
    for mode, suffix in [
        ("L", "png"),
        ("L", "bmp"),
        ("L", "tif"),
        ("RGB", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("CMYK", "tif"),
        ("I", "tif"),
        ("F", "tif"),
    ]:
        got = np.asarray(
            load_image(save(tmp_path / f"{mode}.{suffix}", grey, mode), bits=8, white=255)
        )  # I and F do not say what is white
        assert got.shape == (40, 60, 3) and np.abs(got.astype(int) - grey[..., None]).max() <= (
            1 if mode == "CMYK" else 0
        ), mode


@pytest.mark.parametrize("top, bits", [(255, 8), (1000, 10), (4095, 12), (16383, 14), (40000, 16)])
def test_sixteen_bits_scale_by_the_stated_depth(tmp_path, top, bits):
    ramp = np.linspace(0, top, 60).round().astype("uint16")[None].repeat(40, 0)
    want = np.rint(ramp * (255 / (2**bits - 1)))
    for path in (
        save(tmp_path / "a.png", ramp),
        save(tmp_path / "a.tif", ramp),
        save(tmp_path / "i.tif", ramp.astype("int32")),
    ):
        assert np.array_equal(np.asarray(load_image(path, bits=bits))[..., 1], want), path.name
    assert np.asarray(load_image(tmp_path / "a.png", bits=16)).max() == round(top * 255 / 65535)


def test_floats_and_impossible_values(tmp_path):
    ramp = np.linspace(0, 1, 60, dtype="float32")[None].repeat(40, 0)
    assert np.asarray(load_image(save(tmp_path / "a.tif", ramp))).max() == 255
    for change, message in [
        (np.float32("nan"), "not numbers"),
        (np.float32(-1), "negative"),
        (np.float32(1e30), "brightest pixel is 1e.30; floats are read as 0 to 1"),
    ]:
        bad = ramp.copy()
        bad[3, 3] = change
        with pytest.raises(BadImage, match=message):
            load_image(save(tmp_path / "b.tif", bad))
    with pytest.raises(BadImage, match="a.png.*more than 8 bits hold"):
        load_image(save(tmp_path / "a.png", np.full((4, 4), 300, "uint16")), bits=8)


def test_transparency_is_composited_on_black(tmp_path):
    rgba = np.dstack([np.full((4, 4, 3), 200, "uint8"), np.array([0, 85, 170, 255], "uint8")[None].repeat(4, 0)])
    assert np.asarray(load_image(save(tmp_path / "a.png", rgba)))[0, :, 0].tolist() == [0, 67, 133, 200]
    palette = Image.fromarray(NOISE[..., 0] // 128).convert("P")
    palette.putpalette([250, 10, 10, 10, 250, 10])
    palette.save(tmp_path / "p.png", transparency=0)
    got = np.asarray(load_image(tmp_path / "p.png"))
    assert (got[NOISE[..., 0] < 128] == 0).all() and (got[NOISE[..., 0] >= 128] == [10, 250, 10]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_turns_image_and_mask(tmp_path, orientation):
    image = Image.fromarray(NOISE)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    save(tmp_path / "upright.png", (upright[..., 0] > 200).astype("uint8") * 255)
    got, mask = load_pair(tmp_path / "a.png", tmp_path / "upright.png")
    assert np.array_equal(np.asarray(got), upright) and np.array_equal(mask, upright[..., 0] > 200)
    if orientation > 4:  # drawn on the stored pixels: the sizes tell
        save(tmp_path / "stored.png", (NOISE[..., 0] > 200).astype("uint8") * 255)
        assert np.array_equal(load_pair(tmp_path / "a.png", tmp_path / "stored.png")[1], upright[..., 0] > 200)
    index = make_index([row("a.png", "upright.png", True)], tmp_path, "t")
    assert check(index).problem.tolist() == (
        ["mask_position"] if orientation in (2, 3, 4) else []
    )  # there no shape tells
    assert len(check(index, mask_orientation="upright")) == 0  # stated, not reported


# ---- masks ----


@pytest.mark.parametrize("value", [1, 3, 128, 255])
def test_a_mask_of_two_values_marks_the_larger_one_in_any_mode(tmp_path, value):
    want = MASK > 0
    for mode, suffix in [
        ("L", "png"),
        ("L", "bmp"),
        ("RGB", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("I", "tif"),
        ("F", "tif"),
    ]:
        assert np.array_equal(
            load_mask(save(tmp_path / f"m.{suffix}", np.where(want, value, 0).astype("uint8"), mode)), want
        ), mode
    assert np.array_equal(load_mask(save(tmp_path / "m16.png", np.where(want, value, 0).astype("uint16"))), want)
    assert np.array_equal(load_mask(save(tmp_path / "m1.png", MASK, "1")), want)


def test_mask_oddities(tmp_path):
    want = MASK > 0
    labels = Image.fromarray(want.astype("uint8")).convert("P")
    labels.putpalette([0, 0, 0] * 256)  # numbers without colours
    labels.save(tmp_path / "p.png")
    assert np.array_equal(load_mask(tmp_path / "p.png"), want)
    black = np.zeros((*MASK.shape, 4), "uint8")
    black[..., 3] = MASK  # painted in the alpha channel only
    assert np.array_equal(load_mask(save(tmp_path / "a.png", black)), want)
    save(tmp_path / "m.jpg", MASK, quality=75)
    assert (load_mask(tmp_path / "m.jpg") != want).mean() < 0.005 and (
        load_mask(tmp_path / "m.jpg", mask_threshold=0) & ~want
    ).mean() > 0.02


def test_resizing_agrees_with_torch():
    interpolate = torch.nn.functional.interpolate
    smooth = np.asarray(Image.fromarray(NOISE).resize((120, 90), Image.Resampling.BICUBIC))
    want = interpolate(
        torch.from_numpy(smooth.copy()).permute(2, 0, 1)[None].float(), (32, 32), mode="bicubic", antialias=True
    )[0].permute(1, 2, 0)
    assert np.abs(resize(Image.fromarray(smooth), 32) - want.clamp(0, 255).numpy()).max() < 2
    want = interpolate(torch.from_numpy(MASK > 0)[None, None].float(), (23, 31), mode="bilinear", antialias=True)[
        0, 0
    ].numpy()
    got = resize_mask(MASK > 0, (23, 31))
    sure = np.abs(want - 0.5) > 0.01  # an exact half falls either way
    assert (
        got.dtype == bool
        and got.shape == (23, 31)
        and sure.mean() > 0.9
        and (got == (want > 0.5))[sure].all()
        and got.any()
    )
    with pytest.raises(ValueError, match="'before' or 'after'"):
        resize(Image.fromarray(NOISE), 8, rgb="now")


# ---- check ----


def bad_folder(root):
    "One row a problem; row 0 and 8 are fine."
    (
        save(root / "ok.png"),
        save(root / "ok2.png", NOISE[::-1]),
        save(root / "m.png", MASK),
        save(root / "small.png", MASK[:, :30]),
        save(root / "empty.png", MASK * 0),
    )
    for k in range(2, 8):
        save(root / f"{k}.png", np.roll(NOISE, k, 0))
    (root / "m.txt.png").write_text("no mask")
    (root / "copy.png").write_bytes((root / "ok.png").read_bytes())
    rows = [
        row("ok.png"),
        row("gone.png"),
        row("2.png", "", True),
        row("3.png", "gone_mask.png", True),
        row("4.png", "m.png", False),
        row("5.png", "small.png", True, "screw"),
        row("6.png", "empty.png", True),
        row("7.png", "m.txt.png", True),
        row("ok2.png", "m.png", True),
        row("copy.png", "m.png", True),
    ]
    return make_index(rows, root, "t")


def test_check_reports_each_problem_on_its_row(tmp_path):
    index = bad_folder(tmp_path)
    for workers in (1, 2):
        report = check(index, workers)
        assert list(report.columns) == ["row", "image", "problem", "message"]
        assert report[["row", "problem"]].values.tolist() == [
            [1, "missing"],
            [2, "missing_mask"],
            [3, "missing_mask"],
            [4, "normal_mask"],
            [5, "size_mismatch"],
            [6, "empty_mask"],
            [7, "bad_mask"],
            [9, "duplicate"],
        ]
        assert (report.image == index.image[report.row].values).all()
    says = dict(zip(report.row, report.message))
    assert (
        "mask small.png is 30x40 but image 5.png is 60x40 (category screw); resize the mask or pass"
        ' mask_mismatch="resize"' in says[5]
    )
    assert (
        "row 0 (ok.png) with the other label" in says[9]
        and "marks 250 pixels" in says[4]
        and "gone_mask.png: no such file" in says[3]
    )


def test_check_is_silent_when_all_is_well(tmp_path):
    (
        save(tmp_path / "a.jpg"),
        save(tmp_path / "b.png", NOISE.astype("uint16")[..., 0] * 16),
        save(tmp_path / "c.png", NOISE, "RGBA"),
        save(tmp_path / "d.gif", NOISE, "P"),
        save(tmp_path / "m.png", MASK),
    )
    index = make_index([row("a.jpg"), row("b.png", "m.png", True), row("c.png"), row("d.gif")], tmp_path, "t")
    assert check(index).problem.tolist() == ["dark"]  # 12 bits in 16
    report = check(index, bits=12)
    assert len(report) == 0 and list(report.columns) == ["row", "image", "problem", "message"]


def test_duplicate_across_halves_is_said(tmp_path):
    save(tmp_path / "a.png")
    index = make_index([row("a.png") | dict(split="train"), row("a.png")], tmp_path, "t")
    assert check(index).message[0].startswith("the same bytes as row 0 (a.png) in the other split")


def test_row_numbers_are_positions_in_a_filtered_index(tmp_path):
    index = bad_folder(tmp_path)
    assert check(index[index.image == "6.png"]).row.tolist() == [0]


# ---- batches ----


@pytest.fixture
def index(tmp_path):
    save(tmp_path / "m.png", MASK)
    rows = []
    for k in range(11):
        save(tmp_path / f"{k}.png", np.roll(NOISE, k, 1))
        rows.append(
            row(
                f"{k}.png",
                "m.png" if k % 3 == 1 else "",
                k % 3 > 0,
                f"c{k % 2}",
                **({"defect": f"d{k % 3}"} if k % 3 else {}),
            )
        )
    return make_index(rows, tmp_path, "t")


def test_a_batch_holds_what_the_contract_says(index):
    found = list(batches(index, (24, 32), batch_size=4))
    assert len(batches(index, (24, 32), batch_size=4)) == len(found) == 3 and [len(b) for b in found] == [4, 4, 3]
    b = Batch.cat(found)
    assert (
        b.image.shape == (11, 3, 24, 32)
        and b.image.dtype == torch.float32
        and 0 <= b.image.min()
        and b.image.max() <= 1
        and b.image.max() > 0.5
    )
    assert b.mask.shape == (11, 1, 24, 32) and b.mask.dtype == torch.bool
    assert b.anomalous.dtype == torch.bool and b.anomalous.tolist() == index.anomalous.tolist()
    assert b.defect.dtype == torch.int64 and [defect_names(index)[d] for d in b.defect] == index.defect.tolist()
    assert b.category == index.category.tolist() and b.path == index.image.tolist()
    assert b.has_mask.tolist() == [k % 3 != 2 for k in range(11)]  # an anomalous image without a mask file
    assert b.mask.flatten(1).any(1).tolist() == [k % 3 == 1 for k in range(11)]
    want = np.asarray(Image.fromarray(np.roll(NOISE, 4, 1)).resize((32, 24), Image.Resampling.BICUBIC))
    assert torch.equal(b.image[4], torch.from_numpy(want.copy()).permute(2, 0, 1).float() / 255)


def test_numbers_do_not_depend_on_batch_size_or_workers(index):
    want = Batch.cat(batches(index, 24, 8, shuffle=True, seed=5))
    for size, workers in itertools.product((1, 3, 64), (0, 2)):
        got = Batch.cat(batches(index, 24, size, shuffle=True, seed=5, workers=workers))
        assert (
            got.path == want.path
            and torch.equal(got.image, want.image)
            and torch.equal(got.mask, want.mask)
            and torch.equal(got.defect, want.defect)
        )


def test_shuffling_is_seeded_and_new_in_every_pass(index):
    def paths(loader):
        return [path for b in loader for path in b.path]

    loader = batches(index, 8, 4, shuffle=True, seed=1)
    passes = [paths(loader) for _ in range(3)]
    again = batches(index, 8, 4, shuffle=True, seed=1)
    assert passes == [paths(again) for _ in range(3)] and len({tuple(p) for p in passes}) == 3
    assert all(sorted(p) == sorted(index.image) for p in passes)
    assert (
        paths(batches(index, 8, 4, shuffle=True, seed=2)) != passes[0]
        and paths(batches(index, 8, 4)) == index.image.tolist()
    )


def test_bad_files_raise_or_are_skipped(tmp_path):
    index = bad_folder(tmp_path)
    for workers in (0, 2):
        with pytest.raises(BadImage, match="gone.png"):
            list(batches(index, 16, workers=workers))
        loader = batches(index, 16, 3, on_bad="skip", workers=workers)
        with pytest.warns(UserWarning, match="skipped") as seen:
            got = Batch.cat(loader)
        assert got.path == ["ok.png", "2.png", "6.png", "ok2.png", "copy.png"] and len(loader.skipped) == len(seen) == 5
    with pytest.raises(BadImage, match="a normal image whose mask m.png marks 250 pixels"):
        list(batches(index[4:5], 16))


def test_size_mismatch_is_an_error_or_a_choice(tmp_path):
    index = bad_folder(tmp_path)
    index = index[index.image == "5.png"]
    with pytest.raises(BadImage) as error:
        list(batches(index, 16))
    assert (
        "mask small.png is 30x40 but image 5.png is 60x40 (category screw); resize the mask or pass"
        ' mask_mismatch="resize"' in str(error.value)
    )
    assert Batch.cat(batches(index, (40, 60), mask_mismatch="resize")).mask.float().mean() == pytest.approx(
        MASK[:, :30].mean() / 255, abs=0.02
    )


@pytest.mark.parametrize(
    "options",
    [dict(on_bad="ignore"), dict(mask_mismatch="crop"), dict(rgb="never"), dict(batch_size=0), dict(defects=["good"])],
)
def test_wrong_options_raise_before_anything_is_read(index, options):
    with pytest.raises(ValueError):
        batches(index, 8, **options)


def test_defects_can_be_numbered_from_outside(index):
    names = ["d2", "good", "d1", "x"]
    part = index[index.defect == "d1"]
    assert set(Batch.cat(batches(part, 8)).defect.tolist()) == {0} and set(
        Batch.cat(batches(part, 8, defects=names)).defect.tolist()
    ) == {2}


def test_official_order_of_rgb_changes_palettes_only(tmp_path):
    Image.fromarray(NOISE).quantize(8).save(tmp_path / "p.png"), save(tmp_path / "a.png")
    index = make_index([row("p.png"), row("a.png")], tmp_path, "t")
    before = Batch.cat(batches(index, 16))
    after = Batch.cat(batches(index, 16, rgb="after"))
    assert not torch.equal(before.image[0], after.image[0]) and torch.equal(before.image[1], after.image[1])


def test_stopping_early_leaves_no_threads(index):
    start = threading.active_count()
    for b in batches(index, 8, 1, workers=2):
        break
    del b
    assert threading.active_count() == start


def test_selecting_and_joining(index):
    b = Batch.cat(batches(index, 8))
    assert (
        b[2:5].path == index.image[2:5].tolist()
        and b[[5, 0]].path == ["5.png", "0.png"]
        and b[-1].path == ["10.png"]
        and b[[]].path == []
    )
    assert (
        b[b.anomalous].path == index.image[index.anomalous].tolist() and b[torch.tensor([3, 3])].path == ["3.png"] * 2
    )
    joined = Batch.cat([b[:4], b[4:]])
    assert joined.path == b.path and torch.equal(joined.image, b.image) and joined.to("cpu").category == b.category
    with pytest.raises(IndexError):
        b[torch.ones(3, dtype=torch.bool)]
    with pytest.raises(ValueError, match="no batch"):
        Batch.cat([])


def test_an_index_without_root_cannot_be_read(index):
    with pytest.raises(ValueError, match="lost its root"):
        batches(pd.DataFrame(index.to_dict()), 8)


def test_unreadable_by_permission(tmp_path, permissions_hold):
    save(tmp_path / "a.png").chmod(0)
    with pytest.raises(BadImage, match="no permission to read it"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_photograph_is_turned_without_a_second_copy(tmp_path, orientation):
    "Upright pixels in an image of their own: the file may go."
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGB", "RGBA", "L", "P"):
        stored = Image.fromarray(np.arange(6 * 4 * 3, dtype="uint8").reshape(6, 4, 3) * 3).convert(mode)
        stored.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            expected = ImageOps.exif_transpose(image)
        found, how = open_image(tmp_path / "a.png")
        (tmp_path / "a.png").unlink()
        assert (
            how == orientation
            and found.mode == mode
            and found.size == expected.size == ((4, 6) if orientation != 6 else (6, 4))
        )
        np.testing.assert_array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))
