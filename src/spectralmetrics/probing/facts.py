"""Stages and layers, the keys of their values, and facts about layers that follow from types and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from spectralmetrics.layers import ceiling_of

STAGES = ("train", "eval")

Place: TypeAlias = tuple[str, str]
"""Stage and layer."""

Key: TypeAlias = tuple[str, str, str]
"""Statistic, stage, layer; see :func:`as_text`."""


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


def as_text(values: Mapping[Key, Any]) -> dict[str, Any]:
    """Values by ``"{statistic}/{stage}/{layer}"``, as users read them.

    >>> as_text({("saturation", "eval", "conv1"): 0.5})
    {'saturation/eval/conv1': 0.5}
    """
    return {"/".join(key): value for key, value in values.items()}


def from_text(key: str) -> Key:
    """The key for a name made by :func:`as_text`; ``""`` for the stage or layer that a scalar does not have."""
    statistic, stage, layer = (*key.split("/", 2), "", "")[:3]
    return statistic, stage, layer


def module_key(stage: str, name: str) -> str:
    """A key for ``nn.ModuleDict``, which takes neither dots nor the names of its own methods."""
    name = name.replace("%", "%25").replace("/", "%2F")
    return f"{stage}/{name.replace('.', '/')}"
