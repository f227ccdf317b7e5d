"""Tensors in outputs of layers: the first floating one of a nest, and nested tensors as one padded tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_sequence

from spectralmetrics.torch_private import is_known, jagged_dim


def first_tensor(output: Any) -> Tensor | PackedSequence | None:
    """The first floating tensor in a nest of tuples, lists, mappings and dataclasses; None if there is none.

    >>> first_tensor({"ids": torch.zeros(2, dtype=torch.int64), "hidden": (torch.ones(3),)})
    tensor([1., 1., 1.])
    """
    return _first_tensor(output, ())


def not_floating(output: Any) -> str:
    """The error message for an output without a floating tensor.

    >>> not_floating(torch.zeros(2, dtype=torch.int64))
    'expected a floating tensor in the output, got a Tensor of torch.int64'
    """
    got = f"a Tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
    return f"expected a floating tensor in the output, got {got}"


def _first_tensor(output: Any, inside: tuple[Any, ...]) -> Tensor | PackedSequence | None:
    if output is None:  # Dynamo of torch 2.8 cannot read the class of None
        return None
    if isinstance(output, Tensor):
        # A method of an unknown subclass may break the graph that is traced.
        is_unknown = torch.compiler.is_compiling() and not is_known(output)
        return output if is_unknown or output.is_floating_point() else None
    if isinstance(output, PackedSequence):  # itself a tuple
        return output if output.data.is_floating_point() else None
    # Dynamo cannot compare tuples by identity, which would break the graph.
    if not torch.compiler.is_compiling() and any(output is outer for outer in inside):
        return None  # a nest that holds itself
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = (getattr(output, field.name, None) for field in dataclasses.fields(output))
    inside = (*inside, output)
    for part in parts:
        first = _first_tensor(part, inside)
        if first is not None:
            return first
    return None


def padded_nested(nested: Tensor) -> tuple[Tensor, Tensor, int]:
    """The samples of a nested tensor, padded with zeros; (N, T) flags, False for padding; the ragged dimension.

    Raises:
        ValueError: for samples without features, or of other sizes in more than one dimension.
    """
    parts = list(nested.unbind())
    shapes = [tuple(part.shape) for part in parts]
    if nested.layout == torch.jagged:
        ragged = jagged_dim(nested)
    else:
        differing = [dim for dim, sizes in enumerate(zip(*shapes, strict=True), 1) if len({*sizes}) > 1]
        if len(differing) > 1:
            raise ValueError(
                f"expected samples of a nested output to differ in one dimension, got shapes {shapes[:3]}"
            )
        ragged = differing[0] if differing else 1
    if nested.ndim < 3:
        raise ValueError(
            f"expected a nested output with features, (N, T*, D), got samples of shapes {shapes[:3]}"
        )
    padded = pad_sequence([part.movedim(ragged - 1, 0) for part in parts], batch_first=True)  # (N, T, …)
    lengths = torch.tensor([shape[ragged - 1] for shape in shapes], device="cpu")
    return padded.movedim(1, ragged), up_to(lengths, padded), ragged


def up_to(lengths: Tensor, padded: Tensor) -> Tensor:
    """(N, T) boolean, True for the first steps of each sequence."""
    steps = torch.arange(padded.shape[1], device=lengths.device)
    return (steps < lengths[:, None]).to(padded.device)
