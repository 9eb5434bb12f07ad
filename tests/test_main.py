"""Each bad input ends in one line that says what to do, with exit code 2 and nothing written."""

import io
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import jax
import numpy as np
import pytest
from commands import SMALL
from PIL import Image

from marginface import build, main, train
from marginface import config as configs
from marginface.commands import __main__ as commands
from marginface.evaluators.common import NotFiniteError

EXPERIMENT = "--config=experiments/arcface_regular.py"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, request, tmp_path):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A zip of 12 identities × 4 images of noise, one of them broken."""
    path = tmp_path_factory.mktemp("photos") / "faces.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for identity in range(12):
            for image in range(4):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
                content = buffer.getvalue()
                if (identity, image) == (3, 1):
                    content = content[: len(content) // 2]
                archive.writestr(f"person{identity:02d}/{image}.jpg", content)
    return path


def folder_flags(photos, workdir):
    return [
        f"--config=experiments/softmax.py:data=folder,root={photos},model=sphereface4,dim=8",
        "--config.model.kw.width=0.0625",
        "--config.data.kw.image_size=16",
        "--config.data.kw.test_identities=4",
        "--config.data.kw.test_pairs=8",
        "--config.data.kw.folds=2",
        "--config.batch_size=8",
        "--config.evaluate.batch_size=8",
        "--config.steps=12",
        "--config.log_every=6",
        f"--workdir={workdir}",
    ]


def message(arguments, capsys, monkeypatch, workdir=None):
    """What `main` prints for these arguments; it must be one line, and no folder made."""
    left = {}

    def leave(code):
        left["code"] = code
        raise SystemExit(code)

    monkeypatch.setattr("sys.argv", ["marginface", *map(str, arguments)])
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.delenv("MARGINFACE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit):
        main.main()
    assert left["code"] == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("marginface: ")
    assert not any("Traceback" in line for line in lines)
    assert workdir is None or not workdir.exists()
    return lines[-1]


def test_each_experiment_and_variant_has_its_own_folder():
    flags = ["arcface.py:data=lfw,root=../shared/data", "softmax.py:data=lfw,root=../shared/data"]
    flags += ["arcface.py:data=lfw", "arcface.py"]
    names = [main.default_workdir(f"experiments/{flag}", {}) for flag in flags]
    assert names[-1].as_posix() == "runs/arcface"
    assert names[-2].as_posix() == "runs/arcface-data=lfw"
    assert len({*names, main.default_workdir("experiments/arcface.py", {"seed": "1"})}) == 5
    assert all(name.parent.as_posix() == "runs" for name in names)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config"),
        (["--config=experiments/arcfase.py"], "did you mean 'arcface.py'?"),
        (["--config=nowhere/arcface.py"], "no experiments in nowhere"),
        (["--config=experiments/arcface.py:data=lfv"], "did you mean 'lfw'?"),
        (["--config=experiments/arcface.py:dat=lfw"], "did you mean 'data'?"),
        (["--config=experiments/arcface.py:dim=large"], "'large' is not int"),
        (["--config=experiments/arcface.py:model=ir51"], "ir50"),
        ([EXPERIMENT, "--config.loss.scal=3"], "did you mean 'loss.scale'?"),
        ([EXPERIMENT, "--config.loss.scale=big"], "config.loss.scale='big' is not float"),
        ([EXPERIMENT, "--config.batch_size=2.5"], "config.batch_size='2.5' is not int"),
        ([EXPERIMENT, "--config.loss.detach=maybe"], "is not bool"),
        ([EXPERIMENT, "--wordir=x"], "did you mean '--workdir'?"),
        ([EXPERIMENT, "stray"], "unknown argument 'stray'"),
        ([EXPERIMENT, "--config.loss.margin=aditive_angular"], "did you mean 'additive_angular'?"),
        ([EXPERIMENT, "--config.loss.similarity=cosin"], "did you mean 'cosine'?"),
        ([EXPERIMENT, "--config.loss.margin=identity"], "loss.margin_kw.m is not an argument"),
        ([EXPERIMENT, "--config.model.name=spherefase"], "did you mean 'sphereface'?"),
        ([EXPERIMENT, "--config.model.kw.depth=5"], "no depth 5"),
        ([EXPERIMENT, "--config.data.name=sythetic"], "did you mean 'synthetic'?"),
        ([EXPERIMENT, "--config.optimizer.name=sdg"], "optimizer.name='sdg' is unknown"),
        ([EXPERIMENT, "--config.schedule.name=cosin"], "schedule.name='cosin' is unknown"),
        ([EXPERIMENT, "--config.batch_size=100"], "multiple of devices"),
        ([EXPERIMENT, "--config.data.kw.label_noise=2.0"], "label_noise=2.0"),
        ([EXPERIMENT, "--config.batch_size=0"], "config.batch_size=0: give 1 or more"),
        ([EXPERIMENT, "--config.epochs=nan"], "config.epochs=nan: give 0.0 or more"),
        ([EXPERIMENT, "--config.epochs=inf"], "config.epochs=inf: give 0.0 or more"),
        ([EXPERIMENT, "--config.steps=-5"], "config.steps=-5: give 0 or more"),
        ([EXPERIMENT, "--config.log_every=0"], "config.log_every=0: give 1 or more"),
        ([EXPERIMENT, "--config.checkpoint_every=0"], "config.checkpoint_every=0"),
        ([EXPERIMENT, "--config.optimizer.accumulate=0"], "config.optimizer.accumulate=0"),
        ([EXPERIMENT, "--config.optimizer.learning_rate=-0.1"], "learning_rate=-0.1: give 0.0"),
        ([EXPERIMENT, "--config.schedule.warmup=3"], "config.schedule.warmup=3.0: give 0.0 to 1.0"),
        ([EXPERIMENT, "--config.evaluate.batch_size=-4"], "config.evaluate.batch_size=-4"),
        ([EXPERIMENT, "--config.seed=3000000000"], "config.seed=3000000000: give 0 to 2147483647"),
        ([EXPERIMENT, "--config.model.kw.dropout=2"], "dropout=2.0: give 0.0 to 0.99"),
        (
            ["--config=experiments/groupface.py", "--config.model.kw.backbone_kw.dropout=2.0"],
            "config.model.kw.backbone_kw.dropout=2.0: give 0.0 to 0.99",
        ),
        (
            ["--config=experiments/groupface.py", "--config.model.kw.backbone_kw.dtype=half"],
            "config.model.kw.backbone_kw.dtype='half' is unknown",
        ),
        ([EXPERIMENT, "--config.data.kw.folds=1"], "config.data.kw.folds=1: give 2 or more"),
        ([EXPERIMENT, "--config.loss.chunk_size=-1"], "config.loss.chunk_size=-1"),
        ([EXPERIMENT, "--config.loss.precision=half"], "loss.precision='half' is unknown"),
        (
            [EXPERIMENT, "--config.regularizers.exclusive.chunk_size=-1"],
            "exclusive.chunk_size=-1: give a number of classes",
        ),
        ([EXPERIMENT, "--config.schedule.boundaries=('a',)"], "boundaries=('a',): give fractions"),
        ([EXPERIMENT, "--num_processes=2"], "need --coordinator=HOST:PORT"),
        ([EXPERIMENT, "--coordinator=localhost:1"], "needs --num_processes and --process_id"),
        (["--config=experiments/arcface.py:data=folder"], "data.kw.root is empty: give your faces"),
        ([EXPERIMENT, "--config.model.kw.dtype=float31"], "did you mean 'float32'?"),
        (["--config=experiments/arcface.py:dim=-3"], "config.model.embedding_dim=-3"),
        (["--config=experiments/arcface.py:data=lfw,root=/nowhere"], "/nowhere"),
        (["--config=experiments/arcface.py:data=folder,root=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, capsys, monkeypatch, tmp_path):
    workdir = tmp_path / "run"
    if arguments:
        arguments = [*arguments, f"--workdir={workdir}"]
    assert expected in message(arguments, capsys, monkeypatch, workdir)


def test_an_unreadable_image_is_named_and_stops_the_run(photos, tmp_path, capsys, monkeypatch):
    arguments = folder_flags(photos, tmp_path / "run")
    line = message(arguments, capsys, monkeypatch)
    assert "person03/1.jpg" in line


def test_an_unreadable_image_is_skipped_and_counted_when_asked(photos, tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [*folder_flags(photos, workdir), "--config.data.kw.unreadable=skip"]
    assert main.run(arguments) == 0
    assert "data/unreadable" in (workdir / "metrics.jsonl").read_text().splitlines()[-2]
    assert "could not be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(arg=None:\n    return", "broken.py, line 1: "),
        ("def get_config(arg=None):\n    return {}", "get_config returns dict, not a ConfigDict"),
        ("x = 1", "has no function get_config"),
    ],
)
def test_a_broken_experiment_is_named(text, expected, tmp_path, capsys, monkeypatch):
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert expected in message([f"--config={path}"], capsys, monkeypatch)


@pytest.mark.parametrize("content", [b"[1, 2]", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_config_of_a_run_folder_is_named(content, tmp_path, capsys, monkeypatch):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    line = message([EXPERIMENT, f"--workdir={tmp_path}"], capsys, monkeypatch)
    assert f"{path} is no config: choose another --workdir" in line
    assert path.read_bytes() == content


def test_a_workdir_in_a_file_is_named(tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    line = message([EXPERIMENT, f"--workdir={file}"], capsys, monkeypatch)
    assert str(file) in line


def test_the_default_run_folder_tells_variants_and_overrides_apart():
    plain = main.default_workdir("experiments/arcface.py", {})
    variant = main.default_workdir("experiments/arcface.py:data=lfw", {})
    changed = main.default_workdir("experiments/arcface.py", {"seed": "1"})
    assert str(plain) == "runs/arcface"
    assert str(variant) == "runs/arcface-data=lfw"
    assert len({plain, variant, changed}) == 3


def test_overrides_keep_types():
    config = configs.load("experiments/arcface.py")
    texts = {"loss.scale": "48", "schedule.boundaries": "(0.3, 0.6)", "loss.detach": "true"}
    configs.override(config, configs.from_text(config, texts))
    assert config.loss.scale == 48.0
    assert isinstance(config.loss.scale, float)
    assert config.schedule.boundaries == (0.3, 0.6)
    assert config.loss.detach is True
    with pytest.raises(ValueError, match="seed"):
        configs.override(config, {"seed": 0.5})


def test_an_evaluation_that_is_not_finite_is_a_divergence(tmp_path, monkeypatch):
    def broken(*_):
        raise NotFiniteError("the embedding of image 3 of 9 is not finite")

    monkeypatch.setattr(build.Evaluators, "run", broken)
    config = configs.load("experiments/arcface_regular.py")
    _, changes = main.parse([*SMALL, "--config.batch_size=16"])
    configs.override(config, configs.from_text(config, changes))
    with pytest.raises(train.DivergedError, match="step 0: the embedding of image 3 of 9 is not f"):
        train.train(config, tmp_path / "run")


def test_too_little_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(train, "train", full)
    line = message([EXPERIMENT, f"--workdir={tmp_path / 'run'}"], capsys, monkeypatch)
    assert "batch_size" in line


def test_divergence_has_its_own_type():
    assert not issubclass(train.DivergedError, ValueError | OSError)


def test_a_lost_peer_is_a_crash_and_no_mistake_of_the_user(tmp_path, monkeypatch):
    """What retries a crash must not take it for a config error, which it would give up on."""

    def lost(*_, **__):
        raise ValueError("UNKNOWN: Gloo all-reduce failed: connection reset by peer")

    monkeypatch.setattr(train, "train", lost)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(RuntimeError, match="another process was lost"):
        main.run([EXPERIMENT, f"--workdir={tmp_path / 'run'}"])
    monkeypatch.setattr("jax.process_count", lambda: 1)
    with pytest.raises(ValueError, match="Gloo"):
        main.run([EXPERIMENT, f"--workdir={tmp_path / 'run'}"])


def test_an_experiment_without_a_file_here_is_the_packaged_one(tmp_path, monkeypatch, capsys):
    here = configs.load("experiments/arcface.py:data=small")
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(tmp_path)
    configs._say_packaged.cache_clear()
    for _ in range(2):
        assert configs.load("experiments/arcface.py:data=small") == here
    assert capsys.readouterr().err.splitlines() == [
        "marginface: no experiments here: what comes with marginface under that name is used"
    ]
    (tmp_path / "experiments").mkdir()
    assert configs.load("experiments/arcface.py:data=small") == here
    assert "marginface: no experiments/arcface.py here: what comes" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"arcfase\.py; did you mean 'arcface\.py'"):
        configs.load("experiments/arcfase.py")
    with pytest.raises(FileNotFoundError, match="no experiments in else"):
        configs.load("else/arcface.py")


def experiments_with(folder, scale):
    """A folder of experiments whose common.py has another scale."""
    folder.mkdir(parents=True)
    own = folder / "common.py"
    own.write_text(f"def base(arg): ...\ndef scale(): return {scale}\n")
    (folder / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "from experiments import common\n"
        "def get_config(arg=None):\n"
        "    from experiments import common as late\n"
        "    assert late is common\n"
        "    return ConfigDict({'scale': common.scale()})\n"
        "def sweep(add, arg=None):\n"
        "    from experiments import common as late\n"
        "    add({'scale': late.scale()})\n"
    )
    return str(folder / "mine.py")


def test_experiments_of_two_folders_do_not_mix(tmp_path, monkeypatch):
    first = experiments_with(tmp_path / "a", 1.0)
    second = experiments_with(tmp_path / "b" / "experiments", 2.0)
    modules = [configs.find_experiment(file)[0] for file in (first, second, first)]
    assert [module.get_config().scale for module in modules] == [1.0, 2.0, 1.0]
    points = []
    for module in modules:
        module.sweep(points.append)
    assert [point["scale"] for point in points] == [1.0, 2.0, 1.0]
    assert configs.load("experiments/arcface.py").loss.scale == 24.0
    from experiments import common

    assert not hasattr(common, "scale")
    assert [module.get_config().scale for module in modules] == [1.0, 2.0, 1.0]
    monkeypatch.chdir(tmp_path / "b")
    assert configs.load("experiments/mine.py").scale == 2.0
    # A file elsewhere belongs to the experiments of the working directory.
    elsewhere = tmp_path / "mine.py"
    elsewhere.write_text((tmp_path / "b" / "experiments" / "mine.py").read_text())
    assert configs.load(str(elsewhere)).scale == 2.0


def test_experiments_need_not_be_importable(tmp_path):
    """As with the console script, which has no working directory on sys.path."""
    program = (
        "import sys; sys.path[0] = sys.argv.pop()\n"
        "from marginface import config\n"
        "assert config.load('experiments/arcface.py').loss.margin == 'additive_angular'\n"
        "assert not [name for name in sys.modules if name.startswith('experiments')]\n"
    )
    root = tmp_path / "package"
    root.mkdir()
    (root / "marginface").symlink_to(configs.CLONE / "marginface")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [sys.executable, "-c", program, str(root)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def console(capsys, *words):
    """Exit code, stdout and stderr of `marginface WORDS`."""
    code = 0
    try:
        commands.main(words)
    except SystemExit as left:
        code = left.code or 0
    return code, *capsys.readouterr()


def test_the_commands_are_listed_one_a_line(capsys):
    code, out, _ = console(capsys)
    assert (code, out) == console(capsys, "--help")[:2] == (0, out)
    for name, line in commands.COMMANDS.items():
        assert f"    {name:8} {line}\n" in out
    folder = pathlib.Path(commands.__file__).parent
    assert {file.stem for file in folder.glob("[!_]*.py")} == set(commands.COMMANDS)
    assert all(len(line) <= 100 for line in out.splitlines())


def test_the_list_of_commands_imports_little():
    program = "import sys\nfrom marginface.commands.__main__ import main\nmain([])\n"
    program += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & {"jax", "numpy", "ml_collections", "matplotlib", "orbax"}


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_is_one_screen_with_an_example_and_exit_codes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("marginface.runtime.restart_with_huge_pages", lambda: None)
    for key in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(key, os.environ.get(key, ""))  # put back what tuning sets
    monkeypatch.setattr("signal.signal", lambda *_: None)
    code, out, _ = console(capsys, name, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 50
    assert re.search(rf"^ *marginface {name} ", out, re.MULTILINE)
    assert "Exit codes: 0 " in out.replace("\n", " ")
    assert f"usage: marginface {name}" in out


def test_an_unknown_command_names_the_nearest(capsys):
    code, out, err = console(capsys, "trian")
    assert (code, out) == (2, "")
    assert err.startswith("marginface: no command 'trian'; did you mean 'train'?")


def test_the_version_is_that_of_the_package(capsys):
    code, out, _ = console(capsys, "--version")
    with (configs.CLONE / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert (code, out.split()[:2]) == (0, ["marginface", version])


def test_init_copies_the_experiments_and_writes_over_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert console(capsys, "init")[0] == 0
    for file in configs.PACKAGED.glob("*.py"):
        assert (tmp_path / "experiments" / file.name).read_bytes() == file.read_bytes()
    text = (tmp_path / "experiments" / "arcface.py").read_text()
    (tmp_path / "experiments" / "arcface.py").write_text(text.replace("small=0.3", "small=0.2"))
    assert configs.load("experiments/arcface.py:data=small").loss.margin_kw.m == 0.2
    code, _, err = console(capsys, "init", "experiments")
    assert (code, err.splitlines()[-1]) == (
        2,
        "marginface: experiments/__init__.py is there: give a folder without __init__.py",
    )
    assert "small=0.2" in (tmp_path / "experiments" / "arcface.py").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "softmax.py").touch()
    assert console(capsys, "init", "other")[0] == 2
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_train_is_the_plain_command(tmp_path, capsys, monkeypatch):
    got = []
    monkeypatch.setattr("marginface.runtime.restart_with_huge_pages", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("marginface.main.run", lambda argv: got.append(argv) or 75)
    assert console(capsys, "train", EXPERIMENT, "--config.seed=1")[0] == 75
    assert got == [[EXPERIMENT, "--config.seed=1"]]
