"Evidence: every method alike, batch mates, order, caches, checkpoints, reference files, and input that is meant to harm."

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from zsad_nb.backbones.features import FeatureCache
from zsad_nb.backbones.weights import WeightsError
from zsad_nb.components.evidence import RULES, Moments, distance_to_rows, fused, own_sources
from zsad_nb.components.judging import Auxiliary
from zsad_nb.components.references import Seen, odd_ones, remember, scores_without_itself
from zsad_nb.data.images import Batch
from zsad_nb.evaluation.evaluate import evaluate
from zsad_nb.inspection.inspector import Inspector
from zsad_nb.inspection.sources import identity
from zsad_nb.methods.base import MODULES, Method, Prediction, create, load, read_header, save
from zsad_nb.methods.evidence import (
    choose_references,
    kept_out,
    load_references,
    measure,
    references_of,
    remembering,
    save_references,
    split_held_out,
)
from zsad_nb.runs.shards import evaluate_shards
from zsad_nb.synthetic.benchmark import render, synthetic_index
from zsad_nb.training.fit import fit, recipe_of

SIZE = 96
# compared with each other by other test images, which a single batch does not have
JUDGED = [name for name in MODULES if name != "mutual"]


def images(count: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    "Smooth random pictures: patches that differ, as those of photographs do."
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


def batch_of(image: torch.Tensor) -> Batch:
    count = len(image)
    no = torch.zeros(count, dtype=torch.bool)
    mask = torch.zeros(count, 1, *image.shape[-2:], dtype=torch.bool)
    return Batch(image, mask, no, no.long(), ["wood"] * count, [f"{i}.png" for i in range(count)], ~no)


@pytest.fixture(scope="module")
def made():
    "Every method once, with what it needs to judge by itself."
    kept: dict[str, Method] = {}

    def get(name: str) -> Method:
        if name not in kept:
            torch.manual_seed(0)
            method = kept[name] = create(name, image_size=SIZE)
            role, tower, tap = method.compared_tower()
            scales = dict(Z=Moments(0.5, 0.1), S_m=Moments(0.1, 0.05), S_1=Moments(0.05, 0.02))
            method.auxiliary = Auxiliary(role, tap, (SIZE // tower.patch,) * 2, 9, scales, {"a": 0.1})
        return kept[name].use_evidence("method")

    return get


@pytest.fixture(scope="module")
def auxiliary(tmp_path_factory):
    return synthetic_index(tmp_path_factory.mktemp("auxiliary"), "auxiliary", SIZE, 3, 2)


@pytest.mark.parametrize("name", JUDGED)
def test_what_is_overheard_is_what_an_own_pass_sees(made, name):
    method = made(name).eval()
    batch = batch_of(images(2))
    with torch.inference_mode():
        _, Z, patches = method.compared(batch)
        torch.testing.assert_close(patches, method.own_patches(batch), atol=1e-4, rtol=1e-4)
    side = (SIZE // method.compared_tower()[1].patch,) * 2
    assert Z.shape == (2, *side)
    assert patches.shape[:2] == (2, side[0] * side[1])


@pytest.mark.parametrize("name", JUDGED)
def test_every_method_judges_by_evidence_and_goes_back_to_the_last_bit(made, name):
    method = made(name)
    batch = batch_of(images(3))
    own = method.predict(batch)
    alone = method.use_evidence("self").predict(batch)
    memory = references_of(method, images(3, seed=7))
    few = method.use_evidence("self", memory).predict(batch)
    control = method.use_evidence("memory", memory).predict(batch)
    for prediction in (alone, few, control):
        assert prediction.map.shape == own.map.shape
        assert prediction.score.shape == own.score.shape
        assert torch.isfinite(prediction.map).all() and torch.isfinite(prediction.score).all()
        assert not torch.equal(prediction.map, own.map)
    again = method.use_evidence("method").predict(batch)
    if name != "anovl":  # its adapter begins at random for every image
        assert torch.equal(again.map, own.map) and torch.equal(again.score, own.score)


@pytest.mark.parametrize("name", JUDGED)
def test_batch_mates_and_the_order_of_references_change_nothing(made, name):
    method = made(name)
    batch = batch_of(images(4))
    good = images(3, seed=7)
    own = method.predict(batch).map
    # what the method's own map moves by, of which the rule makes standard deviations
    moved = max((method.predict(batch[[i]]).map[0] - own[i]).abs().max().item() for i in range(4))
    for references in (None, references_of(method, good)):
        whole = method.use_evidence("self", references).predict(batch)
        limit = 1e-6 * max(1.0, whole.map.abs().max().item()) + moved / method.judge().calibration("wood")["Z"].std
        for i in range(4):
            one = method.predict(batch[[i]])
            assert (one.map[0] - whole.map[i]).abs().max() <= limit
            assert (one.score[0] - whole.score[i]).abs() <= limit
    turned = method.use_evidence("self", references_of(method, good[[2, 0, 1]])).predict(batch)
    if name != "anovl":  # its adapter begins at random for every image
        assert torch.equal(turned.map, whole.map) and torch.equal(turned.score, whole.score)


def test_memory_of_an_index_is_that_of_its_images_in_any_order_and_batch(made, tmp_path):
    method = made("visualad")
    index = synthetic_index(tmp_path, "target", SIZE, 2, 2, train_normal=5)
    index = choose_references(index[index.category == "wood"], 5)
    first = references_of(method, index)["wood"]
    backwards = index.iloc[::-1].reset_index(drop=True)
    backwards.attrs = dict(index.attrs)
    second = references_of(method, backwards, batch_size=2)["wood"]
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.between, second.between)
    assert first.moments() == second.moments()


def test_given_the_patches_batch_mates_change_no_bit():
    x = torch.randn(4, 36, 16)
    rows = torch.nn.functional.normalize(torch.randn(50, 16), dim=-1)
    for i in range(4):
        for name, values in own_sources(x, (6, 6)).items():
            assert torch.equal(own_sources(x[i : i + 1], (6, 6))[name][0], values[i])
        assert torch.equal(distance_to_rows(x[i : i + 1], rows)[0], distance_to_rows(x, rows)[i])


@pytest.mark.parametrize("name", ["winclip", "visualad"])
def test_a_cache_changes_nothing(made, name, tmp_path):
    method = made(name).use_evidence("self")
    batch = batch_of(images(2))
    without = method.predict(batch)
    cache = FeatureCache(tmp_path)
    for _ in range(2):  # written, then read
        with_cache = method.predict(replace(batch, path=["0.png", "1.png"]), cache)
        assert (with_cache.map - without.map).abs().max() <= 1e-4 * without.map.abs().max()


def test_an_image_may_be_uniform(made):
    method = made("visualad")
    method.use_evidence("self", references_of(method, images(3, seed=7)))
    for value in (0.0, 0.5, 1.0):
        prediction = method.predict(batch_of(torch.full((1, 3, SIZE, SIZE), value)))
        assert torch.isfinite(prediction.map).all() and torch.isfinite(prediction.score).all()


def test_copies_of_an_image_count_once(made):
    method = made("visualad")
    one = images(1, seed=7)
    with pytest.warns(UserWarning, match="2 of 3 reference images are copies"):
        memory = references_of(method, torch.cat([one, one, one]))[""]
    assert len(memory) == 1
    assert memory.moments()["R"] == memory.moments()["S_1"]


def test_references_of_another_size_are_resized_as_the_tower_does(made):
    method = made("self_distance")
    memory = references_of(method, images(2, seed=7, size=200))
    prediction = method.use_evidence("self", memory).predict(batch_of(images(1, size=130)))
    assert prediction.map.shape == (1, 130, 130)
    assert torch.isfinite(prediction.map).all()


def test_what_is_missing_is_said():
    method = create("visualad", image_size=SIZE, evidence="self")
    batch = batch_of(images(1))
    with pytest.raises(ValueError, match=r"measure\(method, INDEX\)"):
        method.predict(batch)
    method.use_evidence("self", references_of(method, images(2)))
    with pytest.raises(ValueError, match="was never measured"):  # a method that learns needs its floor
        method.predict(batch)
    free = create("self_distance", image_size=SIZE)  # one without training does not
    free.use_evidence("self", references_of(free, images(2))).predict(batch)
    with pytest.raises(ValueError, match="normal auxiliary images"):
        free.use_evidence("self").predict(batch)
    for wrong, words in (
        (dict(evidence="both"), "use method, self or memory"),
        (dict(evidence="memory"), "give references"),
        (dict(evidence="self", tower="dino"), "its image towers are backbone"),
        (dict(evidence="self", tap=99), "outside 1.."),
    ):
        with pytest.raises(ValueError, match=words):
            method.use_evidence(**wrong)
    with pytest.raises(ValueError, match="without references"):
        free.use_evidence("method", references_of(free, images(2)))
    with pytest.raises(ValueError, match="at least 6 x 6 patches"):
        small = create("self_distance", image_size=64)
        references_of(small, images(2, size=64))


def test_a_method_without_an_image_tower_says_so():
    class Bare(Method):
        name = "bare"

        def forward(self, features, batch):
            return Prediction(batch.image[:, 0], batch.image[:, 0].amax((1, 2)))

    bare = Bare(create("self_distance", image_size=SIZE).p)
    with pytest.raises(ValueError, match="it has no image tower"):
        bare.use_evidence("self")


def test_fit_measures_on_images_that_it_does_not_train_on(auxiliary, tmp_path):
    recipe = recipe_of("visualad", epochs=1, batch_size=4)
    small = auxiliary[auxiliary.category.isin(sorted(set(auxiliary.category))[:2])].reset_index(drop=True)
    plain, judged = (create("visualad", image_size=SIZE) for _ in range(2))
    history = fit(plain, small, recipe, progress=False)
    assert plain.auxiliary is None
    assert len(history) == -(-len(small) // 4)
    rest, kept = split_held_out(small)
    history = fit(judged.use_evidence("self"), small, recipe, progress=False)
    assert len(history) == -(-len(rest) // 4)
    assert judged.auxiliary.images == len(kept)
    assert judged.auxiliary == measure(judged, kept)
    file = tmp_path / "judged.safetensors"
    save(judged, file)
    assert load(file).auxiliary == judged.auxiliary
    assert "evidence" in read_header(file)
    batch = batch_of(images(2))
    again = load(file, evidence="self").predict(batch)
    assert torch.equal(again.map, judged.predict(batch).map)


def test_an_image_is_not_trained_on_and_held_out(auxiliary):
    method = create("visualad", image_size=SIZE)
    with pytest.raises(ValueError, match="to be trained on and held out at once"):
        kept_out(method, auxiliary, auxiliary[~auxiliary.anomalous])
    with pytest.raises(ValueError, match="none of the .* images is normal"):
        measure(method, auxiliary[auxiliary.anomalous])
    for share in (0, 1, -0.5, 2):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_held_out(auxiliary, share)


def test_a_header_with_odd_facts_is_refused(tmp_path):
    method = create("visualad", image_size=SIZE)
    scales = dict(Z=Moments(0.5, 0.1), S_m=Moments(0.1, 0.05), S_1=Moments(0.05, 0.02))
    method.auxiliary = Auxiliary("backbone", 3, (6, 6), 9, scales, {"a": 0.1})
    file = tmp_path / "m.safetensors"
    save(method, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    facts = json.loads(head["__metadata__"]["zsad_nb"])
    odd = [
        dict(tap=True),
        dict(tap="3"),
        dict(grid=[6, -6]),
        dict(images=0),
        dict(moments=dict(Z=dict(mean=0, std=-1))),
        dict(spreads={"a": "wide"}),
        dict(tower=7),
    ]
    for change in odd:
        head["__metadata__"]["zsad_nb"] = json.dumps(facts | dict(evidence=facts["evidence"] | change))
        raw = json.dumps(head).encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
        with pytest.raises(WeightsError, match="the file was changed"):
            load(file)
    other = create("visualad", image_size=128)
    other.auxiliary = method.auxiliary
    with pytest.raises(ValueError, match="6 x 6 patches; asked for is backbone, block 3, 8 x 8"):
        other.use_evidence("self").predict(batch_of(images(1, size=128)))


def test_a_file_of_references_survives_and_damage_does_not_pass(made, tmp_path):
    method = made("visualad")
    memories = references_of(method, images(3, seed=7), category="wood")
    file = save_references(memories, tmp_path / "good.safetensors")
    back = load_references(file, method)
    assert torch.equal(back["wood"].rows, memories["wood"].rows)
    assert back["wood"].moments() == memories["wood"].moments()
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        at = int(rng.integers(len(content)))
        spoilt = bytearray(content)
        spoilt[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(spoilt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = load_references(file)
            except WeightsError:
                continue
        # a bit of a name or of the version may differ; numbers may not
        kept = next(iter(found.values()))
        assert torch.equal(kept.rows, memories["wood"].rows) and kept.moments() == memories["wood"].moments()
    for cut in (0, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(WeightsError):
            load_references(file)
    file.write_bytes(to_bytes(from_bytes(content), {}))
    with pytest.raises(WeightsError, match="no reference images"):
        load_references(file)
    save(method, file)
    with pytest.raises(WeightsError, match="no reference images"):
        load_references(file)


def test_references_belong_to_the_method_that_saw_them(made):
    method = made("visualad")
    memory = references_of(method, images(2, seed=7))
    torch.manual_seed(1)
    other = create("visualad", image_size=SIZE)
    with pytest.raises(ValueError, match="seen by another method"):
        other.use_evidence("self", memory)
    with pytest.raises(ValueError, match="seen by another method"):
        create("self_distance", image_size=SIZE).use_evidence("self", memory)


def test_another_memory_is_another_result_for_whatever_keeps_results(made):
    method = made("visualad")
    hashes = [identity(method)["hash"]]
    hashes.append(identity(method.use_evidence("self"))["hash"])
    for count in (2, 3):
        memory = references_of(method, images(count, seed=7))
        hashes.append(identity(method.use_evidence("self", memory))["hash"])
        hashes.append(identity(method.use_evidence("memory", memory))["hash"])
    assert len(set(hashes)) == len(hashes)
    assert identity(method.use_evidence("method"))["hash"] == hashes[0]


def test_remembering_leaves_the_method_as_it_was(made):
    method = made("self_distance")
    batch = batch_of(images(1))
    own = method.predict(batch)
    with remembering(method, images(2, seed=7)):
        assert not torch.equal(method.predict(batch).map, own.map)
    assert torch.equal(method.predict(batch).map, own.map)
    with pytest.raises(ValueError, match="RGB in"), remembering(method, torch.zeros(2, 4, 8, 8)):
        pass
    assert method.evidence == "method"


def test_turned_copies_find_a_turned_part(made):
    method = made("self_distance")
    good = images(1, seed=7)
    turned = batch_of(good.rot90(1, (-2, -1)))
    plain = references_of(method, good)[""]
    every = references_of(method, good, copies="turned")[""]
    with torch.inference_mode():
        patches = method.eval().own_patches(turned)
        assert every.distance(patches).max() < 1e-4 < plain.distance(patches).max()


def seen(seed: int, shift: float = 0.0) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(64, 8, generator=generator) * 0.2 + torch.linspace(-1, 1, 8)
    patches[:6] += shift * torch.randn(6, 8, generator=generator)
    return Seen(str(seed), f"{seed:05}", [patches], torch.rand(8, 8, generator=generator))


def test_good_references_are_not_called_odd_and_a_defective_one_is():
    alarms = sum(
        len(odd_ones(scores_without_itself(remember([seen(100 * r + i) for i in range(8)]), 64))) for r in range(40)
    )
    assert alarms <= 0.05 * 40 * 8
    found = 0
    for r in range(20):
        memory = remember([seen(100 * r + i) for i in range(7)] + [seen(100 * r + 50, shift=3.0)])
        found += [memory.names[i] for i in odd_ones(scores_without_itself(memory, 64))][:1] == [str(100 * r + 50)]
    assert found >= 18


@pytest.mark.parametrize("k", [9, 19])
def test_a_threshold_from_scores_without_itself_keeps_its_rate(k):
    "No image is used for both: the rate of new good images above the largest such score is the promised 1 / (k + 1)."
    rate = 1 / (k + 1)
    alarms = total = 0
    for r in range(30):
        memory = remember([seen(1000 * r + i) for i in range(k)])
        threshold = scores_without_itself(memory, 64).max()
        for i in range(20):
            new = seen(1000 * r + 500 + i)
            z = memory.moments()
            sources = own_sources(new.patches[0][None], (8, 8)) | dict(Z=new.Z[None])
            sources["R"] = memory.distance(new.patches[0][None]).unflatten(1, (8, 8))
            score = fused(RULES["references"], {n: z[n](v) for n, v in sources.items()}, 64)[1]
            alarms += bool(score.double() > threshold)
            total += 1
    spread = (rate * (1 - rate) / 30) ** 0.5  # thresholds, not images, are what varies
    assert abs(alarms / total - rate) <= 3 * spread


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "Good and dented biscuits as files."
    folder = tmp_path_factory.mktemp("parts")
    for kind, defect, seeds in (("good", None, range(100, 106)), ("ok", None, range(2)), ("bad", "dent", range(2))):
        (folder / kind).mkdir()
        for seed in seeds:
            Image.fromarray(render("biscuit", seed, SIZE, defect).image).save(folder / kind / f"{seed}.png")
    return folder


def test_an_inspector_compares_with_good_images(parts):
    method = create("self_distance", image_size=SIZE)
    plain = Inspector(method)
    few = Inspector(method, references=parts / "good")
    assert method.evidence == "method"  # the caller's stays as it was
    assert few.identity != plain.identity
    made = few.calibrate_on_references(rate=0.2)
    assert made.image[""].facts["images"] == 6
    assert "judged by the others" in made.notes[0]
    table = few.predict([parts / "bad", parts / "ok"], progress=False)
    bad = table["path"].str.contains("bad")
    assert table["score"][bad].min() > table["score"][~bad].max()
    with pytest.raises(ValueError, match="too few"):
        few.calibrate_on_references(rate=0.01)
    with pytest.raises(ValueError, match="no good images are remembered"):
        plain.calibrate_on_references()


def test_thresholds_of_other_references_are_refused(parts):
    method = create("self_distance", image_size=SIZE)
    made = Inspector(method, references=parts / "good").calibrate_on_references(rate=0.2)
    with pytest.raises(ValueError):
        Inspector(method, made)
    with pytest.raises(ValueError):
        Inspector(method, made, references=parts / "ok")
    assert Inspector(method, made, references=parts / "good").calibration is made


def test_an_image_that_is_no_good_one_is_named(parts, tmp_path):
    Image.fromarray(render("gear", 0, SIZE).image).save(tmp_path / "gear.png")  # of another product
    mixed = [*sorted((parts / "good").iterdir()), tmp_path / "gear.png"]
    with pytest.warns(UserWarning, match=r"1 of 7 good images stand out .*gear.png"):
        Inspector(create("self_distance", image_size=SIZE), references=mixed)


def test_an_inspector_takes_a_file_of_references(parts, tmp_path):
    method = create("self_distance", image_size=SIZE)
    first = Inspector(method, references=parts / "good")
    file = save_references(first.method.memories, tmp_path / "good.safetensors")
    second = Inspector(method, references=file)
    assert second.identity == first.identity
    assert second.predict(parts / "bad" / "0.png").score == first.predict(parts / "bad" / "0.png").score


def test_a_good_image_that_cannot_be_read_is_left_out_with_a_word(parts, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    method = create("self_distance", image_size=SIZE)
    with pytest.warns(UserWarning, match="1 of 3 good images could not be used"):
        Inspector(method, references=[*sorted((parts / "ok").iterdir()), tmp_path / "broken.png"])
    with pytest.raises(ValueError):
        Inspector(method, references=tmp_path / "broken.png")


def test_evaluate_refuses_references_that_are_tested(tmp_path):
    index = synthetic_index(tmp_path, "target", SIZE, 2, 2, train_normal=2)
    index = index[index.category == "wood"].reset_index(drop=True)
    method = create("self_distance", image_size=SIZE)
    own = evaluate(method, index, progress=False)
    few = evaluate(method, index, references=choose_references(index, 2), progress=False)
    assert method.evidence == "method"
    assert not own.per_image["score"].equals(few.per_image["score"])
    shards = method.use_evidence("self", references_of(method, choose_references(index, 2)))
    again = evaluate(shards, index, batch_size=1, progress=False)
    np.testing.assert_allclose(again.per_image["score"], few.per_image["score"], rtol=1e-5)
    with pytest.raises(ValueError, match="reference images are tested, too"):
        evaluate(method, index, references=index[index.split == "test"], progress=False)


@pytest.mark.parametrize("k", [0, 2])
def test_shards_judge_by_evidence_as_one_process_does(tmp_path, made, k):
    "Another division and other batch mates: the rule's scores, maps and metrics are those of `evaluate`."
    index = synthetic_index(tmp_path / "set", "target", SIZE, 2, 2, train_normal=2)
    index = index[index.category.isin(["wood", "screw"])].reset_index(drop=True)
    method = made("visualad")
    method.use_evidence("self", references_of(method, choose_references(index, k)) if k else None)
    whole = evaluate(method, index, batch_size=4, maps="float32", map_folder=tmp_path / "whole", progress=False)
    with ThreadPoolExecutor(1) as pool:
        how = dict(executor=pool, batch_size=1, maps="float32", map_folder=tmp_path / "shards", progress=False)
        divided = evaluate_shards(method, index, 3, **how)
    assert divided.per_image["image"].tolist() == whole.per_image["image"].tolist()
    scores = whole.per_image["score"].to_numpy()
    np.testing.assert_allclose(divided.per_image["score"], scores, rtol=1e-6, atol=1e-6)
    for metric, value in whole.mean.items():
        assert divided.mean[metric] == pytest.approx(value, abs=1e-6, nan_ok=True), metric
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.tif*"))
    assert len(files) == len(whole.per_image)
    for file in files:
        one, other = (np.asarray(Image.open(tmp_path / place / file)) for place in ("whole", "shards"))
        assert np.abs(one - other).max() <= 1e-6 * max(1.0, np.abs(one).max()), file


def test_the_upload_page_remembers_what_is_good(parts):
    pytest.importorskip("ipywidgets")
    from zsad_nb.explore.upload import Upload

    page = Upload(create("self_distance", image_size=SIZE))
    for name in ("100.png", "101.png"):
        page.zone.name, page.zone.data = name, (parts / "good" / name).read_bytes()
        page.open_file(name, page.zone.data)
        page.remember_this()
    assert "2 good images" in page.kept.value
    assert page.inspector.method.evidence == "self"
    page.forget_good()
    assert page.inspector.method.evidence == "method"
    assert "none so far" in page.kept.value


@pytest.mark.parametrize("size", [1, 6, 16, 40])
def test_more_images_than_are_kept_whole_leave_a_coreset(size):
    memory = remember([seen(i) for i in range(6)], most=size)
    assert len(memory.rows) == min(6, size) * 64
    assert len(memory) == 6
    assert all(np.isfinite([m.mean, m.std]).all() for m in memory.moments().values())
