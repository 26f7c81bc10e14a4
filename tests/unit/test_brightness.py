"One brightness scale for a data set: by the type, the header or what is stated; never by the other pixels of a file."

import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from image_files import encoded, netpbm, png16, tiff
from PIL import Image

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.cli.commands import main
from zsad_nb.data.crops import cut_crops, cut_ksdd
from zsad_nb.data.images import Batch, batches, check
from zsad_nb.data.index import concat_indices, fingerprint, make_index, root_of
from zsad_nb.data.pixels import load_image, load_pair, read_image
from zsad_nb.data.reading import Reading, read_as, reading_of
from zsad_nb.data.stored import BadImage, open_stored
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.multi_type import evaluate_types
from zsad_nb.evaluation.study import study
from zsad_nb.evaluation.views import choose, map_ranges, view
from zsad_nb.explore import maps_store
from zsad_nb.explore.maps_store import make_store, open_store
from zsad_nb.figures.heatmaps import render_cases
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.methods.base import create
from zsad_nb.runs.shards import evaluate_shards
from zsad_nb.training.fit import fit, recipe_of

RNG = np.random.default_rng(0)


def grey(bright: int, size: int = 12) -> np.ndarray:
    "16-bit noise up to a brightness that occurs."
    values = RNG.integers(0, bright + 1, (size, size)).astype("uint16")
    values[0, 0] = bright
    return values


def colours(values: np.ndarray) -> np.ndarray:
    return np.dstack([values, values[::-1], values.T])


def opaque(values: np.ndarray, alpha: int = 65535) -> np.ndarray:
    return np.dstack([values, np.full(values.shape[:2], alpha, "uint16")])


# ---- what 16 bits can come in; each takes (H, W) values and gives something that is read, and the grey channel that is expected

CARRIERS = {
    "grey png": png16,
    "rgb png": lambda v: png16(colours(v)),
    "rgba png": lambda v: png16(opaque(colours(v))),
    "la png": lambda v: png16(opaque(v)),
    "grey tiff": tiff,
    "big-endian tiff": lambda v: tiff(v, ">"),
    "rgb tiff": lambda v: tiff(colours(v)),
    "big-endian rgb tiff": lambda v: tiff(colours(v), ">"),
    "rgba tiff": lambda v: tiff(opaque(colours(v))),
    "lzw tiff": lambda v: encoded(v, "TIFF", compression="tiff_lzw"),
    "white is zero": lambda v: tiff(65535 - v, photometric=0),
    "pgm": netpbm,
    "ppm": lambda v: netpbm(colours(v)),
    "jpeg 2000": lambda v: encoded(v, "JPEG2000", irreversible=False),
    "array": lambda v: v,
    "array rgb": colours,
    "array rgba": lambda v: opaque(colours(v)),
    "tensor": lambda v: torch.from_numpy(v),
    "tensor rgb": lambda v: torch.from_numpy(colours(v)).permute(2, 0, 1),
    "opened rgb png": lambda v: Image.open(io.BytesIO(png16(colours(v)))),
    "open file": lambda v: io.BytesIO(png16(colours(v))),
    "in memory": Image.fromarray,
}
STATED = {
    "int32 array": lambda v: v.astype("int32"),
    "int64 array": lambda v: v.astype("int64"),
    "signed tiff": lambda v: tiff(v.astype("int32")),
    "int16 tiff": lambda v: tiff((v >> 1).astype("int16")),
    "uint32 tiff": lambda v: tiff(v.astype("uint32")),
    "mode I": lambda v: Image.fromarray(v.astype("int32")),
}


def first_channel(what, **options) -> np.ndarray:
    return np.asarray(read_image(what, **options))[..., 0].astype(int)


@pytest.mark.parametrize(
    "bits, bright", [(None, 65535), (16, 65535), (16, 900), (12, 4095), (12, 1000), (10, 1023), (14, 9000)]
)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_value_is_one_brightness_whatever_carries_it(carrier, bits, bright):
    values = grey(bright)
    top = 2 ** (bits or 16) - 1
    assert np.array_equal(first_channel(CARRIERS[carrier](values), bits=bits), np.rint(values * (255 / top)))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_hot_pixel_changes_no_other(carrier):
    values = grey(30000)
    hot = values.copy()
    hot[0, 0] = 65535
    one = first_channel(CARRIERS[carrier](values))
    two = first_channel(CARRIERS[carrier](hot))
    assert np.array_equal(one.ravel()[1:], two.ravel()[1:]) and two[0, 0] == 255


@pytest.mark.parametrize("carrier", CARRIERS)
def test_brighter_than_stated_is_refused_by_name(carrier):
    with pytest.raises(BadImage, match="its brightest pixel is 4096, more than 12 bits hold"):
        read_image(CARRIERS[carrier](grey(4096)), bits=12)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("bright, depth", [(200, 8), (1000, 10), (4095, 12)])
def test_nearly_black_is_refused_until_the_depth_is_stated(carrier, bright, depth):
    with pytest.raises(
        BadImage, match=f"its brightest pixel is {bright} of 65535.*state bits={depth}.*or bits=16"
    ) as error:
        read_image(CARRIERS[carrier](grey(bright)))
    assert error.value.code == "dark"
    assert first_channel(CARRIERS[carrier](grey(bright)), bits=16).max() == round(bright * 255 / 65535)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_black_is_black(carrier):
    assert first_channel(CARRIERS[carrier](np.zeros((12, 12), "uint16"))).max() == 0


@pytest.mark.parametrize("carrier", STATED)
def test_types_that_do_not_say_their_white(carrier):
    values = grey(4095)
    with pytest.raises(BadImage, match="does not say which value is white; state the depth"):
        read_image(STATED[carrier](values))
    expected = values >> 1 if carrier == "int16 tiff" else values
    assert np.array_equal(first_channel(STATED[carrier](values), bits=12), np.rint(expected * (255 / 4095)))


@given(
    value=strategies.integers(0, 65535),
    bits=strategies.sampled_from([None, 8, 10, 12, 14, 16]),
    others=strategies.lists(strategies.integers(0, 65535), max_size=3),
)
def test_brightness_depends_on_nothing_else(value, bits, others):
    "A value in any company is what it is alone, or the file is refused."
    top = 2 ** (bits or 16) - 1
    try:
        got = first_channel(png16(np.array([[value, *others]], "uint16")), bits=bits)[0, 0]
    except BadImage as error:
        assert max(value, *others, 0) > top if error.code != "dark" else bits is None and max(value, *others, 0) < 4096
        return
    assert got == round(value * 255 / top)


def test_headers_that_state_their_white():
    assert first_channel(netpbm(np.array([[4095, 1000]]), 4095)).tolist() == [[255, 62]]
    assert first_channel(netpbm(colours(np.full((2, 2), 700)), 700)).min() == 255
    twelve = tiff(np.zeros((1, 3), "uint8"), more={258: 12, 256: 2})  # two pixels of 12 bits in three bytes
    assert open_stored(twelve).white == 4095
    with pytest.raises(BadImage, match="its brightest pixel is 4095, more than 10 bits hold"):
        read_image(netpbm(np.array([[4095]]), 4095), bits=10)


@pytest.mark.parametrize("make", [lambda v: v, tiff, lambda v: torch.from_numpy(v), lambda v: Image.fromarray(v)])
def test_floats_lie_between_zero_and_white(make):
    ramp = np.linspace(0, 1, 12, dtype="float32")[None].repeat(12, 0)
    assert (
        np.array_equal(first_channel(make(ramp)), first_channel(make(ramp * 255), white=255))
        and first_channel(make(ramp)).max() == 255
    )
    for white, wrong in ((None, 1.5), (255, 256)):
        with pytest.raises(BadImage, match=f"brightest pixel is {wrong:g}; floats are read as 0 to .*white"):
            read_image(make(ramp * np.float32(wrong)), white=white)
    with pytest.raises(BadImage, match="not numbers"):
        read_image(make(ramp * np.float32("nan")))
    with pytest.raises(BadImage, match="negative"):
        read_image(make(ramp - np.float32(0.5)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_float_is_one_scale(dtype):
    assert first_channel(np.array([[0, 0.5, 1]], dtype)).tolist() == [[0, 128, 255]]


def test_bfloat16_and_bool():
    assert first_channel(torch.ones(3, 2, 2, dtype=torch.bfloat16)).min() == 255 and first_channel(
        np.eye(2, dtype=bool)
    ).tolist() == [[255, 0], [0, 255]]


@pytest.mark.parametrize("array", [np.array([[1 + 2j]]), np.array([["a"]]), np.array([[None]])])
def test_what_is_no_brightness(array):
    with pytest.raises(ValueError, match="no brightness"):
        read_image(array)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_eight_bits_are_as_they_are_whatever_is_stated(mode):
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3)).astype("uint8")).convert("RGB")
    if mode == "LAB":
        from PIL import ImageCms

        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        image = image.convert(mode)
    want = np.asarray(read_image(image))
    assert want.shape == (8, 8, 3) and np.array_equal(want, read_image(image, bits=12, white=255))


def test_transparency_of_sixteen_bits():
    values = np.full((1, 2, 3), 65535, "uint16")
    values[0, 1] = [7, 65535, 9]
    assert first_channel(png16(values, clear=(65535, 65535, 65535))).tolist() == [[0, 0]] and np.asarray(
        read_image(png16(values, clear=(65535,) * 3))
    )[0, 1].tolist() == [0, 255, 0]
    assert first_channel(png16(np.array([[60000, 20000]], "uint16"), clear=(60000,))).tolist() == [[0, 78]]
    half = opaque(np.full((1, 1, 3), 65535, "uint16"), 32768)
    assert (
        first_channel(png16(half)).item() == 128
        and first_channel(png16(opaque(np.full((1, 1, 3), 4095, "uint16"), 4095)), bits=12).item() == 255
    )


@pytest.mark.parametrize("change", [dict(more={284: 2}), dict(more={339: 2})])
def test_what_the_decoder_would_get_wrong_is_refused(change):
    "Colours in separate planes; signed 8-bit values."
    values = np.full((4, 4, 3), 60000, "uint16") if 284 in change["more"] else np.full((4, 4), 200, "uint8")
    with pytest.raises(BadImage, match="separate planes|signed 8-bit"):
        open_stored(tiff(values, **change))


def test_a_decoded_image_whose_lower_bytes_are_gone(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png16(colours(grey(4095))))
    with Image.open(path) as image:
        image.load()
        assert np.array_equal(
            read_image(image, bits=12), load_image(path, 12)
        )  # its path still leads to the same pixels
        path.unlink()
        with pytest.raises(BadImage, match="may have been, cut to 8 bits.*path or the bytes"):
            read_image(image, bits=12)
        assert np.array_equal(read_image(image.copy(), bits=12), image)  # eight bits, and said so


# ---- every function that reads, under one name

READERS = [
    batches,
    check,
    evaluate,
    fit,
    evaluate_types,
    evaluate_shards,
    study,
    make_store,
    choose,
    map_ranges,
    view,
    cut_crops,
    cut_ksdd,
    load_pair,
]
NAMES = ["bits", "white", "mask_threshold", "mask_mismatch", "mask_orientation"]


@pytest.mark.parametrize("function", READERS, ids=lambda f: f.__name__)
def test_every_reader_has_every_name(function):
    parameters = inspect.signature(function).parameters
    assert [n for n in parameters if n in NAMES] == NAMES and not [
        p for p in parameters.values() if p.kind is p.VAR_KEYWORD
    ]


WRONG = [
    dict(bits=7),
    dict(bits=33),
    dict(bits=12.5),
    dict(bits=True),
    dict(bits="12"),
    dict(white=0),
    dict(white=-1),
    dict(white=float("inf")),
    dict(mask_threshold=-1),
    dict(mask_threshold=float("nan")),
    dict(mask_mismatch="crop"),
    dict(mask_orientation="sideways"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_values_out_of_range_are_refused_at_once(wrong, tmp_path):
    index = make_index([dict(category="c", split="test", image="gone.png", anomalous=False)], tmp_path, "t")
    for call in (
        lambda: batches(index, 8, **wrong),
        lambda: check(index, **wrong),
        lambda: evaluate(None, index, **wrong),
        lambda: fit(METHOD[0], index, **wrong),
        lambda: load_pair("gone.png", **wrong),
        lambda: cut_crops(index, tmp_path / "out", 4, **wrong),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            call()
    if set(wrong) & {"bits", "white"}:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Inspector(METHOD[0], **wrong)


def test_a_misspelt_name_gets_the_nearest(tmp_path):
    index = make_index([dict(category="c", split="test", image="gone.png", anomalous=False)], tmp_path, "t")
    for call in (
        lambda: batches(index, 8, bit=12),
        lambda: check(index, bit=12),
        lambda: evaluate(None, index, bit=12),
        lambda: read_as(index, bit=12),
    ):
        with pytest.raises(TypeError, match="unknown option of reading 'bit'; did you mean bits"):
            call()


METHOD = []


@pytest.fixture(scope="module", autouse=True)
def method():
    METHOD[:] = [create("self_distance", image_size=32).eval()]
    return METHOD[0]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "The same pictures with 8 bits, and with 12 in 16-bit grey, colour and TIFF files: exactly 16 times the values of 255, 17 levels."
    root = tmp_path_factory.mktemp("sets")
    found = {}
    levels = [RNG.integers(0, 18, (32, 32)) * 15 for _ in range(6)]
    mask = np.zeros((32, 32), "uint8")
    mask[8:20, 8:20] = 255
    for name, write in {
        "plain": lambda v: encoded(v.astype("uint8")),
        "grey": lambda v: png16(v * 273 // 17),
        "rgb": lambda v: png16(np.dstack([v * 273 // 17] * 3)),
        "tiff": lambda v: tiff((v * 273 // 17).astype("uint16")),
    }.items():
        (root / name).mkdir()
        (root / name / "m.png").write_bytes(encoded(mask))
        rows = []
        for i, v in enumerate(levels):
            (root / name / f"{i}.{'tif' if name == 'tiff' else 'png'}").write_bytes(write(v))
            rows.append(
                dict(
                    category="c",
                    split="test",
                    image=f"{i}.{'tif' if name == 'tiff' else 'png'}",
                    mask="m.png" if i % 2 else "",
                    anomalous=bool(i % 2),
                )
            )
        found[name] = make_index(rows, root / name, "t")
    return found


DEEP = ["grey", "rgb", "tiff"]


@pytest.mark.parametrize("name", DEEP)
def test_the_depth_reaches_batches_and_check(sets, name):
    want = Batch.cat(batches(sets["plain"], 32)).image
    for index in (read_as(sets[name], bits=12), sets[name]):
        got = Batch.cat(batches(index, 32, **({} if index is not sets[name] else dict(bits=12)))).image
        assert (got - want).abs().max() <= 1 / 255 + 1e-6
    with pytest.raises(BadImage, match="state bits="):
        list(batches(sets[name], 32))
    assert set(check(sets[name]).problem) == {"dark"} and len(check(sets[name], bits=12)) == 0


@pytest.mark.parametrize("name", DEEP)
def test_the_depth_reaches_evaluation_and_its_record(sets, name, method):
    same = evaluate(method, read_as(sets["grey"], bits=12), progress=False).per_image["score"].to_numpy()
    found = evaluate(method, sets[name], progress=False, bits=12, workers=2)
    np.testing.assert_array_equal(found.per_image["score"], same)
    assert found.reading == dict(
        bits=12, white=None, mask_threshold=None, mask_mismatch="error", mask_orientation="auto"
    )
    with pytest.raises(BadImage, match="state bits="):
        evaluate(method, sets[name], progress=False)


def test_the_depth_reaches_shards_types_maps_and_views(sets, method, tmp_path):
    index = sets["rgb"]
    same = evaluate(method, index, progress=False, bits=12)
    with ThreadPoolExecutor(1) as pool:
        found = evaluate_shards(method, index, 2, executor=pool, folder=tmp_path, progress=False, batch_size=3, bits=12)
    np.testing.assert_array_equal(np.sort(found.per_image["score"]), np.sort(same.per_image["score"]))
    assert found.reading == same.reading
    store = make_store(method, index, tmp_path / "maps", bits=12)
    store.compute(progress=False)
    np.testing.assert_allclose(
        store.rows["score"], same.per_image.set_index("image").loc[store.index["image"], "score"], rtol=1e-6
    )
    again = open_store(store.folder)
    assert reading_of(again.index).bits == 12 and np.array_equal(again.picture(0)[0], store.picture(0)[0])
    assert make_store(method, index, tmp_path / "maps", bits=16).folder != store.folder
    shown = choose(index, bits=12)
    assert view(method, shown, bits=12).images.max() > 250 and view(method, read_as(shown, bits=16)).images.max() < 20


def test_the_depth_reaches_figures_and_what_a_run_knows(sets, method, tmp_path, monkeypatch):
    found = evaluate(method, sets["grey"], progress=False, bits=12)
    assert len(render_cases(method, sets["grey"], found, tmp_path, dpi=20)) == 2  # read as it was evaluated
    record = dict(spec=dict(parameters=dict(data="t", root="r", bits=12, mask_threshold=100, white=None)))
    monkeypatch.setattr(maps_store, "result_of", lambda folder: SimpleNamespace(record=record))
    monkeypatch.setattr(maps_store, "load_dataset", lambda name, root: sets["grey"])
    assert reading_of(maps_store.data_of(tmp_path)) == Reading(bits=12, mask_threshold=100)


def test_the_depth_reaches_the_references_a_method_collects(sets):
    mutual = create("mutual", image_size=32)
    assert np.isfinite(evaluate(mutual, sets["grey"], progress=False, bits=12).per_image["score"]).all()


def test_the_depth_reaches_training(sets):
    losses = {}
    for name in ("grey", "rgb"):
        torch.manual_seed(0)
        model = create("visualad", image_size=32)
        history = fit(model, sets[name], recipe_of(model, epochs=1, batch_size=3), progress=False, bits=12)
        losses[name] = history["total"].tolist()
        assert history.attrs["reading"]["bits"] == 12
    assert losses["grey"] == losses["rgb"]
    with pytest.raises(BadImage, match="state bits="):
        fit(create("visualad", image_size=32), sets["grey"], progress=False)


def test_features_of_one_depth_are_not_taken_for_those_of_another(sets, tmp_path):
    cache = FeatureCache(tmp_path)
    scores = {}
    method = create("april_gan", image_size=32)
    for bits in (12, 16, 12):
        scores.setdefault(bits, []).append(
            evaluate(method, sets["grey"], progress=False, cache=cache, bits=bits).per_image["score"].to_numpy()
        )
    np.testing.assert_array_equal(*scores[12])
    np.testing.assert_allclose(
        scores[16][0], evaluate(method, sets["grey"], progress=False, bits=16).per_image["score"], rtol=1e-5
    )  # image by image, and as a batch
    assert not np.array_equal(scores[12][0], scores[16][0]) and cache.hits == cache.misses // 2 == 6


def test_the_reading_travels_with_the_index(sets):
    deep = read_as(sets["grey"], bits=12, mask_threshold=100)
    for other in (
        deep[deep.anomalous],
        pickle.loads(pickle.dumps(deep)),
        deep.head(2),
        concat_indices([deep, deep.iloc[:0]]),
    ):
        assert reading_of(other) == Reading(bits=12, mask_threshold=100) and str(root_of(other)) == str(root_of(deep))
    assert fingerprint(deep) != fingerprint(sets["grey"]) == fingerprint(read_as(deep, bits=None, mask_threshold=None))
    with pytest.raises(ValueError, match="read differently"):
        concat_indices([deep, sets["rgb"]])


def test_an_inspector_and_an_index_must_agree(sets, method):
    index = read_as(sets["grey"], bits=12)
    with pytest.raises(ValueError, match="read with bits=12, white=None; this inspector reads with"):
        Inspector(method).predict(index, progress=False)
    table = Inspector(method, bits=12).predict(index, progress=False)
    np.testing.assert_allclose(
        table["score"],
        evaluate(method, index, progress=False).per_image.set_index("image").loc[index["image"], "score"],
        rtol=1e-6,
    )


def test_thresholds_remember_how_their_images_were_read(sets, method, tmp_path):
    inspector = Inspector(method, bits=12)
    made = inspector.calibrate(read_as(sets["grey"], bits=12).query("not anomalous"), rate=0.3, progress=False)
    path = made.save(tmp_path / "t.json")
    assert (
        made.reading == dict(bits=12, white=None)
        and Inspector(method, path, bits=12).calibration.reading == made.reading
    )
    with pytest.raises(ValueError, match="made from images read with .*12.*on another scale"):
        Inspector(method, path)
    assert inspector.settings["reading"] == dict(bits=12, white=None)


def test_the_commands_take_the_names(tmp_path, capsys):
    "check with everything; predict, which reads no masks, with the two of images."
    for name in ("c/train/good/1.png", "c/test/good/1.png", "c/test/bad/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png16(grey(4000, 32)))
    (tmp_path / "c/ground_truth/bad").mkdir(parents=True)
    (tmp_path / "c/ground_truth/bad/1_mask.png").write_bytes(encoded(np.eye(16, dtype="uint8") * 255))
    assert main(["check", str(tmp_path), "--dataset", "mvtec"]) == 1 and "state bits=12" in capsys.readouterr().out
    assert (
        main(
            [
                "check",
                str(tmp_path),
                "--dataset",
                "mvtec",
                "--bits",
                "12",
                "--mask-mismatch",
                "resize",
                "--mask-threshold",
                "100",
                "--mask-orientation",
                "upright",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "predict",
                str(tmp_path / "c/test"),
                "--out",
                str(tmp_path / "out"),
                "-p",
                "image_size",
                "32",
                "--bits",
                "12",
                "--white",
                "1",
                "--pictures",
                "none",
            ]
        )
        == 0
    )
    assert (
        main(["check", str(tmp_path), "--dataset", "mvtec", "--bits", "99"]) == 2
        and "from 8 to 32" in capsys.readouterr().err
    )


# ---- check


@pytest.mark.parametrize(
    "bright, stated, dark",
    [(16000, {}, True), (16384, {}, False), (16000, dict(bits=14), False), (16000, dict(bits=16), False)],
)
def test_fourteen_bits_are_reported_where_no_file_is_brighter(tmp_path, bright, stated, dark):
    (tmp_path / "a.png").write_bytes(png16(grey(bright)))
    (tmp_path / "b.png").write_bytes(png16(grey(9000)))
    index = make_index(
        [dict(category="c", split="test", image=f"{n}.png", anomalous=False) for n in "ab"], tmp_path, "t"
    )
    assert (check(index, **stated).problem == "dark").any() == dark
    if dark:
        assert "state bits=14" in check(index).message[0]


def test_dark_floats_are_reported(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(np.full((4, 4), 0.01, "float32")))
    index = make_index([dict(category="c", split="test", image="a.tif", anomalous=False)], tmp_path, "t")
    assert check(index).problem.tolist() == ["dark"] and len(check(index, white=0.01)) == 0


def test_crops_are_cut_on_the_scale_of_the_set(sets, tmp_path):
    crops = cut_crops(sets["rgb"], tmp_path / "out", 16, bits=12)
    assert len(check(crops).query("problem != 'duplicate'")) == 0 and Batch.cat(batches(crops, 16)).image.max() > 0.95
