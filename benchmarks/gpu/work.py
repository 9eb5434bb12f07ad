"""The process that answers: python -m benchmarks.gpu.work MODULE TODO, or probe.

TODO is JSON: {"smoke": ..., "todo": [[question, contender, case's number], ...]}. Each case is
announced on standard output and answered there, a JSON object a line; all else goes to standard
error. Behind a case that failed the process ends: the next one might fail because of that. It ends
too when its standard input does, for then nobody reads its answers.
"""

import gc
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


def probe() -> dict[str, str]:
    """What computes here."""
    import jax

    from benchmarks import common

    return {
        "backend": jax.default_backend(),
        "device": common.device(),
        "versions": common.versions(),
    }


def answer(contender: Any, case: Any) -> dict[str, Any]:
    """An answer or the reason why there is none, ready for JSON."""
    from benchmarks.gpu.question import AbsentError

    try:
        found = contender.answer(case)._asdict()
        return {**found, "figures": dict(found["figures"]), "state": "answered"}
    except AbsentError as error:
        return {"state": "skipped", "reason": _line(error)}
    except Exception as error:
        traceback.print_exc()
        if any(word in str(error) for word in _OUT_OF_MEMORY):
            return {"state": "does not fit", "reason": "out of memory"}
        return {"state": "failed", "reason": _line(error)}


def _line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return first if type(error).__name__ == "AbsentError" else f"{type(error).__name__}: {first}"


def _free() -> None:
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end_with_the_queue() -> None:
    sys.stdin.buffer.read()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Answers case after case."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value: Any) -> None:
        print(json.dumps(value), file=lines, flush=True)

    threading.Thread(target=_end_with_the_queue, daemon=True).start()
    if sys.argv[1] == "probe":
        say(probe())
        return
    todo = json.loads(sys.argv[2])
    questions = {q.name: q for q in importlib.import_module(sys.argv[1]).QUESTIONS}
    if "jax" in sys.modules:
        from benchmarks.gpu import timing

        timing.smoke = todo["smoke"]
    for name, who, number in todo["todo"]:
        contender = next(c for c in questions[name].contenders if c.name == who)
        case = (contender.smoke if todo["smoke"] else contender.cases)[number]
        say({"begin": [name, who, number]})
        given = answer(contender, case)
        say(given)
        if given["state"] == "failed":
            return
        _free()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the thread that watches standard input has no end
