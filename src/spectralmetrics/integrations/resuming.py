"""The file beside a trainer's checkpoint from which a callback goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from spectralmetrics.recording.files import replacing


def write_state(folder: Path, saved: Mapping[str, Any], number: int) -> None:
    """Put a state into the folder of a checkpoint; ``number`` counts the callbacks of one type on a trainer."""
    with replacing(folder / file_name(number)) as file:
        torch.save(saved, file)


def read_state(folders: Iterable[Path], number: int) -> dict[str, Any] | None:
    """The state of a callback in the first of the folders that has one; None if none has.

    Raises:
        ValueError: for a file that cannot be read.
    """
    files = (folder / file_name(number) for folder in folders)
    file = next((each for each in files if each.is_file()), None)
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
    """The name of the file of a callback, by its number as for :func:`write_state`."""
    return f"layer_probe_state_{number}.pt" if number else "layer_probe_state.pt"
