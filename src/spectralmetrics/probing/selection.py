"""Selection of layers: glob patterns on qualified names, module types, or a callable."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from spectralmetrics.layers import default_layers
from spectralmetrics.sums.checks import check_type
from spectralmetrics.torch_private import children_of, wrapped_in

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Selectors: TypeAlias = Selector | Sequence[Selector]


def select_layers(
    model: nn.Module, layers: Selectors | None = None, exclude: Selectors | None = None
) -> dict[str, nn.Module]:
    """The chosen modules of a model by qualified name, in the order in which they are registered.

    Args:
        model: the model; names leave out its wrappers (compiled, data parallel).
        layers: one selector or a sequence of them, any of which may match. A pattern is matched against the
            whole qualified name, and its ``*`` also matches dots; a module of any type can be named. None
            selects :data:`DEFAULT_LAYERS`, the ``Conv1D`` of ``transformers``, and what was registered as such.
        exclude: taken away from these.

    Raises:
        TypeError: for a model or a selector of another kind.
        ValueError: if a selector matches nothing, with the closest names, or if nothing is left.

    A module that is registered under several names counts once, under the first of those that match. The inner
    ``out_proj`` of ``nn.MultiheadAttention`` is a ``Linear`` that is never called; only its exact
    name selects it.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> list(select_layers(model))
    ['0', '2']
    >>> list(select_layers(model, layers=["1", nn.Linear], exclude="0"))
    ['1', '2']
    """
    check_type("model", model, nn.Module)
    return select_among(model, named_modules(unwrap(model)), layers, exclude)


def select_among(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layers: Selectors | None,
    exclude: Selectors | None,
    parts: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, nn.Module]:
    """As :func:`select_layers`, among modules by name; a name in ``parts`` selects the modules named there."""

    def matching(selectors: Selectors | None, default: Iterable[Selector]) -> set[str]:
        names = {name for each in _as_sequence(selectors, default, modules) for name in _matches(modules, each)}
        return {part for name in names for part in parts.get(name, (name,))}

    chosen, dropped = matching(layers, default_layers()), matching(exclude, ())
    unwanted = {modules[name] for name in dropped}
    left: dict[str, nn.Module] = {}
    for name, module in modules.items():
        # A module with several names is taken once, by its first chosen name.
        if name in chosen and module not in unwanted and not any(module is other for other in left.values()):
            left[name] = module
    if not left:
        raise ValueError(
            f"no layer of {type(model).__name__} is left to probe: {len(chosen)} selected by layers={layers!r},"
            f" {len(chosen & dropped)} of them taken away by exclude={exclude!r}"
        )
    return left


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for compilation, data parallelism, sharding and checkpointing.

    >>> unwrap(nn.DataParallel(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    while (inner := wrapped_in(model)) is not None:
        model = inner
    return model


def root_name(model: nn.Module) -> str:
    """The name of the model itself: its type's name, with ``" (model)"`` behind it if a child has that name.

    >>> root_name(nn.Linear(2, 2)), root_name(nn.ModuleDict({"ModuleDict": nn.ReLU()}))
    ('Linear', 'ModuleDict (model)')
    """
    model = unwrap(model)
    name = type(model).__name__
    while children_of(model).get(name) is not None:
        name += " (model)"
    return name


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by qualified name, see :func:`root_name` for the model itself; wrapped parts by their own.

    A module that is registered in several places has a name for each.
    """
    modules: dict[str, nn.Module] = {}

    def walk(module: nn.Module, name: str) -> None:
        module = unwrap(module)
        modules[name or root_name(module)] = module
        for child_name, child in children_of(module).items():
            if child is not None:
                walk(child, f"{name}.{child_name}" if name else child_name)

    walk(model, "")
    return modules


def unseen_parameters(model: nn.Module, chosen: Iterable[nn.Module]) -> tuple[float, list[str]]:
    """The share of a model's parameters in layers of types that are not probed by default, and their names.

    It counts matrices and larger tensors that a module without probed layers inside holds itself: the weights
    of experts in one tensor, or of a user's own linear layer. It does not count embeddings, vectors such as the
    weights of norms, or the own parameters of a module with probed layers inside.

    >>> import torch
    >>> class Experts(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up = nn.Parameter(torch.zeros(4, 8, 8))
    >>> model = nn.Sequential(nn.Linear(8, 8, bias=False), Experts())
    >>> unseen_parameters(model, [model[0]])
    (0.8, ['1'])
    """
    chosen = set(chosen)
    total, unseen, names = 0, 0, []
    counted: set[nn.Parameter] = set()
    inside = {part for module in chosen for part in module.modules()}
    for name, module in named_modules(unwrap(model)).items():
        own = [each for each in module.parameters(recurse=False) if each not in counted]
        own = [each for each in own if not isinstance(each, nn.parameter.UninitializedParameter)]
        counted.update(own)
        total += sum(each.numel() for each in own)
        if module in inside or isinstance(module, (nn.Embedding, nn.EmbeddingBag, *default_layers())):
            continue
        wide = sum(each.numel() for each in own if sum(size > 1 for size in each.shape) > 1)
        if wide and not any(part in chosen for part in module.modules()):
            unseen += wide
            names.append(name)
    return (unseen / total if total else 0.0), names


def _as_sequence(
    selectors: Selectors | None, default: Iterable[Selector], modules: Mapping[str, nn.Module]
) -> list[Selector]:
    if selectors is None:
        # A default type that the model does not have is no error.
        return [s for s in default if isinstance(s, type) and any(isinstance(m, s) for m in modules.values())]
    if isinstance(selectors, str) or not isinstance(selectors, Sequence):
        return [selectors]
    return list(selectors)


def _matches(modules: Mapping[str, nn.Module], selector: Selector) -> set[str]:
    if isinstance(selector, str):
        names = {name for name in modules if fnmatch.fnmatchcase(name, selector)}
    elif isinstance(selector, type):
        names = {name for name, module in modules.items() if isinstance(module, selector)}
    elif callable(selector) and not isinstance(selector, nn.Module):
        names = {name for name, module in modules.items() if selector(name, module)}
    else:
        raise TypeError(f"expected a pattern, a module type or a callable to select layers, got {selector!r}")
    if not names:
        raise ValueError(f"no layer matches {_describe(selector)}{_suggestion(modules, selector)}")
    root = next(iter(modules.values()))
    uncalled = {
        inner if module is root else f"{name}.{inner}"
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        for inner, _ in module.named_modules()
        if inner
    }
    return {name for name in names if name not in uncalled or name == selector}


def _describe(selector: Selector) -> str:
    if isinstance(selector, str):
        return repr(selector)
    return selector.__name__ if isinstance(selector, type) else f"the callable {selector!r}"


def _suggestion(modules: Mapping[str, nn.Module], selector: Selector) -> str:
    if isinstance(selector, type):
        types = sorted({type(module).__name__ for module in modules.values()})
        return f"; the model has {', '.join(types)}"
    names = [name for name in modules if name]
    close = difflib.get_close_matches(selector, names, n=5, cutoff=0.5) if isinstance(selector, str) else []
    if close:
        return f"; close names: {', '.join(map(repr, close))}"
    shown = ", ".join(map(repr, names[:8]))
    return f"; names are {shown}{', …' if len(names) > 8 else ''}"
