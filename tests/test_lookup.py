"""Names that users give: found in tables, packages and their own code, mistakes in one line."""

import dataclasses
import os
import re
import subprocess
import sys

import cloudpickle
import pytest

from marginface import lookup, models
from marginface.data import readers

OWN = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Pair:
    left: int
    right: dataclasses.InitVar[int]

    def __post_init__(self, right): self.both = self.left + right

def twice(x): return 2 * x

LOSSES = {"twice": "the row of the table", "alone": 3}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms" / "own.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("where", ["rooms/own.py", "{here}/rooms/own.py", "rooms.own"])
def test_what_a_user_wrote_is_found_from_the_working_directory_on(where, tmp_path):
    where = where.format(here=tmp_path)
    assert lookup.from_path(f"{where}:twice", "loss.name")(4) == 8
    assert lookup.from_path(f"{where}:Pair", "loss.name")(1, 2).both == 3
    assert lookup.from_path(f"{where}:twice", "k") is lookup.from_path(f"{where}:twice", "k")
    assert lookup.from_path(f"{where}:twice", "k", table="LOSSES") == "the row of the table"
    assert lookup.from_path(f"{where}:alone", "k", table="LOSSES") == 3
    assert lookup.from_path(f"{where}:twice", "k", table="MARGINS")(1) == 2
    sys.modules.pop("rooms.own", None), sys.modules.pop("rooms", None)


def test_a_file_that_changes_is_run_again():
    assert lookup.from_path("rooms/own.py:twice", "k")(4) == 8
    with open("rooms/own.py", "a") as file:
        file.write("def twice(x): return 3 * x\n")
    assert lookup.from_path("rooms/own.py:twice", "k")(4) == 12


def test_worker_processes_get_what_is_in_a_file_by_value(tmp_path):
    pair = lookup.from_path("rooms/own.py:Pair", "k")(1, 2)
    assert dataclasses.is_dataclass(pair)
    (tmp_path / "pickled").write_bytes(cloudpickle.dumps(pair))
    program = "import pickle; print(pickle.load(open('pickled', 'rb')).both)"
    os.remove("rooms/own.py")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rooms/on.py:twice", OWN, "no such file; did you mean 'own.py'?"),
        ("room/own.py:twice", OWN, "no such file; no Python file in room"),
        ("rooms/own.py:twise", OWN, "has no 'twise'; did you mean 'twice'?"),
        ("rooms/own.py:", OWN, "rooms/own.py has no ''; known: Pair, twice"),
        ("rooms/own.py:x", "import os", "rooms/own.py has no 'x'; it defines nothing"),
        ("rooms/own.py:x", "a = 1\nb = (", "own.py, line 2: SyntaxError: '(' was never closed"),
        ("rooms/own.py:x", "a = 1\nb = c", "line 2: NameError: name 'c' is not defined"),
        (
            "rooms/own.py:x",
            "import nothing_like_it",
            "line 1: ModuleNotFoundError: ",
        ),
        ("rooms/own.py:x", "open('absent')", "line 1: FileNotFoundError: "),
        ("rooms/own.py:x", "raise ValueError('a\\nb')", "line 1: ValueError: a b"),
        ("rooms/own.py:x", "\0", "SyntaxError: source code string cannot contain null bytes"),
        ("rooms.own_:twice", OWN, "ModuleNotFoundError: No module named 'rooms.own_'"),
        (":twice", OWN, "ValueError: Empty module name"),
        ("..rooms:twice", OWN, "TypeError: the 'package' argument is required"),
    ],
)
def test_a_mistake_in_what_a_user_wrote_ends_in_one_line(name, text, message, tmp_path):
    (tmp_path / "rooms" / "own.py").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        lookup.from_path(name, "loss.name")
    assert str(error.value).startswith(f"loss.name={name!r}: ")
    assert "\n" not in str(error.value)


def test_only_the_module_asked_for_is_imported():
    program = (
        "import sys\n"
        "from marginface import lookup\n"
        "from marginface.data import readers\n"
        "lookup.find_module(readers, 'synthetic', 'load', 'data.name')\n"
        "print(*(m for m in ('cv2', 'simplejpeg', 'grain') if m in sys.modules))\n"
        "print('marginface.data.readers.lfw' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "\nFalse\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("package", "name", "attribute", "hint"),
    [
        (readers, "syntetic", "load", "did you mean 'synthetic'? known: folder, lfw, synthetic"),
        (models, "layers", "Model", "known: group_head, iresnet, sphereface"),
        (models, "../models/iresnet", "Model", "known: group_head, iresnet, sphereface"),
        (models, "", "Model", "known: group_head, iresnet, sphereface"),
    ],
)
def test_an_unknown_module_is_named_beside_those_there_are(package, name, attribute, hint):
    with pytest.raises(ValueError, match=re.escape(hint) + "$") as error:
        lookup.find_module(package, name, attribute, "a.b")
    assert str(error.value).startswith(f"a.b={name!r} is unknown; ")


def test_a_table_s_entry_or_the_nearest():
    table = {"center": 1, "intra": 2}
    assert lookup.find(table, "intra", "joint") == 2
    with pytest.raises(ValueError, match=r"joint='intr' is unknown; did you mean 'intra'\? known:"):
        lookup.find(table, "intr", "joint")
