"""The base class of all statistics: arguments, registration, readings and checks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spectralmetrics.functional.dimension import intrinsic_dimension
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.together import Wanted
from spectralmetrics.metrics.overrides import merged_as_in_compute
from spectralmetrics.metrics.state import SumsMetric
from spectralmetrics.metrics.statistic import Interval, Statistic
from spectralmetrics.sums import (
    Observations,
    SpectralSum,
    Sum,
    empty_folds,
    empty_moments,
    empty_sketch,
    products_dtype,
)
from spectralmetrics.sums.checks import check_positive_integer
from spectralmetrics.sums.repeats import REPEATED_INPUTS

NanStrategy = Literal["warn", "error", "ignore"]

_STATISTICS: dict[str, type[SpectralMetric]] = {}


def statistics() -> dict[str, type[SpectralMetric]]:
    """All statistics defined so far, by short name, including the user's own.

    >>> from spectralmetrics import statistics
    >>> statistics()["saturation"].__name__
    'SaturationMetric'
    """
    return dict(_STATISTICS)


class SpectralMetric(Statistic, SumsMetric):
    r"""Base class of all statistics of a feature covariance; subclasses define :meth:`statistic`.

    ``update`` takes rows of shape (N, D) in any floating dtype. The state is float64, constant in size, and
    lives on the device of the first rows (or where :meth:`to` has put the metric): sums of
    :math:`x - o` and :math:`(x - o)(x - o)^\top` about an origin :math:`o` near the data, and a count.

    Args:
        num_features: the width D; None reads it from the first rows.
        center: False reads the second moment about zero instead of the covariance. Where the mean is more
            than 1e6 times the spread, only its first eigenvalue stands out of the round-off.
        gram_dtype: dtype of the products: ``torch.float64``, or ``torch.float32`` for speed. None chooses by
            the device of the rows: float64 on the CPU and on GPUs that multiply it as fast as float32, and
            float32 on other accelerators. The sums are float64 in any case.
        nan_strategy: rows that hold NaN or infinities are left out and counted. ``"warn"`` says so at
            ``compute``, ``"error"`` raises there, ``"ignore"`` is silent.
        folds: with g > 1, batches are dealt in turn to g sums, so that :meth:`interval` can test on one fold
            the directions fitted to the others. Values use all data; the state is g times as large. Processes
            begin with different folds, and ``merge_state`` pairs folds so that all are filled alike.
        sketch_size: with k, a sketch of k columns, of 8·D·k bytes, replaces the covariance, and
            :meth:`interval` gives bounds that hold for certain. None keeps the covariance.
        kwargs: see `torchmetrics.Metric`.

    Raises:
        TypeError: from ``update``, for rows that are not a floating tensor.
        ValueError: for an argument out of range; from ``update``, for rows that are not 2-D or whose width
            is not D.
        RuntimeError: from ``compute``, if no observation has been counted, or if the observations overflow.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    count: Tensor
    non_finite: Tensor
    origin: Tensor
    first_moment: Tensor
    second_moment: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in cls.__dict__ and "takes_observations" not in cls.__dict__:
            cls.takes_observations = False
        if "short_name" in cls.__dict__ and cls.is_statistic:
            present = _STATISTICS.get(cls.short_name)
            if present is not None and present.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"expected a short name of its own for {cls.__name__}, got {cls.short_name!r},"
                    f" which names {present.__name__}"
                )
            _STATISTICS[cls.short_name] = cls

    def __init__(
        self,
        num_features: int | None = None,
        *,
        center: bool = True,
        gram_dtype: torch.dtype | None = None,
        nan_strategy: NanStrategy = "warn",
        folds: int = 1,
        sketch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if nan_strategy not in get_args(NanStrategy):
            raise ValueError(f"expected nan_strategy among {get_args(NanStrategy)}, got {nan_strategy!r}")
        check_positive_integer("folds", folds)
        check_positive_integer("sketch_size", sketch_size, or_none=True)
        if sketch_size is not None and folds > 1:
            raise ValueError(
                f"expected folds=1 with sketch_size={sketch_size}, got folds={folds}: a sketch keeps no folds,"
                " and its intervals need none"
            )
        super().__init__(num_features, gram_dtype, **kwargs)
        self.center = center
        self.nan_strategy = nan_strategy
        self.folds = folds
        self.sketch_size = sketch_size
        self.accumulate_also((self.spectral_sum(), *self.other_sums()))

    def spectral_sum(self) -> SpectralSum:
        """The sum whose spectrum :meth:`statistic` reads, empty and of width zero."""
        if self.sketch_size is not None:
            return empty_sketch(self.sketch_size, 0)
        return empty_folds(self.folds, 0) if self.folds > 1 else empty_moments(0)

    def other_sums(self) -> Sequence[Sum]:
        """The sums that :meth:`statistic` of a subclass reads besides the moments, empty and of width zero."""
        return ()

    def with_folds(self, folds: int) -> SpectralMetric:
        """A metric with the same settings, this number of folds and no observations."""
        check_positive_integer("folds", folds)
        if self.sketch_size is not None and folds > 1:
            raise ValueError(f"expected folds=1 of a metric with sketch_size={self.sketch_size}, got {folds}")
        twin = copy.deepcopy(self)
        twin.folds = folds
        twin.accumulate_instead((twin.spectral_sum(), *twin.other_sums()))
        return twin

    def sketch_instead(self, sketch_size: int) -> None:
        """Keep a sketch from now on in place of the covariance, and forget all observations."""
        self.folds, self.sketch_size = 1, sketch_size
        self.accumulate_instead((self.spectral_sum(), *self.prototypes[1:]))

    # -- what a statistic reads --------------------------------------------------------------------------

    @property
    def spectrum(self) -> Spectrum:
        """The spectrum of all observations so far, shared by the metrics that share this state.

        Raises:
            RuntimeError: if no observation has been counted.
        """
        self._check_observed()
        return self._shared_spectrum()

    def wanted(self, device: torch.device | None = None) -> list[Wanted]:
        """The decompositions that :meth:`read` needs, to be shared; none for a subclass' own ``compute``."""
        if type(self).compute is not SpectralMetric.compute:
            return []
        if self.needs_eigenvectors:
            return [Wanted(self._shared_spectrum(device), "eigenvectors")]
        return [Wanted(self._shared_spectrum(device), "eigenvalues" if self.needs_eigenvalues else "variances")]

    def read(self, device: torch.device | None = None) -> Tensor:
        """The value of ``compute`` for this process' observations, read on a device without checks."""
        if type(self).compute is not SpectralMetric.compute:  # a subclass' own compute, with its checks
            return type(self).compute(self)
        return self.value_of(self._shared_spectrum(device)).clone()  # it may be part of the spectrum

    def read_interval(self, device: torch.device | None = None) -> Interval:
        """The value of :meth:`interval` for this process' observations, read on a device without checks."""
        return self.interval_of(self._shared_spectrum(device))

    def dimension_read(self) -> int:
        """The intrinsic dimension if all eigenvalues were read already; 0 otherwise."""
        spectrum = self._shared_spectrum(torch.device("cpu"))
        if spectrum.sketch is not None or not spectrum.knows("eigenvalues"):
            return 0
        return int(intrinsic_dimension(spectrum.eigenvalues, getattr(self, "threshold", 0.99)))

    def counts(self) -> Tensor:
        """Counts to check before reading: observations, those left out, 1 if none overflowed; (3,), int64."""
        spectral = self._spectral
        in_range = spectral.in_range().to(torch.int64)
        return torch.stack([spectral.num_observations, spectral.num_left_out, in_range])

    def check_range(self, in_range: bool | None = None) -> None:
        """Raise a RuntimeError if the observations have overflowed; None checks the sums."""
        first = self._spectral
        if in_range is None:
            in_range = not first.num_features or bool(first.in_range())
        if not in_range:
            gram_dtype = self.gram_dtype or products_dtype(first.num_observations.device)
            limit = "1e154" if gram_dtype == torch.float64 else "3e38, or 1e154 for float64 rows"
            raise RuntimeError(
                f"{type(self).__name__}: the observations overflow: their distances from the mean, or the"
                " squares of the observations exceed the range of the sums (distances of about"
                f" {limit} with {gram_dtype} products); scale them down before `update`"
            )

    def _shared_spectrum(self, device: torch.device | None = None) -> Spectrum:
        live = self.flush()
        assert live is not None
        first, *others = live.sums
        assert isinstance(first, SpectralSum)
        return Spectrum(first, center=self.center, cache=live.stream.cache, others=others, device=device)

    # -- what torchmetrics offers ------------------------------------------------------------------------

    def update(self, rows: Tensor | Observations, *others: Any) -> None:
        """Add observations.

        Args:
            rows: shape (N, D), floating. Rows with NaN or infinities are left out and counted; zero rows are
                a no-op. :class:`~spectralmetrics.functional.Observations` are taken in their own layout.
            others: not allowed. In a ``MetricCollection`` with metrics that take other arguments, name them:
                ``collection.update(rows=features, preds=…, target=…)`` gives each metric its own.
        """
        if others:
            raise TypeError(
                f"expected rows alone, got {1 + len(others)} positional arguments; in a MetricCollection with"
                " metrics that take other arguments name them all, as in"
                " collection.update(rows=features, preds=predictions, target=labels)"
            )
        observations = rows if isinstance(rows, Observations) else Observations(rows)
        self._check(observations, rows)
        self._take_given(observations)

    def compute(self) -> Tensor:
        """The statistic of all observations so far, merged across processes as torchmetrics is set up to."""
        value = self.value_of(self.spectrum)
        if self.misses(value):
            warnings.warn(
                f"{type(self).__name__}: a sketch of {self.sketch_size} columns does not hold the share of the"
                f" variance; interval() gives a lower bound, and a larger sketch_size the value",
                stacklevel=2,
            )
        if self.is_clipped():
            warnings.warn(
                f"{type(self).__name__}: so few observations give a value beyond what is possible; the limit is"
                " returned, and interval() says how sure it is",
                stacklevel=2,
            )
        return value

    def is_clipped(self, device: torch.device | None = None) -> bool:
        """True if :meth:`read` gives a limit instead of a value; see :meth:`clips`."""
        return type(self).clips is not SpectralMetric.clips and self.clips(self._shared_spectrum(device))

    def interval(self) -> Interval:
        """Two values expected to enclose the value for unlimited data; merged like ``compute``.

        One is the statistic of the spectrum, the other the statistic of the spectrum on held-out data, see
        :func:`~spectralmetrics.functional.held_out_eigenvalues`. Directions that are fitted to few observations
        look too unequal on these and too equal on others: for dimension, saturation, effective rank and
        participation ratio the truth lies between; for the stable rank as well, unless several leading
        eigenvalues are equal. From a sketch, the two enclose the value for these observations for certain.
        Unless the statistic counts directions, both ends are moved outwards by what other draws of the data
        may change, see :func:`~spectralmetrics.functional.sampling_margin`.

        Returns:
            low and high, of the shape of ``compute``. While a fold is empty, the unknown end is NaN.

        Raises:
            RuntimeError: with ``folds=1``, for what ``compute`` raises, and for a statistic that has no
                interval.
        """
        if not self.has_interval:
            raise RuntimeError(f"{type(self).__name__} has no interval")
        if not self.keeps_interval:
            raise RuntimeError(
                f"{type(self).__name__} has kept its observations in one fold, which gives no interval; make it"
                " with folds=8, say"
            )
        with merged_as_in_compute(self):
            self._check_observed()
            if self.repeats():
                warnings.warn(f"{type(self).__name__}: {REPEATED_INPUTS}", stacklevel=2)
            return Interval(*(end.clone() for end in self.read_interval()))

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them, as torchmetrics' metrics do.

        Args:
            val: a value of ``compute`` or ``forward``, or a sequence of values; None computes one.
            ax: a matplotlib axis to draw into.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)

    def reset(self) -> None:
        """Forget all observations; a width that was read from rows is forgotten too."""
        super().reset()

    def to(self, *args: Any, **kwargs: Any) -> SpectralMetric:
        """Move the metric; from then on rows are brought to that device. Dtypes stay as they are."""
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, Tensor):
            device = device.device
        if isinstance(device, (str, int, torch.device)):
            self._pinned_device = torch.device(device)
        super().to(*args, **kwargs)
        return self

    def cpu(self) -> SpectralMetric:
        """Move the metric to the CPU; from then on rows are brought there."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> SpectralMetric:
        """Move the metric to a CUDA device; from then on rows are brought there."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    @property
    def keeps_interval(self) -> bool:
        """True if there is an :meth:`interval`."""
        return self.has_interval and (self.folds > 1 or self.sketch_size is not None)

    def _check_observed(self) -> None:
        """Raise an error, or warn, if the counts of observations say so; they are read once for shared sums."""
        live = self.flush()
        read: dict[Any, Any] = {} if live is None else live.stream.cache
        if "counts" not in read:
            read["counts"] = self.counts().tolist()
        count, non_finite, in_range = read["counts"]
        if non_finite and self.nan_strategy == "error":
            raise RuntimeError(
                f"{type(self).__name__}: {non_finite} of {count + non_finite} observations hold NaN or"
                " infinite values; nan_strategy='warn' leaves them out"
            )
        if count == 0:
            detail = f" ({non_finite} with NaN or infinite values were left out)" if non_finite else ""
            raise RuntimeError(
                f"{type(self).__name__} has counted no observation{detail}; call `update` before `compute`"
            )
        self.check_range(bool(in_range))
        if non_finite and self.nan_strategy == "warn":
            warnings.warn(
                f"{type(self).__name__} left out {non_finite} of {count + non_finite} observations that hold"
                " NaN or infinite values",
                stacklevel=2,
            )
