"""What a walk gets on each kind of device; devices are made up."""

from unittest import mock

import jax
import numpy as np
import pytest

from experiments import arcface
from marginface import config as configs
from marginface import devices
from marginface.losses import similarity
from marginface.training import objective

GIB = 2**30


def device(platform="cpu", capability=None, memory=None):
    made = mock.Mock(spec=jax.Device, platform=platform)
    if capability is not None:
        made.compute_capability = capability
    stats = memory and {"bytes_limit": memory, "bytes_in_use": memory // 4}
    made.memory_stats = mock.Mock(return_value=stats)
    return made


@pytest.mark.parametrize(
    ("platform", "capability", "long", "short"),
    [
        ("cpu", None, "highest", "highest"),
        ("tpu", None, "tf32", "tf32"),
        ("gpu", "7.5", "highest", "highest"),  # Turing has no TF32
        ("gpu", "8.0", "tf32", "highest"),
        ("gpu", "9.0", "tf32", "highest"),
        ("gpu", "10.0", "tf32", "highest"),
        ("gpu", "gfx942", "highest", "highest"),
        ("gpu", "gfx90a", "highest", "highest"),
        ("gpu", None, "highest", "highest"),
    ],
)
def test_auto_takes_what_a_device_has_and_the_embeddings_bear(platform, capability, long, short):
    found = device(platform, capability)
    assert devices.precision("auto", found) == long
    assert devices.precision("auto", found, dim=512) == long
    assert devices.precision("auto", found, dim=511) == short
    for known in ("highest", "tf32", "bfloat16"):  # what is asked for is taken
        assert devices.precision(known, found) == known


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="'half' is unknown; known: auto, highest, tf32, b") as e:
        devices.precision("half", device())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("memory", "examples", "classes", "wanted"),
    [
        (80 * GIB, 512, 10_000, None),  # logits are small beside the memory
        (80 * GIB, 512, 1_250_000, None),
        (80 * GIB, 512, 1_400_000, 16_384),
        (8 * GIB, 512, 200_000, 16_384),
        (8 * GIB, 512, 16_384, None),
        (8 * GIB, 1_000_000, 100_000, 128),  # never fewer
        (8 * GIB, 8, 100_000_000, 1_048_576),
    ],
)
def test_an_accelerator_walks_at_once_what_its_memory_allows(memory, examples, classes, wanted):
    found = device("gpu", "9.0", memory)
    assert devices.memory(found) == memory
    assert devices.free_memory(found) == memory - memory // 4
    kw = {"examples": examples, "classes": classes, "device": found}
    assert devices.chunk_size("auto", **kw) == wanted
    assert devices.chunk_size(0, **kw) is None
    assert devices.chunk_size(2048, **kw) == 2048


def test_the_devices_of_a_cpu_share_its_memory(monkeypatch):
    """Eight in these tests: 256 MiB each, a sixteenth of that for two copies of the logits."""
    monkeypatch.setattr(devices, "_meminfo", lambda field: {"MemTotal": 2.0 * GIB}[field])
    kw = {"examples": 128, "device": device()}
    assert devices.chunk_size("auto", classes=16_384, **kw) is None
    assert devices.chunk_size("auto", classes=16_385, **kw) == 3072
    monkeypatch.setattr(devices, "_meminfo", lambda field: 16.0 * GIB)
    assert devices.chunk_size("auto", classes=16_385, **kw) is None
    assert devices.chunk_size("auto", classes=200_000, **kw) == 3072


def test_processes_cut_alike_whatever_their_machines_have(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    kw = {"examples": 512, "classes": 100_000}
    large, small = device("gpu", "9.0", 80 * GIB), device("gpu", "9.0", 8 * GIB)
    assert devices.chunk_size("auto", device=large, **kw) == 16_384
    assert devices.chunk_size("auto", device=small, **kw) == 16_384


def test_a_system_that_does_not_tell_has_what_any_machine_has(monkeypatch):
    def missing(self, **kw):
        raise FileNotFoundError(self)

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert devices.memory(device()) == devices.free_memory(device()) == 4e9


@pytest.mark.parametrize("stats", [{}, {"bytes_in_use": 5}])
def test_an_allocator_that_does_not_tell_its_limit_has_that_too(stats, monkeypatch):
    monkeypatch.setattr(devices, "_meminfo", lambda field: 7.0)
    found = device("gpu", "9.0")
    found.memory_stats.return_value = stats
    assert devices.memory(found) == devices.free_memory(found) == 7.0


def test_classes_are_compared_with_each_other_in_squares():
    kw = {"device": device("gpu", "9.0", 80 * GIB)}
    assert devices.chunk_size_between("auto", classes=1_000_000, **kw) == 2048
    assert devices.chunk_size_between("auto", classes=2048, **kw) is None
    assert devices.chunk_size_between(0, classes=1_000_000, **kw) is None
    assert devices.chunk_size_between(5, classes=1_000_000, **kw) == 5
    assert devices.chunk_size_between("auto", classes=10_000, device=device()) == 768


def test_a_walk_asks_a_device_of_its_own_process():
    """The memory of another process's device cannot be read."""
    theirs, ours = device("gpu", "9.0"), device("gpu", "9.0", 80 * GIB)
    theirs.memory_stats.side_effect = RuntimeError("only of addressable devices")
    mesh = mock.Mock(spec=jax.sharding.Mesh, size=2, local_devices=[ours])
    mesh.devices = np.array([theirs, ours])
    config = arcface.get_config("dim=512")
    assert objective.walk(config, 512, mesh) == {"chunk_size": None, "precision": "tf32"}
    short = arcface.get_config("dim=256")
    assert objective.walk(short, 512, mesh) == {"chunk_size": None, "precision": "highest"}
    assert objective.chunk_size_between(config, 512, mesh) is None


def test_a_walk_over_a_sample_or_several_prototypes_a_class_is_cut_by_what_it_holds(monkeypatch):
    limits = []

    def chunk_size(wanted, *, examples, classes, device):
        limits.append((examples, classes))

    monkeypatch.setattr(devices, "chunk_size", chunk_size)
    config = arcface.get_config()
    config.batch_size = 64
    objective.walk(config, 25_600, None)
    config.loss.sample_rate = 0.1
    objective.walk(config, 25_600, None)
    config.loss.sample_rate, config.loss.similarity = 1.0, "subcenter_cosine"
    config.loss.subcenters = 3
    objective.walk(config, 25_600, None)
    assert limits == [(64, 25_600), (64, 2560), (192, 25_600)]


def test_the_config_knows_the_precisions_that_there_are():
    """Spelled twice, since configs are checked before JAX is imported."""
    assert ("auto", *similarity.PRECISIONS) == configs._WORDS["loss.precision"]


# ---- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["auto", "2048", "0"])
@pytest.mark.parametrize("before", ["auto", 7])
@pytest.mark.parametrize("key", ["loss", "regularizers.exclusive"])
def test_a_chunk_size_is_a_word_or_a_number(text, before, key):
    config = arcface.get_config()
    config.regularizers.exclusive = {"weight": 1.0, "chunk_size": before}  # of one type
    config.lock()
    key += ".chunk_size"
    for given in (str(before), text):
        configs.override(config, configs.from_text(config, {key: given}))
        configs.check(config)
    wanted = text if text == "auto" else int(text)
    assert configs.dotted(config)[key] == wanted
    assert configs.dotted(configs.from_json(configs.to_json(config)))[key] == wanted


@pytest.mark.parametrize("value", [-1, 2.5, True, "fast", "2048", None, 2**41])
@pytest.mark.parametrize("key", ["loss", "regularizers.exclusive"])
def test_any_other_chunk_size_is_refused(key, value):
    config = arcface.get_config()
    config.regularizers.exclusive = {"weight": 1.0, "chunk_size": 0}
    configs.override(config, {f"{key}.chunk_size": value})
    with pytest.raises(ValueError, match=f"config.{key}.chunk_size=.*: give a number of classes"):
        configs.check(config)


def test_a_chunk_size_that_is_no_number_is_refused_on_the_command_line():
    with pytest.raises(ValueError, match=r"config\.loss\.chunk_size='fast' is not int"):
        configs.from_text(arcface.get_config(), {"loss.chunk_size": "fast"})
