"""Changes between runs and epochs, against the definitions applied by hand."""

import io
import itertools
import math
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import spectralmetrics as sm
from spectralmetrics.cli import main
from spectralmetrics.findings import Finding
from spectralmetrics.monitoring import Alarm
from spectralmetrics.recording import describe_comparison
from spectralmetrics.recording.compare_text import _changes
from spectralmetrics.recording.manifest import write_alarms
from tests.recording.runs import make_model, make_probe, read_csv, run_epoch


def record(directory, epochs=2, writers=("csv", "arrays"), model=None, accuracy=None, metrics=None):
    model = make_model() if model is None else model
    with make_probe(model, metrics) as probe, sm.Recorder(directory, probe, writers) as recorder:
        for epoch in range(epochs):
            run_epoch(model, epoch)
            if accuracy is not None:
                recorder.add_scalar("accuracy", accuracy + epoch / 100, stage="eval")
            recorder.record(epoch)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("run") / "first", epochs=3, accuracy=0.5)


def by_hand(directory, epoch, stage, layer):
    with np.load(directory / "arrays" / f"epoch-{epoch:06d}.npz") as arrays:
        return arrays[f"{stage}/{layer}/mean"], arrays[f"{stage}/{layer}/covariance"]


class TestReadRecords:
    def test_rows_are_those_of_the_table(self, run):
        rows, table = sm.read_records(run), read_csv(run)
        written = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
        assert written == table
        assert {type(row["epoch"]) for row in rows} == {int}
        assert {row["statistic"] for row in rows if row["layer"] == ""} == {"accuracy"}

    def test_refuses(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"records.csv, got .*nowhere"):
            sm.read_records(tmp_path / "nowhere")
        (tmp_path / "records.csv").write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="got 'a,b'"):
            sm.read_records(str(tmp_path))


@pytest.mark.parametrize("stage", ["train", "eval"])
@pytest.mark.parametrize("threshold", [0.99, 0.8])
def test_two_epochs_of_one_run_by_hand(run, stage, threshold):
    rows = sm.compare(run, epochs=(0, 2), stage=stage, threshold=threshold)
    assert [row["layer"] for row in rows] == ["0", "1", "2"]
    recorded = {
        (r["epoch"], r["layer"], r["statistic"]): r["value"]
        for r in sm.read_records(run)
        if r["stage"] == stage
    }
    for row in rows:
        for statistic in ("saturation", "intrinsic_dimension"):
            assert row[f"{statistic}_left"] == recorded[0, row["layer"], statistic]
            assert row[f"{statistic}_right"] == recorded[2, row["layer"], statistic]
        bases, means, covariances = [], [], []
        for epoch in (0, 2):
            mean, covariance = by_hand(run, epoch, stage, row["layer"])
            values, vectors = np.linalg.eigh(covariance)
            values, vectors = values[::-1], vectors[:, ::-1]
            k = int(np.searchsorted(np.cumsum(values) / values.sum(), threshold)) + 1
            bases.append(vectors[:, :k])
            means.append(mean)
            covariances.append(covariance)
        cosines = np.cos(scipy.linalg.subspace_angles(*bases))
        assert row["subspace_overlap"] == pytest.approx((cosines**2).mean(), rel=1e-9)
        assert row["overlap_by_chance"] == max(basis.shape[1] for basis in bases) / 6
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        total = np.trace(covariances[0]) + np.trace(covariances[1])
        distance = ((means[0] - means[1]) ** 2).sum() + total - 2 * np.trace(root)
        assert row["frechet_distance"] == pytest.approx(distance / total, rel=1e-6)
        assert row["note"] == ""


def test_an_epoch_is_equal_to_itself(run):
    for row in sm.compare(str(run), epochs=(1, 1)):
        assert row["frechet_distance"] == 0
        assert row["subspace_overlap"] == pytest.approx(1, abs=1e-12)


def test_two_runs_at_their_last_or_given_epochs(run, tmp_path):
    other = record(tmp_path / "other", epochs=2)
    last = sm.compare(run, other)
    assert last == sm.compare(run, other, epochs=(2, 1))
    assert last != sm.compare(run, other, epochs=(0, 1))
    # Weights and data are the same at the same epochs.
    assert all(row["frechet_distance"] == 0 for row in sm.compare(run, other, epochs=(1, 1)))


class Wider(nn.Sequential):
    """A model as of ``make_model``, with another second layer and one layer more."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2))


def test_layers_that_cannot_be_compared_say_so_and_the_others_are(run, tmp_path):
    other = record(tmp_path / "wider", model=Wider(), metrics=[sm.SaturationMetric(), sm.StableRankMetric()])
    rows = {row["layer"]: row for row in sm.compare(run, other)}
    assert list(rows) == ["0", "1", "2", "3"]
    assert rows["0"]["note"] == ""
    assert rows["0"]["subspace_overlap"] > 0
    assert rows["1"]["note"] == "widths 6 and 9"
    assert rows["3"]["note"] == "only on the right"
    assert rows["3"]["saturation_left"] is None
    assert rows["3"]["saturation_right"] > 0
    assert rows["0"]["intrinsic_dimension_right"] is None
    assert rows["0"]["stable_rank_left"] is None
    for layer in "13":
        assert rows[layer]["subspace_overlap"] is rows[layer]["frechet_distance"] is None
    assert {row["layer"]: row["note"] for row in sm.compare(other, run)}["3"] == "only on the left"


def test_constant_layers(run, tmp_path):
    model = make_model()
    nn.init.zeros_(model[1].weight)
    dead = record(tmp_path / "dead", model=model)
    rows = {row["layer"]: row for row in sm.compare(run, dead, epochs=(0, 0))}
    assert rows["1"]["note"] == "constant on the right"
    assert rows["1"]["frechet_distance"] > 0
    assert rows["1"]["subspace_overlap"] is None
    rows = {row["layer"]: row for row in sm.compare(dead, epochs=(0, 1))}
    assert rows["1"]["note"] == "constant on the left and the right"
    assert rows["1"]["frechet_distance"] is None


def test_arrays_alone_are_enough(run, tmp_path):
    bare = record(tmp_path / "bare", epochs=3, writers=("arrays",))
    without = [
        {k: pytest.approx(v) if isinstance(v, float) else v for k, v in r.items()}
        for r in sm.compare(run, bare)
    ]
    assert without == sm.compare(run, run.parent / "first", epochs=(2, 2))


def test_layers_of_which_only_marginals_were_kept(run, tmp_path, capsys):
    marginals = record(tmp_path / "marginals", metrics=[sm.RootMeanSquareMetric(), sm.MaxAbsMetric()])
    for other in (marginals, run):
        rows = sm.compare(marginals, other)
        assert all(row["note"] == "no covariance was kept" for row in rows)
        assert all(row["rms_left"] > 0 and row["frechet_distance"] is None for row in rows)
    assert main(["compare", str(marginals), "--epochs", "0", "1"]) == 0
    assert "No covariance was kept: 0, 1, 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "second run, or epochs="),
        ({"epochs": (0, 7)}, r"that has arrays, 0 to 2, got 7"),
        ({"epochs": (0, 1, 2)}, "two epochs"),
        ({"epochs": (0, 1), "stage": "test"}, r"among \['eval', 'train'\], got 'test'"),
        ({"epochs": (0, 1), "threshold": 1.5}, "got 1.5"),
    ],
)
def test_refuses(run, options, message):
    with pytest.raises(ValueError, match=message):
        sm.compare(run, **options)


def test_refuses_a_run_without_arrays(run, tmp_path):
    bare = record(tmp_path / "bare", writers=("csv",))
    with pytest.raises(FileNotFoundError, match=r"'arrays', got .*bare"):
        sm.compare(run, bare)


class LongNames(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 6))
        projections = nn.Sequential()
        projections.add_module("a_projection_with_quite_a_long_name", nn.Linear(6, 6))
        self.add_module("encoder_of_everything", projections)


class TestTheText:
    def test_answer_first(self, run):
        lines = describe_comparison(run, epochs=(0, 2)).splitlines()
        assert max(map(len, lines)) <= 100
        assert lines[0] == f"left   {run}, epoch 0"
        assert lines[1] == f"right  {run}, epoch 2"
        text = "\n".join(lines[:16])
        assert "eval accuracy             0.500 -> 0.520" in text
        rows = sm.compare(run, epochs=(0, 2))
        most = max(rows, key=lambda row: row["frechet_distance"])
        assert f"Changed most, by Fréchet distance: {most['layer']} {most['frechet_distance']:.3f}" in text
        least = min(rows, key=lambda row: row["subspace_overlap"])
        assert f"Least overlap: {least['layer']} {least['subspace_overlap']:.3f}" in text
        change = max(rows, key=lambda row: abs(row["saturation_right"] - row["saturation_left"]))
        assert f"Largest change of saturation: {change['layer']} {change['saturation_left']:.3f} -> " in text

    def test_the_table_has_the_rows(self, run):
        lines = describe_comparison(run, epochs=(0, 2)).splitlines()
        cells = {line.split()[0]: line.split()[1:] for line in lines if line[:2] in ("0 ", "1 ", "2 ")}
        for row in sm.compare(run, epochs=(0, 2)):
            expected = [f"{row[f'saturation_{side}']:.3f}" for side in ("left", "right")]
            expected += [str(row[f"intrinsic_dimension_{side}"]) for side in ("left", "right")]
            keys = ("subspace_overlap", "overlap_by_chance", "frechet_distance")
            assert cells[row["layer"]] == expected + [f"{row[key]:.3f}" for key in keys]

    def test_many_statistics_and_long_names_still_fit(self, tmp_path):
        metrics = [
            *(sm.SaturationMetric(), sm.EffectiveRankMetric(), sm.StableRankMetric()),
            *(sm.ParticipationRatioMetric(), sm.CovarianceTraceMetric(), sm.IntrinsicDimensionMetric()),
        ]
        long = record(tmp_path / "long", model=LongNames(), metrics=metrics)
        text = describe_comparison(long, epochs=(0, 1))
        assert max(map(len, text.splitlines())) <= 100
        assert "No room here for: " in text
        assert "…" not in text.partition("----")[2]
        lines = [line.split(" ")[0] for line in text.partition("----")[2].splitlines()]
        rest = "encoder_of_everything.a_projection_with_quite_a_long_name"
        assert "".join(line for line in lines if line and rest.count(line)).endswith(
            rest
        )  # broken between words

    def test_networks_without_corresponding_units_are_told_apart_from_epochs(self, tmp_path):
        runs = []
        for seed in range(2):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(6, 100), nn.Linear(100, 100))
            runs.append(record(tmp_path / str(seed), model=model))
        assert "units of the two networks do not" in describe_comparison(*runs)
        assert "units of the two networks do not" not in describe_comparison(runs[0], epochs=(0, 1))

    def test_what_is_missing_is_named_before_the_table(self, run, tmp_path):
        text = describe_comparison(run, record(tmp_path / "wider", model=Wider()))
        answer, _, table = text.partition("layer ")
        assert "Widths 6 and 9: 1\n" in answer
        assert "Only on the right: 3\n" in answer
        assert "widths 6 and 9" in table
        assert max(map(len, text.splitlines())) <= 100

    def test_equal_runs_and_what_did_not_change_take_one_line(self, run, tmp_path):
        answer = describe_comparison(run, epochs=(1, 1)).partition("\nlayer ")[0]
        assert "No difference: all layers have the same numbers and the same covariance." in answer
        assert not any(each in answer for each in ("Changed most", "Least overlap", "No change", "Largest"))
        rows = [
            {
                "layer": name,
                "a_left": 1,
                "a_right": 1,
                "b_c_left": 2,
                "b_c_right": 2,
                "d_left": 1,
                "d_right": right,
            }
            for name, right in (("0", 1), ("1", 3))
        ]
        assert _changes(rows) == ["Largest change of d: 1 1 -> 3", "No change of a, b c."]

    def test_a_number_that_is_undefined_on_both_sides_has_not_changed(self, tmp_path):
        pairs = {"a": (math.nan, math.nan), "b": (1.0, 1.5), "c": (1.0, math.nan), "d": (1.0, 4.0)}
        rows = [{"layer": each, "p_left": left, "p_right": right} for each, (left, right) in pairs.items()]
        for order in itertools.permutations(rows):
            assert _changes(order) == ["Largest change of p: c 1.000 -> ?, d 1.000 -> 4.000, b 1.000 -> 1.500"]
        assert _changes(rows[:1]) == ["No change of p."]
        model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1))  # one eigenvalue has no exponent
        run = record(tmp_path / "run", model=model, metrics=[sm.PowerLawExponentMetric()])
        assert "No difference: all layers have the same numbers" in describe_comparison(run, epochs=(1, 1))

    def test_eigenspaces_that_share_nothing_overlap_least(self, tmp_path):
        model = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)])
        with make_probe(model) as probe, sm.Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
            for unit in range(2):
                with torch.no_grad():
                    model[2].weight.copy_(torch.eye(6)[unit].outer(torch.ones(6)))
                run_epoch(model, unit)
                recorder.record(unit)
        overlap = {row["layer"]: row["subspace_overlap"] for row in sm.compare(tmp_path, epochs=(0, 1))}
        assert overlap["2"] == 0
        assert "Least overlap: 2 0.000" in describe_comparison(tmp_path, epochs=(0, 1))

    def test_statistics_of_other_settings_are_named(self, run, tmp_path):
        metrics = [sm.SaturationMetric(threshold=0.5, center=False), sm.IntrinsicDimensionMetric()]
        other = record(tmp_path / "other", metrics=metrics)
        words = "saturation was recorded with other settings: center True -> False, threshold 0.99 -> 0.5\n"
        assert words in describe_comparison(run, other)
        assert "other settings" not in describe_comparison(run, epochs=(0, 1))

    def test_a_single_layer_has_each_number_once(self, tmp_path):
        single = record(tmp_path / "single", model=nn.Sequential(nn.Linear(6, 4)), epochs=2)
        (row,) = sm.compare(single, epochs=(0, 1))
        text = describe_comparison(single, epochs=(0, 1))
        left, right = row["saturation_left"], row["saturation_right"]
        assert f"\n\nlayer 0\nsaturation           {left:.3f} -> {right:.3f}\n" in text
        assert f"Fréchet              {row['frechet_distance']:.3f}\n" in text
        assert text.count("saturation") == 1
        assert not any(each in text for each in ("mean", "Changed most", "Least overlap", "Largest", "\n\n\n"))


class TestCommandLine:
    def test_compare(self, run, capsys):
        assert main(["compare", str(run), "--epochs", "0", "2", "--stage", "train", "--threshold", "0.8"]) == 0
        expected = describe_comparison(run, epochs=(0, 2), stage="train", threshold=0.8)
        assert capsys.readouterr().out == f"{expected}\n"

    def test_compare_where_only_ascii_can_be_printed(self, run, capsys, monkeypatch):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
        assert main(["compare", str(run), "--epochs", "0", "2"]) == 0
        assert b"Fr?chet" in raw.getvalue()

    def test_plot_of_several_runs(self, run, tmp_path, capsys):
        other = record(tmp_path / "first", epochs=2)  # same folder name as the other
        output = tmp_path / "pictures"
        assert main(["plot", str(run), str(other), "--output", str(output), "--dpi", "40"]) == 0
        names = [f"{s}-{t}-runs.png" for t in ("train", "eval") for s in ("saturation", "intrinsic_dimension")]
        assert capsys.readouterr().out.splitlines() == [str(output / name) for name in names]
        assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in names)

    def test_the_lines_of_several_runs(self, run, tmp_path, monkeypatch):
        other = record(tmp_path / "first", epochs=2)
        drawn = []
        monkeypatch.setattr(
            "spectralmetrics.recording.draw.save_figure", lambda figure, path, dpi: drawn.append(figure)
        )
        main(["plot", str(run), str(other), "--statistics", "saturation"])
        lines = drawn[1].axes[0].get_lines()
        labels = [f"{run.parent.name}/first, epoch 2", f"{tmp_path.name}/first, epoch 1"]
        assert [line.get_label() for line in lines] == labels
        for line, directory, epoch in zip(lines, (run, other), (2, 1), strict=True):
            values = [
                row["value"]
                for row in sm.read_records(directory)
                if (row["epoch"], row["stage"], row["statistic"]) == (epoch, "eval", "saturation")
                and row["layer"] != "mean"
            ]
            assert line.get_ydata().tolist() == values

    def test_lines_of_other_thresholds_say_them(self, run, tmp_path, monkeypatch):
        metrics = [sm.SaturationMetric(threshold=0.5), sm.IntrinsicDimensionMetric()]
        other = record(tmp_path / "other", epochs=2, metrics=metrics)
        drawn = []
        monkeypatch.setattr(
            "spectralmetrics.recording.draw.save_figure", lambda figure, path, dpi: drawn.append(figure.axes[0])
        )
        main(["plot", str(run), str(other)])
        titles = {axis.get_title(): [line.get_label() for line in axis.get_lines()] for axis in drawn}
        assert titles["Saturation, eval"] == ["first, epoch 2, at 99 %", "other, epoch 1, at 50 %"]
        assert titles["Intrinsic dimension at 99 % of variance, eval"] == ["first, epoch 2", "other, epoch 1"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["compare", "RUN"], "second RUN, or two epochs of one: --epochs LEFT RIGHT"),
            (["compare", "RUN", "--epochs", "0", "7"], "got 7"),
            (["compare", "RUN", "no/such/run"], "got no/such/run"),
            (["plot", "RUN", "RUN"], "twice"),
            (["plot", "RUN", "no/such/run"], "got no/such/run"),
            (["plot", "RUN", "OTHER", "--epoch", "2"], "0 to 1, got 2"),
            (["plot", "RUN", "OTHER", "--statistics", "rank"], "got 'rank'"),
            (["plot", "RUN", "OTHER", "--threshold", "0.9"], "no --threshold with several runs"),
        ],
    )
    def test_bad_input_is_one_line(self, run, tmp_path, arguments, message, capsys):
        other = record(tmp_path / "other", epochs=2) if "OTHER" in arguments else None
        places = {"RUN": str(run), "OTHER": str(other)}
        assert main([places.get(each, each) for each in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_alarms_beyond_the_first_are_counted(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    finding = Finding("train", "0", "dead", "problem", "its outputs are dead", 1.0)
    for number, words in ((3, ""), (4, "and 1 more alarm of this run"), (6, "and 3 more alarms of this run")):
        write_alarms(tmp_path / "copy", [Alarm(step, finding, 0.0) for step in range(number)])
        lines = describe_comparison(tmp_path / "copy", epochs=(0, 2)).splitlines()
        assert sum(line.startswith("alarm of this run: step") for line in lines) == 3
        assert [line for line in lines if "more alarm" in line] == [words][: bool(words)]
