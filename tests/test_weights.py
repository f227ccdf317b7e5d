"""Spectra of weight matrices, against numpy's SVD and the package powerlaw."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import spectralmetrics as sm
from spectralmetrics.checkpoints import checkpoint_spectra
from spectralmetrics.cli import main
from spectralmetrics.functional import power_law_tail
from spectralmetrics.weights import WeightSummary


def heavy(seed, shape=(120, 90), freedom=3):
    return np.random.default_rng(seed).standard_t(freedom, size=shape)


# -- the power law --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Standard error for the MLE:DeprecationWarning")  # powerlaw's own use
@pytest.mark.parametrize("seed", range(3))
def test_the_tail_is_that_of_the_package_powerlaw(seed):
    powerlaw = pytest.importorskip("powerlaw")
    values = np.linalg.svd(heavy(seed), compute_uv=False) ** 2
    peer = powerlaw.Fit(values, verbose=False, parameter_ranges={"alpha": [1, 50]})
    fit = power_law_tail(torch.tensor(values))
    assert float(fit.alpha) == pytest.approx(peer.power_law.alpha, rel=1e-9)
    assert float(fit.x_min) == pytest.approx(peer.power_law.xmin, rel=1e-12)
    assert float(fit.error) == pytest.approx(peer.power_law.standard_err, rel=1e-9)
    assert float(fit.distance) == pytest.approx(peer.power_law.D, rel=1e-9)
    assert int(fit.tail) == (values >= float(fit.x_min)).sum()


def test_the_tail_of_a_power_law_has_its_exponent_within_the_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(5000, generator=generator, dtype=torch.float64) ** (
        -1 / 1.7
    )  # density with exponent 2.7
    fit = power_law_tail(values)
    assert abs(float(fit.alpha) - 2.7) < 4 * float(fit.error)
    assert float(fit.distance) < 0.02
    again = power_law_tail(1e-9 * values.flip(0))
    assert float(again.alpha) == pytest.approx(float(fit.alpha))


@pytest.mark.parametrize("values", [torch.ones(50), torch.zeros(50), torch.arange(9.0)])
def test_nothing_is_fitted_to_few_or_equal_values(values):
    fit = power_law_tail(values)
    assert int(fit.tail) == 0
    assert all(bool(each.isnan()) for each in fit[:4])


def test_equal_values_are_one_lower_end():
    fit = power_law_tail(torch.tensor([1.0] * 20 + [2.0] * 5 + [4.0, 8.0]))
    assert float(fit.x_min) in (1.0, 2.0, 4.0)
    assert math.isfinite(float(fit.alpha))


@pytest.mark.parametrize("unit", [1e-223, 1e265])
def test_values_close_together_keep_their_digits(unit):
    values = unit * (1 + 1e-9 * np.random.default_rng(0).random(60))
    fit = power_law_tail(torch.tensor(values))
    tail = np.sort(values).astype(np.longdouble)[-int(fit.tail) :]
    expected = 1 + len(tail) / np.log1p((tail - tail[0]) / tail[0]).sum()
    assert float(fit.alpha) == pytest.approx(float(expected), rel=1e-9)


# -- a model --------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 12))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        nn.Linear(60, 70),
        nn.LSTM(7, 5),
        nn.Embedding(20, 9),
        Experts(),
        nn.MultiheadAttention(8, 2),
    )
    model.append(nn.Linear(60, 70))
    model[-1].weight = model[3].weight  # tied
    return model


def test_every_matrix_once_against_numpy():
    model = network()
    summary = sm.weight_spectra(
        model, ["effective_rank", "stable_rank", "participation_ratio", "covariance_trace"]
    )
    state = model.state_dict()
    expected = {
        "0": state["0.weight"].flatten(1),
        "1": torch.cat([group.transpose(0, 1).flatten(1) for group in state["1.weight"].chunk(2)]),
        "3": state["3.weight"],
        "4.weight_ih_l0": state["4.weight_ih_l0"],
        "4.weight_hh_l0": state["4.weight_hh_l0"],
        "5": state["5.weight"],
        **{f"6.up.{expert}": state["6.up"][expert] for expert in range(3)},
        "7.in_proj_weight": state["7.in_proj_weight"],
        "7.out_proj": state["7.out_proj.weight"],
    }
    assert [row.layer for row in summary.rows] == list(expected)
    for row, matrix in zip(summary.rows, expected.values(), strict=True):
        assert row.shape == tuple(matrix.shape)
        values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        shares = values / values.sum()
        assert row.value["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
        assert row.value["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-9)
        squares = values**2
        assert row.value["participation_ratio"] == pytest.approx(
            squares.sum() ** 2 / (squares**2).sum(), rel=1e-9
        )
        assert row.value["covariance_trace"] == pytest.approx((matrix.double() ** 2).sum().item(), rel=1e-12)
        assert row.update == {}


def test_what_training_has_changed():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    before = {f"_orig_mod.{name}": value.clone() for name, value in model.state_dict().items()}
    direction = torch.outer(torch.ones(20), torch.ones(30))
    with torch.no_grad():
        model[0].weight += 0.1 * direction
    first, second = sm.weight_spectra(model, ["stable_rank"], since=before).rows
    assert first.update["stable_rank"] == pytest.approx(1, abs=1e-5)
    size = float(0.1 * direction.norm() / before["_orig_mod.0.weight"].norm())
    assert first.update["relative_size"] == pytest.approx(size, rel=1e-6)
    assert second.update["relative_size"] == 0


def test_layers_that_are_named_as_their_types_keep_their_names():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.GRU, self.Linear, self.Own = nn.GRU(8, 6), nn.Linear(6, 4), nn.Linear(4, 3)
            self.weight = nn.Parameter(torch.randn(4, 6))

    model = Own()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rows = {row.layer: row for row in sm.weight_spectra(model, ["stable_rank"], since=before).rows}
    stored = {
        "Own (model)": "weight",
        "GRU.weight_ih_l0": "GRU.weight_ih_l0",
        "GRU.weight_hh_l0": "GRU.weight_hh_l0",
        "Linear": "Linear.weight",
        "Own": "Own.weight",
    }
    assert list(rows) == list(stored)
    for layer, name in stored.items():
        size = float((model.state_dict()[name] - before[name]).norm() / before[name].norm())
        assert rows[layer].update["relative_size"] == pytest.approx(size, rel=1e-6), layer
    names = [row.layer for row in sm.weight_spectra(model, ["stable_rank"], layers=["GRU", "Linear"]).rows]
    assert names == ["GRU.weight_ih_l0", "GRU.weight_hh_l0", "Linear"]


def test_a_matrix_that_was_not_there_has_no_update():
    model = nn.Sequential(nn.Linear(30, 20))
    [row] = sm.weight_spectra(model, ["stable_rank"], since={}).rows
    assert all(math.isnan(value) for value in row.update.values())
    with pytest.raises(ValueError, match=r"expected '0.weight' of shape \(20, 30\) in since, got \(4, 4\)"):
        sm.weight_spectra(model, since={"0.weight": torch.ones(4, 4)})


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "made",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
)
def test_weights_that_hooks_make_are_of_the_parameters_as_they_are(made):
    """Not as in the last forward: a training step or a loaded state changes only the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(made(nn.Linear(20, 10)))
    model(torch.randn(3, 20))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 * torch.rand(len(parameter), *[1] * (parameter.ndim - 1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    [row] = sm.weight_spectra(model, ["effective_rank", "covariance_trace"]).rows
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    model.eval()
    with torch.no_grad():
        matrix = (model(torch.eye(20)) - model(torch.zeros(1, 20))).T.double()
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    shares = values / values.sum()
    assert row.value["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert row.value["covariance_trace"] == pytest.approx((values**2).sum(), rel=1e-5)


def test_alpha_needs_fifty_values():
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 40), nn.Linear(40, 60))
    wide, *narrow = sm.weight_spectra(model).rows
    assert wide.value["alpha"] > 1
    assert all(math.isnan(row.value["alpha"]) for row in narrow)


def test_what_stands_out():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 30), nn.Linear(30, 30))
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.randn(30), torch.randn(40)))
        model[1].weight.zero_()
        model[2].weight[0, 0] = torch.nan
    summary = sm.weight_spectra(model)
    assert [row.layer for row in summary.rows] == ["0", "1"]
    assert summary.rows[0].stands_out[0].startswith("low rank: 1 of 30")
    assert summary.rows[1].stands_out == ("all zero",)
    assert summary.skipped == {"2": "it holds NaN or infinite values"}
    assert "skipped 2: it holds NaN" in str(summary)


def test_skipped_tensors_are_listed_by_their_reason():
    skipped = {f"block.{number}.norm.bias": "it is no matrix" for number in range(60)}
    summary = WeightSummary([], skipped | {"head": "it is empty"})
    [biases, head] = str(summary).splitlines()[-2:]
    assert biases.startswith("skipped block.0.norm.bias, block.1.norm.bias, ")
    assert biases.endswith(" more: it is no matrix")
    assert len(biases) <= 100
    assert head == "skipped head: it is empty"
    assert summary.skipped.keys() == {*skipped, "head"}


def test_singular_values_far_below_the_largest_are_no_zeros():
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((40, 40)))[0] for _ in range(2))
    layers = [nn.Linear(40, 40, dtype=torch.float64) for _ in range(2)]
    model = nn.Sequential(*layers)
    values = np.logspace(0, -9, 40)
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor(left * values @ right))
        layers[1].weight[:3] = 0
    whole, cut = sm.weight_spectra(model, ["effective_rank", "power_law_exponent"]).rows
    shares = values / values.sum()
    assert whole.value["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    slope = np.polyfit(np.log(np.arange(1, 41)), np.log(values**2), 1)[0]
    assert whole.value["power_law_exponent"] == pytest.approx(-slope, rel=1e-5)
    assert (whole.stands_out, cut.stands_out) == ((), ("3 singular values of zero",))


def test_progress_layers_and_words():
    model, seen = network(), []
    summary = sm.weight_spectra(
        model, layers=["3", "0"], progress=lambda done, total: seen.append((done, total))
    )
    assert [row.layer for row in summary.rows] == ["0", "3"]
    assert seen == [(1, 2), (2, 2)]
    assert max(map(len, str(summary).splitlines())) <= 100
    assert list(summary.to_pandas()["layer"]) == ["0", "3"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((nn.ReLU(),), ValueError, "no layer of ReLU has a weight matrix$"),
        (
            (nn.Linear(4, 4, device="meta"),),
            ValueError,
            "no layer of Linear has a weight matrix; 'Linear': it is on the meta device: if its weights",
        ),
        (("model",), TypeError, "expected model to be a torch.nn.Module, got str"),
        ((nn.Linear(4, 4), ["rank"]), ValueError, "expected statistics among .* got 'rank'"),
        (
            (nn.Linear(4, 4), ["spectrum"]),
            ValueError,
            "expected a statistic that is one number",
        ),
        ((nn.Linear(4, 4), ["linear_probe"]), ValueError, "expected statistics among"),
        ((nn.Linear(4, 4), None, None, [1]), TypeError, "expected since to be a state dict, got list"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        sm.weight_spectra(*arguments)


# -- checkpoints ----------------------------------------------------------------------------------------------


def values_of(summary):
    return {row.layer: row.value for row in summary.rows}


def test_every_format_gives_what_the_model_gives(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(60, 70), nn.Linear(70, 5))
    expected, state = values_of(sm.weight_spectra(model)), model.state_dict()
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    optimizer = torch.optim.Adam(model.parameters())
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "model": wrapped, "optimizer": optimizer.state_dict()}, tmp_path / "nested.pt")
    torch.save(
        {"state_dict": state, "optimizer_states": [{"x": torch.ones(3, 3)}]}, tmp_path / "lightning.ckpt"
    )
    safetensors.save_file(state, tmp_path / "one.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = list(state)
    parts = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, held in parts.items():
        safetensors.save_file({name: state[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in ("plain.pt", "nested.pt", "lightning.ckpt", "one.safetensors", "sharded"):
        found = checkpoint_spectra(tmp_path / path)
        assert values_of(found).keys() == expected.keys()
        for layer, value in values_of(found).items():
            assert value == pytest.approx(expected[layer], nan_ok=True)
        assert set(found.skipped) == {"0.bias", "1.bias", "2.bias"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.ConvTranspose2d(8, 6, 2)),
        nn.ConvTranspose2d(6, 8, 2),
        nn.ConvTranspose1d(8, 6, 3, groups=2),
        nn.Conv2d(8, 6, 3, groups=2),
    ],
    ids=["transposed", "wider, no prefix", "transposed, groups", "groups"],
)
def test_the_length_of_the_bias_tells_a_transposed_convolution_in_a_checkpoint(layer, tmp_path):
    torch.save(layer.state_dict(), tmp_path / "model.pt")
    [expected], [found] = sm.weight_spectra(layer).rows, checkpoint_spectra(tmp_path / "model.pt").rows
    assert found.shape == expected.shape
    assert found.value == pytest.approx(expected.value, nan_ok=True)


def test_tied_experts_and_quantised_tensors(tmp_path):
    weight = torch.randn(12, 10)
    state = {
        "embed.weight": weight,
        "head.weight": weight,
        "mlp.experts.up": torch.randn(2, 6, 5),
        "packed.weight": torch.zeros(8, 8, dtype=torch.int8),
        "half.weight": torch.randn(6, 6).to(torch.float8_e4m3fn),
    }
    torch.save(state, tmp_path / "model.pt")
    found = checkpoint_spectra(tmp_path / "model.pt")
    assert [row.layer for row in found.rows] == ["embed", "mlp.experts.up.0", "mlp.experts.up.1", "half"]
    assert found.skipped["head.weight"] == "it is 'embed.weight'"
    assert "int8" in found.skipped["packed.weight"]


def test_values_that_are_no_weights_are_skipped_in_models_as_in_checkpoints(tmp_path):
    class Held(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight, requires_grad=False)

    packed = torch.randint(0, 255, (64, 1), dtype=torch.uint8)  # as in 4-bit layers
    phases = torch.randn(6, 5, dtype=torch.complex64)
    dense = torch.randn(6, 5).relu()
    model = nn.Sequential(*map(Held, (packed, phases, dense.to_sparse(), dense)))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for found, end in (
        (sm.weight_spectra(model), ""),
        (checkpoint_spectra(tmp_path / "model.pt"), ".weight"),
    ):
        assert [row.layer for row in found.rows] == ["2", "3"]
        assert found.rows[0].value == pytest.approx(found.rows[1].value, nan_ok=True)
        assert found.skipped == {
            f"0{end}": "it holds uint8: packed or quantised weights",
            f"1{end}": "it holds complex64",
        }


def test_an_earlier_checkpoint(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(30, 20))
    torch.save(model.state_dict(), tmp_path / "before.pt")
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    torch.save(model.state_dict(), tmp_path / "after.pt")
    [row] = checkpoint_spectra(tmp_path / "after.pt", ["stable_rank"], tmp_path / "before.pt").rows
    assert row.update["relative_size"] == pytest.approx(0.5, rel=1e-6)
    command = ["weights", str(tmp_path / "after.pt"), "--since", str(tmp_path / "before.pt")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    heads, (cells,) = lines[:-2], [line for line in lines if line.startswith("0 ")]
    end = cells.index("0.500") + len("0.500")  # the column's heading ends at the same place
    assert [line[end - 8 : end].strip() for line in heads] == ["update:", "relative", "size"]


def test_an_earlier_state_of_another_model_is_refused(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(30, 20))
    other = nn.ModuleDict({"layer": nn.Linear(30, 20)})
    with pytest.raises(ValueError, match=r"none of '0\.weight'.*first name is 'layer\.weight'"):
        sm.weight_spectra(model, since=other.state_dict())
    torch.save(model.state_dict(), tmp_path / "after.pt")
    torch.save(other.state_dict(), tmp_path / "before.pt")
    assert main(["weights", str(tmp_path / "after.pt"), "--since", str(tmp_path / "before.pt")]) == 2
    assert "none of '0.weight'" in capsys.readouterr().err
    pruned = nn.utils.prune.random_unstructured(nn.Linear(30, 20), "weight", 0.5)
    [row] = sm.weight_spectra(
        model, since={f"0.{name}": value for name, value in pruned.state_dict().items()}
    ).rows
    assert row.update["relative_size"] > 0


def test_matrices_of_gates_and_values_are_whole_weights(tmp_path):
    state = {name: torch.randn(6, 5) for name in ("cell.w_g", "cell.w_v", "cell.w_o")}
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(5, 6, bias=False))
    state |= {f"normed.{name}": value for name, value in normed.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    found = checkpoint_spectra(tmp_path / "model.pt")
    assert [row.layer for row in found.rows] == ["cell.w_g", "cell.w_v", "cell.w_o"]
    assert set(found.skipped) == {"normed.weight_g", "normed.weight_v"}


def test_an_empty_matrix_is_skipped():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(torch.empty(3, 0))
    found = sm.weight_spectra(model)
    assert [row.layer for row in found.rows] == ["0"]
    assert found.skipped == {"1": "it is empty"}


def test_a_folder_of_several_checkpoints_is_refused(tmp_path):
    for epoch in (1, 2):
        torch.save({"0.weight": torch.randn(6, 5)}, tmp_path / f"epoch-{epoch}.pt")
    with pytest.raises(ValueError, match=r"'0\.weight' in 'epoch-1\.pt' and in 'epoch-2\.pt'"):
        checkpoint_spectra(tmp_path)


class Evil:
    pass


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_checkpoint_that_is_cut_off_is_said_to_be(share, is_zip, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model\.pt' (cannot be read as|holds Python objects)"):
        checkpoint_spectra(path)


def test_what_is_refused(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "pickle.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "vectors.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no json!")
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "pickle.pt": "save the model's state_dict() alone",
        "vectors.pt": "expected weight matrices",
        "broken.pt": "cannot be read as a PyTorch checkpoint",
        "broken.safetensors": "cannot be read as .safetensors",
        "text.txt": "expected a .safetensors",
        "model.safetensors.index.json": "it has no weight_map",
        "empty": "expected .safetensors or .pt files",
        "nothing.pt": "found no",
    }.items():
        assert main(["weights", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
