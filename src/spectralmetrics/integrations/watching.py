"""The monitor of a callback's probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from spectralmetrics.integrations.keeping import Keeping
from spectralmetrics.monitoring import Monitor
from spectralmetrics.probing import LayerProbe

MakesMonitor: TypeAlias = Callable[[LayerProbe], Monitor]


class Watching:
    """Steps a monitor with a trainer.

    Args:
        monitor: a function from the probe to a monitor; True makes one with its defaults, False none.

    Attributes:
        monitor: of the probe; None without one.

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
