"The synthetic benchmark: the same bytes everywhere, exact masks, the layout on disk."

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad_nb.data.index import COLUMNS
from zsad_nb.synthetic import benchmark as synthetic
from zsad_nb.synthetic.benchmark import render, render_batch, synthetic_index
from zsad_nb.synthetic.categories import CATEGORIES, SETS
from zsad_nb.synthetic.spots import STRENGTHS
from zsad_nb.synthetic.versions import categories, defects

HASHES = Path(__file__).parent / "synthetic_hashes.json"
PAIRS = [(c.name, d) for c in CATEGORIES.values() for d in ["good"] + defects(c.set)]
GRADED = [
    (categories(which, version=2)[(k * 5) % len(categories(which, version=2))], d)
    for which in ("auxiliary", "target")
    for k, d in enumerate(defects(which, 2))
]


def digests(size: int = 48, seed: int = 5) -> dict[str, str]:
    "sha256 of image and mask of one sample per category and defect of version 1, and per defect and strength of version 2"
    out = {}
    for name, defect, strength in [(n, d, "") for n, d in PAIRS] + [(n, d, s) for n, d in GRADED for s in STRENGTHS]:
        s = render(name, seed, size, defect, strength or "middle")
        key = f"{name}/{defect}" + (f"/{strength}" if strength else "")
        out[key] = hashlib.sha256(s.image.tobytes() + np.packbits(s.mask).tobytes()).hexdigest()[:16]
    return out


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return digests()


@pytest.mark.slow
def test_same_bytes_as_committed(here):
    """After an intended change of the images: python tests/unit/test_synthetic.py --write, and raise IMAGES_VERSION in the
    notebook of synthetic.benchmark."""
    wanted = json.loads(HASHES.read_text())
    wrong = sorted(k for k in wanted | here if wanted.get(k) != here.get(k))
    assert not wrong, f"{len(wrong)} of {len(wanted)} images differ from {HASHES.name}, first {wrong[:5]}"


@pytest.mark.slow
def test_same_bytes_with_other_simd(here):
    "Other vector units, other loops, same bytes"
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    on = [f for f in __cpu_dispatch__ if __cpu_features__.get(f)]
    if not on:
        pytest.skip(
            "this numpy has no dispatched SIMD features enabled on this machine: there is nothing to switch off"
        )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(on), "PYTHONPATH": path}
    code = f"""
import json, test_synthetic
from numpy._core._multiarray_umath import __cpu_features__ as f
print(json.dumps([[k for k in {on!r} if f[k]], test_synthetic.digests()]))"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    still, there = json.loads(run.stdout)
    assert not still, f"numpy kept {still}: the test did not test anything"
    assert there == here


def test_only_exact_arithmetic():
    "No function whose last bit depends on the machine in any module that renders"
    folder = Path(synthetic.__file__).parent
    banned = (
        """np.sin np.cos np.tan np.exp np.log np.power np.arctan np.hypot np.cbrt np.einsum np.dot np.matmul np.convolve np.mean .mean( np.cumsum .cumsum(
        np.interp np.linspace np.linalg np.fft scipy torch .normal( .uniform( .exponential( .gamma( math.sin math.cos math.exp math.log math.pow **""".split()
        + [" @ "]
    )
    other = {"pretext.py", "datasets.py"}  # random tensors; no pixels at all
    modules = sorted(path for path in folder.glob("*.py") if path.name not in other)
    assert len(modules) > 15
    for path in modules:
        lines = [line.split("#")[0] for line in path.read_text().splitlines()]
        found = [(n, b) for n, line in enumerate(lines, 1) for b in banned if b in line]
        assert not found, f"{path.name}: {found}"


def test_sets_are_disjoint():
    names = [n for w in SETS for n in categories(w)]
    assert len(names) == len(set(names)) == len(CATEGORIES)
    for which, least in (("pretrain", 10), ("auxiliary", 4), ("target", 4)):
        assert all(len(categories(which, kind)) >= least for kind in ("texture", "object"))
    assert set(defects("auxiliary")) == set(defects("pretrain")) < set(defects("target"))
    assert len(defects("auxiliary")) >= 8 and len(set(defects("target")) - set(defects("auxiliary"))) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("which", SETS)
def test_masks_are_exact(which):
    "Outside the mask the pair is equal, inside it differs; never empty, never huge, on the object, clearly visible"
    areas = []
    for name in categories(which):
        for k, defect in enumerate(defects(which)):
            a = render(name, 900 + k, 128)
            b = render(name, 900 + k, 128, defect)
            change = np.abs(a.image.astype(int) - b.image.astype(int)).max(2)
            assert not a.mask.any() and b.mask.any()
            assert not change[~b.mask].any(), (name, defect)
            assert change[b.mask].mean() > 25, (name, defect, change[b.mask].mean())
            assert (change[b.mask] > 4).mean() > 0.6, (name, defect)
            areas.append(b.mask.mean())
            assert 0.003 < areas[-1] < 0.11, (name, defect, areas[-1])
    assert 0.01 < np.mean(areas) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wood", "gear", "brick", "nut", "board"])
def test_every_size_shows_the_same_scene(name):
    "Averaged down, the sizes agree; the defect covers the same part"

    def small(v, n=16):
        return v.astype(float).reshape(n, v.shape[0] // n, n, v.shape[1] // n, -1).mean((1, 3))

    for defect in [None] + defects(CATEGORIES[name].set):
        a = render(name, 3, 128, defect)
        b = render(name, 3, 320, defect)
        assert np.abs(small(a.image) - small(b.image)).mean() < 5
        if defect:
            assert abs(a.mask.mean() - b.mask.mean()) < 0.015 and np.abs(small(a.mask) - small(b.mask)).max() < 0.6
    assert render(name, 3, 518).image.shape == (518, 518, 3)


def test_normal_images_vary():
    for name in CATEGORIES:
        a, b = (render(name, s, 64).image.astype(int) for s in (1, 2))
        assert np.abs(a - b).mean() > 5, name


@pytest.mark.slow
def test_captions():
    texts = {render(n, s, 32, d).caption for n in CATEGORIES for s in range(3) for d in (None, "stain")}
    assert all(t.startswith("a photo of a") and "  " not in t and "None" not in t for t in texts)
    assert render("wood", 0, 32, "scratch").caption.endswith("wood board with a scratch")
    for c in CATEGORIES.values():
        assert all((c.noun, c.material, c.pattern))


def test_render_batch():
    images, masks = render_batch(["wood", "nut"], [1, 2], 64, ["hole", None])
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8 and masks.shape == (2, 64, 64)
    assert masks[0].any() and not masks[1].any()
    assert np.array_equal(images[1], render("nut", 2, 64).image)
    with pytest.raises(ValueError, match="2 categories, 1 seeds"):
        render_batch(["wood", "nut"], [1], 64)


def test_errors():
    with pytest.raises(ValueError, match="no category 'wod'"):
        render("wod", 0)
    with pytest.raises(ValueError, match="no defect 'holes'"):
        render("wood", 0, defect="holes")
    with pytest.raises(ValueError, match="at least 32"):
        render("wood", 0, size=8)
    with pytest.raises(ValueError, match="no set 'test'"):
        categories("test")


@pytest.mark.slow
def test_index_on_disk(tmp_path):
    root = tmp_path / "set"
    index = synthetic_index(root, "target", size=64, normal=2, defective=13, train_normal=1)
    assert (
        tuple(index.columns) == COLUMNS
        and set(index["dataset"]) == {"synthetic-target"}
        and Path(index.attrs["root"]) == root
    )
    assert set(index["category"]) == set(categories("target"))
    for _, g in index.groupby("category"):
        assert (len(g), int(g["anomalous"].sum()), int((g["split"] == "train").sum())) == (16, 13, 1)
        assert set(g["defect"]) == {"good", *defects("target")}
    assert not index["image"].duplicated().any()
    for r in index.itertuples():
        assert Image.open(root / r.image).size == (64, 64)
        if r.anomalous:
            mask = np.array(Image.open(root / r.mask))
            assert set(np.unique(mask)) == {0, 255}
            assert r.mask == r.image.replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
        else:
            assert r.mask == ""


def test_index_is_reused_and_completed(tmp_path, monkeypatch):
    args = dict(which="auxiliary", size=32, normal=1, defective=1)
    index = synthetic_index(tmp_path, **args)
    calls = []
    monkeypatch.setattr(synthetic, "render", lambda *a, **k: calls.append(a) or render(*a, **k))
    assert synthetic_index(tmp_path, **args).equals(index) and not calls
    with pytest.raises(ValueError, match="other parameters"):
        synthetic_index(tmp_path, **{**args, "seed": 1})
    image = tmp_path / index["image"][0]
    first = image.read_bytes()
    (tmp_path / synthetic.STAMP).unlink()  # as a killed write leaves it
    image.unlink()
    assert synthetic_index(tmp_path, **args).equals(index) and len(calls) == len(index) and image.read_bytes() == first
    other = synthetic_index(tmp_path, **{**args, "seed": 1}, overwrite=True)
    assert image.read_bytes() != first and len(other) == len(index)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        synthetic_index(tmp_path, "target", size=32, normal=1, defective=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_killed_write_leaves_no_stamp(tmp_path, monkeypatch):
    def broken(name, *a, **k):
        if name == categories("target")[3]:
            raise OSError("No space left on device")
        return render(name, *a, **k)

    monkeypatch.setattr(synthetic, "render", broken)
    with pytest.raises(OSError):
        synthetic_index(tmp_path, "target", size=32, normal=1, defective=1)
    assert not (tmp_path / synthetic.STAMP).exists()


if __name__ == "__main__" and "--write" in sys.argv:
    HASHES.write_text(json.dumps(digests(), indent=0) + "\n")
