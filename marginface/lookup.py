"""Names that users give, looked up with help for typos; arguments checked against signatures."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import symtable
import sys
import traceback
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


def find(table: Mapping[str, Any], name: str, key: str) -> Any:
    """The entry `name` of a table; `key` is where the config names it.

    Raises:
      ValueError: no such entry; lists those there are.
    """
    if name not in table:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, table)}")
    return table[name]


def find_module(package: ModuleType, name: str, attribute: str, key: str) -> ModuleType:
    """The module `name` of `package` that defines `attribute` (a model's Model, a reader's load).

    No other module is imported: one may need a library that is not installed.

    Raises:
      ValueError: no such module; lists those there are.
    """
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    known = [n for n in names if _defines(f"{package.__name__}.{n}", attribute)]
    if name not in known:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, known)}")
    return importlib.import_module(f"{package.__name__}.{name}")


def _defines(module: str, attribute: str) -> bool:
    """Whether a module has such a name, told without running it."""
    spec = importlib.util.find_spec(module)
    source = pathlib.Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    symbols = symtable.symtable(source, module, "exec").get_symbols()
    return any(s.get_name() == attribute and (s.is_assigned() or s.is_imported()) for s in symbols)


def is_path(name: str) -> bool:
    """Whether a name says where to find what it means, as `from_path` takes it."""
    return ":" in name


def from_path(name: str, key: str, table: str = "") -> Any:
    """What a user's own code defines: "path/to/file.py:name" or "package.module:name".

    A path is relative to the working directory, from which modules are found, too. A file is run
    once in a process, and again when it has changed.

    Args:
      name: where it is.
      key: where the config names it.
      table: a dict that the module may have, whose entry `name` then comes before all else.

    Raises:
      ValueError: no such file, module or name, or code that cannot be run: one line.
    """
    where, _, wanted = name.rpartition(":")
    path, is_file = pathlib.Path(where), where.endswith(".py")
    if is_file and not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"no Python file in {path.parent}"
        raise ValueError(f"{key}={name!r}: no such file; {hint}")
    try:
        module = _run(path.resolve(), path.read_bytes()) if is_file else _import(where)
    except Exception as error:
        raise ValueError(f"{key}={name!r}: {_where(error, path)}{_what(error)}") from error
    entries = getattr(module, table, {}) if table else {}
    if wanted in entries:
        return entries[wanted]
    if not hasattr(module, wanted):
        own = {n for n, v in vars(module).items() if getattr(v, "__module__", 0) == module.__name__}
        hint = nearest(wanted, known) if (known := own.union(entries)) else "it defines nothing"
        raise ValueError(f"{key}={name!r}: {where} has no {wanted!r}; {hint}")
    return getattr(module, wanted)


@functools.lru_cache(maxsize=64)
def _run(path: pathlib.Path, source: bytes) -> ModuleType:
    module = ModuleType(str(path))
    module.__file__ = str(path)
    code = compile(source, path, "exec")
    # Dataclasses look their module up while they are made. It does not stay: worker processes then
    # get what is in it by value, as they could not import it.
    sys.modules[module.__name__] = module
    try:
        exec(code, vars(module))
    finally:
        del sys.modules[module.__name__]
    return module


def _import(where: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # a console script has its own folder there
        sys.path.append(os.getcwd())
    return importlib.import_module(where)


def _where(error: Exception, path: pathlib.Path) -> str:
    """ "file, line 3: " where that is known."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path.resolve())]
    return f"line {lines[-1]}: " if lines else ""


def _what(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"


def check_arguments(
    function: Callable,
    kwargs: Iterable[str],
    key: str,
    given: Iterable[str] = (),
    *,
    by_name: bool = False,
) -> None:
    """Raises a one-line ValueError unless `kwargs` are exactly what `function` still asks for.

    `given` are arguments that it gets from elsewhere. So are, unless it is called `by_name`, all
    that may be given by position.
    """
    parameters = {
        n: p
        for n, p in inspect.signature(function).parameters.items()
        if p.kind == p.KEYWORD_ONLY or (by_name and p.kind == p.POSITIONAL_OR_KEYWORD)
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
