"""Receptive fields of layers, read from one forward pass.

A receptive field is followed through the operations themselves, so that any forward written in PyTorch works,
with skip connections and control flow: every tensor carries the interval of the input that a position of it
sees, convolutions and pools widen it, slices and pads move it, a sum or a concatenation of paths joins them.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from spectralmetrics.probing.selection import Selectors, select_layers
from spectralmetrics.receptive_field.axes import Axis
from spectralmetrics.receptive_field.following import Follower

Extent: TypeAlias = tuple[float, ...]


@dataclass(frozen=True)
class ReceptiveField:
    """The part of the input that one position of a layer's output sees, in positions along each spatial axis.

    Attributes:
        smallest: the extent along the path through the network that sees least.
        largest: the extent along all paths together; equal to ``smallest`` without skip connections and
            branches. ``inf`` where an operation such as a global pool sees all of any input.
    """

    smallest: Extent
    largest: Extent


def receptive_fields(
    model: nn.Module, example: Tensor, layers: Selectors | None = None
) -> dict[str, ReceptiveField]:
    """The receptive field of every layer's output, in the order of the forward pass.

    A convolution or pool of kernel size k and dilation d, whose input positions lie j input pixels apart,
    widens the field by (k − 1)·d·j; a stride multiplies j, a transposed one divides it. Slices and padding move
    the field. Where paths join, the smallest field goes on, and the extent of all that they see together. Where
    positions see different extents, as behind a transposed convolution, it is that of the one that sees most.

    Args:
        model: any module whose forward takes ``example``. It runs once in evaluation mode without gradients,
            and is left as it was.
        example: one input, ``(N, C, *spatial)`` with one to three spatial axes, as large as the inputs that the
            network is used on, since adaptive pools depend on the size.
        layers: as in :class:`LayerProbe`; None takes the layers that a probe takes.

    Returns:
        Layer name -> field of its output, for layers that were called and whose output depends on ``example``.
        A layer that is called several times has the field of its last call.

    Raises:
        TypeError: for a model that is not a module, or an example that is not a tensor.
        ValueError: if the example has no spatial axis.

    Operations that mix positions in other ways (attention, a reshape of positions into features, a mean over
    them) count as seeing everything. Features are taken together: after a concatenation, one may see less.
    Values written into a part of a tensor count where it is named (``maps[:, :4] = …``), not where they are
    written through a view (``maps[:, :4].add_(…)``). Observers such as a probe see this forward, too: pause
    them.

    >>> model = nn.Sequential(
    ...     nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
    ... )
    >>> {name: field.largest for name, field in receptive_fields(model, torch.zeros(1, 1, 28, 28)).items()}
    {'0': (3, 3), '3': (8, 8), '4': (12, 12)}
    """
    if not isinstance(model, nn.Module) or not isinstance(example, Tensor):
        raise TypeError(
            "expected a torch.nn.Module and an example that it takes, a tensor, got"
            f" {type(model).__name__} and {type(example).__name__}"
        )
    if example.ndim < 3:
        raise ValueError(
            f"expected an example of shape (N, C, *spatial), as the model takes it, got {tuple(example.shape)}"
        )
    follower = Follower(example)
    fields: dict[str, ReceptiveField] = {}

    def read(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            field = follower.joined(output)
            if field is not None:
                fields.pop(name, None)
                fields[name] = ReceptiveField(_extent(field.smallest), _extent(field.largest))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in select_layers(model, layers).items():
            stack.enter_context(module.register_forward_hook(read(name)))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        with torch.no_grad(), follower:
            model(example)
    return fields


def border_layer(
    fields: Mapping[str, ReceptiveField],
    input_size: int | Sequence[int],
    *,
    paths: Literal["largest", "smallest"] = "largest",
) -> str | None:
    """The first layer whose receptive field exceeds the input along every spatial axis.

    From there on, a layer sees nothing of the input that the layers before it could not see together:
    low-saturation tails are expected to begin there (`arXiv:2106.12307 <https://arxiv.org/abs/2106.12307>`_).

    Args:
        fields: from :func:`receptive_fields`.
        input_size: extent of the input, one number or one per axis.
        paths: with skip connections, take all paths (``"largest"``) or the one that sees least
            (``"smallest"``).

    Returns:
        The layer's name; None if every layer sees only a part of the input.

    Raises:
        TypeError: for fields of another kind.
        ValueError: for other ``paths``, an extent that is not a positive integer, or a number of axes that the
            fields do not have.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 8, 3))
    >>> fields = receptive_fields(model, torch.zeros(1, 1, 16, 16))
    >>> border_layer(fields, 8), border_layer(fields, 16)
    ('2', None)
    """
    if paths not in ("largest", "smallest"):
        raise ValueError(f"expected paths to be 'largest' or 'smallest', got {paths!r}")
    if not isinstance(fields, Mapping) or not all(isinstance(each, ReceptiveField) for each in fields.values()):
        raise TypeError(f"expected fields as receptive_fields returns them, got {fields!r}")
    given = list(input_size) if isinstance(input_size, Sequence) else [input_size]
    if not all(isinstance(size, numbers.Integral) and size > 0 for size in given):
        raise ValueError(f"expected input_size as a positive integer, or one for each axis, got {input_size!r}")
    for name, field in fields.items():
        extent = getattr(field, paths)
        sizes = given if isinstance(input_size, Sequence) else given * len(extent)
        if len(sizes) != len(extent):
            raise ValueError(f"expected an input size of {len(extent)} axes, got {input_size!r}")
        if all(seen > size for seen, size in zip(extent, sizes, strict=True)):
            return name
    return None


def _extent(axes: Sequence[Axis]) -> Extent:
    return tuple(int(axis.extent) if float(axis.extent).is_integer() else float(axis.extent) for axis in axes)
