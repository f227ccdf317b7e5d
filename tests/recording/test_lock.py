"""Two recorders on one directory: the second is refused as long as the first lives, and no longer."""

import gc
import os
import signal

import pytest

from spectralmetrics import Recorder
from spectralmetrics.recording.lock import DirectoryLock
from tests import processes
from tests.recording.runs import make_model, make_probe, read_csv, run_epoch


def hold(directory, started):
    recorder = Recorder(directory, mode="resume")
    recorder.add_scalar("loss", 1.0)
    recorder.record()
    started.set()
    signal.pause()


def start_holder(directory):
    context = processes.fresh()
    started = context.Event()
    process = context.Process(target=hold, args=(directory, started))
    process.start()
    assert started.wait(60)
    return process


def files(directory):
    return sorted(path.name for path in directory.rglob("*"))


@pytest.mark.parametrize("mode", ["create", "resume", "overwrite"])
def test_the_second_in_a_process_is_refused(mode, tmp_path):
    model = make_model()
    first = Recorder(tmp_path, make_probe(model))
    with pytest.raises(BlockingIOError, match=r"in this process that is still open: close\(\) it"):
        Recorder(tmp_path, make_probe(model), mode=mode)
    for epoch in range(2):
        run_epoch(model, epoch)
        first.record()
    if mode == "create":
        with pytest.raises(FileExistsError, match="already holds records"):
            Recorder(tmp_path, mode=mode)
    else:
        with pytest.raises(BlockingIOError):
            Recorder(tmp_path, mode=mode)
    assert {row["epoch"] for row in read_csv(tmp_path)} == {"0", "1"}
    first.close()
    assert files(tmp_path) == ["recording.json", "records.csv"]
    with Recorder(tmp_path, make_probe(model), mode="resume") as second:
        assert second.next_epoch == 2


def test_another_name_of_the_directory(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    with Recorder(tmp_path / "run"), pytest.raises(BlockingIOError):
        Recorder(tmp_path / "link")


def test_one_that_is_not_closed_lets_go_when_it_is_collected(tmp_path):
    recorder = Recorder(tmp_path, make_probe(make_model()))
    del recorder
    gc.collect()
    Recorder(tmp_path, mode="create").close()


def test_one_that_could_not_be_made_holds_nothing(tmp_path):
    (tmp_path / "recording.json").write_text("{")
    with pytest.raises(ValueError, match=r"recording\.json"):
        Recorder(tmp_path, mode="resume")
    assert files(tmp_path) == ["recording.json"]
    Recorder(tmp_path, mode="create").close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_another_process_is_named_and_a_killed_one_holds_nothing(tmp_path):
    process = start_holder(tmp_path)
    try:
        with pytest.raises(BlockingIOError, match=f"in process {process.pid} on "):
            Recorder(tmp_path, mode="resume")
        os.kill(process.pid, signal.SIGSTOP)  # a process that hangs still lives
        with pytest.raises(BlockingIOError):
            Recorder(tmp_path, mode="overwrite")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with Recorder(tmp_path, mode="resume") as recorder:
        assert recorder.next_epoch == 1
    assert files(tmp_path) == ["recording.json", "records.csv"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_neither_holds_nor_releases_it(tmp_path):
    lock = DirectoryLock(tmp_path)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # such as a data loader's worker, which may live longer
        lock.release()
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(BlockingIOError):
            DirectoryLock(tmp_path)
        lock._file.close()  # as if this process were killed
        DirectoryLock(tmp_path).release()
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)


def test_many_take_turns(tmp_path):
    """At most one has the lock, although files are removed while others open them."""
    import threading

    inside, most, taken = [], [], []

    def take():
        while len(taken) < 400:
            try:
                lock = DirectoryLock(tmp_path)
            except BlockingIOError:
                continue
            inside.append(None)
            most.append(len(inside))
            taken.append(None)
            inside.pop()
            lock.release()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) >= 400
    assert set(most) == {1}
