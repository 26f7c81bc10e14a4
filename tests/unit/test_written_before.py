"What version 0.1 wrote before the package was divided into rooms: checkpoints load and answer the same, runs are resumed."

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zsad_nb.data.images import Batch
from zsad_nb.methods.base import create, load, save
from zsad_nb.runs.run import Spec

# method -> the header and the tensors' shapes that version 0.1 wrote; score and some pixels of the map that it answered
WRITTEN = json.loads((Path(__file__).parent / "checkpoints_0_1.json").read_text(encoding="utf-8"))


def values(name: str, shape: list[int]) -> torch.Tensor:
    "The learned values under a name, the same on every machine."
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randint(-2048, 2049, shape, generator=torch.Generator().manual_seed(seed)) / 2**15


def batch() -> Batch:
    "One synthetic image of 48 pixels."
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 48), indexing="ij")
    image = torch.stack([x, y, (x * 9).sin().abs()])[None]
    no = torch.zeros(1, dtype=torch.bool)
    return Batch(
        image, torch.zeros(1, 1, 48, 48, dtype=torch.bool), no, no.long(), ["screw"], ["0.png"], torch.ones_like(no)
    )


def of_this_processor(header: dict) -> dict:
    "The header with the hashes of this processor's random towers: their values differ in the last bits between processors."
    towers = create(header["method"], **header["parameters"]).backbones()
    backbones = {role: {**about, "hash": towers[role].hash} for role, about in header["backbones"].items()}
    return {**header, "backbones": backbones}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_a_checkpoint_of_before_loads_and_answers_the_same(name, tmp_path):
    before = WRITTEN[name]
    path = tmp_path / "before.safetensors"
    state = {n: values(n, shape) for n, shape in before["tensors"].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random towers are warned about
        save_file(state, path, {"zsad_nb": json.dumps(of_this_processor(before["header"]))})
        method = load(path).eval()

    with torch.inference_mode():
        features = method.encode(batch()) if method.encodes else None
        prediction = method(features, batch())
    assert float(prediction.score[0]) == pytest.approx(before["score"], rel=1e-4)
    assert prediction.map[0].flatten()[::613].tolist() == pytest.approx(before["map"], rel=1e-4, abs=1e-6)

    assert set(method.learned()) == set(before["tensors"])
    with safe_open(save(method, tmp_path / "after.safetensors"), "pt") as file:
        header = json.loads(file.metadata()["zsad_nb"])
    assert header["parameters"] == before["header"]["parameters"], "written anew, every parameter keeps its value"


def cell(source: str, *tags: str) -> dict:
    return dict(cell_type="code", id="a", metadata=dict(tags=tags), source=source, outputs=[], execution_count=None)


def test_a_run_of_before_is_found_under_its_hash(tmp_path):
    "A user's notebook and its values have the hash that version 0.1 gave them, so a sweep goes on where it stopped."
    cells = [cell("seed = 0\nsize = 48\noutput = ''\nmethod = 'visualad'", "parameters"), cell("print(size)")]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    path = tmp_path / "mine.ipynb"
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    assert Spec(path, dict(size=64)).hash == "a75df190869dc928"
