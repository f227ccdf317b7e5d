"""A Lightning fit that resumes from a checkpoint has the records of an uninterrupted one."""

import contextlib
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from spectralmetrics import Monitor
from spectralmetrics.integrations.lightning import LayerProbeCallback
from tests.integrations.lightning_module import Classifier, digits, make_trainer
from tests.integrations.resuming import (
    differing,
    drawing,
    in_one_go,
    metrics,
    numbers,
    on_two_processes,
    remembered,
)
from tests.integrations.rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, STEPS = 3, 5  # epochs, and steps in each


class Resumable(DataLoader):
    """Continues with the batch after the checkpoint; with other loaders Lightning starts at the first again."""

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
    """Saves a checkpoint at one event of one step, and ends the fit there or some steps later."""

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
    return in_one_go(
        tmp_path_factory, lambda folder, **arguments: fit(folder, [callback(folder / "run")], **arguments)
    )


def has_no_validation(epoch):
    """Lightning skips a validation that was due right after the checkpoint."""
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

# Cases in which Lightning skips a validation that was due, so that later ones have other draws; and a case in
# which its count of batches, which decides when it logs, misses one.
LOSE_A_VALIDATION = {"at its last batch", "at its last batch, by steps", "at the last step of all"}
LOG_AT_OTHER_STEPS = {"as it ends, by steps"}
FIRST = {"in the middle of an epoch", "at its last batch", "as it ends", "after a validation in the middle"}


@pytest.mark.parametrize(
    ("case", "is_before", "is_fresh"),
    # Lightning puts its own callbacks that save at the end of a step last. Long cases alternate between a fresh
    # directory and the same one.
    [
        pytest.param(case, is_before, is_fresh, marks=() if case in FIRST else pytest.mark.long)
        for number, (case, (event, *_)) in enumerate(CASES.items())
        for is_before in (False, True)
        for is_fresh in ((False, True) if case in FIRST else (bool((number + is_before) % 2),))
        if not (is_before and event == "on_train_batch_end")
    ],
)
def test_each_row_is_that_of_a_fit_in_one_go(case, is_before, is_fresh, whole, tmp_path):
    """The checkpoint is saved before or after the probe's callback runs."""
    event, at, arguments = CASES[case]
    saving = Saving(tmp_path / "saved.ckpt", event, at, 0 if is_fresh else 3)
    probing = callback(tmp_path / "run")
    with contextlib.suppress(KeyError):
        fit(tmp_path, [saving, probing] if is_before else [probing, saving], **arguments)
    run = tmp_path / "fresh" if is_fresh else tmp_path / "run"
    fit(tmp_path, [callback(run)], tmp_path / "saved.ckpt", **arguments)
    epoch = (at - 1) // STEPS  # the epoch of the checkpoint
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


@pytest.mark.parametrize(
    ("event", "at"),
    [
        ("on_train_batch_end", 3),
        ("on_train_batch_end", LAST),
        ("on_validation_end", LAST),
        ("on_train_epoch_end", LAST),
    ],
)
def test_a_checkpoint_of_an_earlier_release(event, at, whole, tmp_path):
    path, run = tmp_path / "saved.ckpt", tmp_path / "run"
    with pytest.raises(KeyError):
        fit(tmp_path, [callback(run), Saving(path, event, at, 0)])
    saved = torch.load(path, weights_only=False)
    (state,) = (each for each in saved["callbacks"].values() if "probe" in each)
    for key in state.keys() - {"probe", "epoch"}:
        del state[key]
    for key in [key for key in state["probe"] if key.endswith(".update_count")]:
        del state["probe"][key]
    torch.save(saved, path)
    fit(tmp_path, [callback(run)], path)

    # The state did not say how many observations metrics of others had.
    assert differing(run, whole(), lambda key: key[:3] == (0, None, "train") and key[3] != "rows") == {}
    assert {key[0] for key in numbers(run)} == set(range(EPOCHS))


def test_a_checkpoint_with_nothing_to_train_after_it(whole, tmp_path, recwarn):
    path, run = tmp_path / "saved.ckpt", tmp_path / "run"
    fit(tmp_path, [callback(run), Saving(path, "on_train_epoch_end", EPOCHS * STEPS, 1)])
    for epochs in (EPOCHS, EPOCHS + 1):
        fit(tmp_path, [callback(run)], path, max_epochs=epochs)
        assert {key[0] for key in numbers(run)} == set(range(epochs))
    assert differing(run, whole(max_epochs=EPOCHS + 1)) == {}
    assert not [each for each in recwarn if "nothing to record" in str(each.message)]


def test_one_callback_in_several_fits(whole, tmp_path):
    """A fit after another, a fit from a checkpoint, and a fit after a validation of a checkpoint."""
    path, run = tmp_path / "saved.ckpt", tmp_path / "run"
    probing = callback(run)
    with pytest.raises(KeyError):
        fit(tmp_path, [probing, Saving(path, "on_train_batch_end", 2, 1)])
    fit(tmp_path, [probing], path)
    assert differing(run, whole()) == {}
    make_trainer(tmp_path, probing).validate(Short(0.1), ckpt_path=path, weights_only=False)
    fit(tmp_path, [probing])
    later = {(key[0] - EPOCHS - 1, *key[1:]): row for key, row in numbers(run).items() if key[0] > EPOCHS}
    assert later == {key: pytest.approx(row, rel=1e-9, nan_ok=True) for key, row in whole().items()}


def test_a_validation_between_a_fit_and_its_next_part(whole, tmp_path):
    """The validation adds a record, and no epoch of the fit is lost, however often this happens."""
    run = tmp_path / "run"

    def go_on(epochs, ckpt_path=None):
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        how = {"enable_checkpointing": True, "max_epochs": epochs}
        trainer = fit(tmp_path, [callback(run), saving], ckpt_path, **how)
        trainer.validate(Short(0.1))

    go_on(1)
    go_on(2, tmp_path / "epoch=0.ckpt")
    go_on(EPOCHS, tmp_path / "epoch=1.ckpt")
    go_on(EPOCHS, tmp_path / "epoch=0.ckpt")  # as after a crash: these epochs were recorded
    outside = {1, 3, 5, 6}
    assert {key[0] for key in numbers(run) if key[2] == "train"} == {0, 2, 4}
    assert {key[0] for key in numbers(run)} == {0, 2, 4} | outside
    found = {(key[0] // 2, *key[1:]): row for key, row in numbers(run).items() if key[0] not in outside}
    assert found == {key: pytest.approx(row, rel=1e-9, nan_ok=True) for key, row in whole().items()}


def test_two_callbacks_keep_apart(tmp_path):
    def probing(name):
        return [
            LayerProbeCallback({observe: Rows()}, observe=observe, recorder=tmp_path / name / observe)
            for observe in ("outputs", "gradients")
        ]

    path = tmp_path / "saved.ckpt"
    fit(tmp_path, probing("whole"))
    with pytest.raises(KeyError):
        fit(tmp_path, [*probing("cut"), Saving(path, "on_train_batch_end", 2, 0)])
    saved = torch.load(path, weights_only=False)["callbacks"]
    assert {"LayerProbeCallback", "LayerProbeCallback_1"} <= saved.keys()
    fit(tmp_path, probing("cut"), path)
    for observe in ("outputs", "gradients"):
        assert differing(tmp_path / "cut" / observe, numbers(tmp_path / "whole" / observe)) == {}


def test_two_callbacks_of_one_name(tmp_path):
    """Lightning would log the mean of both values."""
    with pytest.raises(ValueError, match="different names, got 'variance' in two"):
        fit(tmp_path, [LayerProbeCallback({"variance": Rows(), name: Rows()}) for name in "ab"])


class Late(Callback):
    """Fails at the end of a step, and saves a checkpoint because of the error."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == STEPS + 2:
            raise KeyError("cut off")

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_of_an_error(whole, tmp_path):
    path = tmp_path / "saved.ckpt"
    with pytest.raises(KeyError):
        fit(tmp_path, [callback(tmp_path / "run"), Late(path)])
    fit(tmp_path, [callback(tmp_path / "run")], path)
    assert differing(tmp_path / "run", whole()) == {}


def test_a_checkpoint_after_a_fit(whole, tmp_path):
    path, run = tmp_path / "saved.ckpt", tmp_path / "run"
    fit(tmp_path, [callback(run)], max_epochs=2).save_checkpoint(path)
    fit(tmp_path, [callback(run)], path)
    assert differing(run, whole()) == {}


def test_lightning_s_own_checkpoints(whole, tmp_path):
    """Saved at the last batch of each epoch, and at its end."""
    by_steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=STEPS, save_top_k=-1)
    by_epochs = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    saving = {"enable_checkpointing": True, "limit_val_batches": 0}
    fit(tmp_path, [by_steps, by_epochs, callback(tmp_path / "run")], **saving)
    for name in (f"step={STEPS}", "epoch=0", f"step={2 * STEPS}", "epoch=1"):
        fit(tmp_path, [callback(tmp_path / name)], tmp_path / f"{name}.ckpt", limit_val_batches=0)
        epoch = min(key[0] for key in numbers(tmp_path / name))
        expected = whole(limit_val_batches=0)
        is_there = lambda key, epoch=epoch: key[0] > epoch or key[:2] == (epoch, None)  # noqa: E731
        assert differing(tmp_path / name, expected, is_there) == {}
        assert epoch == (0 if name == f"step={STEPS}" else 2 if name == "epoch=1" else 1)


def test_a_monitor_reads_what_it_would_have(tmp_path):
    def watching(every=4):
        return LayerProbeCallback(
            monitor=lambda probe: Monitor(probe, every=every, on_alarm=lambda alarm: None)
        )

    path, one, other = tmp_path / "saved.ckpt", watching(), watching()
    fit(tmp_path, [one])
    with pytest.raises(KeyError):
        fit(tmp_path, [watching(), Saving(path, "on_train_batch_end", STEPS + 1, 0)])
    fit(tmp_path, [other], path)
    assert one.monitor._past["step"] == EPOCHS * STEPS
    assert list(one.monitor._past["layers"]) == ["model.0", "model.2"]
    assert remembered(other.monitor) == pytest.approx(remembered(one.monitor), rel=1e-9, nan_ok=True)


@pytest.mark.long
def test_two_processes(tmp_path):
    expected, wrong = on_two_processes("lightning", tmp_path)
    assert wrong == {}
    assert {key[0] for key in expected} == set(range(EPOCHS))
