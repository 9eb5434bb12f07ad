"""Checkpoints restore exactly or not at all."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marginface.training.checkpoint import Checkpoints
from marginface.training.preemption import Preemption

WARNING = "is not used"
FLIP, TRUNCATE, REMOVE = "differs from its sha256", "bytes, not", "is missing"


class Linear(NamedTuple):
    weight: jax.Array
    bias: jax.Array


def mesh_of(count):
    axes = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("data",), axis_types=axes, devices=jax.devices()[:count])


def state_at(step, mesh, rows=16):
    """A train state with all kinds of containers and types, another one for every step."""
    rng = np.random.default_rng(step)

    def put(shape, *spec, dtype=np.float32):
        value = jnp.asarray(rng.standard_normal(shape), dtype)
        return jax.device_put(value, jax.sharding.NamedSharding(mesh, jax.P(*spec)))

    params = {
        "prototypes": Linear(put((rows, 3), "data"), put((rows,), "data")),
        "net": {"conv.1": {"kernel": put((3, 2), dtype=jnp.bfloat16)}},
    }
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt = jax.tree.map(lambda x: x + put(x.shape).astype(x.dtype), transform.init(params))
    return {"params": params, "opt": opt, "step": put((), dtype=np.int32)}


def shapes(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_equal(restored, state):
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(8)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, mesh):
    """A folder with steps 1 and 2, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("pristine")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step, mesh), {"step": step})
    return folder


@pytest.fixture
def saved(pristine, tmp_path):
    return pathlib.Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, where=None):
    content = bytearray(path.read_bytes())
    rng = random.Random(path.name)
    content[rng.randrange(len(content)) if where is None else where] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def warnings_in(caplog):
    messages = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    caplog.clear()
    return messages


def test_restores_every_bit_although_the_buffers_were_donated(tmp_path, mesh, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = state_at(1, mesh, rows=2**17)
    expected = jax.tree.map(np.array, state)
    meta = {"iterator": {"step": 7}, "fingerprint": "0f", "lr": 0.1}
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpoints("relative") as checkpoints:
        assert checkpoints.restore(shapes(state)) is None
        like = shapes(state)
        checkpoints.save(1, state, meta)
        meta["iterator"]["step"] = 8
        for _ in range(3):
            state = update(state)
        step, restored, restored_meta = checkpoints.restore(like)
    assert step == 1
    assert restored_meta == {"iterator": {"step": 7}, "fingerprint": "0f", "lr": 0.1}
    assert_equal(restored, expected)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


@pytest.mark.parametrize("count", [4, 1])
def test_restores_on_fewer_devices(pristine, mesh, count):
    like = shapes(state_at(0, mesh_of(count)))
    with Checkpoints(pristine) as checkpoints:
        step, restored, _ = checkpoints.restore(like)
    assert step == 2
    assert len(restored["params"]["prototypes"].weight.sharding.device_set) == count
    assert_equal(restored, state_at(2, mesh))


@pytest.mark.parametrize(
    ("damage", "complaint"), [(flip, FLIP), (truncate, TRUNCATE), (pathlib.Path.unlink, REMOVE)]
)
def test_damage_to_any_file_is_named_and_the_previous_step_used(
    saved, mesh, caplog, damage, complaint
):
    paths = files_of(saved / "2")
    assert len(paths) > 5
    for path in paths:
        content = path.read_bytes()
        damage(path)
        with Checkpoints(saved) as checkpoints:
            step, restored, meta = checkpoints.restore(shapes(state_at(0, mesh)))
        path.write_bytes(content)
        assert (step, meta) == (1, {"step": 1})
        assert_equal(restored, state_at(1, mesh))
        (message,) = warnings_in(caplog)
        name = path.relative_to(saved / "2").as_posix()
        assert f"{saved}/2 {WARNING}: {name} " in message
        assert name == "manifest.json" or complaint in message


def test_every_bit_of_the_manifest_counts(saved, mesh, caplog):
    path = saved / "2" / "manifest.json"
    content = path.read_bytes()
    with Checkpoints(saved) as checkpoints:
        for where in range(0, len(content), 7):
            flip(path, where)
            assert checkpoints._choose(checkpoints.steps()) == 1
            assert "2 is not used: manifest.json" in warnings_in(caplog)[0]
            path.write_bytes(content)
        assert checkpoints._choose(checkpoints.steps()) == 2


def test_nothing_sound_left_is_an_error_in_one_line(saved, mesh):
    flip(files_of(saved / "1")[0])
    flip(files_of(saved / "2")[0])
    message = "no checkpoint passes verification"
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=message) as raised:
        checkpoints.restore(shapes(state_at(0, mesh)))
    assert str(saved) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("saved_next", [2, 3, 4])
def test_damaged_steps_do_not_stand_in_the_way(saved, mesh, saved_next):
    shutil.move(saved / "2", saved / "3")
    flip(files_of(saved / "3")[0])
    with Checkpoints(saved) as checkpoints:
        step, *_ = checkpoints.restore(shapes(state_at(0, mesh)))
        assert step == 1
        checkpoints.save(saved_next, state_at(saved_next, mesh), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, saved_next]
        step, restored, _ = checkpoints.restore(shapes(state_at(0, mesh)))
    assert step == saved_next
    assert_equal(restored, state_at(saved_next, mesh))


def test_a_damaged_step_is_overwritten_without_a_restore(saved, mesh):
    flip(files_of(saved / "2")[0])
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(2, state_at(5, mesh), {})
        _, restored, _ = checkpoints.restore(shapes(state_at(0, mesh)))
    assert_equal(restored, state_at(5, mesh))


def test_a_sound_later_step_is_not_overwritten(saved, mesh):
    with Checkpoints(saved) as checkpoints:
        for step in (0, 2):
            with pytest.raises(ValueError, match=r"2 is a checkpoint this run did not continue"):
                checkpoints.save(step, state_at(step, mesh), {})
        step, *_ = checkpoints.restore(shapes(state_at(0, mesh)))
        checkpoints.save(step, state_at(9, mesh), {})  # saved before, so left as it is
        _, restored, _ = checkpoints.restore(shapes(state_at(0, mesh)))
    assert_equal(restored, state_at(2, mesh))


def test_the_best_and_the_latest_are_kept_also_by_the_next_process(tmp_path, mesh):
    accuracy = {1: 0.1, 2: 0.9, 3: 0.3, 4: float("nan"), 5: None, 6: 0.8}
    for steps in ((1, 2, 3), (4, 5, 6)):
        with Checkpoints(tmp_path, best_metric="accuracy") as checkpoints:
            checkpoints.restore(shapes(state_at(0, mesh)))
            for step in steps:
                metrics = None if accuracy[step] is None else {"accuracy": accuracy[step]}
                checkpoints.save(step, state_at(step, mesh), {}, metrics)
    assert checkpoints.steps() == [2, 5, 6]
    with Checkpoints(tmp_path, best_metric="accuracy") as checkpoints:
        checkpoints.restore(shapes(state_at(0, mesh)))
        with pytest.raises(ValueError, match=r"no 'accuracy' to rank checkpoints by; they have l"):
            checkpoints.save(7, state_at(7, mesh), {}, {"loss": 1.0})


def test_another_model_is_named_in_one_line(pristine, mesh):
    like = shapes(state_at(0, mesh))
    kernel = like["params"]["net"]["conv.1"]["kernel"]
    sharding = kernel.sharding
    cases = {
        r"params.net.conv.1.kernel is bfloat16\[3, 2\] there and bfloat16\[4, 2\] here": [
            ("kernel", jax.ShapeDtypeStruct((4, 2), jnp.bfloat16, sharding=sharding))
        ],
        r"kernel is bfloat16\[3, 2\] there and float32\[3, 2\] here": [
            ("kernel", jax.ShapeDtypeStruct((3, 2), jnp.float32, sharding=sharding))
        ],
        r"params.net.conv.1.bias is absent there": [("kernel", kernel), ("bias", kernel)],
        r"params.net.conv.1.kernel is bfloat16\[3, 2\] there and absent here": [],
    }
    with Checkpoints(pristine) as checkpoints:
        for message, leaves in cases.items():
            other = like | {"params": like["params"] | {"net": {"conv.1": dict(leaves)}}}
            with pytest.raises(ValueError, match=message) as raised:
                checkpoints.restore(other)
            assert "\n" not in str(raised.value)


def test_nothing_to_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_latest=0"):
        Checkpoints(tmp_path, keep_latest=0)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_keeps_the_earlier_steps(small_disk, mesh, caplog):
    folder = small_disk / "run"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step, mesh, rows=2**14), {})
        with pytest.raises(OSError, match="no space left for the checkpoint of step 3") as raised:
            checkpoints.save(3, state_at(3, mesh, rows=2**17), {})
        assert str(folder) in str(raised.value)
        assert "\n" not in str(raised.value)
        step, restored, _ = checkpoints.restore(shapes(state_at(0, mesh, rows=2**14)))
        assert_equal(restored, state_at(2, mesh, rows=2**14))
        checkpoints.save(3, state_at(3, mesh), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    assert not caplog.records


SAVE_UNTIL_FULL = """
import pathlib, shutil, sys, types
import jax, jax.numpy as jnp, numpy as np
from marginface.training.checkpoint import Checkpoints

shutil.disk_usage = lambda _: types.SimpleNamespace(free=2**60)  # enough when it begins to write
folder = pathlib.Path(sys.argv[1])
state = {"x": jnp.asarray(np.random.default_rng(0).standard_normal(2**16), jnp.float32)}
large = {f"x{i}": jnp.ones(2**15) * np.random.default_rng(i).random(2**15) for i in range(60)}
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
    try:
        checkpoints.save(3, large, {})
        checkpoints.wait()
    except OSError as error:
        print(error)
    print(sorted(path.name for path in folder.iterdir()))
    step, restored, _ = checkpoints.restore(state)
    assert np.array_equal(restored["x"], state["x"])
    checkpoints.save(3, state, {})
print(checkpoints.steps())
"""


def test_a_disk_that_fills_while_writing_leaves_nothing_half_written(small_disk):
    # In a process of its own: of the sixty writes some are under way when one fails.
    command = [sys.executable, "-c", SAVE_UNTIL_FULL, str(small_disk / "run")]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    message = "no space left for the checkpoint of step 3; earlier steps are sound"
    assert result.stdout.splitlines() == [
        f"[Errno 28] {message}: '{small_disk}/run'",
        "['1', '2']",
        "[2, 3]",
    ]
    assert "Traceback" not in result.stderr


SAVE_FOREVER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from marginface.training.checkpoint import Checkpoints

def state_at(step):
    return {"x": jnp.asarray(np.random.default_rng(step).standard_normal(50_000), jnp.float32)}

with Checkpoints(sys.argv[1]) as checkpoints:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"x": jax.ShapeDtypeStruct((50_000,), jnp.float32, sharding=sharding)}
    step, state, meta = checkpoints.restore(like) or (0, state_at(0), {"step": 0})
    assert meta == {"step": step}
    assert np.array_equal(state["x"], state_at(step)["x"])
    print("restored", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, state_at(step), {"step": step})
        print("saving", step, flush=True)
"""


@pytest.mark.exhaustive
def test_killed_at_any_moment_it_goes_on_from_a_sound_step(tmp_path):
    rng = random.Random(0)
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    acknowledged = 0
    for _ in range(4):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path / "run")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            line = process.stdout.readline().split()
            assert line[:1] == ["restored"], process.stderr.read()
            # A save that was begun proves that the one before it is on disk.
            assert int(line[1]) >= acknowledged - 1
            for _ in range(rng.randrange(2, 6)):
                acknowledged = int(process.stdout.readline().split()[1])
            time.sleep(rng.uniform(0, 0.1))  # anywhere from copying to removing the old step
            process.kill()
            assert WARNING not in process.stderr.read()
    with Checkpoints(tmp_path / "run") as checkpoints:
        x = jnp.zeros(50_000, jnp.float32)
        step, *_ = checkpoints.restore({"x": x})
        checkpoints.save(step + 1, {"x": x}, {})
        checkpoints.wait()
    assert [path for path in (tmp_path / "run").iterdir() if not path.name.isdecimal()] == []


def test_sigterm_is_noticed_and_the_old_handler_put_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested(2)
            assert preemption.requested(3)
        assert signal.getsignal(signal.SIGTERM) is mine
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_ctrl_c_saves_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, mesh):
    """Its terms stand under their names alone; now under section.name."""
    leaf = jax.device_put(jnp.arange(3.0), jax.sharding.NamedSharding(mesh, jax.P()))

    def state(*keys):
        terms = {key: {"centers": leaf} for key in keys}
        return {"params": {"terms": terms}, "running": terms, "opt": [{"terms": terms}]}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state("center", "sphereface2"), {})
        wanted = state("joint.center", "loss.sphereface2")
        _, restored, _ = checkpoints.restore(shapes(wanted))
        assert_equal(restored, wanted)
        with pytest.raises(ValueError, match=r"opt.0.terms.joint.ring.centers is absent th"):
            checkpoints.restore(shapes(state("joint.center", "loss.sphereface2", "joint.ring")))
