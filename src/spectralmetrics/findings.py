"""Findings: what the numbers of a layer mean, and how serious it is.

One public table, :data:`FINDING_RULES`, holds every kind of finding with its statistic, threshold and the sums
that it needs. All texts about layers (summaries, console, reports, comparisons, callbacks) take their words
from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from spectralmetrics.functional import marginals as functional
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.functional.tail import low_saturation_tail
from spectralmetrics.metrics import EffectiveRankMetric, IntrinsicDimensionMetric, SpectralMetric
from spectralmetrics.sums import Marginals
from spectralmetrics.table import plural

Severity: TypeAlias = Literal["problem", "note"]

_NARROW = 4
"""Width below which a layer is not called collapsed; so few targets need no more directions."""
_WIDE = 0.1
"""Share of the width beyond which an interval says little."""
_ROUND_OFF = 1e-24
"""Share of a feature's mean square below which its variance is round-off of a constant feature."""
_UNTRAINED_SPREAD = 1e-8
"""The least spread of an untrained layer: in deep networks it is small, since biases outweigh the rest."""
_KURTOSIS_WIDTH = 32
"""Narrower layers have no outliers, since one large feature among a few does not stand out."""
_FEW = 0.02
"""Share of the width below which an effective rank is small."""
_EXACTLY_ONE = 1.001
"""An effective rank below this is one direction up to round-off, which smooth inputs never give."""
SHORTEST_TAIL = 2
"""Number of layers of low saturation from which they are called a tail."""
_MORE = 2.0
"""An earlier layer has more directions if its effective rank is larger by this factor."""


class Finding(NamedTuple):
    """Something that stands out in one layer.

    Attributes:
        stage: ``"train"`` or ``"eval"``.
        layer: its qualified name.
        kind: one of the kinds in :data:`FINDING_RULES`.
        severity: ``"problem"`` or ``"note"``.
        message: the finding in words for a table.
        value: the statistic that shows it.
        low: the lower end of its interval; NaN where there is none.
        high: the upper end of its interval; NaN where there is none.
    """

    stage: str
    layer: str
    kind: str
    severity: Severity
    message: str
    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.severity}: {self.layer!r} in {self.stage}: {self.message}"


class FindingRule(NamedTuple):
    """A rule for findings of one kind.

    Attributes:
        kind: name of the finding.
        severity: ``"problem"`` or ``"note"``.
        statistic: the statistic that is compared with the threshold.
        threshold: the limit; NaN where the rule compares two numbers of the layer.
        min_observations: with fewer finite observations the rule says nothing.
        needs: the sums it reads: ``"counts"``, ``"variances"`` (any kind of sum), ``"marginals"``, or
            ``"eigenvalues"`` (a covariance; for dimensions also a sketch).
        when: the rule in words.
        of_gradients: True if the rule applies to gradients as well, see ``observe`` of
            :class:`~spectralmetrics.LayerProbe`.
    """

    kind: str
    severity: Severity
    statistic: str
    threshold: float
    min_observations: int
    needs: Literal["counts", "variances", "marginals", "eigenvalues"]
    when: str
    of_gradients: bool = False


FINDING_RULES: tuple[FindingRule, ...] = (
    FindingRule("non_finite", "problem", "rows left out", 0, 0, "counts",
                "rows with NaN or infinities were left out", of_gradients=True),
    FindingRule("collapsed", "problem", "spread", 5e-4, 32, "variances",
                "the variance is less than this share of the mean square, in a layer of 4 features or more (in "
                "a layer whose weights are still random, as initialised: less than 1e-8)"),
    FindingRule("collapsed", "problem", "effective_rank", 1.2, 32, "eigenvalues",
                "the upper end of the effective rank is below this, in a layer whose width and ceiling are 4 "
                "or more, in a network of 4 outputs or more; and a layer before has more than twice the rank, "
                "or the rank is 1 up to round-off"),
    FindingRule("dead", "problem", "dead_features", 0.75, 256, "variances",
                "more than this share of the features never vary"),
    FindingRule("in_tail", "note", "saturation", 0.5, 2, "eigenvalues",
                "the layer is in a run of two layers or more, up to the output layer, whose saturation is "
                "below this share of the largest"),
    FindingRule("collapsed", "note", "spread", 5e-4, 32, "variances",
                "the same in a layer that is not trained yet"),
    FindingRule("dead", "note", "dead_features", 0.0, 2, "variances", "some features never vary"),
    FindingRule("dormant", "problem", "dormant_features", 0.9, 256, "marginals",
                "more than this share of the features are dormant at tau = 0.025"),
    FindingRule("dormant", "note", "dormant_features", 0.5, 256, "marginals",
                "more than this share of the features are dormant at tau = 0.025"),
    FindingRule("few_directions", "note", "effective_rank", 2.5, 32, "eigenvalues",
                "the upper end of the effective rank is below this or below 2 % of the width, and below half "
                "of the ceiling: expected where there are as few classes or targets"),
    FindingRule("outliers", "note", "outlier_features", 0.25, 32, "variances",
                "few features hold most of the scale: the kurtosis of their mean squares exceeds this share of "
                "the width, in a layer of 32 features or more"),
    FindingRule("above_ceiling", "note", "intrinsic_dimension", math.nan, 2, "eigenvalues",
                "the dimension exceeds the most directions that the final weights allow"),
    FindingRule("at_ceiling", "note", "intrinsic_dimension", 0.95, 2, "eigenvalues",
                "the dimension is at least this share of the most directions that the weights allow"),
    FindingRule("sketched", "note", "intrinsic_dimension", math.nan, 1, "eigenvalues",
                "a sketch stands for the covariance", of_gradients=True),
    FindingRule("few_observations", "note", "observations", 10, 0, "counts",
                "there are fewer observations than this for each direction, or than a rule above needs, or the "
                "interval of the dimension is wider than a tenth of the width", of_gradients=True),
)  # fmt: skip
"""All kinds of findings, with their thresholds, in the order in which they are listed. Problems come first."""

_OF_GRADIENTS = {rule.kind for rule in FINDING_RULES if rule.of_gradients}

_RULES = {(rule.kind, rule.severity, rule.statistic): rule for rule in FINDING_RULES}

_Found: TypeAlias = tuple[Any, ...]
"""The attributes of a finding after stage and layer."""


class LayerNumbers(NamedTuple):
    """The numbers of one layer that the rules read; one process can read them for all.

    Attributes:
        layer: its qualified name.
        width: the number of features D.
        ceiling: the most directions that its weights allow; D if unknown.
        observations: the number of finite observations.
        left_out: the number of observations left out for NaN or infinities.
        spread: the variance as a share of the mean square; 0 where all is zero.
        dead: the number of features that do not vary.
        dormant: the share of dormant features; NaN where no marginals are kept.
        kurtosis: the kurtosis of the features' mean squares, from 1 to D.
        rank: the interval of the effective rank, or the value twice; NaN if the spectrum is unknown.
        dimension: the intrinsic dimension, NaN if unknown, and its interval.
        is_sketched: True if a sketch stands for the covariance.
        has_interval: True if there are folds, or bounds of a sketch.
        of_gradients: True if gradients were observed.
    """

    layer: str
    width: int
    ceiling: int
    observations: int
    left_out: int
    spread: float = math.nan
    dead: int = 0
    dormant: float = math.nan
    kurtosis: float = math.nan
    rank: tuple[float, float] = (math.nan, math.nan)
    dimension: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    is_sketched: bool = False
    has_interval: bool = False
    of_gradients: bool = False

    @property
    def known_dimension(self) -> int:
        """The dimension, or its lower bound if only this is known; 0 if the spectrum is unknown."""
        value, low, _ = self.dimension
        value = low if math.isnan(value) else value
        return 0 if math.isnan(value) else int(value)

    @property
    def upper_rank(self) -> float:
        """The upper end of the effective rank; the lower end while a fold is empty."""
        low, high = self.rank
        return low if math.isnan(high) else high

    @property
    def is_dead(self) -> bool:
        """True if no feature varies."""
        return self.dead == self.width

    def few_because(self) -> list[str]:
        """The reasons not to trust the numbers of so few observations; empty if there are enough."""
        reasons = []
        times = _RULES["few_observations", "note", "observations"].threshold
        if self.observations < times * max(self.known_dimension, 1):
            reasons.append(f"below {times:g} times the dimension")
        is_dying = self.dead > _RULES["dead", "problem", "dead_features"].threshold * self.width
        kinds = {"collapsed", "dead"} if is_dying else {"collapsed"}
        needed = max(r.min_observations for r in FINDING_RULES if r.kind in kinds and r.severity == "problem")
        if self.observations < needed and not self.of_gradients:
            reasons.append(f"below {needed}")
        _, low, high = self.dimension
        if high - low > _WIDE * self.width and not self.is_sketched:
            reasons.append("the interval is wider than a tenth of the width")
        return reasons


def read_numbers(
    layer: str, spectrum: Spectrum, ceiling: int | None, threshold: float, of_gradients: bool = False
) -> LayerNumbers:
    """The numbers of a layer that the rules need, of its spectrum about the mean.

    The ceiling is the most directions that its weights allow, None if unknown; the threshold is that of the
    intrinsic dimension.
    """
    width, count = spectrum.num_features, int(spectrum.num_observations)
    most = width if ceiling is None else min(ceiling, width)
    numbers = LayerNumbers(layer, width, most, count, int(spectrum.num_left_out), of_gradients=of_gradients)
    if not count:
        return numbers
    spread, dead = _spread_and_dead(spectrum)
    kurtosis = float(functional.outlier_features(spectrum.second_moments))
    numbers = numbers._replace(spread=spread, dead=dead, kurtosis=kurtosis)
    if spectrum.has(Marginals):
        magnitudes = spectrum.part(Marginals).magnitudes()
        numbers = numbers._replace(dormant=float(functional.dormant_features(magnitudes)))
    if not has_eigenvalues(spectrum):
        return numbers
    is_sketched = spectrum.sketch is not None
    has_interval = is_sketched or spectrum.num_folds > 1

    def with_ends(metric: SpectralMetric) -> tuple[float, float, float]:
        value = metric.value_of(spectrum)
        low, high = metric.interval_of(spectrum) if has_interval else (value, value)
        return float(value), float(low), float(high)

    return numbers._replace(
        rank=(math.nan, math.nan) if is_sketched else with_ends(EffectiveRankMetric())[1:],
        dimension=with_ends(IntrinsicDimensionMetric(threshold=threshold)),
        is_sketched=is_sketched,
        has_interval=has_interval,
    )


def _spread_and_dead(spectrum: Spectrum) -> tuple[float, int]:
    """The spread of a layer with observations, and the number of its features that do not vary."""
    variances, squares = spectrum.variances, spectrum.second_moments
    spread = float(functional.spread(variances, squares)) if bool(squares.any()) else 0.0
    return spread, int((variances <= _ROUND_OFF * squares).sum()) if int(spectrum.num_observations) > 1 else 0


def needs_weights(spectrum: Spectrum) -> bool:
    """True if a layer's variance is so small that its findings depend on :func:`.is_untrained`.

    Args:
        spectrum: the spectrum of the layer about the mean; no eigenvalues are read.
    """
    width, count = spectrum.num_features, int(spectrum.num_observations)
    if not count:
        return False
    spread, dead = _spread_and_dead(spectrum)
    return _has_small_spread(LayerNumbers("", width, width, count, 0, spread, dead))


def has_eigenvalues(spectrum: Spectrum) -> bool:
    """True if eigenvalues or bounds of them can be read; marginals have none."""
    return spectrum.sums.keeps_products or spectrum.sketch is not None


def find(
    stage: str,
    layers: Sequence[LayerNumbers],
    is_untrained: Callable[[Sequence[str]], Mapping[str, bool | None]] = lambda layers: {},
) -> list[Finding]:
    """Findings about the layers of a network: problems first, then in forward order.

    A rule whose sums a layer does not keep says nothing.

    Args:
        stage: ``"train"`` or ``"eval"``.
        layers: numbers of the layers in forward order, see :func:`read_numbers`.
        is_untrained: names of layers -> name -> True if the weights are as initialised, see
            :func:`.is_untrained`; called if a layer's variance is small. A layer of which this is unknown is
            untrained if the layer before is.

    >>> import torch
    >>> rows = 1 + 1e-6 * torch.randn(100, 8, dtype=torch.float64)
    >>> covariance = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / 100
    >>> spectrum = Spectrum.of_covariance(covariance, rows.mean(0), 100)
    >>> found = find("eval", [read_numbers("encoder", spectrum, None, 0.99)])
    >>> [(each.kind, each.severity) for each in found]
    [('collapsed', 'problem'), ('at_ceiling', 'note')]
    """
    names = [each.layer for each in layers]
    suspects = [index for index, each in enumerate(layers) if _has_small_spread(each)]
    untrained = is_untrained(names[: suspects[-1] + 1]) if suspects else {}
    findings: list[Finding] = []
    for index, (layer, is_new) in enumerate(zip(layers, are_new(names, untrained), strict=True)):
        findings += of_layer(stage, layer, layers[:index], layers[-1], is_new)
    order = {name: index for index, name in enumerate(names)}
    return sorted(
        findings + _tail(stage, layers), key=lambda each: (order_of(each)[0], order[each.layer], order_of(each))
    )


def are_new(layers: Iterable[str], untrained: Mapping[str, bool | None]) -> Iterator[bool]:
    """True for each layer, in forward order, that counts as untrained: if unknown, as the layer before does.

    >>> list(are_new(["0", "1", "2", "3"], {"0": True, "2": False}))
    [True, True, False, False]
    """
    is_new = False
    for layer in layers:
        own = untrained.get(layer)
        is_new = is_new if own is None else own
        yield is_new


def order_of(finding: Finding) -> tuple[bool, int]:
    """The key that sorts the findings of a layer: problems first."""
    kinds = [rule[:2] for rule in FINDING_RULES]
    return finding.severity != "problem", kinds.index((finding.kind, finding.severity))


def of_layer(
    stage: str, layer: LayerNumbers, before: Sequence[LayerNumbers], last: LayerNumbers, is_new: bool = False
) -> Iterator[Finding]:
    """Findings about one layer, except the tail of low saturation.

    Args:
        stage: ``"train"`` or ``"eval"``.
        layer: the layer to judge.
        before: the layers before it.
        last: the last layer of the network, whose width is the number of targets.
        is_new: True if its weights are as initialised.
    """
    found: list[_Found] = []
    if layer.left_out:
        words = f"{plural(layer.left_out, 'row')} with NaN or infinities left out"
        found.append(("non_finite", "problem", words, layer.left_out))
    if layer.observations:
        found += [*_of_collapse(layer, before, last, is_new), *_of_features(layer), *_of_dimension(layer)]
    for kind, *others in found:
        if not layer.of_gradients or kind in _OF_GRADIENTS:
            yield Finding(stage, layer.layer, kind, *others)


def _has_small_spread(layer: LayerNumbers) -> bool:
    rule = _RULES["collapsed", "problem", "spread"]
    is_judged = _applies(rule, layer) and layer.width >= _NARROW and not layer.is_dead
    return is_judged and layer.spread < rule.threshold


def _of_collapse(
    layer: LayerNumbers, before: Sequence[LayerNumbers], last: LayerNumbers, is_new: bool
) -> Iterator[_Found]:
    if _has_small_spread(layer):
        words = f"the mean holds {all_but(layer.spread)} %"
        if is_new and layer.spread >= _UNTRAINED_SPREAD:
            yield "collapsed", "note", words, layer.spread
        else:
            yield "collapsed", "problem", f"collapsed: {words}", layer.spread
        return
    upper = layer.upper_rank
    if layer.is_dead or math.isnan(upper):
        return
    ends = layer.rank if layer.has_interval else ()
    rank = _RULES["collapsed", "problem", "effective_rank"]
    more = max((each.rank[0] for each in before if not math.isnan(each.rank[0])), default=0.0)
    has_lost_some = more > _MORE * upper or upper < _EXACTLY_ONE
    allows_more = min(layer.width, layer.ceiling, last.width) >= _NARROW and has_lost_some
    if _applies(rank, layer) and upper < rank.threshold and allows_more:
        yield "collapsed", "problem", f"collapsed: {round(upper)} of {layer.width} directions", upper, *ends
        return
    few = _RULES["few_directions", "note", "effective_rank"]
    is_few = upper < min(max(few.threshold, _FEW * layer.width), layer.ceiling / 2)
    if _applies(few, layer) and layer.width >= _NARROW and is_few:
        yield "few_directions", "note", f"few directions: effective rank {upper:.2g}", upper, *ends


def _of_features(layer: LayerNumbers) -> Iterator[_Found]:
    share = layer.dead / layer.width
    if _exceeds("dead", "problem", "dead_features", layer, share):
        yield "dead", "problem", f"dead: {layer.dead} of {layer.width} features", share
    elif _exceeds("dead", "note", "dead_features", layer, share):
        yield "dead", "note", plural(layer.dead, "dead feature"), share
    if layer.is_dead:
        return
    if _exceeds("dormant", "note", "dormant_features", layer, layer.dormant):
        is_problem = _exceeds("dormant", "problem", "dormant_features", layer, layer.dormant)
        words = f"{round(layer.dormant * layer.width)} of {layer.width} features are dormant"
        yield "dormant", "problem" if is_problem else "note", words, layer.dormant
    outliers = _RULES["outliers", "note", "outlier_features"]
    is_wide = layer.width >= _KURTOSIS_WIDTH
    if _applies(outliers, layer) and is_wide and layer.kurtosis > outliers.threshold * layer.width:
        words = f"outlier features: kurtosis {layer.kurtosis:.3g} of at most {layer.width}"
        yield "outliers", "note", words, layer.kurtosis


def _of_dimension(layer: LayerNumbers) -> Iterator[_Found]:
    value, *ends = layer.dimension
    if layer.few_because():
        yield "few_observations", "note", "few observations", layer.observations
    if math.isnan(ends[0]):  # no spectrum
        return
    known = layer.known_dimension
    numbers = (known, *ends) if layer.has_interval else (known,)
    full = _RULES["at_ceiling", "note", "intrinsic_dimension"].threshold
    if known > layer.ceiling:
        words = f"more directions than its final weights allow ({layer.ceiling})"
        yield "above_ceiling", "note", words, *numbers
    elif known and known >= full * layer.ceiling:
        yield "at_ceiling", "note", "at its ceiling", *numbers
    if layer.is_sketched:
        words = f"more than {known - 1} directions: larger sketch" if math.isnan(value) else "sketched"
        yield "sketched", "note", words, *numbers


def _tail(stage: str, layers: Sequence[LayerNumbers]) -> list[Finding]:
    shares = {each.layer: each.dimension[0] / each.width for each in layers}
    if any(map(math.isnan, shares.values())) or any(each.of_gradients for each in layers):
        return []
    return [in_tail(stage, name, shares[name]) for name in tail_of(shares)]


def tail_of(saturation: Mapping[str, float | Tensor]) -> list[str]:
    """The layers of the low-saturation tail; one layer of low saturation alone is no tail.

    >>> tail_of({"1": 0.8, "2": 0.2, "head": 0.9}), tail_of({"1": 0.8, "2": 0.2, "3": 0.2, "head": 0.9})
    ([], ['2', '3'])
    """
    tail = low_saturation_tail(saturation, ratio=_RULES["in_tail", "note", "saturation"].threshold)
    return tail if len(tail) >= SHORTEST_TAIL else []


def in_tail(stage: str, layer: str, saturation: float) -> Finding:
    """The finding of a layer in the low-saturation tail."""
    return Finding(stage, layer, "in_tail", "note", "in the tail", saturation)


def _applies(rule: FindingRule, layer: LayerNumbers) -> bool:
    return layer.observations >= rule.min_observations


def _exceeds(kind: str, severity: Severity, statistic: str, layer: LayerNumbers, value: float) -> bool:
    rule = _RULES[kind, severity, statistic]
    return _applies(rule, layer) and value > rule.threshold


def all_but(share: float) -> str:
    """100 % less a small share, with enough digits to differ from 100 %.

    >>> all_but(1e-6), all_but(4e-4), all_but(0.0)
    ('99.9999', '99.96', '100')
    """
    if share == 0:
        return "100"
    digits = max(math.ceil(-math.log10(100 * share) - 0.1), 0)  # so that it is never rounded to 100 %
    return f"{100 - 100 * share:.{digits}f}"


def true_ceiling(numbers: LayerNumbers) -> int:
    """The most directions that a layer's weights allow; its width if this is unknown or refuted.

    A dimension above the ceiling refutes it: the weights changed meanwhile, or the layer has its own forward.

    >>> numbers = LayerNumbers("conv", 128, 64, 1000, 0, dimension=(70.0, 70.0, 70.0))
    >>> true_ceiling(numbers), true_ceiling(numbers._replace(dimension=(60.0, 60.0, 60.0)))
    (128, 64)
    """
    return numbers.width if numbers.known_dimension > numbers.ceiling else numbers.ceiling


def in_words(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The messages of a layer's findings, problems first."""
    return tuple(each.message for each in sorted(findings, key=order_of))
