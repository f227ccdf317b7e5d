"""The guide's recipe for checkpoints, killed wherever it can be killed."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from spectralmetrics import Recorder
from tests.recording.runs import read_csv

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "resuming.md"


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def train():
    (block,) = [
        text
        for text in re.findall(
            r"```\{code-cell\} python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL
        )
        if "checkpoint.pt" in text
    ]
    namespace = {}
    exec(compile(block, str(GUIDE), "exec"), namespace)
    # 25 steps an epoch; the recipe saves one checkpoint more, at the 20th.
    namespace.update(images=namespace["images"][:1600], labels=namespace["labels"][:1600])
    return namespace["train"]


@pytest.mark.filterwarnings("ignore:added after the last record")  # a killed process cannot warn
@pytest.mark.parametrize("where", ["before record", "after record", "before the checkpoint", "after it"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_each_epoch_is_recorded_once(where, epoch, train, tmp_path, monkeypatch):
    def killing(function, before):
        calls = []

        def call(*arguments):
            calls.append(arguments)
            if before and len(calls) == epoch + 1:
                raise Killed
            result = function(*arguments)
            if len(calls) == epoch + 1:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        if "record" in where:
            patch.setattr(Recorder, "record", killing(Recorder.record, where == "before record"))
        else:
            replace = killing(os.replace, where == "before the checkpoint")
            system = os.replace
            patch.setattr(
                os,
                "replace",
                lambda source, target: (replace if "checkpoint" in str(target) else system)(source, target),
            )
        with pytest.raises(Killed):
            train(tmp_path, 3)
    train(tmp_path, 3)
    recorded = Counter(
        (row["epoch"], row["stage"], row["layer"], row["statistic"]) for row in read_csv(tmp_path)
    )
    assert set(recorded.values()) == {1}
    assert {key[0] for key in recorded} == {"0", "1", "2"}
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 3
    counts = [torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["state"][0]["step"]]
    assert counts == [3 * 25]  # training neither lost nor repeated an epoch
