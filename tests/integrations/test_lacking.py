"""A checkpoint that lacks observations: a trainer that resumes from it warns."""

import warnings

import pytest

from spectralmetrics import CovarianceTraceMetric, SaturationMetric
from spectralmetrics.integrations.lightning import LayerProbeCallback
from tests.integrations import test_resuming_transformers as hf
from tests.integrations.resuming import numbers
from tests.integrations.rows import Rows
from tests.integrations.test_resuming_lightning import LAST, Saving, fit

pytestmark = pytest.mark.filterwarnings("ignore")


def said(function, about="the checkpoint"):
    """Texts of the warnings that begin with ``about``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [words for each in caught if (words := str(each.message)).startswith(about)]


ROWS, SPREAD = {"rows": Rows()}, {"variance": CovarianceTraceMetric()}
END = ("on_train_epoch_end", LAST)


@pytest.mark.parametrize(
    ("event", "before", "after", "lacking"),
    [
        (("on_train_batch_end", 3), {"metrics": ROWS, "layers": "model.0"}, {"metrics": ROWS}, "'model.2'"),
        (("on_train_batch_end", 3), {"metrics": ROWS}, {"metrics": ROWS | SPREAD}, "'variance'"),
        # These share their sums, and a new epoch lacks nothing.
        (("on_train_batch_end", 3), {"metrics": SPREAD}, {"metrics": SPREAD | {"s": SaturationMetric()}}, None),
        (END, {"metrics": ROWS, "layers": "model.0"}, {"metrics": ROWS | SPREAD}, None),
    ],
)
def test_layers_and_metrics_of_which_a_checkpoint_has_nothing(event, before, after, lacking, tmp_path):
    path = tmp_path / "saved.ckpt"
    with pytest.raises(KeyError):
        fit(tmp_path, [LayerProbeCallback(**before), Saving(path, *event, 0)])
    found = said(lambda: fit(tmp_path, [LayerProbeCallback(**after)], path))
    words = (
        f"the checkpoint has no observations of {lacking}: their values and record of this epoch are of what"
    )
    assert found == ([] if lacking is None else [f"{words} comes after it alone"])


def test_metrics_of_a_checkpoint_that_a_callback_lacks(tmp_path):
    path = tmp_path / "saved.ckpt"
    with pytest.raises(KeyError):
        fit(tmp_path, [LayerProbeCallback(ROWS | SPREAD), Saving(path, "on_train_batch_end", 3, 0)])
    with pytest.raises(ValueError, match="of metrics that this probe has, got a state of 'rows'"):
        fit(tmp_path, [LayerProbeCallback(SPREAD)], path)


@pytest.mark.parametrize(
    ("event", "at", "epoch"), [("on_train_batch_end", 3, 0), ("on_validation_end", LAST, None), (*END, None)]
)
def test_a_checkpoint_of_lightning_without_the_callback(event, at, epoch, tmp_path):
    path = tmp_path / "saved.ckpt"
    with pytest.raises(KeyError):
        fit(tmp_path, [Saving(path, event, at, 0)])
    found = said(lambda: fit(tmp_path, [LayerProbeCallback(ROWS)], path))
    words = (
        f"the checkpoint {str(path)!r} has no observations of this callback: values and record of epoch {epoch}"
    )
    assert found == ([] if epoch is None else [f"{words} are of what comes after it alone"])


@pytest.mark.parametrize(
    ("at", "lost"),
    [(6, "epoch 0 gets no record"), (8, "values and record of epoch 1 are of what comes after it alone")],
)
def test_checkpoints_of_transformers_with_the_model_alone(at, lost, tmp_path):
    """Without a state of the optimizer, checkpoints have no observations either."""
    how = hf.BY_STEPS | {"save_only_model": True}
    checkpoint, run = hf.cut_off(tmp_path, at, **how), tmp_path / "fresh"
    assert not list(tmp_path.glob("checkpoint-*/layer_probe_state*"))
    found = said(lambda: hf.train(tmp_path, run, str(checkpoint), **how))
    words = f"the checkpoint of step {at} has no layer_probe_state.pt with the observations before it"
    assert found == [f"{words}: {lost}"]
    assert {key[0] for key in numbers(run)} == {1, 2}
