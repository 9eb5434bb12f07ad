"""Names that users give, looked up with help for typos; arguments checked against signatures."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any


def nearest(word: str, known: Iterable[str]) -> str:
    """Ends an error message: the nearest known word, then all of them (of many, the nearest)."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(known) > 20:
        near = difflib.get_close_matches(word, known, n=6, cutoff=0.0)
        return f"{hint}known: {', '.join(near)} and {len(known) - len(near)} more"
    return f"{hint}known: {', '.join(known)}"


def is_own(name: str) -> bool:
    """Whether a name is one of the user's own: "path/to/file.py:name" or "package.module:name"."""
    return ":" in name


def own(name: str, key: str) -> Any:
    """What the user's own module defines: "path/to/file.py:name" or "package.module:name".

    Args:
      name: the file, from the working directory on, or a module that Python finds; and the name.
      key: where the config names it.

    Raises:
      ValueError: no such file, module or name, or a file that is not Python; one line.
    """
    where, _, attribute = name.rpartition(":")
    module = _file(where, key) if where.endswith(".py") else _module(where, key)
    if not hasattr(module, attribute):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(
            f"{key}={name!r}: {where} has no {attribute!r}; {nearest(attribute, known)}"
        )
    return getattr(module, attribute)


@functools.lru_cache(maxsize=64)
def _file(where: str, key: str) -> ModuleType:
    """The module in a file, once for a process: what it defines stays the same object."""
    path = pathlib.Path(where)
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {where}: give its path from {path.cwd()} on")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the name ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's lines raise
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        kind, text = type(error).__name__, " ".join(str(error).split())
        raise ValueError(f"{key}: {where}{line} cannot be imported: {kind}: {text}") from error
    return module


def _module(where: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"{key}: the module {where!r} cannot be imported: {error}") from error


def find_in(table: Mapping[str, Any], name: str, key: str) -> Any:
    """The entry `name` of a table, or the user's own, see `own`.

    Raises:
      ValueError: no such entry; lists those there are.
    """
    if is_own(name):
        return own(name, key)
    if name not in table:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, table)}")
    return table[name]


def find_attribute(package: ModuleType, name: str, attribute: str, key: str) -> Any:
    """`attribute` of the module `name` of `package` (a model's Model, a reader's load), or the
    user's own, see `own`. No other module of the package is imported.

    Raises:
      ValueError: no such module; lists those there are.
    """
    if is_own(name):
        return own(name, key)
    defines = re.compile(rf"^(class|def) {attribute}\b", re.MULTILINE)
    files = [file for folder in package.__path__ for file in pathlib.Path(folder).glob("*.py")]
    known = [f.stem for f in files if defines.search(f.read_text(encoding="utf-8"))]
    if name not in known:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, known)}")
    return getattr(importlib.import_module(f"{package.__name__}.{name}"), attribute)


def check_arguments(
    function: Callable, kwargs: Iterable[str], key: str, given: Iterable[str] = ()
) -> None:
    """Raises a one-line ValueError unless `kwargs` are exactly what `function` still asks for.

    `given` are arguments that it gets from elsewhere.
    """
    parameters = {
        n: p for n, p in inspect.signature(function).parameters.items() if p.kind == p.KEYWORD_ONLY
    }
    called, given = getattr(function, "__name__", "the function"), set(given)
    for name in kwargs:
        if name not in parameters or name in given:
            known = parameters.keys() - given
            hint = nearest(name, known) if known else "it takes none"
            raise ValueError(f"{key}.{name} is not an argument of {called}; {hint}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in kwargs and name not in given:
            raise ValueError(f"{key}.{name} is missing: {called} needs it")
