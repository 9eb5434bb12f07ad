"""Runs that an earlier version began: the same command continues them, bit for bit."""

import json
import signal

import commands
import earlier
import pytest

pytestmark = pytest.mark.exhaustive

BEFORE_THE_WALLS = "c99b43f"  # the package was one room; its modules have moved since
STEPS = 200

SMALL = (
    *commands.SMALL[1:],
    f"--config.steps={STEPS}",
    "--config.log_every=1",
    "--config.evaluate.every=100",
    "--config.checkpoint_every=1000",
)
# What a checkpoint holds beside network, prototypes and optimizer.
EXPERIMENTS = {
    "sphereface2": (),  # the loss over classes learns a bias
    "center": (),  # a term remembers a center for each class
    "groupface": (  # a term remembers the use of the groups; the network has heads
        "--config.model.kw.backbone_kw.depth=4",
        "--config.model.kw.backbone_kw.width=0.0625",
        "--config.model.kw.feature_dim=16",
        "--config.model.kw.num_groups=3",
    ),
}


@pytest.fixture(autouse=True)
def compiled_as_users_do(monkeypatch):
    """Without the emitters of fusions, what else a program gives moves the last bit of a figure."""
    as_users_do = commands.COMPILE_QUICKLY.replace("emitters=false", "emitters=true")
    monkeypatch.setattr(commands, "COMPILE_QUICKLY", as_users_do)


def flags(name):
    """The command's arguments but for the run folder; a grouped network has no depth of its own."""
    small = [f for f in SMALL if not (EXPERIMENTS[name] and f.startswith("--config.model.kw."))]
    return [f"--config=experiments/{name}.py", *small, *EXPERIMENTS[name]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    return earlier.code_of(BEFORE_THE_WALLS, tmp_path_factory.mktemp("code"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_begun_by_an_earlier_version_is_continued_by_this_one(name, code, cache, tmp_path):
    workdir, alone = tmp_path / name, tmp_path / "alone" / name
    words = [*flags(name), f"--workdir={workdir}"]
    with earlier.version(code):
        commands.run(*flags(name), f"--workdir={alone}", cache=cache)
        exit_code, *_ = commands.interrupt(
            commands.start(*words, cache=cache), 12, number=signal.SIGTERM
        )
    assert exit_code == 75
    assert not (workdir / "summary.json").exists()
    begun = earlier.figures(workdir)
    assert 12 <= begun[-1]["step"] < STEPS
    assert "stopped by SIGTERM" in earlier.results(workdir)[1]

    out, _ = commands.run(*words, cache=cache)
    assert f"step {begun[-1]['step']}/{STEPS}  " not in out, "it began anew"
    assert f"step {STEPS}/{STEPS}  " in out
    continued = earlier.figures(workdir)
    assert continued[: len(begun)] == begun
    assert continued == earlier.figures(alone)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, alone)]
    ours, theirs = ({k: v for k, v in s.items() if "/" in k} for s in summaries)
    differing = {key for key in theirs if ours[key] != theirs[key]}
    assert all(key.startswith("time/") for key in differing), differing

    lines = (workdir / "metrics.jsonl").read_bytes()
    out, _ = commands.run(*words, cache=cache)
    assert f"/{STEPS}  " not in out, "it is complete: no step is trained"
    assert (workdir / "metrics.jsonl").read_bytes() == lines
    table, beside = earlier.results(workdir)
    assert name in table
    assert not beside
