"""A training of the Hugging Face trainer that goes on from a checkpoint has the records of one in one go."""

import contextlib
import functools
import math

import pytest
from transformers import TrainerCallback

from spectralmetrics.integrations.transformers import LayerProbeCallback
from tests.integrations import test_transformers_forwards as hf
from tests.integrations.resuming import differing, drawing, metrics, numbers

pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, STEPS = 3, 6  # and so many in each


class Failing(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyError("cut off")


def train(folder, run, checkpoint=None, fails_at=None, probing=None, **arguments):
    how = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 8,
        "logging_steps": 4,
        "eval_strategy": "no",
    }
    trainer = hf.make_trainer(folder, hf.Net(), **how | arguments)
    callback = LayerProbeCallback(trainer, metrics(), recorder=run, **drawing() | (probing or {}))
    trainer.add_callback(callback)
    if fails_at is not None:
        trainer.add_callback(Failing(fails_at))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The numbers of a training in one go, by the arguments of its trainer."""

    @functools.cache
    def of(**arguments):
        folder = tmp_path_factory.mktemp("whole")
        train(folder, folder / "run", **arguments)
        return numbers(folder / "run")

    return of


BY_STEPS = {"save_strategy": "steps", "save_steps": 2}
BY_EPOCHS = {"save_strategy": "epoch"}
EACH = {"eval_strategy": "epoch"}
CASES = {  # the step of the checkpoint, arguments of the trainer
    "in the middle of an epoch": (8, BY_STEPS),
    "in the middle, with evaluations": (8, BY_STEPS | EACH),
    "after an evaluation in the middle": (10, BY_STEPS | {"eval_strategy": "steps", "eval_steps": 2}),
    "at the last step of an epoch": (6, BY_STEPS),
    "at the last step, with evaluations": (6, BY_STEPS | EACH),
    "at the last step of all": (18, BY_STEPS),
    "at the end of an epoch": (6, BY_EPOCHS),
    "at the end, with evaluations": (12, BY_EPOCHS | EACH),
    "in the middle of a sum of gradients": (2, BY_STEPS | {"gradient_accumulation_steps": 2}),
    "the model alone": (8, BY_STEPS | {"save_only_model": True, "learning_rate": 0.0}),
    "the best one": (8, BY_STEPS | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}),
    "the last one alone": (8, BY_STEPS | {"save_total_limit": 1}),
}
# The trainer does not make up for an evaluation that was to follow, and then draws of later ones are others.
LOSE_AN_EVALUATION = {"at the last step, with evaluations"}


@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_row_is_that_of_a_training_in_one_go(case, is_fresh, whole, tmp_path):
    at, arguments = CASES[case]
    with pytest.raises(KeyError) if at < EPOCHS * STEPS else contextlib.nullcontext():
        train(tmp_path, tmp_path / "run", fails_at=at + (not is_fresh), **arguments)
    run = tmp_path / "fresh" if is_fresh else tmp_path / "run"
    train(tmp_path, run, str(tmp_path / f"checkpoint-{at}"), **arguments)
    steps = STEPS // arguments.get("gradient_accumulation_steps", 1)
    epoch = (at - 1) // steps
    has_ended = arguments["save_strategy"] == "epoch"

    def counts(key):
        if case in LOSE_AN_EVALUATION and key[2] == "eval":
            return False
        return (
            not is_fresh or key[0] > epoch or (not has_ended and key[0] == epoch and (key[1] or math.inf) > at)
        )

    assert differing(run, whole(**arguments), counts) == {}
    assert {key[0] for key in numbers(run)} == set(range(epoch + has_ended if is_fresh else 0, EPOCHS))
