"""The report in a real browser."""

import itertools
import json
import math
import shutil
import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch import nn

from spectralmetrics import (
    CovarianceDeterminantMetric,
    EffectiveRankMetric,
    HistoryMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    PowerLawExponentMetric,
    Recorder,
    SaturationMetric,
    SpectralMetric,
    recompute,
    write_report,
)
from spectralmetrics.findings import tail_of
from spectralmetrics.recording import summarise_run
from spectralmetrics.recording.report.write import SCRIPTS, pack
from spectralmetrics.recording.saved import SavedRun
from tests.recording.browser import Visit, chromium
from tests.recording.runs import make_model, read_csv

pytestmark = pytest.mark.xdist_group("browser")

NAMES = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)<",
    "$x^2$ & &lt;b> %{x}",
    "<!--<script>",
    "line\u2028break<b>bold</b>",
    "\"quoted\\'",
]
THRESHOLDS = [0.5, 0.9, 0.99, 0.995, 1.0]


def record(directory, seed, epochs, writers, threshold=0.99):
    torch.manual_seed(seed)
    model = nn.Sequential()
    for name in NAMES:
        model.add_module(name, nn.Linear(12, 12))
    with torch.no_grad():
        model[3].weight[:, 2:] = 0
        model[4].weight[5] = 0  # a dead feature
    metrics = [
        SaturationMetric(threshold=threshold),
        IntrinsicDimensionMetric(threshold=threshold),
        CovarianceDeterminantMetric(log=True),
        PowerLawExponentMetric(first=11),
    ]
    with LayerProbe(model, metrics) as probe, Recorder(directory, probe, writers) as recorder:
        for epoch in range(epochs):
            for training in (True, False):
                model.train(training)
                rows = torch.randn(60, 12) * torch.logspace(0, -1 - epoch, 12)
                rows[0, 0] = float("nan")
                model(rows)
            recorder.add_scalar("loss<i>", [float("nan"), float("inf"), 0.5][epoch])
            recorder.add_scalar("accuracy", 0.1 * epoch, stage="eval")
            recorder.record()


def record_in_folds(directory, writers):
    """Layers of several types and ceilings; in the first epoch of train one fold is empty."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 20), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 2)
    )
    metrics = [SaturationMetric(), IntrinsicDimensionMetric(), EffectiveRankMetric()]
    with LayerProbe(model, metrics, folds=4) as probe, Recorder(directory, probe, writers) as recorder:
        for epoch in range(2):
            for training in (True, False):
                model.train(training)
                for _ in range(3 if training and epoch == 0 else 6):
                    model(torch.randn(6 + 200 * epoch, 24) * torch.logspace(0, -1 - epoch, 24))
            recorder.record()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with warnings.catch_warnings(record=True) as notes:  # pytest.warns takes only one statement
        warnings.simplefilter("always")
        record(folder / "first", 0, 3, ["csv", "arrays"])
        record(folder / "second", 1, 2, ["csv", "arrays"])
        record(folder / "plain", 2, 3, ["csv"], threshold=0.9)
    assert all("NaN" in str(note.message) for note in notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning of few observations is expected
        record_in_folds(folder / "folds", ["csv", "arrays"])
    shutil.copytree(folder / "folds", folder / "table", ignore=shutil.ignore_patterns("arrays"))
    shutil.copytree(folder / "first", folder / "earlier")
    manifest = json.loads((folder / "earlier" / "recording.json").read_text())
    (folder / "earlier" / "recording.json").write_text(json.dumps({**manifest, "layers": {}}))
    return folder


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def visit(runs, browser):
    """Open the report of some runs; in the end the page must have no faults."""
    visits = []

    def go(*names, **options):
        path = runs / f"{'-'.join(names)}.html"
        if not path.exists():
            write_report([runs / name for name in names], path)
        visits.append(Visit(browser, path, **options))
        return visits[-1]

    yield go
    for each in visits:
        each.leave()


def expected(rows, statistic, stage, epoch):
    return {
        row["layer"]: float(row["value"])
        for row in rows
        if (row["statistic"], row["stage"], int(row["epoch"])) == (statistic, stage, epoch)
    }


def test_the_page_begins_with_what_was_recorded(visit, runs):
    report = visit("first")
    rows = read_csv(runs / "first")
    for title, statistic in (("saturation", "saturation"), ("dimension", "intrinsic_dimension")):
        wanted = expected(rows, statistic, "eval", 2)
        wanted.pop("mean")
        assert {row["layer"]: row[title] for row in report.table()} == wanted


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_threshold_slider_gives_the_numbers_of_recompute(visit, runs, threshold):
    report = visit("first")
    report.set_threshold(threshold)
    assert report.page.locator("#threshold-shown").text_content() == f"{threshold:g}"
    rows = recompute(runs / "first", threshold)
    for stage, epoch in itertools.product(("train", "eval"), range(3)):
        report.set("stage", {"train": "0", "eval": "1"}[stage])
        report.set("epoch", epoch)
        saturation = expected(rows, "saturation", stage, epoch)
        dimension = expected(rows, "intrinsic_dimension", stage, epoch)
        table = report.table()
        assert [row["layer"] for row in table] == NAMES
        for row in table:
            assert row["saturation"] == saturation[row["layer"]]
            assert row["dimension"] == dimension[row["layer"]]
        profile = [saturation[name] for name in NAMES]
        assert report.chart("profile")[0]["y"] == profile
        assert [line[epoch] for line in report.chart("heat-0")[0]["z"]] == profile
        mean = report.chart("scalars")[["train", "eval"].index(stage)]["y"][epoch]
        assert mean == saturation["mean"]
        tail = tail_of({name: saturation[name] for name in NAMES})
        assert {row["layer"] for row in table if "in the tail" in row["what stands out"]} == set(tail)


def test_the_sliders_make_a_difference(runs):
    """Otherwise the tests above compare little."""
    rows = recompute(runs / "first", THRESHOLDS, "saturation")
    profiles = [expected(rows, f"saturation@{threshold}", "eval", 2) for threshold in THRESHOLDS]
    assert len({tuple(profile.values()) for profile in profiles}) == len(THRESHOLDS)
    for profile in profiles:
        profile.pop("mean")
    assert len({tuple(tail_of(profile)) for profile in profiles}) > 1


def test_what_does_not_depend_on_the_threshold(visit, runs):
    report = visit("first")
    rows = read_csv(runs / "first")
    for statistic in ("covariance_determinant", "power_law_exponent"):
        report.set("statistic", statistic)
        wanted = expected(rows, statistic, "eval", 2)
        for row in report.table():
            assert row[statistic] == pytest.approx(wanted[row["layer"]], rel=0, abs=0, nan_ok=True)
    report.set("statistic", "covariance_determinant")
    assert float("-inf") in {row["covariance_determinant"] for row in report.table()}
    assert "−∞" in report.page.locator("#rows").text_content()


def test_nan_and_infinity_survive(visit):
    report = visit("first")
    hover = [text for trace in report.chart("scalars") for text in trace["text"] if "loss" in text]
    assert [text.rpartition(": ")[2] for text in hover] == ["NaN", "∞", "0.5"]
    [loss] = [trace for trace in report.chart("scalars") if "loss" in trace["text"][0]]
    assert loss["y"] == [None, None, 0.5]


def test_arrays_cross_from_python_to_the_browser(browser):
    page = browser.new_page()
    source = files("spectralmetrics.recording.report") / "page" / SCRIPTS[0]
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-(2**28), 2**28, (3, 2, 5), generator=generator).numpy()
    floats = [[0.1, float("nan"), float("inf")], [-float("inf"), -0.0, 5e-324]]
    text = pack(
        {"a": {"b": [integers]}, "c": torch.tensor(floats, dtype=torch.float64).numpy(), "d": "</script>"}
    )
    page.set_content(f"<script type=text/plain id=data>{text}</script>")
    page.add_script_tag(content=source.read_text(encoding="utf-8"))
    found = page.evaluate(
        """async () => {
          const content = readContent(await unpacked("data"));
          const { a: { b: [integers] }, c } = content;
          const write = (each) => (Object.is(each, -0) ? "-0" : String(each));
          const one = at(integers, 2, 1, 3);
          return [Array.from(integers.values), integers.shape, Array.from(c.values, write), one, content.d];
        }"""
    )
    assert found == [
        integers.ravel().tolist(),
        [3, 2, 5],
        ["0.1", "NaN", "Infinity", "-Infinity", "-0", "5e-324"],
        integers[2, 1, 3],
        "</script>",
    ]
    page.close()


def test_a_click_shows_a_layer_and_an_epoch(visit):
    report = visit("first")
    title = report.page.locator("#layer-title")
    profile = report.chart("profile")[0]
    report.click("profile", 4, profile["y"][4])
    assert title.text_content() == f"Layer {NAMES[4]}"
    report.click("heat-0", 1, 2)
    assert title.text_content() == f"Layer {NAMES[2]}"
    assert report.page.locator("#epoch-shown").text_content() == "1"
    history = report.chart("history")[1]
    report.click("history", 0, history["y"][0])
    assert report.page.locator("#epoch-shown").text_content() == "0"
    report.page.get_by_role("button", name=NAMES[5]).click()
    report.settle()
    assert title.text_content() == f"Layer {NAMES[5]}"
    assert report.page.locator("tr.chosen th").text_content() == NAMES[5]


def test_the_spectrum_and_its_crossing(visit, runs):
    report = visit("first")
    report.set_threshold(0.9)
    report.set("layer", "1")
    [spectrum] = [
        row["value"]
        for row in recompute(runs / "first", statistics=["spectrum"])
        if (row["stage"], row["layer"], row["epoch"]) == ("eval", NAMES[1], 2)
    ]
    now = report.chart("spectrum")[-1]
    assert now["x"] == list(range(1, 13))
    assert now["y"] == pytest.approx(spectrum.tolist(), rel=3e-4)
    dimension = expected(recompute(runs / "first", 0.9), "intrinsic_dimension", "eval", 2)[NAMES[1]]
    assert [shape["x0"] for shape in report.chart("spectrum", "layout.shapes")] == [dimension]
    assert f"{dimension:g} of 12" in report.page.locator("#spectrum-hint").text_content()


def test_names_are_text(visit):
    report = visit("first")
    page = report.page
    assert page.locator("#rows th").all_text_contents() == NAMES
    assert page.locator("#layer option").all_text_contents() == NAMES
    assert page.locator("main img, main b, main i, main svg a").count() == 0
    assert page.locator("#profile .xtick text").all_text_contents() == NAMES
    report.click("profile", 2, report.chart("profile")[0]["y"][2])
    hover = page.locator("#profile .hovertext").text_content()
    assert hover.startswith("$x^2$ & &lt;b> %{x}: ")
    assert "loss<i>" in page.locator("#scalars").text_content()


def test_what_stands_out(visit):
    report = visit("first")
    rows = report.table()
    assert {row["observations"] for row in rows} == {59}
    for row in rows:
        words = row["what stands out"]
        assert "1 row with NaN or infinities left out" in words
        assert ("1 dead feature" in words) == (row["layer"] == NAMES[4])
        assert ("few observations" in words) == (10 * row["dimension"] > 59)
    report.set_threshold(1.0)
    assert any("few observations" in row["what stands out"] for row in report.table())
    assert not any("few observations" in row["what stands out"] for row in rows)


def intervals(rows, statistic, stage, epoch):
    return {
        row["layer"]: (float(row["value"]), float(row["low"]), float(row["high"]))
        for row in rows
        if row["layer"] != "mean"
        and (row["statistic"], row["stage"], int(row["epoch"])) == (statistic, stage, epoch)
    }


def in_brackets(value, low, high):
    return f"{value:g} ({low:g}–{'?' if high != high else format(high, 'g')})"


# At 1, held-out values depend on the last bit.
@pytest.mark.parametrize("threshold", THRESHOLDS[:-1])
def test_the_threshold_slider_moves_the_intervals_as_recompute_does(visit, runs, threshold):
    report = visit("folds")
    report.set_threshold(threshold)
    rows = recompute(runs / "folds", threshold)
    for stage, epoch in itertools.product(("train", "eval"), range(2)):
        report.set("stage", {"train": "0", "eval": "1"}[stage])
        report.set("epoch", epoch)
        for index, statistic in enumerate(("saturation", "intrinsic_dimension")):
            report.set("statistic", statistic)
            wanted = intervals(rows, statistic, stage, epoch)
            assert len(wanted) == 4
            found = report.page.evaluate(
                """([statistic, stage, epoch]) => page.layers.map((_, layer) =>
                  page.runs[0].interval(statistic, stage, layer, epoch, current.threshold).map(String))""",
                [statistic, ["train", "eval"].index(stage), epoch],
            )
            np.testing.assert_array_equal(
                np.array(found, dtype=float), [(low, high) for _, low, high in wanted.values()]
            )
            if index == 1:
                cells = report.page.locator("#rows td:has(data + span)").all_text_contents()
                assert cells == [in_brackets(*each) for each in wanted.values()]
                assert "in brackets the interval" in report.page.locator("#table-caption").text_content()
            drawn = [trace for trace in report.chart("profile") if trace.get("fill") == "toself"]
            if (stage, epoch) == ("train", 0):
                assert {str(high) for _, _, high in wanted.values()} == {"nan"}
                assert drawn == []
            else:
                lows, highs = ([each[end] for each in wanted.values()] for end in (1, 2))
                assert drawn[0]["x"] == [0, 1, 2, 3, 3, 2, 1, 0, 0, None]
                assert drawn[0]["y"] == [*lows, *highs[::-1], lows[0], None]


def test_the_intervals_make_a_difference(runs):
    """Otherwise the test above compares little."""
    found = {
        (row["layer"], row["low"], row["high"])
        for row in recompute(runs / "folds", THRESHOLDS[:-1])
        if row["statistic"].startswith("intrinsic") and row["layer"] != "mean" and row["low"] < row["high"]
    }
    assert len(found) > 5
    assert {layer for layer, _, _ in found} >= {"0", "2", "3"}


@pytest.mark.parametrize("name", ["folds", "table"])
def test_recorded_intervals_are_shown(visit, runs, name):
    """Also for other statistics, and without arrays."""
    report = visit(name)
    report.set("statistic", "effective_rank")
    wanted = intervals(read_csv(runs / name), "effective_rank", "eval", 1)
    found = report.page.evaluate(
        "page.layers.map((_, layer) => page.runs[0].interval('effective_rank', 1, layer, 1, current.threshold))"
    )
    assert found == [[low, high] for _, low, high in wanted.values()]
    cells = report.page.locator("#rows td:has(data + span)").all_text_contents()
    dimensions = intervals(read_csv(runs / name), "intrinsic_dimension", "eval", 1)
    assert cells[::2] == [in_brackets(*each) for each in dimensions.values()]
    ends = [f" ({low:.4g}–{high:.4g})" for _, low, high in wanted.values()]
    assert all(cell.endswith(end) for cell, end in zip(cells[1::2], ends, strict=True))


@pytest.mark.parametrize(("stage", "epoch"), [("eval", 0), ("train", 1)])
def test_the_table_says_what_the_summary_says(visit, runs, stage, epoch):
    report = visit("folds")
    for threshold in THRESHOLDS[:-1]:
        report.set_threshold(threshold)
        report.set("stage", {"train": "0", "eval": "1"}[stage])
        report.set("epoch", epoch)
        rows = summarise_run(runs / "folds", epoch=epoch, stage=stage, threshold=threshold).rows
        table = report.table()
        assert [row["layer"] for row in table] == [row.layer for row in rows]
        for found, row in zip(table, rows, strict=True):
            wanted = (row.kind, row.width, row.ceiling, row.observations, row.value)
            titles = ("type", "width", "ceiling", "observations", "dimension")
            assert tuple(found[title] for title in titles) == wanted
            for words in ("in the tail", "few observations", "at its ceiling"):
                assert (words in found["what stands out"]) == (words in row.stands_out), (words, row)


def test_something_stands_out_and_something_does_not(runs):
    """Otherwise the test above compares little."""
    tables = [summarise_run(runs / "folds", epoch=epoch, threshold=0.99).rows for epoch in (0, 1)]
    for words in ("few observations", "at its ceiling"):
        assert {words in row.stands_out for rows in tables for row in rows} == {True, False}


def test_an_interval_wider_than_a_tenth_of_the_width_says_few_observations(visit, runs):
    report = visit("folds")
    report.set("epoch", 0)
    rows = summarise_run(runs / "folds", epoch=0).rows
    wide = {row.layer for row in rows if row.high - row.low > row.width / 10}
    found = {row["layer"] for row in report.table() if "wider than a tenth" in row["what stands out"]}
    assert found == wide != set()
    assert found != {row.layer for row in rows}


def test_the_ceiling_is_a_step_line(visit):
    report = visit("folds")
    report.set("statistic", "intrinsic_dimension")
    [line] = [shape for shape in report.chart("profile", "layout.shapes") if shape["type"] == "path"]
    assert line["path"] == "M-0.5,24H0.5V20H1.5V20H2.5V2H3.5"
    report.set("statistic", "saturation")
    [line] = [shape for shape in report.chart("profile", "layout.shapes") if shape["type"] == "path"]
    assert line["path"] == f"M-0.5,0.6H0.5V1H1.5V{20 / 30}H2.5V1H3.5"
    assert "stepped line" in report.page.locator("#profile-hint").text_content()
    report.set("statistic", "effective_rank")
    assert {shape["type"] for shape in report.chart("profile", "layout.shapes")} == {"line"}


def test_a_run_of_an_earlier_release(visit):
    report = visit("earlier")
    assert not {"type", "ceiling"} & set(report.table()[0])
    assert report.page.locator("#profile-hint").text_content() == ""
    # Beside a run with more information, its ceilings are the widths.
    both = visit("earlier", "folds")
    table = both.table()
    assert {row["ceiling"] for row in table if row["run"] == "earlier"} == {12}
    assert {row["type"] for row in table if row["run"] == "earlier"} == {""}
    assert [row["ceiling"] for row in table if row["run"] == "folds"] == [24, 20, 20, 2]


def test_two_runs_lie_over_each_other(visit, runs):
    report = visit("first", "second")
    report.set_threshold(0.9)
    # The second run ended with epoch 1, and keeps showing it.
    assert "second shows its epoch 1" in report.page.locator("#table-caption").text_content()
    for index, (name, epoch) in enumerate((("first", 2), ("second", 1))):
        wanted = expected(recompute(runs / name, 0.9), "saturation", "eval", epoch)
        assert report.chart("profile")[index]["y"] == [wanted[layer] for layer in NAMES]
        rows = [row for row in report.table() if row["run"] == name]
        assert [row["saturation"] for row in rows] == [wanted[layer] for layer in NAMES]
        assert report.page.locator(f"#heat-{index}").is_visible()
    report.page.get_by_role("checkbox", name="first").uncheck()
    report.settle()
    assert len(report.chart("profile")) == 1
    assert {row["run"] for row in report.table()} == {"second"}
    assert not report.page.locator("#heat-0").is_visible()


def test_without_arrays_the_threshold_stays(visit, runs):
    report = visit("plain")
    assert report.page.locator("#threshold").is_disabled()
    why = report.page.locator("#threshold-why").text_content()
    assert "no covariances were recorded" in why
    assert "plain at 0.9" in why
    wanted = expected(read_csv(runs / "plain"), "saturation", "eval", 2)
    assert [row["saturation"] for row in report.table()] == [wanted[layer] for layer in NAMES]
    assert "width" not in report.table()[0]


def test_beside_others_a_run_without_arrays_is_shown_at_its_own_threshold(visit, runs):
    report = visit("first", "plain")
    assert (
        "at the recorded threshold only: plain at 0.9" in report.page.locator("#threshold-why").text_content()
    )
    report.set_threshold(0.5)
    assert {row["run"] for row in report.table() if row["saturation"] is not None} == {"first"}
    assert "plain: saturation is not known" in report.page.locator("#tail").text_content()
    assert "no values at this threshold" in report.page.locator("#heat-1").text_content()
    report.set_threshold(0.9)
    wanted = expected(read_csv(runs / "plain"), "saturation", "eval", 2)
    found = {row["layer"]: row["saturation"] for row in report.table() if row["run"] == "plain"}
    assert found == {layer: wanted[layer] for layer in NAMES}


def test_a_history_forward_by_forward(visit, runs):
    model = make_model()
    metrics = [SaturationMetric(), HistoryMetric(steps=900)]
    writers = ["csv", "history"]
    with LayerProbe(model, metrics) as probe, Recorder(runs / "history", probe, writers) as recorder:
        for epoch in range(2):
            for step in range(250):
                probe.step = 250 * epoch + step
                model(torch.randn(4, 6) * (10.0 if step == 77 else 1.0))
            recorder.record()
    rows = SavedRun(runs / "history").history["train"]
    assert len(rows) == 500 * 3
    report = visit("history")
    report.page.select_option("#stage", label="train")
    report.settle()
    drawn = "(id) => { const each = document.getElementById(id).data[0]; return [each.z, each.text]; }"
    z, text = report.page.evaluate(drawn, "forwards-0")
    assert [len(row) for row in z] == [250] * 3  # two forwards per column
    for layer in range(3):
        of_layer = [row.rms for row in rows if row.layer == str(layer)]
        assert 10 ** z[layer][38] == pytest.approx(max(of_layer[76:78]), rel=1e-9)
    assert text[1][38].startswith("1, forward 76 to 77, step 76 to 77: root mean square ")
    bar = report.chart("forwards-0")[0]["colorbar"]
    assert bar["title"]["text"] == "root mean square"
    numbers = [float(each) for each in bar["ticktext"]]
    assert len(numbers) > 1
    assert bar["tickvals"] == pytest.approx([math.log10(each) for each in numbers])
    report.page.select_option("#quantity", "zero_share")
    report.settle()
    z, _ = report.page.evaluate(drawn, "forwards-0")
    assert z == [[0] * 250] * 3
    assert visit("first").page.is_hidden("#forwards-section")


def test_a_step_of_several_forwards_has_one_label(visit, runs):
    model = make_model()
    metrics = [SaturationMetric(), HistoryMetric()]
    with LayerProbe(model, metrics) as probe, Recorder(runs / "steps", probe, ["csv", "history"]) as recorder:
        for forward in range(20):
            probe.step = forward // 4
            model(torch.randn(4, 6))
        recorder.record()
    report = visit("steps")
    axis = report.chart("forwards-0", "layout")["xaxis"]
    assert (axis["tickvals"], axis["ticktext"]) == ([0, 4, 8, 12, 16], ["0", "1", "2", "3", "4"])


def test_long_names_differ_on_every_axis(visit, runs):
    names = [
        f"{path}_path.stage_{stage}.convolution" for path in ("contracting", "expanding") for stage in "ab"
    ]
    model = nn.Sequential()
    for name in names:
        inner = model
        *outer, last = name.split(".")
        for part in outer:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Sequential())
            inner = getattr(inner, part)
        inner.add_module(last, nn.Linear(6, 6))
    with LayerProbe(model) as probe, Recorder(runs / "long", probe, ["csv"]) as recorder:
        model(torch.randn(50, 6))
        recorder.record()
    report = visit("long", width=390)
    for chart, axis in (("profile", "xaxis"), ("heat-0", "yaxis")):
        assert report.chart(chart, "layout")[axis]["ticktext"] == [
            f"{path}.stage_{stage}.convolution" for path in "ce" for stage in "ab"
        ]
    assert report.chart("heat-0")[0]["colorbar"]["title"]["text"] == "saturation"
    assert [row["layer"] for row in report.table()] == names


def test_the_table_sorts(visit):
    report = visit("first")
    heading = report.page.get_by_role("button", name="dimension", exact=True)
    for direction in ("descending", "ascending"):
        heading.click()
        values = [row["dimension"] for row in report.table()]
        assert values == sorted(values, reverse=direction == "descending")
        assert report.page.locator(f"th[aria-sort={direction}]").text_content() == "dimension"
    report.page.get_by_role("button", name="layer", exact=True).click()
    # The table stays sorted while a slider moves.
    heading.click()
    report.set_threshold(0.5)
    values = [row["dimension"] for row in report.table()]
    assert values == sorted(values, reverse=True)


def test_everything_is_reached_by_keyboard(visit):
    report = visit("first", "second")
    controls = report.page.evaluate(
        """() => {
          const all = [...document.querySelectorAll("select, input, button, a[href], [tabindex='0']")];
          all.forEach((each, index) => { each.dataset.place = index; });
          return all.filter((each) => each.checkVisibility()).map((each) => each.dataset.place);
        }"""
    )
    reached = []
    for _ in controls:
        report.page.keyboard.press("Tab")
        reached.append(report.page.evaluate("document.activeElement.dataset.place"))
    assert reached == controls
    report.page.locator("#epoch").focus()
    report.page.keyboard.press("Home")
    report.page.keyboard.press("ArrowRight")
    report.settle()
    assert report.page.locator("#epoch-shown").text_content() == "1"
    report.page.locator("#threshold").focus()
    report.page.keyboard.press("Home")
    report.settle()
    assert report.page.locator("#threshold-shown").text_content() == "0.5"
    layer = report.page.get_by_role("button", name=NAMES[3]).first
    layer.focus()
    report.page.keyboard.press("Enter")
    report.settle()
    assert report.page.locator("#layer-title").text_content() == f"Layer {NAMES[3]}"
    # The pressed button keeps the focus.
    assert report.page.evaluate("document.activeElement.textContent") == NAMES[3]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_an_audit_of_accessibility(visit, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    report = visit("first", "plain", width=width, scheme=scheme)
    found = axe.Axe().run(report.page).response["violations"]
    assert [(each["id"], each["impact"], len(each["nodes"])) for each in found] == []


@pytest.mark.parametrize("runs_shown", [("first",), ("first", "second")])
def test_a_narrow_window_is_not_scrolled_sideways(visit, runs_shown):
    report = visit(*runs_shown, width=390)
    assert report.page.evaluate("document.documentElement.scrollWidth") == 390
    for chart in ("profile", "heat-0", "spectrum", "history", "scalars"):
        box = report.page.locator(f"#{chart}").bounding_box()
        assert 300 < box["width"] <= 390 - box["x"]


class OddModel(nn.Module):
    """A layer whose name has no place to break and is several times as wide as a narrow window."""

    def __init__(self):
        super().__init__()
        self.add_module("deep" * 60, nn.Linear(2, 2))

    def forward(self, x):
        return next(self.children())(x)


@pytest.mark.parametrize("what", ["scalars", "one layer", "arrays alone"])
def test_odd_runs(what, browser, tmp_path):
    model = OddModel()
    probe = None if what == "scalars" else LayerProbe(model, [SaturationMetric()])
    with Recorder(tmp_path, probe, ["arrays"] if what == "arrays alone" else ["csv"]) as recorder:
        model(torch.randn(50, 2))
        recorder.add_scalar("loss", 0.5)
        recorder.record()
    report = Visit(browser, write_report(tmp_path, tmp_path / "page.html"), width=390)
    assert report.page.evaluate("document.documentElement.scrollWidth") == 390
    assert [row["layer"] for row in report.table()] == ([] if what == "scalars" else ["deep" * 60])
    scalars = report.page.locator("#scalars").text_content()
    assert ("loss" in scalars) == (what != "arrays alone")
    assert ("mean saturation" in scalars) == (what != "scalars")
    report.leave()


def test_light_and_dark(visit):
    def background():
        return report.page.evaluate("getComputedStyle(document.body).backgroundColor")

    report = visit("first", scheme="dark")
    dark = background()
    report.set("theme", "light")
    light = background()
    assert light == "rgb(255, 255, 255)"
    assert dark != light
    font = report.chart("profile", "layout.font.color")
    report.set("theme", "auto")
    assert background() == dark
    assert report.chart("profile", "layout.font.color") != font


def test_the_page_cannot_reach_a_network(browser, runs):
    path = runs / "first.html"
    if not path.exists():
        write_report(runs / "first", path)
    report = Visit(browser, path)
    tried = "fetch('https://example.org/').then(() => 'reached', () => 'refused')"
    assert report.page.evaluate(tried) == "refused"
    assert any("Content Security Policy" in each for each in report.complaints)
    report.context.close()


class ShareAbove(SpectralMetric):
    """A user's own statistic, with a threshold that the page cannot interpret."""

    short_name = "share_above_for_the_page"

    def __init__(self, threshold=0.75, **options):
        super().__init__(**options)
        self.threshold = threshold

    def statistic(self, spectrum):
        return (spectrum.eigenvalues > self.threshold * spectrum.eigenvalues[0]).double().mean()


class Grown(nn.Linear):
    """Its outputs have more directions than its weights allowed when the probe was made."""

    def grow(self):
        self.weight = nn.Parameter(torch.randn(self.out_features, 24))
        self.in_features = 24


def record_what_python_alone_knew(directory):
    """A refuted ceiling, a collapsed output layer, and a statistic that no slider moves."""
    torch.manual_seed(0)
    model = nn.Sequential(Grown(4, 20), nn.ReLU(), nn.Linear(20, 30), nn.Linear(30, 40)).eval()
    metrics = [EffectiveRankMetric(), ShareAbove()]
    with LayerProbe(model, metrics) as probe, Recorder(directory, probe, ["csv", "arrays"]) as recorder:
        model[0].grow()
        with torch.no_grad():
            model[3].weight.copy_(torch.randn(40, 1) @ torch.randn(1, 30))
        model(torch.randn(5000, 24))
        recorder.record()


def test_the_page_says_what_python_says(browser, tmp_path):
    record_what_python_alone_knew(tmp_path)
    report = Visit(browser, write_report(tmp_path, tmp_path / "page.html"))
    rows = {row["layer"]: row for row in report.table()}
    summary = {row.layer: row for row in summarise_run(tmp_path).rows}
    assert "collapsed: 1 of 40 directions" in summary["3"].stands_out
    assert summary["0"].ceiling == 20 > 4
    headline = report.page.locator("#tail").text_content()
    assert "problem in 3: collapsed: 1 of 40 directions; " in headline
    assert "${" not in report.page.locator("body").inner_text()
    for layer, row in summary.items():
        assert rows[layer]["ceiling"] == row.ceiling
        assert rows[layer]["what stands out"] == "; ".join(row.stands_out)
    report.leave()


def test_a_phone_shows_what_stands_out_without_scrolling(visit, runs):
    report = visit("folds", width=390)
    assert report.page.locator("#notes").text_content() == "Notes on 1 layer: see the table."
    report.set("epoch", 0)
    noted = {each.layer for each in summarise_run(runs / "folds", epoch=0).findings if each.severity == "note"}
    assert len(noted) > 1
    assert report.page.locator("#notes").text_content() == f"Notes on {len(noted)} layers: see the table."
    for part in ("#outstanding-title", "#tail", "#notes"):
        box = report.page.locator(part).bounding_box()
        assert 0 < box["y"] < box["y"] + box["height"] < 664  # a browser leaves 664 of 844 pixels
    report.page.locator("#notes a").click()
    report.settle()
    assert 0 <= report.page.locator("#table-title").bounding_box()["y"] < 664


def test_the_page_opens_on_what_was_recorded_and_says_what_the_slider_does_not_move(browser, tmp_path):
    record_what_python_alone_knew(tmp_path)
    report = Visit(browser, write_report(tmp_path, tmp_path / "page.html"))
    note = report.page.locator("#statistic-note")
    assert report.page.locator("#statistic").input_value() == "effective_rank"
    assert note.text_content() == "effective_rank has no threshold: the slider does not move it."
    report.set("statistic", "share_above_for_the_page")
    words = "share_above_for_the_page is shown as it was recorded, at its threshold 0.75"
    assert note.text_content() == f"{words}: the slider does not move it."
    report.set("statistic", "saturation")
    assert note.text_content() == ""
    assert report.page.locator("#subtitle").text_content().endswith(", 3 layers, 1 epoch")
    report.leave()


def test_a_run_of_steps(browser, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    with LayerProbe(model) as probe, Recorder(tmp_path, probe) as recorder:
        for step in (10, 25):
            model(torch.randn(50, 4))
            recorder.record(step=step)
    report = Visit(browser, write_report(tmp_path, tmp_path / "page.html"))
    assert report.page.locator("#subtitle").text_content().endswith("1 layer, 2 steps")
    assert report.page.locator("#epoch-shown").text_content() == "25"
    assert report.page.locator("#scalars-title").text_content() == "Scalars over steps"
    assert report.chart("history")[0]["x"] == [10, 25]
    report.leave()
