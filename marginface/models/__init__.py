"""Networks from images to embeddings: one module per family, each with a class `Model`."""

from typing import Any

from marginface.typing import Array


def outputs(result: Any) -> dict[str, Array]:
    """What a network gives, by name: an array is its embeddings, a head may give more."""
    return result if isinstance(result, dict) else {"embedding": result}
