"""The package on Windows: every module imports without POSIX's own modules, locks do without `fcntl`, and paths of that system are understood.

What Windows lacks is taken away in a fresh process; paths are judged by `ntpath` and `PureWindowsPath`, on whatever system this runs."""

import io
import ntpath
import subprocess
import sys
from pathlib import PureWindowsPath

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from zsad_nb.core import locks
from zsad_nb.core.files import FileNames, inside, is_below, safe_name
from zsad_nb.core.names import same_name
from zsad_nb.core.records import relative_path as below_the_record
from zsad_nb.data.index import relative_path
from zsad_nb.runs.run import Spec

RESERVED = [
    "con",
    "CON",
    "nul.txt",
    "aux",
    "prn.png",
    "COM1",
    "lpt9.csv",
    "com¹",
    "LPT².x",
    "con .txt",
    "CONIN$",
    "conout$",
]

# What Windows does not have. Libraries that are loaded already keep what they took at their own import.
WITHOUT = """
import os, pathlib, pkgutil, signal, socket, sys
POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix")
import zsad_nb, torch, pandas, papermill, matplotlib.pyplot, sklearn, scipy.stats, psutil, filelock, asyncio
import jupyter_client, ipykernel.kernelapp, ipywidgets, distributed  # what is loaded lazily, and asks for them itself
from zsad_nb.backbones.weights import import_vision_libraries
import_vision_libraries()
for name in [name for name in sys.modules if name.split(".")[0] == "zsad_nb" and name != "zsad_nb"]:
    del sys.modules[name]
for name in POSIX:
    sys.modules[name] = None
for name in ("geteuid", "getuid", "getegid", "getgid", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "sched_getaffinity",
             "sysconf", "sysconf_names", "fork", "mkfifo", "statvfs", "uname", "killpg", "getpgid", "setsid", "chown", "lchown"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGPIPE", "SIGALRM", "SIGUSR1", "SIGCHLD"):
    delattr(signal, name)
del socket.AF_UNIX
"""
IMPORTS = """
names = [module.name for module in pkgutil.walk_packages(zsad_nb.__path__, "zsad_nb.")]
for name in names:
    __import__(name)
print(len(names))
"""
LOCKS = """
from zsad_nb.core import locks
from zsad_nb.core.files import open_unfollowed, owned_only, private_folder
from zsad_nb.runs.executors import usable_cores
from zsad_nb.runs.execution import hardware
home = pathlib.Path(sys.argv[1])
assert locks.fcntl is None and not hasattr(os, "O_NOFOLLOW")
with locks.lock(home / "run") as died:
    assert died == "" and locks.is_locked(home / "run")
    try:
        with locks.lock(home / "run"):
            raise SystemExit("it was locked twice")
    except locks.Busy as error:
        assert f"is being run by process {os.getpid()}" in str(error), error
assert not locks.is_locked(home / "run")
(home / "run" / ".lock").write_text("process 999999 on elsewhere")
with locks.lock(home / "run") as died:
    assert died == "process 999999 on elsewhere"
(home / "thesis.tex").write_text("years of work")
(home / "linked").mkdir()
(home / "linked" / ".lock").symlink_to(home / "thesis.tex")
with locks.lock(home / "linked"):
    assert (home / "linked" / ".lock-zsad").exists()
try:
    open_unfollowed(home / "linked" / ".lock", os.O_WRONLY)
    raise SystemExit("a link was followed")
except OSError:
    assert (home / "thesis.tex").read_text() == "years of work"
owned_only(private_folder(home / "private"))
assert usable_cores() >= 1 and hardware()["memory_gb"] > 0
"""


def without_posix(code, *arguments):
    "What a fresh process prints that lacks what Windows lacks."
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    pytest.importorskip("distributed")
    return without_posix(IMPORTS + LOCKS, tmp_path_factory.mktemp("windows"))


def test_every_module_imports_and_locks_lock(printed):
    modules = [path for path in (ROOT / "zsad_nb").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")]
    assert int(printed.split()[0]) >= len(modules)


def test_locks_import_where_nothing_has_fcntl():
    "Without the library's own import of it either: then it says that there are no locks."
    code = "import sys; sys.modules.update(fcntl=None, resource=None); import zsad_nb.core.locks as l; print(l.fcntl)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr


class Locked(io.RawIOBase):
    "A file as Windows shows it to others while its first byte is locked."

    def __init__(self, data: bytes):
        self.data = data
        self.place = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.place

    def seek(self, offset, whence=0):
        self.place = offset + (self.place if whence == 1 else len(self.data) if whence == 2 else 0)
        return self.place

    def readinto(self, buffer):
        if self.place == 0:
            raise PermissionError(13, "Permission denied")
        part = self.data[self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


def test_the_holder_is_named_though_the_first_byte_cannot_be_read():
    file = io.TextIOWrapper(io.BufferedReader(Locked(b"process 4711 on gpu-3")), encoding="utf-8", errors="replace")
    assert locks._holder(file) == "process 4711 on gpu-3"


def is_plain_name(name: str) -> bool:
    "Does Windows take it as the name of one file?"
    path = PureWindowsPath(name)
    return path.parts == (name,) and not path.anchor and not path.is_reserved() and not set(name) & set('<>:"|?*')


@given(st.text(max_size=200))
@example("C:\\runs\\a")
@example("..\\..\\secret")
@example("\\\\server\\share\\x")
@example("a:stream")
@example("trailing. ")
def test_any_text_becomes_a_name_that_windows_takes(text):
    name = safe_name(text)
    assert is_plain_name(name) and not name.endswith((" ", ".")) and all(letter >= " " for letter in name)


@pytest.mark.parametrize("word", RESERVED)
def test_reserved_names_are_not_used(word):
    assert is_plain_name(safe_name(word)) and safe_name(word) != word
    assert PureWindowsPath(word).is_reserved() or word.startswith("con .")


def test_names_that_windows_takes_for_one_are_told_apart():
    words = ["Screw", "screw", "SCREW", "a\\b", "a/b", "a:b", "com1", "_com1", "Com1"]
    files = FileNames()
    assert len({same_name(files.name(word)) for word in words}) == len(words)


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [
        ("C:\\runs\\a\\b", "C:\\runs", True),
        ("C:\\runs", "C:\\runs", True),
        ("c:\\RUNS\\a", "C:\\runs", True),
        ("C:/runs/a", "C:\\runs", True),
        ("C:\\runs2\\a", "C:\\runs", False),
        ("C:\\", "C:\\runs", False),
        ("D:\\runs\\a", "C:\\runs", False),
        ("C:\\runs\\..\\secret", "C:\\runs", False),
        ("\\\\server\\share\\runs\\a", "\\\\server\\share\\runs", True),
        ("\\\\other\\share\\runs\\a", "\\\\server\\share\\runs", False),
    ],
)
def test_what_lies_below_a_folder_of_windows(path, folder, expected):
    assert is_below(ntpath.normpath(path), folder, ntpath) is expected


@pytest.mark.parametrize(
    "path",
    ["C:\\runs\\a", "C:/runs/a", "c:a", "\\runs\\a", "\\\\server\\share\\a", "..\\a", "a\\..\\..\\b", "/a", "../a"],
)
def test_a_record_of_windows_leads_nowhere_else(path):
    assert "does not lie below this folder" in below_the_record(path)


@pytest.mark.parametrize("path", ["a", "a\\b.csv", "a/b.csv", "views\\one.csv"])
def test_a_record_of_windows_may_name_what_is_below(path):
    assert below_the_record(path) == ""


def test_lists_of_windows_are_read(tmp_path):
    assert relative_path("good\\001.png", tmp_path) == "good/001.png"
    for path in ("C:\\data\\good\\001.png", "\\\\server\\share\\001.png", "..\\001.png"):
        with pytest.raises(ValueError, match=r"absolute path of another machine|leaves the root|does not lie under"):
            relative_path(path, tmp_path)


@pytest.mark.parametrize("part", ["C:\\x", "..\\..\\x", "\\\\server\\share\\x", "a:b", "nul"])
def test_nothing_is_written_outside_whatever_a_part_is_called(tmp_path, part):
    try:
        path = inside(tmp_path / "out", part)
    except ValueError:
        return
    assert is_below(str(path.resolve()), str((tmp_path / "out").resolve()))


def test_a_run_has_the_same_hash_on_every_system(tmp_path):
    "A path among the parameters is written with slashes."
    assert Spec("n.ipynb", dict(root=tmp_path / "a" / "b")).parameters == dict(root=(tmp_path / "a" / "b").as_posix())
