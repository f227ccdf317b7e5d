"""The covariance and its spectrum themselves, and observations seen in its leading eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spectralmetrics.functional.moments import Observations
from spectralmetrics.functional.reservoir import Reservoir, empty_reservoir, kept_rows, offer
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.metrics.base import SpectralMetric
from spectralmetrics.metrics.merging import Exchange, exchange_reservoirs
from spectralmetrics.plotting import plot_covariance, plot_embedding, plot_spectrum


class CovarianceMetric(SpectralMetric):
    r"""The covariance :math:`\Sigma = \frac{1}{n} \sum_i (x_i - \mu)(x_i - \mu)^\top`.

    ``compute`` returns a symmetric tensor of shape (D, D), float64.

    Args:
        num_features: the width D; None reads it from the first rows.
        unbiased: divide by :math:`n - 1`; ``compute`` then needs two observations.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        RuntimeError: from ``compute``, if ``unbiased`` and a single observation has been counted.

    Example:
        >>> import torch
        >>> metric = CovarianceMetric()
        >>> metric.update(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> metric.compute()
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """

    short_name = "covariance"

    def __init__(self, num_features: int | None = None, unbiased: bool = False, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.unbiased = unbiased

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        if not self.unbiased:
            return spectrum.covariance
        count = int(spectrum.num_observations)
        if count < 2:
            raise RuntimeError(f"expected at least 2 observations for unbiased=True, got {count}")
        return spectrum.covariance * (count / (count - 1))

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the covariance as an image; of a sequence, the last. See :meth:`SpectralMetric.plot`."""
        values = self.compute() if val is None else val
        return plot_covariance(values if isinstance(values, Tensor) else values[-1], ax=ax)


class SpectrumMetric(SpectralMetric):
    r"""The eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_D` of the covariance.

    ``compute`` returns a tensor of shape (D,), float64.

    Args:
        num_features: the width D; None reads it from the first rows.
        kwargs: see :class:`SpectralMetric`.

    Example:
        >>> import torch
        >>> metric = SpectrumMetric()
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> metric.compute()
        tensor([1., 0.], dtype=torch.float64)
    """

    short_name = "spectrum"
    plot_lower_bound = 0.0

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        return spectrum.eigenvalues

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the eigenvalues, one line for each spectrum. See :meth:`SpectralMetric.plot`."""
        return plot_spectrum(self.compute() if val is None else val, ax=ax)


class EigenspaceEmbeddingMetric(SpectralMetric):
    """A uniform sample of the observations, centred, in the basis of the leading eigenvectors.

    ``compute`` returns a tensor of shape (m, k), float64: m is the smaller of ``max_samples`` and the number of
    finite observations, k the smaller of ``num_components`` and D. Besides the sums, the state holds the
    sample and its random keys, drawn from a generator of the metric's own (the global random state is left
    alone), so this metric shares no state with others in a ``MetricCollection``.

    Args:
        num_features: the width D; None reads it from the first rows.
        num_components: number of eigenvectors k.
        max_samples: largest number of observations m.
        seed: of the sample. Give different seeds to metrics that you merge yourself (``merge_state``), or the
            same places of both streams are sampled; processes of a group draw differently by themselves.
        kwargs: see :class:`SpectralMetric`.

    Raises:
        ValueError: if ``num_components`` or ``max_samples`` is not positive.

    Example:
        >>> import torch
        >>> metric = EigenspaceEmbeddingMetric(num_components=1)
        >>> metric.update(torch.tensor([[1.0, 0.0], [5.0, 0.0]]))
        >>> metric.compute().abs()
        tensor([[2.],
                [2.]], dtype=torch.float64)
    """

    short_name = "embedding"
    needs_eigenvectors = True
    takes_observations = True

    sample_keys: Tensor
    sample_rows: Tensor

    def __init__(
        self,
        num_features: int | None = None,
        num_components: int = 2,
        max_samples: int = 1024,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if num_components < 1:
            raise ValueError(f"expected num_components to be at least 1, got {num_components!r}")
        if max_samples < 1:
            raise ValueError(f"expected max_samples to be at least 1, got {max_samples!r}")
        self.num_components = num_components
        self.max_samples = max_samples
        self.seed = seed
        self._draws = 0
        super().__init__(num_features, **kwargs)

    def _register_states(self) -> None:
        super()._register_states()
        self.add_state("sample_keys", torch.zeros(0, dtype=torch.float64, device="cpu"), dist_reduce_fx=None)
        self.add_state("sample_rows", torch.zeros(0, 0, dtype=torch.float64, device="cpu"), dist_reduce_fx=None)

    def _accumulation(self) -> list[str]:
        return [*super()._accumulation(), f"max_samples={self.max_samples}", f"seed={self.seed}"]

    @property
    def reservoir(self) -> Reservoir | None:
        """The sample, or None before the first rows."""
        return Reservoir(self.sample_keys, self.sample_rows) if self.sample_keys.numel() else None

    def update(self, rows: Tensor | Observations) -> None:
        """Add observations, as :meth:`SpectralMetric.update`, and offer them to the sample."""
        super().update(rows)
        observations = self._check_rows(rows)
        if observations.values.numel() == 0:
            return
        with torch.inference_mode(False), torch.no_grad():
            home = self.second_moment.device
            if self.reservoir is None:
                self._set_reservoir(empty_reservoir(self.max_samples, observations.num_features, home))
            matrix = observations.rows()
            if matrix.dtype != torch.float64:
                matrix = matrix.to(torch.float32)
            count = matrix.shape[0]
            keys = torch.rand(
                count, generator=self._generator(matrix.device), device=matrix.device, dtype=torch.float64
            )
            eligible = matrix.abs().amax(1).isfinite()
            if observations.valid is not None:
                eligible = eligible & observations.valid
            keys = torch.where(eligible, keys, torch.inf)
            # Only the smallest new keys can enter, so only their rows are looked at.
            smallest = torch.topk(keys, min(count, self.max_samples), largest=False)
            candidates = matrix.index_select(0, smallest.indices)
            reservoir = Reservoir(self.sample_keys.to(home), self.sample_rows.to(home))
            self._set_reservoir(offer(reservoir, candidates.to(home), smallest.values.to(home)))

    def statistic(self, spectrum: Spectrum) -> Tensor:
        """See the class."""
        reservoir = self.reservoir
        assert reservoir is not None
        return spectrum.coordinates(kept_rows(reservoir), self.num_components)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the first two components; of a sequence, the last. See :meth:`SpectralMetric.plot`."""
        values = self.compute() if val is None else val
        return plot_embedding(values if isinstance(values, Tensor) else values[-1], ax=ax)

    def exchanges(self, group: Any = None) -> list[Exchange]:
        """See :meth:`SpectralMetric.exchanges`."""
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        sample = exchange_reservoirs(self.reservoir, self.max_samples, self.num_features, rank, world_size)
        return [*super().exchanges(group), sample]

    def absorb(self, results: list[Any], group: Any = None) -> None:
        """See :meth:`SpectralMetric.absorb`."""
        super().absorb(results, group)
        if results[1] is not None:
            self._set_reservoir(results[1])

    def state_dict(  # type: ignore[override]  # torchmetrics' signature
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The persistent states, and with them how often keys were drawn, so that a resumed run goes on."""
        destination = super().state_dict(destination, prefix, keep_vars)
        if self._persistent["sample_keys"]:
            destination[prefix + "draws"] = torch.tensor(self._draws)
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._draws = int(state_dict.pop(prefix + "draws", self._draws))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        capacity = incoming_state.get("sample_keys", self.sample_keys).numel()
        if capacity not in (0, self.max_samples):
            raise ValueError(f"expected an incoming sample of max_samples={self.max_samples}, got {capacity}")
        super()._reduce_states(incoming_state)
        keys, rows = incoming_state["sample_keys"], incoming_state["sample_rows"]
        if keys.numel() == 0:
            return
        home = self.second_moment.device
        reservoir = self.reservoir or empty_reservoir(self.max_samples, rows.shape[1], home)
        self._set_reservoir(offer(reservoir, rows.to(home), keys.to(home)))

    def _set_reservoir(self, reservoir: Reservoir) -> None:
        self.sample_keys, self.sample_rows = reservoir

    def _generator(self, device: torch.device) -> torch.Generator:
        """A fresh generator for each draw, so that copies and pickles of the metric go on alike."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        entropy = np.random.SeedSequence([self.seed, rank, self._draws]).generate_state(1, np.uint64)
        self._draws += 1
        return torch.Generator(device).manual_seed(int(entropy[0]) >> 1)
