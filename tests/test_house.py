"""What holds the house up: imports run down, configs stop at the top, a core of jax alone."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

from marginface.runs import folder as run_folder

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "marginface"
CORE = (
    *(f"losses.{name}" for name in ("margins", "similarity", "class_softmax", "class_losses")),
    *(f"losses.{name}" for name in ("joint_losses", "pair_losses", "regularizers", "groups")),
    *("training.objective", "training.optim", "training.step", "training.footprint"),
    *("sharding", "runtime", "devices"),
    *("models.sphereface", "models.iresnet", "models.group_head", "data.readers.synthetic"),
)
# From the roof to the ground: what stands in one line imports from lower lines only, and from
# within its own rooms. A name stands for all below it that has no line of its own.
STOREYS = (
    ("commands",),
    ("launch",),
    ("launch.engines",),
    ("launch.units",),
    ("main", "clean", "report"),
    ("train",),
    ("report.study",),
    ("report.run",),
    ("runs.trained", "runs.record"),
    ("build",),
    ("evaluators", "training", "runs"),
    ("devices",),
    ("models", "data", "losses"),
    ("command", "config"),
    ("lookup", "sharding", "runtime"),
    ("typing", "style"),
)
# Rooms and files that know a config; nothing below them does.
MAY_KNOW_CONFIGS = {"main.py", "command.py", "train.py", "build.py", "config.py"}
MAY_KNOW_CONFIGS |= {"training/objective.py", "training/step.py", "runs/folder.py", "runs/plan.py"}
MAY_KNOW_CONFIGS |= {"runs/record.py", "runs/trained.py"}
MAY_KNOW_CONFIGS |= {"clean/", "commands/", "launch/", "report/"}


def test_the_core_imports_with_jax_flax_optax_numpy_and_absl_alone():
    absent = "ml_collections orbax grain cv2 PIL simplejpeg matplotlib tqdm wandb jaxtyping torch"
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent.split()}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        + "\n".join(f"import marginface.{name}" for name in CORE)
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def modules():
    """Name → file of every module of the package, "" for the package itself."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name.removesuffix("__init__").removesuffix(".")] = path
    return names


def imported(path, known):
    """The package's modules that a file imports, at its top, in functions, and through importlib.

    What is imported under a name made at run time, f"marginface.launch.engines.{name}", counts as
    all modules that begin so.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports stand with their full names"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("marginface.") in known else node.module for n in inside]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            what = node.args[0]
            if isinstance(what, ast.JoinedStr) and isinstance(what.values[0], ast.Constant):
                begin = what.values[0].value
                names = [f"marginface.{n}" for n in known if f"marginface.{n}".startswith(begin)]
            elif isinstance(what, ast.Constant):
                names = [what.value]
        for name in names:
            room, _, inner = name.partition(".")
            if room == "marginface" and inner:
                yield inner
            assert room not in ("experiments", "launch", "benchmarks", "tests"), (path, name)


def storey(name):
    """Which line of STOREYS a module stands in, and the name that says so."""
    while name:
        for line, names in enumerate(STOREYS):
            if name in names:
                return line, name
        name = name.rpartition(".")[0]
    raise AssertionError("a module without a storey")


def test_every_import_runs_downwards():
    known = modules()
    for name, path in known.items():
        for target in imported(path, known):
            if not name:
                continue
            (here, own), (there, other) = storey(name), storey(target)
            assert here < there or own == other, f"{name} imports {target}, which is not below it"


def test_no_import_leads_back():
    known = modules()
    graph = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle of imports: {' → '.join(error.args[1])}") from None


def test_the_losses_load_jax_alone():
    program = "import sys, marginface.losses; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"ml_collections", "cv2", "grain", "orbax", "flax", "optax", "matplotlib"}


def test_the_units_of_a_sweep_load_no_jax():
    for name in ("launch.units", "marginface.launch.units"):
        program = f"import sys, {name}; print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent
        )
        assert done.returncode == 0, done.stderr
        loaded = {name.partition(".")[0] for name in done.stdout.split()}
        assert not loaded & {"jax", "flax", "matplotlib"}, name


def test_losses_know_losses_alone():
    for path in (PACKAGE / "losses").glob("*.py"):
        found = re.findall(r"^ *(?:from|import) (marginface[\w.]*)", path.read_text(), re.M)
        others = {name for name in found if not name.startswith("marginface.losses")}
        assert others <= {"marginface.typing"}, (path, others)


def test_configs_stop_at_the_top():
    for path in PACKAGE.rglob("*.py"):
        imports = re.findall(
            r"^ *(?:from|import) .*(?:ml_collections|config).*$", path.read_text(), re.M
        )
        name = path.relative_to(PACKAGE).as_posix()
        assert not imports or name.startswith(tuple(MAY_KNOW_CONFIGS)), (path, imports)


def test_file_names_of_run_folders_stand_in_one_module():
    files = {value for value in vars(run_folder).values() if isinstance(value, str)}
    files = {f for f in files if re.fullmatch(r"[\w/]+\.[a-z]+", f)}
    folders = {run_folder.CHECKPOINTS, run_folder.PLOTS}
    assert {"config.json", "summary.json", "summary.md", "metrics.jsonl", "log.txt"} <= files
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        prose = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
                spelled = files & set(re.split(r"[\s/:]", node.value))
                spelled |= folders & set(node.value.split("/"))
                assert not spelled or path == PACKAGE / "runs/folder.py", (path, node.lineno)


def test_no_real_face_or_weight_file_lives_in_the_repository():
    kinds = {".jpg", ".jpeg", ".bin", ".rec", ".npz", ".npy", ".ckpt", ".msgpack", ".pgm"}
    root = PACKAGE.parent
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout
    assert not [name for name in listed.splitlines() if pathlib.Path(name).suffix in kinds]


def test_embedded_faces_need_no_library_of_image_files():
    """Data, batches and evaluators of data=synthetic; Grain draws its batches, as all others'."""
    program = (
        "import sys\n"
        "from experiments import arcface\n"
        "from marginface import build, sharding\n"
        "config = arcface.get_config()\n"
        "mesh = sharding.make_mesh(1)\n"
        "faces, test_sets = build.load_data(config)\n"
        "batches = build.make_batches(config, faces)\n"
        "assert len(next(batches)['label']) == config.batch_size\n"
        "batches.close()\n"
        "steps = build.make_steps(config, faces, mesh, 4)\n"
        "build.make_evaluators(config, faces, test_sets, steps, mesh)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"cv2", "simplejpeg", "PIL", "matplotlib"}
