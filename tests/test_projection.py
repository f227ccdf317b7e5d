import copy
import io

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from spectralmetrics import (
    CovarianceMetric,
    LayerProbe,
    PCAProjection,
    SaturationMetric,
    insert_projections,
    randomize_projections,
    set_projection_threshold,
)
from spectralmetrics import functional as F  # noqa: N812

WIDTH = 6
# name -> (shape of the input, dim)
LAYOUTS = {
    "vectors": ((400, WIDTH), 1),
    "tokens": ((20, 20, WIDTH), -1),
    "series": ((20, WIDTH, 20), 1),
    "maps": ((16, WIDTH, 5, 5), 1),
    "volumes": ((4, WIDTH, 5, 5, 4), 1),
}


def correlated(shape, dim, mean=0.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*(s for i, s in enumerate(shape) if i != dim % len(shape)), WIDTH, generator=generator)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, WIDTH)
    return (rows.double() @ mix.T.double() + mean).to(dtype).movedim(-1, dim)


def as_rows(values, dim):
    return values.detach().movedim(dim, -1).reshape(-1, values.shape[dim]).double().numpy()


def trained(shape=(400, WIDTH), dim=1, mean=0.0, dtype=torch.float64, **options):
    values = correlated(shape, dim, mean, dtype)
    projection = PCAProjection(WIDTH, dim=dim, **options)
    for part in values.split(max(1, shape[0] // 3)):
        assert projection(part) is part
    return projection.eval(), values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.0, pytest.param(5.0, marks=pytest.mark.long), 1e6])
@pytest.mark.parametrize(
    "threshold",
    [pytest.param(0.3, marks=pytest.mark.long), 0.6, pytest.param(0.9, marks=pytest.mark.long), 0.99, 1.0],
)
class TestSubspace:
    def test_what_is_left_behind(self, layout, mean, threshold):
        shape, dim = LAYOUTS[layout]
        projection, values = trained(shape, dim, mean, threshold=threshold)
        result = projection(values)
        assert result.shape == values.shape
        assert result.dtype == values.dtype
        rows, projected = as_rows(values, dim), as_rows(result, dim)
        variance = ((rows - rows.mean(0)) ** 2).sum()
        left = ((rows - projected) ** 2).sum() / variance
        assert left <= 1 - threshold + 1e-9
        np.testing.assert_allclose(projected.mean(0), rows.mean(0), rtol=1e-9, atol=1e-9)
        # The rank is the intrinsic dimension; one direction fewer would leave out too much.
        eigenvalues = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
        rank = int(F.intrinsic_dimension(torch.from_numpy(eigenvalues.copy()), threshold))
        assert projection.rank == rank
        scale = np.abs(eigenvalues).max()
        assert np.linalg.matrix_rank(np.cov(projected.T), tol=1e-7 * scale, hermitian=True) == rank
        if rank > 1:
            assert eigenvalues[rank - 1 :].sum() / eigenvalues.sum() > 1 - threshold

    def test_twice_changes_nothing(self, layout, mean, threshold):
        shape, dim = LAYOUTS[layout]
        projection, values = trained(shape, dim, mean, threshold=threshold)
        once = projection(values)
        torch.testing.assert_close(projection(once), once, rtol=1e-12, atol=1e-9)

    def test_equals_that_of_scikit_learn(self, layout, mean, threshold):
        shape, dim = LAYOUTS[layout]
        projection, values = trained(shape, dim, mean, threshold=threshold)
        rows = as_rows(values, dim)
        peer = PCA(n_components=projection.rank, svd_solver="full").fit(rows)
        expected = peer.inverse_transform(peer.transform(rows))
        np.testing.assert_allclose(as_rows(projection(values), dim), expected, rtol=1e-9, atol=1e-8)

    def test_coordinates(self, layout, mean, threshold):
        shape, dim = LAYOUTS[layout]
        projection, values = trained(shape, dim, mean, threshold=threshold, keep_dim=False)
        result = projection(values)
        assert result.shape[dim] == projection.rank
        assert [s for i, s in enumerate(result.shape) if i != dim % values.ndim] == [
            s for i, s in enumerate(shape) if i != dim % values.ndim
        ]
        coordinates = as_rows(result, dim)
        covariance = np.cov(coordinates.T, bias=True).reshape(projection.rank, projection.rank)
        eigenvalues = projection.spectrum().eigenvalues[: projection.rank].numpy()
        np.testing.assert_allclose(covariance, np.diag(eigenvalues), atol=1e-8 * eigenvalues[0])
        np.testing.assert_allclose(coordinates.mean(0), 0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_dim", [True, False])
def test_lower_precision_follows_float64(dtype, keep_dim):
    exact, _ = trained(mean=2.0, threshold=0.9, keep_dim=keep_dim)
    projection, values = trained(mean=2.0, dtype=dtype, threshold=0.9, keep_dim=keep_dim)
    result = projection(values)
    assert result.dtype == dtype
    error = (result.double() - exact(values.double())).abs().max()
    assert error < 8 * torch.finfo(dtype).eps * values.abs().max()


def test_autocast_does_not_lower_it():
    projection, values = trained(dtype=torch.float32, threshold=0.9)
    plain = projection(values)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projection(values), plain)


def test_without_centre():
    projection, values = trained(mean=5.0, threshold=0.9, center=False)
    left = (values - projection(values)).square().sum() / values.square().sum()
    assert left <= 0.1
    assert projection.rank == 1  # the mean alone
    moments = values.T @ values
    vector = torch.linalg.eigh(moments).eigenvectors[:, -1:]
    torch.testing.assert_close(projection(values), values @ vector @ vector.T)


def test_a_single_row_is_data():
    row = torch.tensor([[1.0, -2.0, 3.0]])
    projection = PCAProjection(3)
    projection(row)
    assert torch.equal(projection.eval()(row + 1), row)
    assert projection.rank == 0


def test_what_one_process_has_seen_is_not_said_to_be_that_of_several():
    projection, values = trained()
    projection(values)
    assert projection.state_dict()["_extra_state"]["is_merged"] is False


def test_constant_features_are_projected_onto_their_mean():
    projection = PCAProjection(WIDTH)
    projection(torch.full((8, WIDTH), 3.0))
    projection.eval()
    assert projection.rank == 0
    assert torch.equal(projection(torch.randn(2, WIDTH)), torch.full((2, WIDTH), 3.0))


def test_all_directions_return_the_input_itself():
    projection, values = trained(threshold=1.0)
    assert projection(values) is values


def test_layouts_of_memory():
    shape, dim = LAYOUTS["maps"]
    projection, values = trained(shape, dim, threshold=0.9)
    values = values.contiguous()
    expected = projection(values)
    assert expected.is_contiguous()
    last = projection(values.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(projection(values.transpose(2, 3)), expected.transpose(2, 3))


def test_gradients_flow_and_training_is_untouched():
    projection, values = trained(threshold=0.5)
    with torch.inference_mode():
        projection(values)  # its tensors must work with gradients, too
    values = values.clone().requires_grad_()
    projection(values).square().sum().backward()
    assert np.linalg.matrix_rank(values.grad.numpy(), tol=1e-6) <= projection.rank + 1
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 2))
    projected = nn.Sequential(plain[0], PCAProjection(WIDTH), *plain[1:])
    x = torch.randn(8, 4)
    grads = []
    for model in (plain, projected):
        model.zero_grad()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class TestThreshold:
    def test_takes_effect_without_new_data(self):
        model = nn.Sequential(PCAProjection(WIDTH), nn.Identity(), PCAProjection(WIDTH))
        values = correlated((300, WIDTH), 1)
        model(values)
        model.eval()
        for threshold in (1.0, 0.6, 0.9, 0.3):
            rows = set_projection_threshold(model, threshold)
            alone, _ = trained((300, WIDTH), threshold=threshold)
            assert [tuple(row) for row in rows] == [
                (name, alone.rank, WIDTH, alone.rank / WIDTH) for name in ("0", "2")
            ]
            torch.testing.assert_close(model(values), alone(alone(values)))

    def test_before_any_data_it_says_what_to_do(self):
        model = nn.Sequential(PCAProjection(WIDTH), PCAProjection(None))
        with pytest.raises(RuntimeError, match=r"no projection .* has seen data.*collect\(\)"):
            set_projection_threshold(model, 0.5)
        assert [projection.threshold for projection in model] == [0.99, 0.99]
        model[1](correlated((300, WIDTH), 1))
        rows = set_projection_threshold(model, 0.5)
        rank = trained((300, WIDTH), threshold=0.5)[0].rank
        assert rows == [("0", None, WIDTH, None), ("1", rank, WIDTH, rank / WIDTH)]

    def test_reading_in_the_middle_of_training_disturbs_nothing(self):
        values = correlated((300, WIDTH), 1)
        model = nn.Sequential(PCAProjection(WIDTH))
        model(values[:100])
        set_projection_threshold(model, 0.9)
        model(values[100:])
        expected = CovarianceMetric()
        expected.update(values)
        torch.testing.assert_close(model[0].spectrum().covariance, expected.compute())

    def test_those_of_numpy(self):
        projection, values = trained(threshold=np.float32(0.5))
        file = io.BytesIO()
        torch.save(projection.state_dict(), file)
        file.seek(0)
        fresh = PCAProjection(WIDTH)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert fresh.threshold == 0.5
        set_projection_threshold(projection, np.float64(1.0))
        assert projection(values) is values

    @pytest.mark.parametrize("wrong", [0.0, 1.1, float("nan"), "high"])
    def test_wrong_ones(self, wrong):
        projection, values = trained(threshold=0.9)
        before = projection(values)
        for change in (
            lambda: PCAProjection(3, wrong),
            lambda: setattr(projection, "threshold", wrong),
            lambda: set_projection_threshold(projection, wrong),
            lambda: insert_projections(nn.Sequential(nn.Linear(2, 2)), threshold=wrong),
        ):
            with pytest.raises((ValueError, TypeError), match=str(wrong)):
                change()
        assert torch.equal(projection(values), before)

    def test_a_model_without_projections(self):
        for function in (lambda m: set_projection_threshold(m, 0.5), randomize_projections):
            with pytest.raises(ValueError, match="got Linear without any"):
                function(nn.Linear(2, 2))


class TestRandom:
    def test_same_rank_other_directions(self):
        projection, values = trained(threshold=0.9)
        (row,) = randomize_projections(projection, torch.Generator().manual_seed(0))
        assert row == ("", projection.rank, WIDTH, projection.rank / WIDTH)
        result = projection(values)
        eigen, _ = trained(threshold=0.9)
        assert projection.rank == eigen.rank
        centred = result - values.mean(0)
        assert torch.linalg.matrix_rank(centred, tol=1e-8) == eigen.rank
        torch.testing.assert_close(projection(result), result)
        torch.testing.assert_close(result.mean(0), values.mean(0))
        left = (values - result).square().sum() / (values - values.mean(0)).square().sum()
        assert left > 0.1
        set_projection_threshold(projection, 0.9)
        torch.testing.assert_close(projection(values), eigen(values))

    def test_generator(self):
        projection, values = trained(threshold=0.9)
        results = []
        for seed in (0, 0, 1):
            randomize_projections(projection, torch.Generator().manual_seed(seed))
            results.append(projection(values))
        assert torch.equal(results[0], results[1])
        assert not torch.allclose(results[0], results[2])
        before = torch.random.get_rng_state()
        randomize_projections(projection, torch.Generator().manual_seed(0))
        assert torch.equal(torch.random.get_rng_state(), before)
        randomize_projections(projection)
        assert not torch.equal(torch.random.get_rng_state(), before)

    def test_directions_are_uniform(self):
        """For a random plane in six dimensions, a fixed direction keeps a third of its square on average."""
        projection, _ = trained(threshold=0.9)
        rank = projection.rank
        generator = torch.Generator().manual_seed(0)
        direction = torch.eye(WIDTH, dtype=torch.float64)
        kept = []
        for _ in range(300):
            projection.randomize(generator)
            mean = projection.spectrum().mean
            kept.append((projection(direction + mean) - mean).square().sum(1))
        average = torch.stack(kept).mean(0)
        torch.testing.assert_close(average, torch.full((WIDTH,), rank / WIDTH).double(), atol=0.06, rtol=0)

    def test_before_any_data_nothing_changes(self):
        model = nn.Sequential(trained(threshold=0.5)[0], PCAProjection(WIDTH))
        with pytest.raises(RuntimeError, match="has seen no training data"):
            randomize_projections(model)
        assert model[0]._random is None


class TestState:
    @pytest.mark.parametrize("randomized", [False, True])
    def test_round_trip_into_a_fresh_network(self, randomized):
        projection, values = trained(threshold=0.7, mean=5.0)
        if randomized:
            randomize_projections(projection, torch.Generator().manual_seed(0))
        file = io.BytesIO()
        torch.save(nn.Sequential(projection).state_dict(), file)
        file.seek(0)
        fresh = nn.Sequential(PCAProjection(WIDTH))
        fresh.load_state_dict(torch.load(file, weights_only=True))
        fresh.eval()
        assert fresh[0].threshold == 0.7
        assert torch.equal(fresh(values), projection(values))

    def test_loading_replaces_what_was_there(self):
        projection, values = trained(threshold=0.7)
        other = PCAProjection(WIDTH, threshold=0.2)
        other(torch.randn(50, WIDTH).double())
        other.eval()(values)
        other.load_state_dict(projection.state_dict())
        assert torch.equal(other(values), projection(values))

    def test_resumed_training_starts_anew_after_an_evaluation_and_goes_on_before_one(self):
        values = correlated((300, WIDTH), 1)
        for evaluated in (False, True):
            first = PCAProjection(WIDTH)
            first(values[:100])
            if evaluated:
                first.eval()
            second = PCAProjection(WIDTH)
            second.load_state_dict(first.state_dict())
            second(values[100:])
            assert int(second.covariance.count) == (200 if evaluated else 300)

    @pytest.mark.parametrize("evaluated", [False, True])
    def test_deep_copies_are_independent(self, evaluated):
        projection, values = trained(threshold=0.7)
        expected = projection(values)
        if not evaluated:
            projection.threshold = 0.7  # clears computed values
        twin = copy.deepcopy(projection)
        twin.threshold = 0.2
        twin.train()
        twin(torch.randn(50, WIDTH))
        assert torch.equal(projection(values), expected)
        assert torch.equal(copy.deepcopy(projection)(values), expected)

    def test_training_again_starts_a_new_covariance(self):
        projection, values = trained(threshold=0.7)
        projection(values)
        projection.train()
        assert projection.rank == trained(threshold=0.7)[0].rank  # until new data arrive
        other = torch.randn(100, WIDTH).double()
        projection(other[:50])
        projection.train()
        projection(other[50:])
        expected = CovarianceMetric()
        expected.update(other)
        torch.testing.assert_close(projection.eval().spectrum().covariance, expected.compute())

    def test_follows_the_model_but_not_its_dtype(self):
        projection, values = trained(threshold=0.7)
        projection.bfloat16()
        assert projection.covariance.second_moment.dtype == torch.float64
        assert list(projection.parameters()) == []
        assert projection(values).dtype == torch.float64


def test_where_features_are_is_asked_once():
    class Odd(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(Odd())
    insert_projections(model, layers=["0"])
    with pytest.warns(
        UserWarning, match="the feature dimension of '0' is unknown: dimension 2 of 3, of size 6, is used"
    ):
        model(torch.randn(4, 5, 6))
    model(torch.randn(4, 5, 6))  # a second warning would be an error


class TestErrors:
    def test_evaluation_before_any_training(self):
        with pytest.raises(RuntimeError, match="has seen no training data"):
            PCAProjection(WIDTH).eval()(torch.randn(2, WIDTH))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            (torch.zeros(4, 5), ValueError, "expected 6 features along dimension 1, got 5"),
            (torch.zeros(WIDTH), ValueError, r"has dimension 1, got shape \(6,\)"),
            (torch.zeros(4, WIDTH, dtype=torch.long), TypeError, "got torch.int64"),
            ([1.0], TypeError, "got list"),
        ],
    )
    def test_input(self, training, values, error, message):
        projection, good = trained()
        count = int(projection.covariance.count)
        projection.train(training)
        with pytest.raises(error, match=message):
            projection(values)
        assert int(projection.covariance.count) == count
        assert projection.eval()(good).shape == good.shape

    @pytest.mark.parametrize("dim", range(-3, 3))
    def test_every_dimension_there_is(self, dim):
        shape = [4, 5, 7]
        shape[dim] = WIDTH
        projection = PCAProjection(WIDTH, dim=dim)
        values = torch.randn(shape)
        assert projection(values) is values
        with pytest.raises(ValueError, match=rf"has dimension {dim}, got shape"):
            projection(values[(0,) * (3 - (-dim - 1 if dim < 0 else dim))])

    def test_rows_that_are_not_finite_are_left_out(self):
        values = correlated((100, WIDTH), 1)
        projection = PCAProjection(WIDTH, threshold=0.9)
        projection(torch.cat([values, torch.full((1, WIDTH), torch.nan).double()]))
        expected = PCAProjection(WIDTH, threshold=0.9)
        expected(values)
        torch.testing.assert_close(projection.eval()(values), expected.eval()(values))


def test_checkpointed_forwards_count_once():
    model = nn.Sequential(nn.Linear(4, WIDTH), PCAProjection(WIDTH))
    x = torch.randn(7, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert int(model[1].covariance.count) == 7


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x, _ = self.attend(x, x, x)
        x, (hidden, _) = self.lstm(x)
        return self.head(x), hidden


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )


class TestInsert:
    def test_leaves_no_trace(self):
        model = convolutional()
        before = {
            name: (dict(module.__dict__), list(module._forward_hooks)) for name, module in model.named_modules()
        }
        keys = list(model.state_dict())
        x = torch.randn(4, 1, 8, 8)
        expected = model.eval()(x)
        with insert_projections(model, layers=["0", "3", "5"], threshold=0.5) as projections:
            assert projections.layers == ["0", "3", "5"]
            assert all(isinstance(p, PCAProjection) for p in projections)
            assert [p.dim for p in projections] == [1, None, -1]
            model.train()(torch.randn(32, 1, 8, 8))
            model.eval()
            assert not torch.allclose(model(x), expected)
        assert {name for name, _ in model.named_modules()} == set(before)
        assert list(model.state_dict()) == keys
        for name, module in model.named_modules():
            attributes, hooks = before[name]
            assert set(module.__dict__) == set(attributes)
            assert list(module._forward_hooks) == hooks
        model[1].reset_running_stats()
        assert torch.equal(model(x), expected)

    def test_is_what_a_projection_behind_each_layer_does(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        twin = copy.deepcopy(model)
        by_hand = nn.Sequential(
            twin[0], PCAProjection(8, 0.8), twin[1], twin[2], twin[3], PCAProjection(4, 0.8, dim=-1)
        )
        insert_projections(model, [nn.Conv2d, nn.Linear], 0.8)
        data = torch.randn(40, 1, 8, 8)
        assert torch.equal(model(data), by_hand(data))
        torch.testing.assert_close(model.eval()(data), by_hand.eval()(data))
        rows = set_projection_threshold(model, 0.6)
        assert [row.name for row in rows] == ["0", "3"]  # the names that a probe uses
        assert [row.name for row in set_projection_threshold(by_hand, 0.6)] == ["1", "5"]
        assert [row[1:] for row in rows] == [row[1:] for row in set_projection_threshold(by_hand, 0.6)]

    def test_outputs_that_are_no_tensors(self):
        model = Tokens()
        projections = insert_projections(model, threshold=0.5, exclude="head")
        assert projections.layers == ["attend", "lstm"]
        insert_projections(model, "embed", 0.5)
        tokens = torch.randint(20, (16, 9))
        model(tokens)
        assert [p.num_features for p in projections] == [8, 5]
        assert int(projections[0].covariance.count) == 16 * 9
        output, hidden = model.eval()(tokens)
        assert output.shape == (16, 9, 3)
        assert hidden.shape == (1, 16, 5)
        states = projections[1].spectrum()
        assert projections[1].rank < 5
        assert states.num_features == 5

    def test_packed_sequences_count_valid_steps(self):
        class Packed(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(3, 4, batch_first=True)

            def forward(self, x, lengths):
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                return self.lstm(packed)[0]

        model = Packed()
        (projection,) = insert_projections(model, "lstm", 0.5)
        x, lengths = torch.randn(5, 6, 3), torch.tensor([6, 2, 3, 6, 1])
        model(x, lengths)
        assert int(projection.covariance.count) == 18
        output = model.eval()(x, lengths)
        assert isinstance(output, PackedSequence)
        torch.testing.assert_close(projection(output.data), output.data)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    def test_nested_tensors_count_valid_steps(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).eval()
        x, padding = torch.randn(8, 5, 16), torch.arange(5) >= torch.tensor([[3], [5], [5], [2]] * 2)
        with torch.no_grad():
            expected = model(x, src_key_padding_mask=padding)
            projections = insert_projections(model)
            with projections.collect():
                assert torch.equal(model(x, src_key_padding_mask=padding)[~padding], expected[~padding])
            assert {int(each.covariance.count) for each in projections} == {int((~padding).sum())}
            set_projection_threshold(model, 0.5)
            output = model(x, src_key_padding_mask=padding)
        padded = model(x, src_key_padding_mask=padding)  # with gradients, PyTorch keeps the padding
        assert not torch.allclose(output[~padding], expected[~padding], atol=0.1)
        torch.testing.assert_close(output[~padding], padded[~padding].detach())

    def test_outputs_of_transformers(self):
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        model = BertModel(config)
        projections = insert_projections(model, ["encoder.layer.?", "encoder"], 0.5)
        tokens = torch.randint(30, (6, 7))
        model(tokens)
        output = model.eval()(tokens).last_hidden_state
        torch.testing.assert_close(projections[-1](output), output, rtol=1e-4, atol=1e-4)
        assert len(projections) == 3

    def test_copies_and_states(self):
        model = convolutional()
        insert_projections(model, "0", 0.5)
        model(torch.randn(32, 1, 8, 8))
        x = torch.randn(4, 1, 8, 8)
        expected = model.eval()(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        fresh = convolutional()
        insert_projections(fresh, "0")
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.eval()(x), expected)

    def test_a_probe_beside_it(self):
        model = convolutional()
        insert_projections(model, "0", 0.5)
        probe = LayerProbe(model, SaturationMetric(threshold=1.0), layers="0")
        model(torch.randn(64, 1, 8, 8))
        model.eval()(torch.randn(64, 1, 8, 8))
        values = probe.compute()
        assert values["saturation/eval/0"] < values["saturation/train/0"]  # it sees what the next layer gets

    def test_errors(self):
        model = nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(2, 2)])})
        with pytest.raises(ValueError, match=r"got 'parts' \(ModuleList\)"):
            insert_projections(model, ["parts", nn.Linear])
        assert not any(isinstance(module, PCAProjection) for module in model.modules())
        insert_projections(model, nn.Linear)
        with pytest.raises(ValueError, match=r"'parts\.0' has one; remove it first"):
            insert_projections(model, nn.Linear)
        with pytest.raises(ValueError, match="no layer matches 'conv'"):
            insert_projections(model, "conv")


class Pair(nn.Module):
    def forward(self, x):
        return x[:, 0].long(), (x, x + 1)


@pytest.mark.parametrize(
    ("model", "shape", "part"),
    [
        (nn.Sequential(nn.Sequential(nn.LSTM(4, 6, batch_first=True))), (3, 5, 4), lambda out: out[0]),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 6), Pair())), (30, 4), lambda out: out[1][0]),
    ],
    ids=["recurrent", "nested"],
)
def test_a_sequence_of_modules_that_returns_a_tuple(model, shape, part):
    (projection,) = insert_projections(model, layers="0", threshold=0.5)
    x = torch.randn(shape)
    trained_on = part(model(x))
    assert int(projection.covariance.count) == trained_on[..., 0].numel()
    output = model.eval()(x)
    projected = part(output)
    assert type(output) is tuple
    assert not torch.allclose(projected, trained_on)
    expected = PCAProjection(6, 0.5, dim=-1)
    expected(trained_on)
    torch.testing.assert_close(projected, expected.eval()(trained_on))


class Mapping(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        found = {"ids": x[:, 0].long(), "kept": x}
        return found if self.kind == "last" else ({"ids": found["ids"]}, x)


@pytest.mark.parametrize(("kind", "part"), [("last", "kept"), ("beside", 1)])
def test_mappings_are_searched_for_the_first_floating_tensor(kind, part):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), Mapping(kind)))
    (projection,) = insert_projections(model, layers="0", threshold=0.5)
    x = torch.randn(30, 4)
    plain = model(x)[part]
    assert int(projection.covariance.count) == 30
    assert not torch.allclose(model.eval()(x)[part], plain)


def test_a_sequence_of_modules_without_a_floating_output_is_left_alone():
    model = nn.Sequential(nn.Sequential(nn.Flatten()))
    insert_projections(model, layers="0")
    assert torch.equal(model(torch.arange(4)[None]), torch.arange(4)[None])


class TestFunctorch:
    """Under ``torch.func``, a projection counts the rows that really exist."""

    def loss(self, model, parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # from PyTorch's own jvp
    @pytest.mark.parametrize("kind", ["grad", "vmap", "per sample", "twice", "jvp"])
    def test_training(self, kind):
        model = nn.Sequential(nn.Linear(4, WIDTH), PCAProjection(None), nn.Linear(WIDTH, 2)).double()
        plain = nn.Sequential(model[0], nn.Identity(), model[2])
        x = torch.randn(7, 4, dtype=torch.float64)
        parameters = dict(model.named_parameters())
        results = []
        for each in (model, plain):
            loss = lambda p, rows, each=each: self.loss(each, p, rows)  # noqa: E731
            results.append(
                {
                    "grad": lambda: torch.func.grad(loss)(parameters, x),  # noqa: B023
                    "vmap": lambda: {"": torch.func.vmap(each, in_dims=1)(x[None])},  # noqa: B023
                    "per sample": lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(  # noqa: B023
                        parameters, x[:, None]
                    ),
                    "twice": lambda: {
                        "": torch.func.vmap(torch.func.vmap(lambda row: each(row[None])[0]))(x[:, None])  # noqa: B023
                    },
                    "jvp": lambda: {"": torch.func.jvp(each, (x,), (torch.ones_like(x),))[1]},  # noqa: B023
                }[kind]()
            )
        for one, other in zip(*(result.values() for result in results), strict=True):
            torch.testing.assert_close(one, other)
        expected = CovarianceMetric()
        expected.update(model[0](x).detach())
        assert int(model[1].covariance.count) == 7
        torch.testing.assert_close(model[1].spectrum().covariance, expected.compute())

    def test_evaluation_leaves_nothing_of_the_transform_behind(self):
        model = nn.Sequential(nn.Linear(4, WIDTH), PCAProjection(WIDTH, 0.5))
        x = torch.randn(64, 4)
        model(x)
        model.eval()
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        first = torch.func.grad(lambda p: self.loss(model, p, x))(parameters)
        per_row = torch.func.vmap(lambda row: model(row[None])[0])(x)
        torch.testing.assert_close(per_row, model(x))
        model[1].threshold = 0.5  # clears computed values
        second = torch.func.grad(lambda p: self.loss(model, p, x))(parameters)
        torch.testing.assert_close(first, second)


def network_with_everything():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )


def everything_about(model):
    """State, modules, attributes, hooks and flags."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        name: (
            type(module),
            module.training,
            sorted(module.__dict__),
            list(module._modules),
            [list(getattr(module, kind)) for kind in hooks],
        )
        for name, module in model.named_modules()
    }


class TestCollect:
    def test_the_model_does_not_notice(self):
        model = network_with_everything()
        model(torch.randn(32, 1, 8, 8))
        model.train()[1].eval()  # its own training flags
        model[5].weight.requires_grad_(False)
        x = torch.randn(16, 1, 8, 8)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        before = everything_about(model)
        random = torch.get_rng_state()
        flags = [module.training for module in model.modules()]
        model.eval()
        expected = model(x)
        for module, flag in zip(model.modules(), flags, strict=True):
            module.training = flag
        with insert_projections(model, [nn.Conv2d, "2", nn.Linear], 0.5) as projections:
            model.eval()
            with projections.collect():
                assert torch.equal(model(x), expected)
                assert not any(module.training for module in model.modules())
            assert not torch.allclose(model(x), expected)  # they project
            assert [int(p.covariance.count) for p in projections] == [16 * 64, 16 * 36, 16 * 36, 16]
            own = [module for name, module in model.named_modules() if name in before]
            for module, flag in zip(own, flags, strict=True):
                module.training = flag
        assert everything_about(model) == before
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(model.eval()(x), expected)
        assert torch.equal(torch.get_rng_state(), random)

    def test_the_covariance_is_that_of_the_block(self):
        model = nn.Sequential(nn.Linear(4, WIDTH)).eval()
        first, second, third = torch.randn(3, 50, 4)
        (projection,) = projections = insert_projections(model, "0", 0.7)
        for parts in ((first, second), (third,)):
            with projections.collect():
                for part in parts:
                    model(part)
                    set_projection_threshold(model, 0.7)  # reading changes nothing
            expected = CovarianceMetric()
            expected.update(nn.functional.linear(torch.cat(parts), model[0].weight, model[0].bias).detach())
            torch.testing.assert_close(projection.spectrum().covariance, expected.compute())
            model(first)
        model.train()(first)  # training also starts a new accumulation
        assert int(projection.covariance.count) == 50

    def test_in_training_mode_and_one_alone(self):
        projection = PCAProjection(WIDTH)
        projection(torch.randn(20, WIDTH))
        with projection.collect():
            projection(torch.randn(30, WIDTH))
        assert int(projection.covariance.count) == 30
        projection(torch.randn(10, WIDTH))
        assert int(projection.covariance.count) == 10

    def test_an_error_inside_ends_it(self):
        model = nn.Sequential(nn.Linear(4, WIDTH)).eval()
        projections = insert_projections(model, "0", 0.5)
        with projections.collect():
            model(torch.randn(50, 4))
        with pytest.raises(KeyError), projections.collect():
            raise KeyError
        x = torch.randn(8, 4)
        assert not torch.allclose(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        assert int(projections[0].covariance.count) == 50  # until new data arrive

    def test_after_removal(self):
        projections = insert_projections(nn.Sequential(nn.Linear(4, WIDTH)), "0")
        projections.remove()
        with pytest.raises(RuntimeError, match="have been removed"), projections.collect():
            pass


def test_inserted_projections_say_what_they_are():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    projections = insert_projections(model, [nn.Conv2d, nn.Linear], 0.9)
    model(torch.randn(16, 1, 3, 3))
    assert repr(projections).splitlines() == [
        "InsertedProjections(",
        "  '0': PCAProjection(8, threshold=0.9, dim=1, keep_dim=True)",
        "  '2': PCAProjection(3, threshold=0.9, dim=-1, keep_dim=True)",
        ")",
    ]
    projections.remove()
    assert repr(projections) == "InsertedProjections()"


def test_rows_join_with_the_values_of_a_probe():
    for model in (nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3)))):
        probe = LayerProbe(model)
        insert_projections(model)
        model(torch.randn(20, 4))
        names = [row.name for row in set_projection_threshold(model, 0.9)]
        assert sorted(names) == sorted(probe.layers)


def test_the_core_is_that_of_the_metrics():
    projection, values = trained()
    metric = CovarianceMetric()
    for part in values.split(133):
        metric.update(part)
    assert torch.equal(projection.spectrum().covariance, metric.compute())
