"""Sixteen units of a sweep as one program, beside one after the other."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks import sweep as beside
from benchmarks.gpu.question import OURS, Answer, Case, Contender, Held, Question, Remark, answered

UNITS = 16
_NEEDS = ("ml_collections", "grain", "simplejpeg", "cv2", "matplotlib", "tqdm")
_ONE = ("--filter", "m=0.3", "weight=1")
_TWO = ("--filter", "m=0.3,0.5", "weight=1")


def _options(case: Case) -> list[str]:
    return [f"--config.steps={case['steps']}"] if "steps" in case else []


def together(case: Case) -> Answer:
    """--backend vmap: the whole command."""
    units = () if case["units"] == UNITS else _TWO
    return Answer(beside.seconds("vmap", {}, [*units, *_options(case)]))


def alone(case: Case) -> Answer:
    """One unit by a command of its own, times their number: each compiles for itself."""
    without = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    one = beside.seconds("local", without, [*_ONE, *_options(case)])
    return Answer(one * case["units"], note=f"{one:.3g} s for one unit")


def compiled_once(case: Case) -> Answer:
    """One unit and two units: what the second adds, times the number of those after the first."""
    one = beside.seconds("local", {}, [*_ONE, *_options(case)])
    two = beside.seconds("local", {}, [*_TWO, *_options(case)])
    note = f"{one:.3g} s for one unit, {two:.3g} s for two"
    return Answer(one + (case["units"] - 1) * max(two - one, 0.0), note=note)


def _goal(answers: Sequence[Held], _: Mapping[str, float]) -> Iterator[Remark]:
    ours = answered(answers, OURS, units=UNITS)
    for theirs in answered(answers, units=UNITS):
        if ours and theirs["contender"] != OURS:
            ratio = theirs["seconds"] / ours[0]["seconds"]
            yield Remark(f"{ratio:.2f} × {theirs['contender']} (goal 8)")


_FULL, _TINY = [{"units": UNITS}], [{"units": 2, "steps": 2}]
SWEEP = Question(
    "sweep",
    "A sweep of 16 tiny units as one program, beside one after the other; whole commands.",
    240.0,
    [
        Contender(OURS, together, _FULL, _TINY, _NEEDS, "sweep"),
        Contender("one after the other", alone, _FULL, _TINY, _NEEDS, "sweep"),
        Contender("one after the other, compiled once", compiled_once, _FULL, [], _NEEDS, "sweep"),
    ],
    ("units",),
    _goal,
)
