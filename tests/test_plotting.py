import itertools
import math
import sys

import matplotlib
import pytest
import torch

from spectralmetrics.plotting import plot_embedding, plot_heatmap, plot_layers, plot_profile, plot_spectrum

matplotlib.use("Agg")


def test_lines_names_and_tail():
    train = {"a": 0.5, "b": torch.tensor(0.25), "c": 0.1}
    figure, axis = plot_profile({"train": train, "eval": {"a": 0.4, "c": 0.2}}, tail=["b", "c"], title="Title")
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["train"].get_ydata().tolist() == [0.5, 0.25, 0.1]
    eval_values = lines["eval"].get_ydata()
    assert (eval_values[0], eval_values[2]) == (0.4, 0.2)
    assert math.isnan(eval_values[1])  # a gap that no line crosses
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


@pytest.mark.parametrize("count", [10, 100])
def test_names_fit_a_given_axis(count):
    from matplotlib.figure import Figure

    names = [f"encoder.layer.{k}.attention.self.query" for k in range(count)]
    axis = Figure(figsize=(6, 4)).add_subplot()
    figure, _ = plot_profile({"eval": dict.fromkeys(names, 0.5)}, ax=axis)
    figure.canvas.draw()
    shown = [text.get_text() for text in axis.get_xticklabels()]
    assert shown[0] == names[0]
    assert len(shown) == (10 if count == 10 else 34)
    boxes = [text.get_window_extent() for text in axis.get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("count", [10, 100])
def test_long_names_leave_room_for_the_picture(count):
    names = [f"base_model.encoder.layer.{k}.attention.self.query.projection" for k in range(count)]
    figure, axis = plot_profile({"eval": dict.fromkeys(names, 0.5)})
    figure.canvas.draw()
    assert axis.get_window_extent().height / figure.dpi > 2
    figure, axis = plot_heatmap({epoch: dict.fromkeys(names, 0.5) for epoch in range(3)})
    figure.canvas.draw()
    assert axis.get_window_extent().width / figure.dpi > 2
    boxes = [text.get_window_extent() for text in axis.get_yticklabels()]
    assert [text.get_text() for text in axis.get_yticklabels()] == names
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))


def test_values_that_are_not_finite_leave_a_gap():
    _, axis = plot_profile({"eval": {"a": 1.0, "b": float("-inf"), "c": 2.0}}, statistic="log_determinant")
    assert [str(value) for value in axis.get_lines()[0].get_ydata()] == ["1.0", "nan", "2.0"]


def test_heatmap():
    profiles = {3: {"a": 0.25, "b": torch.tensor(0.5)}, 4: {"b": 0.75, "c": float("nan")}}
    figure, axis = plot_heatmap(profiles, title="Title")
    image = axis.get_images()[0]
    assert [[str(v) for v in row] for row in image.get_array().filled(float("nan")).tolist()] == [
        ["0.25", "nan"],
        ["0.5", "0.75"],
        ["nan", "nan"],
    ]
    assert image.get_clim() == (0.0, 1.0)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["3", "4"]
    assert axis.get_title() == "Title"
    assert axis.yaxis_inverted()  # the first layer is at the top
    assert plot_heatmap(profiles, statistic="effective_rank", ax=figure.add_subplot())[0] is figure
    with pytest.raises(ValueError, match="got none"):
        plot_heatmap({})


def test_heatmap_of_many_epochs_labels_some():
    _, axis = plot_heatmap({epoch: {"a": 0.5} for epoch in range(100)})
    assert [text.get_text() for text in axis.get_xticklabels()] == [str(k) for k in range(0, 100, 9)]


def test_spectrum_with_the_crossing():
    values = torch.tensor([5.0, 3.0, 1.5, 0.5, 0.0])
    _, axis = plot_spectrum(values, threshold=0.9)
    curve, line = axis.get_lines()
    frame = axis.get_legend().get_frame()
    assert frame.get_alpha() == 1  # the line ends at the words, not inside them
    assert axis.get_legend().get_zorder() > line.get_zorder()
    assert curve.get_ydata().tolist() == [5.0, 3.0, 1.5, 0.5]
    assert line.get_xdata() == [3, 3]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["3 of 5 explain 0.9"]
    _, axis = plot_spectrum([values, values[:2]], labels=["first", "second"])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["first", "second"]
    with pytest.raises(ValueError, match="expected 1 labels, got 2"):
        plot_spectrum(values, labels=["a", "b"])


def test_spectrum_of_constant_features():
    figure, axis = plot_spectrum(torch.zeros(4), threshold=0.9)
    figure.canvas.draw()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["0 of 4 explain 0.9"]


@pytest.mark.parametrize("kinds", [3, 10, 14])
def test_embedding_tells_labels_apart(kinds):
    points = torch.randn(3 * kinds, 2)
    labels = torch.arange(kinds).repeat(3)
    _, axis = plot_embedding(points, labels=labels)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [str(k) for k in range(kinds)]
    looks = set()
    for kind, marks in enumerate(axis.collections):
        assert torch.equal(torch.from_numpy(marks.get_offsets().data), points[labels == kind].double())
        looks.add((tuple(marks.get_facecolor()[0]), tuple(marks.get_paths()[0].vertices.flatten())))
    assert len(looks) == kinds


def test_embedding_of_many_labels_or_none_or_one_component():
    _, axis = plot_embedding(torch.randn(20, 2), labels=torch.linspace(0, 1, 20))
    assert axis.get_legend() is None
    _, axis = plot_embedding(torch.randn(5, 1))
    assert axis.collections[0].get_offsets()[:, 1].tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="expected 5 labels"):
        plot_embedding(torch.randn(5, 2), labels=[1, 2])


def test_a_picture_for_each_layer():
    spectra = {f"a.very.long.name.of.a.layer.number.{k}": torch.tensor([2.0, 1.0]) for k in range(5)}
    figure, axes = plot_layers(spectra, plot_spectrum, title="Title", threshold=0.5)
    assert axes.shape == (2, 3)
    assert figure.get_suptitle() == "Title"
    assert axes[0, 0].get_title() == "a.v.l.name.of.a.layer.number.0"
    assert len({axis.get_title() for axis in axes.flat[:5]}) == 5
    assert not axes[1, 2].has_data()
    with pytest.raises(ValueError, match="got none"):
        plot_layers({}, plot_spectrum)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="got none"):
        plot_profile({"eval": {}})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"spectralmetrics\[plot\]"):
        plot_profile({"eval": {"a": 1.0}})
