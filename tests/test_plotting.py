import itertools
import sys

import matplotlib
import pytest
import torch

from spectralmetrics.plotting import plot_profile

matplotlib.use("Agg")


def test_lines_names_and_tail():
    train = {"a": 0.5, "b": torch.tensor(0.25), "c": 0.1}
    figure, axis = plot_profile({"train": train, "eval": {"a": 0.4, "c": 0.2}}, tail=["b", "c"], title="Title")
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["train"].get_ydata().tolist() == [0.5, 0.25, 0.1]
    assert lines["eval"].get_xdata().tolist() == [0, 2]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["a", "b", "c"]
    assert axis.get_title() == "Title"
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {"train", "eval", "tail"}
    assert axis.figure is figure


def test_draws_into_an_axis_and_shows_nothing(monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("shown"))
    figure, axis = pyplot.subplots()
    assert plot_profile({"eval": {"a": 3.0}}, statistic="effective_rank", ax=axis) == (figure, axis)
    assert axis.get_ylabel() == "effective rank"
    pyplot.close(figure)


@pytest.mark.parametrize("count", [10, 100])
def test_names_do_not_overlap(count):
    figure, axis = plot_profile({"eval": {f"layer{k}.0.convolution": 0.5 for k in range(count)}})
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axis.get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="got none"):
        plot_profile({"eval": {}})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"spectralmetrics\[plot\]"):
        plot_profile({"eval": {"a": 1.0}})
