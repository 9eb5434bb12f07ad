"""What each engine would be sent: golden files, quoting, and the engines' own offline checks."""

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny_sweep
import yaml

from marginface.launch import engines, search, sweep, units
from marginface.launch.engines import cloud, kubernetes, slurm
from marginface.launch.units import Unit

GOLDEN = pathlib.Path(__file__).parent / "golden"
ENGINES = {
    "slurm": (slurm, "--slurm_nodes 2 --slurm_partition low --slurm_set qos=night"),
    "sky": (cloud, "--tpu_bucket gs://my-bucket/faces"),
    "sky_gpu": (
        cloud,
        "--tpu_bucket gs://my-bucket --tpu_accelerator A100:8 --no-tpu_spot"
        " --tpu_region us-central1",
    ),
    "gcloud": (
        cloud,
        "--tpu_engine gcloud --tpu_bucket gs://my-bucket/faces --tpu_zone us-central1-a"
        " --tpu_project my-project --tpu_accelerator tpu-v5p-32",
    ),
    "k8s": (
        kubernetes,
        "--k8s_cluster my-cluster --k8s_project my-project --k8s_zone us-central1-a"
        " --k8s_storage my-runs --k8s_accelerator tpu-v5e-16",
    ),
}
HOSTILE = 'it\'s a "face"; touch pwned $(touch pwned) `touch pwned` * \\ #'


def parsed(module, text):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(text.split())


def render(engine, chosen):
    module, text = ENGINES[engine]
    if module is slurm:
        pytest.importorskip("submitit", reason="pip install marginface[slurm]")
    return module.render(chosen, parsed(module, text))


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two units, with paths as they are for a user in the checkout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    tiny_sweep.write(tmp_path, margins=(0.3,), weights=(1.0,))
    return units.expand("tiny.py", root=pathlib.Path("runs"), seeds=2)


@pytest.fixture
def hostile():
    """A unit whose value is code if it is not quoted."""
    overrides = {"data.kw.root": HOSTILE, "seed": 0}
    return Unit("root=x,seed=0", "tiny.py", overrides, None, pathlib.Path("runs/ti ny/root=x"))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes stand-ins for programs: name → body of a bash script; `calls` reads what they got."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    note = (
        "import json, sys; print(json.dumps(sys.argv[1:]), file=open(sys.argv.pop(1) + '.calls',"
        " 'a'))"
    )

    def make(**bodies):
        for name, body in bodies.items():
            path = folder / name
            writes = shlex.join([sys.executable, "-c", note, str(path)])
            path.write_text(f'#!/bin/bash\n{writes} "$@"\n{body}\n')
            path.chmod(0o755)

    def calls(name):
        lines = (folder / f"{name}.calls").read_text().splitlines()
        return [json.loads(line)[1:] for line in lines]

    make.calls = calls
    return make


def bash(*words, code=0, **more):
    done = subprocess.run(["bash", *words], capture_output=True, text=True, timeout=60, **more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_sent_is_what_it_was(engine, two):
    files = render(engine, two)
    folder = GOLDEN / engine
    if os.environ.get("MARGINFACE_NEW_GOLDEN"):
        shutil.rmtree(folder, ignore_errors=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    golden = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert files == golden, (
        "if this is wanted: MARGINFACE_NEW_GOLDEN=1 pytest tests/launch/test_engines.py"
    )


@pytest.mark.parametrize("script", sorted(GOLDEN.rglob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_bash(script):
    bash("-n", str(script))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_units_is_nothing_to_send(engine):
    assert render(engine, []) == {}


def check_command(programs, unit, folder):
    """The stand-in for Python was called with exactly the unit's command."""
    expected = unit._replace(folder=folder).command()[1:]
    (got,) = programs.calls("python")
    assert got[: len(expected)] == expected
    assert got[len(expected) :] in ([], ["--coordinator", "auto"])
    assert f"--config.data.kw.root={HOSTILE}" in got
    assert not pathlib.Path("pwned").exists()


def test_slurm_keeps_a_hostile_value_one_word(hostile, programs):
    programs(python="")
    files = render("slurm", [hostile])
    bash("-c", files["ti ny/slurm/0.sh"])
    check_command(programs, hostile, hostile.folder)
    programs(srun='"${@:3}"')
    for name, text in files.items():
        path = pathlib.Path("runs", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"}
    bash("runs/ti ny/slurm/array.sh", env=environment)
    assert programs.calls("srun")[0][-2:] == ["bash", "runs/ti ny/slurm/0.sh"]


def test_sky_keeps_a_hostile_value_one_word(hostile, programs):
    programs(python="")
    (text,) = render("sky", [hostile]).values()
    task = yaml.safe_load(text)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    bash("-c", task["run"])
    check_command(programs, hostile, pathlib.Path("/runs/ti ny/root=x,seed=0"))


def test_gcloud_keeps_a_hostile_value_one_word(hostile, programs):
    programs(python="", python3="", sudo="", gcsfuse="", mountpoint="", tar="")
    files = render("gcloud", [hostile])
    (remote,) = [text for name, text in files.items() if name.endswith("-remote.sh")]
    bash("-c", remote)
    os.chdir("..")
    check_command(programs, hostile, pathlib.Path("/runs/ti ny/root=x,seed=0"))


def test_k8s_keeps_a_hostile_value_one_word(hostile, programs):
    programs(python="", pip="", xpk="")
    (text,) = render("k8s", [hostile]).values()
    bash("-c", text)
    (words,) = programs.calls("xpk")
    (command,) = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    bash("-c", command)
    check_command(programs, hostile, pathlib.Path("/runs/ti ny/root=x,seed=0"))


@pytest.mark.parametrize(
    ("code", "times", "final"),
    [(0, 1, 0), (2, 1, 2), (3, 1, 3), (75, 1, 75), (137, 4, 137)],
)
def test_a_crash_is_tried_again_on_the_same_machine(two, programs, code, times, final):
    programs(python=f"exit {code}")
    task = yaml.safe_load(render("sky", two[:1]).popitem()[1])
    bash("-c", task["run"], code=final)
    assert len(programs.calls("python")) == times


@pytest.mark.parametrize(
    ("code", "requeued", "crashes"), [(0, 0, 0), (2, 0, 0), (3, 0, 0), (75, 6, 0), (137, 3, 4)]
)
def test_slurm_requeues_what_may_end_well_and_crashes_only_so_often(
    two, programs, code, requeued, crashes
):
    programs(srun=f"exit {code}", scontrol="")
    pathlib.Path("runs/tiny/slurm").mkdir(parents=True)
    script = render("slurm", two)["tiny/slurm/array.sh"]
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"}
    for _ in range(6 if code == 75 else 4):
        bash("-c", script, code=code, env=environment)
    if requeued:
        assert programs.calls("scontrol") == [["requeue", "7_1"]] * requeued
    if crashes:
        lines = pathlib.Path("runs/tiny/slurm/7_1.crashes").read_text().splitlines()
        assert lines == [f"exit code {code}"] * crashes


# A stand-in that keeps the TPU's state in a file, and plays the codes of $CODES one by one.
GCLOUD = """
case "$*" in
  *" create "*) echo ACTIVE > state ;;
  *" delete "*) rm state ;;
  *describe*) cat state 2> /dev/null || { echo "ERROR: NOT_FOUND: no such TPU" >&2; exit 1; } ;;
  *ssh*)
    read -r code rest <<< "$(cat codes)"
    echo "$rest" > codes
    [ "$code" != 255 ] || echo SUSPENDED > state
    exit "$code"
    ;;
esac
"""


@pytest.mark.parametrize(
    ("codes", "machines", "code"),
    [("0", 1, 0), ("255 75 0", 3, 0), ("2", 1, 2), ("255 3", 2, 3), ("137", 1, 137)],
)
def test_a_preempted_tpu_is_deleted_and_made_anew(two, programs, codes, machines, code):
    programs(gcloud=GCLOUD, git="")
    pathlib.Path("codes").write_text(codes)
    pathlib.Path("marginface").mkdir()
    name, script = next(iter(render("gcloud", two).items()))
    path = pathlib.Path("runs", name)
    path.parent.mkdir(parents=True)
    path.write_text(script)
    bash(str(path), code=code, env=os.environ | {"POLL_SECONDS": "0"})
    made = [words[3] for words in programs.calls("gcloud") if words[3] in ("create", "delete")]
    assert made == ["create", "delete"] * machines
    fetched = [words for words in programs.calls("gcloud") if words[0] == "storage"]
    assert len(fetched) == 1  # of a failed run too: what it says of its end


def test_a_tpu_whose_state_nobody_can_tell_is_not_taken_for_gone(two, programs):
    programs(gcloud='echo "ERROR: login expired" >&2; exit 1', git="")
    name, script = next(iter(render("gcloud", two).items()))
    path = pathlib.Path("runs", name)
    path.parent.mkdir(parents=True)
    path.write_text(script)
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not deleted and may cost money" in done.stderr
    assert not any("create" in words for words in programs.calls("gcloud"))


@pytest.mark.exhaustive
def test_what_gcloud_is_told_passes_its_parser(two, programs, tmp_path):
    gcloud = shutil.which("gcloud")
    if not gcloud:
        pytest.skip("gcloud is not installed")
    programs(gcloud=GCLOUD, git="")
    pathlib.Path("codes").write_text("255 0")
    name, script = next(iter(render("gcloud", two).items()))
    path = pathlib.Path("runs", name)
    path.parent.mkdir(parents=True)
    path.write_text(script)
    bash(str(path), env=os.environ | {"POLL_SECONDS": "0"})
    # Without an account gcloud stops, but only after it has read its arguments.
    environment = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path / "nobody"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    told = {tuple(words) for words in programs.calls("gcloud")}
    assert len(told) == 6  # create, describe, scp, ssh, delete, rsync
    for words in [*told, ("compute", "tpus", "queued-resources", "describe", "--no-such")]:
        done = subprocess.run(
            [gcloud, *words], capture_output=True, text=True, timeout=60, env=environment
        )
        right = "credentials" in done.stderr and "unrecognized" not in done.stderr
        assert right == ("--no-such" not in words), done.stderr


@pytest.mark.exhaustive
def test_skypilot_takes_the_tasks(two, tmp_path):
    python = os.environ.get("MARGINFACE_SKY_PYTHON")
    if not python:
        pytest.skip("MARGINFACE_SKY_PYTHON does not name a Python that has skypilot")
    check = "import sky, sys; [sky.Task.from_yaml(f).validate() for f in sys.argv[1:]]"
    # Not sky_gpu: for GPUs and regions SkyPilot looks into a catalog that it downloads.
    paths = [str(p) for p in sorted(GOLDEN.glob("sky/**/*.yaml"))]
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(pathlib.Path(paths[0]).read_text().replace("[75]", "[375]"))
    environment = os.environ | {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "HOME": str(tmp_path)}
    for files, code in ((paths, 0), ([str(wrong)], 1)):
        done = subprocess.run(
            [python, "-c", check, *files],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr


@pytest.mark.exhaustive
def test_xpk_makes_a_jobset(two, tmp_path, monkeypatch):
    xpk = os.environ.get("MARGINFACE_XPK") or shutil.which("xpk")
    if not xpk:
        pytest.skip("MARGINFACE_XPK does not name an xpk, and there is none on the PATH")
    monkeypatch.setenv("PATH", f"{pathlib.Path(xpk).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for script in sorted((GOLDEN / "k8s").rglob("*.sh")):
        printed = bash(str(script), "--dry-run", "--skip-validation")
        assert "kind: JobSet" in printed
        assert "values: [1,42,75,127," in printed
        assert "maxRestarts: 50" in printed
        assert "terminationGracePeriodSeconds: 120" in printed
        assert "exec python -m marginface.main" in printed


def submit(engine, chosen):
    module, text = ENGINES[engine]
    module.submit(chosen, parsed(module, text))


def test_a_sweep_that_is_queued_is_not_queued_again(two, programs, capsys):
    pytest.importorskip("submitit", reason="pip install marginface[slurm]")
    programs(squeue="", sbatch="echo 12")
    submit("slurm", two)
    assert "job 12: 2 units" in capsys.readouterr().out
    assert programs.calls("sbatch") == [["--parsable", "runs/tiny/slurm/array.sh"]]
    assert pathlib.Path("runs/tiny/slurm/1.sh").exists()
    programs(squeue="echo 12")
    with pytest.raises(ValueError, match="marginface-tiny is queued as job 12: wait for it"):
        submit("slurm", two)
    programs(squeue="", sbatch="echo 'error: no such partition' >&2; exit 1")
    with pytest.raises(ValueError, match="sbatch: error: no such partition"):
        submit("slurm", two)


def test_sky_and_xpk_get_each_unit(two, programs):
    programs(sky="", xpk="", gcloud="exit 2", git="")
    submit("sky", two)
    names = [cloud.job_name(unit) for unit in two]
    files = [words[-1] for words in programs.calls("sky")]
    assert files == [f"runs/tiny/tpu/{name}.yaml" for name in names]
    submit("k8s", two)
    assert [f"--workload={name}" in w for name, w in zip(names, programs.calls("xpk"), strict=True)]
    programs(xpk="exit 1")
    with pytest.raises(ValueError, match="exit code 1"):
        submit("k8s", two)


def test_gcloud_scripts_run_side_by_side_and_are_waited_for(two, programs, capsys):
    programs(gcloud="exit 2", git="")
    submit("gcloud", two)
    out = capsys.readouterr().out
    assert [f"{cloud.job_name(unit)}: exit code" in out for unit in two] == [True, True]


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        (cloud, "", "--tpu_bucket is missing: write it like gs://my-bucket"),
        (cloud, "--tpu_bucket gs://b;rm", "--tpu_bucket 'gs://b;rm' is no such name"),
        (cloud, "--tpu_bucket gs://buck --tpu_accelerator tpu-v5x-8", "'tpu-v5x-8' is no TPU"),
        (cloud, "--tpu_bucket gs://buck --tpu_accelerator a;b", "--tpu_accelerator 'a;b'"),
        (cloud, "--tpu_bucket gs://buck --tpu_engine gcloud", "--tpu_zone is missing"),
        (kubernetes, "--k8s_cluster My", "--k8s_cluster 'My' is no such name"),
        (kubernetes, "--k8s_cluster my", "--k8s_storage is missing"),
        (slurm, "--slurm_set qoos=night", "did you mean 'qos'"),
        (slurm, "--slurm_set qos", "--slurm_set qos="),
    ],
)
def test_a_wrong_option_is_one_line(two, module, text, message):
    if module is slurm:
        pytest.importorskip("submitit", reason="pip install marginface[slurm]")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        module.render(two, parsed(module, text))
    assert "\n" not in str(raised.value)


def test_what_lies_elsewhere_is_not_sent(two, tmp_path):
    away = [unit._replace(experiment=str(tmp_path / "tiny.py")) for unit in two]
    for engine in ("sky", "gcloud", "k8s"):
        with pytest.raises(ValueError, match="give a path below this folder"):
            render(engine, away)


def test_names_of_jobs_differ_and_fit():
    names = set()
    for seed in range(100):
        name = f"exclusive.weight=0.1,embedding_dim=512,m=0.35,seed={seed}"
        unit = Unit(name, "a.py", {}, None, pathlib.Path("runs/arcface_regular-data=lfw") / name)
        names.add(cloud.job_name(unit))
    assert len(names) == 100
    assert all(len(name) <= 40 and name.replace("-", "").isalnum() for name in names)


@pytest.mark.parametrize("engine", ["sky", "gcloud", "k8s"])
def test_only_a_clone_can_be_sent(engine, two, programs):
    pathlib.Path("pyproject.toml").unlink()
    programs(sky="", gcloud="", xpk="")
    with pytest.raises(ValueError, match="is sent and installed: do this in a clone"):
        submit(engine, two)


def test_every_engine_owes_the_same():
    taken = set()
    for backend, (module, about, waits) in engines.BACKENDS.items():
        engine = engines.load(backend)
        assert isinstance(engine, engines.Engine)
        assert isinstance(engine, engines.Remote) == (not waits), module
        assert engine.submit.__annotations__["return"] is bool
        assert about
        parser = argparse.ArgumentParser(add_help=False)
        engine.add_arguments(parser)
        options = {action.dest for action in parser._actions}
        assert options
        assert not options & taken
        taken |= options
    assert list(search.BACKENDS) == ["local", "vmap"]


def test_a_new_engine_is_a_module_and_a_line(two, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "def add_arguments(parser):\n"
        "    parser.add_argument('--mine_speed', type=int, default=1, help='of mine')\n"
        "def submit(units, options):\n"
        "    print('sent', *(unit.name for unit in units), options.mine_speed)\n"
        "    return False\n"
        "def render(units, options):\n"
        "    return {f'{unit.name}.txt': str(options.mine_speed) for unit in units}\n"
    )
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(tmp_path)])
    monkeypatch.setitem(engines.BACKENDS, "mine", engines.Backend("mine", "my own machines"))
    words = ["--config", "tiny.py", "--seeds", "2", "--backend", "mine", "--mine_speed", "7"]
    assert sweep.run([*words, "--dry_run"]) == 0
    assert f"# ---- {two[0].name}.txt\n7" in capsys.readouterr().out
    assert sweep.run(words) == 0
    assert f"sent {two[0].name} {two[1].name} 7" in capsys.readouterr().out
    sys.modules.pop("marginface.launch.engines.mine")


def test_help_shows_the_options_of_the_chosen_engine(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for backend, own in {
        "local": "--retries",
        "slurm": "--slurm_nodes",
        "k8s": "--k8s_zone",
    }.items():
        with pytest.raises(SystemExit):
            sweep.parse(["--help", "--backend", backend])
        out = capsys.readouterr().out
        assert [o for o in ("--retries", "--slurm_nodes", "--k8s_zone") if o in out.split()] == [
            own
        ]
        assert all(f"    {name}" in out for name in engines.BACKENDS)
    assert sweep.parse(["--config", "x.py", "--k8s_zone", "z"])[0].k8s_zone == "z"
    with pytest.raises(ValueError, match="invalid choice: 'slum'"):
        sweep.parse(["--config", "x.py", "--backend", "slum"])
