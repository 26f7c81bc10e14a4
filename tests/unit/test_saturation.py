"MVTec LOCO: masks by defect, saturation areas, sPRO beside the AUPRO."

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from zsad_nb.core.files import write_json
from zsad_nb.data.readers import read
from zsad_nb.data.saturation import CONFIG, Channels, read_saturation
from zsad_nb.data.stored import BadImage
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.evaluation.metrics import PixelMetrics, pixel_metrics
from zsad_nb.evaluation.results import read_runs
from zsad_nb.evaluation.tables import results_table
from zsad_nb.figures.bars import bar_figure
from zsad_nb.methods.base import create
from zsad_nb.runs.shards import evaluate_shards

KINDS = [
    dict(defect_name="additional", pixel_value=255, saturation_threshold=40, relative_saturation=False),
    dict(defect_name="missing", pixel_value=254, saturation_threshold=0.25, relative_saturation=True),
]


def loco(root):
    "Two classes as the data set lies on disk: kinds of anomalies, a folder of masks an image, a list of defects."
    rng = np.random.default_rng(0)
    for category in ("pushpins", "screw_bag"):
        home = root / category
        for number in range(2):
            for part in ("train/good", "validation/good", "test/good"):
                _write(home / part / f"00{number}.png", rng.integers(90, 140, (64, 96, 3), dtype=np.uint8))
            for kind, values in (("logical_anomalies", (255, 254)), ("structural_anomalies", (255,))):
                image = rng.integers(90, 140, (64, 96, 3), dtype=np.uint8)
                for channel, value in enumerate(values):
                    mask = np.zeros((64, 96), np.uint8)
                    mask[8 + 20 * channel : 24 + 20 * channel, 10 + 8 * number : 40] = value
                    image[mask > 0] = 250
                    _write(home / "ground_truth" / kind / f"00{number}" / f"00{channel}.png", mask)
                _write(home / "test" / kind / f"00{number}.png", image)
        (home / CONFIG).write_text(json.dumps(KINDS))
    return root


def _write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def index(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read("mvtec_loco", loco(tmp_path / "loco"), valid="skip")


def literal(maps, masks, channels, limit):
    "The set's own evaluation, written out: every score a threshold, every defect for itself, a trapezoid."
    thresholds = np.unique(maps)[::-1]
    fpr, spro = [0.0], [0.0]
    for threshold in thresholds:
        marked = maps >= threshold
        fpr.append((marked & ~masks).sum() / (~masks).sum())
        found = [min((marked[i] & m).sum() / a, 1.0) for i, defects in enumerate(channels) for m, a in defects]
        spro.append(np.mean(found))
    fpr, spro = np.array(fpr), np.array(spro)
    end = np.interp(limit, fpr, spro)
    keep = fpr <= limit
    return np.trapezoid(np.append(spro[keep], end), np.append(fpr[keep], limit)) / limit


@pytest.mark.parametrize("seed", range(12))
def test_spro_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    levels = (3, 10, 1000)[seed % 3]
    maps = (rng.integers(-levels, levels, (4, 14, 11)) / levels).astype(np.float32)
    channels = []
    masks = np.zeros(maps.shape, bool)
    for i in range(3):  # the last image is normal
        defects = []
        for _ in range(rng.integers(1, 4)):
            top, left = rng.integers(0, 8, 2)
            mask = np.zeros(maps.shape[1:], bool)
            mask[top : top + rng.integers(1, 6), left : left + rng.integers(1, 4)] = True
            defects.append((mask, float(rng.choice([0.3, 1, 2.5, mask.sum() / 2, mask.sum()]))))
            masks[i] |= mask
        channels.append(defects)
    channels.append([])
    maps[masks] += np.float32(rng.choice([0, 0.5]))
    found = pixel_metrics(maps, masks, channels=channels)
    for name, limit in (("pixel_spro", 0.05), ("pixel_spro@0.3", 0.3)):
        assert found[name] == pytest.approx(literal(maps, masks, channels, limit), abs=1e-12)
    without = pixel_metrics(maps, masks)
    assert {name: found[name] for name in without} == dict(without)


def test_saturated_at_the_whole_area_is_pro():
    rng = np.random.default_rng(1)
    maps = rng.random((3, 20, 20)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[0, 2:9, 3:7] = masks[1, 10:15, 10:12] = True
    whole = [[(mask, float(mask.sum()))] if mask.any() else [] for mask in masks]
    found = pixel_metrics(maps, masks, channels=whole)
    assert found["pixel_spro@0.3"] == pytest.approx(found["pixel_aupro"], abs=1e-12)


def test_evaluate_adds_spro_and_shards_agree(index):
    method = create("self_distance", image_size=64)
    evaluation = evaluate(method, index, progress=False, workers=0)
    table = evaluation.per_class
    assert {"pixel_spro", "pixel_spro@0.3", "pixel_aupro"} <= set(table) and table["pixel_spro"].between(0, 1).all()
    # the mean over images of one size, from maps and channels of the same size
    channels = Channels(index, (64, 64))
    part = index[(index["category"] == "pushpins") & (index["split"] == "test")].sort_values("image")
    part.attrs = dict(index.attrs)
    from zsad_nb.data.method_images import batches_for

    batch = next(iter(batches_for(method, part, 64, len(part))))
    maps = method.predict(batch).map.cpu().numpy()
    defects = [channels.of(path) for path in batch.path]
    want = literal(maps, batch.mask[:, 0].numpy(), defects, 0.05)
    assert table.loc["pushpins", "pixel_spro"] == pytest.approx(want, abs=1e-6)
    # one kind of anomaly, as the paper reports
    logical = index[index["defect"].isin(["good", "logical_anomalies"])]
    kind = evaluate(method, logical, progress=False, workers=0).per_class
    assert kind.loc["pushpins", "anomalous"] == 2 and kind.loc["pushpins", "pixel_spro"] != want
    sharded = evaluate_shards(method, index, shards=2, processes=1, progress=False, executor=_Here())
    assert sharded.per_class.drop(columns="pixel_aupro_200").equals(table.drop(columns="pixel_aupro_200"))


class _Here:
    "An executor that computes at once."

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*args))
        return future


def test_a_set_without_the_list_has_no_spro(index, tmp_path):
    for category in ("pushpins", "screw_bag"):
        (tmp_path / "loco" / category / CONFIG).unlink()
    assert not Channels(index).known
    (tmp_path / "loco" / "pushpins" / CONFIG).write_text(json.dumps(KINDS))
    channels = Channels(index)
    assert channels.known
    with pytest.raises(BadImage, match="no defects_config.json says"):
        channels.of("screw_bag/test/logical_anomalies/000.png")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be a list of defects"),
        ('{"a": 1}', "must be a list of defects"),
        ("[7]", "entry 0 is 7; it must be an object with defect_name"),
        (json.dumps([KINDS[0] | dict(pixel_value=256)]), "pixel_value is 256"),
        (json.dumps([KINDS[0] | dict(pixel_value=True)]), "pixel_value is True"),
        (json.dumps([KINDS[0] | dict(saturation_threshold="40")]), "saturation_threshold is '40'"),
        (json.dumps([KINDS[0] | dict(saturation_threshold=0)]), "saturation_threshold is 0"),
        (json.dumps([KINDS[1] | dict(saturation_threshold=1.5)]), "at most 1"),
        (json.dumps([KINDS[0], KINDS[0]]), "pixel_value 255 belongs to additional, too"),
    ],
)
def test_a_damaged_list_is_named(tmp_path, content, message):
    path = tmp_path / CONFIG
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_saturation(path)
    assert CONFIG in str(error.value)


def test_masks_that_the_list_does_not_know(index, tmp_path):
    image = "pushpins/test/logical_anomalies/000.png"
    place = tmp_path / "loco/pushpins/ground_truth/logical_anomalies/000/000.png"
    for pixels, message in (
        (np.full((64, 96), 9, np.uint8), "it marks the values 9"),
        (np.zeros((64, 96), np.uint8), "it marks nothing"),
        (np.eye(64, 96, dtype=np.uint8) * 255 + np.eye(64, 96, 3, dtype=np.uint8) * 254, "the values 254, 255"),
    ):
        _write(place, pixels)
        with pytest.raises(BadImage, match=message):
            Channels(index).of(image)


def test_a_changed_shard_is_refused(tmp_path):
    with PixelMetrics() as metrics:
        mask = np.zeros((1, 6, 6), bool)
        mask[0, 1:3, 1:3] = True
        metrics.update(np.random.default_rng(0).random((1, 6, 6)), mask, channels=[[(mask[0], 2.0)]])
        path = metrics.save(tmp_path / "shard")
        with PixelMetrics.load(path) as loaded:
            assert loaded.compute() == metrics.compute()
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match="cut short or too long"):
        PixelMetrics.load(path)
    path.write_bytes(data.replace(b'"vanished": 0', b'"vanished": x'))
    with pytest.raises(ValueError):
        PixelMetrics.load(path)


def test_spro_stands_in_tables_with_its_size(index, tmp_path):
    "Named like the other metrics; a set without saturation areas has a gap with its reason, and nobody is warned."
    method = create("self_distance", image_size=64)
    plain = index.copy()
    plain.attrs = dict(index.attrs)
    for name, rows in (("mvtec_loco", index), ("other", plain)):
        if name == "other":
            for category in ("pushpins", "screw_bag"):
                (tmp_path / "loco" / category / CONFIG).unlink()
        evaluation = evaluate(method, rows, progress=False, workers=0)
        folder = tmp_path / "runs" / name
        evaluation.save(folder)
        result = dict(notebook="evaluate", method="self_distance", data=name, seed=0, size=64, trained_on=[])
        write_json(folder / "result.json", result | dict(evaluation.mean.dropna()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = read_runs(tmp_path / "runs")
        table = results_table(runs, ["pixel_aupro", "pixel_spro", "pixel_spro@0.3"])
        figure_of = bar_figure(results_table(runs, ["pixel_aupro", "pixel_spro"], data="mvtec_loco"), row="mvtec_loco")
    text = table.markdown()
    loco = runs[(runs["data"] == "mvtec_loco") & (runs["category"] == "mean")].iloc[0]
    assert f"{100 * loco['pixel_spro']:.1f} / {100 * loco['pixel_spro@0.3']:.1f}" in text and figure_of is not None
    assert "sPRO: up to a false positive rate of 0.05; sPRO (FPR up to 0.3): up to a false positive rate of 0.3" in text
    assert "the evaluation's size (64 px)" in text
    assert "sPRO, sPRO (FPR up to 0.3) is undefined on other (no saturation areas)" in text
