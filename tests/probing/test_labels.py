"""Labels beside a probed model, and the inputs of its layers in place of their outputs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from spectralmetrics import (
    EigenspaceEmbeddingMetric,
    LayerProbe,
    LinearProbeMetric,
    NeuralCollapseMetric,
    Recorder,
    SaturationMetric,
    read_records,
    recompute,
)


class Network(nn.Module):
    """Maps, rows and sequences."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.linear = nn.Linear(5, 6)
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, images):
        maps = self.conv(images).relu()
        steps, _ = self.lstm(maps.flatten(2).mT)
        return self.linear(maps.mean((2, 3))), steps


def by_hand(model, images, labels, name, metric):
    """The metric of what a layer put out, pooled to a mean of each sample."""
    with torch.no_grad():
        maps = model.conv(images)
        outputs = {
            "conv": maps.mean((2, 3)),
            "linear": model.linear(maps.relu().mean((2, 3))),
            "lstm": model.lstm(maps.relu().flatten(2).mT)[0].mean(1),
        }
    metric.update(outputs[name], labels)
    return metric.compute()


def batches(number=4):
    for _ in range(number):
        labels = torch.randint(3, (20,))
        yield torch.randn(20, 1, 8, 8) + labels[:, None, None, None], labels


@pytest.mark.parametrize("name", ["conv", "linear", "lstm"])
@pytest.mark.parametrize("new", [LinearProbeMetric, NeuralCollapseMetric])
def test_samples_are_pooled_to_means(name, new):
    model = Network().eval()
    probe = LayerProbe(model, [SaturationMetric(), new(3)])
    every = list(batches())
    with torch.no_grad():
        for images, labels in every:
            with probe.labels(labels):
                model(images)
        model(every[0][0])  # without labels, and so for the saturation alone
    images, labels = (torch.cat(each) for each in zip(*every, strict=True))
    model = copy.deepcopy(model)  # without hooks
    expected = by_hand(model, images, labels, name, new(3))
    assert float(probe.compute()[f"{new.short_name}/eval/{name}"]) == pytest.approx(float(expected), rel=1e-5)
    assert int(probe["eval", "linear"].saturation.count) == 100


def test_the_metrics_of_labels_share_their_sums():
    probe = LayerProbe(Network(), [SaturationMetric(), LinearProbeMetric(3), NeuralCollapseMetric(3)])
    groups = probe["train", "conv"].compute_groups
    assert sorted(map(sorted, groups.values())) == [["linear_probe", "neural_collapse"], ["saturation"]]


def test_a_label_for_each_step():
    model = nn.Linear(4, 3)
    probe = LayerProbe(model, LinearProbeMetric(2))
    tokens, labels = torch.randn(6, 7, 4), torch.randint(-1, 2, (6, 7))
    mask = torch.rand(6, 7) < 0.8
    with probe.labels(labels), probe.mask(mask):
        outputs = model(tokens)
    metric = LinearProbeMetric(2)
    kept = mask & (labels >= 0)
    metric.update(outputs.detach()[kept], labels[kept])
    (value,) = probe.compute().values()
    assert float(value) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_padding_is_no_part_of_a_mean():
    model = nn.Linear(4, 3)
    probe = LayerProbe(model, NeuralCollapseMetric(2))
    tokens, labels = torch.randn(16, 7, 4), torch.arange(16) % 2
    mask = torch.arange(7) < torch.randint(1, 8, (16, 1))
    with probe.labels(labels), probe.mask(mask):
        outputs = model(tokens).detach()
    metric = NeuralCollapseMetric(2)
    metric.update((outputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), labels)
    assert float(*probe.compute().values()) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_training_is_bit_identical():
    model = Network()
    twin = copy.deepcopy(model)
    probe = LayerProbe(model, [SaturationMetric(), LinearProbeMetric(3)], folds=2, rows_per_feature=1)
    for images, labels in batches(2):
        outputs = []
        for each in (model, twin):
            with probe.labels(labels):
                rows, steps = each(images)
            (rows.square().sum() + steps.sum()).backward()
            outputs += [rows, steps, *(p.grad for p in each.parameters())]
        half = len(outputs) // 2
        assert all(map(torch.equal, outputs[:half], outputs[half:]))


def test_held_out_values_keep_samples_together():
    model = Network().eval()
    probe = LayerProbe(model, LinearProbeMetric(3), folds=2)
    with torch.no_grad():
        for images, labels in batches(6):
            with probe.labels(labels):
                model(images)
    values, intervals = probe.compute(), probe.intervals()
    for key, value in values.items():
        assert float(intervals[key].low) == float(value) <= float(intervals[key].high)


def test_without_labels_there_is_a_word():
    model = Network().eval()
    probe = LayerProbe(model, [SaturationMetric(), LinearProbeMetric(3)])
    with torch.no_grad():
        model(torch.randn(20, 1, 8, 8))
    with pytest.warns(
        UserWarning, match=r"'linear_probe' in eval is left out, .* for any layer: .*probe.labels"
    ):
        values = probe.compute()
    assert all("saturation" in key for key in values)


def test_labels_that_fit_nothing_are_told_once():
    model = Network().eval()
    probe = LayerProbe(model, LinearProbeMetric(3))
    with torch.no_grad():
        with (
            pytest.warns(
                UserWarning, match=r"shape \(7,\) fit no output that was observed: not that of 'conv'"
            ),
            probe.labels(torch.zeros(7, dtype=torch.int64)),
        ):
            model(torch.randn(20, 1, 8, 8))
        with probe.labels(torch.zeros(9, dtype=torch.int64)):
            model(torch.randn(20, 1, 8, 8))


def test_classes_beyond_their_number_are_told_and_the_rest_goes_on():
    model = Network().eval()
    probe = LayerProbe(model, [SaturationMetric(), LinearProbeMetric(2)])
    with torch.no_grad(), probe.labels(torch.arange(20) % 3):
        model(torch.randn(20, 1, 8, 8))
    with pytest.warns(UserWarning, match=r"expected labels below num_classes=2, got 6 of that and above"):
        values = probe.compute()
    assert len(values) == 3


def test_a_record_keeps_the_sums_of_the_classes(tmp_path):
    model = Network().eval()
    metrics = [SaturationMetric(), LinearProbeMetric(3, ridge=0.01), NeuralCollapseMetric(3)]
    probe = LayerProbe(model, [*metrics, EigenspaceEmbeddingMetric(max_samples=9)], folds=2)
    with Recorder(tmp_path / "run", probe, ["csv", "arrays"]) as recorder, torch.no_grad():
        for images, labels in batches(4):
            with probe.labels(labels):
                model(images)
        recorder.record()
    recorded = {
        (row["statistic"], row["layer"]): (row["value"], row["low"], row["high"])
        for row in read_records(tmp_path / "run")
        if row["layer"] != "mean"
    }
    again = {
        (row["statistic"], row["layer"]): (row["value"], row["low"], row["high"])
        for row in recompute(tmp_path / "run")
        if row["layer"] != "mean"
    }
    assert {name for name, _ in again} == {"saturation", "linear_probe", "neural_collapse"}
    for key, values in again.items():
        assert [v for v in values if v is not None] == pytest.approx(
            [v for v in recorded[key] if v is not None], rel=1e-9
        )
    stiff = recompute(tmp_path / "run", statistics=[LinearProbeMetric(3, ridge=100.0)])
    assert all(
        row["value"] < recorded["linear_probe", row["layer"]][0] for row in stiff if row["layer"] != "mean"
    )


def test_an_epoch_goes_on_after_a_crash():
    model = Network().eval()
    every = list(batches())
    whole, first, second = (LayerProbe(model, LinearProbeMetric(3), folds=2) for _ in range(3))
    for probe in (whole, first, second):
        probe.persistent()
    with torch.no_grad(), second.paused():
        for images, labels in every[:2]:
            with whole.labels(labels), first.labels(labels):
                model(images)
    second.load_state_dict(first.state_dict())
    with torch.no_grad(), first.paused():
        for images, labels in every[2:]:
            with whole.labels(labels), second.labels(labels):
                model(images)
    for key, value in whole.compute().items():
        assert float(second.compute()[key]) == pytest.approx(float(value), rel=1e-9)


# -- inputs --------------------------------------------------------------------------------------------------


def captured_inputs(model, data):
    found = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: found.setdefault(name, args[0].clone()))
        for name, module in model.named_children()
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_covariances_of_inputs_are_those_of_numpy(center, unbiased):
    model = Network().eval()
    probe = LayerProbe(model, observe="inputs")
    data = torch.randn(20, 1, 8, 8)
    found = captured_inputs(model, data)
    assert list(probe.layers) == ["conv", "lstm", "linear"]
    covariances = probe.covariances("eval", unbiased=unbiased, center=center)
    for name, inputs in found.items():
        rows = (inputs.movedim(1, -1) if name == "conv" else inputs).flatten(0, -2).double().numpy()
        rows = rows - rows.mean(0) if center else rows
        expected = rows.T @ rows / (len(rows) - unbiased)
        np.testing.assert_allclose(covariances[name], expected, rtol=1e-10, atol=1e-12)


def test_covariances_of_outputs_and_of_layers_that_saw_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    probe = LayerProbe(model, SaturationMetric(folds=2))
    rows = torch.randn(30, 3)
    outputs = model[0](rows)
    assert list(probe.covariances("train")) == ["0"]
    np.testing.assert_allclose(
        probe.covariances("train")["0"], np.cov(outputs.detach().double().numpy().T, bias=True), rtol=1e-9
    )
    assert probe.covariances("eval") == {}


def test_what_has_labels_alone_is_no_covariance_of_the_layer():
    model = nn.Sequential(nn.Linear(3, 4))
    probe = LayerProbe(model, LinearProbeMetric(2))
    with probe.labels(torch.arange(30) % 2):
        model(torch.randn(30, 3))
    assert probe.compute()["linear_probe/train/0"] > 0
    assert probe.covariances("train") == {}


def test_the_input_is_seen_before_the_layer_changes_it():
    class Doubling(nn.Module):
        def forward(self, rows):
            return rows.mul_(2)

    model = nn.Sequential(Doubling())
    probe = LayerProbe(model, layers="0", observe="inputs")
    rows = torch.randn(50, 3)
    expected = rows.double().T.cov(correction=0)
    model(rows)
    torch.testing.assert_close(probe.covariances("train")["0"], expected, rtol=1e-9, atol=1e-12)


def test_inputs_by_keyword():
    model = nn.Linear(3, 2)
    probe = LayerProbe(model, observe="inputs")
    rows = torch.randn(50, 3)
    model(input=rows)
    assert probe.covariances("train")["Linear"].shape == (3, 3)
    torch.testing.assert_close(
        probe.covariances("train")["Linear"], rows.double().T.cov(correction=0), rtol=1e-9, atol=1e-12
    )


def test_inputs_of_a_compiled_model_and_of_a_checkpoint():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    plain = LayerProbe(model, observe="inputs")
    rows = torch.randn(30, 4)
    model(rows)
    expected = plain.covariances("train")
    plain.remove()
    probe = LayerProbe(model, observe="inputs")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(rows).sum().backward()
    for name, found in probe.covariances("train").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-9)
    probe.reset()
    checkpoint(model, rows, use_reentrant=False).sum().backward()
    assert int(probe["train", "0"].saturation.count) == 30


def test_an_output_inside_tuples_of_a_compiled_model():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, rows):
            return ((self.linear(rows), rows), rows)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nested = Nested()

        def forward(self, rows):
            return self.nested(rows)[0][0]

    model = Model()
    probe = LayerProbe(model, layers="nested")
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(30, 3))
    assert int(probe["train", "nested"].saturation.count) == 30


def test_maps_with_features_last_are_told_by_what_goes_in():
    model = nn.Linear(5, 3)
    probe = LayerProbe(model, observe="inputs")
    model(torch.randn(4, 6, 7, 5))
    assert probe.covariances("train")["Linear"].shape == (5, 5)
    assert int(probe["train", "Linear"].saturation.count) == 4 * 6 * 7


def test_weights_say_nothing_of_inputs():
    model = nn.Linear(64, 2)
    probe = LayerProbe(model, observe="inputs")
    model(torch.randn(2000, 64))
    (row,) = probe.summary("train").rows
    assert (row.width, row.ceiling) == (64, 64)


def test_inputs_take_no_select():
    with pytest.raises(ValueError, match="expected no select with observe='inputs'"):
        LayerProbe(nn.Linear(2, 2), observe="inputs", select={"Linear": lambda output: output})
