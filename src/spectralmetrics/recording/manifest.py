"""``recording.json``: what the files of a run do not say themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spectralmetrics.probing.facts import LayerFacts
from spectralmetrics.recording.files import replacing
from spectralmetrics.recording.record import Settings

FILE_NAME = "recording.json"
_FORMAT = 1
_KINDS: dict[str, tuple[type, ...]] = {"metric": (str,), "center": (bool,), "threshold": (float, int)}


@dataclass
class Manifest:
    """The state of a run.

    Attributes:
        writers: name -> the last epoch recorded before that writer joined, None for one from the beginning.
            An epoch up to that one needs no part of it to be whole.
        statistics: name -> settings of the metric, see :func:`~spectralmetrics.recording.record.describe`.
        layers: name -> what is known of the layer besides its data: ``kind`` and ``ceiling``.
        last_epoch: of the last whole record; what counts for a run of which no writer keeps records.
    """

    writers: dict[str, int | None] = field(default_factory=dict)
    statistics: dict[str, Settings] = field(default_factory=dict)
    last_epoch: int | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, LayerFacts]:
        """What is known of the layers."""
        return {name: LayerFacts(**each) for name, each in self.layers.items()}


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
        _check(manifest)
        return manifest
    except KeyError as error:
        raise ValueError(f"expected {path} to be a recorder's: it has no {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected {path} to be a recorder's: {error}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest of a run."""
    with replacing(directory / FILE_NAME) as file:
        file.write(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1).encode())


def _check(manifest: Manifest) -> None:
    """Raise a ValueError unless all parts that others read are of their kind."""
    if not all(isinstance(part, dict) for part in (manifest.writers, manifest.statistics, manifest.layers)):
        raise ValueError("writers, statistics and layers are no objects")
    for name, epoch in [*manifest.writers.items(), ("last_epoch", manifest.last_epoch)]:
        if epoch is not None and type(epoch) is not int:
            raise ValueError(f"expected an epoch or null as {name!r}, got {epoch!r}")
    for name, facts in manifest.layers.items():
        ceiling = facts.get("ceiling")
        if set(facts) != set(LayerFacts._fields) or not isinstance(facts["kind"], str):
            raise ValueError(f"expected kind and ceiling of the layer {name!r}, got {facts!r}")
        if ceiling is not None and type(ceiling) is not int:
            raise ValueError(f"expected an integer or null as the ceiling of {name!r}, got {ceiling!r}")
    for name, settings in manifest.statistics.items():
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object as the settings of {name!r}, got {settings!r}")
        for key, kinds in _KINDS.items():
            if type(settings.get(key, kinds[0]())) not in kinds:
                kind = " or ".join(each.__name__ for each in kinds)
                raise ValueError(f"expected a {kind} as the {key} of {name!r}, got {settings[key]!r}")
