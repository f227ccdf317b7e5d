"""Spectra of weight matrices in a model or a checkpoint, and of their changes in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectralmetrics.functional import effective_rank, eigenvalues
from spectralmetrics.functional.power_law import power_law_tail
from spectralmetrics.functional.spectrum import Spectrum
from spectralmetrics.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, has_inputs_first
from spectralmetrics.metrics import statistics
from spectralmetrics.parameters import check_some_in, weight_in, weights_of, why_no_numbers
from spectralmetrics.probing.selection import Selectors, named_modules, select_layers, unwrap
from spectralmetrics.sums.decomposition import round_off
from spectralmetrics.table import by_reason, import_pandas, number, plural, text_table
from spectralmetrics.torch_private import WRAPPER_ATTRIBUTES

if TYPE_CHECKING:
    import pandas

DEFAULT_STATISTICS = ("effective_rank", "stable_rank", "alpha")
"""Read by default; ``"alpha"`` is the exponent of :func:`~.functional.power_law_tail`."""
_LOW_RANK = 0.02  # share of the narrower side
_HEAVY, _RANDOM = 2.0, 6.0  # exponents between which the spectra of trained layers lie, see arXiv:1810.01075
_FEWEST = 50  # the fewest singular values to which alpha is fitted
_DATA_PARALLEL = "module"
_AWAY = "it is on the meta device: if its weights are offloaded, read the checkpoint"


class WeightMatrix(NamedTuple):
    """A matrix that is read into memory when it is needed.

    Attributes:
        layer: name of its row.
        kind: type of its module; empty if unknown.
        parameter: name of the parameter that holds it.
        bring: returns the parameter.
        expert: index among the matrices stacked in the parameter; None if the parameter is one matrix.
        inputs_first: True if the first dimension of the parameter is the inputs.
        groups: groups of a convolution, each with its own inputs.
    """

    layer: str
    kind: str
    parameter: str
    bring: Callable[[], Tensor]
    expert: int | None = None
    inputs_first: bool = False
    groups: int = 1

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix in a value of its parameter, shape (fan-out, fan-in), float64."""
        weight = parameter.detach()
        if hasattr(weight, "full_tensor"):  # sharded over processes
            weight = weight.full_tensor()
        if weight.is_quantized:
            weight = weight.dequantize()
        if weight.layout != torch.strided:
            weight = weight.to_dense()
        if self.expert is not None:
            weight = weight[self.expert]
        if self.inputs_first:
            # (in, out/groups, *kernel) -> (out, in/groups, *kernel), as in a convolution that is not transposed
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.flatten(1).to(torch.float64)


class WeightRow(NamedTuple):
    """One weight matrix.

    Attributes:
        layer: the qualified name of the module, or of the parameter where the module has several.
        kind: the module's type; empty for a checkpoint.
        shape: fan-out and fan-in.
        value: statistic -> value.
        update: the same for the change of the weights, and ``"relative_size"``, the Frobenius norm of the
            change over the norm of the earlier weights; empty without ``since``.
        stands_out: remarks on what stands out.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    value: dict[str, float]
    update: dict[str, float]
    stands_out: tuple[str, ...]


class WeightSummary:
    """A table of weight matrices; printing it fits the terminal, else 100 columns.

    Attributes:
        rows: a :class:`WeightRow` for each matrix.
        skipped: name of a tensor -> why it was not read.
    """

    def __init__(self, rows: Sequence[WeightRow], skipped: Mapping[str, str] | None = None) -> None:
        self.rows = list(rows)
        self.skipped = dict(skipped or {})

    def __str__(self) -> str:
        names = list(self.rows[0].value) if self.rows else []
        updates = list(self.rows[0].update) if self.rows else []
        heads = ["layer", "type", "shape", *(each.replace("_", " ") for each in names)]
        heads += ["update:\n" + each.replace("_", " ") for each in updates] + ["what stands out"]
        cells = [
            [
                row.layer,
                row.kind,
                "x".join(map(str, row.shape)),
                *(_shown(row.value[each]) for each in names),
                *(_shown(row.update[each]) for each in updates),
                ", ".join(row.stands_out),
            ]
            for row in self.rows
        ]
        lines = text_table(heads, cells, left=("type",), spare=("type", "shape"))
        return "\n".join([*lines, *by_reason("skipped ", self.skipped)])

    __repr__ = __str__

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a data frame, a column for each statistic; names of updates begin with ``update_``.

        Raises:
            ModuleNotFoundError: without pandas, extra ``spectralmetrics[pandas]``.
        """
        frame: pandas.DataFrame = import_pandas().DataFrame(
            {
                "layer": row.layer,
                "kind": row.kind,
                "fan_out": row.shape[0],
                "fan_in": row.shape[1],
                **row.value,
                **{f"update_{name}": value for name, value in row.update.items()},
                "stands_out": ", ".join(row.stands_out),
            }
            for row in self.rows
        )
        return frame


def weight_spectra(
    model: nn.Module,
    statistics: Sequence[str] | None = None,
    layers: Selectors | None = None,
    since: Mapping[str, Tensor] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> WeightSummary:
    r"""The spectra of a model's weight matrices, one at a time.

    A statistic is read from the squared singular values of a matrix W, as if its rows were observations about
    zero: the eigenvalues of :math:`W W^\top` or :math:`W^\top W`, whichever is smaller. Convolutions are
    fan-out × fan-in matrices. Parameters of three dimensions that hold the matrices of experts are split.

    Args:
        model: any module. Wrappers are unwrapped, and sharded weights (DTensors) are gathered one by one, by
            all processes together.
        statistics: short names of statistics that are one number, and ``"alpha"``, the exponent of
            :func:`~spectralmetrics.functional.power_law_tail` (NaN with fewer than 50 singular values). By
            default the effective rank, the stable rank and alpha.
        layers: the modules, selected as in :class:`~spectralmetrics.LayerProbe`; by default all with matrices.
        since: an earlier ``state_dict`` of the model: the statistics of the difference are read, too.
        progress: called with the number of matrices done and the number of all.

    Returns:
        A row for each matrix in the order of registration; a matrix with several names has the first.

    Raises:
        TypeError: for a model that is not a module, or ``since`` that is not a state dict.
        ValueError: for an unknown statistic, a selector that matches nothing, a model without matrices, or a
            state dict of other shapes or without any of these weights.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> print(weight_spectra(model, ["effective_rank", "stable_rank"]))
    layer  type    shape  effective rank  stable rank  what stands out
    0      Linear  32x64           29.45        12.33
    2      Linear   8x32           7.731        4.129
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if since is not None and not isinstance(since, Mapping):
        raise TypeError(f"expected since to be a state dict, got {type(since).__name__}")
    if progress is not None and not callable(progress):
        raise TypeError(f"expected progress to be a function of two numbers or None, got {progress!r}")
    chosen = named_modules(unwrap(model)) if layers is None else select_layers(model, layers)
    skipped: dict[str, str] = {}
    matrices = list(_of_modules(chosen, unwrap(model), skipped))
    if not matrices:
        raise ValueError(f"no layer of {type(model).__name__} has a weight matrix{first_reason(skipped)}")
    before = None if since is None else {without_wrappers(name): value for name, value in since.items()}
    return summarise_weights(matrices, statistics, before, skipped, progress)


def first_reason(skipped: Mapping[str, str]) -> str:
    """The first skipped tensor with its reason, for the end of an error; empty if none was skipped.

    >>> first_reason({"0.weight": "it is empty", "1.weight": "it is no matrix"})
    "; '0.weight': it is empty"
    """
    return "".join(f"; {name!r}: {reason}" for name, reason in list(skipped.items())[:1])


def summarise_weights(
    matrices: Sequence[WeightMatrix],
    statistics: Sequence[str] | None = None,
    before: Mapping[str, Tensor] | None = None,
    skipped: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WeightSummary:
    """The summary of matrices, with one in memory at a time.

    Args:
        matrices: the matrices to read.
        statistics: see :func:`weight_spectra`.
        before: parameter -> its earlier value; None reads no updates.
        skipped: name of a tensor that was skipped before -> reason.
        progress: see :func:`weight_spectra`.
    """
    readers = {name: _reader(name) for name in (DEFAULT_STATISTICS if statistics is None else statistics)}
    check_some_in(before, [matrix.parameter for matrix in matrices])
    left_out, rows = dict(skipped or {}), []
    for done, matrix in enumerate(matrices, 1):
        weight = matrix.of(matrix.bring())
        values = _squared_singular_values(weight)
        if values is None:
            left_out[matrix.layer] = "it holds NaN or infinite values"
        else:
            own = {name: read(values) for name, read in readers.items()}
            update = {} if before is None else _update(matrix, weight, before, readers)
            shape = (weight.shape[0], weight.shape[1])
            rows.append(WeightRow(matrix.layer, matrix.kind, shape, own, update, _words(values, own)))
        if progress is not None:
            progress(done, len(matrices))
    return WeightSummary(rows, left_out)


def _of_modules(
    modules: Mapping[str, nn.Module], root: nn.Module, skipped: dict[str, str]
) -> Iterator[WeightMatrix]:
    seen: set[int] = set()
    for name, module in modules.items():
        if "parametrizations" in name.split("."):  # its parameters make the weight of the layer around it
            continue
        prefix = "" if module is root else f"{name}."
        inputs_first, kind = has_inputs_first(module), type(module).__name__
        groups = module.groups if isinstance(module, TRANSPOSED_CONVOLUTIONS) else 1
        for own, parameter, bring in weights_of(module):
            if id(parameter) in seen or is_lazy(parameter) or len(shape := bring().shape) < 2:
                continue
            seen.add(id(parameter))
            layer = name if own == "weight" else f"{prefix}{own}"
            if reason := _AWAY if parameter.is_meta else why_no_numbers(parameter.dtype, shape):
                skipped[layer] = reason
                continue
            stacked = len(shape) == 3 and not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
            for expert in range(shape[0]) if stacked else (None,):
                row = layer if expert is None else f"{layer}.{expert}"
                yield WeightMatrix(row, kind, f"{prefix}{own}", bring, expert, inputs_first, groups)


def without_wrappers(name: str) -> str:
    """The name of a parameter without the parts that wrappers for compilation and parallelism add.

    >>> without_wrappers("module.layer.weight")
    'layer.weight'
    """
    own = [part for part in name.split(".") if part == _DATA_PARALLEL or part not in WRAPPER_ATTRIBUTES]
    return ".".join(own[1:] if own[0] == _DATA_PARALLEL else own)  # a model may have a module of that name


@torch.no_grad()
def _squared_singular_values(matrix: Tensor) -> Tensor | None:
    """Squared singular values, descending, float64; None if the matrix is not finite."""
    if not bool(matrix.isfinite().all()):
        return None
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    values = eigenvalues(gram)
    if not bool(values.all()):  # squared, those below a millionth of the largest are lost in round-off
        singular = torch.linalg.svdvals(matrix)
        values = torch.where(singular > round_off(max(matrix.shape)) * singular[0], singular, 0).square()
    return values.cpu()


def _reader(name: str) -> Callable[[Tensor], float]:
    if name == "alpha":
        return lambda values: float(power_law_tail(values).alpha) if len(values) >= _FEWEST else math.nan
    usable = {key for key, kind in statistics().items() if not (kind.needs_labels or kind.needs_eigenvectors)}
    if name not in usable:
        raise ValueError(f"expected statistics among {sorted({'alpha', *usable})}, got {name!r}")
    metric = statistics()[name]()

    def read(values: Tensor) -> float:
        spectrum = Spectrum.of_covariance(torch.diag(values), torch.zeros_like(values), 1)
        spectrum.learn("eigenvalues", values)
        value = metric.value_of(spectrum)
        if value.ndim:
            raise ValueError(f"expected a statistic that is one number, got {name!r}")
        return float(value)

    return read


def _update(
    matrix: WeightMatrix,
    weight: Tensor,
    before: Mapping[str, Tensor],
    readers: Mapping[str, Callable[[Tensor], float]],
) -> dict[str, float]:
    nothing = dict.fromkeys(("relative_size", *readers), math.nan)
    if (stored := weight_in(before, matrix.parameter)) is None:
        return nothing
    earlier = matrix.of(stored).to(weight.device)
    if earlier.shape != weight.shape:
        raise ValueError(
            f"expected {matrix.parameter!r} of shape {tuple(weight.shape)} in since, got {tuple(earlier.shape)}"
        )
    if (values := _squared_singular_values(weight - earlier)) is None:
        return nothing
    size, change = float(earlier.norm()), float((weight - earlier).norm())
    relative = change / size if size else (math.inf if change else 0.0)
    return {"relative_size": relative, **{name: read(values) for name, read in readers.items()}}


def _words(values: Tensor, statistics: Mapping[str, float]) -> tuple[str, ...]:
    if not bool(values.any()):
        return ("all zero",)
    words, rank = [], float(effective_rank(values))
    if len(values) > 1 and rank < max(_LOW_RANK * len(values), 1.5):
        words.append(f"low rank: {rank:.3g} of {len(values)}")
    if zero := int((values == 0).sum()):
        words.append(f"{plural(zero, 'singular value')} of zero")
    if (alpha := statistics.get("alpha", math.nan)) < _HEAVY:
        words.append("alpha below 2: very heavy tail")
    elif alpha > _RANDOM:
        words.append("alpha above 6: hardly a tail")
    return tuple(words)


def _shown(value: float) -> str:
    return number(None if math.isnan(value) else value)
