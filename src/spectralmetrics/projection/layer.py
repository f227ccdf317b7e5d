"""A layer that passes its input on in training, and projects it onto its leading eigenspace in evaluation."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from spectralmetrics.functional import Observations, Spectrum
from spectralmetrics.functional.dimension import check_threshold
from spectralmetrics.layers import register_layer
from spectralmetrics.metrics import CovarianceMetric, IntrinsicDimensionMetric
from spectralmetrics.probing.processes import is_one_of_several
from spectralmetrics.sums import SpectralSum, full_precision, run_together
from spectralmetrics.sums.checks import dtype_or_type
from spectralmetrics.torch_private import in_backward, outside_transforms, untraced, untransformed


class PCAProjection(nn.Module):
    r"""Passes its input through in training; in evaluation, projects it onto its leading eigenspace.

    The covariance covers the training forwards since the last evaluation: training again starts a new
    covariance. :meth:`collect` accumulates while the module stays in evaluation. With several processes, the
    first evaluation merges the data of all, so all must evaluate. A forward that activation checkpointing
    repeats is not counted again; under ``torch.func``, every row that ``vmap`` runs over counts.

    Args:
        num_features: the width D; None reads it from the first input.
        threshold: share :math:`\delta` of the variance to keep, in (0, 1]. Setting :attr:`threshold` later
            takes effect without new data.
        center: False projects about zero, by the eigenvectors of the second moment.
        keep_dim: False returns the coordinates :math:`V^\top (x - \mu)` in evaluation, with k features instead
            of D, whose covariance over the training data is diagonal.
        dim: the dimension of the features: 1 for vectors (N, D) and feature maps ``(N, C, *spatial)``, −1 for
            token sequences (N, T, D). None: 1 for inputs of four and more dimensions, or else −1.
        sketch_size: with k, a sketch of k columns replaces the D x D covariance, see
            :class:`~spectralmetrics.SpectralMetric`.

    Raises:
        ValueError: for an argument out of range; from ``forward``, for an input without ``dim`` or of another
            width.
        TypeError: from ``forward``, for an input that is not a floating tensor.
        RuntimeError: from ``forward`` in evaluation, before any data was seen.

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
        sketch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_dim(dim)
        self._threshold = check_threshold(threshold)
        self.covariance = CovarianceMetric(
            num_features, center=center, nan_strategy="ignore", sketch_size=sketch_size
        )
        self.covariance.persistent(True)
        self.center = center
        self.keep_dim = keep_dim
        self.dim = dim
        self._is_collecting = False
        self._starts_anew = False  # at the next observed forward
        self._is_merged = False  # True if the sums hold the data of all processes
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
        self._threshold = check_threshold(threshold)
        self._random = None
        self._projectors = {}

    @property
    def rank(self) -> int:
        """The number of directions k that are kept: the intrinsic dimension at the threshold.

        Raises:
            RuntimeError: before any data was seen.
        """
        if self._random is not None:
            return self._random.shape[1]
        spectrum = self.spectrum()
        dimension = IntrinsicDimensionMetric(threshold=self.threshold).value_of(spectrum)
        if spectrum.sketch is not None and dimension.isnan():
            share = float(spectrum.eigenvalues.sum() / spectrum.total_variance)
            raise RuntimeError(
                f"a sketch of {spectrum.sketch.size} columns holds {100 * share:.3g} % of the variance, and not"
                f" {100 * self.threshold:.4g} %: lower the threshold, or collect with a larger sketch_size"
            )
        return int(dimension)

    def spectrum(self) -> Spectrum:
        """The spectrum of the training data of all processes, which must call it together.

        Raises:
            RuntimeError: before any data was seen.
        """
        if self._spectrum is None:
            kept = self.covariance.sums[0]
            sums = kept if isinstance(kept, SpectralSum) and kept.num_features else None
            if is_one_of_several() and not self._is_merged:
                with torch.inference_mode(False), torch.no_grad():
                    sums = run_together(self.covariance.exchanges())[0]
            if sums is None or int(sums.num_observations) == 0:
                raise RuntimeError(
                    "this projection has seen no training data to project by: run forwards inside `with"
                    " projections.collect():` or in training mode first, or load a state"
                )
            self.covariance.check_range()
            self._spectrum = Spectrum(sums, center=self.center)
        return self._spectrum

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Inside, pass on the input and accumulate its covariance, whatever the mode of the model.

        Each block starts a new covariance with its first forward. A model in evaluation stays there, so that
        its BatchNorm and Dropout work as in evaluation.

        >>> projection = PCAProjection(2).eval()
        >>> with projection.collect():
        ...     _ = projection(torch.randn(8, 2))
        >>> int(projection.covariance.count), projection.training
        (8, False)
        """
        self._starts_anew = True
        self._is_collecting = True
        try:
            yield
        finally:
            self._is_collecting = False
            self._starts_anew = True

    def randomize(self, generator: torch.Generator | None = None) -> None:
        """Project onto random orthonormal directions of the same rank, until the threshold is set again.

        Args:
            generator: generator of the directions; PyTorch's global one if None. With several processes, all
                must call it together, and all use the directions of the first.

        Raises:
            RuntimeError: before any data was seen.
        """
        check_generator(generator)
        width, rank = self.spectrum().num_features, self.rank
        device = "cpu" if generator is None else generator.device
        with torch.inference_mode(False), torch.no_grad():
            normal = torch.randn(width, rank, generator=generator, dtype=torch.float64, device=device)
            # Q of a Gaussian matrix spans a subspace drawn uniformly from all subspaces of that rank.
            directions = torch.linalg.qr(normal).Q
            if is_one_of_several():
                broadcast = [directions.cpu()]
                dist.broadcast_object_list(broadcast)
                directions = broadcast[0]
        self._random = directions
        self._projectors = {}

    def forward(self, input: Tensor) -> Tensor:
        """The input itself in training and while collecting; in evaluation its projection, of the same dtype.

        Args:
            input: floating, with D features along ``dim``.
        """
        dim = self._check(input)
        if self.training or self._is_collecting:
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
        """The state besides the sums."""
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

    @untraced
    def _observe(self, input: Tensor, dim: int) -> None:
        if in_backward():  # in backward: a checkpoint's recomputation
            return
        plain = untransformed(input, dim)
        if plain is None:
            return
        with outside_transforms():
            values, dim = plain
            if self._starts_anew:
                self.covariance.reset()
                self._starts_anew = False
                self._is_merged = False
                self._random = None
            self._spectrum = None
            self._projectors = {}
            self.covariance.update(Observations(values.detach(), dim))

    def _project(self, input: Tensor, dim: int) -> Tensor:
        dtype = input.dtype if input.dtype == torch.float64 else torch.float32
        directions, mean, is_complement = self._projector(input.device, dtype)
        if is_complement and directions.shape[1] == 0:
            return input  # nothing is left out
        with full_precision(input.device.type):
            values, mean = input.to(dtype), mean.reshape(-1, *[1] * (input.ndim - dim - 1))  # along `dim`
            result = _multiply(values - mean, directions, dim)
            if self.keep_dim:
                kept = _multiply(result, directions.mT, dim)
                result = values - kept if is_complement else kept + mean
        return result.to(input.dtype)

    @untraced
    def _projector(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
        """Directions (D, k), mean (D,) and False; if D − k is smaller, the directions left out, and True."""
        key = device, dtype
        if key not in self._projectors:
            # Tensors made in inference mode could not be used where gradients are wanted.
            with outside_transforms(), torch.inference_mode(False), torch.no_grad():
                spectrum = self.spectrum()
                if is_one_of_several() and not self._is_merged:
                    # From here on a saved state is complete; training again starts a new one.
                    self.covariance.absorb([spectrum.sums])
                    self._is_merged = True
                rank, directions, is_complement = self.rank, self._random, False
                if directions is None:
                    has_all = self.keep_dim and spectrum.sketch is None
                    is_complement = has_all and 2 * rank > spectrum.num_features
                    vectors = spectrum.eigenvectors
                    directions = vectors[:, rank:] if is_complement else vectors[:, :rank]
                mean = spectrum.mean if self.center else torch.zeros_like(spectrum.mean)
                self._projectors[key] = directions.to(*key), mean.to(*key), is_complement
        return self._projectors[key]

    def _check(self, input: Tensor) -> int:
        """The dimension of the features."""
        if not isinstance(input, Tensor) or not input.is_floating_point():
            raise TypeError(f"expected a floating tensor to project, got {dtype_or_type(input)}")
        dim = self._dim_in(input)
        if not -input.ndim <= dim < input.ndim:
            raise ValueError(f"expected an input that has dimension {dim}, got shape {tuple(input.shape)}")
        if self.num_features is not None and input.shape[dim] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} features along dimension {dim}, got {input.shape[dim]} (shape"
                f" {tuple(input.shape)})"
            )
        return dim % input.ndim

    def _dim_in(self, input: Tensor) -> int:
        return self.dim if self.dim is not None else (1 if input.ndim >= 4 else -1)


# As the last part of an `nn.Sequential`, it keeps the dimension of the features of the part before it.
register_layer(PCAProjection, dim="input")


def check_dim(dim: int | None) -> None:
    """Raise a ValueError unless ``dim`` is an integer or None."""
    if dim is not None and (not isinstance(dim, numbers.Integral) or isinstance(dim, bool)):
        raise ValueError(f"expected dim to be an integer or None, got {dim!r}")


def check_generator(generator: torch.Generator | None) -> None:
    """Raise a TypeError for anything but a generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"expected generator to be a torch.Generator or None, got {generator!r}")


def _multiply(values: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Multiply by a (D, k) matrix from the right along one dimension."""
    moved = values.movedim(dim, -1)
    if dim == values.ndim - 1 or moved.is_contiguous():
        return functional.linear(moved, matrix.mT).movedim(-1, dim)
    # (..., D, positions): the positions stay contiguous, as in the input
    product: Tensor = matrix.mT @ values.flatten(dim + 1)
    return product.reshape(*product.shape[:-1], *values.shape[dim + 1 :])
