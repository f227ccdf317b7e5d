"""Console, TensorBoard and pictures."""

import io

import matplotlib
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import spectralmetrics as sm
from spectralmetrics import (
    EigenspaceEmbeddingMetric,
    Recorder,
    SaturationMetric,
    SpectrumMetric,
    draw_run,
)
from spectralmetrics.recording import ConsoleWriter, Record, Row
from spectralmetrics.recording.writers.console import tables_of
from spectralmetrics.recording.writers.plot import draw_profile
from tests.recording.runs import make_model, make_probe, read_csv, run_epoch

matplotlib.use("Agg")


def record(directory, writers, epochs=2, layers=3, metrics=None):
    model = make_model(layers)
    with make_probe(model, metrics) as probe, Recorder(directory, probe, writers) as recorder:
        for epoch in range(epochs):
            run_epoch(model, epoch)
            recorder.add_scalar("accuracy", 0.875, stage="eval")
            recorder.record()


def test_tensorboard_curves(tmp_path):
    record(tmp_path, ["tensorboard", "csv"], epochs=3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    layers = ("0", "1", "2", "mean")
    expected = {
        f"{s}/{t}/{n}" for s in ("saturation", "intrinsic_dimension") for t in ("train", "eval") for n in layers
    }
    assert set(tags) == expected | {"accuracy/eval"}
    for tag in expected:
        statistic, stage, layer = tag.split("/")
        values = [
            (int(row["epoch"]), pytest.approx(float(row["value"])))
            for row in read_csv(tmp_path)
            if (row["statistic"], row["stage"], row["layer"]) == (statistic, stage, layer)
        ]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == values


def example_record(layers=3):
    rows = [Row(4, "train", f"layer{k}", "saturation", 0.5 + k / 100) for k in range(layers)]
    rows += [Row(4, "eval", "layer1", "saturation", 0.25), Row(4, "train", "mean", "saturation", 0.55)]
    return Record(4, {}, [*rows, Row(4, "", "", "loss", 0.123456)])


class TestConsole:
    def test_the_table(self, capsys):
        ConsoleWriter().write(example_record())
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].strip() == "Epoch 4, loss 0.1235"
        (line,) = [line for line in lines if "layer1" in line]
        assert line.replace("│", " ").split() == ["layer1", "0.510", "0.250"]
        (line,) = [line for line in lines if "mean" in line]
        assert line.replace("│", " ").split() == ["mean", "0.550"]

    def test_only_means_of_many_layers(self):
        assert tables_of(example_record(30), max_layers=10)[0].row_count == 1
        assert tables_of(example_record(30))[0].row_count == 31

    def test_only_scalars(self):
        (table,) = tables_of(Record(0, {}, [Row(0, "", "", "loss", 1.0)]))
        assert table.row_count == 0

    @pytest.mark.parametrize(
        ("width", "columns"),
        [(200, [17]), (150, [17]), (80, [10, 8]), (60, [7, 8, 4]), (12, [2] * 16), (1, [2] * 16)],
    )
    def test_columns_go_by_the_width_that_they_have(self, width, columns):
        rows = [Row(0, stage, "a", f"s{k}", 125) for stage in ("train", "eval") for k in range(8)]
        tables = tables_of(Record(0, {}, rows), width=width)
        assert [len(table.columns) for table in tables] == columns

    @pytest.mark.parametrize("width", range(36, 140, 7))
    def test_no_table_is_wider_than_the_screen_or_could_take_another_column(self, width):
        from rich.console import Console

        names = ["saturation", "effective_rank", "participation_ratio", "x", "power_law_exponent"]
        rows = [
            Row(0, stage, layer, name, value)
            for layer, value in (("0", 1.0), ("encoder.layer.11", 1.234e-30))
            for name in names
            for stage in ("train", "eval")
        ]
        console = Console(width=1000)
        tables = tables_of(Record(0, {}, rows), width=width)
        sizes = [console.measure(table).maximum for table in tables]
        for table, size in zip(tables, sizes, strict=True):
            assert size <= width or len(table.columns) == 2  # one statistic always fits
        assert sum(len(table.columns) - 1 for table in tables) == 10
        for index, (table, size) in enumerate(zip(tables[:-1], sizes[:-1], strict=True)):
            start = sum(len(each.columns) - 1 for each in tables[:index])
            shown = [row for k, row in enumerate(rows) if start <= k % 10 <= start + len(table.columns) - 1]
            (wider,) = tables_of(Record(0, {}, shown), width=10_000)
            assert len(wider.columns) == len(table.columns) + 1
            assert console.measure(wider).maximum > width >= size

    def test_four_columns_of_two_statistics_fit_eighty(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        rows = [
            Row(0, stage, f"layer{k}.conv1", statistic, 0.123456)
            for k in range(3)
            for statistic in ("saturation", "effective_rank")
            for stage in ("train", "eval")
        ]
        ConsoleWriter().write(Record(0, {}, rows))
        assert capsys.readouterr().out.count("Epoch 0") == 1

    @pytest.mark.parametrize("metric", [sm.RootMeanSquareMetric, sm.HistoryMetric])
    def test_without_a_spectrum_there_are_findings_and_no_summary(self, metric, tmp_path, capsys):
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        rows = torch.randn(300, 8)
        rows[0] = torch.nan
        probe = sm.LayerProbe(model, metric(nan_strategy="ignore"))
        with Recorder(tmp_path, probe, ["csv", "console", "plot", "report"]) as recorder:
            model(rows)
            recorder.record()
        printed = capsys.readouterr().out
        assert "problem: '0' in train: 1 row with NaN or infinities left out" in printed
        assert "dimension" not in printed
        assert (tmp_path / "report.html").exists() == (metric is sm.RootMeanSquareMetric)

    def test_names_are_no_markup(self, capsys):
        rows = [Row(0, "eval", "[/red]", "acc[top5]", 1.0), Row(0, "", "", "loss[bold]", 1.0)]
        ConsoleWriter().write(Record(0, {}, rows))
        out = capsys.readouterr().out
        assert "[/red]" in out
        assert "acc[top5]" in out
        assert "loss[bold]" in out

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
    def test_a_terminal_that_knows_few_characters(self, encoding, monkeypatch):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
        ConsoleWriter().write(example_record())
        assert "| layer1 |" in raw.getvalue().decode(encoding)

    def test_a_progress_bar_of_rich_stays_whole(self):
        from rich.console import Console
        from rich.progress import Progress

        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=100)
        with Progress(console=console, auto_refresh=False) as progress:
            progress.add_task("train", total=10)
            progress.refresh()
            ConsoleWriter().write(example_record())
            progress.refresh()
        # Printed text goes through the bar's console, which draws the bar again below it.
        text = screen.getvalue()
        assert text.index("train") < text.index("Epoch 4") < text.index("mean") < text.rindex("train")

    def test_a_progress_bar_stays_whole(self, capsys):
        bars = io.StringIO()
        with tqdm(total=10, file=bars, mininterval=0) as bar:
            for _ in range(10):
                ConsoleWriter().write(example_record())
                bar.update()
        # Every table begins on its own line, and the bar is drawn again after it.
        out = capsys.readouterr().out
        assert out.count("Epoch 4") == 10
        assert "it/s" not in out
        assert bars.getvalue().count("\r") >= 10


class TestPictures:
    @pytest.mark.parametrize("layers", [3, 12])
    def test_of_a_run(self, layers, tmp_path):
        record(tmp_path, ["csv", "arrays"], layers=layers)
        names = []
        written = draw_run(tmp_path, progress=names.append, dpi=40)
        assert [path.name for path in written] == [
            "saturation-epoch-000001.png",
            "saturation-train-epochs.png",
            "saturation-eval-epochs.png",
            "intrinsic_dimension-epoch-000001.png",
            "intrinsic_dimension-train-epochs.png",
            "intrinsic_dimension-eval-epochs.png",
            "spectrum-train-epoch-000001.png",
            "spectrum-eval-epoch-000001.png",
        ]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
        assert names[0] == "saturation-epoch-000001.png"
        assert len(names) == 8 + 2 * layers

    def test_what_is_chosen(self, tmp_path):
        record(tmp_path, ["csv"])
        written = draw_run(tmp_path, epoch=0, statistics=["saturation"], output=tmp_path / "here")
        assert written[0] == tmp_path / "here" / "saturation-epoch-000000.png"
        with pytest.raises(ValueError, match="0 to 1, got 2"):
            draw_run(tmp_path, epoch=2)
        with pytest.raises(ValueError, match="got 'spectrum'"):
            draw_run(tmp_path, statistics=["spectrum"])
        with pytest.raises(FileNotFoundError, match=r"records\.csv"):
            draw_run(tmp_path / "here")

    @pytest.mark.parametrize(
        ("writers", "statistics", "reason"),
        [
            (["csv"], None, "has no arrays of epoch 0"),
            (["csv", "arrays"], ["saturation"], "statistics leave them"),
        ],
    )
    def test_a_threshold_that_is_for_nothing_is_named(self, tmp_path, writers, statistics, reason):
        record(tmp_path, writers, epochs=1)
        with pytest.warns(UserWarning, match=f"threshold 0.9 is for spectra, which are not drawn: .*{reason}"):
            draw_run(tmp_path, threshold=0.9, statistics=statistics)

    def test_titles_and_tail(self):
        values = (1.0, 0.7, 0.4, 0.4, 0.9)
        rows = [
            Row(3, stage, f"layer{k}", "s", value)
            for stage in ("train", "eval")
            for k, value in enumerate(values)
        ]
        rows += [Row(3, "eval", "mean", "s", 0.5), Row(3, "eval", "", "accuracy", 0.875)]
        settings = {"s": {"metric": "saturation", "threshold": 0.95}}
        (axis,) = draw_profile([row for row in rows if row.layer != "layer2"], "s", settings).axes
        one_layer = [text.get_text() for text in axis.get_legend().get_texts()]
        assert one_layer == ["train", "eval"]
        (axis,) = draw_profile(rows, "s", settings).axes
        assert axis.get_title() == "S at 95 % of variance, epoch 3, eval accuracy 0.875"
        assert [text.get_text() for text in axis.get_xticklabels()] == [f"layer{k}" for k in range(5)]
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert labels == ["train", "eval", "tail"]

    def test_writer_draws_every_statistic(self, tmp_path):
        metrics = [SaturationMetric(), SpectrumMetric(), EigenspaceEmbeddingMetric()]
        record(tmp_path, ["plot"], epochs=1, metrics=metrics)
        assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
            "embedding-eval-epoch-000000.png",
            "embedding-train-epoch-000000.png",
            "saturation-epoch-000000.png",
            "spectrum-eval-epoch-000000.png",
            "spectrum-train-epoch-000000.png",
        ]

    @pytest.mark.parametrize("name", ["$loss_{x$", "$", "a$b$c", r"$\frac$", "$x^$ {"])
    def test_names_are_no_mathematics(self, name, tmp_path, monkeypatch):
        """matplotlib would read text between dollar signs as mathematics, or fail."""
        from spectralmetrics.recording import draw

        written = []
        monkeypatch.setattr(draw, "save_figure", lambda figure, path, dpi: written.append(figure))
        model = make_model()
        named = {"s": SaturationMetric(), f"{name}rank": SpectrumMetric()}
        with make_probe(model, named) as probe, Recorder(tmp_path, probe, ["csv", "plot"]) as recorder:
            run_epoch(model, 0)
            recorder.add_scalar(name, 0.5, stage="eval")
            recorder.add_scalar(f"{name}norm", 0.5, stage=f"{name}stage", layer="layer")
            recorder.record()
        draw_run(tmp_path)
        texts = set()
        for figure in written:
            figure.draw_without_rendering()
            for ax in figure.axes:
                texts |= {ax.get_title(), ax.get_ylabel()}
        shown = {text.replace(r"\$", "$") for text in texts}
        assert any(f"eval {name} 0.5" in text for text in shown)
        assert f"{name}norm".replace("_", " ") in shown


def test_what_is_not_drawn_is_said_where_drawing_was_asked_for(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 40))
    probe = sm.LayerProbe(model, SaturationMetric(), max_features=20, sketch_size=8)
    with Recorder(tmp_path, probe, ["csv", "arrays"]) as recorder:
        model(torch.randn(100, 4))
        recorder.record()
    with pytest.warns(UserWarning, match="left out the spectrum of '1' in train.*a sketch") as told:
        draw_run(tmp_path, statistics=["spectrum"], dpi=40)
    assert [each.filename for each in told] == [__file__]
