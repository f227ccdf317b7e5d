"""Windows are read separately, and change no value of a whole epoch."""

import copy

import pytest
import torch
from torch import nn
from torchmetrics import Metric
from torchmetrics.aggregation import CatMetric, SumMetric

from spectralmetrics import (
    CovarianceMetric,
    CovarianceTraceMetric,
    DeadFeaturesMetric,
    EffectiveRankMetric,
    EigenspaceEmbeddingMetric,
    HistoryMetric,
    IntrinsicDimensionMetric,
    LayerProbe,
    MaxAbsMetric,
    Monitor,
    SaturationMetric,
    SpectrumMetric,
)
from spectralmetrics.probing.probe import read_window


class Largest(SumMetric):
    full_state_update = False

    def update(self, rows):
        super().update(rows.abs().amax())


class Firsts(CatMetric):
    full_state_update = False

    def update(self, rows):
        super().update(rows[:1, 0])


class RunningMean(Metric):
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("value", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, rows):
        self.value = self.value + (rows.mean() - self.value) / self.update_count

    def compute(self):
        return self.value


METRICS = {
    "plain": lambda: [
        SaturationMetric(),
        IntrinsicDimensionMetric(),
        EffectiveRankMetric(),
        CovarianceMetric(),
    ],
    "marginals": lambda: [MaxAbsMetric(), DeadFeaturesMetric()],
    "samples": lambda: [EigenspaceEmbeddingMetric(max_samples=16), SpectrumMetric(center=False)],
    "sketches": lambda: [CovarianceTraceMetric(sketch_size=12), SpectrumMetric(sketch_size=12)],
    "others": lambda: {
        "largest": Largest(),
        "firsts": Firsts(),
        "mean": RunningMean(),
        "saturation": SaturationMetric(),
    },
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).double()


def batches(mean=0.0, count=23):
    generator = torch.Generator().manual_seed(1)
    return [mean + torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def identity():
    """A layer that returns its input, so that its rows are known."""
    model = nn.Sequential(nn.Linear(6, 6)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
        model[0].bias.zero_()
    return model


def same(first, second, rel=1e-12):
    assert list(first) == list(second)
    for key, value in first.items():
        if "embedding" in key:  # directions are less accurate than values
            assert value.shape == second[key].shape
            torch.testing.assert_close(value, second[key], rtol=1e-6, atol=1e-9)
        elif "history" in key:
            torch.testing.assert_close(value, second[key], rtol=1e-12, atol=1e-9)
        else:
            scale = float(torch.as_tensor(value).abs().max()) if value.numel() else 0.0
            found = second[key].to(value.dtype)  # torchmetrics turns means into float32
            torch.testing.assert_close(value, found, rtol=rel, atol=rel * scale, equal_nan=True)


@pytest.mark.parametrize("folds", [None, 3])
@pytest.mark.parametrize("kind", METRICS)
def test_an_epoch_has_the_same_values_with_and_without(kind, folds):
    if folds and kind == "sketches":
        pytest.skip("sketches have no folds")
    found = []
    for monitors in (False, True):
        model = network()
        metrics = METRICS[kind]()
        named = metrics if isinstance(metrics, dict) else {each.short_name: each for each in metrics}
        probe = LayerProbe(model, {"history": HistoryMetric(steps=8), **named}, folds=folds)
        monitor = Monitor(probe, every=4, on_alarm=lambda alarm: None) if monitors else None
        values = []
        for epoch in range(2):
            for number, batch in enumerate(batches()):
                probe.step = epoch * 23 + number
                model(batch)
                if monitor:
                    monitor.step()
                if number in (9, 10):  # read while a window is open
                    values.append(probe.compute())
            values.append(probe.compute())
            if folds and kind in ("plain", "samples"):
                values.append({k: torch.stack(list(v)) for k, v in probe.intervals().items()})
            probe.reset()
        found.append(values)
    for first, second in zip(*found, strict=True):
        same(first, second, 1e-6 if kind == "others" else 1e-12)  # float32 sums keep fewer digits


@pytest.mark.parametrize("mean", [0.0, 1e8])
def test_a_window_holds_its_own_rows_and_the_probe_all(mean):
    model, rows = identity(), batches(mean)
    probe = LayerProbe(model, [CovarianceMetric()])
    probe._windows.open("a", "train")
    probe._windows.open("b", "train")

    def covariance(some):
        rows = torch.cat(some)
        centred = rows - rows.mean(0)
        return centred.T @ centred / len(rows)

    since = {"a": 0, "b": 0}
    for number, batch in enumerate(rows):
        model(batch)
        for reader, every in {"a": 4, "b": 7}.items():
            if number % every == every - 1:
                with probe._only(reader, "train"):
                    window = probe.compute()["covariance/train/0"]
                torch.testing.assert_close(
                    window, covariance(rows[since[reader] : number + 1]), rtol=1e-7, atol=1e-7
                )
                probe._windows.advance(reader, "train")
                since[reader] = number + 1
                whole = probe.compute()["covariance/train/0"]
                torch.testing.assert_close(whole, covariance(rows[: number + 1]), rtol=1e-7, atol=1e-7)
    assert all(len(window._pieces) <= 2 for window in probe._windows._windows.values())


def test_the_moments_at_a_large_mean_are_those_without_to_the_last_digits():
    found = []
    for monitors in (False, True):
        model = identity()
        probe = LayerProbe(model, [CovarianceMetric(), HistoryMetric()])
        monitor = Monitor(probe, every=3, on_alarm=lambda alarm: None) if monitors else None
        for batch in batches(1e8):
            model(batch)
            if monitor:
                monitor.step()
        found.append(probe.compute("train")["covariance/train/0"])
    rows = torch.cat(batches(1e8))
    centred = rows - rows.mean(0)
    truth = centred.T @ centred / len(rows)
    scale = float(truth.abs().max())
    assert float((found[0] - found[1]).abs().max()) <= 1e-13 * scale * 10
    assert float((found[1] - truth).abs().max()) <= 1e-6 * scale  # the reference itself has lost digits


def test_a_window_goes_on_over_a_reset_and_a_layer_with_few_rows_is_carried_on():
    model = network()
    probe = LayerProbe(model, [CovarianceMetric()])
    probe._windows.open("a", "train")
    for number, batch in enumerate(batches(count=6)):
        model(batch)
        if number == 2:
            probe.reset()
    assert probe["train", "0"]["covariance"].count == 120
    (first, _), (second, _) = read_window(probe, "train", "a")
    assert (first.observations, second.observations) == (240, 240)
    probe._windows.advance("a", "train", ["0"])
    model(batches(count=1)[0])
    (first, _), (second, _) = read_window(probe, "train", "a")
    assert (first.observations, second.observations) == (40, 280)


def test_whoever_looks_sees_everything():
    def counts(probe, other=None):
        yield int(probe["train", "0"]["covariance"].count)
        yield int(probe.sums("train", "0")[0].num_observations)
        yield probe.summary("train").rows[0].observations
        yield int(copy.deepcopy(probe)["train", "0"]["covariance"].count)
        yield int(probe.state_dict()["metrics.train/0.covariance.count"])
        with probe.merged():
            merged = int(probe["train", "0"]["covariance"].count)
        yield merged
        yield int(next(iter(dict(probe.iter_merged("train")).values()))[0].num_observations)
        twin = LayerProbe(network(), [CovarianceMetric()])
        twin.merge_state(probe)
        yield int(twin["train", "0"]["covariance"].count)
        twin = LayerProbe(network(), [CovarianceMetric()])
        twin.sharded().load_state_dict(probe.sharded().state_dict())
        yield int(twin["train", "0"]["covariance"].count)
        probe.to("cpu")
        yield int(probe["train", "0"]["covariance"].count)

    model = network()
    probe = LayerProbe(model, [CovarianceMetric()])
    probe.persistent()
    probe._windows.open("a", "train")
    seen, total = counts(probe), 0
    for batch in batches():
        model(batch)
        total += 40
        if (count := next(seen, None)) is None:
            break
        assert count == total
        probe._windows.advance("a", "train")


def test_saved_in_the_middle_of_a_window_and_resumed():
    whole = network()
    reference = LayerProbe(whole, [SaturationMetric(), CovarianceMetric(), HistoryMetric()])
    for batch in batches():
        whole(batch)
    first = network()
    probe = LayerProbe(first, [SaturationMetric(), CovarianceMetric()])
    probe.persistent()
    monitor = Monitor(probe, every=4, on_alarm=lambda alarm: None)
    for batch in batches()[:10]:
        first(batch)
        monitor.step()
    state = copy.deepcopy(probe.state_dict())
    second = network()
    again = LayerProbe(second, [SaturationMetric(), CovarianceMetric()])
    again.persistent()
    resumed = Monitor(again, every=4, on_alarm=lambda alarm: None)
    again.load_state_dict(state)
    for batch in batches()[10:]:
        second(batch)
        resumed.step()
    same(
        {k: v for k, v in reference.compute().items() if "history" not in k},
        {k: v for k, v in again.compute().items() if "history" not in k},
    )
    assert again._remembered["monitor/train"]["step"] == 23
    assert [row.step for row in again.history().rows if row.layer == "0"] == list(range(23))


def test_memory_is_the_sums_twice_while_a_window_is_open():
    model = nn.Sequential(nn.Linear(64, 128, bias=False)).double()
    probe = LayerProbe(model, [CovarianceMetric()])
    probe._windows.open("a", "train")
    for number in range(12):
        model(torch.randn(200, 64, dtype=torch.float64))
        if number % 4 == 3:
            probe.compute()
            probe._windows.advance("a", "train")
    (window,) = [each for each in probe._windows._windows.values() if each._place.stage == "train"]
    model(torch.randn(200, 64, dtype=torch.float64))
    held = [tensor for _, state, _ in window._earlier for tensor in state.values()]
    held += [tensor for piece in window._pieces for _, state, _ in piece for tensor in state.values()]
    matrices = [tensor for tensor in held if torch.is_tensor(tensor) and tensor.numel() >= 128 * 128]
    assert len(matrices) == 1
