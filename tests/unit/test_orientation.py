"One photograph, one orientation, whatever it comes as; masks of turned photographs by one stated rule; pages are refused."

import io

import numpy as np
import pytest
import torch
from image_files import encoded, png16, tiff
from PIL import Image, ImageOps

from zsad_nb.data.images import Batch, batches, check
from zsad_nb.data.index import make_index
from zsad_nb.data.masks import orientation_by_shape, placed, turned
from zsad_nb.data.pixels import load_image, load_pair, read_image, resize
from zsad_nb.data.stored import BadImage, open_stored, upright_size
from zsad_nb.deploy.inference import Exported
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.sources import from_array, is_single, sources
from zsad_nb.methods.base import create

RNG = np.random.default_rng(1)
PHOTO = RNG.integers(0, 256, (20, 32, 3)).astype("uint8")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    "By the definition of the tag, with numpy alone."
    flips = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]}
    sideways = pixels.swapaxes(0, 1)
    flips |= {5: sideways, 6: sideways[:, ::-1], 7: sideways[::-1, ::-1], 8: sideways[::-1]}
    return flips[orientation]


def exif(orientation) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


FILES = {
    "jpeg": lambda o: encoded(PHOTO, "JPEG", quality=95, exif=exif(o)),
    "png": lambda o: encoded(PHOTO, "PNG", exif=exif(o)),
    "webp": lambda o: encoded(PHOTO, "WEBP", lossless=True, exif=exif(o)),
    "tiff": lambda o: tiff(PHOTO, more={274: o}),
    "lzw tiff": lambda o: encoded(PHOTO, "TIFF", compression="tiff_lzw", tiffinfo={274: o}),
    "16-bit png": lambda o: png16(PHOTO.astype("uint16") * 257, orientation=o),
    "16-bit tiff": lambda o: tiff(PHOTO.astype("uint16") * 257, more={274: o}),
}


@pytest.fixture(scope="module")
def inspector() -> Inspector:
    return Inspector(create("self_distance", image_size=32).eval())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FILES)
def test_one_photograph_whatever_it_comes_as(tmp_path, kind, orientation):
    data = FILES[kind](orientation)
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    want = np.asarray(load_image(path))
    if kind != "jpeg":
        assert np.array_equal(want, upright(PHOTO, orientation))
    assert upright_size(path) == want.shape[1::-1] and open_stored(path).orientation == orientation
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    with open(path, "rb") as file, Image.open(path) as opened:
        file.read(3)  # wherever it stands
        ways = dict(
            text=str(path),
            bytes=data,
            bytearray=bytearray(data),
            view=memoryview(data),
            buffer=io.BytesIO(data),
            file=file,
            opened=opened,
            loaded=loaded,
            array=want,
            turned=ImageOps.exif_transpose(Image.open(io.BytesIO(data))),
            copied=Image.open(io.BytesIO(data)).copy(),
            converted=Image.open(io.BytesIO(data)).convert("RGB"),
        )
        for way, same in ways.items():
            got = np.asarray(read_image(same)).astype(int)
            near = (
                1 if kind.startswith("16") and way in ("loaded", "turned", "copied", "converted") else 0
            )  # Pillow keeps the upper byte
            assert got.shape == want.shape and np.abs(got - want).max() <= near, way
            if way != "text":
                assert np.array_equal(got, from_array(same))
        assert opened.tell() == 0 and file.tell() == 3


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "16-bit tiff"])
def test_an_inspector_sees_one_photograph(inspector, tmp_path, kind):
    data = FILES[kind](6)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    want = inspector.predict(path)
    with Image.open(path) as opened, open(path, "rb") as file:
        for same in (data, io.BytesIO(data), file, opened, np.asarray(load_image(path))):
            found = inspector.predict(same)
            assert (
                found.score == want.score
                and found.size == want.size == (20, 32)
                and np.array_equal(found.heat, want.heat)
            )
    table = inspector.predict([path, data, io.BytesIO(data)], progress=False)
    assert table["duplicate_of"].tolist() == ["", str(path), str(path)] and table["score"].nunique() == 1


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "16-bit tiff"])
def test_an_exported_method_sees_the_same_photograph(tmp_path, kind):
    exported = object.__new__(Exported)  # of which only the way from a picture to a tensor is asked
    exported.about = dict(input=dict(size=[32, 32]))
    data = FILES[kind](6)
    (tmp_path / "a.png").write_bytes(data)
    want = torch.from_numpy(resize(load_image(tmp_path / "a.png"), 32).copy()).permute(2, 0, 1) / 255
    with Image.open(tmp_path / "a.png") as opened:
        for same in (
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            data,
            io.BytesIO(data),
            opened,
            np.asarray(load_image(tmp_path / "a.png")),
        ):
            assert np.array_equal(exported.image(same)[0], want)
    assert np.array_equal(
        exported.image(PHOTO.astype("uint16") * 16, bits=12),
        exported.image(np.rint(PHOTO.astype(float) * 16 * (255 / 4095)).astype("uint8")),
    )


@pytest.mark.parametrize("value", [0, 9, 77, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value):
    assert np.array_equal(read_image(tiff(PHOTO, more={274: value})), PHOTO) and np.array_equal(
        read_image(png16(PHOTO.astype("uint16") * 257, orientation=value)), PHOTO
    )


@pytest.mark.parametrize(
    "what, single", [(b"x", True), (bytearray(b"x"), True), (io.BytesIO(b"x"), True), ([b"x", b"y"], False)]
)
def test_bytes_are_sources(what, single):
    assert is_single(what) == single and [s.name for s in sources(what)] == [
        f"bytes-{i:05d}" for i in range(1 if single else 2)
    ]


@pytest.mark.parametrize(
    "what, message", [(b"", "0 bytes"), (b"hello", "not an image"), (FILES["jpeg"](1)[:300], "truncated|damaged")]
)
def test_bytes_that_are_no_image(inspector, what, message):
    with pytest.raises(BadImage, match=message):
        inspector.predict(what)
    assert inspector.predict([what, PHOTO], progress=False)["decision"].tolist() == ["error", "score only"]


def test_a_file_opened_as_text(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with open(tmp_path / "a.txt") as file, pytest.raises(TypeError, match="open it with open.path, 'rb'."):
        read_image(file)


# ---- pages


def frames(kind: str, count: int, **options) -> bytes:
    pictures = [Image.fromarray(np.roll(PHOTO, 3 * i, 0)) for i in range(count)]
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


PAGES = {
    "tiff": (lambda: frames("TIFF", 3), 3),
    "gif": (lambda: frames("GIF", 4), 4),
    "webp": (lambda: frames("WEBP", 2, lossless=True), 2),
    "apng": (lambda: frames("PNG", 3), 3),
    "16-bit tiff": (lambda: tiff(PHOTO.astype("uint16") * 257, pages=2), 2),
    "a page and a mask": (lambda: tiff(PHOTO, pages=4, reduced=(2,)), 3),
}


@pytest.mark.parametrize("kind", PAGES)
def test_several_pages_are_refused_with_their_number(tmp_path, kind):
    make, count = PAGES[kind]
    (tmp_path / "a.png").write_bytes(make())
    (tmp_path / "ok.png").write_bytes(encoded(PHOTO))
    for call in (
        lambda: load_image(tmp_path / "a.png"),
        lambda: read_image(make()),
        lambda: read_image(Image.open(tmp_path / "a.png")),
        lambda: load_pair(tmp_path / "ok.png", tmp_path / "a.png"),
    ):
        with pytest.raises(BadImage, match=f"{count} (pages|pictures).*file of its own") as error:
            call()
        assert error.value.code == "pages"
    index = make_index([dict(category="c", split="test", image="a.png", anomalous=False)], tmp_path, "t")
    assert check(index).problem.tolist() == ["pages"]
    with pytest.raises(BadImage, match=f"{count} "):
        list(batches(index, 8))
    loader = batches(index, 8, on_bad="skip")
    with pytest.warns(UserWarning, match=f"{count} "):
        assert list(loader) == [] and len(loader.skipped) == 1


def test_a_page_chosen_by_hand_is_read():
    with Image.open(io.BytesIO(PAGES["tiff"][0]())) as image:
        image.seek(2)
        assert np.array_equal(read_image(image), np.roll(PHOTO, 6, 0))
        image.seek(1)
        assert np.array_equal(read_image(image.copy()), np.roll(PHOTO, 3, 0))


@pytest.mark.parametrize("reduced, page", [((1,), 0), ((0,), 1), ((0, 2), 1), ((1, 2), 0), ((0, 1, 2), 0)])
def test_reduced_copies_are_no_pages(reduced, page):
    "A thumbnail behind or before the picture, the levels of a pyramid."
    assert np.array_equal(read_image(tiff(PHOTO, pages=len(reduced) + (len(reduced) < 3), reduced=reduced)), PHOTO)
    deep = PHOTO.astype("uint16") * 257
    assert np.array_equal(
        open_stored(tiff(deep, pages=3, reduced=reduced if len(reduced) > 1 else (1, 2))).values(), deep
    )


def test_the_photograph_of_a_phone_has_a_second_picture_beside_it(tmp_path):
    main = Image.fromarray(PHOTO)
    depth = Image.new("RGB", (8, 5))
    main.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[depth], quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert load_image(tmp_path / "a.jpg").size == (32, 20)
    Image.fromarray(PHOTO).resize((64, 64)).save(tmp_path / "a.ico", sizes=[(16, 16), (64, 64), (32, 32)])
    assert load_image(tmp_path / "a.ico").size == (64, 64)


# ---- masks on turned photographs

MASK = np.zeros((20, 32), bool)
MASK[2:6, 3:20] = True


def pair(
    folder, name: str, orientation: int, square: bool = False, drawn: str = "stored", own: int = 1, shrink: int = 1
) -> dict:
    photo, mask = (PHOTO[:, :20], MASK[:, :20]) if square else (PHOTO, MASK)
    (folder / f"{name}.png").write_bytes(encoded(photo, exif=exif(orientation)))
    mask = np.ascontiguousarray(upright(mask, orientation) if drawn == "upright" else mask)[::shrink, ::shrink]
    (folder / f"{name}_m.png").write_bytes(encoded(mask.astype("uint8") * 255, exif=exif(own)))
    return dict(category="c", split="test", image=f"{name}.png", mask=f"{name}_m.png", anomalous=True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_a_mask_is_turning_its_photograph(orientation):
    assert np.array_equal(turned(MASK, orientation), upright(MASK, orientation))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn", ["upright", "stored"])
def test_a_stated_position_holds_for_every_mask(tmp_path, orientation, square, drawn):
    row = pair(tmp_path, "a", orientation, square, drawn)
    index = make_index([row], tmp_path, "t")
    want = upright(MASK[:, :20] if square else MASK, orientation)
    _, mask = load_pair(tmp_path / "a.png", tmp_path / "a_m.png", mask_orientation=drawn)
    assert np.array_equal(mask, want) and len(check(index, mask_orientation=drawn)) == 0
    if square:
        assert np.array_equal(Batch.cat(batches(index, 20, mask_orientation=drawn)).mask[0, 0], want)
    other = "stored" if drawn == "upright" else "upright"
    if orientation > 4 and not square:
        with pytest.raises(BadImage, match=f'pass mask_orientation="{drawn}"'):
            load_pair(tmp_path / "a.png", tmp_path / "a_m.png", mask_orientation=other)


@pytest.mark.parametrize("drawn", ["upright", "stored"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("shrink", [1, 2])
def test_the_shape_of_an_oblong_photograph_tells(tmp_path, orientation, drawn, shrink):
    "Also where the mask is half as large."
    row = pair(tmp_path, "a", orientation, drawn=drawn, shrink=shrink)
    how = dict(mask_mismatch="resize") if shrink > 1 else {}
    _, mask = load_pair(tmp_path / "a.png", tmp_path / "a_m.png", **how)
    assert (
        mask.shape == (32, 20)
        and (mask != upright(MASK, orientation)).mean() < 0.05
        and len(check(make_index([row], tmp_path, "t"), **how)) == 0
    )


@pytest.mark.parametrize(
    "others, says, reported",
    [
        ([], "nothing in this set tells", True),
        (["stored"], "lie as stored", True),
        (["upright"], "", False),
        (["stored", "upright"], "nothing in this set tells", True),
    ],
)
def test_check_reports_where_the_position_is_not_known(tmp_path, others, says, reported):
    rows = [
        pair(tmp_path, "unknown3", 3),
        pair(tmp_path, "unknown6", 6, square=True),
        pair(tmp_path, "plain", 1),
        *(pair(tmp_path, f"oblong{i}", 6, drawn=d) for i, d in enumerate(others)),
    ]
    index = make_index(rows, tmp_path, "t")
    found = check(index).query("problem == 'mask_position'")
    assert found.image.tolist() == (["unknown3.png", "unknown6.png"] if reported else []) and all(
        says in m and "mask_orientation" in m for m in found.message
    )


def test_a_pass_warns_once_of_suppositions(tmp_path):
    index = make_index([pair(tmp_path, "a", 3), pair(tmp_path, "b", 4)], tmp_path, "t")
    loader = batches(index, 16)
    with pytest.warns(UserWarning, match="2 masks lie on photographs that EXIF turns .such as a.png.") as seen:
        [list(loader) for _ in range(3)]
    assert len(seen) == 1


def test_a_mask_with_a_tag_of_its_own_is_turned_by_that(tmp_path):
    for how in ("auto", "upright", "stored"):
        row = pair(tmp_path, "a", 3, drawn="stored", own=3)
        assert np.array_equal(
            load_pair(tmp_path / "a.png", tmp_path / "a_m.png", mask_orientation=how)[1], upright(MASK, 3)
        )
    assert len(check(make_index([row], tmp_path, "t"))) == 0


def test_nothing_is_supposed_where_turning_changes_nothing():
    same = np.zeros((10, 10), bool)
    same[4:6, 4:6] = True
    assert (
        placed(same, (10, 10), 3)[1] is False
        and placed(MASK, (32, 20), 3)[1] is True
        and orientation_by_shape((20, 33), (32, 20), 6) == ""
    )
