"""A training of the Hugging Face trainer that resumes has the records of an uninterrupted one."""

import contextlib
import json
import math
import shutil

import pytest
from transformers import TrainerCallback

from spectralmetrics import Monitor, Recorder
from spectralmetrics.integrations.transformers import LayerProbeCallback
from spectralmetrics.recording.saved import SavedRun
from tests.integrations import test_transformers_forwards as hf
from tests.integrations.resuming import (
    differing,
    drawing,
    in_one_go,
    metrics,
    numbers,
    on_two_processes,
    remembered,
)

pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, STEPS = 3, 6  # epochs, and steps in each
HOW = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 8, "logging_steps": 4, "eval_strategy": "no"}


class Failing(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyError("cut off")


def train(folder, run, checkpoint=None, fails_at=None, probing=None, **arguments):
    trainer = hf.make_trainer(folder, hf.Net(), **HOW | arguments)
    callback = LayerProbeCallback(trainer, metrics(), recorder=run, **drawing() | (probing or {}))
    trainer.add_callback(callback)
    if fails_at is not None:
        trainer.add_callback(Failing(fails_at))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return in_one_go(tmp_path_factory, lambda folder, **arguments: train(folder, folder / "run", **arguments))


BY_STEPS = {"save_strategy": "steps", "save_steps": 2}
BY_EPOCHS = {"save_strategy": "epoch"}
EACH = {"eval_strategy": "epoch"}
CASES = {  # step of the checkpoint, arguments of the trainer
    "in the middle of an epoch": (8, BY_STEPS),
    "in the middle, with evaluations": (8, BY_STEPS | EACH),
    "after an evaluation in the middle": (10, BY_STEPS | {"eval_strategy": "steps", "eval_steps": 2}),
    "at the last step of an epoch": (6, BY_STEPS),
    "at the last step, with evaluations": (6, BY_STEPS | EACH),
    "at the last step of all": (18, BY_STEPS),
    "at the end of an epoch": (6, BY_EPOCHS),
    "at the end, with evaluations": (12, BY_EPOCHS | EACH),
    "in the middle of a sum of gradients": (2, BY_STEPS | {"gradient_accumulation_steps": 2}),
    "the best one": (8, BY_STEPS | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}),
    "the last one alone": (8, BY_STEPS | {"save_total_limit": 1}),
}
# The trainer skips an evaluation that was due, and later ones have other draws.
LOSE_AN_EVALUATION = {"at the last step, with evaluations"}
FIRST = {"in the middle, with evaluations", "at the last step of an epoch", "at the end, with evaluations"}


@pytest.mark.parametrize(
    ("case", "is_fresh"),
    # Long cases alternate between a fresh directory and the same one.
    [
        pytest.param(case, is_fresh, marks=() if case in FIRST else pytest.mark.long)
        for number, case in enumerate(CASES)
        for is_fresh in ((False, True) if case in FIRST else (bool(number % 2),))
    ],
)
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


def cut_off(folder, at=8, **arguments):
    with pytest.raises(KeyError):
        train(folder, folder / "run", fails_at=at, **BY_STEPS | arguments)
    return folder / f"checkpoint-{at}"


def test_a_checkpoint_that_was_moved(whole, tmp_path):
    checkpoint = cut_off(tmp_path)
    assert not [each.name for each in checkpoint.iterdir() if each.name.startswith(".")]
    (tmp_path / "checkpoint-6").rename(tmp_path / "other")  # another checkpoint takes its place
    shutil.copytree(checkpoint, tmp_path / "moved")
    shutil.copy(tmp_path / "other" / "layer_probe_state.pt", checkpoint)
    train(tmp_path, tmp_path / "run", tmp_path / "moved", **BY_STEPS)
    assert differing(tmp_path / "run", whole(**BY_STEPS)) == {}


def test_the_same_trainer_goes_on(whole, tmp_path):
    trainer = hf.make_trainer(tmp_path, hf.Net(), **HOW | BY_STEPS)
    trainer.add_callback(LayerProbeCallback(trainer, metrics(), recorder=tmp_path / "run", **drawing()))
    trainer.add_callback(Failing(9))
    with pytest.raises(KeyError):
        trainer.train()
    trainer.remove_callback(Failing)
    trainer.train(resume_from_checkpoint=True)
    assert differing(tmp_path / "run", whole(**BY_STEPS)) == {}


def test_going_on_with_all_of_an_epoch_warns_of_nothing(tmp_path, recwarn):
    checkpoint = cut_off(tmp_path)
    train(tmp_path, tmp_path / "run", str(checkpoint), **BY_STEPS)
    (tmp_path / "checkpoint-6" / "layer_probe_state.pt").unlink()  # the checkpoint at the start of an epoch
    train(tmp_path, tmp_path / "run", str(tmp_path / "checkpoint-6"), **BY_STEPS)
    assert not [each for each in recwarn if "has no layer_probe_state" in str(each.message)]


@pytest.mark.parametrize("recorder", ["records", "arrays"])
def test_an_evaluation_between_a_training_and_its_next_part(recorder, tmp_path):
    run = tmp_path / "run"
    make = run if recorder == "records" else lambda probe: Recorder(run, probe, ["arrays"], mode="resume")
    train(tmp_path, make, num_train_epochs=1, **BY_EPOCHS).evaluate()
    train(tmp_path, make, True, **BY_EPOCHS)
    saved = SavedRun(run)
    stages = {key.epoch: {stage for stage, _ in saved.layers_in(key)} for key in saved.arrays}
    assert stages == {0: {"train"}, 1: {"eval"}, 2: {"train"}, 3: {"train"}}


def test_two_callbacks_keep_apart(tmp_path):
    runs = {}
    for is_cut in (False, True):
        for checkpoint in (None, tmp_path / "checkpoint-8") if is_cut else (None,):
            trainer = hf.make_trainer(tmp_path, hf.Net(), **HOW | BY_STEPS)
            for layer in ("backbone", "head"):
                runs[is_cut, layer] = tmp_path / f"{layer} {is_cut}"
                trainer.add_callback(
                    LayerProbeCallback(
                        trainer, metrics(), recorder=runs[is_cut, layer], layers=layer, **drawing()
                    )
                )
            if is_cut and checkpoint is None:
                trainer.add_callback(Failing(8))
            with pytest.raises(KeyError) if is_cut and checkpoint is None else contextlib.nullcontext():
                trainer.train(resume_from_checkpoint=checkpoint)
    for layer in ("backbone", "head"):
        assert differing(runs[True, layer], numbers(runs[False, layer])) == {}


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("observe", "gradients", "outputs"),
        ("feature_maps", "max", "positions"),
        ("sequences", "last", "timesteps"),
    ],
)
def test_a_checkpoint_of_other_observations(name, value, default, tmp_path):
    checkpoint = cut_off(tmp_path)
    words = (
        f"of a callback with {name}='{value}', got those of one with {name}='{default}'; add the callbacks in"
    )
    with pytest.raises(ValueError, match=words):
        train(tmp_path, tmp_path / "other", str(checkpoint), probing={name: value}, **BY_STEPS)


def test_a_damaged_file_is_named(tmp_path):
    file = cut_off(tmp_path) / "layer_probe_state.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"observations from '{file}'.*remove the file to go on without them"):
        train(tmp_path, tmp_path / "run", str(file.parent), **BY_STEPS)
    file.unlink()  # as from an earlier release
    words = (
        "step 8 has no layer_probe_state.pt with the observations before it: values and record of epoch 1 are"
    )
    with pytest.warns(UserWarning, match=words):
        train(tmp_path, tmp_path / "run", str(file.parent), **BY_STEPS)
    assert {key[0] for key in numbers(tmp_path / "run")} == set(range(EPOCHS))


def watching():
    return {"monitor": lambda probe: Monitor(probe, every=5, on_alarm=lambda alarm: None)}


def monitor_of(trainer):
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, LayerProbeCallback))
    return callback.monitor


def test_a_monitor_reads_what_it_would_have(tmp_path):
    one = train(tmp_path / "one", tmp_path / "one", probing=watching())
    with pytest.raises(KeyError):
        train(tmp_path, tmp_path / "run", fails_at=8, probing=watching(), **BY_STEPS)
    other = train(tmp_path, tmp_path / "run", str(tmp_path / "checkpoint-8"), probing=watching(), **BY_STEPS)
    assert monitor_of(one)._past["step"] == EPOCHS * STEPS
    assert monitor_of(one)._past["layers"].keys() == {"backbone", "head"}
    assert remembered(monitor_of(other)) == pytest.approx(remembered(monitor_of(one)), rel=1e-9, nan_ok=True)


def test_a_checkpoint_with_the_memory_of_a_monitor_alone(tmp_path):
    checkpoint = cut_off(tmp_path)
    (checkpoint / "layer_probe_state.pt").unlink()
    past = {"step": 8, "next": 30, "layers": {}}
    text = json.dumps({"step": 7, "readers": {"monitor/train": past}})
    (checkpoint / "layer_probe_monitor.json").write_text(text)
    trainer = train(tmp_path, tmp_path / "run", str(checkpoint), probing=watching(), **BY_STEPS)
    assert monitor_of(trainer)._past == past | {"step": EPOCHS * STEPS}  # it has read nothing yet


@pytest.mark.long
def test_two_processes(tmp_path):
    expected, wrong = on_two_processes("transformers", tmp_path)
    assert wrong == {}
    assert {key[0] for key in expected} == set(range(EPOCHS))
