"""History of a run that several processes write, one after the other."""

import copy

import pytest
import torch
from torch import nn

from spectralmetrics import HistoryMetric, LayerProbe, Recorder
from spectralmetrics.recording.report.collect import of_history
from spectralmetrics.recording.saved import SavedRun
from spectralmetrics.recording.writers.history_file import HISTORY_COLUMNS, read_history

STEPS = 8
"""Number of forwards that the metric keeps."""

LIVES = {
    "as long": [[5], [5]],
    "shorter": [[5], [2]],
    "longer": [[5], [7]],
    "one forward": [[1], [1], [1]],
    "three": [[4, 3], [2], [6, 1, 2]],
    "longer than is remembered": [[12], [12], [9]],
    "not from the first": [[16], [9, 3]],
    "before all of the first": [[20], [9], [5]],
    "behind all of the first": [[3], [20], [20]],
}
"""For each process, the number of forwards before each of its records."""


class Marked(nn.Module):
    """A layer that returns its input, and one with a constant output."""

    def __init__(self):
        super().__init__()
        self.number = nn.Linear(1, 1)
        self.constant = nn.Linear(1, 1)
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters()):
                parameter.fill_(place in (0, 3))

    def forward(self, x):
        return self.constant(self.number(x))


class Life:
    """Forwards that a probe has observed in one stage, and those not recorded yet."""

    def __init__(self):
        self.marks, self.first, self.recorded = [], 0, 0

    def record(self, reset):
        found = self.marks[max(self.first, self.recorded, len(self.marks) - STEPS) :]
        self.recorded = len(self.marks)
        self.first = self.recorded if reset else self.first
        return found


@pytest.mark.parametrize("told", [False, True], ids=["no steps", "steps"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "no reset"])
@pytest.mark.parametrize("goes_on", [False, True], ids=["begins anew", "goes on"])
@pytest.mark.parametrize("lives", LIVES)
def test_each_forward_once_and_in_order(lives, goes_on, reset, told, tmp_path):
    model, state, mark = Marked(), None, 0
    expected = {"train": [], "eval": []}
    for records in LIVES[lives]:
        mode = "create" if state is None else "resume"
        probe = LayerProbe(model, HistoryMetric(steps=STEPS))
        probe.persistent()
        if goes_on and state is not None:
            probe.load_state_dict(state)
        else:
            life = {stage: Life() for stage in expected}
        with probe, Recorder(tmp_path, probe, ["history"], mode=mode) as recorder:
            for forwards in records:
                for step in range(forwards):
                    mark += 1
                    probe.step = step if told else None
                    model.train()(torch.full((2, 1), float(mark)))
                    life["train"].marks.append(mark)
                # An evaluation every second epoch, with equal data and weights.
                for each in range(1, 4 * (recorder.next_epoch % 2 == 0)):
                    model.eval()(torch.full((2, 1), float(each)))
                    life["eval"].marks.append(each)
                recorder.record(reset=reset)
                for stage, marks in expected.items():
                    marks += life[stage].record(reset)
            state = copy.deepcopy(probe.state_dict())
    history = SavedRun(tmp_path).history
    for stage, marks in expected.items():
        rows = history[stage]
        numbers = {
            layer: [row.forward for row in rows if row.layer == layer] for layer in ("number", "constant")
        }
        assert [row.max_abs for row in rows if row.layer == "number"] == marks
        assert numbers["number"] == numbers["constant"] == sorted(set(numbers["number"]))
        assert [row.layer for row in rows] == ["number", "constant"] * len(marks)
    drawn = of_history(history["train"], ["number"])
    assert drawn["max_abs"][0].tolist() == expected["train"]


def read(folder, *records):
    """(forward, rms) read back from records, each given as {forward: rms or (rms, rows)}."""
    lines = []
    for epoch, record in enumerate(records):
        for forward, value in record.items():
            rms, rows = value if isinstance(value, tuple) else (value, 4)
            lines.append(f"{epoch},train,{forward},,a,{rows},{rms},0.1,2.0,0.0,0\r\n")
    (folder / "history.csv").write_text(f"{','.join(HISTORY_COLUMNS)}\r\n{''.join(lines)}", newline="")
    return [(row.forward, row.rms) for row in read_history(folder)["train"]]


def test_sums_of_processes_may_be_rounded_otherwise(tmp_path):
    assert read(tmp_path, {0: 1.0, 1: 2.0}, {1: 2.0 + 4e-16, 2: 3.0}) == [(0, 1.0), (1, 2.0 + 4e-16), (2, 3.0)]


def test_a_forward_that_was_not_over(tmp_path):
    """More rows came after the first record, such as gradients of another loss."""
    assert read(tmp_path, {0: 1.0, 1: 2.0}, {0: 1.0, 1: (2.5, 8)}) == [(0, 1.0), (1, 2.5)]


def test_the_first_of_a_new_process_may_have_more_rows(tmp_path):
    assert read(tmp_path, {0: 1.0}, {0: (2.5, 8), 1: 3.0}) == [(0, 1.0), (1, 2.5), (2, 3.0)]


def test_a_run_that_goes_on_from_an_earlier_state(tmp_path):
    """Forwards that the state still holds appear once; later ones follow those recorded."""
    first = {forward: 1.0 + forward for forward in range(5)}
    second = {1: 2.0, 2: 3.0, 3: 7.0, 4: 8.0}
    third = {2: 3.0, 3: 7.0, 4: 8.0, 5: 9.0}
    assert read(tmp_path, first, second, third) == list(enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0, 9.0]))


def test_no_observations(tmp_path):
    """Missing values count as equal."""
    lines = "".join(f"{epoch},train,{n},,a,0,,,,,4\r\n" for epoch in range(2) for n in range(epoch, epoch + 2))
    (tmp_path / "history.csv").write_text(f"{','.join(HISTORY_COLUMNS)}\r\n{lines}", newline="")
    assert [row.forward for row in read_history(tmp_path)["train"]] == [0, 1, 2]
