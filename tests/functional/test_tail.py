import pytest
import torch

from spectralmetrics import LayerProbe, Recorder, layer_profile, low_saturation_tail, recompute


def profile(*values):
    return {f"layer{index}": value for index, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.8, 0.7, 0.3, 0.2, 0.9), ["layer2", "layer3"]),
        ((0.8, 0.3, 0.7, 0.2, 0.9), ["layer3"]),
        ((0.1, 0.1, 0.8, 0.9), []),
        ((0.8, 0.4, 0.9), []),  # exactly half is not below half
        ((0.1, 0.9), []),  # the output layer sets no limit
        ((0.0, 0.0, 0.0), []),
        ((0.5,), []),
        ((), []),
    ],
)
def test_the_longest_run_at_the_end(values, expected):
    assert low_saturation_tail(profile(*values)) == expected


def test_tensors_and_options():
    values = {name: torch.tensor(value) for name, value in profile(0.8, 0.5, 0.5, 0.1).items()}
    assert low_saturation_tail(values, ratio=0.7) == ["layer1", "layer2"]
    assert low_saturation_tail(values, output_layers=0) == ["layer3"]
    assert low_saturation_tail(values, output_layers=9) == []


@pytest.mark.parametrize("value", [90.0, -0.1, float("nan"), torch.ones(3)])
def test_what_is_no_saturation_is_refused(value):
    with pytest.raises(ValueError, match=r"saturations in \[0, 1\].*'layer1'"):
        low_saturation_tail(profile(0.5, value))


@pytest.mark.parametrize("arguments", [{"ratio": 1.5}, {"ratio": 0}, {"output_layers": -1}])
def test_bad_arguments_are_quoted(arguments):
    with pytest.raises(ValueError, match=f"got {next(iter(arguments.values()))}"):
        low_saturation_tail({}, **arguments)


def test_of_rows_it_says_what_to_write_and_that_is_a_profile(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    with LayerProbe(model) as probe, Recorder(tmp_path, probe, "arrays") as recorder:
        for _ in range(2):
            model(torch.randn(20, 4))
            values = recorder.record()
    rows = recompute(tmp_path)
    with pytest.raises(TypeError, match=r"got a list\. Of rows, as recompute") as error:
        layer_profile(rows, "saturation", "train")
    code = str(error.value).partition(" write ")[2]
    assert eval(code, {"rows": rows, "epoch": 1}) == layer_profile(values, "saturation", "train")
