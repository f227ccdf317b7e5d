"""What is said of a layer's output whose layout nothing tells for sure."""

from __future__ import annotations

from spectralmetrics.probing.layout import Layout
from spectralmetrics.probing.observations import Batch, ObservationRule


def doubt_of(name: str, batch: Batch, layout: Layout, rule: ObservationRule) -> str:
    """What a user has to confirm of a layout; empty if nothing.

    Args:
        name: of the layer.
        batch: its output, as it was taken.
        layout: of sequences, as the model tells.
        rule: what is an observation.
    """
    values = batch.values
    if batch.guessed_dim is not None:
        width = values.shape[2 if batch.kind == "sequence" else 1]
        return (
            f"nothing tells where the features of {name!r} are: dimension {batch.guessed_dim} of"
            f" {values.ndim}, of size {width}, is taken. Call register_layer for its type, or give a"
            " `select` for this layer, or batch_first=True if it is a sequence (N, T, D)"
        )
    if name not in layout.unsure:
        return ""
    if batch.was_flat:
        taken = f"(N, T) = {tuple(values.shape[:2])}, flattened,"
    elif batch.kind == "sequence" and batch.valid is None and rule.sequences != "timesteps":
        taken = f"(N, T, D) = {tuple(values.shape)},"
    else:
        return ""
    return (
        f"the output of {name!r} is taken as {taken} but parts of this model have time first: give the"
        " probe batch_first=True or False, or a `select` for this layer"
    )
