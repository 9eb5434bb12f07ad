"""Shape annotations, e.g. Float[Array, "b d"]: documentation in use, executed in the tests."""

from typing import TYPE_CHECKING, Any

import numpy as np
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

# A hyper-parameter: one number or one per example, known or traced.
Number = Array | np.ndarray | float | int

__all__ = ["Array", "Bool", "Float", "Int", "Number", "PyTree", "Shaped", "UInt8"]
