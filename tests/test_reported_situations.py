"""Situations in which similar tools were reported to fail; docs/reported_situations.md lists all of them."""

import contextlib
import copy
import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import spectralmetrics as sm
from spectralmetrics.checkpoints import checkpoint_spectra
from spectralmetrics.cli import main
from spectralmetrics.recording import read_records

pytestmark = pytest.mark.filterwarnings("ignore:in (train|eval) there are fewer observations")


def stable_rank(weight):
    values = torch.linalg.svdvals(weight.detach().double().flatten(1))
    return float(values.square().sum() / values[0] ** 2)


def count(probe, layer="0", stage="train"):
    return int(probe[stage, layer]["saturation"].count)


@pytest.mark.parametrize("kind", ["linear", "GPT-2"])
def test_reading_changes_no_weight_that_is_made_when_it_is_read(kind):
    # In training mode, each access to the weight of a spectral norm is one more power iteration.
    layer = nn.Linear(8, 8)
    if kind == "GPT-2":
        layer = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers").Conv1D(8, 8)
    model = nn.Sequential(nn.Linear(6, 8), parametrizations.spectral_norm(layer))
    nn.init.constant_(model[1].bias, 1e4)  # a small spread, so that findings read the weights
    plain = copy.deepcopy(model)
    probe = sm.LayerProbe(model)
    for _ in range(2):
        x = torch.randn(400, 6)
        model(x)
        plain(x)
    assert [each.kind for each in probe.findings("train") if each.layer == "1"] == ["collapsed"]
    probe.summary("train")
    sm.weight_spectra(model)
    before = plain.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_spectra_are_those_of_the_weights_that_the_model_computes_with(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(12, 9)),
        parametrizations.spectral_norm(nn.Conv2d(2, 6, 3)),
        nn.utils.weight_norm(nn.Linear(9, 7)),
        prune.l1_unstructured(nn.Linear(8, 9), "weight", 0.7),
    )
    state = model.state_dict()
    rows = {row.layer: row for row in sm.weight_spectra(model, ["stable_rank"], since=state).rows}
    assert list(rows) == ["0", "1", "2", "3"]
    model.eval()
    for name, row in rows.items():
        weight = model[int(name)].weight
        assert row.value["stable_rank"] == pytest.approx(stable_rank(weight), rel=1e-6)
        assert row.shape == tuple(weight.flatten(1).shape)
    assert rows["3"].update["relative_size"] == 0
    torch.save(state, tmp_path / "state.pt")
    summary = checkpoint_spectra(tmp_path / "state.pt", ["stable_rank"])
    assert {row.layer: row.value for row in summary.rows} == {"3": rows["3"].value}  # needs no model
    assert "load the model" in summary.skipped["0.parametrizations.weight.original1"]
    assert "load the model" in summary.skipped["2.weight_v"]
    assert summary.skipped["3.weight_mask"] == "it is the mask of '3.weight'"


def test_gradients_of_many_losses_at_once_leave_the_layer_observed():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    probe = sm.LayerProbe(model, observe="gradients")
    x = torch.randn(8, 4)
    output = model(x)
    bases = torch.eye(output.numel()).unflatten(1, output.shape)
    (jacobian,) = torch.autograd.grad(output, model[2].weight, bases, is_grads_batched=True)
    torch.testing.assert_close(jacobian.unflatten(0, (8, 3))[:, 0, 0], torch.tanh(model[0](x)))
    model(x).sum().backward()
    assert [count(probe, layer) for layer in probe.layers] == [8, 8]


def test_threads_have_each_their_own_mask():
    model = nn.Sequential(nn.Linear(4, 6))
    probe, together = sm.LayerProbe(model), threading.Barrier(2)
    masks = [torch.ones(2, 5, dtype=torch.bool), torch.arange(5).expand(2, 5) < 1]
    seen = []

    def serve(mask):
        for _ in range(5):
            with probe.mask(mask):
                together.wait(10)
                model(torch.randn(2, 5, 4))
                together.wait(10)
        seen.append(mask)

    threads = [threading.Thread(target=serve, args=(mask,)) for mask in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2
    assert count(probe) == 5 * (10 + 2)
    model(torch.randn(2, 5, 4))  # nothing of the earlier ones is left
    assert count(probe) == 5 * (10 + 2) + 10


def test_a_program_without_a_terminal_records(tmp_path, monkeypatch):
    pytest.importorskip("rich", reason="the extra `console` is not installed")
    model = nn.Sequential(nn.Linear(4, 6)).eval()
    with sm.Recorder(tmp_path, sm.LayerProbe(model), ["csv", "console"]) as recorder:
        model(torch.randn(60, 4))
        monkeypatch.setattr(sys, "stdout", None)
        recorder.record()
        monkeypatch.undo()
    assert {row["layer"] for row in read_records(tmp_path)} == {"0", "mean"}


VALUES = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)


def covariance(measured):
    return measured.sums.covariance().numpy()


@pytest.mark.parametrize("index", ["float", "named", "several"])
def test_the_index_of_a_data_frame_is_no_feature(index, tmp_path):
    pandas = pytest.importorskip("pandas", reason="the extra `pandas` is not installed")
    pytest.importorskip("pyarrow", reason="the extra `files` is not installed")
    times = np.linspace(0.0, 1e6, len(VALUES))
    frame = pandas.DataFrame(VALUES, columns=list("abcdef"), index=times)
    if index == "named":
        frame.index.name = "time"
    elif index == "several":
        frame.index = pandas.MultiIndex.from_arrays([times, times[::-1]])
    frame.to_parquet(tmp_path / "frame.parquet")
    np.testing.assert_allclose(
        covariance(sm.measure(tmp_path / "frame.parquet")), np.cov(VALUES.T, ddof=0), rtol=1e-9
    )
    if index == "named":  # read when it is named
        assert covariance(sm.measure(tmp_path / "frame.parquet", column="time")).shape == (1, 1)


def test_what_an_array_masks_is_missing():
    rows = np.ma.masked_array(VALUES.copy(), mask=np.zeros(VALUES.shape, bool))
    rows.data[3, 2], rows.mask[3, 2] = 1e6, True
    kept = np.delete(VALUES, 3, 0)
    for measured in (sm.measure(rows).sums, sm.moments_of(rows)):
        np.testing.assert_allclose(measured.covariance(), np.cov(kept.T, ddof=0), rtol=1e-9)
    labels = np.ma.masked_array(np.arange(300) % 2, mask=np.arange(300) < 10)
    labels.data[:10] = 77
    found = sm.measure(rows, sm.NeuralCollapseMetric(2), labels=labels).values["neural_collapse"]
    expected = sm.measure(VALUES[10:], sm.NeuralCollapseMetric(2), labels=np.arange(10, 300) % 2).values[
        "neural_collapse"
    ]
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    folder = tmp_path / "run [1]"
    folder.mkdir()
    for name in ("a[0].npy", "a[1].npy", "b.npy"):
        np.save(folder / name, VALUES)
    for source, number in [
        (folder, 3),
        (folder / "a[0].npy", 1),
        (f"{folder}/a*.npy", 2),
        (f"{folder}/[!a]*.npy", 1),
    ]:
        assert int(sm.measure(source).sums.num_observations) == 300 * number


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of loaders, devices and intervals
def test_a_trial_run_of_lightning_keeps_nothing(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="the extra `lightning` is not installed")
    from spectralmetrics.integrations.lightning import LayerProbeCallback
    from tests.integrations.lightning_module import Classifier, make_trainer

    for settings in ({"fast_dev_run": True}, {"max_epochs": 2, "limit_train_batches": 2}):
        callback = LayerProbeCallback(sm.SaturationMetric(), recorder=tmp_path / "run")
        make_trainer(tmp_path, callback, **settings).fit(Classifier(0.1))
    assert {row["epoch"] for row in read_records(tmp_path / "run")} == {0, 1}


def test_a_model_that_fabric_has_wrapped_keeps_its_names():
    fabric = pytest.importorskip("lightning.fabric", reason="the extra `lightning` is not installed")
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped, _ = fabric.Fabric(accelerator="cpu", devices=1).setup(model, optimizer)
    probe = sm.LayerProbe(wrapped)
    wrapped(torch.randn(20, 8))
    assert probe.layers == ["0", "2"] == sm.LayerProbe(model).layers
    assert count(probe, "2") == 20


def test_counts_go_on_where_float32_ends():
    labels = torch.arange(300) % 2
    for metric, others in [
        (sm.SaturationMetric(gram_dtype=torch.float32), ()),
        (sm.RootMeanSquareMetric(), ()),
        (sm.LinearProbeMetric(2), (labels,)),
    ]:
        metric.update(torch.from_numpy(VALUES), *others)
        before = metric.compute()
        for _ in range(32):
            metric.merge_state(copy.deepcopy(metric))
        torch.testing.assert_close(metric.compute(), before)
        metric.update(torch.from_numpy(VALUES[:1]), *(each[:1] for each in others))
        assert int(metric.count) == 300 * 2**32 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("constant", [0.1, 14.62, 999.3, -7e-9])
def test_a_constant_feature_is_dead_whatever_its_digits(constant, dtype):
    dead, dimension = sm.DeadFeaturesMetric(), sm.IntrinsicDimensionMetric()
    for number in (7, 1000, 33, 5):
        rows = torch.randn(number, 3).to(dtype)
        rows[:, 1] = constant
        for metric in (dead, dimension):
            metric.update(rows)
    assert float(dead.compute()) == pytest.approx(1 / 3)
    assert int(dimension.compute()) == 2


def test_small_features_are_not_constant():
    rows = torch.randn(500, 4, dtype=torch.float64)
    for scale in (1e-12, 1e-100):
        dead, rank = sm.DeadFeaturesMetric(), sm.EffectiveRankMetric()
        for metric in (dead, rank):
            metric.update(scale * rows)
        assert float(dead.compute()) == 0
        assert float(rank.compute()) > 3.9


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.metric = nn.Linear(4, 6), sm.SaturationMetric()
        self.probe = sm.LayerProbe(self, layers=["layer"])

    def forward(self, x):
        output = self.layer(x)
        self.metric.update(output)  # with its graph
        return output


def test_a_model_may_hold_its_probe_and_metrics():
    model = Watched()
    model(torch.randn(20, 4)).sum().backward()
    copied = copy.deepcopy(model)
    copied(torch.randn(20, 4))  # a copy has no hooks, and its own metrics
    model.half().float()(torch.randn(20, 4))
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]
    states = model.metric.metric_state.values()
    assert {each.dtype for each in states if each.is_floating_point()} == {torch.float64}
    assert (int(model.metric.count), count(model.probe, "layer")) == (40, 40)
    assert (int(copied.metric.count), count(copied.probe, "layer")) == (40, 20)
    assert not any(each.requires_grad for each in states)


@pytest.mark.skipif(os.name != "posix", reason="modes of files are those of POSIX")
def test_others_may_read_what_a_recorder_writes(tmp_path):
    model, before = nn.Sequential(nn.Linear(4, 6)).eval(), os.umask(0o027)
    try:
        with sm.Recorder(tmp_path / "run", sm.LayerProbe(model), ["csv", "arrays", "report"]) as recorder:
            model(torch.randn(60, 4))
            recorder.record()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert len(files) == 4


def test_lists_that_are_slices_or_missing(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra `files` is not installed")
    __import__("pyarrow.parquet")
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(VALUES.ravel()), 6)
    parts = {
        "slice": lists.slice(40, 200),
        "missing": arrow.array([None] * 99 + lists.to_pylist()[40:240], lists.type),
    }
    for name, column in parts.items():
        arrow.parquet.write_table(arrow.table({"e": column}), tmp_path / f"{name}.parquet", row_group_size=50)
        found = covariance(sm.measure(tmp_path / f"{name}.parquet"))
        np.testing.assert_allclose(found, np.cov(VALUES[40:240].T, ddof=0), rtol=1e-9)


def test_checkpoints_without_numbers_say_why(tmp_path, capsys):
    for name, tensor, reason in [
        ("meta", torch.empty(4, 4, device="meta"), "it was saved on the meta device, without its values"),
        ("bits", torch.ones(4, 4).bool(), "it holds bool: packed or quantised weights"),
    ]:
        torch.save({"weight": tensor}, tmp_path / f"{name}.pt")
        assert main(["weights", str(tmp_path / f"{name}.pt")]) == 2
        assert f"'weight': {reason}" in capsys.readouterr().err


def test_a_table_goes_to_any_stream(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6)).eval()
    with sm.Recorder(tmp_path / "run", sm.LayerProbe(model), ["csv", "arrays"]) as recorder:
        model(torch.randn(60, 4))
        recorder.record()
    shown = io.StringIO()  # takes only text, as the streams of notebooks
    with contextlib.redirect_stdout(shown):
        assert main(["recompute", str(tmp_path / "run")]) == 0
    assert main(["recompute", str(tmp_path / "run"), "--output", str(tmp_path / "table.csv")]) == 0
    assert shown.getvalue().encode() == (tmp_path / "table.csv").read_bytes()


RELOADED = """
import sys
import torch
from torch import nn

def use(package, backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    probe = package.LayerProbe(model)
    return probe, torch.compile(model, backend=backend, fullgraph=True)

import spectralmetrics as first
probe, run = use(first, "eager")
run(torch.randn(5, 3))
for name in [name for name in sys.modules if name.partition(".")[0] == "spectralmetrics"]:
    del sys.modules[name]
import spectralmetrics as second
assert second is not first
again, run_again = use(second, "aot_eager")
run_again(torch.randn(6, 3))
run(torch.randn(5, 3))
print(*(int(each["train", "0"]["saturation"].count) for each in (probe, again)))
"""


@pytest.mark.long
def test_a_package_that_is_loaded_anew_observes_in_both_copies():
    ran = subprocess.run([sys.executable, "-c", RELOADED], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("10 6\n", 0), ran.stderr
