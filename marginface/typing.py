"""Shape annotations, e.g. Float[Array, "b d"]: documentation in use, executed in the tests."""

from typing import Any

from jax import Array

try:
    from jaxtyping import Bool, Float, Int, PyTree, Shaped, UInt8
except ImportError:  # the core also runs where jaxtyping is not installed; then nothing is checked

    class _Unchecked:
        def __class_getitem__(cls, _: Any) -> Any:
            return Any

    Bool = Float = Int = PyTree = Shaped = UInt8 = _Unchecked  # ty: ignore[invalid-assignment]

__all__ = ["Array", "Bool", "Float", "Int", "PyTree", "Shaped", "UInt8"]
