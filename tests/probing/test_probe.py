import copy
import dataclasses
import gc
import io
import pickle
import threading
import warnings
import weakref
from operator import methodcaller

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectralmetrics as sm
from spectralmetrics import LayerProbe
from tests.integrations.rows import Rows
from tests.metrics.properties import assert_same, feed
from tests.oracles import random_rows
from tests.probing.models import MODELS, ResNet, Transformer, train

pytestmark = pytest.mark.filterwarnings("ignore:in (train|eval) there are fewer observations")

SETTINGS = {
    "exact": {},
    "fast": {"metrics": sm.SaturationMetric(gram_dtype=torch.float32)},
    "several": {"metrics": [sm.SaturationMetric(), sm.EigenspaceEmbeddingMetric(), sm.EffectiveRankMetric()]},
    "everything": {"layers": "*"},
    "mean": {"feature_maps": "mean", "sequences": "mean"},
    "max": {"feature_maps": "max", "sequences": "last"},
    "median": {"feature_maps": "median"},
    "flatten": {"feature_maps": "flatten", "sequences": "flatten"},
    "sampled": {"rows_per_feature": 0.5, "every_n_steps": 2},
    "limited": {"max_samples": 8, "max_map_size": 4},
    "narrow": {"max_features": 5},
}


def assert_nothing(probe, reason, stage=None):
    """Check that nothing was observed, and that `compute` says why."""
    with pytest.warns(UserWarning, match=f"nothing was observed in .*{reason}") as seen:
        assert probe.compute(stage) == {}
    assert len(seen) == 1


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class TestNothingIsDisturbed:
    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.filterwarnings("ignore:layer.*is not observed any more")
    @pytest.mark.filterwarnings("ignore:layers that saw nothing")
    def test_training_is_bit_identical(self, kind, setting):
        plain, _, _ = train(kind)
        probed, _, probe = train(kind, lambda model: LayerProbe(model, **SETTINGS[setting]))
        assert same(plain, probed)
        if setting != "narrow":
            assert probe.compute("train")

    @pytest.mark.parametrize("kind", MODELS)
    def test_training_on_several_threads_is_bit_identical(self, kind, two_threads):
        plain, _, _ = train(kind)
        probed, _, probe = train(kind, lambda model: LayerProbe(model))
        assert same(plain, probed)
        assert probe.compute("train")

    def test_the_comparison_itself_sees_a_difference(self):
        plain, _, _ = train("resnet")

        def disturbed(model):
            model.stem.register_forward_hook(lambda *_: torch.rand(1) and None)

        assert not same(plain, train("resnet", disturbed)[0])

    @pytest.mark.parametrize("kind", MODELS)
    def test_the_model_is_as_it_was(self, kind):
        make, data = MODELS[kind]
        model = make()
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
        probe = LayerProbe(model)
        model(data())
        assert [n for n, _ in model.named_parameters()] == names
        assert list(model.state_dict()) == keys
        assert len(list(model.modules())) == len(before)
        probe.compute()
        probe.remove()
        for name, module in model.named_modules():
            assert set(vars(module)) == before[name]
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._backward_hooks

    @pytest.mark.parametrize("removed", [False, True])
    def test_copies_and_files_hold_no_probe(self, removed):
        model = ResNet()
        probe = LayerProbe(model)
        model(torch.randn(2, 3, 8, 8))
        if removed:
            probe.remove()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert b"spectralmetrics" not in buffer.getvalue()
        buffer.seek(0)
        count = int(probe["train", "stem"]["saturation"].count)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ):
            twin(torch.randn(2, 3, 8, 8))
            assert same(twin.state_dict().values(), twin.state_dict().values())
        assert int(probe["train", "stem"]["saturation"].count) == count

    def test_autocast_switched_on_by_function(self):
        """Leaving autocast's own context would clear the cache of cast weights, and change the gradients."""

        def gradients(probed):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh())
            probe = LayerProbe(model) if probed else None
            torch.set_autocast_dtype("cpu", torch.bfloat16)
            torch.set_autocast_enabled("cpu", True)
            try:
                rows = torch.randn(32, 64)
                for _ in range(8):
                    rows = model(rows)
                assert torch.is_autocast_enabled("cpu")
                assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            finally:
                torch.set_autocast_enabled("cpu", False)
                torch.clear_autocast_cache()
            rows.float().square().mean().backward()
            return model[0].weight.grad, probe

        plain, _ = gradients(False)
        assert torch.equal(gradients(False)[0], plain)
        probed, probe = gradients(True)
        assert torch.equal(probed, plain)
        assert int(probe["train", "0"]["saturation"].count) == 8 * 32

    def test_a_failed_construction_leaves_no_hook(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # scripting
            model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
        before = set(vars(model[0]))
        with pytest.raises(RuntimeError, match="not supported on ScriptModules") as told:
            LayerProbe(model, layers="?", every_n_steps=2)
        assert told.tb  # while the error exists, the failed probe is not collected
        assert not model[0]._forward_hooks
        assert not model._forward_pre_hooks
        assert set(vars(model[0])) == before

    def test_the_model_can_be_collected_while_probed(self):
        model = ResNet()
        probe = LayerProbe(model)
        gone = weakref.ref(model)
        model(torch.randn(2, 3, 8, 8))
        del model
        gc.collect()
        assert gone() is None
        assert probe.compute()

    def test_a_forgotten_probe_takes_its_hooks_along(self):
        model = ResNet()
        LayerProbe(model)
        gc.collect()
        assert not model.stem._forward_hooks

    def test_other_hooks_stay(self):
        model = nn.Sequential(nn.Linear(3, 3))
        seen = []
        model[0].register_forward_hook(lambda *_: seen.append(1))
        LayerProbe(model).remove()
        model(torch.ones(1, 3))
        assert seen == [1]


class TestEveryForwardOnce:
    def count(self, probe, layer="0", stage="train"):
        return int(probe[stage, layer]["saturation"].count)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant):
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        probe = LayerProbe(model)
        fired = []
        model[0].register_forward_hook(lambda *_: fired.append(1))
        rows = torch.randn(5, 3, requires_grad=True)
        checkpoint(model, rows, use_reentrant=reentrant).sum().backward()
        assert len(fired) == 2  # PyTorch recomputed
        assert self.count(probe) == 5

    @pytest.mark.parametrize("saved", ["abs", "all", "all but tanh"])
    def test_selective_checkpointing(self, saved):
        """PyTorch records the operations of the forward and replays them in backward, but not the probe's."""
        from functools import partial

        from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

        def policy(context, operation, *args, **kwargs):
            name = operation.overloadpacket.__name__
            keep = {"abs": name == "abs", "all": True, "all but tanh": name != "tanh"}[saved]
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)

            def forward(self, x):
                hidden = self.inner(x)
                scale = (hidden * 2 + 1).abs()
                return self.outer(torch.tanh(hidden * scale) * scale)

        def gradients(probed):
            torch.manual_seed(0)
            net = Net()
            probe = LayerProbe(net, sm.SaturationMetric(gram_dtype=torch.float32)) if probed else None
            for _ in range(3):
                contexts = partial(create_selective_checkpoint_contexts, policy)
                rows = torch.randn(9, 6)
                checkpoint(net, rows, use_reentrant=False, context_fn=contexts).square().sum().backward()
            return [p.grad for p in net.parameters()], probe

        plain, _ = gradients(False)
        probed, probe = gradients(True)
        assert same(plain, probed)
        assert self.count(probe, "inner") == 27

    def test_function_transforms_are_no_run(self):
        model = nn.Sequential(nn.Linear(4, 3))
        probe = LayerProbe(model)
        parameters = dict(model.named_parameters())

        def loss(parameters, rows):
            return torch.func.functional_call(model, parameters, (rows,)).square().sum()

        rows = torch.randn(5, 4)
        torch.func.grad(loss)(parameters, rows)
        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, rows)
        assert_nothing(probe, "inside transforms of torch.func")
        model(rows)
        torch.func.vmap(model)(rows)
        assert self.count(probe) == 5
        copy.deepcopy(probe)

    def test_meta_devices_and_symbolic_tracing_leave_the_layer_observed(self):
        block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        probe = LayerProbe(nn.Sequential(block), layers="0")
        torch.fx.symbolic_trace(nn.Sequential(block))
        meta = nn.Sequential(nn.Linear(4, 3)).to("meta")
        with LayerProbe(meta) as unused:
            meta(torch.ones(2, 4, device="meta"))
        assert_nothing(unused, "no probed layer has run since .*, and it is paused or removed now")
        block(torch.randn(4, 3))
        assert self.count(probe) == 4

    @pytest.mark.filterwarnings("ignore:.*nested tensors")
    def test_the_nested_path_of_transformers(self):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        probe = LayerProbe(encoder, layers="layers.*")
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 2:] = True
        with torch.no_grad():
            encoder(torch.randn(3, 5, 8), src_key_padding_mask=padding)
        assert probe.compute("eval")

    def test_a_module_used_twice(self):
        layer = nn.Linear(3, 3)
        probe = LayerProbe(nn.Sequential(layer, nn.ReLU(), layer))
        probe_model = nn.Sequential(layer, nn.ReLU(), layer)
        probe_model(torch.randn(5, 3))
        assert probe.layers == ["0"]
        assert self.count(probe) == 10

    def test_threads(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model, sm.CovarianceMetric())
        parts = [random_rows(k, 40, 3, dtype=torch.float32) for k in range(8)]

        def work(part):
            for piece in part.split(4):
                model(piece)

        threads = [threading.Thread(target=work, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = feed(sm.CovarianceMetric(), model(torch.cat(parts)).detach()).compute()
        # the forward above was observed, too, and changed only the count
        assert int(probe["train", "0"]["covariance"].count) == 640
        assert_same(probe.compute()["covariance/train/0"], expected, 1e-6)

    def test_replicas(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model)
        replica = model[0]._replicate_for_data_parallel()
        replica.weight, replica.bias = model[0].weight, model[0].bias
        replica(torch.randn(5, 3))
        assert self.count(probe) == 5
        nn.DataParallel(model)(torch.randn(7, 3))
        assert self.count(probe) == 12

    def test_a_metric_of_another_library_made_and_reset_in_inference_mode(self):
        model = nn.Sequential(nn.Linear(4, 3)).eval()
        with torch.inference_mode():
            probe = LayerProbe(model, {"rows": Rows()})
        for _ in range(2):
            for _ in range(2):
                with torch.inference_mode():
                    model(torch.zeros(5, 4))
            assert probe.compute("eval") == {"rows/eval/0": 10}
            with torch.inference_mode():
                probe.reset()

    def test_inference_mode_before_training(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model)
        model.eval()
        with torch.inference_mode():
            model(torch.randn(5, 3))
            probe.compute()
        model(torch.randn(5, 3))
        with torch.no_grad():
            model(torch.randn(5, 3))
        assert self.count(probe, stage="eval") == 15
        model.train()
        model(torch.randn(5, 3)).sum().backward()
        assert self.count(probe) == 5

    def test_autocast(self):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 38 * 38, 3))
        probe = LayerProbe(model, sm.CovarianceMetric(), max_map_size=8)
        outputs = []
        model[0].register_forward_hook(lambda m, a, output: outputs.append(output))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(2, 1, 40, 40))
        assert outputs[0].dtype == torch.bfloat16
        small = nn.functional.interpolate(outputs[0].float(), size=(8, 8), mode="bilinear")
        expected = feed(sm.CovarianceMetric(), small.movedim(1, -1).reshape(-1, 4)).compute()
        assert_same(probe.compute()["covariance/train/0"], expected, 1e-9)

    def test_tracing_is_no_run(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        probe = LayerProbe(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(model, torch.randn(2, 3), check_trace=False)  # the check would run the model
        torch.fx.symbolic_trace(model)
        torch.export.export(model, (torch.randn(2, 3),))
        with torch.device("meta"):
            copy.deepcopy(model).to("meta")
        assert_nothing(probe, "no probed layer has run")
        model(torch.randn(4, 3))
        assert self.count(probe) == 4

    def test_transformer_layers_fire_in_train_and_eval(self):
        model = Transformer()
        probe = LayerProbe(model)
        model(torch.randn(2, 4, 8))
        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 4, 8))
        values = probe.compute()
        assert len(probe.layers) == 7
        assert {f"saturation/{stage}/{name}" for stage in ("train", "eval") for name in probe.layers} == set(
            values
        )

    def test_a_layer_that_never_ran_is_named_once(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(3, 1))
        probe = LayerProbe(model, layers=["0", "1.out_proj"])
        model[0](torch.randn(20, 3))
        with pytest.warns(UserWarning, match=r"saw nothing in train are left out: '1.out_proj'") as seen:
            assert list(probe.compute()) == ["saturation/train/0"]
        assert len(seen) == 1


def test_small_batches_wait_for_a_product(monkeypatch):
    from spectralmetrics.sums import intake

    calls = []
    accumulate = intake.accumulate
    monkeypatch.setattr(intake, "accumulate", lambda *a, **k: calls.append(1) or accumulate(*a, **k))
    model = nn.Linear(4, 3)
    probe = LayerProbe(model, [sm.SaturationMetric(), sm.StableRankMetric()])
    for _ in range(50):
        model(torch.randn(10, 4))
    assert len(calls) == 1
    assert set(probe.compute()) == {"saturation/train/Linear", "stable_rank/train/Linear"}
    assert len(calls) == 2
    assert int(probe["train", "Linear"]["stable_rank"].count) == 500


class TestValues:
    def test_equal_metrics_by_hand(self):
        model = ResNet().eval()
        metrics = {"sat": sm.SaturationMetric(threshold=0.9), "trace": sm.CovarianceTraceMetric(center=False)}
        probe = LayerProbe(model, metrics, max_map_size=None)
        by_hand = {name: {key: metric.clone() for key, metric in metrics.items()} for name in probe.layers}
        for name, module in model.named_modules():
            if name in by_hand:

                def hook(module, args, output, mine=by_hand[name]):
                    rows = output.movedim(1, -1).reshape(-1, output.shape[1])
                    for metric in mine.values():
                        metric.update(rows.detach())

                module.register_forward_hook(hook)
        for _ in range(3):
            model(torch.randn(4, 3, 10, 10))
        values = probe.compute()
        assert len(values) == 2 * len(by_hand)
        for name, mine in by_hand.items():
            for key, metric in mine.items():
                assert_same(values[f"{key}/eval/{name}"], metric.compute())

    def test_an_overridden_compute_is_used(self):
        class Percent(sm.SaturationMetric):
            def compute(self):
                return 100 * super().compute()

        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model, {"percent": Percent(), "share": sm.SaturationMetric()})
        model(torch.randn(9, 3))
        values = probe.compute()
        assert values["percent/train/0"] == 100 * values["share/train/0"]

    def test_values_are_the_callers_own(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model, [sm.SpectrumMetric(), sm.SaturationMetric(), sm.CovarianceMetric()])
        model(torch.randn(9, 3))
        kept = {key: value.clone() for key, value in probe.compute().items()}
        for value in probe.compute().values():
            value.zero_()
        assert same(probe.compute().values(), kept.values())

    def test_a_statistic_that_fails_on_one_layer_does_not_take_the_others_along(self):
        class Gap(sm.SpectralMetric):
            def statistic(self, spectrum):
                return float(spectrum.eigenvalues[0] - spectrum.eigenvalues[1])

        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        probe = LayerProbe(model, {"gap": Gap()})
        model(torch.randn(9, 3))
        with pytest.warns(UserWarning, match="left out: 'gap' of '1' .*IndexError"):
            assert list(probe.compute()) == ["gap/train/0"]

    def test_one_layer_without_a_value_does_not_take_the_others_along(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        probe = LayerProbe(model, [sm.CovarianceMetric(unbiased=True)])
        model[0](torch.randn(9, 3))
        model[1](torch.randn(1, 3))
        with pytest.warns(UserWarning, match="left out: 'covariance' of '1' .*at least 2 observations"):
            assert list(probe.compute()) == ["covariance/train/0"]

    def test_keys_are_in_forward_order(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.last, self.first = nn.Linear(3, 2), nn.Linear(3, 3)

            def forward(self, x):
                return self.last(self.first(x))

        model = Backwards()
        probe = LayerProbe(model, [sm.SaturationMetric(), sm.StableRankMetric()])
        assert probe.layers == ["last", "first"]
        model(torch.randn(9, 3))
        assert probe.layers == ["first", "last"]
        assert list(probe.compute()) == [
            *(
                "saturation/train/first",
                "stable_rank/train/first",
                "saturation/train/last",
                "stable_rank/train/last",
            )
        ]

    @pytest.mark.parametrize(
        "metrics",
        [
            None,
            sm.SaturationMetric(),
            [sm.SaturationMetric()],
            {"saturation": sm.SaturationMetric()},
            torchmetrics.MetricCollection({"saturation": sm.SaturationMetric()}),
        ],
    )
    def test_metrics_in_any_form(self, metrics):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model, metrics)
        model(torch.randn(9, 3))
        assert list(probe.compute()) == ["saturation/train/0"]

    def test_metrics_given_are_cloned(self):
        metric = feed(sm.SaturationMetric(), torch.randn(30, 7))
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model, metric)
        model(torch.randn(9, 3))
        assert int(metric.count) == 30
        assert int(probe["train", "0"]["saturation"].count) == 9

    def test_metrics_of_another_library_and_of_the_user(self):
        class Doubled(sm.CovarianceTraceMetric):
            def update(self, rows):
                super().update(2 * rows)

        model = nn.Sequential(nn.Conv2d(1, 3, 1))
        metrics = {"mean": torchmetrics.MeanMetric(), "doubled": Doubled(), "trace": sm.CovarianceTraceMetric()}
        probe = LayerProbe(model, metrics)
        inputs = torch.randn(5, 1, 4, 4)
        output = model(inputs).detach()
        values = probe.compute()
        assert_same(values["mean/train/0"], output.mean(), 1e-5)
        assert_same(values["doubled/train/0"], 4 * values["trace/train/0"])

    def test_a_single_sample_is_enough_for_metrics_of_another_library(self):
        model = nn.Linear(3, 2)
        with LayerProbe(model, {"average": torchmetrics.MeanMetric()}) as probe:
            output = model(torch.randn(1, 3))
        assert probe.compute() == {"average/train/Linear": output.detach().mean()}

    def test_metrics_of_another_library_have_no_findings(self):
        model = nn.Linear(3, 2)
        with LayerProbe(model, {"average": torchmetrics.MeanMetric()}) as probe:
            with pytest.raises(RuntimeError, match="nothing was observed in train"):
                probe.findings("train")
            model(torch.randn(5, 3))
        assert probe.findings("train") == []

    @pytest.mark.parametrize("first", [True, False])
    def test_the_eigenvalues_are_those_that_come_with_the_eigenvectors(self, first):
        metrics = [sm.EigenspaceEmbeddingMetric(), sm.SpectrumMetric(), sm.CovarianceMetric()]
        model = nn.Sequential(nn.Linear(40, 40))
        with LayerProbe(model, metrics if first else metrics[::-1]) as probe:
            model(torch.randn(300, 40))
        values = probe.compute()
        spectrum, covariance = (values[f"{name}/train/0"] for name in ("spectrum", "covariance"))
        together, _ = sm.functional.eigenvectors(covariance)
        alone = sm.functional.eigenvalues(covariance)
        assert not torch.equal(together, alone)  # otherwise the test shows nothing
        assert torch.equal(spectrum, together)

    def test_one_accumulation_and_decomposition_for_all_statistics(self, monkeypatch):
        from spectralmetrics.sums import intake

        calls = []
        accumulate, decompose = intake.accumulate, torch.linalg.eigh
        monkeypatch.setattr(intake, "accumulate", lambda *a, **k: calls.append("sum") or accumulate(*a, **k))
        monkeypatch.setattr(torch.linalg, "eigh", lambda *a, **k: calls.append("eigh") or decompose(*a, **k))
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda *a, **k: calls.append("eigvalsh"))
        metrics = [cls() for cls in (sm.SaturationMetric, sm.EigenspaceEmbeddingMetric, sm.StableRankMetric)]
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model, metrics)
        model(torch.randn(9, 3))
        model(torch.randn(9, 3))
        probe.compute()
        assert calls == ["sum", "sum", "eigh"]

    def test_stages_are_apart_and_reset_apart(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model)
        model(torch.randn(9, 3))
        assert_nothing(probe, "the layers ran in train only", "eval")
        model.eval()
        model(torch.randn(4, 3))
        assert set(probe.compute()) == {"saturation/train/0", "saturation/eval/0"}
        assert set(probe.compute("eval")) == {"saturation/eval/0"}
        probe.reset("train")
        assert set(probe.compute()) == {"saturation/eval/0"}
        probe.reset()
        assert_nothing(probe, "made or reset")
        with pytest.raises(ValueError, match="'test'"):
            probe.compute("test")
        with pytest.raises(ValueError, match="'test'"):
            probe.reset("test")

    def test_looking_up_a_layer(self):
        probe = LayerProbe(ResNet())
        for wrong in ("stem", "train", ("train", "stem", "count"), 0):
            with pytest.raises(
                KeyError, match=r"a stage and a layer, such as probe\['train', 'stem'\], got"
            ) as told:
                probe[wrong]
            assert repr(wrong) in str(told.value)
        assert isinstance(probe["eval", "layer1.0.conv1"], torchmetrics.MetricCollection)
        with pytest.raises(KeyError, match="'layer1' is not probed"):
            probe["train", "layer1"]
        with pytest.raises(ValueError, match="'test'"):
            probe["test", "stem"]

    def test_it_says_in_a_line_what_it_is(self):
        assert repr(LayerProbe(nn.Linear(2, 2))) == "LayerProbe(saturation of 1 layers: Linear)"
        probe = LayerProbe(ResNet(), [sm.SaturationMetric(), sm.StableRankMetric()], layers="*")
        text = repr(probe)
        assert text.startswith("LayerProbe(saturation, stable_rank of 15 layers: ResNet, stem, ")
        assert len(text.splitlines()) == 1
        assert len(text) < 200
        assert str(probe) == text

    def test_names_that_modules_have_themselves(self):
        model = nn.ModuleDict({"metrics": nn.Linear(2, 2), "eval/0": nn.Linear(2, 2), "a/b": nn.Linear(2, 2)})
        probe = LayerProbe(model)
        for layer in model.values():
            layer(torch.randn(4, 2))
        assert set(probe.compute()) == {f"saturation/train/{name}" for name in ("metrics", "eval/0", "a/b")}

    def test_bad_rows_warn_once_with_the_layer(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        probe = LayerProbe(model, [sm.SaturationMetric(), sm.StableRankMetric()])
        rows = torch.randn(9, 3)
        rows[2] = torch.nan
        model(rows)
        with pytest.warns(UserWarning, match="left out in train: 1 of '0', 1 of '1'") as seen:
            assert len(probe.compute()) == 4
        assert len(seen) == 1
        strict = LayerProbe(model, sm.SaturationMetric(nan_strategy="error"))
        model(rows)
        with pytest.raises(RuntimeError, match="1 observations of layer '0' in train"):
            strict.compute()

    @pytest.mark.parametrize(
        "metric", [sm.SaturationMetric(), sm.CovarianceTraceMetric(), sm.CovarianceMetric()]
    )
    def test_one_layer_that_overflows_does_not_take_the_others_along(self, metric):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
        probe = LayerProbe(model, {"saturation": metric})
        model[0](torch.randn(9, 3).double())
        model[1](torch.randn(9, 3).double() * 1e200)
        with pytest.warns(
            UserWarning,
            match=r"are left out: '.*' of '1' .*squares of the observations exceed",
        ):
            assert list(probe.compute()) == ["saturation/train/0"]


class TestControls:
    def model(self):
        return nn.Sequential(nn.Linear(3, 3))

    def count(self, probe, stage="train"):
        return int(probe[stage, "0"]["saturation"].count)

    def test_every_n_steps(self):
        model = self.model()
        probe = LayerProbe(model, every_n_steps=3)
        sizes = [10**power for power in range(6)]
        for size in sizes:
            model(torch.randn(size, 3))
        # The first forward, and one of the three after it.
        assert self.count(probe) - sizes[0] in sizes[3:]
        model.eval()
        model(torch.randn(7, 3))
        assert self.count(probe, "eval") == 7

    def test_max_samples(self):
        model = nn.Sequential(nn.Conv2d(1, 3, 1))
        probe = LayerProbe(model, max_samples=10)
        for _ in range(4):
            model(torch.randn(4, 1, 2, 2))
        assert self.count(probe) == 10 * 4  # positions of ten images
        probe.reset()
        model(torch.randn(4, 1, 2, 2))
        assert self.count(probe) == 16

    def test_rows_per_feature(self):
        model = nn.Sequential(nn.Conv2d(1, 3, 1))
        probes = [LayerProbe(model, sm.CovarianceMetric(), rows_per_feature=2.5, seed=s) for s in (1, 1, 2)]
        for _ in range(5):
            model(torch.randn(4, 1, 8, 8))
        assert int(probes[0]["train", "0"]["covariance"].count) == 5 * 8
        values = [probe.compute()["covariance/train/0"] for probe in probes]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
        probes[0].reset()

    def test_sampling_is_unbiased(self):
        model = nn.Sequential(nn.Identity())
        rows = random_rows(0, 300, 3, mean=2.0)
        sampled = LayerProbe(model, sm.CovarianceMetric(), layers="0", rows_per_feature=10)
        for _ in range(300):
            model(rows)
        exact = feed(sm.CovarianceMetric(), rows).compute()
        error = (sampled.compute()["covariance/train/0"] - exact).abs().max()
        assert error < 0.1 * exact.abs().max()

    def test_max_features(self):
        model = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 3))
        probe = LayerProbe(model, max_features=39)
        message = r"'0' is not observed any more in train: 40 features.*0\.0 GiB"
        with pytest.warns(UserWarning, match=message) as seen:  # noqa: PT031
            for _ in range(2):
                model(torch.randn(5, 3))
                model(torch.randn(5, 3))
                probe.reset()
            model(torch.randn(5, 3))
        assert len(seen) == 1
        with pytest.warns(UserWarning, match="saw nothing"):
            assert list(probe.compute()) == ["saturation/train/1"]

    def test_a_width_that_changes_ends_the_layer_and_not_the_training(self):
        model = nn.Sequential(nn.Identity())
        probe = LayerProbe(model, layers="0")
        model(torch.randn(5, 3))
        message = "'0' is not observed any more in train: .*3 features, got 4: .* a module of its own"
        with pytest.warns(UserWarning, match=message):
            model(torch.randn(5, 4))
        model(torch.randn(5, 3))
        assert self.count(probe) == 5
        probe.reset()
        model(torch.randn(6, 4))
        assert self.count(probe) == 6

    def test_outputs_that_cannot_be_observed(self):
        model = nn.Sequential(nn.Identity())
        LayerProbe(model, layers="0").remove()
        probe = LayerProbe(model, layers="0")
        with pytest.warns(UserWarning, match="floating tensor in the output, got a Tensor of torch.int64"):
            model(torch.arange(3))
        assert_nothing(probe, "floating tensor in the output")

    def test_limits_that_are_set_later_hold_from_then_on(self):
        model = self.model()
        probe = LayerProbe(model, max_samples=4)
        model(torch.randn(5, 3))
        assert (probe.max_samples, self.count(probe)) == (4, 4)
        probe.max_samples = 6
        model(torch.randn(5, 3))
        assert self.count(copy.deepcopy(probe)) == 6
        assert (probe.rows_per_feature, probe.max_features, probe.sketch_size, probe.seed) == (
            None,
            8192,
            None,
            0,
        )
        probe.reset()
        probe.max_samples, probe.rows_per_feature = None, 1
        model(torch.randn(500, 3))
        assert self.count(probe) == probe["train", "0"].saturation.num_features

    def test_pause_and_resume(self):
        model = self.model()
        probe = LayerProbe(model)
        probe.pause()
        model(torch.randn(5, 3))
        with probe.paused():
            model(torch.randn(5, 3))
        probe.resume()
        model(torch.randn(7, 3))
        with probe.paused():
            model(torch.randn(5, 3))
        model(torch.randn(7, 3))
        assert self.count(probe) == 14
        probe.resume()  # one too many; it does not offset the next pause
        with probe.paused():
            model(torch.randn(5, 3))
        assert self.count(probe) == 14

    def test_context_manager_and_remove(self):
        model = self.model()
        with LayerProbe(model) as probe:
            model(torch.randn(5, 3))
        model(torch.randn(5, 3))
        assert self.count(probe) == 5
        assert probe.compute()
        probe.remove()

    def test_masks(self):
        model = self.model()
        probe = LayerProbe(model, sm.CovarianceMetric())
        tokens = torch.randn(4, 6, 3)
        mask = torch.rand(4, 6) > 0.4
        with probe.mask(mask):
            output = model(tokens).detach()
        expected = feed(sm.CovarianceMetric(), output[mask]).compute()
        assert_same(probe.compute()["covariance/train/0"], expected)
        model(tokens)
        assert int(probe["train", "0"]["covariance"].count) == int(mask.sum()) + 24
        with pytest.raises(TypeError, match=r"torch\.int64"), probe.mask(mask.long()):
            pass
        with pytest.raises(ValueError, match=r"\(4,\)"), probe.mask(mask[:, 0]):
            pass

    def test_a_mask_that_fits_nothing_is_told_once(self):
        model = self.model()
        probe = LayerProbe(model, sm.CovarianceMetric())
        tokens, other = torch.randn(4, 6, 3), torch.ones(4, 5, dtype=torch.bool)
        with (
            pytest.warns(UserWarning, match=r"\(4, 5\) fits no sequence .* of '0'.*\(4, 6, "),
            probe.mask(other),
        ):
            model(tokens)
        with probe.mask(other):
            model(tokens)  # already warned
        assert int(probe["train", "0"]["covariance"].count) == 48

    def test_select(self):
        class AutoEncoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = nn.LSTM(3, 4, num_layers=2, batch_first=True)
                self.decoder = nn.Linear(4, 3)

            def forward(self, x):
                return self.decoder(self.encoder(x)[1][0][-1])

        model = AutoEncoder()
        probe = LayerProbe(model, sm.CovarianceMetric(), select={"enc*": lambda output: output[1][0][-1]})
        hidden = []
        model.encoder.register_forward_hook(lambda m, a, output: hidden.append(output[1][0][-1].detach()))
        model(torch.randn(9, 5, 3))
        assert_same(
            probe.compute()["covariance/train/encoder"], feed(sm.CovarianceMetric(), hidden[0]).compute()
        )
        # The shape of the selected tensor decides, not the type of the layer.
        for settings in ({"sequences": "last"}, {"sequences": "flatten"}, {"max_samples": 5}):
            other = LayerProbe(model, select={"encoder": lambda output: output[1][0][-1]}, **settings)
            model(torch.randn(9, 5, 3))
            metric = other["train", "encoder"]["saturation"]
            assert (int(metric.count), metric.num_features) == (min(9, settings.get("max_samples", 9)), 4)
        convolution = nn.Sequential(nn.Conv1d(4, 3, 2))
        other = LayerProbe(convolution, select={"0": lambda output: output.mean(2)})
        convolution(torch.randn(6, 4, 7))
        assert other["train", "0"]["saturation"].num_features == 3
        with pytest.raises(ValueError, match="'nothing'"):
            LayerProbe(model, select={"nothing": lambda output: output})

    def test_a_select_that_runs_the_model_is_not_observed_itself(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        probe = LayerProbe(model, select={"0": lambda output: model[1](output)})
        model(torch.randn(5, 4))
        assert int(probe["train", "1"]["saturation"].count) == 5
        assert probe["train", "0"]["saturation"].num_features == 2

    @pytest.mark.parametrize("error", [KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError])
    def test_an_error_ends_the_observation_and_not_the_training(self, error):
        def fail(output):
            raise error("mine")

        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        probe = LayerProbe(model, select={"0": fail})
        message = f"'0' is not observed any more in train: {error.__name__}"
        with pytest.warns(UserWarning, match=message) as seen:  # noqa: PT031
            model(torch.randn(5, 4))
            model(torch.randn(5, 4))
        assert len(seen) == 1
        assert int(probe["train", "1"]["saturation"].count) == 10

    def test_warnings_that_are_errors_end_no_forward(self, caplog):
        """Under `python -W error`, a probe logs the warnings that it has during a forward."""

        def noisy(output):
            warnings.warn("the user's own", UserWarning, stacklevel=1)
            return output

        model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3), nn.Linear(3, 2))
        probe = LayerProbe(model, max_features=8, select={"1": noisy})
        mask = torch.ones(6, 7, dtype=torch.bool)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = model(torch.randn(5, 4))
            outputs.sum().backward()
            with probe.mask(mask):
                model(torch.randn(5, 4, 4))
        assert "layer '0' is not observed any more in train: 9 features exceed" in caplog.text
        assert "layer '1' is not observed any more in train: UserWarning: the user's own" in caplog.text
        assert "the mask of shape (6, 7) fits no sequence" in caplog.text
        assert int(probe["train", "2"]["saturation"].count) == 25
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="saw nothing in train"):
                probe.compute()  # outside of a forward the user's filters apply

    def test_an_output_that_holds_itself(self):
        @dataclasses.dataclass
        class Node:
            parent: object
            value: object

        class Model(nn.Module):
            def forward(self, x):
                node = Node(None, x if len(x) > 3 else None)
                node.parent = node
                return node

        model = Model()
        probe = LayerProbe(model, layers="Model")
        assert model(torch.randn(5, 2)).value.shape == (5, 2)
        with pytest.warns(UserWarning, match="'Model' is not observed any more in train: ValueError: expected"):
            model(torch.randn(3, 2))
        assert int(probe["train", "Model"]["saturation"].count) == 5

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize(
        "part",
        [
            "core.how_it_runs",
            "core.undisturbed.__enter__",
            "core.ObservationRule.batch",
            "routing.Router.batch_of",
            "core.draw",
            "core.Steps.observes",
            "rules.Batch.observations",
            "collections.LayerMetrics.update",
        ],
    )
    def test_an_error_in_any_part_ends_no_forward(self, part, compiled, monkeypatch):
        def fail(*args, **kwargs):
            raise MemoryError("no room")

        torch.compiler.reset()
        model = nn.Sequential(nn.Linear(4, 3))
        probe = LayerProbe(model, rows_per_feature=1, every_n_steps=2)
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        rows = torch.randn(5, 4)
        monkeypatch.setattr(f"spectralmetrics.probing.{part}", fail)
        with pytest.warns(UserWarning, match="'0' is not observed any more in train: MemoryError: no room"):
            outputs = run(rows)
        assert outputs.requires_grad
        monkeypatch.undo()
        torch.testing.assert_close(run(rows), outputs)
        probe.reset()
        run(rows)
        assert int(probe["train", "0"]["saturation"].count) == 3

    @pytest.mark.parametrize("sequences", ["timesteps", "last", "mean", "flatten"])
    def test_empty_outputs_are_no_observations(self, sequences):
        model = nn.Sequential(nn.Linear(4, 4))
        probe = LayerProbe(model, sequences=sequences)
        model(torch.ones(3, 0, 4))
        model(torch.ones(0, 4))
        assert_nothing(probe, "the layers ran, but put out no observations")

    @pytest.mark.parametrize(
        ("arguments", "error", "quoted"),
        [
            ({"every_n_steps": 0}, ValueError, "every_n_steps.*0"),
            ({"every_n_steps": 1.5}, ValueError, "every_n_steps.*1.5"),
            ({"metrics": sm.SaturationMetric}, TypeError, "the class SaturationMetric; call it"),
            ({"layers": [nn.Linear(3, 3)]}, TypeError, "got Linear"),
            ({"max_features": 0}, ValueError, "max_features.*0"),
            ({"max_samples": 0}, ValueError, "max_samples.*0"),
            ({"rows_per_feature": -1}, ValueError, "rows_per_feature.*-1"),
            ({"metrics": []}, ValueError, "at least one metric"),
            ({"metrics": [sm.SaturationMetric(), sm.SaturationMetric()]}, ValueError, "'saturation'.*dict"),
            ({"metrics": {"double": sm.SaturationMetric()}}, ValueError, "'double'"),
            ({"metrics": {"a.b": sm.SaturationMetric()}}, ValueError, "'a.b'"),
            ({"metrics": [3]}, TypeError, "got int"),
            ({"metrics": 3}, TypeError, "got int"),
        ],
    )
    def test_bad_arguments(self, arguments, error, quoted):
        model = self.model()
        with pytest.raises(error, match=quoted):
            LayerProbe(model, **arguments)
        assert not model[0]._forward_hooks
        with pytest.raises(TypeError, match="got str"):
            LayerProbe("model")


class TestResume:
    @pytest.mark.parametrize("killed_after", [1, 4, 7])
    def test_a_killed_epoch_ends_with_the_same_values(self, killed_after, tmp_path):
        def metrics():
            return [sm.SaturationMetric(), sm.CovarianceMetric(), sm.EigenspaceEmbeddingMetric(max_samples=7)]

        def run(model, probe, steps):
            for step in steps:
                model.train(step % 3 != 2)
                model(
                    random_rows(step, 24, 3, dtype=torch.float32)
                    .reshape(6, 1, 12)[:, :, :9]
                    .reshape(6, 1, 3, 3)
                )

        def new(seed=0):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(16, 2))
            options = {"every_n_steps": 2, "rows_per_feature": 2, "max_samples": 16}
            return model, LayerProbe(model, metrics(), **options)

        model, probe = new()
        run(model, probe, range(3))
        probe.compute()
        probe.reset()
        run(model, probe, range(3, 12))
        expected = probe.compute()

        model, probe = new()
        run(model, probe, range(3))
        probe.compute()
        probe.reset()
        assert not probe.state_dict()
        probe.persistent(True)
        run(model, probe, range(3, 3 + killed_after))
        torch.save({"model": model.state_dict(), "probe": probe.state_dict()}, tmp_path / "checkpoint.pt")

        model, probe = new(seed=99)
        saved = torch.load(tmp_path / "checkpoint.pt")
        model.load_state_dict(saved["model"])
        probe.load_state_dict(saved["probe"])
        run(model, probe, range(3 + killed_after, 12))
        values = probe.compute()
        assert list(values) == list(expected)
        for key, value in values.items():
            # The same observations. Saving has added the waiting rows earlier, which rounds differently.
            torch.testing.assert_close(value, expected[key], rtol=1e-13, atol=1e-15, msg=key)

    def test_states_are_saved_once_per_layer(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model, [sm.SaturationMetric(), sm.StableRankMetric(), sm.CovarianceTraceMetric()])
        model(torch.randn(9, 3))
        probe.persistent(True)
        assert len([key for key in probe.state_dict() if key.endswith("second_moment")]) == 2  # train and eval
        probe.persistent(False)
        assert not probe.state_dict()

    def test_a_state_that_was_not_saved_is_missed(self):
        model = nn.Sequential(nn.Linear(3, 3))
        saved = LayerProbe(model).state_dict()
        probe = LayerProbe(model)
        probe.persistent(True)
        with pytest.raises(RuntimeError, match="progress"):
            probe.load_state_dict(saved)

    def test_another_set_of_layers_is_refused(self):
        probe = LayerProbe(nn.Sequential(nn.Linear(3, 3)))
        probe.persistent(True)
        other = LayerProbe(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        with pytest.raises(ValueError, match="2 probed layers, got a state of 1"):
            other.load_state_dict(probe.state_dict())

    def test_a_copied_probe_keeps_the_observations(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model)
        model(torch.randn(9, 3))
        for twin in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
            assert twin.compute() == probe.compute()
            model(torch.randn(9, 3))
            assert int(twin["train", "0"]["saturation"].count) < int(probe["train", "0"]["saturation"].count)


class TestDevices:
    def test_states_live_where_the_activations_do_unless_moved(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model).to("cpu")
        model(torch.randn(9, 3))
        assert probe["train", "0"]["saturation"]._pinned_device == torch.device("cpu")
        assert probe.cpu() is probe

    def test_casting_the_probe_leaves_float64(self):
        model = nn.Sequential(nn.Linear(3, 3))
        probe = LayerProbe(model)
        model(torch.randn(9, 3))
        for cast in (probe.half, probe.float, lambda: probe.to(torch.bfloat16)):
            cast()
            assert probe["train", "0"]["saturation"].second_moment.dtype == torch.float64


# Called from C, so that no other line of this file is among the callers.
READINGS = [methodcaller("compute", "train"), methodcaller("compute"), methodcaller("covariances", "train")]


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("read", READINGS, ids=str)
def test_warnings_of_a_reading_name_the_line_of_the_user(read, has_run):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    probe = LayerProbe(model, sm.SaturationMetric())
    if has_run:
        model[0](torch.randn(3, 3))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        read(probe)
    assert told or has_run
    assert {each.filename for each in told} <= {__file__}
