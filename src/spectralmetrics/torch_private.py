"""Every use of what PyTorch does not promise: the releases each was seen in, and what is done without it.

Looked at in the sources of torch 2.8, 2.13 and 2.15, and run there. Without a name that is missing, models are
observed all the same.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _find(path: str, default: Any = None, root: Any = torch) -> Any:
    """The object under a dotted path from ``torch`` or another root; a default if there is none."""
    found = root
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return default
    return found


# -- backward, tracing, modes ---------------------------------------------------------------------------------

# `torch._C._current_graph_task_id`, 2.8 to 2.15, asked for at every hook. The public
# `torch.utils.module_tracker.ModuleTracker.is_bw` stands in, which reads the same and takes longer; the tracker
# is never entered, and puts no hooks anywhere.
_TRACKER = ModuleTracker()
_task: Callable[[], int] = _find("_C._current_graph_task_id", lambda: 0 if _TRACKER.is_bw else -1)


def in_backward() -> bool:
    """True if this thread runs a backward pass, where a checkpoint's recomputation calls hooks again."""
    return _task() != -1


# Whether `torch.jit.trace` runs the model: `torch._C._is_tracing`, 2.8 to 2.15. The public
# `torch.jit.is_tracing` stands in, which asks for more.
is_tracing: Callable[[], bool] = _find("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]


# `torch._C._len_torch_dispatch_stack` and `torch.utils._python_dispatch._disable_current_modes`, 2.8 to 2.15.
# Without them selective checkpointing records what a probe computes, and an ambient FakeTensorMode gets it.
# How many listen to every operation, such as selective checkpointing or FakeTensorMode.
num_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 0)


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Inside, nobody listens to operations."""
    disable = _find("utils._python_dispatch._disable_current_modes", contextlib.nullcontext)
    found: contextlib.AbstractContextManager[Any] = disable()
    return found


# `torch._C._set_grad_enabled`, 2.8 to 2.15: a tenth of the time that `torch.set_grad_enabled` takes, which
# stands in.
set_grad_enabled: Callable[[bool], Any] = _find("_C._set_grad_enabled", torch.set_grad_enabled)


def is_fake(values: Tensor) -> bool:
    """True if a tensor has a shape and no values: on the meta device, or planned by ``FakeTensorMode``."""
    # `torch._subclasses.fake_tensor.FakeTensor`, 2.8 to 2.15. Without it a model that is planned with fake
    # tensors is told to be not observed any more.
    if values.is_meta:
        return True
    return type(values) is not Tensor and isinstance(values, _find("_subclasses.fake_tensor.FakeTensor", ()))


# `Tensor._base` and `Tensor._version`, 2.8 to 2.15; autograd's notes describe both. Without the first, nothing
# is observed of gradients where a layer that works in place follows one that puts out a view.


def base_of_view(values: Tensor) -> Tensor | None:
    """The tensor that a tensor is a view of; None if it is none. Dynamo looks into this.

    >>> base = torch.zeros(4)
    >>> base_of_view(base.view(2, 2)) is base, base_of_view(base)
    (True, None)
    """
    base: Tensor | None = getattr(values, "_base", None)
    return base


class Version:
    """Tells whether a tensor, or one that it is a view of, has been changed in place; does not keep its memory.

    >>> values = torch.zeros(3)
    >>> version = Version(values)
    >>> before, _ = version.has_changed(), values[0].add_(1)
    >>> before, version.has_changed()
    (False, True)
    """

    def __init__(self, values: Tensor) -> None:
        # A detached tensor counts changes with the one it comes from, whatever memory it is given later.
        self._twin = values.detach()
        self._twin.data = values.new_empty(0)
        self._version = self._twin._version

    def has_changed(self) -> bool:
        """True if there was a change since."""
        return self._twin._version != self._version


# -- torch.func -----------------------------------------------------------------------------------------------

# `torch._C._functorch` and `torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack`, 2.8 to 2.15.
# Without them what runs inside transforms of `torch.func` counts as any other forward, and the layer is left
# out with words as soon as that fails.
_functorch: Any = _find("_C._functorch")
is_transformed: Callable[[Tensor], bool] = getattr(
    _functorch, "is_functorch_wrapped_tensor", lambda values: False
)

# `torch._C._functorch.is_legacy_batchedtensor`, 2.8 to 2.15: what arrives in a backward of many gradients at
# once, `torch.autograd.grad(is_grads_batched=True)`. Without it the layer is left out with words.
is_many_at_once: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", lambda values: False)


def outside_transforms() -> contextlib.AbstractContextManager[object]:
    """Inside, PyTorch does not know of the transforms that are under way.

    A transform refuses to change a tensor that it was not given, such as a sum that goes on from forward to
    forward, and would wrap what is computed to be kept.
    """
    clear = _find("_functorch.pyfunctorch.temporarily_clear_interpreter_stack", contextlib.nullcontext)
    found: contextlib.AbstractContextManager[object] = clear()
    return found


def untransformed(values: Tensor, dim: int) -> tuple[Tensor, int] | None:
    """The values of a tensor under ``torch.func`` without its wrappers, and the place of a dimension in them.

    Dimensions that ``vmap`` has hidden are in front, so that a forward of one sample at a time counts as many
    rows as one of all samples together.

    Args:
        values: as a module gets them.
        dim: not negative.

    Returns:
        None for a tensor without values, as while a graph is traced.

    >>> seen = []
    >>> def look(row):
    ...     values, dim = untransformed(row, 0)
    ...     seen.append((tuple(values.shape), dim))
    ...     return row
    >>> _ = torch.func.vmap(look)(torch.zeros(7, 3))
    >>> seen
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
    """True if ``torch.export`` traces; Dynamo looks into this.

    The flag itself, ``torch.compiler._is_exporting_flag``, 2.8 to 2.15: the public
    ``torch.compiler.is_exporting()`` is the constant True for Dynamo in 2.8 to 2.11. Without the flag the
    public function answers.
    """
    if _HAS_EXPORTING_FLAG:
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


_HAS_EXPORTING_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


# `torch._C._dynamo.eval_frame.set_code_exec_strategy` and `_FrameExecStrategy`, 2.8 to 2.15, do what
# `torch.compiler.disable` does without importing Dynamo, sympy and the rest (1.2 to 2.3 s of CPU).
_frames: Any = _find("_C._dynamo.eval_frame")


def skip_frames(code: CodeType) -> bool:
    """Have Dynamo compile no frame of this code, nor what it calls, where it is called by code that runs.

    Code that is traced looks into it all the same. Return False where that cannot be had: Dynamo then compiles
    what it can of it.
    """
    try:
        skip = _frames._FrameAction.SKIP
        _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):
        return False
    return True


def untraced(function: _Function) -> _Function:
    """As ``torch.compiler.disable``, which imports Dynamo where this does not.

    Dynamo goes by the attributes ``_torchdynamo_disable`` and ``_torchdynamo_disable_msg``, 2.8 to 2.15.
    Without a way to skip the frames ``torch.compiler.disable`` is used.
    """
    if not skip_frames(function.__code__):
        disabled: _Function = torch.compiler.disable(function)
        return disabled
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = None  # type: ignore[attr-defined]
    return function


def heed_hooks() -> None:
    """Have compiled models look whether they have hooks, from now on and in this process.

    Unless it is told otherwise, Dynamo takes it that a module compiled without hooks never gets any, and that
    all instances of a class have the same: a model probed later, or beside another instance of its class, would
    run the graph of the unprobed one. ``torch._dynamo.config.skip_nnmodule_hook_guards``, 2.8 to 2.15, tells it
    otherwise, for all models of the process, at the cost of a comparison per module and call. What was compiled
    before is compiled anew when it runs next, once. Dynamo is not imported for it: it is told when somebody
    imports it. A release without the setting is taken to heed hooks.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not _find("__spec__._initializing", False, dynamo):
        _have_hooks_heeded()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported("torch._dynamo", _have_hooks_heeded))


def ignores_hooks() -> bool:
    """True if compiled models would ignore hooks again, because somebody has set it so since."""
    # `torch._dynamo` would import it.
    return bool(_find("config.skip_nnmodule_hook_guards", False, sys.modules.get("torch._dynamo")))


def _have_hooks_heeded() -> None:
    dynamo: Any = sys.modules["torch._dynamo"]
    if not ignores_hooks():
        return
    dynamo.config.skip_nnmodule_hook_guards = False
    # `torch._dynamo.convert_frame.input_codes.seen` and `torch._dynamo.reset_code_caches`, 2.8 to 2.15. Without
    # them all that was compiled is forgotten, which is right and may be slow once.
    compiled = _find("convert_frame.input_codes.seen", (None,), dynamo)
    if compiled:  # while hooks were ignored
        _find("reset_code_caches", torch.compiler.reset, dynamo)()


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function when a module has been imported, once."""

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
    """A loader that calls a function behind another's work; otherwise it is the other."""

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

# The attributes of `nn.Module` that hold hooks by number, and what it notes of each by the same number; 2.8 to
# 2.13. What is missing holds none of ours.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOK_NOTES = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def renumber(handle: RemovableHandle) -> None:
    """Give a hook a number that the next on its module, or one on another module, has had as well.

    PyTorch counts hooks up, and Dynamo guards a graph by the numbers of hooks that take keywords or are always
    called, and until 2.8 by all: each probe of a model would compile it anew. The handle goes by its attributes
    ``id``, ``hooks_dict_ref`` and ``extra_dict_ref``, 2.8 to 2.15; without them the number stays.
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


# Wrappers by the module that defines them, and the attribute that holds what they wrap, 2.8 to 2.15. Those of
# compilation, sharding and checkpoints are private; where they have other names, names of layers begin with
# these. What has not been imported wraps nothing.
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
    # Of Lightning's Fabric, 2.6, in either of its two packages.
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
)

WRAPPER_ATTRIBUTES = frozenset(attribute for *_, attribute in _WRAPPERS)
"""What wrappers put into the names of parameters."""


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None for any other module, whatever its attributes are called."""
    for defined_in, name, attribute in _WRAPPERS:
        kind = getattr(sys.modules.get(defined_in), name, None)
        if kind is not None and isinstance(module, kind):
            inner = getattr(module, attribute, None)
            return inner if isinstance(inner, nn.Module) else None
    return None


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module, with those that are None or registered twice.

    ``_modules``, 2.8 to 2.15; ``named_children`` leaves these two out, and stands in.
    """
    return dict(getattr(module, "_modules", None) or module.named_children())


def bare_copy(module: nn.Module, brought: Callable[[Any], Any]) -> nn.Module:
    """A copy that shares what a module holds, without hooks and what was put in place of its forward.

    ``_parameters``, ``_modules``, ``_compiled_call_impl`` and attributes with "hook" in their names, 2.8 to
    2.13.

    Args:
        module: to copy, with its parts.
        brought: what the copy has in place of each parameter.
    """
    copy: nn.Module = object.__new__(type(module))
    state = module.__dict__ | {name: own for name, own in vars(nn.Module()).items() if "hook" in name}
    state.pop("forward", None)
    parameters = {name: each if each is None else brought(each) for name, each in module._parameters.items()}
    parts = {name: each if each is None else bare_copy(each, brought) for name, each in module._modules.items()}
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
# The method's name in 2.8 and in 2.13; without it what a stage makes up to learn shapes counts as data.
_INFERENCES = ("_shape_inference", "_forward_metadata_inference")


def is_inferring_shapes() -> bool:
    """True if a pipeline stage runs on uninitialised memory, to learn shapes; only frames tell.

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
    """The part of a pipeline stage's backward that runs, where its schedule splits it; only frames tell.

    Zero-bubble schedules ask for the gradients of a stage's inputs first, and for those of its weights when
    there is time: that runs parts of the graph again.

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


# Where it is since 2.10, and where it was in 2.8.
_CONTEXT_PARALLEL = tuple(
    f"torch.distributed.tensor.experimental.{each}" for each in ("_context_parallel._attention", "_attention")
)


def is_context_parallel() -> bool:
    """True if this runs inside ``torch.distributed.tensor.experimental.context_parallel``.

    It puts a function of its own, which it notes in ``_replaced_functions``, in the place of the attention's,
    2.8 to 2.15. Without that attribute each process' positions are taken for whole sequences.
    """
    for name in _CONTEXT_PARALLEL:
        replaced = getattr(sys.modules.get(name), "_replaced_functions", None)
        if replaced is not None:
            return nn.functional.scaled_dot_product_attention in replaced
    return False


def default_store() -> Any:
    """The store by which the processes of the default group found each other; an AttributeError without one.

    ``torch.distributed.distributed_c10d._get_default_store``, 2.8 to 2.15.
    """
    return torch.distributed.distributed_c10d._get_default_store()


def group_named(name: str) -> Any:
    """The process group of a name: ``torch.distributed.distributed_c10d._resolve_process_group``, 2.8 to 2.15.

    Without it a compiled layer whose outputs are DTensors is left out, with words.
    """
    resolve: Any = _find("distributed.distributed_c10d._resolve_process_group")
    return resolve(name)


def dims_of_fsdp(module: nn.Module) -> int:
    """The dimensions of a mesh that a unit of FSDP2 uses: one, or two where it also replicates.

    ``torch.distributed.fsdp.FSDPModule._get_fsdp_state``, 2.8 to 2.15. Without it, one. Where parameters of one
    unit lie on several meshes, those of the first count.
    """
    state = _find("_get_fsdp_state", root=module)()
    groups = _find("_fsdp_param_groups", root=state) or [_find("_fsdp_param_group", root=state)]
    info = _find("mesh_info", root=groups[0])
    dims = (getattr(info, "shard_mesh_dim", 0), getattr(info, "replicate_mesh_dim", None))
    return sum(dim is not None for dim in dims)


# -- DTensors -------------------------------------------------------------------------------------------------


def waited(local: Tensor) -> Tensor:
    """A tensor whose collective has ended: ``AsyncCollectiveTensor.wait``, 2.8 to 2.15; any other as it is."""
    if type(local) is not Tensor and hasattr(local, "wait"):
        local = local.wait()
    return local


def masked_parts(local: Tensor, placements: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """A summand of a row-parallel embedding with the rows of other processes' words set to zero.

    Its placement ``_MaskPartial``, 2.8 to 2.15, keeps in ``mask_buffer.data`` which words are others', until
    the sum is taken: the layer's own reduction needs it after us. What follows is a plain sum. A placement
    without that attribute is taken as it is.
    """
    found = []
    for placement in placements:
        mask = getattr(getattr(placement, "mask_buffer", None), "data", None)
        if mask is not None:
            mask = mask if mask.ndim == local.ndim else mask[..., None]
            local = local.masked_fill(mask, 0)
            placement = torch.distributed.tensor.Partial(placement.reduce_op)
        found.append(placement)
    return local, found


# -- jagged tensors -------------------------------------------------------------------------------------------


# `torch.nested._internal.nested_tensor.NestedTensor`, 2.8 to 2.15, which imports it when the first one is made.
# Without it compiled layers that put out jagged tensors are left out.
with contextlib.suppress(ImportError):
    importlib.import_module("torch.nested._internal.nested_tensor")
_KNOWN = (Tensor, _find("nested._internal.nested_tensor.NestedTensor", Tensor))


def is_known(values: Tensor) -> bool:
    """True if the class of a tensor is one of PyTorch's own, of which compiled code may ask anything."""
    # First, since the Dynamo of torch 2.8 fails to guard the type of a parameter that is made in the graph.
    return isinstance(values, nn.Parameter) or type(values) in _KNOWN


def jagged(values: Tensor, offsets: Tensor, lengths: Tensor | None, dim: int) -> Tensor:
    """A nested tensor that looks into these values.

    By ``torch.nested._internal.nested_tensor``, 2.8 to 2.15, since the public ``nested_tensor_from_jagged``,
    which stands in, logs a warning of PyTorch's own in 2.13.
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
    """The ragged dimension of a jagged nested tensor: ``_ragged_idx``, 2.8 to 2.15; 1 where it is not told."""
    return int(getattr(values, "_ragged_idx", 1))
