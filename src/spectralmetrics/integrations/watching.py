"""The monitor of a callback's probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from spectralmetrics.integrations.keeping import Keeping
from spectralmetrics.monitoring import Monitor
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.windows import take_over

MakesMonitor: TypeAlias = Callable[[LayerProbe], Monitor]
_FILE = "layer_probe_monitor.json"


class Watching:
    """Steps a monitor with a trainer.

    Args:
        monitor: a function from the probe to a monitor; True makes one with its defaults, False none.

    Attributes:
        monitor: the monitor of the probe; None without one.

    Raises:
        TypeError: for a monitor of another type.
    """

    def __init__(self, monitor: bool | MakesMonitor) -> None:
        if not (isinstance(monitor, bool) or callable(monitor)):
            raise TypeError(
                f"expected monitor to be True, False or a function from the probe to a Monitor, got {monitor!r}"
            )
        self._made_by: MakesMonitor | None = Monitor if monitor is True else monitor or None
        self._keeps = False
        self.monitor: Monitor | None = None

    def begin(self, probe: LayerProbe) -> None:
        """Watch a probe, or begin anew with it.

        Raises:
            TypeError: if the function returns no monitor of this probe; for what :class:`.Monitor` raises.
        """
        if self._made_by is None:
            return
        if self.monitor is not None:
            self.monitor.close()
        made = self._made_by(probe)
        if not isinstance(made, Monitor) or made.probe is not probe:
            raise TypeError(f"expected monitor to return a Monitor of the probe, got {made!r}")
        self.monitor = made
        self._keeps = made.recorder is None

    def keep(self, keeping: Keeping) -> None:
        """Have the callback's recorder keep the alarms, unless the monitor has one of its own."""
        if self.monitor is not None and self._keeps:
            self.monitor.recorder = keeping.recorder

    def step(self) -> bool:
        """After a step of the optimiser; whether the training is to stop."""
        if self.monitor is None:
            return False
        self.monitor.step()
        return self.monitor.should_stop

    def load(self, folders: Iterable[Path]) -> None:
        """Go on with what the first of the folders has that has any."""
        found = next((folder / _FILE for folder in folders if (folder / _FILE).is_file()), None)
        if self.monitor is not None and found is not None:
            probe = self.monitor.probe
            take_over(json.loads(found.read_text(encoding="utf-8")), probe._remembered, probe._steps)
