"""Puts projections behind the layers of a model, and sets all projections of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.probing.hooks import warn_user
from spectralmetrics.probing.layout import FeatureDim, dim_of, find_dims
from spectralmetrics.probing.selection import Selectors, named_modules, root_name, select_layers, unwrap
from spectralmetrics.projection.layer import PCAProjection, check_dim, check_generator
from spectralmetrics.sums.checks import check_type

_NAME = "pca_projection"


class ProjectionRow(NamedTuple):
    """One projection of a model: its layer, width and dimension.

    Attributes:
        name: qualified name of the layer that the projection was inserted behind, as a
            :class:`~spectralmetrics.LayerProbe` names it, or of the projection itself in a network that was
            written with it.
        dimension: the number of directions k that it keeps; None if it has seen no data.
        width: the number of features D; None as well, if it was not given.
        saturation: k / D.
    """

    name: str
    dimension: int | None
    width: int | None
    saturation: float | None


class InsertedProjection(PCAProjection):
    """A projection of the first floating tensor in a layer's output.

    Args:
        name: the name of the layer.
        dims: finds the dimension of the features; None uses ``dim``.
        options: see :class:`PCAProjection`.
    """

    _dims: FeatureDim | None = None
    _has_warned = False

    def __init__(self, name: str, dims: FeatureDim | None, *options: Any, **named: Any) -> None:
        super().__init__(*options, **named)
        self._name = name
        self._dims = dims

    def forward(self, output: Any) -> Any:
        """The output, with its first floating tensor passed on or projected; see :class:`PCAProjection`."""
        return _apply_to_first(super().forward, output)[0]

    def _dim_in(self, input: Tensor) -> int:
        if self._dims is None or input.ndim == 0:
            return super()._dim_in(input)
        place = self._dims.find(input)
        if place.is_guess and not self._has_warned:
            self._has_warned = True
            warn_user(
                f"the feature dimension of {self._name!r} is unknown: dimension {place.dim} of {input.ndim}, of"
                f" size {input.shape[place.dim]}, is used. Give `dim`, or call register_layer for its type"
            )
        return place.dim


class InsertedProjections(Sequence[PCAProjection]):
    """The projections that :func:`insert_projections` has put behind layers, in their order.

    A context manager that removes them on exit.
    """

    def __init__(self, behind: dict[str, tuple[nn.Module, PCAProjection, Any]]) -> None:
        self._behind = behind

    @property
    def layers(self) -> list[str]:
        """The qualified names of the layers."""
        return list(self._behind)

    def __getitem__(self, index: Any) -> Any:
        return [projection for _, projection, _ in self._behind.values()][index]

    def __len__(self) -> int:
        return len(self._behind)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Inside, all pass on their input and accumulate its covariance; the model stays in evaluation.

        Each block starts new covariances. See :meth:`PCAProjection.collect`.

        Raises:
            RuntimeError: after :meth:`remove`.

        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
        >>> with insert_projections(model) as projections:
        ...     with projections.collect():
        ...         _ = model(torch.randn(64, 4))
        ...     [row.name for row in set_projection_threshold(model, 0.9)]
        ['0', '2']
        """
        if not self._behind:
            raise RuntimeError("these projections have been removed from their model: insert them again")
        with contextlib.ExitStack() as stack:
            for projection in self:
                stack.enter_context(projection.collect())
            yield

    def remove(self) -> None:
        """Take the projections off the model, which is then as it was."""
        for layer, _, handle in self._behind.values():
            if handle is not None:
                handle.remove()
            with contextlib.suppress(AttributeError):
                delattr(layer, _NAME)
        self._behind = {}

    def __repr__(self) -> str:
        lines = [f"  {n!r}: PCAProjection({each.extra_repr()})" for n, (_, each, _) in self._behind.items()]
        return "\n".join(["InsertedProjections(", *lines, ")"]) if lines else "InsertedProjections()"

    def __enter__(self) -> InsertedProjections:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def insert_projections(
    model: nn.Module,
    layers: Selectors | None = None,
    threshold: float = 0.99,
    *,
    exclude: Selectors | None = None,
    center: bool = True,
    dim: int | None = None,
) -> InsertedProjections:
    """Put projections behind layers of a model that was written without them.

    Each becomes a submodule ``pca_projection`` of its layer: it follows the model to other devices, into copies
    and state dicts, and changes the layer's output in evaluation. In a tuple, the first floating tensor is
    projected; in a ``PackedSequence`` or a nested tensor, the valid steps. To load a state dict with
    projections into a fresh network, insert them there first.

    Args:
        model: any module.
        layers: the layers, selected as in :class:`~spectralmetrics.LayerProbe`.
        threshold: share of the variance to keep.
        exclude: layers to leave out of these.
        center: see :class:`PCAProjection`.
        dim: dimension of the features; None finds it as a :class:`~spectralmetrics.LayerProbe` does.

    Returns:
        The projections; ``remove()`` takes them off.

    Raises:
        ValueError: for a selector that matches nothing, a threshold outside (0, 1], a layer that has a
            projection already or is a list of modules, which has no output.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> projections = insert_projections(model, layers=nn.Conv2d)
    >>> projections.layers, projections[0].dim
    (['0'], 1)
    >>> projections.remove()
    """
    check_threshold(threshold)
    check_dim(dim)
    chosen = select_layers(model, layers, exclude)
    for name, layer in chosen.items():
        if isinstance(layer, (nn.ModuleList, nn.ModuleDict, PCAProjection)):
            raise ValueError(
                f"expected layers with an output of their own, got {name!r} ({type(layer).__name__})"
            )
        if hasattr(layer, _NAME):
            raise ValueError(f"expected layers without a projection, but {name!r} has one; remove it first")
    behind: dict[str, tuple[nn.Module, PCAProjection, Any]] = {}
    dims = find_dims(model, chosen) if dim is None else {}
    for name, layer in chosen.items():
        layer_dims = dims.get(name)
        type_dim = None if isinstance(layer, nn.Sequential) else dim_of(layer).dim
        fixed = dim if layer_dims is None else type_dim
        projection = InsertedProjection(name, layer_dims, None, threshold, center=center, dim=fixed)
        projection.train(layer.training)
        projection._starts_anew = False
        # A sequence calls all its modules by itself, the projection last.
        is_called = type(layer).forward is nn.Sequential.forward
        handle = None if is_called else layer.register_forward_hook(_project_output)
        layer.add_module(_NAME, projection)
        behind[name] = (layer, projection, handle)
    return InsertedProjections(behind)


def set_projection_threshold(model: nn.Module, threshold: float) -> list[ProjectionRow]:
    """Set the threshold of every projection in a model and return the dimensions kept; it needs no new data.

    Projections with random directions go back to their eigenvectors. With several processes, all must call it.

    Args:
        model: any module.
        threshold: share of the variance to keep, in (0, 1].

    Returns:
        One row per projection, in the order of the model's modules.

    Raises:
        ValueError: for a threshold outside (0, 1], or a model without projections.
        RuntimeError: if no projection has seen data. To set a threshold before that, set each projection's own.

    >>> model = nn.Sequential(nn.Linear(3, 3), PCAProjection(3, threshold=1.0))
    >>> _ = model(torch.randn(256, 3))
    >>> set_projection_threshold(model, 1.0)
    [ProjectionRow(name='1', dimension=3, width=3, saturation=1.0)]
    """
    threshold = check_threshold(threshold)
    projections = _projections(model)
    # A list, not `any`: each check is an exchange, and all processes must make the same exchanges.
    if not [each for each in projections.values() if _has_seen_data(each)]:
        raise RuntimeError(
            f"no projection of this {type(unwrap(model)).__name__} has seen data, so none has a dimension: run"
            " forwards inside `with projections.collect():` or in training mode first"
        )
    for projection in projections.values():
        projection.threshold = threshold
    return list(_rows(projections))


def randomize_projections(model: nn.Module, generator: torch.Generator | None = None) -> list[ProjectionRow]:
    """Replace the directions of every projection in a model by random orthonormal ones, of the same rank.

    Compare a network restricted to its eigenspaces with the network restricted to such random subspaces.
    Setting the threshold goes back to the eigenvectors. With several processes, all must call it, and all use
    the directions of the first.

    Args:
        model: any module.
        generator: the generator of the directions; PyTorch's global one if None.

    Returns:
        One row per projection, in the order of the model's modules.

    Raises:
        ValueError: for a model without projections.
        RuntimeError: for a projection that has seen no data.

    >>> model = nn.Sequential(nn.Linear(3, 3), PCAProjection(3, threshold=1.0))
    >>> _ = model(torch.randn(256, 3))
    >>> randomize_projections(model, torch.Generator().manual_seed(0))[0].dimension
    3
    """
    check_generator(generator)
    projections = _projections(model)
    for projection in projections.values():
        projection.spectrum()  # all or none are changed
    for projection in projections.values():
        projection.randomize(generator)
    return list(_rows(projections))


def _projections(model: nn.Module) -> dict[str, PCAProjection]:
    """All projections of a model, by the names of their rows."""
    check_type("model", model, nn.Module)
    inner = unwrap(model)
    projections: dict[str, PCAProjection] = {}
    for name, module in named_modules(inner).items():
        if isinstance(module, InsertedProjection):
            layer = name.removesuffix(_NAME).removesuffix(".")
            projections[layer or root_name(inner)] = module
        elif isinstance(module, PCAProjection):
            projections["" if module is inner else name] = module
    if not projections:
        raise ValueError(f"expected a model with projections, got {type(model).__name__} without any")
    return projections


def _rows(projections: dict[str, PCAProjection]) -> Iterator[ProjectionRow]:
    for name, projection in projections.items():
        if _has_seen_data(projection):
            width = projection.spectrum().num_features
            yield ProjectionRow(name, projection.rank, width, projection.rank / width)
        else:
            yield ProjectionRow(name, None, projection.num_features, None)


def _has_seen_data(projection: PCAProjection) -> bool:
    """True if the projection has seen data on any process; all processes call this together."""
    try:
        projection.spectrum()
    except RuntimeError:
        return False
    return True


def _project_output(layer: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a layer with a projection."""
    projection = getattr(layer, _NAME, None)
    return output if projection is None else projection(output)


def _apply_to_first(projection: Callable[[Tensor], Tensor], output: Any) -> tuple[Any, bool]:
    """The output with its first floating tensor projected, and True if there was one."""
    if isinstance(output, Tensor) and output.is_nested and output.layout == torch.strided:
        # In evaluation `nn.TransformerEncoder` makes such tensors of sequences with padding.
        steps = output.unbind()
        values = torch.cat(steps)
        projected = projection(values)
        parts = projected.split([len(each) for each in steps])
        return output if projected is values else torch.nested.as_nested_tensor(list(parts)), True
    if isinstance(output, Tensor):
        return (projection(output), True) if output.is_floating_point() else (output, False)
    if isinstance(output, PackedSequence):
        return output._replace(data=projection(output.data)), True
    if isinstance(output, dict):
        for key, value in output.items():
            new, done = _apply_to_first(projection, value)
            if done:
                # Output classes of other libraries are dicts with attributes, which must agree.
                items = {**output, key: new}
                return items if type(output) is dict else type(output)(**items), True
        return output, False
    if isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            new, done = _apply_to_first(projection, value)
            if done:
                replaced = [*output[:index], new, *output[index + 1 :]]
                is_named = hasattr(output, "_fields")
                return type(output)(*replaced) if is_named else type(output)(replaced), True
    return output, False
