import collections
import math

import numpy as np
import pytest
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe, Recorder
from spectralmetrics.cli import main
from spectralmetrics.probing.facts import facts_of
from spectralmetrics.probing.summary import Summary, SummaryRow
from spectralmetrics.recording import summarise_run
from tests.sums.toy import CrestFactorMetric

LAYERS = {
    "linear": (nn.Linear(5, 9), 5),
    "narrow": (nn.Linear(9, 5, bias=False), 5),
    "pointwise": (nn.Conv2d(4, 7, 1), 4),
    "conv": (nn.Conv1d(2, 9, 3), 6),
    "grouped": (nn.Conv2d(4, 12, 1, groups=2), 4),
    "depthwise": (nn.Conv2d(3, 6, 2, groups=3), 6),
    "transposed": (nn.ConvTranspose2d(2, 9, 2, stride=2), 8),
}


def outputs(layer):
    """Rows of many outputs for random inputs, (N, D)."""
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    rank = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    out = layer(torch.randn(400, width, *[4] * rank, dtype=torch.float64))
    return out if rank == 0 else out.movedim(1, -1).reshape(-1, out.shape[1])


@pytest.mark.parametrize("name", LAYERS)
def test_the_ceiling_is_the_rank_that_outputs_have(name):
    layer, ceiling = LAYERS[name]
    assert facts_of(layer) == (type(layer).__name__, ceiling)
    rows = outputs(layer.double()).detach().numpy()
    assert np.linalg.matrix_rank(np.cov(rows.T), tol=1e-10) == ceiling


@pytest.mark.parametrize("module", [nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.ReLU()])
def test_no_ceiling_where_none_is_known(module):
    assert facts_of(module).ceiling is None
    assert facts_of(nn.Linear(2, 9), is_linear=False).ceiling is None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.wide = nn.Linear(6, 40)
        self.idle = nn.Linear(40, 30)
        self.head = nn.Linear(30, 4)
        with torch.no_grad():
            self.idle.weight[2:].zero_()  # two features of this layer vary

    def forward(self, x):
        return self.head(self.idle(self.wide(self.conv(x).mean((2, 3)))))


def probed(batches=12, size=20, **options):
    torch.manual_seed(0)
    model = Net().eval()
    probe = LayerProbe(model, [sm.SaturationMetric(), sm.EffectiveRankMetric()], **options)
    for _ in range(batches):
        model(torch.randn(size, 1, 6, 6))
    return model, probe


def test_rows():
    _, probe = probed(folds=4)
    rows = {row.layer: row for row in probe.summary().rows}
    assert list(rows) == ["conv", "wide", "idle", "head"]
    values = probe.compute("eval")
    ends = probe.intervals("eval")
    for name, row in rows.items():
        assert row.saturation == values[f"saturation/eval/{name}"]
        assert row.value == round(row.saturation * row.width)
        interval = ends[f"saturation/eval/{name}"]
        assert (row.low / row.width, row.high / row.width) == pytest.approx(tuple(map(float, interval)))
        assert row.sufficient_width == row.high
    assert (rows["wide"].kind, rows["wide"].width, rows["wide"].ceiling) == ("Linear", 40, 6)
    assert (rows["conv"].observations, rows["wide"].observations) == (12 * 20 * 16, 240)
    assert rows["wide"].stands_out == ("in the tail",)
    full = {name for name, row in rows.items() if "at its ceiling" in row.stands_out}
    assert full == {name for name, row in rows.items() if row.value >= 0.95 * row.ceiling} == {"conv"}
    assert "28 dead features" in rows["idle"].stands_out
    assert "in the tail" not in rows["conv"].stands_out


def test_few_observations_and_rows_left_out():
    model, probe = probed(batches=2, size=8)
    bad = torch.randn(2, 1, 6, 6)
    bad[0, 0, 0, 0] = torch.nan
    model(bad)
    with pytest.warns(UserWarning, match="left out in eval"):
        probe.compute("eval")
    rows = {row.layer: row for row in probe.summary().rows}
    assert np.isnan(rows["wide"].low)
    assert "few observations" in rows["wide"].stands_out
    assert "1 row with NaN or infinities left out" in rows["wide"].stands_out
    assert rows["wide"].sufficient_width == rows["wide"].value


@pytest.mark.parametrize(("dead", "words"), [(1, "1 dead feature"), (2, "2 dead features")])
def test_dead_features_are_counted(dead, words):
    model = nn.Sequential(nn.Linear(4, 6)).eval()
    model[0].weight.data[:dead] = 0
    probe = LayerProbe(model)
    assert words not in str(model(torch.randn(1, 4)))
    assert probe.summary().rows[0].stands_out == ("few observations",)  # one observation shows no dead features
    model(torch.randn(99, 4))
    assert words in probe.summary().rows[0].stands_out


@pytest.mark.parametrize("kind", [sm.IntrinsicDimensionMetric, sm.SaturationMetric])
def test_about_zero_both_columns_and_the_title_are(kind):
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + 100
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    for center, dimension, words in (
        (True, 4, ", dimension at 99 % of the variance"),
        (False, 1, ", dimension about zero at 99 % of the second moment"),
    ):
        with LayerProbe(model, kind(center=center)) as probe:
            model(rows)
            summary = probe.summary("train", kind.short_name)
        assert summary.rows[0].saturation == dimension / 4
        assert summary.title.endswith(words)


def test_without_a_threshold_of_its_own_it_is_99_per_cent():
    model = nn.Sequential(nn.Identity()).eval()
    probe = LayerProbe(model, sm.EffectiveRankMetric(), layers="0")
    rows = torch.diag(torch.tensor([100.0, 10.0, 5.0, 1.0]))  # 0.9876, 0.9975, … of the variance
    model(torch.cat([rows, -rows]))
    summary = probe.summary(statistic="effective_rank")
    assert summary.title == "eval, dimension at 99 % of the variance"
    assert summary.rows[0].saturation == 0.5


def test_an_interval_that_is_wide_stands_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity()).eval()
    scales = torch.arange(1, 101.0) ** -0.5
    probe = LayerProbe(model, layers="0", folds=4)
    for _ in range(16):
        model(torch.randn(60, 100) * scales)
    row = probe.summary().rows[0]
    assert row.observations > 10 * row.value
    assert row.high - row.low <= 10
    assert row.stands_out == ()
    probe.reset()
    for _ in range(8):
        model(torch.randn(20, 100) * scales)
    row = probe.summary().rows[0]
    assert row.high - row.low > 10
    assert row.stands_out == ("few observations",)


def test_any_statistic_that_is_one_number():
    _, probe = probed(folds=2)
    summary = probe.summary(statistic="effective_rank")
    values = probe.compute("eval")
    assert [row.value for row in summary.rows] == [
        values[f"effective_rank/eval/{row.layer}"] for row in summary.rows
    ]
    assert "effective rank" in str(summary)
    assert probe.summary(statistic="participation_ratio").rows[0].value > 1  # not among the probe's metrics
    for wrong, message in (("spectrum", "one number, got 'spectrum'"), ("nothing", "got 'nothing'")):
        with pytest.raises(ValueError, match=message):
            probe.summary(statistic=wrong)
    with pytest.raises(ValueError, match="'test'"):
        probe.summary("test")
    with pytest.raises(RuntimeError, match="nothing was observed in train"):
        probe.summary("train")


class MeanCrestFactorMetric(CrestFactorMetric):
    short_name = "mean_crest_factor"

    def statistic(self, spectrum):
        return super().statistic(spectrum).mean()


def test_a_statistic_of_more_than_the_moments():
    model = nn.Sequential(nn.Linear(4, 5)).eval()
    probe = LayerProbe(model, MeanCrestFactorMetric())
    model(torch.randn(300, 4))
    (row,) = probe.summary(statistic="mean_crest_factor").rows
    assert row.value == probe.compute()["mean_crest_factor/eval/0"]


def test_it_fits_100_columns_and_keeps_names_whole():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.ModuleDict({"a_rather_long_name_of_a_block_in_a_network": nn.Linear(3, 200)})
            self.outer_module_with_a_long_name_too = inner

        def forward(self, x):
            return self.outer_module_with_a_long_name_too["a_rather_long_name_of_a_block_in_a_network"](x)

    model = Deep().eval()
    probe = LayerProbe(model, folds=2)
    for _ in range(4):
        model(torch.randn(3, 3) * 1e-3)
    text = str(probe.summary())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert probe.layers[0] in "".join(
        line[: line.find("  ") if line.find("  ") > 0 else None] for line in lines
    )


def test_a_name_is_broken_only_where_there_is_no_room():
    name = "a_layer_of_28_letters_in_all"
    model = nn.Sequential(collections.OrderedDict({name: nn.Linear(3, 200)})).eval()
    probe = LayerProbe(model)
    model(torch.randn(300, 3))
    line = str(probe.summary()).splitlines()[2]
    assert line.startswith(f"{name}  Linear    200        3  300  ")


def test_a_sketch_that_is_too_small_says_how_many_directions_there_are_at_least():
    model = nn.Sequential(nn.Identity()).eval()
    probe = LayerProbe(model, layers="0", max_features=4, sketch_size=3)
    model(torch.cat([torch.eye(8), -torch.eye(8)]).repeat(10, 1))
    row = probe.summary().rows[0]
    assert np.isnan(row.saturation)
    low = int(probe.intervals()["saturation/eval/0"].low * 8)
    assert row.stands_out[0] == f"more than {low - 1} directions: larger sketch"


def test_columns_are_in_line():
    layers = {"a": nn.Conv1d(3, 4, 1), "a_name_that_is_longer": nn.Conv1d(4, 2, 1)}
    model = nn.Sequential(collections.OrderedDict(layers)).eval()
    probe = LayerProbe(model)
    model(torch.randn(30, 3, 5))
    _, head, *lines = str(probe.summary()).splitlines()
    place = head.index("type")
    assert [line[place - 2 : place + 6] for line in lines] == ["  Conv1d", "  Conv1d"]


def test_names_are_text_in_html():
    model = nn.ModuleDict({"<b>&": nn.Linear(3, 3)}).eval()
    probe = LayerProbe(model)
    model["<b>&"](torch.randn(40, 3))
    markup = probe.summary()._repr_html_()
    assert "<b>" not in markup
    assert "&lt;b&gt;&amp;" in markup


def test_a_data_frame():
    pandas = pytest.importorskip("pandas")
    _, probe = probed()
    frame = probe.summary().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["layer"]) == ["conv", "wide", "idle", "head"]
    words = "in the tail, 28 dead features, few directions: effective rank 2, few observations"
    assert frame["stands_out"][2] == words


def test_of_a_run(tmp_path, capsys):
    _, probe = probed(folds=4)
    expected = probe.summary().rows
    intervals = probe.intervals("eval")
    with Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
        recorder.record()
    assert summarise_run(tmp_path).rows == expected
    assert main(["summary", str(tmp_path), "--threshold", "0.9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("epoch 0, eval, dimension at 90 % of the variance\nlayer")
    assert main(["summary", str(tmp_path), "--stage", "train"]) == 2
    assert "got 'train'" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="'arrays'"):
        summarise_run(tmp_path / "arrays")
    with pytest.raises(ValueError, match="got 7"):
        summarise_run(tmp_path, epoch=7)
    # The table has the ends of the intervals, and the arrays give them at any threshold.
    recorded = {f"{row.statistic}/{row.stage}/{row.layer}": row for row in map_rows(tmp_path)}
    rebuilt = {f"{r['statistic']}/{r['stage']}/{r['layer']}": r for r in sm.recompute(tmp_path)}
    for key, interval in intervals.items():
        ends = tuple(map(float, interval))
        assert (recorded[key].low, recorded[key].high) == pytest.approx(ends, rel=1e-12)
        # The effective rank takes roots of eigenvalues, including those that are round-off of float32.
        tolerance = 1e-6 if key.startswith("effective_rank") else 1e-9
        assert (rebuilt[key]["low"], rebuilt[key]["high"]) == pytest.approx(ends, rel=tolerance)
    lower = {r["layer"]: r for r in sm.recompute(tmp_path, 0.5, ["saturation"])}
    assert lower["wide"]["high"] < rebuilt["saturation/eval/wide"]["low"]


def map_rows(directory):
    from spectralmetrics.recording.writers.csv import read_rows

    return read_rows(directory / "records.csv")


def test_compute_warns_of_fewer_observations_than_twice_the_dimension():
    model = nn.Sequential(nn.Identity(), nn.Linear(30, 2)).eval()
    probe = LayerProbe(model, layers="*")
    probe.pause()
    probe.resume()
    model(torch.randn(40, 30))
    with pytest.warns(UserWarning, match=r"in eval there are fewer observations.*'0' \(40\)") as seen:
        probe.compute()
    assert len(seen) == 1
    for _ in range(3):
        model(torch.randn(40, 30))
    probe.compute()


@pytest.mark.parametrize(
    ("folds", "advice"), [(1, r"ask for intervals with folds=8$"), (4, r"see intervals\(\)$")]
)
def test_who_has_intervals_is_sent_to_them(folds, advice):
    model = nn.Sequential(nn.Identity()).eval()
    probe = LayerProbe(model, layers="*", folds=folds)
    for _ in range(4):
        model(torch.randn(10, 30))
    with pytest.warns(UserWarning, match=advice):
        probe.compute()


@pytest.mark.parametrize(("rank", "words"), [(1, "collapsed: 1 of 64 directions"), (2, "few directions:")])
def test_an_output_layer_that_has_collapsed(rank, words):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 64)).eval()
    with LayerProbe(model) as probe:
        model(torch.randn(4000, 16))
        assert not any(each.startswith(words) for row in probe.summary().rows for each in row.stands_out)
        probe.reset()
        with torch.no_grad():  # weights of this rank
            model[2].weight.copy_(torch.randn(64, rank) @ torch.randn(rank, 16))
        model(torch.randn(4000, 16))
        summary = probe.summary()
    found = [any(each.startswith(words) for each in row.stands_out) for row in summary.rows]
    assert found == [False, False, True]
    above = [line for line in str(summary).splitlines() if line.startswith("problem:")]
    assert above == (["problem: 2: collapsed: 1 of 64 directions"] if rank == 1 else [])


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (12, 11.0, 14.0, "12 (11-14)"),
        (12, 11.0, math.nan, "12 (11-?)"),
        (math.nan, 9.0, 100.0, "? (9-100)"),
        (math.nan, 0.25, 0.75, "? (0.250-0.750)"),
        (0.5, 0.25, 0.75, "0.500 (0.250-0.750)"),
        (0.5, math.nan, math.nan, "0.500"),
    ],
)
def test_ends_are_shown_like_their_value(value, low, high, shown):
    row = SummaryRow("fc", "Linear", 64, 32, 900, value, low, high, 0.2, 14, ())
    assert str(Summary([row], "eval", "rank")).splitlines()[-1].split("900")[1].startswith(f"  {shown}")
