"""The file beside a trainer's checkpoint from which a callback goes on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def write_state(folder: Path, saved: Mapping[str, Any], number: int) -> None:
    """Put a state of tensors, numbers and names into a folder, whole or not at all.

    Args:
        folder: folder of the trainer's checkpoint.
        saved: the state.
        number: index of the callback among the callbacks of this type on the trainer.
    """
    file = folder / file_name(number)
    beside = folder / f".{file.name}.{os.getpid()}"
    try:
        torch.save(saved, beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def read_state(folders: Iterable[Path], number: int) -> dict[str, Any] | None:
    """The state of a callback in the first of the folders that has one; None if none has.

    Raises:
        ValueError: for a file that cannot be read.
    """
    file = next(
        (folder / file_name(number) for folder in folders if (folder / file_name(number)).is_file()), None
    )
    if file is None:
        return None
    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"cannot read the probe's observations from {str(file)!r}: {error}; remove the file to go on"
            " without them"
        ) from error
    return saved


def file_name(number: int) -> str:
    """The name of the file of a callback, by its index as for :func:`write_state`."""
    return f"layer_probe_state_{number}.pt" if number else "layer_probe_state.pt"
