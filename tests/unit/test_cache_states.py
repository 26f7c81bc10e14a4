"Whatever state a cache of features is in, the training has the same bits; and a cache deletes, trusts and needs nothing but its own."

import copy
import errno
import functools
import os
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from small_sets import bright_squares

from zsad_nb.backbones import features as module
from zsad_nb.backbones.features import MARK, FeatureCache, entry_hash, one_by_one
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.methods.base import create
from zsad_nb.methods.base import save as save_method
from zsad_nb.training.fit import fit, recipe_of

SIZE = 32
KEY = dict(tower="toy")


def batch_of(image: torch.Tensor) -> Batch:
    n = len(image)
    return Batch(
        image,
        torch.zeros(n, 1, *image.shape[2:], dtype=torch.bool),
        torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.long),
        ["x"] * n,
        ["x"] * n,
        torch.ones(n, dtype=torch.bool),
    )


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def encode(batch) -> dict:
    return dict(cls=batch.image.mean((2, 3)), patches=batch.image.flatten(1)[:, :1000])


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# --------------------------------------------------------------------------------------------------------------- the same bits in any state


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    return bright_squares(tmp_path_factory.mktemp("states"), 7, defect="spot")


@functools.cache
def made(name: str):
    seed_everything(0)
    return create(name, image_size=SIZE)


def train(name: str, index, cache, workers: int = 0) -> dict:
    "Batches of 3, 3 and 1, two epochs: what was learned, and the losses."
    method = copy.deepcopy(made(name))
    history = fit(
        method,
        index,
        recipe_of(method, epochs=2, batch_size=3, augment="none"),
        progress=False,
        cache=cache,
        workers=workers,
    )
    return {n: p.detach().clone() for n, p in method.learned().items()} | dict(
        losses=torch.tensor(history["total"].to_numpy())
    )


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def one_missing(folder):
    entries(folder)[3].unlink()


def half_missing(folder):
    [f.unlink() for f in entries(folder)[::2]]


def one_cut(folder):
    entries(folder)[2].write_bytes(entries(folder)[2].read_bytes()[:-9])


def two_swapped(folder):
    a, b = entries(folder)[:2]
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def one_renamed(folder):
    a, b = entries(folder)[:2]
    os.replace(a, b)


def a_bit(folder):
    data = bytearray(entries(folder)[4].read_bytes())
    data[-5] ^= 8
    entries(folder)[4].write_bytes(data)


def not_finite(folder):
    forge(entries(folder)[1], lambda row: {n: t * float("nan") for n, t in row.items()})


def another_shape(folder):
    forge(entries(folder)[1], lambda row: {n: t[..., :-1].contiguous() for n, t in row.items()}, honest=False)


def another_type(folder):
    forge(entries(folder)[1], lambda row: {n: t.double() for n, t in row.items()}, honest=False)


def without_note(folder):
    next(folder.rglob("key.json")).unlink()


def forge(file: Path, change, honest: bool = True):
    "Another content, with or without the hash that it should have."
    header = dict(mark=MARK, sha256=entry_hash(load_file(file), file))
    row = change(load_file(file))
    file.write_bytes(save(row, dict(header, sha256=entry_hash(row, file)) if honest else header))


STATES = [
    one_missing,
    half_missing,
    one_cut,
    two_swapped,
    one_renamed,
    a_bit,
    not_finite,
    another_shape,
    another_type,
    without_note,
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_bits_in_every_state(dtype, index, tmp_path):
    "Empty, full, and every way in which a kill, an eviction, a disk or a person may leave it."
    first = train("dma_sap", index, FeatureCache(tmp_path, dtype))
    assert same(first, train("dma_sap", index, FeatureCache(tmp_path, dtype))), "full"
    for state in STATES if dtype == "float32" else (half_missing, a_bit):
        state(tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert same(first, train("dma_sap", index, FeatureCache(tmp_path, dtype), workers=2)), state.__name__
        told = [str(w.message) for w in caught if "are damaged" in str(w.message)]
        assert len(told) == (state not in (one_missing, half_missing, without_note)), (
            f"{state.__name__}: one warning for what is damaged, none for what is not there: {told}"
        )
    small = FeatureCache(tmp_path / "small", dtype, limit_gb=3.5 * entries(tmp_path)[0].stat().st_size / 1e9)
    assert same(first, train("dma_sap", index, small)) and small.counts["evicted"] > 0, (
        "most of it is evicted meanwhile"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssvp", "anomalyclip", "crane", "multiads", "adaclip", "april_gan", "bayes_pfl"])
def test_every_method_that_keeps_features(name, index, tmp_path):
    first = train(name, index, tmp_path)
    half_missing(tmp_path)
    assert same(first, train(name, index, tmp_path))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "unaligned"])
def test_alone_means_alone(layout):
    "The same call for an image, whatever its batch was and however that lay in memory."
    seen = []
    x = images(5)
    tower = torch.nn.Conv2d(3, 8, 4, 4)

    def look(batch):
        seen.append(
            (tuple(batch.image.shape), batch.image.stride(), batch.image.storage_offset(), batch.image.data_ptr() % 64)
        )
        return dict(x=tower(batch.image).flatten(1) @ torch.ones(288, 3))

    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "expanded":
        x = x[:1].expand(5, -1, -1, -1)
    if layout == "unaligned":
        x = torch.cat([torch.zeros(1), x.flatten()])[1:].view(5, 3, 24, 24)
    with torch.no_grad():
        whole = one_by_one(look)(batch_of(x))
        part = one_by_one(look)(batch_of(x[[3, 1]].clone()))
    assert torch.equal(whole["x"][[3, 1]], part["x"]) and len(set(seen)) == 1
    with pytest.raises(ValueError, match="one row for one image"):
        one_by_one(lambda b: dict(x=torch.rand(2, 3)))(batch_of(x))


@pytest.mark.parametrize("change", ["threads", "processor", "torch", "code", "float64 images", "precision", "key"])
def test_what_else_decides_the_bits_is_in_the_key(change, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    batch = batch_of(images(2))
    key = KEY
    cache(KEY, batch, encode)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    if change == "processor":
        monkeypatch.setattr("zsad_nb.core.settings.processor", lambda: "another")
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    if change == "code":
        monkeypatch.setattr(module, "code_hash", lambda *rooms: "other")
    if change == "float64 images":
        batch = batch_of(batch.image.double())
    if change == "precision":
        cache = cache.view(precision="bf16")
    if change == "key":
        key = dict(tower="another")
    cache(key, batch, encode)
    assert (cache.hits, cache.misses) == (0, 4)


def test_a_key_that_says_too_little(tmp_path):
    "Two methods with one key: an error that says so, not a confusion of tensors."
    cache = FeatureCache(tmp_path)
    x = images(2)
    cache(KEY, batch_of(x[:1]), encode)
    with pytest.raises(ValueError, match="must hold all that encode depends on"):
        cache(KEY, batch_of(x), lambda b: dict(cls=torch.zeros(len(b), 99)))


# ---------------------------------------------------------------------------------------------------------------- only what it wrote itself


def fill(folder: Path, **options) -> FeatureCache:
    "Far more than the limit."
    cache = FeatureCache(folder, **options)
    for i in range(12):
        cache(KEY, batch_of(images(1, i)), encode)
    return cache


def test_the_limit_spares_what_is_not_its_own(tmp_path):
    "Checkpoints, links, foreign files and folders, wherever they lie, older than every entry."
    FeatureCache(tmp_path)(KEY, batch_of(images(1, 99)), encode)
    own = entries(tmp_path)[0].parent
    size = entries(tmp_path)[0].stat().st_size
    outside = tmp_path.parent / f"{tmp_path.name} outside"
    outside.mkdir()
    checkpoint = save_method(create("visualad", image_size=32), tmp_path / "runs" / "checkpoint.safetensors")
    named_alike = "0123456789abcdef0123.safetensors"
    spared = [
        checkpoint,
        *(
            folder / named_alike
            for folder in (
                tmp_path,
                own,
                outside,
                tmp_path / "0123456789abcdef-float32",
                tmp_path / "ffffffffffffffff-float16",
            )
        ),
    ]
    for file in spared[1:]:
        file.parent.mkdir(exist_ok=True)
        save_file(dict(a=torch.zeros(5000)), file)
    (tmp_path / "ffffffffffffffff-float16" / "key.json").write_text('{"somebody": "else"}')
    spared.append(own / "notes.safetensors")
    spared.append(own / "old.tmp")
    for file in spared[-2:]:
        file.write_bytes(b"mine" * 3000)
    links = [own / "aaaaaaaaaaaaaaaaaaaa.safetensors", tmp_path / "bbbbbbbbbbbbbbbb-float32"]
    links[0].symlink_to(checkpoint)
    links[1].symlink_to(outside)
    rest = own / f".{'c' * 20}.safetensors.0a1b2c3d.tmp"
    rest.write_bytes(b"half")
    for file in (*spared, rest):
        os.utime(file, (time.time() - 9e5,) * 2)
    cache = fill(tmp_path, limit_gb=4.5 * size / 1e9)
    assert all(f.exists() for f in spared) and all(f.is_symlink() and f.exists() for f in links)
    assert not rest.exists(), "what a killed process left half-written is its own"
    assert cache.counts["evicted"] >= 8 and sum(f.parent == own for f in entries(tmp_path)) - 3 <= 5


def test_a_link_in_the_place_of_an_entry(tmp_path):
    "It is not followed, neither to read nor to write."
    cache = FeatureCache(tmp_path / "cache")
    batch = batch_of(images(1))
    want = cache(KEY, batch, encode)
    entry = entries(tmp_path)[0]
    victim = tmp_path / "checkpoint.safetensors"
    os.replace(entry, victim)
    before = victim.read_bytes()
    entry.symlink_to(victim)
    with pytest.warns(UserWarning, match="not a regular file"):
        found = cache(KEY, batch, encode)
    assert torch.equal(found["cls"], want["cls"]) and entry.is_symlink() and victim.read_bytes() == before
    entry.unlink()
    os.replace(entry.parent, tmp_path / "elsewhere")
    entry.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="cannot be kept in"):
        FeatureCache(tmp_path / "cache")(KEY, batch, encode)
    assert not entries(tmp_path / "elsewhere")


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    cache = FeatureCache(tmp_path)
    batch = batch_of(images(2))

    def broken(b):
        return dict(x=torch.tensor([[1.0], [float("inf")]])[: len(b)])

    with pytest.warns(UserWarning, match="NaN or infinity: they are not kept"):
        found = cache(KEY, batch, broken)
    assert len(entries(tmp_path)) == 1 and found["x"].isinf().sum() == 1


# ------------------------------------------------------------------------------------------------------------------ folders that refuse

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOENT]


@pytest.mark.parametrize("number", ERRORS, ids=lambda n: errno.errorcode[n])
def test_a_disk_that_refuses_costs_one_warning(number, tmp_path, monkeypatch):
    def refuse(path, write):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "write_atomically", refuse)
    cache = FeatureCache(tmp_path)
    batch = batch_of(images(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [cache(KEY, batch, encode) for _ in range(3)]
    caught = [w for w in caught if not issubclass(w.category, ResourceWarning)]  # of files that other tests left open
    assert [os.strerror(number) in str(w.message) and str(tmp_path) in str(w.message) for w in caught] == [True]
    assert all(torch.equal(f["cls"], batch.image.mean((2, 3))) for f in found) and (cache.hits, cache.misses) == (0, 6)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(index, tmp_path, permissions_hold):
    "Read-only: what is there is used, what is not costs time; the training has the same bits."
    first = train("dma_sap", index, tmp_path / "cache")
    entries(tmp_path)[0].unlink()
    folders = [tmp_path / "cache", *(p for p in (tmp_path / "cache").iterdir())]
    for f in folders:
        f.chmod(0o555)
    try:
        with pytest.warns(UserWarning, match="Permission denied") as caught:
            again = train("dma_sap", index, tmp_path / "cache")
    finally:
        for f in folders:
            f.chmod(0o755)
    assert same(first, again) and len(caught) == 1
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert same(first, train("dma_sap", index, tmp_path / "file"))


def test_no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FeatureCache("~/kept").folder == tmp_path / "kept"

    def none(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", none)
    with pytest.raises(ValueError, match="no home folder .* or set HOME"):
        FeatureCache("~/kept")
