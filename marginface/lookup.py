"""Names that users give, looked up with help for typos; arguments checked against signatures."""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType


def nearest(word: str, known: Iterable[str]) -> str:
    """Ends an error message: the nearest known word, then all of them (of many, the nearest)."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(known) > 20:
        near = difflib.get_close_matches(word, known, n=6, cutoff=0.0)
        return f"{hint}known: {', '.join(near)} and {len(known) - len(near)} more"
    return f"{hint}known: {', '.join(known)}"


def find_function(
    module: ModuleType, name: str, key: str, but_not: tuple[str, ...] = ()
) -> Callable:
    """The public function `name` that `module` defines; `key` is where the config names it.

    `but_not` are endings of names that are no choice here.

    Raises:
      ValueError: no such function; lists those there are.
    """
    known = {
        n: f
        for n, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__
        if not n.startswith("_") and not n.endswith(but_not)
    }
    if name not in known:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, known)}")
    return known[name]


def find_module(package: ModuleType, name: str, attribute: str, key: str) -> ModuleType:
    """The module `name` of `package` that defines `attribute` (a model's Model, a reader's load).

    Raises:
      ValueError: no such module; lists those there are.
    """
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
        except ImportError:  # a reader whose library is not installed
            if info.name == name:
                raise
            continue
        if hasattr(module, attribute):
            found[info.name] = module
    if name not in found:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, found)}")
    return found[name]


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
