"""Facts about a layer's outputs that follow from its type and weights, without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from spectralmetrics.layers import ceiling_of


class LayerFacts(NamedTuple):
    """Facts about a layer, known without its data.

    Attributes:
        kind: name of its type.
        ceiling: the most directions that its weights allow its outputs; None if it is not known.
    """

    kind: str
    ceiling: int | None

    @property
    def of_gradients(self) -> bool:
        """True if gradients are observed, not outputs or inputs."""
        return False

    def saved(self) -> dict[str, Any]:
        """The facts for the file of a run; earlier releases wrote the attributes alone."""
        return self._asdict() | ({"of_gradients": True} if self.of_gradients else {})

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> LayerFacts:
        """The facts that were saved."""
        kind = GradientFacts if saved.get("of_gradients", False) else LayerFacts
        return kind(saved["kind"], saved["ceiling"])


class GradientFacts(LayerFacts):
    """Facts about a layer whose gradients are observed."""

    __slots__ = ()

    @property
    def of_gradients(self) -> bool:
        """See :class:`LayerFacts`."""
        return True


UNKNOWN_LAYER = LayerFacts("", None)
"""A layer of which only data are known."""


def facts_of(module: nn.Module, *, is_linear: bool = True) -> LayerFacts:
    """The facts of a layer.

    Args:
        module: the layer.
        is_linear: True if observations are a linear function of each output: False with a user's function or a
            maximum.

    >>> facts_of(nn.Conv2d(64, 128, 1))
    LayerFacts(kind='Conv2d', ceiling=64)
    """
    return LayerFacts(type(module).__name__, ceiling_of(module) if is_linear else None)
