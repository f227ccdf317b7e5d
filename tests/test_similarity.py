"""LayerSimilarity: hooks that give the values of the definition and change nothing."""

import copy
import gc
import itertools
import pickle
import warnings

import cka as pytorch_cka
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectralmetrics as sm
from spectralmetrics import functional
from spectralmetrics.plotting import plot_similarity
from tests.functional.test_relations import cka_by_definition


class Mixed(nn.Module):
    """Maps, sequences and rows, registered in another order than the forward's."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.recurrent = nn.GRU(16, 6, batch_first=True)
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, images):
        maps = torch.relu(self.convolution(images))  # (N, 4, 4, 4)
        steps, _ = self.recurrent(maps.flatten(2))  # (N, 4, 6)
        return self.head(steps[:, -1])


class Chain(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, rows):
        for part in self.parts:
            rows = torch.relu(part(rows))
        return rows


def outputs_of(model, names, inputs):
    """Rows of layers, flattened by hand."""
    rows = {}

    def keep(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            rows[name] = output.detach().flatten(1)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return rows


def chains():
    torch.manual_seed(1)
    return Chain(5, 8, 30, 4), Chain(5, 12, 7)


def test_one_batch_equals_the_definition_for_maps_sequences_and_rows():
    torch.manual_seed(0)
    model, images = Mixed(), torch.randn(24, 1, 4, 4)
    with sm.LayerSimilarity(model) as similarity:
        model(images)
    result = similarity.compute()
    assert result.layers == ["convolution", "recurrent", "head"]  # in forward order
    assert result.other_layers == result.layers
    assert result.count == 24
    assert result.matrix.dtype == torch.float64
    rows = outputs_of(model, result.layers, images)
    for left in result.layers:
        for right in result.layers:
            expected = cka_by_definition(rows[left], rows[right])
            assert float(result[left, right]) == pytest.approx(expected, rel=1e-9), (left, right)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_over_batches_equal_the_metric(order):
    models = chains()
    similarity = sm.LayerSimilarity(*models)
    metrics = {}
    for size in (20, 20, 9):
        inputs = torch.randn(size, 5)
        for index in order:
            models[index](inputs)
        with similarity.paused():
            rows = [
                outputs_of(model, [f"parts.{k}" for k in range(len(model.parts))], inputs) for model in models
            ]
        for left, x in rows[0].items():
            for right, y in rows[1].items():
                metrics.setdefault((left, right), sm.LinearCKAMetric()).update(x, y)
    result = similarity.compute()
    assert result.matrix.shape == (3, 2)
    assert result.count == 49
    for (left, right), metric in metrics.items():
        torch.testing.assert_close(result[left, right], metric.compute(), rtol=1e-9, atol=1e-12)


def test_equals_what_pytorch_cka_says_of_batches_of_one_size():
    models = chains()
    batches = [torch.randn(32, 5) for _ in range(6)]
    with sm.LayerSimilarity(*models) as similarity:
        for batch in batches:
            for model in models:
                model(batch)
    result = similarity.compute()
    (theirs,) = pytorch_cka.compute_cka(
        *models,
        [batches],
        layers=result.layers,
        model2_layers=result.other_layers,
        device="cpu",
        progress=False,
    )
    assert theirs.shape == (3, 2)
    torch.testing.assert_close(result.matrix, theirs.double(), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_a_single_layer():
    model = nn.Linear(5, 3)
    with sm.LayerSimilarity(model, model) as similarity:
        model(torch.randn(8, 5))
    assert float(similarity.compute()["Linear", "Linear"]) == pytest.approx(1)


def test_what_is_done_in_place_behind_a_layer_is_not_its_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    inputs = torch.randn(16, 5)
    with sm.LayerSimilarity(model) as similarity, torch.no_grad():
        outputs = model(inputs)
    expected = functional.linear_cka(model[0](inputs).detach(), outputs)
    torch.testing.assert_close(similarity.compute()["0", "2"], expected, rtol=1e-9, atol=0)


def test_means_of_maps_and_sequences():
    model, images = Mixed(), torch.randn(24, 1, 4, 4)
    with sm.LayerSimilarity(model, feature_maps="mean", sequences="last") as similarity:
        model(images)
    rows = outputs_of(model, ["convolution", "recurrent"], images)
    maps = rows["convolution"].reshape(24, 4, 16).mean(2)
    steps = rows["recurrent"].reshape(24, 4, 6)[:, -1]
    value = similarity.compute()["convolution", "recurrent"]
    torch.testing.assert_close(value, functional.linear_cka(maps, steps), rtol=1e-6, atol=1e-9)
    for options in ({"feature_maps": "positions"}, {"sequences": "timesteps"}):
        with pytest.raises(ValueError, match="one row of each sample"):
            sm.LayerSimilarity(model, **options)


def train(model, similarity_of=None):
    torch.manual_seed(7)
    similarity = None if similarity_of is None else similarity_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for _ in range(3):
        outputs = model(torch.randn(8, 1, 4, 4))
        outputs.square().sum().backward()
        seen += [outputs.detach().clone(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    seen += [p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()]
    return seen, similarity


def test_layers_whose_type_does_not_tell_go_by_their_surroundings():
    """A GELU after a convolution has channels first; a Linear inside a transformer may have time first."""
    convolutions = nn.Sequential(nn.Conv1d(3, 6, 1), nn.GELU())
    encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
    series, steps = torch.randn(8, 3, 9), torch.randn(5, 8, 6)
    outputs = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
        for layer in (convolutions[1], encoder.linear1)
    ]
    both = sm.LayerSimilarity(
        convolutions,
        encoder,
        layers=lambda name, module: name in ("1", "linear1"),
        feature_maps="mean",
        sequences="mean",
    )
    convolutions(series)
    encoder(steps)
    for handle in handles:
        handle.remove()
    metric = sm.LinearCKAMetric()
    metric.update(outputs[0].mean(2), outputs[1].mean(0))
    assert float(both.compute()["1", "linear1"]) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_training_is_bit_identical():
    torch.manual_seed(0)
    model = Mixed()
    copied = copy.deepcopy(model)
    plain, _ = train(copied)
    hooked, similarity = train(model, sm.LayerSimilarity)
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))
    assert similarity.compute().count == 24


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind():
    model = Mixed()
    keys, attributes = list(model.state_dict()), set(vars(model))
    similarity = sm.LayerSimilarity(model)
    assert hooks_of(model) == 5
    assert list(model.state_dict()) == keys
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks_of(copied) == 0
        copied(torch.randn(8, 1, 4, 4))  # a copy runs, and is not observed
    with pytest.raises(RuntimeError, match="no forward of the model"):
        similarity.compute()
    similarity.remove()
    assert hooks_of(model) == 0
    assert set(vars(model)) == attributes
    similarity = sm.LayerSimilarity(model)
    del similarity
    gc.collect()
    assert hooks_of(model) == 0


def test_autocast_inference_mode_and_half_precision():
    torch.manual_seed(0)
    model, inputs = Chain(5, 8, 30, 4), torch.randn(16, 5)
    with sm.LayerSimilarity(model) as similarity:
        with torch.inference_mode():
            model(inputs)
        expected = similarity.compute().matrix
        model(inputs)  # sums made in inference mode can be added to
        torch.testing.assert_close(similarity.compute().matrix, expected, rtol=1e-12, atol=0)
        similarity.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs)
            inside = torch.is_autocast_enabled("cpu")
    assert inside
    assert similarity.compute().matrix.dtype == torch.float64
    torch.testing.assert_close(similarity.compute().matrix, expected, rtol=0.05, atol=0.01)
    half = Chain(5, 8, 4).half()
    with sm.LayerSimilarity(half) as similarity:
        half(inputs.half())
    assert similarity.compute().matrix.isfinite().all()


def test_a_checkpoints_recomputation_is_not_another_forward():
    class Checkpointed(Chain):
        def forward(self, rows):
            return checkpoint(super().forward, rows, use_reentrant=False)

    model = Checkpointed(5, 8, 4)
    with sm.LayerSimilarity(model) as similarity:
        model(torch.randn(8, 5)).sum().backward()
    assert similarity.compute().count == 8


class TestCompiled:
    """Every pair of forwards counts, whenever the hooks were made, and the graph stays whole."""

    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # inside the compiler
    @pytest.mark.parametrize(
        ("first", "backend"),
        [
            *itertools.product(["hook", "compile", "run", "sibling's run"], ["eager"]),
            ("hook", "aot_eager"),
            *(
                pytest.param(first, backend, marks=pytest.mark.long)
                for first in ["compile", "run", "sibling's run", "hook"]
                for backend in ["aot_eager", "inductor"][first == "hook" :]
            ),
        ],
    )
    def test_every_pair_is_seen(self, first, backend):
        models = chains()
        other_fold = Chain(5, 8, 30, 4)

        def compiled(model):
            return torch.compile(model, backend=backend, fullgraph=True)

        if first == "sibling's run":
            compiled(other_fold)(torch.randn(16, 5))
        if first == "hook":
            similarity = sm.LayerSimilarity(*models)
        runs = [compiled(model) for model in models]
        if first == "run":
            for run in runs:
                run(torch.randn(16, 5))
        if first != "hook":
            similarity = sm.LayerSimilarity(*runs)
        batches = [torch.randn(size, 5) for size in (16, 16, 9)]
        for batch in batches:
            for run in runs:
                run(batch)
        assert similarity.layers == ["parts.0", "parts.1", "parts.2"]
        values = similarity.compute()
        assert values.count == 41
        metric = sm.LinearCKAMetric()
        similarity.remove()
        for batch in batches:
            rows = [outputs_of(model, ["parts.1"], batch)["parts.1"] for model in models]
            metric.update(*rows)
        torch.testing.assert_close(values["parts.1", "parts.1"], metric.compute(), rtol=1e-5, atol=1e-7)
        runs[0](batches[0])
        assert similarity.compute().count == 41  # no more hooks

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_training_is_bit_identical(self, backend):
        def steps(probed):
            torch.manual_seed(3)
            model = Chain(5, 8, 30, 4)
            similarity = sm.LayerSimilarity(model) if probed else None
            run = torch.compile(model, backend=backend, fullgraph=True)
            seen = []
            for _ in range(3):
                outputs = run(torch.randn(8, 5))
                outputs.square().sum().backward()
                seen += [outputs.detach(), *(p.grad.clone() for p in model.parameters())]
            return seen, similarity

        plain, _ = steps(False)
        torch.compiler.reset()
        hooked, similarity = steps(True)
        assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))
        assert similarity.compute().count == 24

    def test_pauses_act_at_every_run(self):
        model = Chain(5, 8, 4)
        similarity = sm.LayerSimilarity(model)
        run = torch.compile(model, backend="eager", fullgraph=True)
        run(torch.randn(8, 5))
        with similarity.paused():
            run(torch.randn(8, 5))
        run(torch.randn(8, 5))
        assert similarity.compute().count == 16

    @torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)
    def test_who_has_hooks_ignored_again_is_told(self):
        similarity = sm.LayerSimilarity(Chain(5, 4))
        assert not torch._dynamo.config.skip_nnmodule_hook_guards
        torch._dynamo.config.skip_nnmodule_hook_guards = True
        with pytest.raises(RuntimeError, match="skip_nnmodule_hook_guards has been set to True"):
            similarity.compute()


def test_a_layer_that_runs_twice_has_the_features_of_both_runs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, rows):
            return self.head(self.shared(torch.relu(self.shared(rows))))

    model, inputs = Twice(), torch.randn(12, 5)
    with sm.LayerSimilarity(model) as similarity:
        model(inputs)
    once = model.shared(inputs)
    both = torch.cat([once, model.shared(torch.relu(once))], 1)
    value = similarity.compute()["shared", "head"]
    torch.testing.assert_close(value, functional.linear_cka(both, model(inputs)), rtol=1e-9, atol=0)


def test_a_layer_that_runs_in_some_batches_is_compared_over_those():
    class Sometimes(Chain):
        def forward(self, rows):
            first = self.parts[0](rows)
            return self.parts[1](first) if len(rows) > 10 else first

    model = Sometimes(5, 8, 4)
    batches = [torch.randn(n, 5) for n in (16, 8, 20)]
    metric = sm.LinearCKAMetric()
    with sm.LayerSimilarity(model) as similarity:
        for batch in batches:
            model(batch)
    rows = [outputs_of(model, ["parts.0", "parts.1"], batch) for batch in batches]
    for each in rows:
        if "parts.1" in each:
            metric.update(each["parts.0"], each["parts.1"])
    result = similarity.compute()
    assert result.count == 44
    torch.testing.assert_close(result["parts.0", "parts.1"], metric.compute(), rtol=1e-9, atol=0)


def test_samples_that_are_not_finite_are_left_out_of_the_batch():
    model, inputs = Chain(5, 8, 4), torch.randn(16, 5)
    holed = inputs.clone()
    holed[3, 0] = torch.nan
    with sm.LayerSimilarity(model) as similarity:
        model(holed)
        model(torch.randn(8, 5))
        model(torch.full((8, 5), torch.nan))
        similarity.reset()
        model(holed)
    with pytest.warns(UserWarning, match="left out for NaN or infinite values in some layer: 1"):
        result = similarity.compute()
    assert result.count == 15
    keep = torch.arange(16) != 3
    rows = outputs_of(model, ["parts.0", "parts.1"], inputs[keep])
    torch.testing.assert_close(
        result["parts.0", "parts.1"], functional.linear_cka(*rows.values()), rtol=1e-6, atol=0
    )
    with sm.LayerSimilarity(model) as similarity:
        model(torch.full((8, 5), torch.nan))
    with pytest.raises(RuntimeError, match="all 8 samples hold NaN"):
        similarity.compute()


def test_samples_of_a_batch_with_too_few_finite_ones_are_counted_as_left_out():
    model = Chain(5, 8, 4)
    holed = torch.randn(8, 5)
    holed[3:] = torch.nan
    with sm.LayerSimilarity(model) as similarity:
        model(holed)
        with pytest.raises(RuntimeError, match=r"all 8 samples hold NaN .* batch has fewer than 4 others"):
            similarity.compute()
        model(torch.randn(16, 5))
        with pytest.warns(UserWarning, match="left out for NaN or infinite values in some layer: 8"):
            assert similarity.compute().count == 16


class Given(nn.Module):
    """Returns its input, layer by layer."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Identity() for _ in range(2))

    def forward(self, outputs):
        return [part(each) for part, each in zip(self.parts, outputs, strict=True)]


@pytest.mark.parametrize(("shift", "outlier"), [(0.0, 1e25), (1e8, 0.0)])
def test_a_sample_that_another_layer_leaves_out_costs_the_others_no_digits(shift, outlier):
    model, first = Given(), torch.randn(12, 4, dtype=torch.float64)
    second = first @ torch.randn(4, 3, dtype=torch.float64) + torch.randn(12, 3, dtype=torch.float64)
    expected = cka_by_definition(first[1:], second[1:])
    first += shift
    first[0], second[0] = outlier, torch.inf  # a diverging sample: finite in one layer, infinite in the next
    with sm.LayerSimilarity(model, layers="parts.?") as similarity:
        model([first, second])
    with pytest.warns(UserWarning, match="in some layer: 1"):
        result = similarity.compute()
    assert float(result["parts.0", "parts.1"]) == pytest.approx(expected, rel=1e-6)


def test_dead_layers_and_random_ones_stay_within_the_range():
    model = Chain(6, 5, 5, 5)
    nn.init.zeros_(model.parts[1].weight)
    nn.init.constant_(model.parts[1].bias, 0.1)
    with sm.LayerSimilarity(model) as similarity:
        for size in (4, 5, 4):
            model(torch.randn(size, 6))
    matrix = similarity.compute().matrix
    assert matrix.isfinite().all()
    assert matrix.abs().max() <= 1
    assert (matrix[1] == 0).all()
    assert matrix[0, 0] == pytest.approx(1)


def test_forwards_that_are_no_pair_are_said_and_left_out():
    left, right = chains()
    similarity = sm.LayerSimilarity(left, right)
    left(torch.randn(8, 5))
    with pytest.raises(RuntimeError, match="no forward of `other`"):
        similarity.compute()
    with pytest.warns(UserWarning, match="`model` ran twice"):
        left(torch.randn(8, 5))
    with pytest.warns(UserWarning, match="forwards of 8 and 6 samples"):
        right(torch.randn(6, 5))
    inputs = torch.randn(3, 5)
    left(inputs)
    with pytest.warns(UserWarning, match="forward of 3 samples was left out"):
        right(inputs)
    with pytest.raises(RuntimeError, match="no batch has been counted; run both models on the same batch"):
        similarity.compute()
    right.parts[0](torch.randn(9, 5))  # a direct call of a layer is no forward of its model
    inputs = torch.randn(10, 5)
    right(inputs), left(inputs)
    assert similarity.compute().count == 10


def test_layers_that_cannot_be_compared_are_named():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.head, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1)
            self.norm = nn.LayerNorm(4)

        def forward(self, sequences):
            rows = self.steps(sequences.flatten(0, 1))  # (N, T, 3) -> (N*T, 4)
            return self.head(self.norm(rows.unflatten(0, sequences.shape[:2]).mean(1)))

    model = Folded()
    similarity = sm.LayerSimilarity(model, layers=[nn.Linear, nn.LayerNorm])
    with pytest.warns(UserWarning, match=r"'steps' was left out of a forward: it has 30 rows for 6 samples"):
        model(torch.randn(6, 5, 3))
    with pytest.warns(UserWarning, match="layers that saw nothing are left out: 'steps', 'unused'"):
        result = similarity.compute()
    assert result.layers == ["norm", "head"]


def test_a_failure_ends_no_run(monkeypatch):
    def fail(*args):
        raise MemoryError("no room")

    model = Chain(5, 4)
    similarity = sm.LayerSimilarity(model)
    for broken, message in (
        ("u_centred", "left out: MemoryError: no room"),
        ("gram", "'parts.0' cannot be com"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"spectralmetrics.similarity.{broken}", fail)
            with pytest.warns(UserWarning, match=message):
                outputs = model(torch.randn(8, 5))
        assert outputs.shape == (8, 4)
    model(torch.randn(8, 5))
    assert similarity.compute().count == 8


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # scripting
def test_a_failed_construction_leaves_no_hook():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match="not supported on ScriptModules") as told:
        sm.LayerSimilarity(model, layers="?")
    assert told.tb  # while the error exists, the failed object is not collected
    assert hooks_of(model) == 0
    assert "__reduce_ex__" not in vars(model) | vars(model[0])


def test_warnings_that_are_errors_end_no_forward(caplog):
    left, right = chains()
    similarity = sm.LayerSimilarity(left, right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left(torch.randn(8, 5))
        left(torch.randn(8, 5))
    assert "`model` ran twice before the other model ran" in caplog.text
    inputs = torch.randn(6, 5)
    right(inputs)
    del similarity


def test_outputs_that_hold_themselves_and_transforms(caplog):
    class Ring(nn.Module):
        def forward(self, rows):
            ring = {"rows": rows * 2}
            ring["ring"] = ring
            return ring

    model = nn.Sequential(nn.Linear(5, 4), Ring())
    similarity = sm.LayerSimilarity(model, layers=["0", "1"])
    weights = dict(model.named_parameters())
    rows = torch.randn(9, 5)
    torch.func.vmap(lambda row: torch.func.functional_call(model, weights, row)["rows"])(rows)
    with pytest.raises(RuntimeError, match=r"inside transforms of torch\.func is not observed"):
        similarity.compute()
    assert not caplog.text
    model(rows)
    assert float(similarity.compute()["0", "1"]) == pytest.approx(1)


def test_autocast_by_function_stays_as_it_was():
    """Leaving autocast's own context would clear the cache of cast weights, and change the gradients."""

    def gradient(probed):
        torch.manual_seed(0)
        model = nn.Linear(64, 64, bias=False)
        similarity = sm.LayerSimilarity(model) if probed else None
        torch.set_autocast_dtype("cpu", torch.bfloat16)
        torch.set_autocast_enabled("cpu", True)
        try:
            outputs = torch.randn(32, 64)
            for _ in range(8):
                outputs = model(outputs).tanh()
        finally:
            torch.set_autocast_enabled("cpu", False)
            torch.clear_autocast_cache()
        outputs.float().square().mean().backward()
        return model.weight.grad, similarity

    hooked, similarity = gradient(True)
    assert torch.equal(hooked, gradient(False)[0])
    assert similarity.compute().count == 8 * 32


def test_bad_arguments():
    model = Chain(5, 4)
    with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got int"):
        sm.LayerSimilarity(3)
    with pytest.raises(TypeError, match=r"other to be a torch\.nn\.Module, got str"):
        sm.LayerSimilarity(model, "model")
    with pytest.raises(TypeError, match=r"nn\.DataParallel"):
        sm.LayerSimilarity(nn.DataParallel(model))
    with pytest.raises(ValueError, match="'part'"):
        sm.LayerSimilarity(model, layers="part")
    assert hooks_of(model) == 0


def test_selection_of_layers():
    left, right = chains()
    similarity = sm.LayerSimilarity(left, right, layers="parts.*", exclude="parts.0")
    assert similarity.layers == ["parts.1", "parts.2"]
    assert similarity.other_layers == ["parts.1"]
    assert repr(similarity) == "LayerSimilarity(2 x 1 layers)"


class TestPictures:
    def test_the_result_draws_itself(self):
        left, right = chains()
        with sm.LayerSimilarity(left, right) as similarity, warnings.catch_warnings():
            warnings.simplefilter("error")
            inputs = torch.randn(8, 5)
            left(inputs), right(inputs)
            result = similarity.compute()
        assert repr(result) == "Similarity(3 x 2 layers, 8 samples)"
        figure, axis = result.plot(title="two chains")
        assert figure.axes[0] is axis
        assert [text.get_text() for text in axis.get_yticklabels()] == result.layers
        assert [text.get_text() for text in axis.get_xticklabels()] == result.other_layers
        assert (axis.get_ylabel(), axis.get_xlabel()) == ("layers", "other layers")
        assert axis.get_images()[0].get_array().tolist() == result.matrix.tolist()

    def test_large_ones_have_no_numbers(self):
        _, axis = plot_similarity(torch.rand(30, 30), [f"layer {k}" for k in range(30)])
        assert not axis.texts
        assert len(axis.get_xticks()) == 30

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"1 x 2 named layers, got \(2, 1\)"):
            plot_similarity(torch.rand(2, 1), ["a"], ["b", "c"])
