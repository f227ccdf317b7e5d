"""The Lightning callback, with the real trainer."""

import csv
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from spectralmetrics import LayerProbe
from spectralmetrics.integrations.lightning import LayerProbeCallback
from tests.integrations.lightning_module import Classifier, digits, make_trainer, metrics

# Lightning's warnings of few workers, a missing checkpoint folder, and its use of torch.
pytestmark = pytest.mark.filterwarnings("ignore")


def read(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def logged(folder, key):
    return [float(row[key]) for row in read(folder) if row.get(key)]


def expected(module, start, stop, stage):
    with LayerProbe(module, metrics()) as probe, torch.no_grad():
        module.train(stage == "train")
        module.model(digits(start, stop).tensors[0])
        return {key: value for key, value in probe.compute(stage).items() if value.numel() == 1}


def test_epochs_are_logged_and_the_sanity_check_is_not_seen(tmp_path):
    module = Classifier(0.0)
    callback = LayerProbeCallback(metrics())
    make_trainer(tmp_path, callback, num_sanity_val_steps=2).fit(module)
    for stage, start, stop in (("train", 0, 320), ("eval", 320, 480)):
        for key, value in expected(module, start, stop, stage).items():
            assert logged(tmp_path, key) == pytest.approx([float(value)] * 2, rel=1e-6)
    assert not any("spectrum" in key for key in read(tmp_path)[0])
    assert not any(m._forward_hooks for m in module.modules())
    assert callback.probe.layers == ["model.0", "model.2"]


def test_training_is_bit_identical(tmp_path):
    weights = []
    for callbacks in ([], [LayerProbeCallback(metrics(), rows_per_feature=1)]):
        module = Classifier(0.1)
        make_trainer(tmp_path / str(len(callbacks)), Callback(), callbacks=callbacks).fit(module)
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(map(torch.equal, *weights))


def test_validate_and_test_without_a_fit(tmp_path):
    module = Classifier(0.0)
    callback = LayerProbeCallback(metrics(), layers="model.2")
    trainer = make_trainer(tmp_path, callback)
    (validated,) = trainer.validate(module)
    (tested,) = trainer.test(module)
    for result, start, stop in ((validated, 320, 480), (tested, 480, 560)):
        for key, value in expected(module, start, stop, "eval").items():
            assert (key in result) == key.endswith("model.2")
            if key in result:
                assert result[key] == pytest.approx(float(value), rel=1e-6)


def test_values_can_be_monitored(tmp_path):
    callback = LayerProbeCallback(metrics())
    stopping = EarlyStopping("saturation/eval/model.0", patience=1, check_on_train_epoch_end=False)
    trainer = make_trainer(tmp_path, callback, callbacks=[callback, stopping], max_epochs=9)
    trainer.fit(Classifier(0.0))
    assert trainer.current_epoch == 2  # a rate of zero changes nothing


class Seen(Callback):
    """Images that the model has trained on, in the order in which Lightning gave them."""

    def __init__(self):
        self.images = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images.append(batch[0])


class Crash(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 6:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")
            raise KeyError("a crash")


def test_an_epoch_goes_on_from_a_checkpoint(tmp_path):
    module = Classifier(0.0)
    seen = Seen()
    callbacks = [LayerProbeCallback(metrics()), Crash(), seen]
    trainer = make_trainer(tmp_path / "first", None, callbacks=callbacks, default_root_dir=tmp_path)
    with pytest.raises(KeyError, match="a crash"):
        trainer.fit(module)
    assert not any(m._forward_hooks for m in module.modules())
    assert len(seen.images) == 6

    trainer = make_trainer(
        tmp_path / "second", None, callbacks=[LayerProbeCallback(metrics()), seen], max_epochs=1
    )
    trainer.fit(module, ckpt_path=tmp_path / "middle.ckpt", weights_only=False)
    assert len(seen.images) == 10
    with LayerProbe(module, metrics()) as probe, torch.no_grad():
        module.train().model(torch.cat(seen.images))
        values = probe.compute()
    for key in ("saturation/train/model.0", "effective_rank/train/model.2"):
        assert logged(tmp_path / "second", key) == pytest.approx([float(values[key])], rel=1e-6)


@pytest.mark.long
def test_two_processes_log_what_all_data_show_and_layers_in_any_order(tmp_path):
    command = [sys.executable, "-m", "tests.integrations.lightning_module", str(tmp_path)]
    subprocess.run(command, check=True, timeout=240)
    module = Classifier(0.0)
    for stage, start, stop in (("train", 0, 320), ("eval", 320, 480)):
        for key, value in expected(module, start, stop, stage).items():
            assert logged(tmp_path, key) == pytest.approx([float(value)] * 2, rel=1e-5)
    # Processes that run layers in different orders log the same values.
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    told = [dict(line.split() for line in text.splitlines()) for text in texts]
    assert told[0] == told[1]
    assert float(told[0]["saturation/eval/model.0"]) > 2 * float(told[0]["saturation/eval/model.1"]) > 0
    assert float(told[0]["warnings"]) == 0
