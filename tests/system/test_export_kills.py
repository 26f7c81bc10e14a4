"An export that is killed, crowded, or out of room: the folder holds the old export or the new one, complete, and nothing of anybody else's is gone."

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from zsad_nb.backbones.graphs import synthetic_images
from zsad_nb.core.sessions import file_hash
from zsad_nb.deploy import export as module
from zsad_nb.deploy.export import export
from zsad_nb.deploy.inference import load_exported, read_description
from zsad_nb.methods.base import create

ROOT = Path(__file__).parents[2]
SIZE = 32
KILLS = int(os.environ.get("ZSAD_KILLS", 2))


def method(tap: int):
    return create("self_distance", image_size=SIZE, tap=tap, weights="random:0")


def answers(folder: Path):
    return torch.from_numpy(load_exported(folder, "torch").predict(synthetic_images((SIZE, SIZE), 2, 5)).map)


def whole(folder: Path) -> int:
    "The tap of the export that is there, every file of which is what its description says."
    about = read_description(folder)
    assert {f.name for f in folder.iterdir()} == {"encode.pt2", "head.pt2", "export.json"}
    assert {name: file_hash(folder / name) for name in about["hashes"]} == about["hashes"]
    return about["parameters"]["tap"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    "tap -> what an export that nobody disturbed answers, its folder, its graphs."
    room = tmp_path_factory.mktemp("undisturbed")
    made = {}
    for tap in (1, 2):
        graphs = module.graphs_of(method(tap).eval(), SIZE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "graphs_of", lambda *a, graphs=graphs: graphs)
            export(method(tap), room / str(tap), "torch")
        made[tap] = answers(room / str(tap)), room / str(tap), graphs
    return made


@pytest.fixture
def traced(undisturbed, monkeypatch):
    "Graphs are there already, and were checked: what is left is what the disk sees."
    monkeypatch.setattr(module, "graphs_of", lambda method, *a: undisturbed[method.p.tap][2])
    monkeypatch.setattr(module, "_check", lambda *a: {})


CHILD = """
    import os, random, signal, sys, time, traceback
    import torch
    from zsad_nb.methods.base import create
    from zsad_nb.deploy import export as module

    torch.set_num_threads(1)  # and none was started: a process may be forked
    folders, ways, times, kill = sys.argv[1].split(os.pathsep), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4] == "kill"
    methods = {tap: create("self_distance", image_size=32, tap=tap, weights="random:0") for tap in (1, 2)}
    graphs = {tap: module.graphs_of(m.eval(), 32) for tap, m in methods.items()}
    module.graphs_of, module._check = lambda method, *a: graphs[method.p.tap], lambda *a: {}

    def begin(folder, way):
        "A process that exports two systems into one folder, in turn."
        child = os.fork()
        if child: return child
        try:
            if way == "fallback": module._exchange = lambda one, other: False
            for turn in range(times): module.export(methods[2 - turn % 2], folder, "torch")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    if kill:
        chance = random.Random(6)
        for folder, way in zip(folders, ways):
            child = begin(folder, way)
            time.sleep(3 * chance.random())
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was not in the middle of it"
    else:
        children = [begin(folder, way) for folder, way in zip(folders, ways)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
    """


def run(folders: list, ways: list, times: int, what: str):
    "Exports in processes of their own; the graphs are traced once for all of them."
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = [os.pathsep.join(map(str, folders)), ",".join(ways), str(times), what]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CHILD), *arguments],
        env=env,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def copied(source: Path, folder: Path):
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL exists on POSIX only")
def test_killed_at_random_moments(undisturbed, traced, tmp_path):
    "One export or the other, equal to an undisturbed one to the last bit; afterwards the same command works."
    folders = [tmp_path / f"kill{number}" for number in range(KILLS)]
    for folder in folders:
        copied(undisturbed[1][1], folder)
    run(folders, [("exchange", "fallback")[number % 2] for number in range(KILLS)], 10**6, "kill")
    taps = []
    for folder in folders:
        taps.append(whole(folder))
        assert torch.equal(answers(folder), undisturbed[taps[-1]][0])
        export(method(3 - taps[-1]), folder, "torch")
        assert whole(folder) == 3 - taps[-1]
    print(
        f"{KILLS} kills: {taps.count(1)} times one export was there, {taps.count(2)} times the other; each complete and"
        " equal to an undisturbed one"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
def test_two_at_once(undisturbed, tmp_path):
    "Both end well, three exports each; what is there is one of them."
    run([tmp_path / "system"] * 2, ["exchange"] * 2, 3, "wait")
    assert whole(tmp_path / "system") in (1, 2) and [p.name for p in tmp_path.iterdir()] == ["system"]


@pytest.mark.parametrize("moment", ["before", "between"])
def test_killed_where_folders_cannot_be_exchanged(undisturbed, traced, tmp_path, monkeypatch, moment):
    "Between the two renames of such a file system nothing has the name; whoever comes next puts the old one back."
    folder = tmp_path / "system"
    copied(undisturbed[1][1], folder)
    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    real = os.rename
    calls = []

    def stop(one, other):
        calls.append(one)
        if len(calls) == (1 if moment == "before" else 2):
            raise KeyboardInterrupt
        return real(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            export(method(2), folder, "torch")
    assert folder.exists() == (moment == "before")
    assert whole(folder) == 1
    export(method(2), folder, "torch")
    assert whole(folder) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["system"]


@pytest.mark.parametrize("where", ["write_bytes", "fsync", "rename", "exchange"])
def test_a_full_disk_or_a_rename_that_fails(undisturbed, traced, tmp_path, monkeypatch, where):
    folder = tmp_path / "system"
    copied(undisturbed[1][1], folder)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "write_bytes":
            patch.setattr(Path, "write_bytes", full)
        elif where == "exchange":
            patch.setattr(module, "_exchange", full)
        else:
            patch.setattr(os, where, full)
        if where == "rename":
            patch.setattr(module, "_exchange", lambda one, other: False)
        with pytest.raises(
            OSError, match=r"system was not written .*what was there before is as it was\. Free some space"
        ):
            export(method(2), folder, "torch")
    assert [p.name for p in tmp_path.iterdir()] == ["system"] and whole(folder) == 1


def note(folder):
    (folder / "notes.txt").write_text("keep me")


def inner(folder):
    (folder / "inner").mkdir()


def foreign(folder):
    (folder / "export.json").write_text('{"name": "of another tool"}')


def damaged(folder):
    (folder / "export.json").write_text("{")


def hidden(folder):
    (folder / ".git").mkdir()


def pointing(folder):
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("change", [note, inner, foreign, damaged, hidden, pointing])
def test_a_folder_with_things_of_the_user_stays(undisturbed, traced, tmp_path, change):
    folder = tmp_path / "system"
    copied(undisturbed[1][1], folder)
    change(folder)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match="holds other things"):
        export(method(2), folder, "torch")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_link_and_a_file_stay(undisturbed, traced, tmp_path):
    copied(undisturbed[1][1], tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("keep me")
    for name, words in (("link", "is a link"), ("dangling", "is a link"), ("file", "holds other things")):
        with pytest.raises(ValueError, match=words):
            export(method(2), tmp_path / name, "torch")
    assert (
        (tmp_path / "link").is_symlink()
        and (tmp_path / "file").read_text() == "keep me"
        and whole(tmp_path / "real") == 1
    )


def test_what_appears_meanwhile_is_kept(undisturbed, traced, tmp_path, monkeypatch):
    "Between the last look and the exchange somebody puts a file into the folder."
    folder = tmp_path / "system"
    real = module._exchange
    copied(undisturbed[1][1], folder)

    def late(one, other):
        note(Path(other))
        return real(one, other) if os.name == "posix" else False

    monkeypatch.setattr(module, "_exchange", late)
    with pytest.warns(UserWarning, match="other files appeared in it; they are in"):
        export(method(2), folder, "torch")
    kept = next(p for p in tmp_path.iterdir() if ".replaced-" in p.name)
    assert (kept / "notes.txt").read_text() == "keep me" and whole(folder) == 2
