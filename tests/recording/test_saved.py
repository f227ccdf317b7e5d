"""The reader of runs: saved eigenvalues, sketched layers, damaged files, records at steps."""

import csv
import io
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from spectralmetrics import (
    EffectiveRankMetric,
    EigenspaceEmbeddingMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    PowerLawExponentMetric,
    Recorder,
    SaturationMetric,
    SpectrumMetric,
    compare,
    draw_run,
    layer_profile,
    read_records,
    recompute,
    write_report,
)
from spectralmetrics.cli import main
from spectralmetrics.recording import ArraysWriter, Row, Writer, summarise_run
from spectralmetrics.recording.record import RecordKey, tidy_rows, undefined_layers, warn_of_undefined
from spectralmetrics.recording.saved import SavedRun
from spectralmetrics.recording.writers.csv import format_rows, read_rows
from spectralmetrics.sums import decomposition
from tests.recording.runs import make_model, make_probe, read_csv, run_epoch


def record(directory, metrics=None, writers=("csv", "arrays"), epochs=1, model=None, **options):
    model = model or make_model()
    with make_probe(model, metrics, **options) as probe, Recorder(directory, probe, writers) as recorder:
        for epoch in range(epochs):
            run_epoch(model, epoch)
            recorder.record()


@pytest.fixture
def decompositions(monkeypatch):
    """Number of decomposed matrices, counting each matrix of a batch."""
    seen = []
    for name in ("eigh", "eigvalsh"):
        original = getattr(torch.linalg, name)

        def counted(matrix, *args, original=original, **kwargs):
            seen.append(matrix[..., 0, 0].numel())
            return original(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    return seen


class TestEigenvalues:
    def test_the_counter_counts(self, decompositions):
        decomposition.eigenvalues(torch.eye(3, dtype=torch.float64).repeat(4, 1, 1))
        assert sum(decompositions) == 4

    @pytest.mark.parametrize("folds", [None, 4])
    def test_a_record_decomposes_each_covariance_once(self, folds, tmp_path, decompositions, capsys):
        model = make_model()
        metrics = [SaturationMetric(), IntrinsicDimensionMetric(), EffectiveRankMetric(), SpectrumMetric()]
        writers = ["csv", "arrays", "console"]  # the console's summary reads them, too
        with make_probe(model, metrics, folds=folds) as probe, Recorder(tmp_path, probe, writers) as recorder:
            for _ in range(2):
                run_epoch(model, 0)
            recorder.record(reset=False)
            assert sum(decompositions) == 2 * 3 * (1 + (folds or 0))
            probe.summary()
            assert sum(decompositions) == 2 * 3 * (1 + (folds or 0))
        assert "dimension" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("metrics", "options"),
        [
            ([SaturationMetric(), EffectiveRankMetric(center=False)], {}),
            ([SaturationMetric(threshold=0.9), SpectrumMetric()], {"folds": 2}),
            ([SaturationMetric(threshold=0.9, rule="delve")], {"max_features": 4, "sketch_size": 3}),
        ],
        ids=["about zero", "folds", "sketch"],
    )
    def test_nothing_reads_a_run_by_decomposing_it(self, metrics, options, tmp_path, decompositions):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record(tmp_path, metrics, **options)
            decompositions.clear()
            rows = recompute(tmp_path, [0.5, 0.9], ["saturation"])
            rows += recompute(tmp_path)
            summarise_run(tmp_path, stage="train")
            write_report(tmp_path, tmp_path / "page.html")
        assert decompositions == []
        assert rows

    def test_what_is_saved_is_what_was_recorded(self, tmp_path):
        record(tmp_path, [SpectrumMetric()])
        arrays = np.load(tmp_path / "arrays" / "epoch-000000.npz")
        [row] = [
            row
            for row in recompute(tmp_path, statistics="spectrum")
            if (row["stage"], row["layer"]) == ("eval", "1")
        ]
        np.testing.assert_array_equal(arrays["eval/1/eigenvalues"], row["value"])
        expected = np.linalg.eigvalsh(arrays["eval/1/covariance"])[::-1]
        np.testing.assert_allclose(arrays["eval/1/eigenvalues"], expected, rtol=1e-10, atol=1e-12)

    def test_what_no_statistic_read_is_decomposed_by_the_reader(self, tmp_path):
        from spectralmetrics import CovarianceMetric

        record(tmp_path, [CovarianceMetric()])
        assert not any("eigen" in name for name in np.load(tmp_path / "arrays" / "epoch-000000.npz").files)
        assert {row["statistic"] for row in recompute(tmp_path, statistics="saturation")} == {"saturation"}


def sketched(directory, metrics, writers=("csv", "arrays")):
    """Record two layers, of which the second is sketched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 50)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = LayerProbe(model, metrics, max_features=20, sketch_size=8)
        with probe, Recorder(directory, probe, writers) as recorder:
            model(torch.randn(400, 6))
            recorder.record()


class TestSketched:
    def test_recompute_names_what_is_left_out(self, tmp_path):
        sketched(tmp_path, [SaturationMetric(), EffectiveRankMetric()])
        recorded = {(row["statistic"], row["layer"]): row["value"] for row in read_records(tmp_path)}
        with pytest.warns(UserWarning, match=r"left out 'effective_rank' of '1' in eval, epoch 0 \(") as told:
            rows = recompute(tmp_path)
        assert len(told) == 1
        assert {(row["statistic"], row["layer"]): row["value"] for row in rows} == recorded
        assert ("saturation", "1") in recorded
        assert ("effective_rank", "1") not in recorded

    def test_what_no_layer_has_is_an_error(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 50)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe = LayerProbe(model, SaturationMetric(), max_features=20, sketch_size=8)
            with probe, Recorder(tmp_path, probe, ["arrays"]) as recorder:
                model(torch.randn(400, 4))
                recorder.record()
        with pytest.raises(ValueError, match="cannot be read from a sketch"):
            recompute(tmp_path, statistics=["effective_rank"])

    def test_the_commands(self, tmp_path, capsys):
        sketched(tmp_path, [SaturationMetric(), EffectiveRankMetric()])
        for command, words in (
            (["recompute"], "left out 'effective_rank' of '1' in eval"),
            (["report"], "left out the spectrum of '1' in eval, epoch 0"),
            (["plot", "--dpi", "30"], "left out the spectrum of '1' in eval, epoch 0"),
            (["summary", "--statistic", "effective_rank"], "left out 'effective_rank' of '1'"),
        ):
            assert main([command[0], str(tmp_path), *command[1:]]) == 0, command
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1, (command, lines)
            assert words in lines[0]

    def test_the_summary_has_all_layers(self, tmp_path):
        sketched(tmp_path, [SaturationMetric(), EffectiveRankMetric()])
        with pytest.warns(UserWarning, match="left out 'effective_rank' of '1'"):
            rows = summarise_run(tmp_path, statistic="effective_rank").rows
        assert [row.layer for row in rows] == ["0", "1"]
        assert rows[0].value > 1
        assert np.isnan(rows[1].value)
        assert [row.layer for row in summarise_run(tmp_path).rows] == ["0", "1"]

    @pytest.mark.parametrize("metrics", [[SaturationMetric(), SpectrumMetric()], [EffectiveRankMetric()]])
    def test_resuming_draws_what_there_is(self, metrics, tmp_path, caplog):
        sketched(tmp_path, metrics)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Recorder(tmp_path, None, ["csv", "arrays", "plot"], mode="resume").close()
        assert caplog.records == []
        name = metrics[0].short_name
        assert (tmp_path / "plots" / f"{name}-epoch-000000.png").exists()

    def test_the_page_moves_its_dimension(self, tmp_path):
        from spectralmetrics.recording.report.collect import collect

        sketched(tmp_path, [SaturationMetric()])
        with pytest.warns(UserWarning, match="left out the spectrum"):
            page = collect({"run": SavedRun(tmp_path)}, lambda name, total: None)
        [run] = page["runs"]
        for index in (0, 40, 70):
            [row] = [
                row
                for row in recompute(tmp_path, page["thresholds"][index], ["intrinsic_dimension"])
                if row["layer"] == "1"
            ]
            assert run["arrays"]["dimensions"][0][0, 1, index, 0] == row["value"]
        assert "sketched" in run["words"][run["stands_out"][0, 1, page["threshold"], 0]]


class TestNames:
    @pytest.mark.parametrize("name", ["a\rb", "a\r\nb", "\r", 'a"b', "a,b", "a\nb", " a ", "mean", "é\u2028"])
    def test_any_name_of_a_layer_is_read_again(self, name, tmp_path):
        model = nn.Sequential()
        model.add_module(name, nn.Linear(3, 3))
        metrics = {"s\rt": SaturationMetric()}
        with LayerProbe(model, metrics) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
            model(torch.randn(40, 3))
            recorder.add_scalar("lo\rss", 0.5, stage="st\rage")
            recorder.record()
        shown = "mean (layer)" if name == "mean" else name
        expected = [("train", shown, "s\rt"), ("train", "mean", "s\rt"), ("st\rage", "", "lo\rss")]
        assert [(row["stage"], row["layer"], row["statistic"]) for row in read_records(tmp_path)] == expected
        assert [row["layer"] for row in recompute(tmp_path, statistics="saturation")] == [shown, "mean"]

    @pytest.mark.parametrize("name", ["a\0b", "\ud800"])
    def test_what_no_file_can_hold_is_refused_before_it_is_written(self, name, tmp_path):
        model = nn.Sequential()
        model.add_module(name, nn.Linear(3, 3))
        probe = LayerProbe(model, SaturationMetric())
        with pytest.raises(ValueError, match="expected a layer's name without null characters"):
            Recorder(tmp_path / "run", probe)
        assert not (tmp_path / "run").exists()
        probe = LayerProbe(nn.Sequential(nn.Linear(3, 3)), {name: SaturationMetric()})
        with pytest.raises(ValueError, match="expected a metric's name without null characters"):
            Recorder(tmp_path / "run", probe)
        with Recorder(tmp_path / "run") as recorder:
            for arguments in ({"name": name}, {"name": "a", "stage": name}, {"name": "a", "layer": name}):
                with pytest.raises(ValueError, match="without null characters"):
                    recorder.add_scalar(value=1.0, **arguments)

    def test_a_layer_called_mean_keeps_its_value(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential()
        for name, width in (("enc", 12), ("mean", 3), ("mean (layer)", 6)):
            model.add_module(name, nn.LazyLinear(width))
        model(torch.randn(1, 12))
        with LayerProbe(model, SaturationMetric()) as probe, Recorder(tmp_path, probe) as recorder:
            model(torch.randn(200, 12))
            plain = probe.compute()
            found = recorder.record()
        assert found["saturation/train/mean (layer)"] == plain["saturation/train/mean"]
        assert found["saturation/train/mean (layer) (layer)"] == plain["saturation/train/mean (layer)"]
        assert found["saturation/train/mean"] == pytest.approx(torch.stack(list(plain.values())).mean().item())
        assert SavedRun(tmp_path).facts["mean (layer)"].kind == "Linear"
        assert list(layer_profile(plain, "saturation", "train")) == ["enc", "mean", "mean (layer)"]
        assert len(layer_profile(found, "saturation", "train")) == 3


class TestMeans:
    def test_over_what_is_defined(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
        metrics = [PowerLawExponentMetric(), SaturationMetric()]
        with LayerProbe(model, metrics) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
            model(torch.randn(200, 8))
            words = r"'power_law_exponent' is over 1 of 2 layers in eval, without '2', where it is undefined"
            with pytest.warns(UserWarning, match=words) as told:
                values = recorder.record(reset=False)
            assert len(told) == 1
            recorder.record()  # the second time without a warning
        assert values["power_law_exponent/eval/mean"] == values["power_law_exponent/eval/0"]
        assert values["saturation/eval/mean"] != values["saturation/eval/0"]
        rows = recompute(tmp_path)  # the warning came when recording
        with pytest.warns(UserWarning, match="the mean of 'own' is over 1 of 2 layers"):
            recompute(tmp_path, statistics={"own": PowerLawExponentMetric()})
        recorded = {tuple(row[name] for name in ("epoch", "layer", "statistic")): row["value"] for row in rows}
        assert recorded[0, "mean", "power_law_exponent"] == float(values["power_law_exponent/eval/mean"])

    def test_stages_are_apart(self):
        values = {("s", "train", layer): torch.tensor(0.5) for layer in "ab"}
        values |= {("s", "eval", layer): torch.tensor(torch.nan) for layer in "ab"}
        assert undefined_layers(tidy_rows(RecordKey(0), values)) == {}
        values["s", "train", "b"] = torch.tensor(torch.nan)
        assert undefined_layers(tidy_rows(RecordKey(0), values)) == {"s": {"train": ["b"]}}

    def test_nothing_is_said_where_nothing_is_defined(self):
        values = {("s", "eval", layer): torch.tensor(torch.nan) for layer in "ab"}
        rows = tidy_rows(RecordKey(0), values)
        assert np.isnan(rows[-1].value)
        assert undefined_layers(rows) == {}
        values["s", "eval", "a"] = torch.tensor(torch.inf)
        rows = tidy_rows(RecordKey(0), values)
        assert rows[-1].value == float("inf")
        assert undefined_layers(rows) == {"s": {"eval": ["b"]}}

    def test_layers_of_another_stage_do_not_count(self):
        values = {("s", "train", layer): torch.tensor(0.5) for layer in "abc"}
        values |= {("s", "eval", layer): torch.tensor(0.5 if layer == "b" else torch.nan) for layer in "ab"}
        with pytest.warns(UserWarning, match="is over 1 of 2 layers in eval, without 'a', where"):
            warn_of_undefined(tidy_rows(RecordKey(0), values))

    def test_records_are_apart(self):
        """In each epoch one of two layers is undefined, so each mean covers one layer."""
        rows = []
        for epoch, without in enumerate("ab"):
            values = {
                ("s", "eval", layer): torch.tensor(torch.nan if layer == without else 0.5) for layer in "ab"
            }
            rows += tidy_rows(RecordKey(epoch), values)
        with pytest.warns(UserWarning, match="is over 1 of 2 layers in eval, without 'a', where"):
            warn_of_undefined(rows)


def read_all(run):
    """Numbers from the arrays of a run, and warnings about layers that cannot be read."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = recompute(run)
    return {(row["stage"], row["layer"], row["statistic"]): row["value"] for row in rows}, [
        str(each.message) for each in told
    ]


class TestDamaged:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory):
        path = tmp_path_factory.mktemp("damaged") / "run"
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).eval()
        probe = LayerProbe(model, SaturationMetric(), folds=2)
        with probe, Recorder(path, probe, ["csv", "arrays"]) as recorder:
            for _ in range(2):
                model(torch.randn(40, 2))
            recorder.record()
        return path

    def test_any_byte_of_an_array_file(self, run, tmp_path):
        """The numbers are the same; or the layer is named, and others are unchanged; or the file is named."""
        file = run / "arrays" / "epoch-000000.npz"
        content, (whole, _) = file.read_bytes(), read_all(run)
        broken = tmp_path / "run"
        shutil.copytree(run, broken)
        target = broken / "arrays" / file.name
        random = np.random.default_rng(0)
        places = np.unique(
            np.r_[random.integers(0, len(content), 400), range(len(content) - 300, len(content))]
        )
        named = refused = 0
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= int(random.integers(1, 256))
            target.write_bytes(damaged)
            try:
                found, told = read_all(broken)
            except ValueError as error:
                assert file.name in str(error)  # noqa: PT017
                refused += 1
                continue
            if found != whole:
                lost = {layer for _, layer, _ in set(whole) - set(found)} - {"mean"}
                assert lost
                assert all(any(repr(layer) in each for each in told) for layer in lost), (place, lost, told)
                assert all(file.name in each for each in told)
                assert all(found[key] == whole[key] for key in found if key[1] != "mean"), place
                named += 1
        assert named > 100
        assert refused

    @pytest.mark.parametrize("length", [0, 1, 100, -1])
    def test_a_file_that_was_cut_off(self, length, run, tmp_path, capsys):
        broken = tmp_path / "run"
        shutil.copytree(run, broken)
        file = broken / "arrays" / "epoch-000000.npz"
        file.write_bytes(file.read_bytes()[:length])
        for command in ("recompute", "report", "summary", "plot"):
            assert main([command, str(broken)]) == 2, command
            assert file.name in capsys.readouterr().err
        with pytest.raises(ValueError, match="array file"):
            compare(broken, run)

    def test_one_damaged_layer_spoils_no_command(self, run, tmp_path, capsys):
        broken = tmp_path / "run"
        shutil.copytree(run, broken)
        file = broken / "arrays" / "epoch-000000.npz"
        content = bytearray(file.read_bytes())
        place = content.index(b"eval/1/covariance.npy") + 160
        content[place] ^= 1
        file.write_bytes(content)
        for command in (["recompute"], ["report"], ["summary"], ["plot", "--dpi", "20"]):
            assert main([command[0], str(broken), *command[1:]]) == 0, command
            [line] = capsys.readouterr().err.splitlines()
            assert "'1' in eval" in line
            assert file.name in line
        rows = {row["layer"]: row for row in compare(broken, run)}
        assert "on the left" in rows["1"]["note"]
        assert [rows[layer]["subspace_overlap"] for layer in "02"] == pytest.approx([1, 1])

    def test_any_byte_of_a_table(self, run, tmp_path):
        content = (run / "records.csv").read_bytes()
        target = tmp_path / "records.csv"
        random = np.random.default_rng(1)
        for place in range(len(content)):
            for new in {*random.integers(0, 256, 3).tolist(), *b'"\r\n,\0'}:
                damaged = bytearray(content)
                damaged[place] = new
                target.write_bytes(damaged)
                try:
                    rows = read_rows(target)
                except ValueError as error:
                    assert str(target) in str(error)  # noqa: PT017
                else:
                    assert all(isinstance(row, Row) for row in rows)


class TestSteps:
    def test_records_at_steps_hold_numbers(self, tmp_path):
        model = make_model()
        with make_probe(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays", "plot"]) as recorder:
            run_epoch(model, 0)
            recorder.record(step=100)
            run_epoch(model, 1)
            recorder.record(step=200)
            assert recorder.next_epoch == 0
            run_epoch(model, 2)
            recorder.record()
            assert recorder.next_epoch == 1
            run_epoch(model, 3)
            recorder.record(step=300)
        keys = [(0, 100), (0, 200), (0, None), (1, 300)]
        assert list(dict.fromkeys((row["epoch"], row["step"]) for row in read_records(tmp_path))) == keys
        assert list(read_csv(tmp_path)[0]) == [
            "epoch", "stage", "layer", "statistic", "value", "low", "high", "step",
        ]  # fmt: skip
        assert [path.name for path in (tmp_path / "arrays").iterdir()] == ["epoch-000000.npz"]
        assert {path.name.split("-")[1] for path in (tmp_path / "plots").iterdir()} == {"epoch"}
        rows = recompute(tmp_path)
        assert {(row["epoch"], row["step"]) for row in rows} == {(0, None)}
        recorded = [row for row in read_records(tmp_path) if row["step"] is None]
        assert [row["value"] for row in rows] == [row["value"] for row in recorded]

    def test_arrays_at_steps_if_asked_for(self, tmp_path):
        model = make_model()
        writers = ["csv", ArraysWriter(every_step=True)]
        with make_probe(model) as probe, Recorder(tmp_path, probe, writers) as recorder:
            for step in (5, 10):
                run_epoch(model, step)
                recorder.record(step=step)
            run_epoch(model, 3)
            recorder.record(step=15)
        assert sorted(path.name for path in (tmp_path / "arrays").iterdir()) == [
            f"epoch-000000-step-{step:09d}.npz" for step in (5, 10, 15)
        ]
        assert recompute(tmp_path) == read_records(tmp_path)
        title = summarise_run(tmp_path).title
        assert title.startswith("epoch 0, step 15, eval")
        assert {Row(**row).key for row in recompute(tmp_path)} == {RecordKey(0, step) for step in (5, 10, 15)}

    @pytest.mark.parametrize("every_step", [False, True])
    def test_resuming_at_a_step(self, every_step, tmp_path):
        model = make_model()

        def writers():
            return ["csv", ArraysWriter(every_step=every_step)]

        with make_probe(model) as probe, Recorder(tmp_path, probe, writers()) as recorder:
            run_epoch(model, 0)
            recorder.record()
            for step in (10, 20):
                run_epoch(model, step)
                recorder.record(step=step)
        before = (tmp_path / "records.csv").read_bytes()
        with make_probe(model) as probe, Recorder(tmp_path, probe, writers(), mode="resume") as recorder:
            assert (tmp_path / "records.csv").read_bytes() == before
            assert recorder.next_epoch == 1
            run_epoch(model, 3)
            for wrong in ({"step": 20}, {"step": 3}, {"epoch": 0}, {"epoch": 0, "step": 30}):
                with pytest.raises(ValueError, match=r"expected a(n epoch| step) above the last"):
                    recorder.record(**wrong)
            recorder.record()
        assert len(SavedRun(tmp_path).arrays) == (4 if every_step else 2)
        assert [str(key) for key in SavedRun(tmp_path).records] == [
            "epoch 0", "epoch 1, step 10", "epoch 1, step 20", "epoch 1",
        ]  # fmt: skip

    def test_a_run_of_steps_alone_is_resumed(self, tmp_path):
        for first in (1, 3):
            with Recorder(tmp_path, None, ["csv", "arrays"], mode="resume") as recorder:
                for step in (first, first + 1):
                    recorder.add_scalar("loss", 1 / step)
                    recorder.record(step=step)
        assert [row["step"] for row in read_records(tmp_path)] == [1, 2, 3, 4]

    def test_a_record_that_is_not_whole_is_taken_back(self, tmp_path):
        model = make_model()
        with make_probe(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
            run_epoch(model, 0)
            recorder.record(step=7)
            run_epoch(model, 1)
            recorder.record()
        whole = [row for row in read_records(tmp_path) if row["step"] == 7]
        (tmp_path / "arrays" / "epoch-000000.npz").rename(tmp_path / "arrays" / "epoch-000000.npz.lost")
        (tmp_path / "arrays" / "epoch-000000.npz.lost").unlink()
        manifest = tmp_path / "recording.json"  # as if killed before the manifest was written
        manifest.write_text(manifest.read_text().replace('"last_epoch": 0', '"last_epoch": [\n  0,\n  7\n ]'))
        with Recorder(tmp_path, None, ["csv", "arrays"], mode="resume") as recorder:
            assert recorder.next_epoch == 0
        assert read_records(tmp_path) == whole

    def test_a_killed_step_record_is_kept_if_the_table_has_it(self, tmp_path):
        model = make_model()
        with make_probe(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
            run_epoch(model, 0)
            recorder.record()
            earlier = (tmp_path / "recording.json").read_bytes()
            run_epoch(model, 1)
            recorder.record(step=9)
        before = read_records(tmp_path)
        (tmp_path / "recording.json").write_bytes(earlier)
        with Recorder(tmp_path, None, ["csv", "arrays"], mode="resume"):
            pass
        assert read_records(tmp_path) == before

    def test_an_epoch_means_its_last_record(self, tmp_path, capsys):
        model = make_model()
        with make_probe(model) as probe, Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
            for epoch in range(2):
                run_epoch(model, 0)
                recorder.record(epoch, step=10 * epoch + 1)
                run_epoch(model, 1 + epoch)
                recorder.record(epoch)
        rows = compare(tmp_path, epochs=(0, 1))
        recorded = {
            (row["epoch"], row["layer"]): row["value"]
            for row in read_records(tmp_path)
            if row["step"] is None and row["stage"] == "eval" and row["statistic"] == "saturation"
        }
        for row in rows:
            assert row["saturation_left"] == recorded[0, row["layer"]]
            assert row["saturation_right"] == recorded[1, row["layer"]]
        assert main(["summary", str(tmp_path), "--epoch", "0"]) == 0
        assert capsys.readouterr().out.startswith("epoch 0, eval")

    def test_pictures_and_the_page_go_by_steps_without_epochs(self, tmp_path):
        from spectralmetrics.recording.report.collect import collect

        model = make_model()
        with make_probe(model) as probe, Recorder(tmp_path, probe, ["csv"]) as recorder:
            for step in (50, 100, 400):
                run_epoch(model, step)
                recorder.record(step=step)
        page = collect({"run": SavedRun(tmp_path)}, lambda name, total: None)
        assert (page["unit"], page["runs"][0]["epochs"]) == ("step", [50, 100, 400])
        assert page["runs"][0]["statistics"]["saturation"]["is_recorded"].all()
        names = {path.name for path in draw_run(tmp_path, statistics=["saturation"], dpi=20)}
        assert names == {
            "saturation-epoch-000000.png", "saturation-train-epochs.png", "saturation-eval-epochs.png",
        }  # fmt: skip

    def test_a_writer_of_ones_own_gets_epochs_unless_it_takes_steps(self, tmp_path):
        class Plain(Writer):
            at_steps = False

            def __init__(self):
                self.seen = []

            def write(self, record):
                self.seen.append(str(record.key))

        class Stepwise(Plain):
            at_steps = True

        plain, stepwise = Plain(), Stepwise()
        with Recorder(tmp_path, None, [plain, stepwise]) as recorder:
            for arguments in ({"step": 1}, {}, {"step": 2}):
                recorder.add_scalar("loss", 0.5)
                recorder.record(**arguments)
        assert plain.seen == ["epoch 0"]
        assert stepwise.seen == ["epoch 0, step 1", "epoch 0", "epoch 1, step 2"]

    @pytest.mark.parametrize("columns", [5, 7])
    def test_earlier_tables_are_read_and_resumed(self, columns, tmp_path):
        names = ("epoch", "stage", "layer", "statistic", "value", "low", "high", "step")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([names[:columns], (0, "", "", "loss", 0.5, "", "")[:columns]])
        (tmp_path / "records.csv").write_text(text.getvalue())
        assert read_records(tmp_path)[0]["step"] is None
        with Recorder(tmp_path, None, ["csv"], mode="resume") as recorder:
            recorder.add_scalar("loss", 0.25)
            recorder.record(step=3)
        assert [(row["epoch"], row["step"], row["value"]) for row in read_records(tmp_path)] == [
            (0, None, 0.5),
            (1, 3, 0.25),
        ]


def test_a_table_with_carriage_returns_is_read_again(tmp_path):
    rows = [Row(0, "a\r", "\rb", "c\r\nd", 0.5, step=3), Row(1, "", "", "e\n", float("nan"))]
    (tmp_path / "records.csv").write_bytes(format_rows(rows))
    assert [str(row) for row in read_rows(tmp_path / "records.csv")] == [str(row) for row in rows]
    assert read_csv(tmp_path)[0]["layer"] == "\rb"


def test_embeddings_that_some_layers_lack_are_named(tmp_path):
    record(tmp_path, [SaturationMetric(), EigenspaceEmbeddingMetric(max_samples=8)])
    path = tmp_path / "arrays" / "epoch-000000.npz"
    arrays = {name: array for name, array in np.load(path).items() if not name.startswith("eval/1/sample")}
    np.savez(path, **arrays)
    with pytest.warns(UserWarning, match="left out 'embedding' of '1' in eval, epoch 0"):
        rows = recompute(tmp_path, statistics=["embedding"])
    assert {(row["stage"], row["layer"]) for row in rows} == {
        (stage, layer) for stage in ("train", "eval") for layer in "012"
    } - {("eval", "1")}
