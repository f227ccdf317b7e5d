"""Monitor: reports during training when a layer collapses, dies, fades, or jumps in scale."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from spectralmetrics.monitoring.alarms import DEFAULT_ALARMS, STATISTICS, Alarm, AlarmRule, enough, judge
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.facts import STAGES
from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.probe import group_of, keep_history, read_window
from spectralmetrics.probing.processes import is_first
from spectralmetrics.sums.checks import check_positive_integer, check_type

_FIRST = 5
"""Steps to the first reading, which finds problems that were there from the beginning."""
_FORWARDS = 256
"""The least number of forwards whose scale is remembered."""


@runtime_checkable
class AlarmRecorder(Protocol):
    """Keeps alarms, as a :class:`~spectralmetrics.Recorder` does."""

    def add_alarm(self, alarm: Alarm) -> None:
        """Keep an alarm."""

    def drop_alarms(self, step: int) -> None:
        """Forget the alarms from a step on."""


class Monitor:
    """Reads a probe every n steps, and reports layers that collapse, die, fade, or jump in scale.

    Each reading judges what was observed since the last one, by rules that compare a layer with its own past:
    :data:`~spectralmetrics.DEFAULT_ALARMS`. The probe keeps all observations, so that
    :meth:`.LayerProbe.compute`, :meth:`.Recorder.record` and others work as without a monitor. On
    several processes make the monitor and call :meth:`step` on all of them: all get the same alarms.

    Scales that jump or fade are found in the history of forwards: a :class:`~spectralmetrics.HistoryMetric`
    joins the probe's metrics if there is none. The memory of earlier readings is saved with the probe, see
    :meth:`.LayerProbe.persistent`: make the monitor before you load a state.

    Args:
        probe: the probe to read. Each stage has one monitor at a time.
        every: number of steps of the optimiser from one reading to the next.
        stage: ``"train"`` or ``"eval"``.
        alarms: the rules, such as ``[rule for rule in DEFAULT_ALARMS if rule.kind != "scale"]``.
        on_alarm: ``"warn"`` warns on the first process of the group in which the probe's metrics are merged.
            ``"stop"`` also sets :attr:`should_stop` on all processes. A function is called with each alarm, on
            all processes.
        recorder: keeps the alarms, such as a :class:`~spectralmetrics.Recorder`. If it cannot write them, a
            warning says why.

    Attributes:
        probe: the probe to read.
        should_stop: True after an alarm with ``on_alarm="stop"``; the same on all processes. No exception is
            raised: your loop, or the callback of your trainer, ends the training.
        raised: the alarms since this process began.

    Raises:
        TypeError: for a probe, rules or a recorder of another type.
        ValueError: for other arguments out of range.
        RuntimeError: if a ``HistoryMetric`` is to join a probe that has observed something.

    >>> import torch
    >>> from spectralmetrics import LayerProbe
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    >>> batch = torch.randn(64, 8)
    >>> monitor = Monitor(LayerProbe(model), every=20, on_alarm=print)
    >>> for step in range(60):
    ...     if step == 50:
    ...         _ = model[0].weight.data.mul_(32), model[0].bias.data.mul_(32)
    ...     _ = model(batch)  # and a step of the optimizer
    ...     alarms = monitor.step()
    step 51: '0' in train: the scale changed by a factor of 32 in one step, then the scale of 1 other layer
    """

    def __init__(
        self,
        probe: LayerProbe,
        *,
        every: int = 100,
        stage: str = "train",
        alarms: Sequence[AlarmRule] = DEFAULT_ALARMS,
        on_alarm: Literal["warn", "stop"] | Callable[[Alarm], Any] = "warn",
        recorder: AlarmRecorder | None = None,
    ) -> None:
        check_type("probe", probe, LayerProbe)
        check_positive_integer("every", every)
        if stage not in STAGES:
            raise ValueError(f"expected a stage among {STAGES}, got {stage!r}")
        _check_rules(alarms)
        if on_alarm not in ("warn", "stop") and not callable(on_alarm):
            raise ValueError(f"expected on_alarm to be 'warn', 'stop' or a function, got {on_alarm!r}")
        if recorder is not None and not isinstance(recorder, AlarmRecorder):
            raise TypeError(f"expected recorder to be a Recorder or None, got {type(recorder).__name__}")
        self.probe = probe
        self.every = every
        self.stage = stage
        self.rules = tuple(alarms)
        self.on_alarm = on_alarm
        self.recorder = recorder
        self.should_stop = False
        self.raised: list[Alarm] = []
        if any(rule.statistic in ("level", "rms") for rule in self.rules):
            keep_history(probe, stage, max(_FORWARDS, 2 * every))
        self._reader = f"monitor/{stage}"
        self._past = probe._remembered.setdefault(self._reader, {})
        probe._windows.open(self._reader, stage)
        self._begun: int | None = None  # the last step that this process has seen
        if probe.step is None:
            probe.step = probe._steps.counted = self._past.get("step", 0)
        self._first: int = probe.step or 0
        probe._steps.counted_by[self._reader] = recorder

    def step(self) -> list[Alarm]:
        """Call this after each step of the optimiser, on all processes.

        The steps are counted from where the state of the probe was saved, or by :attr:`.LayerProbe.step` if you
        set it.

        Returns:
            The alarms of a reading; empty if nothing is wrong, and at steps without a reading.
        """
        probe, past, steps = self.probe, self._past, self.probe._steps
        last: int = past.get("step", self._first)
        is_set = probe.step is not None and probe.step != steps.counted  # by the user
        if is_set or self._reader in steps.counted_by:
            step = ((probe.step or 0) if is_set else last) + 1
            steps.counted_by.clear()
        else:  # the monitor of the other stage has counted this step
            step = last + 1 if probe.step is None else probe.step
        drops = not any(each is self.recorder for each in steps.counted_by.values())
        steps.counted_by[self._reader] = self.recorder
        if self.recorder is not None and drops and (self._begun is None or step <= self._begun):
            with self._warning_of_files():
                self.recorder.drop_alarms(step)
        past["step"] = self._begun = step
        probe.step = steps.counted = step
        if step < past.get("next", min(self.every, _FIRST)):
            return []
        past["next"] = (step // self.every + 1) * self.every
        return self._read(step)

    def close(self) -> None:
        """Stop reading; the probe goes on without the monitor's windows."""
        self.probe._windows.close(self._reader, self.stage)
        self.probe._remembered.pop(self._reader, None)
        self.probe._steps.counted_by.pop(self._reader, None)  # which holds the recorder

    def __repr__(self) -> str:
        return f"Monitor(every={self.every}, stage={self.stage!r}, {len(self.raised)} alarms)"

    def _read(self, step: int) -> list[Alarm]:
        found = read_window(self.probe, self.stage, self._reader)
        layers = self._past.setdefault("layers", {})
        for numbers, _ in found:
            layers.setdefault(numbers.layer, {})
        alarms = judge(self.rules, self.stage, step, found, layers)
        # If a layer has too few rows, they also count in its next reading.
        read = [numbers.layer for numbers, _ in found if enough(self.rules, numbers)]
        self.probe._windows.advance(self._reader, self.stage, read)
        for alarm in alarms:
            self.raised.append(alarm)
            if self.recorder is not None:
                with self._warning_of_files():
                    self.recorder.add_alarm(alarm)
        for alarm in alarms:
            if callable(self.on_alarm):
                self.on_alarm(alarm)
                continue
            if is_first(group_of(self.probe)):
                warnings.warn(str(alarm), UserWarning, stacklevel=3)
            self.should_stop = self.should_stop or self.on_alarm == "stop"
        return alarms

    @contextlib.contextmanager
    def _warning_of_files(self) -> Iterator[None]:
        """Inside, a file that cannot be written is a warning: a full disk must not end the training."""
        try:
            yield
        except OSError as error:
            if is_first(group_of(self.probe)):
                warn_user(f"the training goes on, but its alarms are not recorded: {error}")


def _check_rules(rules: object) -> None:
    is_sequence = isinstance(rules, Sequence) and not isinstance(rules, (str, AlarmRule))
    if not is_sequence or not all(isinstance(rule, AlarmRule) for rule in rules):  # type: ignore[attr-defined]
        raise TypeError(f"expected alarms to be a sequence of AlarmRules, got {rules!r}")
    for rule in rules:  # type: ignore[attr-defined]
        if rule.statistic not in STATISTICS:
            raise ValueError(f"expected the statistic of a rule among {STATISTICS}, got {rule.statistic!r}")
