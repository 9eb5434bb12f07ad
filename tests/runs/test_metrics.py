"""metrics.jsonl: cut back on resume, tolerant of a torn last line, replaced whole or not at all."""

import json
import stat

import pytest

from marginface.runs import metrics
from marginface.runs.files import write_atomically


def lines(path):
    return path.read_text().splitlines()


def writer(workdir, **kw):
    return metrics.Writer(workdir, total_steps=10, **{"resume_step": -1} | kw)


def test_lines_after_the_resumed_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = writer(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"loss/total": 1.0 / step})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "loss/to')
    second = writer(tmp_path, resume_step=2)
    second.write(3, {"loss/total": 7.0})
    second.close()
    assert [json.loads(x) for x in lines(path)] == [
        {"step": 1, "loss/total": 1.0},
        {"step": 2, "loss/total": 0.5},
        {"step": 3, "loss/total": 7.0},
    ]


@pytest.mark.parametrize("line", [b"broken", b"{}", b"17", b'{"step": "2"}', b'{"step": 2\xff}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl, line 2 is not a JSON object with a step"
    ):
        writer(tmp_path, resume_step=5)
    assert len(path.read_bytes().splitlines()) == 3


def test_floats_come_back_bit_for_bit(tmp_path):
    values = {"loss/a": 0.1 + 0.2, "loss/b": 1e-310, "loss/c": 16777217.0}
    log = writer(tmp_path)
    log.write(1, values)
    log.close()
    assert metrics.read_lines(tmp_path / "metrics.jsonl") == [{"step": 1} | values]


def test_a_silent_writer_writes_nothing(tmp_path):
    log = writer(tmp_path, active=False)
    log.write(1, {"loss/total": 1.0})
    log.advance(1)
    log.sync()
    log.close()
    assert not list(tmp_path.iterdir())


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    log = writer(tmp_path)
    log.write(4, {"loss/total": 1.25, "time/examples_per_s": 3.0})
    log.close()
    assert capsys.readouterr().out == "step 4/10  total 1.25\n"


def test_a_failed_replacement_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udc00")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & stat.S_IRUSR


def test_figures_that_are_not_finite_are_named():
    values = {"a": 1.0, "b": float("nan"), "c": float("inf")}
    assert metrics.not_finite(values) == "b, c not finite"
