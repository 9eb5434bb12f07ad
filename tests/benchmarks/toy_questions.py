"""Questions for the tests of the queue: each case says what its process does."""

import os
import pathlib
import time

from benchmarks.gpu.question import OURS, AbsentError, Answer, Contender, Question, Remark


def answer(case):
    log = pathlib.Path(os.environ["TOY_LOG"])
    with log.open("a") as file:
        file.write(f"{case['do']} {case['n']} {os.getpid()}\n")
    fine = "TOY_FINE" in os.environ
    match case["do"]:
        case "fail" if not fine:
            raise ValueError("no such thing\nand more")
        case "crash" if not fine:
            os._exit(3)
        case "wait" if not fine:
            time.sleep(60)
        case "large":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        case "absent":
            raise AbsentError("its data is not here")
    return Answer(0.5 * case["n"], mib=7.0, flops=1e12, precision="tf32", figures={"loss": 2.5})


def case(do, n=1):
    return {"do": do, "n": n}


def question(name, *cases, limit=20.0, peers=(), **kw):
    return Question(
        name,
        f"What is {name}?",
        limit,
        [Contender(OURS, answer, cases, cases), *peers],
        **kw,
    )


def product(_):
    return Answer(1.0)


PRODUCT = {"what": "product", "m": 100, "k": 50, "n": 10**9, "precision": "tf32"}
QUESTIONS = (
    Question("ceilings", "The peak.", 20.0, [Contender(OURS, product, [PRODUCT], [PRODUCT])]),
    question(
        "plain",
        case("answer", 1),
        case("answer", 2),
        peers=[
            Contender("peer", answer, [case("answer", 3)], [], kind="peer"),
            Contender("none", answer, [case("answer", 4)], [case("answer", 4)], ("no_such_one",)),
        ],
        same=("do",),
    ),
    question("failing", case("fail"), case("large"), case("answer")),
    question("crashing", case("crash"), case("answer")),
    question("waiting", case("answer"), case("wait"), case("answer", 2), limit=6.0),
    question("absent", case("absent")),
    question("wrong", case("answer"), remarks=lambda *_: [Remark("three is not four", good=False)]),
    question("last", case("answer")),
)
