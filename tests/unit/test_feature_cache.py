"Frozen features on disk: a second epoch runs no backbone, whatever happens to the files, the processes and the disk."

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from small_sets import bright_squares

from zsad_nb.backbones import features as module
from zsad_nb.backbones.features import FeatureCache, image_keys
from zsad_nb.core.settings import seed_everything
from zsad_nb.data.images import Batch
from zsad_nb.methods.base import create
from zsad_nb.training.fit import fit, recipe_of

SIZE = 64
KEY = dict(tower="toy", taps=(1, 2))
TOWERS = dict(clip_weights="random:0", dino_weights="random:0", image_size=SIZE)


def batch_of(image: torch.Tensor, path=None) -> Batch:
    n = len(image)
    return Batch(
        image,
        torch.zeros(n, 1, *image.shape[2:], dtype=torch.bool),
        torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.long),
        ["x"] * n,
        path or ["x"] * n,
        torch.ones(n, dtype=torch.bool),
    )


class Toy:
    "An encoder that counts the images it sees; 4 kB an image in float32."

    def __init__(self):
        self.seen = 0

    def __call__(self, batch):
        self.seen += len(batch)
        return dict(
            cls=batch.image.mean((2, 3)),
            patches=batch.image.flatten(1)[:, :1000].view(len(batch), 10, 100) * 3,
            number=torch.arange(len(batch)),
        )


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> pd.DataFrame:
    return bright_squares(tmp_path_factory.mktemp("toy"), 6, size=80, defect="spot", category="noise")


# ---------------------------------------------------------------------------------------------------------------------------- training


def train(name: str, index, cache, epochs: int = 3):
    "Train; also the number of images that each tower saw."
    seed_everything(0)
    method = create(name, **TOWERS)
    seen = dict(clip=0, dino=0)

    def count(role):
        return lambda m, args, kwargs=None: seen.__setitem__(role, seen[role] + len(args[0]))

    conv = dict(
        clip=method.clip.tower.conv1, dino=method.dino._conv(method.dino.tower)
    )  # whatever way a tower is run, its patches are embedded once
    handles = [conv[role].register_forward_pre_hook(count(role)) for role in conv]
    history = fit(method, index, recipe_of(name, epochs=epochs, batch_size=4), progress=False, cache=cache)
    for h in handles:
        h.remove()
    return history, seen, method


class InMemory(FeatureCache):
    "What a perfect cache would do: every image's features as they were computed first."

    def __call__(self, key, batch, encode):
        first = vars(self).setdefault("first", {})
        new = [i for i, k in enumerate(image_keys(batch.image)) if k not in first]
        if new:
            made = encode(batch if len(new) == len(batch) else batch[new])
            first |= {
                image_keys(batch.image[i : i + 1])[0]: {n: t[j] for n, t in made.items()} for j, i in enumerate(new)
            }
        rows = [first[k] for k in image_keys(batch.image)]
        return {n: torch.stack([r[n] for r in rows]) for n in rows[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dma_sap", "ssvp"])
def test_a_second_epoch_runs_no_backbone(name, index, tmp_path):
    plain, seen, _ = train(name, index, None)
    assert seen == dict(clip=18, dino=18), "without a cache every epoch runs both towers"
    cold, seen, _ = train(name, index, FeatureCache(tmp_path / "full"))
    assert seen == dict(clip=6, dino=6), "with one, the first alone"
    assert [(e["hits"], e["misses"]) for e in cold.attrs["epochs"]] == [(0, 6), (6, 0), (6, 0)] and all(
        e["seconds"] > 0 and e["steps"] == 2 for e in cold.attrs["epochs"]
    )
    warm, seen, _ = train(name, index, tmp_path / "full")
    assert seen == dict(clip=0, dino=0) and sum(e["misses"] for e in warm.attrs["epochs"]) == 0, (
        "the next training finds everything"
    )
    columns = [c for c in plain.columns if c != "seconds"]
    memory, _, _ = train(name, index, InMemory(tmp_path))
    assert cold[columns].equals(memory[columns]) and warm[columns].equals(memory[columns]), "float32 keeps every bit"
    pd.testing.assert_frame_equal(
        cold[columns][:1], plain[columns][:1], rtol=1e-5
    )  # without a cache a batch is encoded in one call, which rounds differently
    half, seen, _ = train(name, index, FeatureCache(tmp_path / "half", "float16"))
    assert seen == dict(clip=6, dino=6)
    for other, limit in ((cold, 1e-5), (half, 1e-3)):
        error = ((other["total"] - plain["total"]) / plain["total"]).abs().max()
        print(f"{name}: loss with the cache differs by {error:.1e} (limit {limit:g})")
        assert error < limit
    sizes = [sum(f.stat().st_size for f in entries(tmp_path / d)) for d in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_pixels_decide(tmp_path):
    "Not the file's name, nor when it was written: an image that was replaced under the same path, size and time is another image."
    cache = FeatureCache(tmp_path / "cache")
    encode = Toy()
    old = images(1, 0)
    new = images(1, 1)
    for image in (old, new, old):
        found = cache(KEY, batch_of(image, ["a.png"]), encode)
        assert torch.equal(found["cls"], image.mean((2, 3)))
    assert encode.seen == 2 and (cache.hits, cache.misses) == (1, 2)
    cache(KEY, batch_of(new, ["elsewhere.png"]), encode)
    assert encode.seen == 2


def test_views_share_what_they_found(tmp_path):
    cache = FeatureCache(tmp_path)
    encode = Toy()
    view = cache.view(precision="bf16")
    for c in (cache, view, view):
        c(KEY, batch_of(images(3)), encode)
    assert (cache.hits, cache.misses, view.hits, view.misses) == (
        3,
        6,
        3,
        6,
    ) and encode.seen == 6, "features of another precision are other features"


def test_half_precision_keeps_what_it_cannot_hold(tmp_path):
    large = torch.tensor([[1.0, 1e5], [1.0, 2.0]])
    image = batch_of(images(2))
    cache = FeatureCache(tmp_path, "float16")
    for _ in range(2):
        found = cache(KEY, image, lambda b: dict(x=large))
    assert torch.equal(found["x"], large) and cache.hits == 2


# ------------------------------------------------------------------------------------------------------------------------------ damage


def foreign(file: Path):
    save_file(dict(cls=torch.zeros(3)), file)  # whole, but not ours: no mark


def flip(at: int):
    def change(file):
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(f.read_bytes()[:-7]),
        lambda f: f.write_bytes(f.read_bytes()[:5]),
        lambda f: f.write_bytes(os.urandom(300)),
        lambda f: f.write_bytes(bytes(f.stat().st_size)),
        foreign,
        flip(-1),
        flip(-1000),
        flip(30),
        flip(3),
    ],
    ids=[
        "empty",
        "cut",
        "cut in the header",
        "noise",
        "zeros",
        "foreign",
        "last bit",
        "a bit",
        "a bit of the header",
        "a bit of the length",
    ],
)
def test_damage_is_found_and_mended(damage, tmp_path):
    batch = batch_of(images(3))
    encode = Toy()
    want = FeatureCache(tmp_path)(KEY, batch, encode)
    cache = FeatureCache(tmp_path)
    cache(KEY, batch, encode)
    damage(entries(tmp_path)[1])
    for c in (cache, FeatureCache(tmp_path)):  # one that has read the file before, and one that has not
        found = c(KEY, batch, encode)
        assert all(torch.equal(found[k], want[k]) for k in ("cls", "patches"))
    assert encode.seen == 4 and (cache.hits, cache.misses, cache.counts["damaged"]) == (5, 1, 1)


# --------------------------------------------------------------------------------------------------------------------------- processes


def run(code: str, *arguments, wait: bool = True):
    process = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "import os, sys; sys.path[:0] = sys.argv[1].split(os.pathsep)\nimport test_feature_cache as t\n"
            + textwrap.dedent(code),
            os.pathsep.join(map(str, Path(__file__).parents[:2])),
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


MANY = """
    import json, random, torch
    everything, found = t.images(40), {}
    for name, limit in (("all", None), ("few", float(sys.argv[3]))):
        cache, encode, same = t.FeatureCache(f"{sys.argv[2]}/{name}", limit_gb=limit), t.Toy(), True
        random.seed(int(sys.argv[4]))
        for _ in range(60):
            rows = random.sample(range(40), 4)
            same &= torch.equal(cache(t.KEY, t.batch_of(everything[rows]), encode)["cls"], everything[rows].mean((2, 3)))
        found[name] = dict(same=same, seen=encode.seen, **cache.counts)
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_in_one_folder(tmp_path):
    one = FeatureCache(tmp_path / "one")
    one(KEY, batch_of(images(1)), Toy())
    both = [run(MANY, tmp_path, 12.5 * one.size() / 1e9, seed, wait=False) for seed in (1, 2)]
    said = [json.loads(p.communicate(timeout=300)[0]) for p in both]
    for found in said:
        assert (
            all(f["same"] and f["damaged"] == 0 for f in found.values())
            and found["few"]["evicted"] > 0
            and found["all"]["evicted"] == 0
        )
    assert len(entries(tmp_path / "all")) == 40 and sum(found["all"]["seen"] for found in said) <= 80
    assert len(entries(tmp_path / "few")) <= 14, "12 fit; each process may be a twentieth of the limit late"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    "What was written before is kept, what was being written is not there, and its rest is swept away later."
    child = run(
        """
        import os
        cache = t.FeatureCache(sys.argv[2])
        cache(t.KEY, t.batch_of(t.images(3)), t.Toy())
        def stuck(*a):                     # the fourth file: its bytes are on the way
            print("writing", flush=True)
            while True: t.time.sleep(1)
        os.fsync = stuck
        cache(t.KEY, t.batch_of(t.images(4)), t.Toy())
    """,
        tmp_path,
        wait=False,
    )
    assert child.stdout.readline().strip() == "writing"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=30)
    rest = list(tmp_path.rglob("*.tmp"))
    assert len(entries(tmp_path)) == 3 and len(rest) == 1
    cache = FeatureCache(tmp_path, limit_gb=1)
    encode = Toy()
    cache(KEY, batch_of(images(4)), encode)
    assert (cache.hits, cache.misses, encode.seen) == (3, 1, 1) and rest[0].exists(), (
        "another process may still be writing it"
    )
    os.utime(rest[0], (time.time() - 7200,) * 2)
    cache.trim()
    assert not rest[0].exists() and len(entries(tmp_path)) == 4


# --------------------------------------------------------------------------------------------------------------------------- limited room


def test_the_least_recently_used_goes_first(tmp_path):
    cache = FeatureCache(tmp_path)
    encode = Toy()
    everything = images(10)
    names = image_keys(everything)
    cache(KEY, batch_of(everything[:1]), encode)
    cache = FeatureCache(tmp_path, limit_gb=cache.size() * 6.5 / 1e9)
    for i in range(1, 6):
        cache(KEY, batch_of(everything[i : i + 1]), encode)
    cache(KEY, batch_of(everything[:2]), encode)  # 0 and 1 were read just now
    written = {f.stem: f.stat().st_mtime_ns for f in entries(tmp_path)}
    for i in (6, 7):
        cache(KEY, batch_of(everything[i : i + 1]), encode)
    left = {f.stem for f in entries(tmp_path)}
    assert {names[0], names[1], names[6], names[7]} <= left and names[2] not in left and cache.size() <= cache.limit
    assert {f.stem: f.stat().st_mtime_ns for f in entries(tmp_path) if f.stem in written}.items() <= written.items(), (
        "reading is not writing"
    )
    seen = encode.seen
    cache(KEY, batch_of(everything[2:3]), encode)
    assert encode.seen == seen + 1, "what is gone is computed again"


def test_a_limit_below_one_image(tmp_path):
    cache = FeatureCache(tmp_path, limit_gb=1e-7)
    encode = Toy()
    with pytest.warns(UserWarning, match="less than one image's features"):
        found = cache(KEY, batch_of(images(2)), encode)
    assert torch.equal(found["cls"], images(2).mean((2, 3))) and cache.size() == 0
    for wrong in (0, -1):
        pytest.raises(ValueError, FeatureCache, tmp_path, limit_gb=wrong)


def test_a_full_disk_costs_time_only(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    cache = FeatureCache(tmp_path)
    encode = Toy()
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left on device"):
        found = cache(KEY, batch_of(images(2)), encode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again = cache(KEY, batch_of(images(2)), encode)
    assert all(torch.equal(found[k], again[k]) for k in found) and (cache.hits, cache.misses) == (0, 4)
