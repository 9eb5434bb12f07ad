"""Eight CPU devices, shape annotations executed, no input from the surroundings."""

import os

from commands import COMPILE_QUICKLY

from marginface import runtime

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {COMPILE_QUICKLY}"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Given, so no command takes the user's cache folder; which folder a test takes is its own affair.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "true")
runtime.tune_cpu()

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("marginface", "beartype.beartype")  # stays on: every later import is checked

import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def mesh8():
    """One mesh axis "data" over eight devices."""
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Keeps what the commands that tests start compile, for all workers of this session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real faces beside the checkout, or a skip that says so."""
    if not SHARED.is_dir():
        pytest.skip(f"no real faces at {SHARED}")
    return SHARED


# Files of most of a minute or more, which no process may begin last.
LONGEST_FIRST = (
    "test_slurm",
    "test_earlier_runs",
    "test_train",
    "test_class_losses",
    "test_experiments",
    "test_together",
    "test_step",
    "test_search",
)


def pytest_collection_modifyitems(items):
    """Starts the longest files first; a file's own order stays."""
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
