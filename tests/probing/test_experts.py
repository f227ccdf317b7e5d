"""Experts of transformers' mixtures, whose weights are stacked in one parameter: each counts as a layer."""

import copy

import pytest
import torch
import transformers
from torch import nn

import spectralmetrics as sm
from spectralmetrics import LayerProbe, SpectrumMetric
from tests.oracles import relative_error, two_pass_covariance

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of transformers

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip


def mixtral(how="eager", dtype=torch.float64):
    config = transformers.MixtralConfig(num_local_experts=4, **SIZES)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM._from_config(config, experts_implementation=how).to(dtype)


def qwen3(how="eager", dtype=torch.float64):
    config = transformers.Qwen3MoeConfig(
        moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3, decoder_sparse_step=1, **SIZES
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM._from_config(config, experts_implementation=how).to(dtype)


def words(seed, samples=3, steps=20):
    return torch.randint(64, (samples, steps), generator=torch.Generator().manual_seed(seed))


def by_hand(model, batches, masks=None):
    """Layer -> tokens in and rows out of each expert, computed from the weights, without a probe."""
    found, current = {}, {}
    model = copy.deepcopy(model)  # copies have no hooks
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def keep(module, args, output, name=name):
                states, index = (each.detach() for each in args[:2])
                for expert, (up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                    chosen = (index == expert).any(1)
                    if current["mask"] is not None:
                        chosen = chosen & current["mask"].flatten()
                    gate, value = (states[chosen] @ up.T).chunk(2, -1)
                    rows = (nn.functional.silu(gate) * value) @ down.T
                    found.setdefault(f"{name}.{expert}", []).append((states[chosen], rows))

            module.register_forward_hook(keep)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            current["mask"] = None if masks is None else masks[number]
            model(batch)
    return {name: tuple(map(torch.cat, zip(*each, strict=True))) for name, each in found.items()}


def assert_holds(probe, stage, rows, tolerance=1e-12):
    covariances = probe.covariances(stage)
    assert list(covariances) == [name for name, each in rows.items() if len(each)]
    for name, covariance in covariances.items():
        assert int(probe[stage, name]["spectrum"].count) == len(rows[name])
        assert relative_error(covariance, two_pass_covariance(rows[name])) < tolerance


@pytest.mark.parametrize("make", [mixtral, qwen3])
@pytest.mark.parametrize("how", ["eager", "batched_mm"])
def test_each_expert_is_a_layer_with_the_rows_that_it_puts_out(make, how):
    model, batches = make(how), [words(seed) for seed in range(2)]
    probe = LayerProbe(model, SpectrumMetric(), layers="*.experts")
    inputs = LayerProbe(model, SpectrumMetric(), layers="*.experts", observe="inputs")
    for batch in batches:
        model(batch)
    expected = by_hand(model, batches)
    number = model.config.num_experts * 2
    assert probe.layers == list(expected)
    assert len(probe.layers) == number
    assert sum(len(rows) for _, rows in expected.values()) == 2 * 2 * 60 * model.config.num_experts_per_tok
    assert_holds(probe, "train", {name: rows for name, (_, rows) in expected.items()})
    assert_holds(inputs, "train", {name: states for name, (states, _) in expected.items()})
    ceiling = 16 if make is mixtral else 12
    assert {(fact.kind, fact.ceiling) for fact in probe.facts.values()} == {("Expert", ceiling)}


def test_some_experts_are_chosen_by_name_and_a_module_of_them_is_taken_whole_by_select():
    model = mixtral()
    probe = LayerProbe(model, layers=["*.0.mlp.experts.[13]", "*.1.mlp.experts"], exclude="*.experts.0")
    prefix = "model.layers.{}.mlp.experts.{}"
    assert probe.layers == [prefix.format(*each) for each in ((0, 1), (0, 3), (1, 1), (1, 2), (1, 3))]
    of_callable = LayerProbe(model, layers=lambda name, module: name.endswith("1.mlp.experts.2"))
    assert of_callable.layers == [prefix.format(1, 2)]
    of_type = LayerProbe(model, layers=type(model.model.layers[0].mlp.experts), exclude="*.1.*")
    assert of_type.layers == [prefix.format(0, number) for number in range(4)]
    whole = LayerProbe(model, layers="*.experts", select={"*.experts": lambda output: output})
    assert whole.layers == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    with pytest.raises(ValueError, match=r"no layer matches '\*\.experts\.4'"):
        LayerProbe(model, layers="*.experts.4")
    model(words(0))
    assert int(whole["train", whole.layers[0]]["saturation"].count) == 60
    # Gradients arrive only at the whole module.
    gradients = LayerProbe(model, layers="*.experts", observe="gradients")
    model(words(0)).logits.sum().backward()
    assert len(gradients.compute()) == 2


def test_pairs_are_drawn_and_limited_as_rows_are():
    model, batches = qwen3(), [words(seed) for seed in range(3)]
    metrics = [SpectrumMetric(), sm.HistoryMetric(steps=4)]
    drawn = LayerProbe(model, metrics, layers="*.experts", rows_per_feature=0.3, seed=2)
    alone = LayerProbe(model, SpectrumMetric(), layers="*.experts", rows_per_feature=0.3, seed=2)
    few = LayerProbe(model, SpectrumMetric(), layers="*.experts", max_samples=35)
    left = LayerProbe(model, layers="*.experts", max_features=15)
    for batch in batches:
        model(batch)
    each = [by_hand(model, [batch]) for batch in batches]
    for name in drawn.layers:
        rows = [len(one[name][1]) for one in each]
        assert int(drawn["train", name]["spectrum"].count) == sum(min(5, number) for number in rows)
        assert int(few["train", name]["spectrum"].count) == min(sum(rows), 35)
        assert [row.observations for row in drawn.history().rows if row.layer == name] == [n for n in rows if n]
        assert torch.equal(
            alone["train", name]["spectrum"].compute(), drawn["train", name]["spectrum"].compute()
        )
    assert not left.compute()


def test_masks_and_labels_are_those_of_the_tokens():
    model, batches = mixtral(), [words(seed) for seed in range(2)]
    masks = [torch.rand(3, 20, generator=torch.Generator().manual_seed(seed)) < 0.6 for seed in range(2)]
    probe = LayerProbe(model, [SpectrumMetric(), sm.LinearProbeMetric(3)], layers="*.experts", folds=2)
    for batch, mask in zip(batches, masks, strict=True):
        with probe.mask(mask), probe.labels(batch % 3):
            model(batch)
    assert_holds(probe, "train", {name: rows for name, (_, rows) in by_hand(model, batches, masks).items()})
    name = probe.layers[0]
    states = by_hand(model, batches, masks)[name][0]
    assert int(probe["train", name]["linear_probe"].count) == len(states)
    # Labels of samples do not fit tokens.
    probe.reset()
    told = r"labels of shape \(3,\).*'model.layers.0.mlp.experts' \(60, 16\)"
    with pytest.warns(UserWarning, match=told), probe.labels(torch.arange(3)):
        model(batches[0])
    assert not any("linear_probe" in key for key in probe.compute())


class Counted(nn.Module):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return nn.functional.silu(x)


def trained(has_probe, how, run=lambda model: model, cast=False):
    model = qwen3(how, torch.float32)
    probe = LayerProbe(model, SpectrumMetric(), layers="*.experts", rows_per_feature=1) if has_probe else None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    called = run(model)
    torch.manual_seed(0)
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            called(words(seed)).logits.square().mean().backward()
        optimizer.step()
    ends = [each for p in model.parameters() for each in (p.detach(), p.grad)] + [torch.random.get_rng_state()]
    return ends, probe


@pytest.mark.parametrize(("how", "cast"), [("eager", False), ("grouped_mm", False), ("eager", True)])
def test_training_is_the_same_to_the_bit(how, cast):
    (plain, _), (probed, probe) = (trained(has_probe, how, cast=cast) for has_probe in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, probed, strict=True))
    assert len(probe.compute()) == 12


def test_what_is_inside_runs_no_more_often_for_others():
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = Counted()
    seen = []
    model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *arguments: seen.append(1))
    inside = LayerProbe(model, layers="*.act_fn")
    probe = LayerProbe(model, layers=["*.experts", "*.act_fn"])
    model(words(0))
    assert len(seen) == 4
    for each in (inside, probe):
        assert each._places["train", "model.layers.0.mlp.experts.act_fn"].forwards == 4
    assert len(copy.deepcopy(model).model.layers[0].mlp.experts._forward_pre_hooks) == 0


def test_under_autocast_rows_are_those_of_autocast():
    model = mixtral(dtype=torch.float32)
    probe = LayerProbe(model, SpectrumMetric(), layers="*.experts")
    with torch.autocast("cpu", torch.bfloat16):
        model(words(0))
        expected = by_hand(model, [words(0)])
    assert_holds(probe, "train", {name: rows.double() for name, (_, rows) in expected.items()}, 1e-6)


@pytest.mark.parametrize(("is_before", "cast"), [(True, False), (False, True)])
def test_compiled_experts_are_seen(is_before, cast):
    """The operation runs the experts outside of the graph, which stays whole."""
    torch.compiler.reset()
    model, batches = mixtral("batched_mm", torch.float32 if cast else torch.float64), [words(0), words(1)]
    chosen, block = "*.0.mlp.experts", model.model.layers[0].mlp
    probe = LayerProbe(model, SpectrumMetric(), layers=chosen) if is_before else None
    block.compile(backend="aot_eager", fullgraph=True)
    probe = probe or LayerProbe(model, SpectrumMetric(), layers=chosen)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for batch in batches:
            model(batch).logits.sum().backward()
        expected = by_hand(model, batches)
    rows = {name: each.double() for name, (_, each) in expected.items() if ".0.mlp" in name}
    assert_holds(probe, "train", rows, 1e-6 if cast else 1e-12)
