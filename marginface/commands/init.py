"""marginface init [FOLDER]

Copies the experiments that come with marginface, with the common.py that they share, into a folder
(default: experiments), for editing. It writes over no file.

    marginface init && marginface train --config experiments/arcface.py:data=small

Exit codes: 0 done; 2 a file of one of the names is there, or the folder cannot be written.
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import NoReturn

from marginface import command
from marginface import config as configs
from marginface.command import Parser


def run(argv: Sequence[str]) -> None:
    """Copies as `argv` (without the command's name) says.

    Raises:
        ValueError: a file of one of the names is there; nothing is written.
        OSError: the folder cannot be written.
    """
    parser = Parser("marginface init", __doc__)
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default="experiments")
    folder = parser.parse_args(argv).folder
    files = sorted(configs.PACKAGED.glob("*.py"))
    if there := [file.name for file in files if (folder / file.name).exists()]:
        raise ValueError(f"{folder / there[0]} is there: give a folder without {there[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    print(f"{len(files)} files in {folder}: marginface train --config {folder}/arcface.py")


def main(argv: Sequence[str]) -> NoReturn:
    """The command."""
    command.main(run, "marginface", argv)
