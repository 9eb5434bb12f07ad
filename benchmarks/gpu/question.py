"""What a question is: its contenders, the cases of each, and what an answer holds."""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

OURS = "ours"

Case = Mapping[str, Any]
Held = dict[str, Any]  # an answer as it lies in a question's JSON file


class AbsentError(Exception):
    """A case cannot be asked here; its text is the reason."""


class Answer(NamedTuple):
    """What one case of one contender gives.

    Attributes:
        seconds: median of one unit of work; None where there is nothing to time.
        mib: device memory that it needs at its peak.
        flops: floating-point operations of a unit that no form can do without.
        precision: of similarity.PRECISIONS, whose measured peak they are compared with; "" none.
        bytes: moved by a unit, where that is what bounds it.
        images: of a unit.
        note: a few words more.
        figures: further numbers, by name.
    """

    seconds: float | None
    mib: float | None = None
    flops: float = 0.0
    precision: str = ""
    bytes: float = 0.0
    images: float = 0.0
    note: str = ""
    figures: Mapping[str, float] = types.MappingProxyType({})


class Contender(NamedTuple):
    """Who answers, in a process of its own.

    Attributes:
        name: OURS or the peer's name.
        answer: measures a case.
        cases: settings, the most valuable first.
        smoke: those of --smoke.
        needs: modules without which it is skipped.
        kind: contenders of one kind and environment share a process in --smoke.
        environment: variables of its process.
    """

    name: str
    answer: Callable[[Case], Answer]
    cases: Sequence[Case]
    smoke: Sequence[Case]
    needs: Sequence[str] = ()
    kind: str = "jax"
    environment: Mapping[str, str] = types.MappingProxyType({})


class Remark(NamedTuple):
    """A line on a question's answers; not `good` where they are wrong."""

    text: str
    good: bool = True


class Question(NamedTuple):
    """What is asked.

    Attributes:
        name: for --only and for its file.
        asks: one line.
        limit: seconds for all its contenders together.
        contenders: ours first.
        same: the keys of a case in which ours must agree with a peer's to be compared with it.
        remarks: (answers, peaks by precision in FLOP/s) → what is to be said of them.
    """

    name: str
    asks: str
    limit: float
    contenders: Sequence[Contender]
    same: Sequence[str] = ()
    remarks: Callable[[Sequence[Held], Mapping[str, float]], Iterable[Remark]] = lambda *_: ()


def text(case: Case) -> str:
    """A case as tables and CSV rows name it."""
    return " ".join(f"{key}={value}" for key, value in case.items())


def words(case: str) -> dict[str, str]:
    """The keys and values of such a text."""
    return dict(word.split("=", 1) for word in case.split(" ") if "=" in word)


def answered(answers: Iterable[Held], contender: str = "", **wanted: Any) -> list[Held]:
    """Those with a time, of a contender, whose case has the wanted values."""
    return [
        a
        for a in answers
        if a.get("seconds")
        and (not contender or a["contender"] == contender)
        and all(words(a["case"]).get(k) == str(v) for k, v in wanted.items())
    ]


def fastest(answers: Iterable[Held], contender: str = "", **wanted: Any) -> Held | None:
    """The quickest of `answered`, None where there is none."""
    found = answered(answers, contender, **wanted)
    return min(found, key=lambda a: a["seconds"]) if found else None


def others(answers: Iterable[Held]) -> list[Held]:
    """The answers of those who are not ours."""
    return [a for a in answers if a["contender"] != OURS]
