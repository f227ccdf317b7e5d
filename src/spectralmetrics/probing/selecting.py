"""The user's functions that select from a layer's output: they fail on all processes or on none."""

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
    """The results of the user's functions, and their failures.

    Args:
        selected: layers with a function.
        alike: the settings that must be equal on the processes of a layer.
    """

    def __init__(self, selected: Collection[str], alike: Alike) -> None:
        self._alike = alike
        self._forms: dict[str, Part] = {}  # layer -> the part that was selected, without its values
        self._sent: set[str] = set()  # layers whose settings this process has sent
        self._exchanged: set[str] = set()  # layers for which all processes have exchanged success or failure
        self._failed: dict[str, str] = {}  # layer -> why it failed in its first forward, on some process
        self._checked: set[str] = set()  # layers whose forms have been compared
        self._key = key_of_probe("select", selected)

    def send_settings(self, name: str) -> None:
        """Send this process' settings to the processes that share a layer, which are not known yet."""
        self._sent.add(name)
        self._send(f"{name}/settings", pickle.dumps(self._alike.settings()))

    def select(self, name: str, output: Any, function: Select) -> tuple[Any, Exception | None]:
        """Call the user's function on an output.

        In the first forward, success or failure goes into the store for all processes: it is not known yet
        which of them wait for this one.

        Raises:
            LeftOut: if the function failed in the first forward on some process; then in all later ones, too.

        Returns:
            Result and None. If the function raises: the part of a DTensor that other processes expect, in its
            last form and with values of NaN, and the error.
        """
        if name in self._failed:
            raise LeftOut(self._failed[name])
        try:
            chosen = function(output)
        except Exception as error:
            before = self._forms.get(name)
            values = first_tensor(output)
            if before is None or not isinstance(values, Tensor):
                if name not in self._exchanged and is_one_of_several():
                    self._failed[name] = f"`select` failed in the first forward: {reason_of(error)}"
                    self._send(name, self._failed[name].encode())
                raise
            sizes = zip(values.shape, before.shape, before.local.shape, strict=True)
            shape = tuple(size if whole == local else whole for size, whole, local in sizes)
            return replace(before, local=torch.full_like(values, math.nan), shape=shape), error
        if is_dtensor(chosen):
            part, values = part_of(chosen), first_tensor(output)
            if name not in self._exchanged:
                self._exchanged.add(name)
                self._send(name, b"")
                self._check_others(name, chosen.device_mesh.mesh.flatten().tolist())
            if isinstance(values, Tensor) and part.local.shape == values.shape:
                self._forms[name] = replace(part, local=part.local.new_empty(()).expand(part.local.shape))
        return chosen, None

    def _send(self, name: str, message: bytes) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):  # the store does not support it, or is missing
            default_store().set(f"{self._key}/{name}/{dist.get_rank()}", b"." + message)

    def _received(self, name: str, ranks: list[int]) -> dict[int, bytes]:
        try:
            store = default_store()
            return {rank: store.get(f"{self._key}/{name}/{rank}")[1:] for rank in ranks}
        except (RuntimeError, AttributeError):
            return {}

    def _check_others(self, name: str, ranks: list[int]) -> None:
        """Raise a LeftOut if the user's function has failed on one of these processes, or settings differ."""
        try:
            if settings := self._received(f"{name}/settings", ranks) if name in self._sent else {}:
                self._alike.compare({rank: pickle.loads(each) for rank, each in settings.items()})
            reasons = self._received(name, ranks)
            if failures := [f"{why.decode()} on process {rank}" for rank, why in reasons.items() if why]:
                raise LeftOut("; ".join(failures))
        except LeftOut as error:
            self._failed[name] = str(error)
            raise

    def check_form(self, name: str, part: Part) -> None:
        """Compare, once, the shapes that the user's function has returned on all processes."""
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
