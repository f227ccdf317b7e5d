"""Every use of names that PyTorch does not promise, with the releases that have them, and a way without them.

Checked in the sources of torch 2.8, 2.13 and 2.15, and run there. If a name is missing, models are observed all
the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _find(path: str, default: Any = None, root: Any = torch) -> Any:
    """The object under a dotted path from ``torch`` or another root; a default if there is none."""
    value = root
    for name in path.split("."):
        value = getattr(value, name, None)
        if value is None:
            return default
    return value


# -- backward, tracing, modes ---------------------------------------------------------------------------------

# `torch._C._current_graph_task_id`, 2.8 to 2.15, called at every hook. The public
# `torch.utils.module_tracker.ModuleTracker.is_bw` stands in, which reads the same and takes longer. The tracker
# is never entered, and registers no hooks.
_TRACKER = ModuleTracker()
_task: Callable[[], int] = _find("_C._current_graph_task_id", lambda: 0 if _TRACKER.is_bw else -1)


def in_backward() -> bool:
    """True if this thread runs a backward pass, where a checkpoint's recomputation calls hooks again."""
    return _task() != -1


# True while `torch.jit.trace` runs the model: `torch._C._is_tracing`, 2.8 to 2.15. The public
# `torch.jit.is_tracing` stands in, which checks more.
is_tracing: Callable[[], bool] = _find("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]


# `torch._C._len_torch_dispatch_stack` and `torch.utils._python_dispatch._disable_current_modes`, 2.8 to 2.15.
# Without them selective checkpointing records a probe's operations, and an ambient FakeTensorMode runs them.
# The number of modes that intercept every operation, such as selective checkpointing or FakeTensorMode.
num_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 0)


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Inside, no mode intercepts operations."""
    disable = _find("utils._python_dispatch._disable_current_modes", contextlib.nullcontext)
    context: contextlib.AbstractContextManager[Any] = disable()
    return context


# `torch._C._set_grad_enabled`, 2.8 to 2.15, takes a tenth of the time of `torch.set_grad_enabled`, which stands
# in.
set_grad_enabled: Callable[[bool], Any] = _find("_C._set_grad_enabled", torch.set_grad_enabled)


# `torch._C._is_any_autocast_enabled`, 2.8 to 2.15, called at every hook. Without it, the setting of the
# output's device is read each time, which takes longer.
is_autocast_anywhere: Callable[[], bool] = _find("_C._is_any_autocast_enabled", lambda: True)


def is_fake(values: Tensor) -> bool:
    """True if a tensor has a shape and no values: on the meta device, or made in ``FakeTensorMode``."""
    # `torch._subclasses.fake_tensor.FakeTensor`, 2.8 to 2.15. Without it a warning says that a model that runs
    # on fake tensors is not observed any more.
    if values.is_meta:
        return True
    return type(values) is not Tensor and isinstance(values, _find("_subclasses.fake_tensor.FakeTensor", ()))


# `Tensor._base` and `Tensor._version`, 2.8 to 2.15; autograd's notes describe both. Without the first,
# gradients are not observed where a layer that works in place follows one that returns a view.


def base_of_view(values: Tensor) -> Tensor | None:
    """The tensor that a view belongs to; None for a tensor that is not a view. Dynamo traces this function.

    >>> base = torch.zeros(4)
    >>> base_of_view(base.view(2, 2)) is base, base_of_view(base)
    (True, None)
    """
    base: Tensor | None = getattr(values, "_base", None)
    return base


class Version:
    """Detects in-place changes of a tensor, or of the tensor that it is a view of; does not keep its memory.

    >>> values = torch.zeros(3)
    >>> version = Version(values)
    >>> before, _ = version.has_changed(), values[0].add_(1)
    >>> before, version.has_changed()
    (False, True)
    """

    def __init__(self, values: Tensor) -> None:
        # A detached tensor shares the counter of changes with its source, whatever memory it gets later.
        self._twin = values.detach()
        self._twin.data = values.new_empty(0)
        self._version = self._twin._version

    def has_changed(self) -> bool:
        """True if the tensor has been changed since."""
        return self._twin._version != self._version


# `torch.nn.Module.__call__`, 2.13, is a function of Python that calls its module `self`. Elsewhere each
# call that a model makes of itself counts as a forward.
_CALL = getattr(nn.Module.__call__, "__code__", None)


def calls_itself(module: nn.Module) -> bool:
    """True if a module's forward that now begins runs inside another one of the same module."""
    calls, frame = 0, sys._getframe(1)
    while frame.f_back is not None and calls < 2:
        calls += frame.f_code is _CALL and frame.f_locals.get("self") is module
        frame = frame.f_back
    return calls > 1


# -- threads --------------------------------------------------------------------------------------------------


def _find_one_thread() -> Callable[[], object] | None:
    # `omp_set_num_threads` of OpenMP and `MKL_Set_Num_Threads_Local` of MKL, which both hold for the calling
    # thread only, in `libtorch_cpu.so` or the libraries that it loads, 2.13. `torch.set_num_threads` would
    # change the numbers of other threads, too, and with them the last digits of a training.
    are_known = torch.backends.mkl.is_available() and torch.backends.openmp.is_available()
    if sys.platform != "linux" or not are_known:
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        of_mkl, of_openmp = library.MKL_Set_Num_Threads_Local, library.omp_set_num_threads
    except (OSError, AttributeError):
        return None

    def use_one() -> None:
        torch.get_num_threads()  # PyTorch sets the numbers of a thread when it is first asked
        of_openmp(1)
        of_mkl(1)

    return use_one


# Makes tensor operations that the calling thread starts run in this thread alone. None where this is not known
# to be possible: matrices are then decomposed one after the other.
use_one_thread: Callable[[], object] | None = _find_one_thread()


# -- torch.func -----------------------------------------------------------------------------------------------

# `torch._C._functorch` and `torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack`, 2.8 to 2.15.
# Without them a forward inside transforms of `torch.func` counts as any other forward; when that fails, the
# layer is left out with a warning.
_functorch: Any = _find("_C._functorch")
is_transformed: Callable[[Tensor], bool] = getattr(
    _functorch, "is_functorch_wrapped_tensor", lambda values: False
)

# `torch._C._functorch.is_legacy_batchedtensor`, 2.8 to 2.15: True for gradients in a backward of many at once,
# `torch.autograd.grad(is_grads_batched=True)`. Without it the layer is left out with a warning.
is_many_at_once: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", lambda values: False)


def outside_transforms() -> contextlib.AbstractContextManager[object]:
    """Inside, the running transforms of ``torch.func`` have no effect.

    A transform refuses to change a tensor that is not among its inputs, such as a sum over several forwards,
    and would wrap results that are kept afterwards.
    """
    clear = _find("_functorch.pyfunctorch.temporarily_clear_interpreter_stack", contextlib.nullcontext)
    context: contextlib.AbstractContextManager[object] = clear()
    return context


def untransformed(values: Tensor, dim: int) -> tuple[Tensor, int] | None:
    """The values of a tensor under ``torch.func`` without its wrappers, and the index of a dimension in them.

    Dimensions that ``vmap`` hides come first, so that a forward of one sample at a time counts as many rows as
    a forward of all samples together.

    Args:
        values: the values that a module receives.
        dim: the dimension, not negative.

    Returns:
        None for a tensor without values, such as one in a traced graph.

    >>> shapes = []
    >>> def record(row):
    ...     values, dim = untransformed(row, 0)
    ...     shapes.append((tuple(values.shape), dim))
    ...     return row
    >>> _ = torch.func.vmap(record)(torch.zeros(7, 3))
    >>> shapes
    [((7, 3), 1)]
    """
    while is_transformed(values):
        if _functorch.is_functionaltensor(values):
            return None
        is_batched = _functorch.is_batchedtensor(values)
        hidden = _functorch.maybe_get_bdim(values) if is_batched else 0
        values = _functorch.get_unwrapped(values)
        if is_batched:
            values, dim = values.movedim(hidden, 0), dim + 1
    return values, dim


# -- torch.compile --------------------------------------------------------------------------------------------


def is_exporting() -> bool:
    """True if ``torch.export`` traces; Dynamo traces this function.

    This reads the flag ``torch.compiler._is_exporting_flag``, 2.8 to 2.15, since for Dynamo in 2.8 to 2.11 the
    public ``torch.compiler.is_exporting()`` is the constant True. Without the flag it calls that function.
    """
    if _HAS_EXPORTING_FLAG:
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


_HAS_EXPORTING_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


# `torch._C._dynamo.eval_frame.set_code_exec_strategy` and `_FrameExecStrategy`, 2.8 to 2.15, do what
# `torch.compiler.disable` does without importing Dynamo, sympy and the rest (1.2 to 2.3 s of CPU).
_frames: Any = _find("_C._dynamo.eval_frame")


def skip_frames(code: CodeType) -> bool:
    """Make Dynamo skip the frames of this code, and of its calls, where code that is not traced calls it.

    Dynamo still traces into it from traced code. Return False if frames cannot be skipped: Dynamo then compiles
    the parts of it that it can.
    """
    try:
        skip = _frames._FrameAction.SKIP
        _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):
        return False
    return True


def untraced(function: _Function) -> _Function:
    """Like ``torch.compiler.disable``, but without importing Dynamo.

    Dynamo reads the attributes ``_torchdynamo_disable`` and ``_torchdynamo_disable_msg``, 2.8 to 2.15.
    ``torch.compiler.disable`` is used where frames cannot be skipped.
    """
    if not skip_frames(function.__code__):
        disabled: _Function = torch.compiler.disable(function)
        return disabled
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = None  # type: ignore[attr-defined]
    return function


def heed_hooks() -> None:
    """Make compiled models check for hooks at each call, from now on and in this process.

    By default Dynamo assumes that a module compiled without hooks never gets any, and that all instances of a
    class have the same hooks: a model probed later, or beside another instance of its class, would run the
    graph of the unprobed one. ``torch._dynamo.config.skip_nnmodule_hook_guards``, 2.8 to 2.15, changes that for
    all models of the process, at the cost of a comparison per module and call. Models compiled before are
    compiled once more at their next run. This does not import Dynamo: the setting changes as soon as other code
    imports it. A release without the setting is assumed to check for hooks.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not _find("__spec__._initializing", False, dynamo):
        _have_hooks_heeded()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported("torch._dynamo", _have_hooks_heeded))


def ignores_hooks() -> bool:
    """True if compiled models would ignore hooks again, because other code has changed the setting since."""
    # The attribute `torch._dynamo` would import Dynamo.
    return bool(_find("config.skip_nnmodule_hook_guards", False, sys.modules.get("torch._dynamo")))


def _have_hooks_heeded() -> None:
    dynamo: Any = sys.modules["torch._dynamo"]
    if not ignores_hooks():
        return
    dynamo.config.skip_nnmodule_hook_guards = False
    # `torch._dynamo.convert_frame.input_codes.seen` and `torch._dynamo.reset_code_caches`, 2.8 to 2.15. Without
    # them all compiled code is dropped, which is right and may be slow once.
    compiled = _find("convert_frame.input_codes.seen", (None,), dynamo)
    if compiled:  # while hooks were ignored
        _find("reset_code_caches", torch.compiler.reset, dynamo)()


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function once, after a module has been imported."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self._name = name
        self._function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if fullname != self._name:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndThen(spec.loader, self._function)
        return spec


class _AndThen(importlib.abc.Loader):
    """A loader that calls a function after another loader's work, and is like the other loader otherwise."""

    def __init__(self, loader: importlib.abc.Loader, function: Callable[[], None]) -> None:
        self._loader = loader
        self._function = function

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """See ``importlib.abc.Loader``."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See ``importlib.abc.Loader``."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._function()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


# -- nn.Module ------------------------------------------------------------------------------------------------

# The attributes of `nn.Module` that hold hooks by number, and flags of hooks by the same number; 2.8 to 2.13. A
# missing attribute holds no hook of a probe.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOK_NOTES = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def renumber(handle: RemovableHandle) -> None:
    """Give a hook a number that hooks of other probes and on other modules can have, too.

    PyTorch counts hooks up, and Dynamo guards a graph by the numbers of hooks that take keywords or are always
    called, and until 2.8 by the numbers of all hooks: each probe of a model would compile it again. The handle
    has the attributes ``id``, ``hooks_dict_ref`` and ``extra_dict_ref``, 2.8 to 2.15; without them the number
    stays.
    """
    try:
        dicts = [ref() for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref)]
    except AttributeError:
        return
    own = handle.id
    number = next(n for n in itertools.count(-1, -1) if not any(n in each for each in dicts if each))
    for each in dicts:
        if each is not None and own in each:
            items = [(number if key == own else key, value) for key, value in each.items()]
            each.clear()
            each.update(items)
    handle.id = number


# Wrappers: the module that defines each, its class, and its attribute with the wrapped module, 2.8 to 2.15. The
# names for compilation, sharding and checkpoints are private; if a release has other names, names of layers
# begin with these. A class that has not been imported wraps nothing.
_WRAPPERS = (
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    # Lightning's Fabric, 2.6, in either of its two packages.
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
)

WRAPPER_ATTRIBUTES = frozenset(attribute for *_, attribute in _WRAPPERS)
"""The parts that wrappers add to the names of parameters."""


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None for any other module, whatever its attributes are called."""
    for defined_in, name, attribute in _WRAPPERS:
        kind = getattr(sys.modules.get(defined_in), name, None)
        if kind is not None and isinstance(module, kind):
            inner = getattr(module, attribute, None)
            return inner if isinstance(inner, nn.Module) else None
    return None


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module, including None and children that are registered twice.

    ``_modules``, 2.8 to 2.15; ``named_children`` leaves both out, and stands in.
    """
    return dict(getattr(module, "_modules", None) or module.named_children())


def weight_of_hook(module: nn.Module, name: str) -> Tensor | None:
    """The weight that a hook of ``torch.nn.utils`` makes before a forward in evaluation; None without one.

    The hooks of ``weight_norm`` and ``spectral_norm`` in ``_forward_pre_hooks`` with their ``compute_weight``,
    2.8 to 2.15. Without them, the caller has the weight of the last forward.
    """
    for hook in (_find("_forward_pre_hooks", None, module) or {}).values():
        if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
            options = {"do_power_iteration": False} if type(hook).__name__ == "SpectralNorm" else {}
            made: Tensor = hook.compute_weight(module, **options)
            return made
    return None


def bare_copy(module: nn.Module, replaced: Callable[[Any], Any]) -> nn.Module:
    """A copy that shares a module's contents, without hooks and without a replaced forward.

    ``_parameters``, ``_modules``, ``_compiled_call_impl`` and attributes with "hook" in their names, 2.8 to
    2.13.

    Args:
        module: the module to copy, with its children.
        replaced: returns the copy's tensor for a parameter.
    """
    copy: nn.Module = object.__new__(type(module))
    state = module.__dict__ | {name: own for name, own in vars(nn.Module()).items() if "hook" in name}
    state.pop("forward", None)
    parameters = {name: each if each is None else replaced(each) for name, each in module._parameters.items()}
    parts = {
        name: each if each is None else bare_copy(each, replaced) for name, each in module._modules.items()
    }
    copy.__dict__.update(state, _parameters=parameters, _modules=parts, _compiled_call_impl=None)
    return copy


# -- torch.distributed ----------------------------------------------------------------------------------------


def spec_of_part(parameter: Tensor) -> Any:
    """The spec of a DTensor of which a parameter is this process' part between forwards; None if it is none.

    ``torch.distributed.tensor.parallel.ddp._pre_dp_module_transform``, for DDP over tensor parallelism, puts it
    on the parameter as ``_st_info``, 2.8 to 2.13.
    """
    return getattr(parameter, "_st_info", None)


_STAGE = "torch.distributed.pipelining.stage"
# The method's name in 2.8 and in 2.13. Without it the made-up inputs with which a stage learns shapes are data.
_INFERENCES = ("_shape_inference", "_forward_metadata_inference")


def is_inferring_shapes() -> bool:
    """True if a pipeline stage runs on uninitialised memory, to learn shapes; only stack frames show that.

    >>> is_inferring_shapes()
    False
    """
    if _STAGE not in sys.modules:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _INFERENCES and frame.f_globals.get("__name__") == _STAGE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_SPLIT = "torch.distributed.pipelining._backward"
# The names of the functions in 2.8 and in 2.13; without them a gradient counts in both parts.
_PARTS = {"stage_backward_input": "inputs", "stage_backward_weight": "weights"}


def part_of_backward() -> str | None:
    """The part of a pipeline stage's backward that runs, if its schedule splits it; read from stack frames.

    Zero-bubble schedules compute the gradients of a stage's inputs first, and the gradients of its weights when
    there is time: this second part runs parts of the graph again.

    Returns:
        ``"inputs"``, ``"weights"``, or None for a backward that is not split.

    >>> part_of_backward()
    """
    if _SPLIT not in sys.modules:
        return None
    is_caller, part = _look_for_part(sys._getframe(1))
    if is_caller or part is not None:
        return part
    # Autograd's own thread, as for a GPU, has none of the frames of the thread that waits for it.
    parts = (_look_for_part(frame)[1] for frame in sys._current_frames().values())
    return next((each for each in parts if each is not None), None)


def _look_for_part(frame: Any) -> tuple[bool, str | None]:
    """True if a thread has begun a backward, and the part of a stage's backward that it runs."""
    is_caller = False
    while frame is not None:
        name = frame.f_code.co_name
        if name in _PARTS and frame.f_globals.get("__name__") == _SPLIT:
            return is_caller, _PARTS[name]
        is_caller = is_caller or name == "_engine_run_backward"
        frame = frame.f_back
    return is_caller, None


# The module of context parallelism since 2.10, and in 2.8.
_CONTEXT_PARALLEL = tuple(
    f"torch.distributed.tensor.experimental.{each}" for each in ("_context_parallel._attention", "_attention")
)


def is_context_parallel() -> bool:
    """True if this runs inside ``torch.distributed.tensor.experimental.context_parallel``.

    It replaces PyTorch's attention function and records it in ``_replaced_functions``, 2.8 to 2.15. Without
    that attribute each process' positions count as whole sequences.
    """
    for name in _CONTEXT_PARALLEL:
        replaced = getattr(sys.modules.get(name), "_replaced_functions", None)
        if replaced is not None:
            return nn.functional.scaled_dot_product_attention in replaced
    return False


def default_store() -> Any:
    """The store that connects the processes of the default group; an AttributeError if PyTorch has none.

    ``torch.distributed.distributed_c10d._get_default_store``, 2.8 to 2.15.
    """
    return torch.distributed.distributed_c10d._get_default_store()


def group_named(name: str) -> Any:
    """The process group of a name: ``torch.distributed.distributed_c10d._resolve_process_group``, 2.8 to 2.15.

    Without it a compiled layer whose outputs are DTensors is left out, with a warning.
    """
    resolve: Any = _find("distributed.distributed_c10d._resolve_process_group")
    return resolve(name)


def dims_of_fsdp(module: nn.Module) -> int:
    """The number of mesh dimensions that a unit of FSDP2 uses: one, or two if it also replicates.

    ``torch.distributed.fsdp.FSDPModule._get_fsdp_state``, 2.8 to 2.15. Without it, one. If parameters of one
    unit lie on several meshes, the first mesh counts.
    """
    state = _find("_get_fsdp_state", root=module)()
    groups = _find("_fsdp_param_groups", root=state) or [_find("_fsdp_param_group", root=state)]
    info = _find("mesh_info", root=groups[0])
    dims = (getattr(info, "shard_mesh_dim", 0), getattr(info, "replicate_mesh_dim", None))
    return sum(dim is not None for dim in dims)


# -- DTensors -------------------------------------------------------------------------------------------------


def waited(local: Tensor) -> Tensor:
    """The tensor after its collective: ``AsyncCollectiveTensor.wait``, 2.8 to 2.15; any other as it is."""
    if type(local) is not Tensor and hasattr(local, "wait"):
        local = local.wait()
    return local


def masked_parts(local: Tensor, placements: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """A summand of a row-parallel embedding with the rows of other processes' words set to zero.

    Its placement ``_MaskPartial``, 2.8 to 2.15, keeps a mask of these words in ``mask_buffer.data`` until the
    sum is taken; the mask stays there, since the layer's own reduction needs it later. The new placement is a
    plain sum. A placement without that attribute stays as it is.
    """
    plain = []
    for placement in placements:
        mask = getattr(getattr(placement, "mask_buffer", None), "data", None)
        if mask is not None:
            mask = mask if mask.ndim == local.ndim else mask[..., None]
            local = local.masked_fill(mask, 0)
            placement = torch.distributed.tensor.Partial(placement.reduce_op)
        plain.append(placement)
    return local, plain


# -- jagged tensors -------------------------------------------------------------------------------------------


# `torch.nested._internal.nested_tensor.NestedTensor`, 2.8 to 2.15; PyTorch imports it for the first such
# tensor. Without it compiled layers that return jagged tensors are left out.
with contextlib.suppress(ImportError):
    importlib.import_module("torch.nested._internal.nested_tensor")
_KNOWN = (Tensor, _find("nested._internal.nested_tensor.NestedTensor", Tensor))


def is_known(values: Tensor) -> bool:
    """True if the class of a tensor is one of PyTorch's own, whose attributes compiled code can read."""
    # Parameters come first: the Dynamo of torch 2.8 fails to guard the type of one that is made in the graph.
    return isinstance(values, nn.Parameter) or type(values) in _KNOWN


def jagged(values: Tensor, offsets: Tensor, lengths: Tensor | None, dim: int) -> Tensor:
    """A nested tensor that is a view of these values.

    ``torch.nested._internal.nested_tensor``, 2.8 to 2.15, makes it, since the public
    ``nested_tensor_from_jagged``, which stands in, logs a warning of PyTorch in 2.13.
    """
    internal = _find("nested._internal.nested_tensor")
    try:
        view: Tensor
        if lengths is None:
            view = internal.nested_view_from_values_offsets(values, offsets, ragged_idx=dim)
        else:
            view = internal.nested_view_from_values_offsets_lengths(values, offsets, lengths, ragged_idx=dim)
        return view
    except (AttributeError, TypeError):
        return torch.nested.nested_tensor_from_jagged(values, offsets, lengths, jagged_dim=dim)


def jagged_dim(values: Tensor) -> int:
    """The ragged dimension of a jagged nested tensor: ``_ragged_idx``, 2.8 to 2.15; 1 without the attribute."""
    return int(getattr(values, "_ragged_idx", 1))


# -- files ----------------------------------------------------------------------------------------------------


def load_tensors(path: Path, is_mapped: bool) -> Any:
    """Load tensors from a file of ``torch.save`` without running code.

    PyTorch 2.14 warns of each file with sparse tensors that checking them takes time.

    Args:
        path: the file.
        is_mapped: True maps the file into memory; only zip files can be.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped or None)
