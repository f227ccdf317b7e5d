"""Pictures of values, without models or probes. Needs matplotlib: ``spectralmetrics[plot]``.

Every function returns ``(figure, axis)``, draws into ``ax`` if one is given, and shows or saves nothing: call
``figure.savefig("profile.png")``, or end a notebook cell with ``figure``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectralmetrics.extras import from_extra
from spectralmetrics.functional.dimension import check_threshold, intrinsic_dimension
from spectralmetrics.sums.checks import check_names, check_positive_integer, check_real
from spectralmetrics.table import shorten_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity: TypeAlias = Literal["rms", "mean", "max_abs", "zero_share", "non_finite"]

# The palette of Okabe and Ito without its yellow, which is too light for lines. Colour-blind readers can
# distinguish these colours, and the markers help where there is no colour.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
# Petroff's sequence of ten colours (arXiv:2107.02270), for more classes.
_MORE_COLOURS = (
    *("#3F90DA", "#FFA90E", "#BD1F01", "#94A4A2", "#832DB6"),
    *("#A96B59", "#E76300", "#B9AC70", "#717581", "#92DADD"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NAME_INCHES = 0.145  # room for one layer name at the size below
_NAME_POINTS = 8
_TITLE = 30
"""The most characters in the title of a small picture."""


def plot_profile(
    profiles: Mapping[str, Mapping[str, float | Tensor]],
    *,
    statistic: str = "saturation",
    title: str | None = None,
    tail: Sequence[str] = (),
    bands: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    ceilings: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw one value per layer, in forward order, one line for each stage.

    Args:
        profiles: stage, or anything else that is compared -> layer name -> value. Layers are drawn in the order
            of the first profile. Layers that a profile lacks and values that are not finite leave a gap.
        statistic: name of the values; labels the axis.
        title: the title of the picture.
        tail: layers to shade.
        bands: the bands of some profiles, layer name -> low and high, shaded around the line.
        ceilings: layer name -> the most that a value can be, drawn as a faint step line.
        ax: axes to draw on; if None a new figure, large enough for the names. If a given axis has no room for
            all names, evenly spaced names are written.

    Returns:
        The figure and the axis. Nothing is shown or saved.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if there is no value to draw.
        ModuleNotFoundError: without matplotlib.

    >>> figure, axis = plot_profile({"eval": {"conv1": 0.5, "head": 0.9}})
    >>> axis.get_ylabel()
    'saturation'
    """
    layers = _layers_of(profiles)
    _check_text("statistic", statistic)
    check_names("tail", tail, "layers")
    bands, ceilings = {} if bands is None else bands, {} if ceilings is None else ceilings
    for argument, by_name in (("bands", bands), ("ceilings", ceilings)):
        if not isinstance(by_name, Mapping):
            raise TypeError(f"expected {argument} as a dict, got {by_name!r}")
    _check_numbers("a ceiling", ceilings)
    for stage, of_stage in bands.items():
        pairs = list(of_stage.values()) if isinstance(of_stage, Mapping) else [of_stage]
        if not all(isinstance(pair, Sized) and len(pair) == 2 for pair in pairs):
            raise TypeError(f"expected bands of {stage!r} as a dict of (low, high), got {of_stage!r}")
    given = ax is not None
    ax = _axis(ax, (max(6.0, _NAME_INCHES * len(layers) + 1.5), 3.4 + _longest(layers)))
    places = range(len(layers))
    for index, (stage, profile) in enumerate(profiles.items()):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.5}
        ax.plot(places, _in_order(profile, layers), label=literal(str(stage)), **look)
        if band := bands.get(stage):
            ends = [band.get(name, (math.nan, math.nan)) for name in layers]
            low, high = (_finite([float(end[side]) for end in ends]) for side in (0, 1))
            ax.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.vlines(places, low, high, color=colour, alpha=0.45, linewidth=2.5)
    if ceilings:
        steps = _in_order(ceilings, layers)
        ax.step(places, steps, where="mid", color="0.6", linewidth=0.9, label="ceiling", zorder=0)
    shaded = [layers.index(name) for name in tail if name in layers]
    if shaded:
        ax.axvspan(min(shaded) - 0.5, max(shaded) + 0.5, color="0.88", zorder=0, label="tail")
    ax.set_xlim(-0.6, len(layers) - 0.4)
    _name_layers(ax, layers, "x", room=not given)
    ax.set(xlabel="layers in forward order", ylabel=literal(statistic.replace("_", " ")))
    if statistic == "saturation":
        ax.set_ylim(0, 1.02)
    ax.grid(axis="y", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    return _titled(ax, title)


def plot_heatmap(
    profiles: Mapping[int, Mapping[str, float | Tensor]],
    *,
    statistic: str = "saturation",
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw one value per layer and epoch as colours: layers downwards in forward order, epochs to the right.

    Args:
        profiles: epoch -> layer name -> value; missing values and values that are not finite stay grey.
        statistic: name of the values; labels the colours, which for saturation run from 0 to 1.
        title: the title of the picture.
        ax: axes to draw on; if None a new figure, large enough for the names.

    Returns:
        The figure and the axis.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if there is no value to draw.
        ModuleNotFoundError: without matplotlib.

    >>> figure, axis = plot_heatmap({0: {"conv1": 0.5, "head": 0.9}, 1: {"conv1": 0.4, "head": 0.9}})
    >>> axis.get_images()[0].get_array().shape
    (2, 2)
    """
    layers = _layers_of(profiles)
    _check_text("statistic", statistic)
    epochs = list(profiles)
    width = min(max(3.5, 0.22 * len(epochs)), 14.0)
    given = ax is not None
    ax = _axis(ax, (width + 1.4 + _longest(layers), max(3.0, _NAME_INCHES * len(layers) + 1.3)))
    cells = np.stack([_in_order(profile, layers) for profile in profiles.values()], axis=1)
    limits: dict[str, Any] = {"vmin": 0.0, "vmax": 1.0} if statistic == "saturation" else {}
    ax.set_facecolor("0.8")
    image = ax.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest", **limits)
    ax.figure.colorbar(image, ax=ax, label=literal(statistic.replace("_", " ")), fraction=0.05)
    step = math.ceil(len(epochs) / 12)
    ax.set_xticks(range(0, len(epochs), step), [str(epoch) for epoch in epochs[::step]])
    _name_layers(ax, layers, "y", room=not given)
    ax.set(xlabel="epoch", ylabel="layers in forward order")
    return _titled(ax, title)


def plot_similarity(
    matrix: Tensor,
    layers: Sequence[str],
    other_layers: Sequence[str] | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw how alike layers are as colours: one network's layers downwards, the other's to the right.

    Args:
        matrix: values such as linear CKA, shape (L1, L2). Colours run from 0 to 1; values below 0, which occur
            by chance, have the colour of 0. Small matrices show their numbers.
        layers: names of the L1 rows.
        other_layers: names of the L2 columns; the names of the rows if None. The axes say which side is which.
        title: the title of the picture.
        ax: axes to draw on; if None a new figure, large enough for the names.

    Returns:
        The figure and the axis.

    Raises:
        ValueError: if there are no names, or not as many as rows and columns.
        ModuleNotFoundError: without matplotlib.

    >>> figure, axis = plot_similarity(torch.eye(2), ["conv1", "head"])
    >>> [text.get_text() for text in axis.texts]
    ['1.00', '0.00', '0.00', '1.00']
    """
    check_real("matrix", matrix)
    columns = layers if other_layers is None else other_layers
    check_names("layers", layers)
    check_names("other_layers", columns)
    if tuple(matrix.shape) != (len(layers), len(columns)) or 0 in matrix.shape:
        raise ValueError(
            f"expected a matrix of {len(layers)} x {len(columns)} named layers, got {tuple(matrix.shape)}"
        )
    values = matrix.detach().cpu().to(torch.float64).numpy()
    numbered = max(values.shape) <= 10
    cell = 0.42 if numbered else _NAME_INCHES + 0.01
    width, height = max(2.6, cell * len(columns)), max(2.6, cell * len(layers))
    given = ax is not None
    ax = _axis(ax, (width + 1.9 + _longest(layers), height + 0.9 + _longest(columns)))
    image = ax.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="linear CKA", fraction=0.046, pad=0.03)
    _name_layers(ax, layers, "y", room=not given)
    _name_layers(ax, columns, "x", room=not given)
    if other_layers is not None:
        ax.set(ylabel="layers", xlabel="other layers")
    if numbered:
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            text = f"{value if abs(value) >= 0.005 else 0.0:.2f}"  # a small negative one would be -0.00
            shade = "black" if value > 0.6 else "white"
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color=shade)
    return _titled(ax, title)


def plot_spectrum(
    eigenvalues: Tensor | Sequence[Tensor],
    *,
    threshold: float | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw the positive eigenvalues of one spectrum, or of several, on logarithmic axes.

    Args:
        eigenvalues: shape (D,), descending; or a sequence of such tensors.
        threshold: share of the variance in (0, 1]; a dashed line then stands at the intrinsic dimension, where
            the cumulative share crosses it.
        labels: the labels of the spectra, for the legend; ``step 0``, ``step 1``, ... if None.
        title: the title of the picture.
        ax: axes to draw on; a new figure if None.

    Returns:
        The figure and the axis.

    >>> figure, axis = plot_spectrum(torch.tensor([4.0, 2.0, 1.0, 0.0]), threshold=0.8)
    >>> axis.get_lines()[0].get_ydata().tolist()
    [4.0, 2.0, 1.0]
    >>> axis.get_lines()[1].get_xdata()
    [2, 2]
    """
    if threshold is not None:
        check_threshold(threshold)
    is_several = isinstance(eigenvalues, Iterable) and not isinstance(eigenvalues, (str, Tensor))
    spectra: list[Tensor] = list(eigenvalues) if is_several else [eigenvalues]  # type: ignore[list-item]
    if not spectra or not (is_several or isinstance(eigenvalues, Tensor)):
        raise TypeError(f"expected eigenvalues as a tensor, or a sequence of them, got {eigenvalues!r}")
    for values in spectra:
        check_real("eigenvalues", values)
        if values.ndim != 1:
            raise ValueError(f"expected eigenvalues of shape (D,), got shape {tuple(values.shape)}")
    if labels is not None:
        check_names("labels", labels)
    names = [f"step {step}" for step in range(len(spectra))] if labels is None else list(labels)
    if len(names) != len(spectra):
        raise ValueError(f"expected {len(spectra)} labels, got {len(names)}")
    ax = _axis(ax)
    for step, (values, label) in enumerate(zip(spectra, names, strict=True)):
        values = values.detach().cpu().to(torch.float64)
        positive = values[values > 0].numpy()
        colour = _COLOURS[step % len(_COLOURS)]
        if threshold is not None:
            dimension = int(intrinsic_dimension(values, threshold))
            share = f"{dimension} of {len(values)} explain {threshold:g}"
            label = share if labels is None and len(spectra) == 1 else f"{label}: {share}"
        index = np.arange(1, len(positive) + 1)
        ax.plot(index, positive, color=colour, marker=".", markersize=4, linewidth=1, label=literal(str(label)))
        if threshold is not None and dimension:
            ax.axvline(dimension, color=colour, linestyle="--", linewidth=1)
    if any((values > 0).any() for values in spectra):
        ax.set(xscale="log", yscale="log")
        last = max(int((values > 0).sum()) for values in spectra)
        if last <= 500:
            # Few decades: powers of ten alone would be too few labels, all numbers in between too many.
            from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

            ticks = [1, 2, 4, 8] if last <= 12 else [1, 2, 5, 10, 20, 50, 100, 200]
            ax.xaxis.set_major_locator(FixedLocator(ticks))
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="index", ylabel="eigenvalue")
    ax.grid(color="0.9")
    if len(spectra) > 1 or threshold is not None or labels is not None:
        ax.legend(framealpha=1, edgecolor="none", fontsize=9)  # above the dashed lines
    return _titled(ax, title)


def plot_covariance(covariance: Tensor, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw a covariance as an image, on a diverging scale about zero.

    Args:
        covariance: shape (D, D).
        ax: axes to draw on; a new figure if None.

    Returns:
        The figure and the axis.

    >>> figure, axis = plot_covariance(torch.eye(3))
    >>> axis.get_xlabel()
    'feature'
    """
    check_real("a covariance", covariance)
    if covariance.ndim != 2 or 0 in covariance.shape or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"expected a covariance of shape (D, D), got {tuple(covariance.shape)}")
    ax = _axis(ax, (5.0, 4.2))
    values = covariance.detach().cpu().numpy()
    limit = float(abs(values).max()) or 1.0
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="covariance")
    ax.set(xlabel="feature", ylabel="feature")
    return _titled(ax, None)


def plot_embedding(
    points: Tensor,
    *,
    labels: Sequence[int | str] | Tensor | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw observations in the plane of the first two leading eigenvectors.

    Args:
        points: shape (m, k); a single component is drawn as a line of points.
        labels: m labels that colour the points. Up to 14 different labels get a colour and a marker each, with
            a legend; more, which must be numbers, get a scale of colours.
        title: the title of the picture.
        ax: axes to draw on; a new figure if None.

    Returns:
        The figure and the axis.

    Raises:
        ValueError: if there are not as many labels as points.

    >>> figure, axis = plot_embedding(torch.randn(20, 2), labels=["cat", "dog"] * 10)
    >>> [text.get_text() for text in axis.get_legend().get_texts()]
    ['cat', 'dog']
    """
    check_real("points", points)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ValueError(f"expected points of shape (m, k) with k >= 1, got {tuple(points.shape)}")
    values = points.detach().cpu().numpy()
    classes = None if labels is None else np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if classes is not None and classes.shape != values.shape[:1]:
        given = f"shape {classes.shape}" if classes.ndim else repr(labels)
        raise ValueError(f"expected {values.shape[0]} labels, one for each point, got {given}")
    ax = _axis(ax, (5.4, 4.2))
    first, second = values[:, 0], values[:, 1] if values.shape[1] > 1 else values[:, 0] * 0
    if classes is None:
        ax.scatter(first, second, s=8, color=_COLOURS[0], alpha=0.7, linewidths=0)
    elif len(kinds := np.unique(classes)) <= 2 * len(_COLOURS):
        colours = _COLOURS if len(kinds) <= len(_COLOURS) else _MORE_COLOURS
        for index, kind in enumerate(kinds):
            marker = _MARKERS[index % len(_MARKERS)]
            where = classes == kind
            colour = colours[index % len(colours)]
            name = literal(str(kind))
            ax.scatter(first[where], second[where], s=12, color=colour, marker=marker, linewidths=0, label=name)
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        scatter = ax.scatter(first, second, s=8, c=classes.astype(float), cmap="viridis")
        ax.figure.colorbar(scatter, ax=ax, label="label")
    ax.set(xlabel="component 1", ylabel="component 2")
    return _titled(ax, title)


def plot_layers(
    values: Mapping[str, Tensor], draw: Callable[..., Any], *, title: str | None = None, **options: Any
) -> tuple[Figure, npt.NDArray[np.object_]]:
    """Draw one small picture per layer, row by row in forward order.

    Args:
        values: layer name -> argument of ``draw``.
        draw: one of the functions of this module, such as :func:`plot_spectrum`.
        title: the title of the whole figure.
        options: passed on to ``draw``.

    Returns:
        The figure and the axes, shape (rows, columns); axes that are left over are empty.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if there is no value to draw.
        ModuleNotFoundError: without matplotlib.

    >>> figure, axes = plot_layers({"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([3.0])}, plot_spectrum)
    >>> axes.shape
    (1, 2)
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"expected a dict of layers and what to draw of them, got {values!r}")
    if not callable(draw):
        raise TypeError(f"expected draw to be a function such as plot_spectrum, got {draw!r}")
    if title is not None:
        _check_text("title", title)
    if not values:
        raise ValueError("expected at least one value to draw, got none")
    columns = math.ceil(math.sqrt(len(values)))
    rows = math.ceil(len(values) / columns)
    figure = _new_figure((max(2.5 * columns, 0.09 * len(title or "")), 2.2 * rows + (0.4 if title else 0)))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    titles = shorten_names(values, _TITLE)
    for ax, (layer, value) in zip(axes.flat, values.items(), strict=False):
        ax.set_axis_on()
        draw(value, ax=ax, **options)
        ax.set_title(literal(titles[layer]), fontsize=_NAME_POINTS)
        ax.tick_params(labelsize=7, which="both")
        ax.xaxis.label.set_size(7)
        ax.yaxis.label.set_size(7)
        if legend := ax.get_legend():
            for text in legend.get_texts():
                text.set_fontsize(7)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, axes


def plot_history(
    series: Mapping[str, Sequence[tuple[float, float]]],
    quantity: Quantity = "rms",
    *,
    along: str = "forward",
    title: str | None = None,
    columns: int = 4,
    ax: Axes | None = None,
) -> tuple[Figure, npt.NDArray[Any]]:
    """Draw a quantity over the forwards of a training, a small picture for each layer.

    All share the horizontal axis. For scales, rms and max_abs, each picture has its own vertical axis, since
    their change matters; for shares and counts, all pictures share one.

    Args:
        series: layer name -> pairs of a forward or step and a value.
        quantity: name of the values.
        along: unit of the horizontal axis; labels it.
        title: the title of the picture.
        columns: the most pictures in a row.
        ax: axis to draw a single layer on; a new figure if None.

    Returns:
        The figure and an array of axes, of shape (rows, columns). Nothing is shown or saved.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if there is no value to draw, for another quantity or number of columns, or for an axis to
            draw several layers into.
        ModuleNotFoundError: without matplotlib.

    >>> figure, axes = plot_history({"fc1": [(0, 1.0), (1, 1.1)], "fc2": [(0, 2.0), (1, 9.0)]})
    >>> axes.shape, axes[0, 1].get_title(loc="left")
    ((1, 2), 'fc2')
    """
    if not isinstance(series, Mapping):
        raise TypeError(f"expected a dict of layers and pairs, got {series!r}")
    if not series or not any(map(len, series.values())):
        raise ValueError("expected at least one value to draw, got none")
    if quantity not in get_args(Quantity):
        raise ValueError(f"expected a quantity among {get_args(Quantity)}, got {quantity!r}")
    check_positive_integer("columns", columns)
    _check_text("along", along)
    if ax is not None and len(series) > 1:
        raise ValueError(f"expected one layer to draw into an axis, got {len(series)}")
    across = min(columns, len(series))
    down = math.ceil(len(series) / across)
    is_scale = quantity in ("rms", "max_abs")
    if ax is None:
        figure = _new_figure((2.4 * across + 0.6, 1.35 * down + 0.7))
        axes = figure.subplots(down, across, sharex=True, sharey=not is_scale, squeeze=False)
    else:
        figure, _ = _titled(_axis(ax), None)
        axes = np.array([[ax]])
    for ax in axes.flat[len(series) :]:
        ax.set_visible(False)
    for index, (ax, (name, pairs)) in enumerate(zip(axes.flat, series.items(), strict=False)):
        places, values = ([float(pair[side]) for pair in pairs] for side in (0, 1))
        shown = _finite(values)
        ax.plot(places, shown, color=_COLOURS[0], linewidth=1.1)
        lost = [place for place, value in zip(places, shown, strict=True) if math.isnan(value)]
        below = ax.get_xaxis_transform()
        ax.plot(lost, [0.04] * len(lost), "x", color=_COLOURS[5], transform=below, markersize=4)
        if is_scale and len(shown[shown > 0]) and np.nanmax(shown) > 20 * np.nanmin(shown[shown > 0]):
            ax.set_yscale("log")
        ax.set_title(literal(name), fontsize=_NAME_POINTS, loc="left")
        ax.tick_params(labelsize=7, labelbottom=index + across >= len(series))
        ax.grid(color="0.9", linewidth=0.6)
    words = literal(along), literal(quantity.replace("_", " "))
    if axes.size == 1:
        axes[0, 0].set(xlabel=words[0], ylabel=words[1])
    else:
        figure.supxlabel(words[0], fontsize=9)
        figure.supylabel(words[1], fontsize=9)
    if title:
        figure.suptitle(literal(title), fontsize=10)
    return figure, axes


def literal(text: str) -> str:
    r"""A text with escaped dollar signs: matplotlib would set text between dollar signs as mathematics.

    For titles; the names of layers, statistics and stages are taken literally by every function here.

    >>> print(literal("$loss_{x$"))
    \$loss_{x\$
    """
    _check_text("text", text)
    return text.replace("$", r"\$")


def _layers_of(profiles: Mapping[Any, Mapping[str, float | Tensor]]) -> list[str]:
    """The names of all layers; raises a TypeError or ValueError unless ``profiles`` hold numbers."""
    if not isinstance(profiles, Mapping) or not all(isinstance(each, Mapping) for each in profiles.values()):
        raise TypeError(f"expected a dict of dicts, each of layers and values, got {profiles!r}")
    for profile in profiles.values():
        _check_numbers("a value", profile)
    layers = list(dict.fromkeys(name for profile in profiles.values() for name in profile))
    if not layers:
        raise ValueError("expected at least one value to draw, got none")
    return layers


def _check_numbers(noun: str, values: Mapping[str, float | Tensor]) -> None:
    for name, value in values.items():
        if not (value.numel() == 1 if isinstance(value, Tensor) else hasattr(value, "__float__")):
            raise TypeError(f"expected {noun} that is a number, got {value!r} for {name!r}")


def _check_text(argument: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"expected {argument} to be a string, got {value!r}")


def _axis(ax: Axes | None, size: tuple[float, float] = (6.0, 4.2)) -> Axes:
    if ax is not None and not hasattr(ax, "get_window_extent"):
        raise TypeError(f"expected ax to be a matplotlib axis or None, got {ax!r}")
    return _new_figure(size).add_subplot() if ax is None else ax


def _new_figure(size: tuple[float, float]) -> Figure:
    with from_extra("plot", "plots need matplotlib"):
        from matplotlib.figure import Figure
    return Figure(figsize=size, layout="constrained")


def _titled(ax: Axes, title: str | None) -> tuple[Figure, Axes]:
    if title:
        ax.set_title(title, fontsize=10)
    return ax.figure, ax  # type: ignore[return-value]  # a SubFigure if ax lies in one


def _longest(names: Sequence[str]) -> float:
    """The width of the longest name, in inches."""
    return 0.065 * max(map(len, names))


def _name_layers(ax: Axes, names: Sequence[str], along: str, room: bool) -> None:
    """Write the names beside an axis: all of them if there is room, or else evenly spaced ones."""
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    inches = box.width if along == "x" else box.height
    step = 1 if room else math.ceil(0.85 * _NAME_INCHES * len(names) / inches)
    places, shown = range(0, len(names), step), [literal(name) for name in names[::step]]
    if along == "x":
        ax.set_xticks(places, shown, rotation=90, fontsize=_NAME_POINTS)
    else:
        ax.set_yticks(places, shown, fontsize=_NAME_POINTS)


def _in_order(values: Mapping[str, float | Tensor], layers: Sequence[str]) -> npt.NDArray[np.float64]:
    """The values of the layers; NaN where there is none, or no finite one."""
    return _finite([float(values.get(name, math.nan)) for name in layers])


def _finite(values: Any) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)
