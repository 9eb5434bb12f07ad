"""What a device is, and which settings of the walk over classes suit it."""

import pathlib

import jax

from marginface.losses.similarity import PRECISIONS, Precision

_UNKNOWN = 4e9  # a system that does not say how much memory it has: what any machine has
_TF32_DIM = 512  # shorter embeddings may lose more than 1e-3 of a gradient; docs/precision.md
_DENSE_COPIES = 2  # of the [b, c] logits, in the gradient of a walk all at once
# Logits of a chunk: on CPU cores' caches hold them, and the walk's memory stays below a twentieth
# of that of 100,000 classes at once with b = 512.
_TILE = {"cpu": 768 * 512}
_EDGE = {"cpu": 768}  # classes compared with as many others
_ACCELERATOR_TILE, _ACCELERATOR_EDGE = 2**23, 2048
_MULTIPLE = 128


def memory(device: jax.Device) -> float:
    """Bytes that programs may take of a device; of the whole machine, for a CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:  # which not every allocator of a GPU knows
        return float(stats["bytes_limit"])
    return _meminfo("MemTotal")


def free_memory(device: jax.Device) -> float:
    """Bytes that a device can still give; of the whole machine, for a CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    return _meminfo("MemAvailable")


def precision(wanted: str, device: jax.Device, *, dim: int = 512) -> Precision:
    """What loss.precision means on a device.

    "auto" is the cheapest whose relative error of the gradient stays below 1e-3, as measured in
    docs/precision.md: on TPUs "tf32", which are three bfloat16 products there; TF32 on GPUs that
    have it (Ampere and newer) if embeddings have 512 numbers or more, as shorter ones average less
    of the rounding out; else float32.

    Args:
        wanted: "auto", or a name from similarity.PRECISIONS.
        device: one that computes.
        dim: d, the length of the embeddings.

    Raises:
        ValueError: neither "auto" nor one of similarity.PRECISIONS.
    """
    if wanted == "auto":
        if device.platform == "tpu" or (_has_tf32(device) and dim >= _TF32_DIM):
            return "tf32"
        return "highest"
    for known in PRECISIONS:
        if wanted == known:
            return known
    known = ", ".join(("auto", *PRECISIONS))
    raise ValueError(f"loss.precision={wanted!r} is unknown; known: {known}")


def chunk_size(wanted: int | str, *, examples: int, classes: int, device: jax.Device) -> int | None:
    """What loss.chunk_size means: classes at a time, None for all at once.

    All at once takes three products in place of four, so "auto" does that where the logits are
    small beside the device's memory; else it takes chunks whose logits stay in caches.

    Args:
        wanted: "auto", 0 for all at once, or a number.
        examples: b, those of the whole batch: every device compares them all with its classes.
        classes: those held by one device.
        device: one that computes.
    """
    if wanted != "auto":
        return int(wanted) or None
    shared = jax.local_device_count() if device.platform == "cpu" else 1
    # Several processes run one program, though one machine may have more memory than another.
    there_is = memory(device) / shared if jax.process_count() == 1 else _UNKNOWN
    if _DENSE_COPIES * 4 * examples * classes <= there_is / 16:
        return None
    return _rounded(_TILE.get(device.platform, _ACCELERATOR_TILE) // examples, classes)


def chunk_size_between(wanted: int | str, *, classes: int, device: jax.Device) -> int | None:
    """The same where classes are compared with each other, so many with so many at a time."""
    if wanted != "auto":
        return int(wanted) or None
    return _rounded(_EDGE.get(device.platform, _ACCELERATOR_EDGE), classes)


def _rounded(size: int, classes: int) -> int | None:
    """A multiple of 128 near `size`, None where it is no less than all classes."""
    size = max(_MULTIPLE, round(size / _MULTIPLE) * _MULTIPLE)
    return size if size < classes else None


def _has_tf32(device: jax.Device) -> bool:
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; of AMD's GPUs a name
    return (
        device.platform == "gpu"
        and capability.split(".")[0].isdigit()
        and (int(capability.split(".")[0]) >= 8)
    )


def _meminfo(field: str) -> float:
    try:
        for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return 1024.0 * float(value.split()[0])
    except OSError:
        pass
    return _UNKNOWN
