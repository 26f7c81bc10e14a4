"Parameters and sweeps: what was typed is what is run, and a short file stays short."

import json
import math
import time

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zsad_nb.cli.commands import main
from zsad_nb.core.plain_yaml import DEPTH, LENGTH, VALUES, plain_value, read_yaml, require_bounded, typed_value
from zsad_nb.runs.parameters import Parameter, check_parameters, read_notebook
from zsad_nb.runs.plans import LIMIT, STAGE, STAGES, expand
from zsad_nb.runs.run import Spec
from zsad_nb.runs.sweeps import sweep, tasks_of


@pytest.fixture
def book(tmp_path):
    cells = [
        nbformat.v4.new_code_cell(c)
        for c in (
            (
                "seed: int = 0\nrate: float = 1.0\nword: str = ''\nflag: bool = False\nmore: list = []\nthing: object ="
                " None\noutput: str = ''"
            ),
            "1",
        )
    ]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    return tmp_path / "n.ipynb"


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("010", 10),
        ("0123", 123),
        ("-007", -7),
        ("+5", 5),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1_0.5", "1_0.5"),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("1:30.5", "1:30.5"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("NULL", None),
        ("None", "None"),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e", "1e"),
        (".", "."),
        ("2026-11-30", "2026-11-30"),
        ("2026-11-30 10:00:00", "2026-11-30 10:00:00"),
        ("=", "="),
        ("'010'", "010"),
        ('"yes"', "yes"),
        ("[010, 1:30]", [10, "1:30"]),
        ("{a: 08}", {"a": 8}),
        ("0777", 777),
        ("0o8", "0o8"),
        ("0X1F", "0X1F"),
        ("９", "９"),
        ("1e400", math.inf),
        ("-.inf", -math.inf),
    ],
)
def test_words(typed, value):
    got = typed_value(typed)
    assert got == value and type(got) is type(value)
    assert typed_value(f"[{typed}]") == [value] if "{" not in typed and "[" not in typed else True


def test_nan_and_long_numbers():
    assert math.isnan(typed_value(".nan")) and typed_value("nan") == "nan"
    assert plain_value("9" * 5000) == "9" * 5000 and plain_value("9" * 100) == 10**100 - 1


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("seed", "010", 10),
        ("rate", "010", 10),
        ("word", "010", "010"),
        ("word", "yes", "yes"),
        ("flag", "true", True),
        ("more", "[1, 1:30]", [1, "1:30"]),
    ],
)
def test_parameters_as_typed(book, name, typed, value):
    from zsad_nb.runs.parameters import parameters_of

    parameter = parameters_of(read_notebook(book))[name]
    assert parameter.parse(typed) == value and type(parameter.parse(typed)) is type(value)


@pytest.mark.parametrize(
    ("name", "typed", "hint"),
    [
        ("seed", "1:30", "plain decimal number"),
        ("seed", "1_0", "plain decimal number"),
        ("flag", "yes", "write true or false"),
        ("flag", "on", "write true or false"),
        ("rate", ".nan", "which JSON and so the run's record cannot keep"),
        ("more", "[.nan]", "cannot keep"),
        ("more", "[{a: [1e999]}]", "cannot keep"),
        ("more", "[-.inf]", "cannot keep"),
    ],
)
def test_what_does_not_fit_says_why(book, capsys, tmp_path, name, typed, hint):
    assert main(["run", str(book), "-p", name, typed, "--root", str(tmp_path / "runs")]) == 2
    assert hint in capsys.readouterr().err and not (tmp_path / "runs").exists()


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(blacklist_categories=("Cs", "Cc"))),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_json_is_yaml(value):
    "What a figure's command line holds as JSON comes back as it was."
    assert read_yaml(json.dumps(value)) == value


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_one_sentence(text):
    typed_value(text)
    try:
        read_yaml(text, "s.yaml")
    except ValueError as error:
        assert str(error).startswith("s.yaml")


@given(
    st.lists(
        st.sampled_from(
            [
                "a: ",
                "- ",
                "&a ",
                "*a",
                "[",
                "]",
                "{",
                "}",
                ", ",
                ": ",
                "\n",
                "  ",
                "x",
                "010",
                "!!int ",
                "!x ",
                "<<: ",
                "'",
                '"',
                "|",
                "? ",
                "---",
                "\t",
                "#",
                "%",
            ]
        ),
        max_size=40,
    ).map("".join)
)
def test_any_syntax_is_a_value_or_one_sentence(text):
    try:
        read_yaml(text, "s.yaml")
    except ValueError as error:
        assert str(error).startswith("s.yaml")


def laughs(levels, times=10):
    return (
        "a0: &a0 ["
        + "x, " * times
        + "]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * times)}]\n" for n in range(1, levels))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), f"more than {VALUES} values"),
        (laughs(40, 2), f"more than {VALUES} values"),
        ("[" * 5000, f"more than {DEPTH}"),
        ("{a: " * 5000, f"more than {DEPTH}"),
        ("a: &a [*a]", "nothing that is complete"),
        ("a: *b", "nothing that is complete"),
        ("x: " + "y" * LENGTH, "divide it"),
        ("{a: 1, b: 2, a: 3}", "stands twice"),
        ("{1: a, 01: b}", "stands twice"),
        ("b: &b {x: 1}\na: {<<: *b}", "merge keys"),
        ("!!python/object/apply:os.system [ls]", "is not read"),
        ("!!python/name:os.system x", "is not understood"),
        ("a: !!binary aGk=", "is not understood"),
        ("!!set {a, b}", "is not read"),
        ("!!omap [a: 1]", "is not read"),
        ("!!timestamp 2026-01-01", "is not understood"),
        ("!mine x", "is not understood"),
        ("!!int 1_0", "is not understood"),
        ("[a]: b", "cannot be a key"),
        ("a: 1\n---\nb: 2", "second document"),
        ("a: \x07", "is not YAML"),
        ("a:\n\t- b", "is not YAML"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    begun = time.process_time()
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        expand(tmp_path / "s.yaml")
    assert (
        str(caught.value).startswith(str(tmp_path / "s.yaml"))
        and "\n" not in str(caught.value)
        and time.process_time() - begun < 10
    )


def test_python_data_is_bounded_too():
    itself = {}
    itself["a"] = itself
    for data in (itself, [[[0] * 100] * 100] * 100):
        with pytest.raises(ValueError):
            require_bounded(data)
        with pytest.raises(ValueError):
            expand(dict(notebook="n.ipynb", parameters=dict(a=data)))


# -------------------------------------------------------------------------------------------------------------------------------- sweeps

ROW = list(range(100))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dict(notebook="n.ipynb", grid=dict(a=ROW, b=ROW, c=ROW)), "it is 1000000 runs, more than 10000"),
        (dict(notebook="n.ipynb", grid={f"p{n}": [1, 2] for n in range(64)}), f"it is {2**64} runs"),
        (dict(notebook="n.ipynb", grid=dict(a=ROW), list=[dict(b=n) for n in ROW], seeds=[1, 2]), "it is 20000 runs"),
        (
            dict(
                stages={
                    f"s{n}": dict(notebook="n.ipynb", grid=dict(a=ROW), **(dict(after=f"s{n - 1}") if n else {}))
                    for n in range(4)
                }
            ),
            "with the stage s1 it is 10100 runs",
        ),
        (dict(stages={f"s{n}": dict(notebook="n.ipynb") for n in range(STAGES + 1)}), f"more than {STAGES}"),
        (dict(notebook="n.ipynb", seeds=5), "seeds is a whole number, not a list or null"),
        (dict(notebook="n.ipynb", seeds=["a"]), r"seeds\[0\] is text"),
        (dict(notebook=["n"]), "notebook is a list, not text"),
        (dict(notebook="n.ipynb", list={}), "list is an object, not a list"),
        (dict(notebook="n.ipynb", list=[1]), r"list\[0\] is a whole number"),
        (dict(notebook="n.ipynb", parameters=5), "parameters is a whole number"),
        (dict(notebook="n.ipynb", grid=[1]), "grid is a list"),
        (dict(notebook="n.ipynb", grid=dict(a=1)), "needs a list for a"),
        (dict(stages=[1]), "stages is no mapping"),
        (dict(stages=dict(a=1)), "the stage a is no mapping"),
        (dict(stages=dict(a=dict(notebook="n.ipynb", after=["b"]))), "after is a list"),
        (dict(notebook="n.ipynb", inherit="seed"), "inherit is text, not a list"),
        (dict(name=["x"], notebook="n.ipynb"), "name is a list"),
        (dict(notebook="n.ipynb", variables=[1]), "variables is a list"),
        (
            dict(notebook="n.ipynb", variables=dict(A="x" * 1000), parameters=dict(word="$A" * 1000)),
            "more than 100000 characters",
        ),
        (dict(notebook="n.ipynb", parameters=dict(word="$")), "written \\$\\$"),
        (dict(notebook="n.ipynb", parameters=dict(word="a$B")), "no variable 'B'"),
        (dict(name="../../out", notebook="n.ipynb"), "is a folder's name"),
        (dict(name="a/b", notebook="n.ipynb"), "is a folder's name"),
        (dict(name="..", notebook="n.ipynb"), "is a folder's name"),
        (dict(name="a\n", notebook="n.ipynb"), "is a folder's name"),
        (dict(name="x" * 300, notebook="n.ipynb"), "is a folder's name"),
    ],
)
def test_sweeps_that_are_refused(tmp_path, plan, message):
    begun = time.process_time()
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ValueError, match=message) as caught:
        expand(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value) and time.process_time() - begun < 5


def test_the_limit_can_be_raised(tmp_path, book, monkeypatch, capsys):
    plan = dict(notebook="n.ipynb", grid=dict(seed=list(range(12))))
    assert len(expand(plan, base=tmp_path, limit=12)) == 12 and LIMIT == 10_000
    with pytest.raises(ValueError, match="12 runs, more than 11; divide it, or allow more"):
        expand(plan, base=tmp_path, limit=11)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(plan))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--dry-run", "--limit", "3", "--root", str(tmp_path / "runs")]) == 2
    assert "more than 3" in capsys.readouterr().err


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.sampled_from(["n.ipynb", "$A", "{s}/x", "..", "s"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*STAGE, "stages", "seeds", "variables", "name", "s", "seed"]), inner, max_size=4
            )
        ),
        max_leaves=15,
    )
)
def test_any_sweep_is_specs_or_one_sentence(value):
    for plan in (
        {"notebook": "n.ipynb", "grid": value},
        {"stages": value},
        {"stages": {"s": value}},
        {"notebook": "n.ipynb", "seeds": value},
        value if isinstance(value, dict) else {},
    ):
        try:
            expand(plan)
        except (ValueError, TypeError, KeyError) as error:
            assert not isinstance(error, KeyError) and "\n" not in str(error), repr(error)


def test_values_lead_nowhere_else(tmp_path, book):
    "A reference stays in the run it names; a folder of runs that is a link is not written through."
    first = Spec(book)
    for value in ("{first}/../../secret", "{first}/a/../../x"):
        with pytest.raises(ValueError, match="leaves the folder of the run 'first'"):
            dict(Spec(book, dict(word=value), after=dict(first=first)).values)
    assert (
        Spec(book, dict(word="../x/{first}"), after=dict(first=first)).values["word"] == "../x/{first}"
    )  # a value like any other
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "n").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads outside .* by a link"):
        sweep([Spec(book)], tmp_path / "runs", stream=open("/dev/null", "w"))
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "runs" / "plan.json").exists()


@pytest.mark.parametrize(
    "word", ["../..", "/etc/passwd", "a/b", "a\\b", "C:x", "$(x)", "x" * 500, "{x}", "\u202e", "é"]
)
def test_no_value_names_a_folder(tmp_path, book, word):
    spec = Spec(book, dict(word=word))
    assert spec.folder(tmp_path) == tmp_path / "n" / spec.hash and len(spec.hash) == 16 and spec.hash.isalnum()


def test_many_runs_are_labelled_in_time(book):
    specs = expand(dict(notebook=str(book), grid=dict(seed=list(range(600)))))
    begun = time.process_time()
    assert tasks_of(specs)[7].label == "n seed=7" and time.process_time() - begun < 5


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"cells": 3}',
        '{"cells": [1]}',
        '{"cells": [{"cell_type": "code"}]}',
        '{"cells": [{"cell_type": "code", "source": 3}]}',
        '{"cells": [{"cell_type": "code", "source": [1]}]}',
        '{"cells": [{"cell_type": "code", "source": "x", "metadata": {"tags": 3}}]}',
        "[" * 100_000,
        "\0",
        '{"cells": [{"cell_type": "code", "source": "x", "metadata": []}]}',
    ],
)
def test_notebooks_that_are_none(tmp_path, content):
    (tmp_path / "n.ipynb").write_text(content)
    with pytest.raises(ValueError, match="is not a notebook"):
        read_notebook(tmp_path / "n.ipynb")


def test_parameters_that_a_record_cannot_keep(book):
    for value in ({1: 2}, {"a": {3}}, b"x", [float("nan")], "a\udcff", ["\0"]):
        with pytest.raises(ValueError, match="parameter thing of n.ipynb"):
            check_parameters(read_notebook(book), dict(thing=value), "n.ipynb")
    assert Parameter("p", "int", 0).parse("010") == 10
