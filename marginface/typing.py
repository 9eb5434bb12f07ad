"""Shape annotations, e.g. Float[Array, "b d"]: documentation in use, executed in the tests."""

from typing import TYPE_CHECKING, Any

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, PyTree, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, PyTree, Shaped, UInt8
    except ImportError:  # the core runs without jaxtyping too; then nothing is checked

        class _Unchecked:
            def __class_getitem__(cls, _: Any) -> Any:
                return Any

        Bool = Float = Int = PyTree = Shaped = UInt8 = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "PyTree", "Shaped", "UInt8"]
