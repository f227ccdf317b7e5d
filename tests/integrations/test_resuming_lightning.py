"""A fit of Lightning that goes on from a checkpoint has the records of one that was not cut off."""

import contextlib
import functools
import math

import pytest
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from spectralmetrics.integrations.lightning import LayerProbeCallback
from tests.integrations.lightning_module import Classifier, digits, make_trainer
from tests.integrations.resuming import differing, drawing, metrics, numbers

pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, STEPS = 3, 5  # and so many in each


class Resumable(DataLoader):
    """Goes on with the batch after the checkpoint; of another one Lightning begins with the first again."""

    given = start = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__(), 1):
            if number > start:
                self.given = number
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.start = state["given"] % len(self)


class Short(Classifier):
    def train_dataloader(self):
        return Resumable(digits(0, 32 * STEPS), 32)

    def val_dataloader(self):
        return DataLoader(digits(320, 400), 40)


class Saving(Callback):
    """Saves a checkpoint at one event of one step, and is cut off there or some steps later."""

    def __init__(self, path, event, at, later):
        self.path, self.at, self.until = path, at, at + later
        setattr(self, event, self.save)

    def save(self, trainer, *args):
        if trainer.global_step == self.at and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            if self.until == self.at:
                raise KeyError("cut off")

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.until and self.until > self.at:
            raise KeyError("cut off")


def callback(run, **arguments):
    return LayerProbeCallback(metrics(), recorder=run, **drawing() | arguments)


def fit(folder, callbacks, ckpt_path=None, **arguments):
    how = {"max_epochs": EPOCHS, "log_every_n_steps": 3, "num_sanity_val_steps": 0} | arguments
    trainer = make_trainer(folder, None, callbacks=callbacks, **how)
    trainer.fit(Short(0.1), ckpt_path=ckpt_path, weights_only=False)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The numbers of a fit in one go, by the arguments of its trainer."""

    @functools.cache
    def of(**arguments):
        folder = tmp_path_factory.mktemp("whole")
        fit(folder, [callback(folder / "run")], **arguments)
        return numbers(folder / "run")

    return of


def has_no_validation(epoch):
    """Lightning does not make up for a validation that was to follow the checkpoint."""
    return lambda key: key[0] == epoch and key[2] == "eval"


LAST = STEPS  # the step after the last batch of the first epoch
BY_STEPS = {"max_steps": EPOCHS * STEPS, "max_epochs": -1}
CASES = {  # event and step of the checkpoint, arguments of the trainer
    "in the middle of an epoch": ("on_train_batch_end", 2, {}),
    "at its last batch": ("on_train_batch_end", LAST, {}),
    "after its validation": ("on_validation_end", LAST, {}),
    "as it ends": ("on_train_epoch_end", LAST, {}),
    "as the second one ends": ("on_train_epoch_end", 2 * LAST, {}),
    "after a validation in the middle": ("on_validation_end", 2, {"val_check_interval": 2}),
    "in the middle, by steps": ("on_train_batch_end", 2, BY_STEPS),
    "at its last batch, by steps": ("on_train_batch_end", LAST, BY_STEPS),
    "as it ends, by steps": ("on_train_epoch_end", LAST, BY_STEPS),
    "at the last step of all": ("on_train_batch_end", EPOCHS * STEPS, BY_STEPS),
    "at its last batch, without validations": ("on_train_batch_end", LAST, {"limit_val_batches": 0}),
    "in the middle, with few validations": ("on_train_batch_end", 2, {"check_val_every_n_epoch": 2}),
}

# What Lightning does not make up for: a validation that was to follow, and then draws of later ones are others;
# a batch by which it counts when to log.
LOSE_A_VALIDATION = {"at its last batch", "at its last batch, by steps", "at the last step of all"}
LOG_AT_OTHER_STEPS = {"as it ends, by steps"}


@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize(
    ("case", "is_before"),
    # Lightning has its own callbacks that save at the end of a step behind all others.
    [
        (case, is_before)
        for case, (event, *_) in CASES.items()
        for is_before in (False, True)
        if not (is_before and event == "on_train_batch_end")
    ],
)
def test_each_row_is_that_of_a_fit_in_one_go(case, is_before, is_fresh, whole, tmp_path):
    """Whether the checkpoint is saved before or after the probe's callback had its turn."""
    event, at, arguments = CASES[case]
    saving = Saving(tmp_path / "saved.ckpt", event, at, 0 if is_fresh else 3)
    probing = callback(tmp_path / "run")
    with contextlib.suppress(KeyError):
        fit(tmp_path, [saving, probing] if is_before else [probing, saving], **arguments)
    run = tmp_path / "fresh" if is_fresh else tmp_path / "run"
    fit(tmp_path, [callback(run)], tmp_path / "saved.ckpt", **arguments)
    epoch = (at - 1) // STEPS  # in which the checkpoint was saved
    has_ended = event == "on_train_epoch_end" and not is_before

    def counts(key):
        if case in LOSE_A_VALIDATION and key[2] == "eval":
            return False
        if case in LOG_AT_OTHER_STEPS and key[1] is not None:
            return False
        return (
            not is_fresh or key[0] > epoch or (not has_ended and key[0] == epoch and (key[1] or math.inf) > at)
        )

    assert differing(run, whole(**arguments), counts) == {}
    assert {key[0] for key in numbers(run)} == set(range(epoch + has_ended if is_fresh else 0, EPOCHS))
