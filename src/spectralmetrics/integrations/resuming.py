"""The file beside a trainer's checkpoint from which a callback goes on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_FILE = "layer_probe_state.pt"


def write_state(folder: Path, saved: Mapping[str, Any]) -> None:
    """Put a state of tensors, numbers and names into a folder, whole or not at all."""
    beside = folder / f".{_FILE}.{os.getpid()}"
    try:
        torch.save(saved, beside)
        os.replace(beside, folder / _FILE)
    finally:
        beside.unlink(missing_ok=True)


def read_state(folders: Iterable[Path]) -> dict[str, Any] | None:
    """The state in the first of the folders that has one; None if none has.

    Raises:
        ValueError: for a file that cannot be read.
    """
    file = next((folder / _FILE for folder in folders if (folder / _FILE).is_file()), None)
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
