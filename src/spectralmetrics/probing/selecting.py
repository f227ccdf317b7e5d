"""Functions of the user's that say how a layer's output is placed, and fail on all processes or on none."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.probing.alike import Alike
from spectralmetrics.probing.checksums import extremes
from spectralmetrics.probing.hooks import Select
from spectralmetrics.probing.identity import is_one_of_several
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.parts import LeftOut, Part, is_dtensor, part_of, reason_of
from spectralmetrics.probing.rendezvous import key_of_probe
from spectralmetrics.torch_private import default_store


class Selecting:
    """The results of such functions, and the processes on which they have failed.

    Args:
        selected: layers with a function.
        alike: the settings that the processes of a layer must have in common.
    """

    def __init__(self, selected: Collection[str], alike: Alike) -> None:
        self._alike = alike
        self._forms: dict[str, Part] = {}  # of what was selected, without its values
        self._asked: set[str] = set()  # layers of which the settings have been told
        self._heard: set[str] = set()  # layers of which all have told whether the function failed
        self._failed: dict[str, str] = {}  # layer -> why it failed in its first forward, on some process
        self._checked: set[str] = set()  # layers whose forms have been compared
        self._key = key_of_probe("select", selected)

    def tell_settings(self, name: str) -> None:
        """Tell this process' settings to those that share a layer; who they are is not known yet."""
        self._asked.add(name)
        self._tell_store(f"{name}/settings", pickle.dumps(self._alike.settings()))

    def select(self, name: str, output: Any, function: Select) -> tuple[Any, Exception | None]:
        """Calls a function of the user's on an output.

        Whether it fails in its first forward is told to all processes through their store: nobody can know then
        which of them expect something of this one.

        Raises:
            LeftOut: where it has failed in the first forward on some process, for good.

        Returns:
            It and None. Where the function raises, what others expect of this process, the part of a DTensor as
            it was the last time, whose values are NaN, and the error.
        """
        if name in self._failed:
            raise LeftOut(self._failed[name])
        try:
            chosen = function(output)
        except Exception as error:
            before = self._forms.get(name)
            values = first_tensor(output)
            if before is None or not isinstance(values, Tensor):
                if name not in self._heard and is_one_of_several():
                    self._failed[name] = f"`select` failed in the first forward: {reason_of(error)}"
                    self._tell_store(name, self._failed[name].encode())
                raise
            sizes = zip(values.shape, before.shape, before.local.shape, strict=True)
            shape = tuple(size if whole == local else whole for size, whole, local in sizes)
            return replace(before, local=torch.full_like(values, math.nan), shape=shape), error
        if is_dtensor(chosen):
            part, values = part_of(chosen), first_tensor(output)
            if name not in self._heard:
                self._heard.add(name)
                self._tell_store(name, b"")
                self._hear_others(name, chosen.device_mesh.mesh.flatten().tolist())
            if isinstance(values, Tensor) and part.local.shape == values.shape:
                self._forms[name] = replace(part, local=part.local.new_empty(()).expand(part.local.shape))
        return chosen, None

    def _tell_store(self, name: str, told: bytes) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):  # a store that cannot, or none
            default_store().set(f"{self._key}/{name}/{dist.get_rank()}", b"." + told)

    def _hear(self, name: str, ranks: list[int]) -> dict[int, bytes]:
        try:
            store = default_store()
            return {rank: store.get(f"{self._key}/{name}/{rank}")[1:] for rank in ranks}
        except (RuntimeError, AttributeError):
            return {}

    def _hear_others(self, name: str, ranks: list[int]) -> None:
        """Raise an error if a function of the user's has failed on one of these, or settings differ."""
        try:
            if settings := self._hear(f"{name}/settings", ranks) if name in self._asked else {}:
                self._alike.compare({rank: pickle.loads(each) for rank, each in settings.items()})
            told = self._hear(name, ranks)
            if failures := [f"{why.decode()} on process {rank}" for rank, why in told.items() if why]:
                raise LeftOut("; ".join(failures))
        except LeftOut as error:
            self._failed[name] = str(error)
            raise

    def check_form(self, name: str, part: Part) -> None:
        """Have all processes agree, once, on the shape of what a function of the user's has returned."""
        if name in self._checked:
            return
        self._checked.add(name)
        for split in part.splits:
            spans = [part.spans(dim) for dim in range(part.local.ndim)]
            fits = tuple(part.local.shape) == tuple(span.stop - span.start for span in spans)
            high, low = extremes([hash(part.shape) % 2**40, not fits], split.group)
            if high != low or high[1]:
                raise LeftOut(
                    f"`select` returned a DTensor of shape {part.shape} whose part on this process is"
                    f" {tuple(part.local.shape)}, which does not fit the other processes': give"
                    " DTensor.from_local the shape and stride of the whole where parts are uneven"
                )
