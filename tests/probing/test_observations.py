import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from spectralmetrics import LayerProbe
from spectralmetrics.functional import Observations
from spectralmetrics.probing.outputs import first_tensor
from spectralmetrics.probing.parts import Part
from spectralmetrics.probing.rules import ObservationRule
from spectralmetrics.probing.sampling import draw

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def observe(module, output, mask=None, **settings):
    rule = ObservationRule(**settings)
    observations = rule.batch(module, output, mask).observations(rule)
    rows = observations.rows()
    return rows if observations.valid is None else rows[observations.valid]


def sets_of_rows_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


class TestMaps:
    @pytest.mark.parametrize("rank", [1, 2, 3])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_every_reduction_against_plain_indexing(self, rank, layout):
        maps = torch.randn(3, 4, *(5, 2, 3)[:rank])
        if layout == "channels_last":
            maps = maps.movedim(1, -1).contiguous().movedim(-1, 1)
        module = CONVOLUTIONS[rank](4, 4, 1)
        positions = [index.tolist() for index in torch.ones(maps.shape[2:]).nonzero()]
        at = [torch.stack([maps[(n, slice(None), *p)] for p in positions]) for n in range(3)]
        sets_of_rows_equal(observe(module, maps), torch.cat(at))
        sets_of_rows_equal(observe(module, maps, feature_maps="mean"), torch.stack([x.mean(0) for x in at]))
        sets_of_rows_equal(
            observe(module, maps, feature_maps="max"), torch.stack([x.max(0).values for x in at])
        )
        sets_of_rows_equal(
            observe(module, maps, feature_maps="median"), torch.stack([x.median(0).values for x in at])
        )
        sets_of_rows_equal(
            observe(module, maps, feature_maps="flatten"), torch.stack([x.T.flatten() for x in at])
        )

    @pytest.mark.parametrize("rank", [2, 3])
    def test_large_maps_are_interpolated_down(self, rank):
        maps = torch.randn(2, 3, *(40, 6, 9)[:rank])
        mode = {2: "bilinear", 3: "trilinear"}[rank]
        size = [min(extent, 8) for extent in maps.shape[2:]]
        expected = nn.functional.interpolate(maps, size, mode=mode).movedim(1, -1).reshape(-1, 3)
        module = CONVOLUTIONS[rank](3, 3, 1)
        sets_of_rows_equal(observe(module, maps, max_map_size=8), expected)
        assert len(observe(module, maps, max_map_size=None)) == maps.numel() // 3
        nearest = nn.functional.interpolate(maps, size, mode="nearest").movedim(1, -1).reshape(-1, 3)
        sets_of_rows_equal(observe(module, maps, max_map_size=8, interpolation="nearest"), nearest)
        assert len(observe(module, maps, max_map_size=8, interpolation="area")) == len(expected)
        cubic = "bicubic" if rank == 2 else mode
        expected = nn.functional.interpolate(maps, size, mode=cubic).movedim(1, -1).reshape(-1, 3)
        sets_of_rows_equal(observe(module, maps, max_map_size=8, interpolation="bicubic"), expected)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    @pytest.mark.parametrize("how", ["mean", "max", "median"])
    def test_maps_are_pooled_as_they_are(self, how, rank):
        """Interpolation before would lose the maximum: one position in a hundred would be averaged away."""
        maps = torch.randn(2, 3, *(60, 7, 5)[:rank])
        maps[(..., *(3,) * rank)] = 50.0
        flat = maps.flatten(2)
        pooled = {"mean": flat.mean(2), "max": flat.amax(2), "median": flat.median(2).values}
        for settings in ({"max_map_size": 4}, {"max_map_size": None}, {"interpolation": "nearest"}):
            rows = observe(CONVOLUTIONS[rank](3, 3, 1), maps, feature_maps=how, **settings)
            torch.testing.assert_close(rows, pooled[how], rtol=1e-6, atol=1e-6)

    def test_maps_of_which_positions_are_kept_are_shrunk(self):
        maps = torch.randn(2, 3, 60, 7)
        small = nn.functional.interpolate(maps, (8, 7), mode="bilinear")
        sets_of_rows_equal(
            observe(nn.Conv2d(3, 3, 1), maps, max_map_size=8, feature_maps="flatten"), small.flatten(1)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("positions", [1, 2, 5, 6, 49])
    def test_the_median_is_that_of_torch_without_its_kernel(self, positions, dtype, monkeypatch):
        """`torch.median` with indices has no deterministic kernel on CUDA."""
        maps = torch.randn(5, 4, positions, 1).to(dtype)
        maps[0, 0, 0] = torch.nan
        maps[1, 1] = torch.inf
        maps[2, 2, 0] = -torch.inf
        expected = maps.flatten(2).median(2).values

        def refuse(*args, **kwargs):
            raise RuntimeError("median CUDA with indices output does not have a deterministic implementation")

        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            for name in ("median", "nanmedian", "kthvalue"):
                monkeypatch.setattr(torch, name, refuse)
                monkeypatch.setattr(torch.Tensor, name, refuse)
            rows = observe(nn.Conv2d(4, 4, 1), maps, feature_maps="median")
        finally:
            torch.use_deterministic_algorithms(before)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0, equal_nan=True)
        assert rows[0, 0].isnan()

    def test_small_maps_are_left_alone(self):
        maps = torch.randn(2, 3, 32, 5)
        sets_of_rows_equal(observe(nn.Conv2d(1, 3, 1), maps), maps.movedim(1, -1).reshape(-1, 3))

    def test_half_precision_is_reduced_in_full(self):
        maps = (torch.randn(2, 3, 50, 50) + 100).to(torch.bfloat16)
        mean = observe(nn.Conv2d(1, 3, 1), maps, feature_maps="mean", max_map_size=None)
        torch.testing.assert_close(mean, maps.float().mean((2, 3)), rtol=1e-6, atol=0)
        assert observe(nn.Conv2d(1, 3, 1), maps, max_map_size=8).dtype == torch.float32

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_unbatched(self, rank):
        single = torch.randn(4, *(5, 2, 3)[:rank])
        module = CONVOLUTIONS[rank](4, 4, 1)
        sets_of_rows_equal(observe(module, single), observe(module, single[None]))

    def test_linear_layers_on_maps_keep_features_last(self):
        output = torch.randn(2, 5, 6, 3)  # (N, H, W, C)
        sets_of_rows_equal(observe(nn.Linear(3, 3), output), output.reshape(-1, 3))
        sets_of_rows_equal(observe(nn.Linear(3, 3), output, feature_maps="mean"), output.mean((1, 2)))

    @pytest.mark.parametrize(
        "module",
        [
            nn.GroupNorm(2, 6),
            nn.SyncBatchNorm(6),
            nn.PReLU(6),
            nn.Dropout1d(),
            nn.LPPool1d(2, 1),
            nn.ZeroPad1d(1),
            nn.Upsample(9),
            nn.Sequential(nn.Sequential(nn.Conv1d(3, 6, 1), nn.ReLU()), nn.Dropout()),
        ],
        ids=lambda module: type(module).__name__,
    )
    def test_channels_are_the_second_dimension(self, module):
        assert observe(module, torch.randn(5, 6, 9)).shape == (45, 6)

    @pytest.mark.parametrize(
        "module", [nn.LayerNorm(6), nn.RMSNorm(6), nn.Bilinear(3, 3, 6), nn.Embedding(2, 6)]
    )
    def test_features_are_the_last_dimension(self, module):
        assert observe(module, torch.randn(5, 3, 4, 6)).shape == (60, 6)
        assert observe(module, torch.randn(5, 3, 6)).shape == (15, 6)

    def test_a_norm_of_channels_first_maps(self):
        class LayerNorm2d(nn.LayerNorm):  # as in ConvNeXt
            def forward(self, x):
                return super().forward(x.movedim(1, -1)).movedim(-1, 1)

        assert observe(LayerNorm2d(6), torch.randn(5, 6, 4, 3)).shape == (60, 6)

    def test_what_else_yields_maps(self):
        maps = torch.randn(2, 3, 4)
        for module in (nn.BatchNorm1d(3), nn.MaxPool1d(2), nn.Sequential(nn.ReLU(), nn.Conv1d(3, 3, 1))):
            assert observe(module, maps).shape == (8, 3)
        assert observe(nn.ReLU(), torch.randn(2, 3, 4, 5)).shape == (40, 3)
        assert observe(nn.BatchNorm1d(3), torch.randn(7, 3)).shape == (7, 3)


class TestSequences:
    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize(("num_layers", "bidirectional"), [(1, False), (3, True)])
    def test_recurrent_layers(self, kind, batch_first, num_layers, bidirectional):
        module = kind(4, 5, num_layers, batch_first=batch_first, bidirectional=bidirectional)
        output = module(torch.randn(2, 6, 4) if batch_first else torch.randn(6, 2, 4))
        samples = output[0] if batch_first else output[0].transpose(0, 1)  # (N, T, D)
        width = 10 if bidirectional else 5
        sets_of_rows_equal(observe(module, output), samples.reshape(-1, width))
        sets_of_rows_equal(observe(module, output, sequences="last"), samples[:, 5])
        sets_of_rows_equal(observe(module, output, sequences="mean"), samples.mean(1))
        sets_of_rows_equal(observe(module, output, sequences="flatten"), samples.reshape(2, -1))

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_packed_sequences_count_valid_steps_only(self, batch_first):
        module = nn.LSTM(4, 5, batch_first=batch_first)
        parts = [torch.randn(length, 4) for length in (3, 6, 1)]
        packed = pack_sequence(parts, enforce_sorted=False)
        output = module(packed)
        each = [module(part)[0] for part in parts]
        rows = observe(module, output)
        assert rows.shape == (10, 5)
        sets_of_rows_equal(rows, torch.cat(each))
        sets_of_rows_equal(observe(module, output, sequences="last"), torch.stack([x[-1] for x in each]))
        sets_of_rows_equal(observe(module, output, sequences="mean"), torch.stack([x.mean(0) for x in each]))
        padded = nn.utils.rnn.pad_sequence(each, batch_first=True)
        sets_of_rows_equal(observe(module, output, sequences="flatten"), padded.flatten(1))

    def test_packed_and_padded_input_agree(self):
        module = nn.GRU(4, 5, batch_first=True)
        lengths = torch.tensor([5, 2])
        packed = pack_padded_sequence(torch.randn(2, 5, 4), lengths, batch_first=True)
        assert observe(module, module(packed)).shape == (7, 5)

    @pytest.mark.parametrize("module", [nn.Linear(3, 3), nn.LSTM(3, 3, batch_first=True), nn.LSTM(3, 3)])
    def test_masks(self, module):
        samples = torch.randn(3, 5, 3)
        mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
        output = samples if getattr(module, "batch_first", True) else samples.transpose(0, 1)
        sets_of_rows_equal(observe(module, output, mask), samples[mask])
        expected = torch.stack([samples[0, 2], samples[1, 3]])
        sets_of_rows_equal(observe(module, output, mask, sequences="last"), expected)
        expected = torch.stack([samples[0, :3].mean(0), samples[1, [1, 3]].mean(0)])
        sets_of_rows_equal(observe(module, output, mask, sequences="mean"), expected)
        expected = torch.where(mask[:, :, None], samples, 0)[:2].flatten(1)
        sets_of_rows_equal(observe(module, output, mask, sequences="flatten"), expected)

    def test_masked_steps_may_hold_anything(self):
        samples = torch.randn(2, 3, 4)
        samples[0, 2] = torch.nan
        mask = torch.tensor([[True, True, False], [True, True, True]])
        for how in ("timesteps", "last", "mean", "flatten"):
            assert observe(nn.Linear(4, 4), samples, mask, sequences=how).isfinite().all()

    def test_time_first_transformers(self):
        layer = nn.TransformerEncoderLayer(6, 2, 8)
        output = torch.randn(7, 4, 6)  # (T, N, D)
        for module in (
            layer,
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
            nn.MultiheadAttention(6, 2),
        ):
            sets_of_rows_equal(observe(module, output, sequences="last"), output[-1])
        mask = torch.rand(4, 7) > 0.5
        sets_of_rows_equal(observe(layer, output, mask), output.transpose(0, 1)[mask])
        # A linear layer inside has no layout; the mask decides, unless T = N.
        sets_of_rows_equal(observe(nn.Linear(6, 6), output, mask), output.transpose(0, 1)[mask])

    @pytest.mark.filterwarnings("ignore:.*nested tensors")
    def test_nested_tensors(self):
        parts = [torch.randn(length, 4) for length in (3, 6, 1)]
        for layout in (torch.strided, torch.jagged):
            nested = torch.nested.nested_tensor(parts, layout=layout)
            sets_of_rows_equal(observe(nn.Linear(4, 4), nested), torch.cat(parts))
            expected = torch.stack([part[-1] for part in parts])
            sets_of_rows_equal(observe(nn.Linear(4, 4), nested, sequences="last"), expected)

    @pytest.mark.filterwarnings("ignore:.*nested tensors")
    @pytest.mark.parametrize("lengths", [(3, 6, 1), (5, 5)])
    def test_nested_tensors_whose_features_are_elsewhere(self, lengths):
        parts = [torch.randn(length, 4) for length in lengths]
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
        sets_of_rows_equal(observe(nn.Identity(), nested), torch.cat(parts))  # (N, D, T*)
        if len(set(lengths)) > 1:  # otherwise the ragged dimension is unknown
            nested = torch.nested.nested_tensor([part.T for part in parts])
            sets_of_rows_equal(observe(nn.Identity(), nested), torch.cat(parts))

    @pytest.mark.filterwarnings("ignore:.*nested tensors")
    def test_nested_tensors_of_four_dimensions(self):
        parts = [torch.randn(length, 2, 4) for length in (3, 6, 1)]
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
        expected = torch.cat(parts).flatten(0, 1)
        sets_of_rows_equal(observe(nn.Linear(4, 4), nested), expected)  # (N, T*, H, D)
        by_heads = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in parts])
        sets_of_rows_equal(observe(nn.Linear(4, 4), nested.transpose(1, 2)), by_heads)  # (N, H, T*, D)
        means = torch.stack([part.flatten(0, 1).mean(0) for part in parts])
        close = observe(nn.Linear(4, 4), nested, feature_maps="mean")
        torch.testing.assert_close(close, means)

    @pytest.mark.filterwarnings("ignore:.*nested tensors")
    def test_nested_tensors_that_are_no_sequences(self):
        with pytest.raises(ValueError, match=r"differ in one dimension, got shapes \[\(2, 3\), \(3, 2\)\]"):
            observe(nn.Linear(3, 3), torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(3, 2)]))
        with pytest.raises(ValueError, match=r"got samples of shapes \[\(2,\), \(3,\)\]"):
            observe(nn.Linear(3, 3), torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]))

    def test_masks_of_another_shape_do_not_apply(self):
        mask = torch.zeros(3, 4, dtype=torch.bool)
        assert len(observe(nn.Linear(3, 3), torch.randn(3, 5, 3), mask)) == 15
        assert len(observe(nn.Conv2d(1, 4, 1), torch.randn(3, 4, 2, 2), mask)) == 12

    def test_unbatched_and_vectors(self):
        assert observe(nn.LSTM(3, 4), torch.randn(6, 4)).shape == (6, 4)
        assert observe(nn.LSTM(3, 4), torch.randn(6, 4), sequences="last").shape == (1, 4)
        assert observe(nn.Linear(3, 4), torch.randn(4)).shape == (1, 4)
        assert observe(nn.MultiheadAttention(4, 1), torch.randn(6, 4), sequences="last").shape == (1, 4)


class Pair(NamedTuple):
    ids: torch.Tensor
    hidden: torch.Tensor


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    ids: torch.Tensor
    hidden: torch.Tensor


class TestNests:
    def test_a_nest_that_holds_itself(self):
        ring = {"ids": torch.zeros(2, dtype=torch.int64)}
        ring["ring"] = [ring]
        assert first_tensor(ring) is None
        ring["rows"] = torch.ones(2, 3)
        assert torch.equal(first_tensor(ring), torch.ones(2, 3))
        shared = [torch.zeros(1, dtype=torch.int64)]
        assert first_tensor([shared, shared, torch.ones(3)]) is not None  # the same list twice is no cycle

    ids, hidden = torch.arange(3), torch.randn(2, 4)

    @pytest.mark.parametrize(
        "nest",
        [
            (ids, (None, hidden), torch.zeros(1)),
            [ids, hidden],
            {"ids": ids, "inner": {"hidden": hidden}},
            collections.OrderedDict(hidden=hidden),
            Pair(ids, hidden),
            Output(None, ids, hidden),
        ],
        ids=lambda nest: type(nest).__name__,
    )
    def test_the_first_floating_tensor(self, nest):
        assert first_tensor(nest) is self.hidden

    def test_nothing_to_observe(self):
        for nothing in (None, "text", 3, self.ids, (self.ids, [None]), {}):
            assert first_tensor(nothing) is None
        with pytest.raises(ValueError, match="floating tensor in the output, got dict"):
            observe(nn.Identity(), {"ids": self.ids})
        with pytest.raises(ValueError, match="got a scalar"):
            observe(nn.Identity(), torch.tensor(1.0))


class TestDraw:
    def test_number_and_reproducibility(self):
        observations = Observations(torch.arange(1000.0)[:, None])
        drawn = draw(observations, 37, seed=5).values[:, 0]
        assert len(drawn.unique()) == 37
        assert torch.equal(drawn, draw(observations, 37, seed=5).values[:, 0])
        assert not torch.equal(drawn, draw(observations, 37, seed=6).values[:, 0])
        assert draw(observations, 1000, seed=0) is observations

    @pytest.mark.parametrize(
        ("total", "number"),
        [
            (53, 10),
            (7, 5),
            (3, 1),
            *(pytest.param(*case, marks=pytest.mark.long) for case in [(10, 3), (100, 99), (1234, 700)]),
        ],
    )
    def test_none_twice_and_all_with_the_same_chance(self, total, number):
        observations = Observations(torch.arange(float(total))[:, None])
        counts, repeats = torch.zeros(total), 4000
        for seed in range(repeats):
            drawn = draw(observations, number, seed).values[:, 0].long()
            assert len(drawn.unique()) == number
            counts[drawn] += 1
        chance = number / total
        deviation = (repeats * chance * (1 - chance)) ** 0.5
        assert (counts - repeats * chance).abs().max() < 5 * deviation

    def test_maps_are_drawn_by_position(self):
        maps = torch.randn(4, 3, 5, 6)
        drawn = draw(Observations(maps, feature_dim=1), 20, seed=0).rows()
        rows = maps.movedim(1, -1).reshape(-1, 3)
        assert all((rows == row).all(1).any() for row in drawn)
        assert len(drawn.unique(dim=0)) == 20

    def test_the_global_state_is_left_alone(self):
        before = torch.get_rng_state()
        draw(Observations(torch.randn(100, 2, generator=torch.Generator())), 5, seed=0)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("feature_maps", "sum"), ("sequences", "first"), ("interpolation", "cubic"), ("max_map_size", 0)],
)
def test_bad_settings_are_quoted(setting, value):
    with pytest.raises(ValueError, match=f"{setting}.*got {value!r}"):
        ObservationRule(**{setting: value})


def test_which_outputs_concern_a_process_that_observes_nothing():
    meshes = LayerProbe(nn.Linear(3, 2))._router.meshes
    values = torch.ones(4, 3)
    assert not meshes.concerns(values)
    assert not meshes.concerns((values, [values]))
    assert meshes.concerns(Part(values, (4, 6), (6, 1), ()))
    meshes.active = True  # if some layer is shared, any may be
    assert meshes.concerns(values)


def test_a_guess_names_the_size_that_is_taken():
    class Odd(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(Odd())
    probe = LayerProbe(model, layers=[Odd])
    with pytest.warns(
        UserWarning, match=r"the feature dimension of '0' is unknown: dimension 2 of 3, of size 6, is used"
    ):
        model(torch.randn(4, 5, 6))
    assert probe["train", "0"]["saturation"].num_features == 6
