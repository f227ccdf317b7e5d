"""Pictures of values; knows nothing of models and probes. Needs matplotlib: ``spectralmetrics[plot]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange of the Okabe-Ito palette, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")


def plot_profile(
    profiles: Mapping[str, Mapping[str, float | Tensor]],
    *,
    statistic: str = "saturation",
    title: str | None = None,
    tail: Sequence[str] = (),
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw one value per layer, in forward order, one line for each stage.

    Args:
        profiles: stage -> layer name -> value. Layers are drawn in the order of the first profile.
        statistic: what the values are; labels the axis.
        title: of the picture.
        tail: layers to shade.
        ax: where to draw; a new figure, wide enough for the names, if None.

    Returns:
        The figure and the axis. Nothing is shown or saved.

    Raises:
        ValueError: if there is no value to draw.
        ModuleNotFoundError: without matplotlib.

    >>> figure, axis = plot_profile({"eval": {"conv1": 0.5, "head": 0.9}})
    >>> axis.get_ylabel()
    'saturation'
    """
    layers = list(dict.fromkeys(name for profile in profiles.values() for name in profile))
    if not layers:
        raise ValueError("expected at least one value to draw, got none")
    ax = _axis(ax, (max(6.0, 0.24 * len(layers) + 1.5), 4.2))
    for index, (stage, profile) in enumerate(profiles.items()):
        places = [place for place, name in enumerate(layers) if name in profile]
        ax.plot(
            places,
            [float(profile[layers[place]]) for place in places],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.5,
            label=stage,
        )
    shaded = [layers.index(name) for name in tail if name in layers]
    if shaded:
        ax.axvspan(min(shaded) - 0.5, max(shaded) + 0.5, color="0.85", zorder=0, label="tail")
    ax.set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.set_ylabel(statistic.replace("_", " "))
    if statistic == "saturation":
        ax.set_ylim(0, 1.02)
    ax.set_xlabel("layers in forward order")
    ax.grid(axis="y", color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    return _with_figure(ax)


def plot_spectrum(eigenvalues: Tensor | Sequence[Tensor], *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the positive eigenvalues of one spectrum, or of several, on logarithmic axes.

    Args:
        eigenvalues: shape (D,), descending; or a sequence of such, earliest first.
        ax: where to draw; a new figure if None.

    Returns:
        The figure and the axis.

    >>> figure, axis = plot_spectrum(torch.tensor([4.0, 2.0, 1.0, 0.0]))
    >>> axis.get_lines()[0].get_ydata().tolist()
    [4.0, 2.0, 1.0]
    """
    spectra = [eigenvalues] if isinstance(eigenvalues, Tensor) else list(eigenvalues)
    ax = _axis(ax)
    for step, values in enumerate(spectra):
        positive = values.detach().cpu()[values.detach().cpu() > 0].to(torch.float64).numpy()
        index = range(1, len(positive) + 1)
        colour = _COLOURS[step % len(_COLOURS)]
        ax.plot(index, positive, color=colour, marker=".", markersize=4, label=f"step {step}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("eigenvalue")
    ax.grid(color="0.9")
    if len(spectra) > 1:
        ax.legend(frameon=False, fontsize=9)
    return _with_figure(ax)


def plot_covariance(covariance: Tensor, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw a covariance as an image, on a diverging scale about zero.

    Args:
        covariance: shape (D, D).
        ax: where to draw; a new figure if None.

    Returns:
        The figure and the axis.

    >>> figure, axis = plot_covariance(torch.eye(3))
    >>> axis.get_xlabel()
    'feature'
    """
    ax = _axis(ax, (5.0, 4.2))
    values = covariance.detach().cpu().numpy()
    limit = float(abs(values).max()) or 1.0
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="covariance")
    ax.set_xlabel("feature")
    ax.set_ylabel("feature")
    return _with_figure(ax)


def plot_embedding(
    points: Tensor, *, labels: Sequence[int] | Tensor | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draw observations in the plane of the first two leading eigenvectors.

    Args:
        points: shape (m, k); of one component, a line of points is drawn.
        labels: shape (m,), to colour the points by.
        ax: where to draw; a new figure if None.

    Returns:
        The figure and the axis.

    >>> figure, axis = plot_embedding(torch.randn(20, 2))
    >>> len(axis.collections[0].get_offsets())
    20
    """
    ax = _axis(ax, (5.0, 4.2))
    values = points.detach().cpu().numpy()
    second = values[:, 1] if values.shape[1] > 1 else values[:, 0] * 0
    if labels is None:
        ax.scatter(values[:, 0], second, s=8, color=_COLOURS[0], alpha=0.7, linewidths=0)
    else:
        scatter = ax.scatter(values[:, 0], second, s=8, c=[int(label) for label in labels], cmap="viridis")
        ax.figure.colorbar(scatter, ax=ax, label="label")
    ax.set_xlabel("component 1")
    ax.set_ylabel("component 2")
    return _with_figure(ax)


def _axis(ax: Axes | None, size: tuple[float, float] = (6.0, 4.2)) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "spectralmetrics[plot]"') from error
    return Figure(figsize=size, layout="constrained").add_subplot()


def _with_figure(ax: Axes) -> tuple[Figure, Axes]:
    return ax.figure, ax  # type: ignore[return-value]  # a SubFigure if ax lies in one
