"""What holds the house up: the core needs jax alone, and configs stop at the top."""

import pathlib
import re
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "marginface"
CORE = (
    *(f"losses.{name}" for name in ("margins", "similarity", "class_softmax", "class_losses")),
    *(f"losses.{name}" for name in ("joint_losses", "pair_losses", "regularizers", "groups")),
    *("training.objective", "training.optim", "training.step", "training.footprint"),
    *("sharding", "runtime", "devices"),
    *("models.sphereface", "models.iresnet", "models.group_head", "data.readers.synthetic"),
)
# Rooms and files that know a config; nothing below them does.
MAY_KNOW_CONFIGS = {"main.py", "command.py", "train.py", "build.py", "config.py"}
MAY_KNOW_CONFIGS |= {"training/objective.py", "training/step.py", "runs/folder.py", "runs/plan.py"}
MAY_KNOW_CONFIGS |= {"clean/", "launch/", "report/"}


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


def test_no_real_face_or_weight_file_lives_in_the_repository():
    kinds = {".jpg", ".jpeg", ".bin", ".rec", ".npz", ".npy", ".ckpt", ".msgpack", ".pgm"}
    root = PACKAGE.parent
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout
    assert not [name for name in listed.splitlines() if pathlib.Path(name).suffix in kinds]
