"""What a person sees while a sweep lasts."""

import json

import tiny_sweep

from marginface.launch import units
from marginface.launch.engines import board


def found(tmp_path):
    path = tiny_sweep.write(tmp_path, margins=(0.0, 0.1, 0.2, 0.3, 0.4), weights=(0.0, 1.0))
    return units.expand(path, root=tmp_path / "runs")


def end(unit, code=None):
    unit.folder.mkdir(parents=True, exist_ok=True)
    (unit.folder / "config.json").write_text("{}")
    if code is None:
        (unit.folder / "summary.json").write_text('{"a": 1.0}')
    else:
        text = json.dumps({"code": code, "message": "step 3: loss/total not finite"})
        (unit.folder / "stopped.json").write_text(text)


def test_elsewhere_each_event_is_a_line(tmp_path, capsys):
    many = found(tmp_path)
    shown = board.Board(many)
    for unit in many[:2]:
        shown.started(unit)
    end(many[0])
    shown.ended(many[0])
    end(many[1], 75)
    shown.ended(many[1], again=True)
    shown.started(many[1])
    end(many[1], 3)
    shown.ended(many[1])
    shown.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{many[0].name}: done (step 0)  [done 1 · running 1 · failed 0 · ")
    assert "checkpointed, will be continued" in lines[1]
    assert lines[2].startswith(f"{many[1].name}: diverged, step 3: loss/total not finite")
    assert lines[-1].startswith("done 1 · running 0 · failed 1 · waiting 8 · about ")


def test_on_a_terminal_the_table_is_drawn_again_in_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    many = found(tmp_path)
    shown = board.Board(many)
    for unit in many[:8]:
        shown.started(unit)
    shown.show()
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert lines[0] == "done 0 · running 8 · failed 0 · waiting 2"
    assert len(lines) == 1 + 6 + 1
    assert lines[-1] == "  and 2 more"
    assert max(map(len, lines)) < 60
    shown.show()  # within the second
    assert capsys.readouterr().out == ""
    end(many[0])
    shown.ended(many[0])
    assert capsys.readouterr().out.startswith("\033[8A\033[J" + many[0].name)
