"The image and the devcontainer, as far as they can be checked without Docker: what they copy, call and name is there."

import json
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
SYSTEM = {"apt-get", "rm", "useradd", "mkdir", "chown"}  # of python:slim, which is a Debian


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def instructions() -> list[tuple[str, str]]:
    "Instruction and arguments; continued lines are one."
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def of(kind: str) -> list[str]:
    return [rest for word, rest in instructions() if word == kind]


def copied() -> list[str]:
    return [source for rest in of("COPY") for source in rest.split()[:-1]]


def test_instructions_and_stages():
    words = [word for word, _ in instructions()]
    assert set(words) <= INSTRUCTIONS and words[:2] == ["ARG", "FROM"]
    assert [rest.split()[-1] for rest in of("FROM")] == ["base", "image"]
    assert of("FROM")[1].split()[0] == "base", "the last stage, which is built by default, stands on the first"
    assert of("USER") == ["zsad"] and words.index("USER") > max(i for i, w in enumerate(words) if w == "RUN")


def test_the_python_of_the_project():
    version = next(rest.partition("=")[2] for rest in of("ARG") if rest.startswith("PYTHON="))
    least = settings()["min_python"]
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))
    assert f"python={version}" in (ROOT / "environment.yml").read_text()
    assert "python:${PYTHON}-slim" in of("FROM")[0]


def test_what_is_copied_is_there_and_tracked():
    for source in copied():
        assert (ROOT / source).exists(), source
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: what is tracked is read from git")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for source in copied():
        assert any(name == source or name.startswith(f"{source}/") for name in tracked), f"{source} is not tracked"


def test_commands(tmp_path):
    "Every RUN is a sound script; what it calls is of the base image, or pip; the command is the package's own."
    for script in of("RUN"):
        assert subprocess.run(["sh", "-n", "-c", script], capture_output=True).returncode == 0, script
    system = [word.split()[0] for script in of("RUN")[:2] for word in script.split("&&")]
    assert set(system) <= SYSTEM
    command = json.loads(of("CMD")[0])
    assert command[0] in {script.partition("=")[0] for script in settings()["console_scripts"].split()}
    extras = re.search(r'"\.\[([\w,]+)\]"', of("RUN")[-1])[1].split(",")
    assert all(f"{extra}_requirements" in settings() for extra in extras)
    assert "dask[distributed]" in settings()["cluster_requirements"] and "cluster" in extras, "workers are dask's"


@pytest.mark.parametrize("device, index", [("cpu", True), ("cuda", False), ("gpu", None)])
def test_the_build_argument(tmp_path, device, index):
    "The script itself, with a pip that says what it was asked for."
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device}
    done = subprocess.run(["sh", "-c", of("RUN")[-1]], env=environment, capture_output=True, text=True)
    if index is None:
        assert done.returncode == 1 and "use cpu or cuda" in done.stderr and not done.stdout
        return
    assert done.returncode == 0 and done.stdout.startswith("install -c constraints.txt")
    assert ("download.pytorch.org/whl/cpu" in done.stdout) == index
    assert "torch torchvision .[cluster,engines,lab]" in done.stdout
    assert next(rest for rest in of("ARG") if rest.startswith("DEVICE=")) == "DEVICE=cpu"


def test_what_is_copied_is_enough_for_a_wheel():
    "All that setup.py reads; tests/system/test_wheel.py builds one."
    script = (ROOT / "setup.py").read_text(encoding="utf-8")
    read = re.findall(r'root / "([\w.]+)"', script) + re.findall(r'license_files=\["(\w+)"\]', script)
    manifest = (ROOT / "MANIFEST.in").read_text().splitlines()
    read += [name for line in manifest for name in line.split()[1:] if line.startswith("include ")]
    read += [line.split()[1] for line in manifest if line.startswith("recursive-include ")]
    assert {"settings.ini", "README.md", "LICENSE", "constraints.txt", "nbs/experiments"} <= set(read)
    assert set(read) | {"setup.py", "pyproject.toml", "MANIFEST.in", settings()["lib_path"]} <= set(copied())


def test_the_readme_names_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    name = re.search(r'image="([\w/]+)"', text)[1]
    for file in (text, (ROOT / "Dockerfile").read_text()):
        assert f"docker build -t {name} ." in file and f"docker build -t {name} --build-arg DEVICE=cuda ." in file


def test_the_devcontainer():
    folder = ROOT / ".devcontainer"
    about = json.loads((folder / "devcontainer.json").read_text(encoding="utf-8"))
    build = about["build"]
    assert (folder / build["dockerfile"]).resolve() == (ROOT / "Dockerfile").resolve()
    assert (folder / build["context"]).resolve() == ROOT.resolve()
    assert build["target"] in [rest.split()[-1] for rest in of("FROM")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    command, target = about["postCreateCommand"].split()
    assert command == "make" and re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert {"git", "make"} <= set(of("RUN")[0].split()), "what the clone needs, by its README"
    interpreter = about["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    venv = re.search(r"^VENV\s*\?=\s*(\S+)", makefile, re.MULTILINE)[1]
    assert interpreter == f"{venv}/bin/python"
    assert any(f"--uid 1000 {about['remoteUser']}" in script for script in of("RUN"))
    assert about["containerEnv"]["PIP_EXTRA_INDEX_URL"] in of("RUN")[-1]
