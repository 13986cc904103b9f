"""What the operator `layer_grads` has to know of a layer."""

from __future__ import annotations

from typing import NamedTuple


class LayerSpec(NamedTuple):
    """One layer as the operator `layer_grads` takes it.

    Attributes:
        kind: one of the kinds in rgd_ext/ops/layer.py, such as "linear".
        groups: the number of groups of channels, for a group norm.
        eps: what a norm adds to the mean of squares.
    """

    kind: str
    groups: int = 1
    eps: float = 0.0


LINEAR = LayerSpec("linear")
