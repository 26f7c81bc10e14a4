"Folders of the shared material: parity fixtures, real images, real weights. Tests that need them skip where they are absent."

import ctypes
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent

# The same examples everywhere, and no time limit: machines are busy. HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def multiplies_bf16() -> bool:
    "Has this processor products of bf16? One that has not takes 6 to 40 times as long as for fp32."
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def folder(variable: str, default: str) -> Path:
    "A folder named by an environment variable; relative paths start at the repository's root."
    return (ROOT / os.environ.get(variable, default)).resolve()


@pytest.fixture(scope="module")
def own_kernel():
    "The kernel named python3 starts `python`; it is the one that runs the tests."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    path = folder("ZSAD_SHARED", "../shared")
    if not path.is_dir():
        pytest.skip(f"no shared folder at {path} (real images and weights); set ZSAD_SHARED")
    return path


@pytest.fixture(scope="session")
def parity_fixture():
    "name -> (tensors, meta) of a parity fixture."
    from safetensors.torch import load_file

    path = folder("ZSAD_FIXTURES", "../shared/fixtures")

    def read(name: str):
        if not (path / f"{name}.json").is_file():
            pytest.skip(f"no parity fixture {name} in {path}; set ZSAD_FIXTURES")
        return load_file(path / f"{name}.safetensors"), json.loads((path / f"{name}.json").read_text())

    return read


@pytest.fixture
def permissions_hold():
    "What a file's mode forbids is forbidden, even where root runs the tests: Linux lets a thread do without that privilege for a while."
    if os.name != "posix":
        pytest.skip("needs files that can be forbidden")
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "capset"):
        pytest.skip("needs a user whom file permissions bind")
    header, found = (
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )  # version 3; effective, permitted and inheritable, twice
    assert not libc.capget(header, found)
    less = (ctypes.c_uint32 * 6)(found[0] & ~0b110, *found[1:])  # without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert not libc.capset(header, less)
    yield
    assert not libc.capset(header, found)


def pytest_collection_modifyitems(items):
    "Unit and parity tests that are not marked slow are the quick ones."
    for item in items:
        folder_name = item.path.parent.name
        if folder_name in ("unit", "parity") and "slow" not in item.keywords:
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
