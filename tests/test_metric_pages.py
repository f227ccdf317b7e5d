"""The reference has a page for each metric, made from the classes, including metrics still to be written."""

import importlib.util
from pathlib import Path

import pytest
import torch

from spectralmetrics import SpectralMetric
from spectralmetrics.metrics import base

DOCS = Path(__file__).parents[1] / "docs"
_SPEC = importlib.util.spec_from_file_location("metric_pages", DOCS / "metric_pages.py")
metric_pages = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(metric_pages)


@pytest.fixture
def own_statistics(monkeypatch):
    """Three metrics that might join the package: a plain one, one with labels, one with unknown arguments."""
    monkeypatch.setattr(base, "_STATISTICS", base._STATISTICS.copy())

    class PlainMetric(SpectralMetric):
        """A plain one, :math:`\\lambda_1`."""

        short_name = "plain_example"
        __module__ = "spectralmetrics.metrics.example"

        def statistic(self, spectrum):
            """See the class."""
            return spectrum.eigenvalues[0]

    class LabelledMetric(SpectralMetric):
        """One that takes labels."""

        short_name = "labelled_example"
        __module__ = "spectralmetrics.metrics.example"

        def __init__(self, num_classes, num_features=None, **kwargs):
            super().__init__(num_features, **kwargs)
            self.num_classes = num_classes

        def update(self, rows, labels):
            """Add rows with their labels."""
            assert len(rows) == len(labels)
            super().update(rows)

        def statistic(self, spectrum):
            """See the class."""
            return spectrum.total_variance

    class UnknownMetric(PlainMetric):
        """A metric with an unknown argument, so that no picture can be drawn."""

        short_name = "unknown_example"
        __module__ = "spectralmetrics.metrics.example"

        def __init__(self, oracle, **kwargs):
            super().__init__(**kwargs)

    return PlainMetric, LabelledMetric, UnknownMetric


@pytest.mark.parametrize("name", metric_pages.documented())
def test_every_metric_has_a_formula_and_a_picture(name):
    metric = metric_pages.documented()[name]
    assert "math::" in metric.__doc__ or ":math:" in metric.__doc__
    code = metric_pages.drawing(metric)
    random = torch.get_rng_state()
    picture = metric_pages.draw(metric, code)
    torch.set_rng_state(random)
    assert picture.startswith("<?xml")
    assert "</svg>" in picture
    text = metric_pages.page(name, metric, code, picture)
    assert f"# {metric.__name__}\n" in text
    assert f"images/{name}.svg" in text


def test_a_new_statistic_has_a_page(own_statistics, tmp_path, monkeypatch):
    ours = {metric.short_name: metric for metric in own_statistics}
    monkeypatch.setattr(metric_pages, "documented", lambda: ours)
    drawn = []
    monkeypatch.setattr(metric_pages, "draw", lambda metric, code: drawn.append(metric) or "<svg/>")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "of_yesterday.md").touch()
    metric_pages.write_pages(tmp_path)
    assert {path.stem for path in (tmp_path / "metrics").glob("*.md")} == set(ours)
    table = (tmp_path / "metrics_table.md").read_text(encoding="utf-8")
    assert "[PlainMetric](metrics/plain_example.md) | `plain_example` | A plain one, $\\lambda_1$. |" in table
    assert [metric.__name__ for metric in drawn] == ["PlainMetric", "LabelledMetric"]
    unknown = (tmp_path / "metrics" / "unknown_example.md").read_text(encoding="utf-8")
    assert "image" not in unknown
    assert "autoclass" in unknown
    labelled = (tmp_path / "metrics" / "labelled_example.md").read_text(encoding="utf-8")
    assert ":members: update\n" in labelled  # its own methods, without those that read the base class


def test_registered_statistics_of_the_package_are_found(own_statistics):
    assert {metric.short_name for metric in own_statistics} <= set(metric_pages.documented())


def test_labels_are_given_where_they_are_asked_for(own_statistics):
    _, labelled, _ = own_statistics
    code = metric_pages.drawing(labelled)
    assert "LabelledMetric(num_classes=3)" in code
    assert ", labels)" in code


def test_what_cannot_be_drawn_has_no_picture(own_statistics):
    plain, *_ = own_statistics
    assert metric_pages.draw(plain, "raise ValueError") is None


def test_every_function_has_a_page_and_a_row(tmp_path):
    metric_pages.write_function_pages(tmp_path)
    names = metric_pages.functional.__all__
    assert {path.stem for path in (tmp_path / "functional").glob("*.md")} == set(names)
    table = (tmp_path / "functional_table.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| [")]
    assert len(rows) == len(names)
    assert {row.count("|") for row in rows} == {3}  # no formula divides a row
    assert "## Others" not in table
    saturation = (tmp_path / "functional" / "saturation.md").read_text(encoding="utf-8")
    assert "{class}`spectralmetrics.metrics.SaturationMetric`" in saturation


def test_a_page_leads_to_what_uses_its_metric():
    examples, guides = metric_pages.used_in("EffectiveRankMetric")
    assert "[](../../gallery/plot_metrics_by_hand)" in examples
    assert "[](../../guide/collapse.md)" in guides
    assert metric_pages.used_in("NoSuchMetric") == []
