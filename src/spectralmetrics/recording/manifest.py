"""``recording.json``: what the files of a run do not say themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spectralmetrics.recording.files import replacing
from spectralmetrics.recording.record import Settings

FILE_NAME = "recording.json"
_FORMAT = 1


@dataclass
class Manifest:
    """The state of a run.

    Attributes:
        writers: name -> the last epoch recorded before that writer joined, None for one from the beginning.
            An epoch up to that one needs no part of it to be whole.
        statistics: name -> settings of the metric, see :func:`~spectralmetrics.recording.record.describe`.
        last_epoch: of the last whole record; what counts for a run of which no writer keeps records.
    """

    writers: dict[str, int | None] = field(default_factory=dict)
    statistics: dict[str, Settings] = field(default_factory=dict)
    last_epoch: int | None = None


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a run; an empty one if it has none.

    Raises:
        ValueError: if there is one that cannot be read, or of a later release.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return Manifest()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version > _FORMAT:
            raise ValueError(f"format {version} is of a later release")
        manifest = Manifest(**content)
        if not isinstance(manifest.writers, dict) or not isinstance(manifest.statistics, dict):
            raise ValueError("writers and statistics are no objects")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected {path} to be a recorder's: {error}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest of a run."""
    with replacing(directory / FILE_NAME) as file:
        file.write(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1).encode())
