"""The report of an unfinished run, in a real browser."""

import os
import re
import time

import pytest
import torch
from torch import nn

from spectralmetrics import LayerProbe, Recorder, SaturationMetric, write_report
from spectralmetrics.findings import Finding
from spectralmetrics.monitoring import Alarm
from spectralmetrics.recording import ReportWriter
from tests.recording.browser import Visit, chromium

playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright, see the extra "test"')
pytestmark = pytest.mark.xdist_group("browser")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5)).eval()


class Going:
    """An unfinished run."""

    def __init__(self, directory, mode="create", **how):
        self.model = network()
        self.probe = LayerProbe(self.model, SaturationMetric())
        self.recorder = Recorder(directory, self.probe, ["csv", "arrays", ReportWriter(**how)], mode=mode)
        self.path = directory / "report.html"

    def record(self, **when):
        self.model(torch.randn(64, 6))
        self.recorder.add_scalar("loss", 0.5)
        self.recorder.record(**when)


@pytest.fixture
def run(tmp_path):
    going = Going(tmp_path / "run", refresh=0.5)
    yield going
    going.recorder.close()


@pytest.fixture
def visit(run):
    run.record()
    with chromium() as browser:
        found = Visit(browser, run.path)
        yield found
        assert set(found.requests) == {run.path.as_uri()}
        del found.requests[1:]  # the page was reloaded
        found.leave()


def patiently(function, *arguments, timeout=20):
    """Result of a call on a page that may reload; a call that a reload interrupts is repeated."""
    end = time.monotonic() + timeout
    while True:
        try:
            return function(*arguments)
        except playwright.Error:  # the page was reloading
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def wait(page, condition, timeout=20):
    """Wait until a condition holds on the page, whichever version it has loaded."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if patiently(page.evaluate, condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"not within {timeout} s: {condition}")


def test_it_is_written_at_each_record_and_lives_until_the_run_is_closed(run):
    run.record()
    first = run.path.read_text()
    assert re.search('<html lang="en" data-refresh="0.5">', first)
    run.record(step=3)
    assert run.path.read_text() != first
    run.recorder.close()
    assert re.search('<html lang="en" data-refresh="">', run.path.read_text())
    plain = write_report(run.path.parent, run.path.parent / "plain.html").read_text()
    assert plain == run.path.read_text()


def test_a_record_arrives_and_what_was_chosen_is_kept(run, visit):
    page = visit.page
    assert "looks for new records every 0.5 s" in page.locator("#live").text_content()
    for _ in range(2):
        run.record()
    run.recorder.add_alarm(
        Alarm(310, Finding("train", "2", "collapsed", "problem", "collapsed: <b>x</b>", 0.1), 0.5)
    )
    wait(page, "page.epochs.length === 3")
    assert patiently(page.evaluate, "current.epoch") == 2  # the newest epoch, as before
    run.record()
    wait(page, "page.epochs.length === 4 && current.epoch === 3")
    assert page.locator("#alarm-list li").all_text_contents() == ["step 310: '2' in train: collapsed: <b>x</b>"]
    patiently(visit.settle)
    patiently(page.evaluate, "choose({ epoch: 1, layer: 2, threshold: 5 })")
    page.locator("#theme").select_option("dark")
    page.locator("#headings button").first.click()
    patiently(
        page.evaluate, "document.getElementById('epoch').focus({ preventScroll: true }); scrollTo(0, 700)"
    )
    patiently(visit.settle)
    place = patiently(page.evaluate, "scrollY")
    assert place > 300
    patiently(page.evaluate, "window.marked = true")
    run.record()
    wait(page, "!window.marked && page.epochs?.length === 5")
    patiently(visit.settle)
    chosen = patiently(
        page.evaluate, "[current.epoch, current.layer, current.threshold, document.activeElement.id, scrollY]"
    )
    assert chosen == [1, 2, 5, "epoch", place]
    assert patiently(page.evaluate, "document.documentElement.dataset.theme") == "dark"
    assert patiently(page.evaluate, "sorting.title") == "layer"
    run.recorder.close()
    wait(page, "document.documentElement.dataset.refresh === ''")
    page.wait_for_timeout(700)
    patiently(visit.settle)
    assert page.locator("#live").is_hidden()


def test_half_a_record_is_never_seen(run, visit, monkeypatch):
    """Neither while the file is written, nor after writing failed."""
    before = run.path.read_bytes()
    replace = os.replace

    def looking(source, target):
        if str(target).endswith("report.html"):
            visit.page.reload()
            patiently(visit.settle)
            assert patiently(visit.page.evaluate, "page.epochs.length") == 1
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", looking)
    with pytest.raises(RuntimeError, match="epoch 1 is kept, but the writer 'report' failed"):
        run.record()
    assert run.path.read_bytes() == before
    monkeypatch.undo()
    run.record()
    wait(visit.page, "page.epochs.length === 3")


def test_a_run_that_is_resumed_shows_the_record_that_a_killed_process_did_not(tmp_path):
    going = Going(tmp_path / "run")
    going.record()
    going.path.unlink()
    going.recorder.close()
    again = Going(tmp_path / "run", mode="resume")
    assert 'data-refresh="10"' in again.path.read_text()
    again.recorder.close()
    assert 'data-refresh=""' in again.path.read_text()
    Recorder(tmp_path / "run", again.probe, mode="overwrite").close()
    assert not again.path.exists()
