r"""PCA projections: restrict a layer's output to its leading eigenspace and see whether the network minds.

While the network trains, a :class:`PCAProjection` passes its input through and accumulates its covariance; in
evaluation it projects onto the leading eigenvectors :math:`V` about the mean :math:`\mu`,

.. math:: x \mapsto \mu + V V^\top (x - \mu),

which leaves at most a share :math:`1 - \delta` of the variance behind, where :math:`\delta` is the threshold.
If the network is as good as before, the directions left out were not needed
(`arXiv:1907.08589 <https://arxiv.org/abs/1907.08589>`_).

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
>>> with insert_projections(model, layers="0", threshold=0.9):
...     _ = model(torch.randn(64, 8))  # training mode: accumulates
...     projected = model.eval()(torch.randn(4, 8))
...     [row.name for row in set_projection_threshold(model, 0.5)]
['0.pca_projection']
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from spectralmetrics.functional.dimension import check_threshold, intrinsic_dimension
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics import CovarianceMetric
from spectralmetrics.probing.selection import Selectors, select_layers, unwrap
from spectralmetrics.sums import Observations, full_precision, run_together

_NAME = "pca_projection"
_FEATURE_MAPS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.GroupNorm,
)
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


class ProjectionRow(NamedTuple):
    """What one projection of a model does.

    Attributes:
        name: qualified name of the projection.
        dimension: the number of directions k that it keeps; None before any training forward.
        width: the number of features D; None as well, if it was not given.
        saturation: k / D.
    """

    name: str
    dimension: int | None
    width: int | None
    saturation: float | None


class PCAProjection(nn.Module):
    r"""Passes its input through in training; in evaluation, projects it onto its leading eigenspace.

    The covariance is that of the training forwards since the module last was in evaluation: training again
    starts a new one. On several processes the first evaluation merges the data of all, so all evaluate. A
    forward that activation checkpointing repeats is not counted again.

    Args:
        num_features: the width D; None reads it from the first input.
        threshold: share :math:`\delta` of the variance to keep, in (0, 1]. Setting :attr:`threshold` later
            takes effect without new data.
        center: False projects about zero, by the eigenvectors of the second moment.
        keep_dim: False returns the coordinates :math:`V^\top (x - \mu)` in evaluation, with k features instead
            of D, whose covariance over the training data is diagonal.
        dim: the dimension of the features: 1 for vectors (N, D) and feature maps ``(N, C, *spatial)``, −1 for
            token sequences (N, T, D). None: 1 for inputs of four and more dimensions, or else −1.

    Raises:
        ValueError: for an argument out of range; from ``forward``, for an input without ``dim`` or of another
            width.
        TypeError: from ``forward``, for an input that is no floating tensor.
        RuntimeError: from ``forward`` in evaluation, before any training forward.

    >>> projection = PCAProjection(2, threshold=0.9)
    >>> x = torch.tensor([[4.0, 1.0], [-2.0, 1.0], [1.0, 1.5], [1.0, 0.5]])
    >>> torch.equal(projection(x), x)
    True
    >>> projection.eval()(x)
    tensor([[ 4.,  1.],
            [-2.,  1.],
            [ 1.,  1.],
            [ 1.,  1.]])
    """

    def __init__(
        self,
        num_features: int | None,
        threshold: float = 0.99,
        *,
        center: bool = True,
        keep_dim: bool = True,
        dim: int | None = 1,
    ) -> None:
        super().__init__()
        check_threshold(threshold)
        self.covariance = CovarianceMetric(num_features, center=center, nan_strategy="ignore")
        self.covariance.persistent(True)
        self.center = center
        self.keep_dim = keep_dim
        self.dim = dim
        self._threshold = threshold
        self._starts_anew = False  # at the next training forward
        self._is_merged = False  # whether the sums are those of all processes
        self._random: Tensor | None = None
        self._spectrum: Spectrum | None = None
        self._projectors: dict[Any, tuple[Tensor, Tensor, bool]] = {}

    @property
    def num_features(self) -> int | None:
        """The width D; None until it is known."""
        return self.covariance.num_features

    @property
    def threshold(self) -> float:
        """The share of the variance to keep. Setting it goes back from random directions to eigenvectors."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        check_threshold(threshold)
        self._threshold = threshold
        self._random = None
        self._projectors = {}

    @property
    def rank(self) -> int:
        """The number of directions k that are kept: the intrinsic dimension at the threshold.

        Raises:
            RuntimeError: before any training forward.
        """
        if self._random is not None:
            return self._random.shape[1]
        return int(intrinsic_dimension(self.spectrum().eigenvalues, self.threshold))

    def spectrum(self) -> Spectrum:
        """The spectrum of the training data of all processes, which call this together.

        Raises:
            RuntimeError: before any training forward.
        """
        if self._spectrum is None:
            moments = self.covariance.moments
            if _several_processes() and not self._is_merged:
                with torch.inference_mode(False), torch.no_grad():
                    moments = run_together(self.covariance.exchanges())[0]
            if moments is None or int(moments.count) == 0:
                raise RuntimeError(
                    f"{type(self).__name__} has seen no training data to project by: run a training forward"
                    " (model.train()) before evaluation, or load a state"
                )
            self.covariance.check_range()
            self._spectrum = Spectrum(moments, center=self.center)
        return self._spectrum

    def randomize(self, generator: torch.Generator | None = None) -> None:
        """Project onto random orthonormal directions of the same rank, until the threshold is set again.

        Args:
            generator: of the directions; PyTorch's global one if None. On several processes, which call this
                together, the first one's directions count.

        Raises:
            RuntimeError: before any training forward.
        """
        width, rank = self.spectrum().num_features, self.rank
        device = "cpu" if generator is None else generator.device
        with torch.inference_mode(False), torch.no_grad():
            normal = torch.randn(width, rank, generator=generator, dtype=torch.float64, device=device)
            # Of a Gaussian matrix, Q is uniform on all subspaces of that rank.
            directions = torch.linalg.qr(normal).Q
            if _several_processes():
                told = [directions.cpu()]
                dist.broadcast_object_list(told)
                directions = told[0]
        self._random = directions
        self._projectors = {}

    def forward(self, input: Tensor) -> Tensor:
        """The input itself in training; in evaluation its projection, of the same dtype.

        Args:
            input: floating, with D features along ``dim``.
        """
        dim = self._check(input)
        if self.training:
            self._observe(input, dim)
            return input
        self._starts_anew = True
        return self._project(input, dim)

    def train(self, mode: bool = True) -> PCAProjection:
        """Switch to training or evaluation; see the class for what that means."""
        if mode and not self.training:
            self._starts_anew = True
        return super().train(mode)

    def extra_repr(self) -> str:
        """Width and threshold in a line."""
        return f"{self.num_features}, threshold={self.threshold}, dim={self.dim}, keep_dim={self.keep_dim}"

    def get_extra_state(self) -> dict[str, Any]:
        """What the state dict holds besides the sums."""
        return {
            "threshold": self.threshold,
            "random": self._random,
            "is_merged": self._is_merged,
            "starts_anew": self._starts_anew or not self.training,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """See :meth:`get_extra_state`."""
        self.threshold = state["threshold"]
        self._random = state["random"]
        self._is_merged = state["is_merged"]
        self._starts_anew = state["starts_anew"]
        self._spectrum = None
        self._projectors = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _observe(self, input: Tensor, dim: int) -> None:
        if torch._C._current_graph_task_id() != -1:  # in backward: a checkpoint's recomputation
            return
        if self._starts_anew:
            self.covariance.reset()
            self._starts_anew = False
            self._is_merged = False
            self._random = None
        self._spectrum = None
        self._projectors = {}
        self.covariance.update(Observations(input.detach(), dim))

    def _project(self, input: Tensor, dim: int) -> Tensor:
        dtype = input.dtype if input.dtype == torch.float64 else torch.float32
        directions, mean, is_complement = self._projector(input.device, dtype)
        if is_complement and directions.shape[1] == 0:
            return input  # nothing is left out
        with full_precision(input.device.type):
            if self.keep_dim:
                values = input.to(dtype)
                centred = values - _along(mean, dim, input.ndim)
                kept = _multiply(_multiply(centred, directions, dim), directions.mT, dim)
                result = values - kept if is_complement else kept + _along(mean, dim, input.ndim)
            else:
                centred = input.to(dtype) - _along(mean, dim, input.ndim)
                result = _multiply(centred, directions, dim)
        return result.to(input.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _projector(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
        """Directions (D, k), mean (D,), and False; if D − k are fewer, the directions left out, and True."""
        if (device, dtype) not in self._projectors:
            # Tensors made in inference mode could not be used where gradients are wanted.
            with torch.inference_mode(False), torch.no_grad():
                spectrum = self.spectrum()
                if _several_processes() and not self._is_merged:
                    # From here on a saved state is complete; training again starts a new one.
                    self.covariance.absorb([spectrum.moments])
                    self._is_merged = True
                rank = self.rank
                is_complement = False
                if self._random is not None:
                    directions = self._random
                else:
                    is_complement = self.keep_dim and 2 * rank > spectrum.num_features
                    vectors = spectrum.eigenvectors
                    directions = vectors[:, rank:] if is_complement else vectors[:, :rank]
                mean = spectrum.mean if self.center else torch.zeros_like(spectrum.mean)
                self._projectors[device, dtype] = (
                    directions.to(device, dtype),
                    mean.to(device, dtype),
                    is_complement,
                )
        return self._projectors[device, dtype]

    def _check(self, input: Tensor) -> int:
        """The dimension of the features."""
        if not isinstance(input, Tensor) or not input.is_floating_point():
            kind = input.dtype if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"expected a floating tensor to project, got {kind}")
        dim = self.dim if self.dim is not None else (1 if input.ndim >= 4 else -1)
        if not -input.ndim <= dim < input.ndim:
            raise ValueError(f"expected an input that has dimension {dim}, got shape {tuple(input.shape)}")
        if self.num_features is not None and input.shape[dim] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} features along dimension {dim}, got {input.shape[dim]} (shape"
                f" {tuple(input.shape)})"
            )
        return dim % input.ndim


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

    def remove(self) -> None:
        """Take the projections off the model, which is then as it was."""
        for layer, _, handle in self._behind.values():
            if handle is not None:
                handle.remove()
            layer._modules.pop(_NAME, None)
        self._behind = {}

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
    """Put a projection behind each of some layers of a model that was not written for it.

    Each becomes a submodule ``pca_projection`` of its layer: it follows the model to other devices, into copies
    and state dicts, and changes the layer's output in evaluation. Of a tuple, the first floating tensor is
    projected; of a ``PackedSequence`` its valid steps. To load a state dict with projections into a fresh
    network, insert them there first.

    Args:
        model: any module.
        layers: which, as in :class:`~spectralmetrics.LayerProbe`.
        threshold: share of the variance to keep.
        exclude: taken away from these.
        center: see :class:`PCAProjection`.
        dim: of the features; None takes 1 for convolutions, pooling and their norms, −1 for linear, recurrent
            and attention layers, embeddings and layer norms, and goes by the number of dimensions elsewhere.

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
    chosen = select_layers(model, layers, exclude)
    for name, layer in chosen.items():
        if isinstance(layer, (nn.ModuleList, nn.ModuleDict, PCAProjection)):
            raise ValueError(
                f"expected layers with an output of their own, got {name!r} ({type(layer).__name__})"
            )
        if hasattr(layer, _NAME):
            raise ValueError(f"expected layers without a projection, but {name!r} has one; remove it first")
    behind: dict[str, tuple[nn.Module, PCAProjection, Any]] = {}
    for name, layer in chosen.items():
        projection = PCAProjection(None, threshold, center=center, dim=_dim_of(layer) if dim is None else dim)
        projection.train(layer.training)
        projection._starts_anew = False
        # A sequence calls all its modules by itself, the projection as the last of them.
        is_called = type(layer).forward is nn.Sequential.forward
        handle = None if is_called else layer.register_forward_hook(_project_output)
        layer.add_module(_NAME, projection)
        behind[name] = (layer, projection, handle)
    return InsertedProjections(behind)


def set_projection_threshold(model: nn.Module, threshold: float) -> list[ProjectionRow]:
    """Set the threshold of every projection in a model; no new data is needed.

    Projections with random directions go back to their eigenvectors. On several processes all call this.

    Args:
        model: any module.
        threshold: share of the variance to keep, in (0, 1].

    Returns:
        One row per projection, in the order of the model's modules.

    Raises:
        ValueError: for a threshold outside (0, 1], or a model without projections.

    >>> model = nn.Sequential(nn.Linear(3, 3), PCAProjection(3, threshold=1.0))
    >>> _ = model(torch.randn(256, 3))
    >>> set_projection_threshold(model, 1.0)
    [ProjectionRow(name='1', dimension=3, width=3, saturation=1.0)]
    """
    check_threshold(threshold)
    projections = _projections(model)
    for projection in projections.values():
        projection.threshold = threshold
    return _rows(projections)


def randomize_projections(model: nn.Module, generator: torch.Generator | None = None) -> list[ProjectionRow]:
    """Replace the directions of every projection in a model by random orthonormal ones, of the same rank.

    What a network makes of a random subspace of that rank is what its eigenspace must be compared with.
    Setting the threshold goes back to the eigenvectors. On several processes all call this, and the first one's
    directions count.

    Args:
        model: any module.
        generator: of the directions; PyTorch's global one if None.

    Returns:
        One row per projection, in the order of the model's modules.

    Raises:
        ValueError: for a model without projections.
        RuntimeError: for a projection before any training forward.

    >>> model = nn.Sequential(nn.Linear(3, 3), PCAProjection(3, threshold=1.0))
    >>> _ = model(torch.randn(256, 3))
    >>> randomize_projections(model, torch.Generator().manual_seed(0))[0].dimension
    3
    """
    projections = _projections(model)
    for projection in projections.values():
        projection.spectrum()  # all or none are changed
    for projection in projections.values():
        projection.randomize(generator)
    return _rows(projections)


def _projections(model: nn.Module) -> dict[str, PCAProjection]:
    found = {n: module for n, module in unwrap(model).named_modules() if isinstance(module, PCAProjection)}
    if not found:
        raise ValueError(f"expected a model with projections, got {type(model).__name__} without any")
    return found


def _rows(projections: dict[str, PCAProjection]) -> list[ProjectionRow]:
    return list(_each_row(projections))


def _each_row(projections: dict[str, PCAProjection]) -> Iterator[ProjectionRow]:
    for name, projection in projections.items():
        try:
            width = projection.spectrum().num_features
        except RuntimeError:  # no data yet, on no process
            yield ProjectionRow(name, None, projection.num_features, None)
        else:
            yield ProjectionRow(name, projection.rank, width, projection.rank / width)


def _project_output(layer: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a layer with a projection."""
    projection = getattr(layer, _NAME, None)
    return output if projection is None else _apply_to_first(projection, output)[0]


def _apply_to_first(projection: PCAProjection, output: Any) -> tuple[Any, bool]:
    """The output with its first floating tensor projected, and whether there was one."""
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


def _dim_of(layer: nn.Module) -> int | None:
    if isinstance(layer, _FEATURE_MAPS):
        return 1
    return -1 if isinstance(layer, _FEATURES_LAST) else None


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector shaped to broadcast along one of ``ndim`` dimensions."""
    return vector.reshape(-1, *[1] * (ndim - dim - 1))


def _multiply(values: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Multiply by a (D, k) matrix from the right along one dimension."""
    moved = values.movedim(dim, -1)
    if dim == values.ndim - 1 or moved.is_contiguous():
        return functional.linear(moved, matrix.mT).movedim(-1, dim)
    # (..., D, positions): the positions stay contiguous, as in the input
    product: Tensor = matrix.mT @ values.flatten(dim + 1)
    return product.reshape(*product.shape[:-1], *values.shape[dim + 1 :])


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
