"""Labels beside a probed model, and inputs of layers in place of their outputs."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

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
    """Metric of a layer's outputs, pooled to a mean for each sample."""
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
        model(every[0][0])  # without labels, and so only for the saturation
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
            pytest.warns(UserWarning, match=r"shape \(7,\) fit no output that was observed: 'conv'"),
            probe.labels(torch.zeros(7, dtype=torch.int64)),
        ):
            model(torch.randn(20, 1, 8, 8))
        with probe.labels(torch.zeros(9, dtype=torch.int64)):
            model(torch.randn(20, 1, 8, 8))


def test_a_column_of_labels_is_none_of_feature_maps():
    model = nn.Sequential(nn.Conv2d(1, 5, 3)).eval()
    probe = LayerProbe(model, LinearProbeMetric(3))
    told = pytest.warns(UserWarning, match=r"labels of shape \(20, 1\) fit no output")
    with torch.no_grad(), told, probe.labels(torch.zeros(20, 1, dtype=torch.int64)):
        model(torch.randn(20, 1, 8, 8))
    assert not probe["eval", "0"]["linear_probe"].update_called


class Parts(nn.Module):
    """A head that runs on one part of the batch at a time."""

    def __init__(self, parts, width=10):
        super().__init__()
        self.body, self.head, self.parts = nn.Identity(), nn.Identity(), parts

    def forward(self, x):
        x = self.body(x)
        return [self.head(part) for part in self.parts(x)]


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: x.chunk(4),
        lambda x: [x[: len(x) // 2]],  # half of the batch
        lambda x: [x[x[:, 0] > 0], x[x[:, 0] <= 0]],  # experts
        lambda x: [torch.cat([x, x.flip(0)])],  # both views of a contrastive loss
        lambda x: [x.flip(0)[:1]],
    ],
    ids=["chunks", "half", "experts", "twice", "one"],
)
def test_labels_of_another_number_of_samples_are_left_out(parts):
    labels = torch.randint(10, (100,))
    features = nn.functional.one_hot(labels, 10).float() + 0.01 * torch.randn(100, 10)  # they show the labels
    model = Parts(parts).eval()
    probe = LayerProbe(model, [SaturationMetric(), LinearProbeMetric(10)], layers=["body", "head"])
    for step in range(2):
        with contextlib.ExitStack() as stack:
            if not step:  # warned once
                stack.enter_context(pytest.warns(UserWarning, match=r"fit no output of some layers: 'head' "))
            stack.enter_context(probe.labels(labels))
            model(features)
    with pytest.warns(UserWarning, match="'linear_probe' in eval is left out, since no labels came for 'head'"):
        values = probe.compute()
    assert float(values["linear_probe/eval/body"]) > 0.95
    assert "saturation/eval/head" in values


def test_each_layer_that_labels_miss_is_named_once():
    model = Parts(lambda x: x.chunk(4)).eval()
    probe = LayerProbe(model, LinearProbeMetric(10), layers=["body", "head"])
    for labels, said in (
        (torch.arange(20) % 10, r"shape \(20,\) fit no output of some layers: 'head' \(5, 3\);"),
        (torch.arange(5), r"shape \(5,\) fit no output of some layers: 'body' \(20, 3\);"),
    ):
        with pytest.warns(UserWarning, match=said), probe.labels(labels):
            model(torch.randn(20, 3))


@pytest.mark.parametrize("per_step", [False, True])
def test_a_limit_of_samples_cuts_labels_and_batch_together(per_step):
    model = nn.Linear(4, 3)
    probe = LayerProbe(model, LinearProbeMetric(2), max_samples=25)
    shape = (10, 7) if per_step else (10,)
    outputs, every = [], []
    for _ in range(4):
        tokens, labels = torch.randn(10, 7, 4), torch.randint(2, shape)
        mask = torch.rand(10, 7) < 0.8
        with probe.labels(labels), probe.mask(mask), torch.no_grad():
            output = model(tokens)
        if per_step:
            outputs += [[row[valid] for row, valid in zip(output, mask, strict=True)]]
            every += [[row[valid] for row, valid in zip(labels, mask, strict=True)]]
        else:
            outputs += [(output * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)]
            every += [labels]
    metric = LinearProbeMetric(2)
    if per_step:
        flat = [[each for batch in parts for each in batch][:25] for parts in (outputs, every)]
        metric.update(*(torch.cat(each) for each in flat))
    else:
        metric.update(torch.cat(outputs)[:25], torch.cat(every)[:25])
    (value,) = probe.compute().values()
    assert float(value) == pytest.approx(float(metric.compute()), rel=1e-5)


@pytest.mark.parametrize("time_first", [False, True])
def test_a_label_for_each_token_where_tokens_are_flattened(time_first):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=not time_first)
            self.router = nn.Linear(4, 3)

        def forward(self, x):
            return self.router((x.transpose(0, 1) if time_first else x).flatten(0, 1))

    model = Flat()
    probe = LayerProbe(model, LinearProbeMetric(2), layers="router", batch_first=not time_first)
    tokens, labels = torch.randn(6, 7, 4), torch.randint(2, (6, 7))
    with probe.labels(labels):
        model(tokens)
    metric = LinearProbeMetric(2)
    metric.update(nn.functional.linear(tokens, model.router.weight).detach().flatten(0, 1), labels.flatten())
    (value,) = probe.compute().values()
    assert float(value) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_classes_beyond_their_number_are_told_and_the_rest_goes_on():
    model = Network().eval()
    probe = LayerProbe(model, [SaturationMetric(), LinearProbeMetric(2)])
    with torch.no_grad(), probe.labels(torch.arange(20) % 3):
        model(torch.randn(20, 1, 8, 8))
    with pytest.warns(UserWarning, match=r"expected labels below num_classes=2, got 6 of that and above"):
        values = probe.compute()
    assert len(values) == 3


def test_labels_of_padding_may_be_anything():
    layer, valid = nn.Linear(4, 3), torch.arange(5) < torch.tensor([[5], [3], [0], [1]])
    labels = torch.where(valid, torch.arange(20).view(4, 5) % 3, 255)
    probe = LayerProbe(layer, LinearProbeMetric(3))
    with probe.mask(valid), probe.labels(labels):
        layer(torch.randn(4, 5, 4))
    assert list(probe.compute()) == ["linear_probe/train/Linear"]
    assert int(probe["train", "Linear"]["linear_probe"].count) == 9


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
    with pytest.warns(UserWarning, match="nothing was observed in eval: the layers ran in train only"):
        assert probe.covariances("eval") == {}


@pytest.mark.parametrize("center", [True, False])
def test_where_all_metrics_need_labels_covariances_are_those_of_the_labelled_observations(center):
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 1))
    probe = LayerProbe(model, LinearProbeMetric(2), layers=["0", "2"])
    rows, labels = torch.randn(30, 3), torch.arange(30) % 2
    labels[20:] = -100
    with probe.labels(labels), torch.no_grad():
        model(rows)
        outputs = {"0": nn.Sequential(*model[:1])(rows), "2": model(rows).mean(2)}
    probe.remove()
    found = probe.covariances("train", center=center)
    assert list(found) == ["0", "2"]
    for name, output in outputs.items():
        kept = output[:20].double().numpy()
        kept = kept - kept.mean(0) if center else kept
        np.testing.assert_allclose(found[name], kept.T @ kept / 20, rtol=1e-6, atol=1e-9)


def test_covariances_of_a_layer_that_is_sketched():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 50))
    probe = LayerProbe(model, max_features=20, sketch_size=4)
    rows = torch.randn(99, 6)
    outputs = model[0](rows).detach()
    model[1](outputs)
    with pytest.warns(UserWarning, match=r"covariances .* in train are left out: '1' \(.* sketch of 4 columns"):
        found = probe.covariances("train")
    assert list(found) == ["0"]
    np.testing.assert_allclose(found["0"], np.cov(outputs.double().numpy().T, bias=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "said", "layers"),
    [
        ("warn", r"NaN or infinite values were left out in eval: 9 of '0'", ["0", "1"]),
        ("error", r"covariances .* in eval are left out: '0' \(9 observations .* NaN", ["1"]),
    ],
)
def test_covariances_of_rows_that_are_not_finite(strategy, said, layers):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).eval()
    probe = LayerProbe(model, SaturationMetric(nan_strategy=strategy))
    rows = torch.randn(20, 6)
    with torch.no_grad():
        model[0](torch.full((9, 6), torch.nan))
        outputs = model[0](rows)
        last = model[1](outputs)
    with pytest.warns(UserWarning, match=said):
        found = probe.covariances("eval")
    assert list(found) == layers
    for name in layers:
        expected = np.cov({"0": outputs, "1": last}[name].double().numpy().T, bias=True)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_covariances_of_a_layer_whose_sums_overflow_and_of_metrics_without_any():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()
    probe = LayerProbe(model)
    outputs = model[1](torch.randn(20, 4).double()).detach()
    model[0](1e160 * torch.randn(20, 6).double())
    with pytest.warns(UserWarning, match=r"in train are left out: '0' \(its sums overflowed\)"):
        found = probe.covariances("train")
    np.testing.assert_allclose(found["1"], np.cov(outputs.numpy().T, bias=True), rtol=1e-9)
    probe.remove()
    probe = LayerProbe(model, MeanMetric())
    model(torch.randn(20, 6).double())
    with pytest.warns(UserWarning, match=r"left out: '0' \(no metric keeps it\), '1'"):
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


@pytest.mark.parametrize("compiles", [False, True])
def test_select_of_inputs_is_called_as_the_layer_is(compiles):
    class Gate(nn.Module):
        def forward(self, x, *, gate):
            return x * gate

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x):
            return self.gate(x, gate=x[:, :1].sigmoid())

    model = Model()
    select = {"gate": lambda x, gate: gate}
    probe = LayerProbe(model, layers=["gate"], observe="inputs", select=select)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiles else model
    x = torch.randn(20, 3).double()
    run(x)
    torch.testing.assert_close(
        probe.covariances("train")["gate"], x[:, :1].sigmoid().var(0, correction=0)[None]
    )
