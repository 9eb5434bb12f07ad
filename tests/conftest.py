"""Eight CPU devices, shape annotations executed, no input from the surroundings."""

import os

from marginface import runtime

# Tests compile a thousand small programs and run each for a moment: compile quickly.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
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
def shared_data():
    """The folder of real faces beside the checkout, or a skip that says so."""
    if not SHARED.is_dir():
        pytest.skip(f"no real faces at {SHARED}")
    return SHARED
