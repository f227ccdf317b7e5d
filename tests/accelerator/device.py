"""An emulated accelerator: tensors of a device of its own, computed on the CPU.

It refuses what an accelerator refuses: operands on different devices and, inside :func:`without_float64`,
float64. It counts the kernels that it launches and the values that the host waits for. It has neither streams
nor autocast, and nothing is compiled for it.

>>> device = emulated_device()
>>> with watching() as seen:
...     float((torch.ones(3, device=device) + 1).sum())
6.0
>>> seen.launches, seen.reads
(3, 1)
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter, tree_map

_NAME = "emulated"
# Since torch 2.10 a device can be defined in Python.
CAN_BE_EMULATED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
# Operations that copy a value to the host.
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
# Operations that allocate memory and compute nothing.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
}
_FREE |= {"_unsafe_view", "set_", "resize_", "record_stream", "_reshape_alias", "_has_same_storage_numel"}


class Seen:
    """Counts of what the device was asked for.

    Attributes:
        operations: kernels launched, by name.
        waits: values that the host waited for, by the name of the operation.
    """

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @property
    def launches(self) -> int:
        return self.operations.total()

    @property
    def reads(self) -> int:
        return self.waits.total()


_watchers: list[Seen] = []
_has_float64 = [True]


class EmulatedTensor(Tensor):
    """A tensor of the emulated device, and the tensor of the CPU that holds its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> EmulatedTensor:
        if held.dtype in (torch.float64, torch.complex128) and not _has_float64[0]:
            raise TypeError(f"the emulated device has no {held.dtype}")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(_NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"EmulatedTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()  # PyTorch refuses it to all subclasses

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _rebuild(self.held.detach().clone(), self.requires_grad, _is_parameter(self))
        twin: Tensor = memo[id(self)]
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.held.detach(), self.requires_grad, _is_parameter(self))


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _rebuild(held: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    tensor = EmulatedTensor(held)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    operands = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
    target = kwargs.get("device")
    _refuse_mixed(name, operands)
    mine = [each for each in operands if isinstance(each, EmulatedTensor)]
    leaves = mine and target is not None and torch.device(target).type == "cpu"
    leaves = leaves or (name == "copy_" and not isinstance(args[0], EmulatedTensor))
    masks = name.startswith("index") and any(
        each.dtype == torch.bool for each in tree_iter(args[1:2]) if isinstance(each, Tensor)
    )
    for seen in _watchers:
        if leaves or masks or name in _READS:
            seen.waits[name] += 1
        elif name not in _FREE and not func.is_view:
            seen.operations[name] += 1
    if target is not None and torch.device(target).type == _NAME:
        kwargs = {**kwargs, "device": "cpu"}
        leaves = False
    elif not mine:
        leaves = True
    held_args, held_kwargs = tree_map(lambda e: e.held if isinstance(e, EmulatedTensor) else e, (args, kwargs))
    result = func(*held_args, **held_kwargs)
    if leaves or not isinstance(result, (Tensor, tuple, list)):
        return result
    back = {id(each.held): each for each in mine}

    def wrap(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return back[id(each)] if id(each) in back else EmulatedTensor(each)

    return tree_map(wrap, result)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy, called by ``torch.tensor`` itself."""
    _run(torch.ops.aten.copy_.default, (target, source), {})
    return target


def _refuse_mixed(name: str, operands: list[Tensor]) -> None:
    if name in ("copy_", "_to_copy", "set_", "is_same_size"):
        return
    if name.startswith("index") and "select" not in name:
        operands = operands[:1]  # index tensors may be on the CPU
    # A scalar on the CPU is passed with the launch.
    types = {type(each) is EmulatedTensor for each in operands if each.ndim or isinstance(each, EmulatedTensor)}
    if len(types) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")


class _Generator(torch.Generator):
    """Generators of the emulated device are CPU generators: PyTorch asks a device in C++ for its own."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == _NAME else device)


class _Module:
    """The module that PyTorch looks up as ``torch.emulated``."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return False  # so that nothing uses it unasked, such as `DataParallel` in other tests

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@functools.cache
def emulated_device() -> torch.device:
    """The device, made on first use. A test that asks for it is skipped where it cannot be made."""
    if not CAN_BE_EMULATED:
        pytest.skip("a device can be emulated since torch 2.10")

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return True

        def has_primary_context(self, device_index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    register = backend_registration._setup_privateuseone_for_python_backend
    register(_NAME, backend_module=_Module(), hook=Hook())
    # A function without a tensor of the device among its arguments is found by this key.
    anything = torch.library.Library("_", "IMPL")
    anything.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    copies = torch.library.Library("aten", "IMPL")
    copies.impl("_copy_from", _copy_from, "PrivateUse1")
    _KEPT.extend((anything, copies))
    torch.Generator = _Generator  # type: ignore[misc]
    return torch.device(_NAME, 0)


_KEPT: list[Any] = []


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Count what the device is asked for inside the context."""
    seen = Seen()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """Inside the context, the device has no float64, as MPS."""
    before, _has_float64[0] = _has_float64[0], False
    try:
        yield
    finally:
        _has_float64[0] = before
