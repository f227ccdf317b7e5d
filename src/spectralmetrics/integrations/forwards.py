"""The forwards of a trainer's model that count, and their stage."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from spectralmetrics.functional.tail import MEAN_LAYER
from spectralmetrics.integrations.methods import Methods
from spectralmetrics.integrations.progress import LateBar
from spectralmetrics.integrations.values import with_means
from spectralmetrics.metrics.groups import Metrics
from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.facts import STAGES
from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.probe import group_of
from spectralmetrics.probing.processes import from_first_process, is_first
from spectralmetrics.probing.selection import unwrap
from spectralmetrics.probing.steps import stage_by_flag
from spectralmetrics.probing.whole_state import STATES, load_whole_state, whole_state

_logger = logging.getLogger("spectralmetrics")

Stage: TypeAlias = Literal["train", "eval"]
_READER = "log"
"""The reader of the windows between the steps at which a trainer logs."""


class Forwards:
    """Probes the model of a trainer; the trainer's work decides the stage of each forward.

    The ``training`` flags of layers do not decide: a frozen layer in eval mode takes part in training, and its
    forwards count in ``"train"``. All forwards of a validation count in ``"eval"``, whatever their mode.

    Args:
        model: the model that is trained, or a wrapper of it.
        metrics: for these and other arguments see :class:`~spectralmetrics.LayerProbe`.
        generation: True counts the forwards of ``generate`` of a model of transformers. It runs the encoder
            again, and feeds the decoder tokens that are not in the data.
        each_layer: True gives the values of each layer at steps; False the means over the layers alone.

    Raises:
        TypeError: if ``generation`` or ``each_layer`` is neither True nor False.
        ValueError: for what :class:`~spectralmetrics.LayerProbe` raises.
    """

    def __init__(
        self, model: nn.Module, metrics: Metrics | None, generation: bool, each_layer: bool, **arguments: Any
    ) -> None:
        for name, value in {"generation": generation, "each_layer": each_layer}.items():
            if not isinstance(value, bool):
                raise TypeError(f"expected {name} to be True or False, got {value!r}")
        self.probe = LayerProbe(model, metrics, **arguments)
        self.probe.persistent()
        self._model = unwrap(model)
        self._each_layer = each_layer
        generators = [] if generation else [each for each in model.modules() if _generates(each)]
        self._generators = list(map(Methods, generators))
        self._told: set[tuple[str, str, str]] = set()  # stage, layer and kind of problems that were logged
        self._left_out: set[Stage] = set()  # in which generations were left out since the last values
        self._finished: set[str] = set()  # stages whose values are read, and which begin anew
        self._recorded: set[str] = set()  # finished stages that are in a record
        for stage in STAGES:
            self.probe._windows.open(_READER, stage)

    def begin(self, stage: Stage, mode: bool | None = None) -> None:
        """From now on forwards count in this stage.

        Args:
            stage: ``"train"`` or ``"eval"``.
            mode: mode of the model in the trainer's own forwards. In another mode it is run for another
                purpose, such as an evaluation inside a training step, unobserved. None goes by no mode.
        """
        self.end()
        model = self._model
        self._renew(stage)
        self.probe._steps.stage_of = lambda _: stage if mode is None or model.training == mode else None
        for each in self._generators:
            # Not longer than this: a copy that is made of the model at other times has it not.
            each.surround("generate", functools.partial(self._unseen, stage))

    def scale_by(self, scaler: Any, engine: Any = None) -> None:
        """Tell a probe of gradients what scales the trainer's loss; it takes that out.

        Args:
            scaler: a ``torch.amp.GradScaler``; None where the trainer has none.
            engine: the engine of DeepSpeed, which scales by itself; None without it.
        """
        if self.probe.observe == "gradients" and (scaler is not None or engine is not None):
            self.probe.gradient_scale = scaler if engine is None else _EngineScale(engine)

    def is_empty(self, stage: Stage) -> bool:
        """True if nothing can be observed in a stage: no gradient arrives in an evaluation."""
        return self.probe.observe == "gradients" and stage == "eval"

    def end(self, observes: bool = True) -> None:
        """From now on forwards count by the layers' ``training`` flags, or not at all."""
        self.probe._steps.stage_of = self._by_flag if observes else lambda training: None
        for each in self._generators:
            each.restore()

    def reset(self, stage: Stage | None = None) -> None:
        """Forget what was observed in a stage, or in both."""
        for each in STAGES if stage is None else (stage,):
            self._begin_anew(each)

    def finish(self, stage: Stage) -> None:
        """Note that a stage has been read. The probe keeps it for the user until the stage's next forward."""
        self._finished.add(stage)

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Inside, the probe holds only what no record has; afterwards a record has it."""
        with self.probe._without(self._recorded):
            yield
        self._recorded |= self._finished

    def saved(self, records: bool) -> dict[str, Any] | None:
        """The unread observations of all processes, on the first process; None on the others. All call it.

        Args:
            records: True if there is a recorder, so that stages without a record are unread.
        """
        found = whole_state(self.probe, self._recorded if records else self._finished)
        stages = {"finished": sorted(self._finished), "recorded": sorted(self._recorded)}
        return None if found is None else found | stages | {"rule": self._rule()}

    def load(self, saved: dict[str, Any] | None) -> dict[str, Any] | None:
        """Begin anew, or go on from a state of :meth:`saved`; all processes call it.

        The state of the first process counts. Earlier releases saved the unread observations alone. Returns the
        other entries of the state, on all processes; None for a beginning.

        Raises:
            ValueError: for the state of other layers, metrics or observations.
        """
        self.reset()
        entries = from_first_process(
            lambda: None if saved is None else {key: saved[key] for key in saved.keys() - STATES}, None
        )
        if entries is not None:
            self._check_rule(entries.get("rule", {}))
            lacking = load_whole_state(self.probe, saved)
            self._finished, self._recorded = (set(entries.get(name, ())) for name in ("finished", "recorded"))
            if lacking and "train" not in self._finished:
                warn_user(
                    f"the checkpoint has no observations of {', '.join(map(repr, lacking))}: their values and"
                    " record of this epoch are of what comes after it alone"
                )
        return entries

    def compute_step(self, keep: Callable[[], None]) -> dict[tuple[str, str], float]:
        """(metric, layer) -> value at a step of training, of what was observed since the last such step.

        Args:
            keep: called while the probe holds that, and nothing else.
        """
        values = with_means(self.compute_window("train", keep))
        return {key: number for key, number in values.items() if self._each_layer or key[1] == MEAN_LAYER}

    def compute_window(self, stage: Stage, keep: Callable[[], None] | None = None) -> dict[str, Tensor]:
        """The values of what was observed since the last window; the stage goes on."""
        if stage in self._finished:
            return {}
        others = [each for each in STAGES if each != stage] if keep else []
        with self.probe._only(_READER, stage), self.probe._without(others):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the values of the whole stage say it
                values = self.probe.compute(stage, LateBar("reading layers"))
            if keep is not None and values:
                keep()
        self.probe._windows.advance(_READER, stage)
        return values

    def leave(self) -> None:
        """Observe nothing more; what was observed can still be saved."""
        self.end()
        self.probe.remove()

    def close(self) -> None:
        """The trainer is done, and the probe is its user's."""
        self.leave()
        for stage in STAGES:
            self.probe._windows.close(_READER, stage)

    def _rule(self) -> dict[str, str]:
        rule = self.probe.rule
        return {"observe": rule.observe, "feature_maps": rule.feature_maps, "sequences": rule.sequences}

    def _check_rule(self, saved: Mapping[str, str]) -> None:
        for name, value in self._rule().items():
            if (other := saved.get(name, value)) != value:  # earlier releases did not save it
                raise ValueError(
                    f"expected the saved observations of a callback with {name}={value!r}, got those of one"
                    f" with {name}={other!r}; add the callbacks in the same order, with the same arguments"
                )

    def _by_flag(self, training: bool) -> str:
        stage = stage_by_flag(training)
        self._renew(stage)
        return stage

    def _renew(self, stage: str) -> None:
        if stage in self._finished:
            self._begin_anew(stage)

    def _begin_anew(self, stage: str) -> None:
        self._finished.discard(stage)
        self._recorded.discard(stage)
        self.probe.reset(stage)
        self.probe._windows.advance(_READER, stage)

    def compute_stage(self, stage: Stage) -> dict[tuple[str, str], float]:
        """(metric, layer) -> value of a stage, which has then been read; empty if nothing is observed in it.

        All processes call it. The first one that reads the probe logs each problem once, see
        :meth:`.LayerProbe.findings`. If all that ran in the stage was generation, a warning says so.
        """
        if self.is_empty(stage):
            return {}
        values = self.probe.compute(stage, LateBar("reading layers"))
        if values:
            for finding in self.probe.findings(stage):
                if finding.severity == "problem" and finding[:3] not in self._told:
                    self._told.add(finding[:3])
                    if is_first(group_of(self.probe)):
                        _logger.warning(str(finding))
        if stage in self._left_out and not values:
            message = f"all that ran in {stage} was generate(), which is observed with generation=True only"
            warnings.warn(message, UserWarning, stacklevel=4)
        self._left_out.discard(stage)
        self.finish(stage)
        return with_means(values)

    @contextlib.contextmanager
    def _unseen(self, stage: Stage, *args: Any, **kwargs: Any) -> Iterator[None]:
        self._left_out.add(stage)
        with self.probe.paused():
            yield


class _EngineScale:
    """The factor by which a DeepSpeed engine scales the loss; 1 where its optimizer has none."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def get_scale(self) -> float:
        """As of a ``torch.amp.GradScaler``."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))


def _generates(module: nn.Module) -> bool:
    # By name, so that nothing has to be imported for a model that is not of transformers.
    return any(each.__name__ == "GenerationMixin" for each in type(module).__mro__)
