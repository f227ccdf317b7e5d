"""Which forwards of a trainer's model count, and in which stage."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from torch import nn

from spectralmetrics.probing import LayerProbe
from spectralmetrics.probing.collections import Metrics
from spectralmetrics.probing.selection import unwrap
from spectralmetrics.probing.steps import stage_by_flag
from spectralmetrics.tail import check_layer_names

Stage: TypeAlias = Literal["train", "eval"]


class Forwards:
    """Probes the model of a trainer, and tells the probe what the trainer is doing.

    The ``training`` flags of layers do not tell it: a frozen layer in eval mode takes part in training all the
    same, and its forwards count in ``"train"``. What runs in a validation counts in ``"eval"``, whatever its
    mode.

    Args:
        model: that is trained; wrappers are looked through.
        metrics: see :class:`~spectralmetrics.LayerProbe`.
        generation: whether what ``generate`` of a model of transformers runs counts. It runs the encoder
            again, and feeds the decoder tokens that are not in the data.
        **arguments: see :class:`~spectralmetrics.LayerProbe`.

    Attributes:
        probe: of the model.

    Raises:
        TypeError: if ``generation`` is neither True nor False.
        ValueError: if a layer is named ``"mean"``; for what :class:`~spectralmetrics.LayerProbe` raises.
    """

    def __init__(self, model: nn.Module, metrics: Metrics | None, generation: bool, **arguments: Any) -> None:
        if not isinstance(generation, bool):
            raise TypeError(f"expected generation to be True or False, got {generation!r}")
        self.probe = LayerProbe(model, metrics, **arguments)
        try:
            check_layer_names(self.probe.layers)
        except ValueError:
            self.probe.remove()
            raise
        self._model = unwrap(model)
        self._generators = [] if generation else [each for each in model.modules() if _generates(each)]
        self._left_out: set[Stage] = set()  # in which generations were left out since the last values
        self._replaced: list[tuple[nn.Module, Any]] = []

    def begin(self, stage: Stage, mode: bool | None = None) -> None:
        """From now on forwards count in this stage.

        Args:
            stage: ``"train"`` or ``"eval"``.
            mode: of the model in the trainer's own forwards. In another mode it is run for another purpose,
                such as an evaluation inside a training step, and is not observed. None goes by no mode.
        """
        self.end()
        model = self._model
        self.probe._count_by(lambda _: stage if mode is None or model.training == mode else None)
        for module in self._generators:
            # On the object, and not longer than this: a copy that is made of the model at other times has none.
            self._replaced.append((module, vars(module).get("generate")))
            module.generate = self._unseen(stage, module.generate)  # type: ignore[assignment, arg-type]

    def end(self, observes: bool = True) -> None:
        """From now on forwards count by the layers' ``training`` flags, or not at all."""
        self.probe._count_by(stage_by_flag if observes else _nowhere)
        while self._replaced:
            module, before = self._replaced.pop()
            if before is None:
                del module.generate
            else:
                module.generate = before

    def explain(self, stage: Stage, values: Mapping[str, Any]) -> None:
        """Warn if there are no values of a stage because all that ran in it was generation."""
        if stage in self._left_out and not values:
            message = f"all that ran in {stage} was generate(), which is observed with generation=True only"
            warnings.warn(message, UserWarning, stacklevel=4)
        self._left_out.discard(stage)

    def _unseen(self, stage: Stage, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def unseen(*args: Any, **kwargs: Any) -> Any:
            self._left_out.add(stage)
            with self.probe.paused():
                return generate(*args, **kwargs)

        return unseen


def _nowhere(training: bool) -> None:
    """A stage for no forward."""


def _generates(module: nn.Module) -> bool:
    # By name, so that nothing has to be imported for a model that is not of transformers.
    return any(each.__name__ == "GenerationMixin" for each in type(module).__mro__)
