"""Pictures of values; knows nothing of models and probes. Needs matplotlib: ``spectralmetrics[plot]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "spectralmetrics[plot]"') from error

    layers = list(dict.fromkeys(name for profile in profiles.values() for name in profile))
    if not layers:
        raise ValueError("expected at least one value to draw, got none")
    if ax is None:
        figure = Figure(figsize=(max(6.0, 0.24 * len(layers) + 1.5), 4.2), layout="constrained")
        ax = figure.add_subplot()
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
    return ax.figure, ax  # type: ignore[return-value]  # a SubFigure if ax lies in one
