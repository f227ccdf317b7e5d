"""Unreadable input: the message names file and row, and what was read before is kept."""

import pickle

import numpy as np
import pandas
import pytest
import torch

import spectralmetrics as sm
from spectralmetrics.cli import main
from tests.files.world import rows, save

VALUES = rows(100, 8)


def npy(array):
    return lambda path: np.save(path, array)


def cut(path):
    np.save(path, VALUES)
    path.write_bytes(path.read_bytes()[:-1000])  # 31.25 rows


def cut_fortran(path):
    np.save(path, np.asfortranarray(VALUES.numpy()))
    path.write_bytes(path.read_bytes()[:-1000])


def damaged(write):
    def damage(path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return damage


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


def pickled(path):
    with path.open("wb") as file:
        pickle.dump(Evil(), file)


BAD = {
    "int8.npy": (npy(np.ones((9, 8), np.int8)), "got one array (9 x 8 int8); save the numbers that quantised"),
    "bits.npy": (npy(np.ones((9, 8), np.uint8)), "np.unpackbits(rows, axis=1)"),
    "int64.npy": (npy(np.ones((9, 8), np.int64)), "integers are never features"),
    "bool.npy": (npy(np.ones((9, 8), bool)), "got one array (9 x 8 bool)"),
    "complex.npy": (npy(np.ones((9, 8), complex)), "got one array (9 x 8 complex128)"),
    "text.npy": (npy(np.array(["a", "b"])), "expected floating rows of shape (N, D)"),
    "objects.npy": (npy(np.array([Evil(), 1], object)), "it holds Python objects, which could run code"),
    "pickle.npy": (pickled, "it holds Python objects, which could run code"),
    "nothing.npy": (lambda path: path.write_bytes(b"hello there"), "cannot be read as .npy: it is none"),
    "vector.npy": (npy(np.ones(9)), "got one array (9 float64); give each observation a row"),
    "scalar.npy": (npy(np.float64(3)), "got one array (one float64)"),
    "maps.npy": (
        npy(np.ones((9, 4, 8))),
        "got one array (9 x 4 x 8 float64); rows.reshape(-1, rows.shape[-1])",
    ),
    "no_width.npy": (npy(np.ones((9, 0))), "expected at least one feature"),
    "width.npy": (npy(np.ones((9, 5))), "row 0 of …: expected 8 features as in …, got 5"),
    "cut.npy": (cut, "row 68 of …: is cut off: it holds 68 of 100 rows"),
    "fortran.npy": (cut_fortran, "row 0 of …: is cut off"),
    "two.npz": (
        lambda path: np.savez(path, a=VALUES, b=VALUES),
        "expected one column of features, got 'a' (100 x 8 float32), 'b' (100 x 8 float32); choose one",
    ),
    "ints.npz": (lambda path: np.savez(path, a=np.arange(9)), "got 'a' (9 int64); integers are never features"),
    "scalar.npz": (lambda path: np.savez(path, a=3.0), "got 'a' (one float64)"),
    "objects.npz": (
        lambda path: np.savez(path, a=np.array([Evil()], object)),
        "got 'a' (1 objects); save numbers alone",
    ),
    "cut.npz": (damaged(lambda path: np.savez(path, a=VALUES)), "cannot be read as .npz"),
    "cut.pt": (damaged(lambda path: torch.save(VALUES, path)), "cannot be read as .pt"),
    "evil.pt": (lambda path: torch.save({"model": Evil()}, path), "it holds Python objects besides tensors"),
    "none.pt": (lambda path: torch.save({"epoch": 3}, path), "expected a column of features, got no columns"),
    "sparse.pt": (lambda path: torch.save(VALUES.to_sparse(), path), "expected floating rows"),
    "rows.csv": (lambda path: path.write_text("1,2"), "got '.csv': pandas.read_csv"),
    "rows.npy.gz": (lambda path: path.write_bytes(b"x"), "got '.gz': unpack it first"),
    "rows.pkl": (pickled, "got a pickle, which could run code"),
    "rows": (lambda path: path.write_bytes(b"x"), "expected a file among .npy"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_named_and_what_was_read_is_kept(name, tmp_path, capsys):
    write, words = BAD[name]
    np.save(tmp_path / "0.npy", VALUES)
    write(tmp_path / name)
    paths = [tmp_path / "0.npy", tmp_path / name]
    with pytest.raises(sm.ReadError) as caught:
        sm.measure(paths, block_rows=30)
    message, place = str(caught.value), 0
    for part in words.split("…"):
        assert (place := message.find(part.strip(), place)) >= 0, (part, message)
    assert name in message
    assert caught.value.file == str(tmp_path / name)
    kept = 100 + (caught.value.row or 0)
    assert int(caught.value.partial.sums.num_observations) == kept
    assert main(["measure", *map(str, paths)]) == 2
    printed = capsys.readouterr()
    assert "before the error:\n" in printed.out
    assert len(printed.err.splitlines()) == 1
    assert "it ran" not in printed.out


def test_safetensors_and_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra `files` is not installed")
    import pyarrow.parquet as pq

    np.save(tmp_path / "0.npy", VALUES)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no json!")
    save(tmp_path / "int8.safetensors", a=torch.ones(9, 8, dtype=torch.int8))
    lists = [row.tolist() for row in VALUES] * 100
    lists[7123] = lists[7123][:5]
    pq.write_table(pa.table({"v": lists}), tmp_path / "ragged.parquet", row_group_size=3000)
    pq.write_table(pa.table({"v": [["a"]], "w": [{"x": 1.0}]}), tmp_path / "text.parquet")
    words = pa.array(["a", "b"]).dictionary_encode()
    pq.write_table(pa.table({"v": lists[:2], "kind": words}), tmp_path / "words.parquet")
    with pytest.raises(
        sm.ReadError, match=r"expected an integer label for each row in 'kind'.* number the classes"
    ):
        sm.measure(tmp_path / "words.parquet", labels="kind")
    damaged(lambda path: pq.write_table(pa.table({"v": lists[:7000]}), path))(tmp_path / "cut.parquet")
    for name, kept, words in [
        ("cut.safetensors", 100, "cannot be read as .safetensors"),
        ("int8.safetensors", 100, "got 'a' (9 x 8 int8); save the numbers that quantised"),
        ("ragged.parquet", 7223, "row 7123 of .*: expected 8 features as in the rows before, got 5"),
        ("text.parquet", 100, "expected floating rows of shape"),
        ("cut.parquet", 100, "cannot be read as .parquet"),
    ]:
        with pytest.raises(sm.ReadError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
            sm.measure([tmp_path / "0.npy", tmp_path / name], block_rows=1000)
        assert int(caught.value.partial.sums.num_observations) == kept


def test_nothing_was_read():
    with pytest.raises(sm.ReadError, match="of shape") as caught:
        sm.measure(np.ones(4))
    assert caught.value.partial is None
    with pytest.raises(sm.ReadError, match="row 0 of 'item 1': expected 8 features as in 'item 0', got 3"):
        sm.measure(iter([VALUES, VALUES[:, :3]]))
    ragged = pandas.DataFrame({"v": [*VALUES.tolist(), [1.0] * 5]})
    with pytest.raises(sm.ReadError, match=r"row 100 of 'the array': expected 8 features .* got 5") as caught:
        sm.measure(ragged)
    assert int(caught.value.partial.sums.num_observations) == 100
    with pytest.raises(TypeError, match="got list; of pairs of rows and labels give the rows alone"):
        sm.measure(iter([[VALUES, torch.ones(100)]]))


def test_rows_that_leave_nothing_to_read():
    with pytest.raises(RuntimeError, match="the observations overflow"):
        sm.measure(VALUES.double() * 1e200)
    measured = sm.measure(VALUES * torch.nan)
    assert measured.values == measured.intervals == {}
    assert "100 rows with NaN or infinities left out" in str(measured)


def test_what_is_masked_is_missing():
    masked = np.ma.array(VALUES.numpy().copy(), mask=False)
    masked.data[[3, 50], 2] = 1e6
    masked[[3, 50], 2] = np.ma.masked
    classes = np.ma.array(np.arange(100) % 3, mask=False)
    classes.data[7] = 10**6
    classes[7] = np.ma.masked
    measured = sm.measure(masked, labels=classes)
    kept = np.delete(np.arange(100), [3, 50])
    labels = np.where(np.arange(100) == 7, -1, np.arange(100) % 3)[kept]
    expected = sm.measure(VALUES[kept], labels=labels, folds=1)
    assert int(measured.sums.num_observations) == 98
    assert int(measured.sums.num_left_out) == 2
    for name in ("effective_rank", "covariance_trace", "neural_collapse"):
        assert float(measured.values[name]) == pytest.approx(float(expected.values[name]), rel=1e-9)
    assert int(sm.moments_of(masked).count) == 98


def test_columns_of_one_name_are_refused(tmp_path):
    frame = pandas.DataFrame(np.ones((9, 3)), columns=["a", "b", "a"])
    for source in (frame, frame.set_axis([1, "1", "b"], axis=1), {1: VALUES, "1": VALUES}):
        with pytest.raises(sm.ReadError, match=r"of different names, got several called '[a1]'"):
            sm.measure(source)
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `files` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(list(VALUES.numpy()))
    parquet.write_table(pyarrow.Table.from_arrays([column] * 2, names="aa"), tmp_path / "a.parquet")
    with pytest.raises(sm.ReadError, match="expected columns of different names, got several called 'a'"):
        sm.measure(tmp_path / "a.parquet")


def test_vectors_of_several_dtypes_keep_their_digits():
    vectors = list(VALUES.double().numpy() + 1e-9)
    vectors[0] = np.zeros(8, int)
    vectors[1] = vectors[1].astype(np.float16)
    measured = sm.measure(pandas.Series(vectors), folds=1)
    expected = sm.measure(np.stack(vectors), folds=1)
    assert measured.sums.covariance().equal(expected.sums.covariance())


def test_numbers_in_names_of_files_are_decimal(tmp_path):
    for name in ("9².npy", "1²3.npy", "²².npy"):
        np.save(tmp_path / name, VALUES)
    assert int(sm.measure(tmp_path).sums.num_observations) == 300


def test_labels_must_agree(tmp_path):
    np.save(tmp_path / "x.npy", VALUES)
    np.save(tmp_path / "few.npy", np.arange(99))
    np.save(tmp_path / "halves.npy", np.full(100, 0.5))
    np.savez(tmp_path / "both.npz", x=VALUES, y=np.arange(99), z=np.full(100, 0.5))
    for labels, error, words in [
        (tmp_path / "few.npy", ValueError, "got 99 labels in .*few.npy' and 100 rows"),
        (np.arange(101), ValueError, "got 101 labels in 'labels' and 100 rows"),
        (tmp_path / "halves.npy", ValueError, "expected one column of integer labels"),
        (tmp_path / "none.npy", FileNotFoundError, "expected a file of labels, found no"),
        ("class", ValueError, "expected labels as a column 'class' or a file of that name, got one array"),
        (np.arange(100) * 10**8, ValueError, "expected labels that number few classes .* got 9900000000"),
        (np.ones((100, 2), int), TypeError, "expected labels as integers of shape"),
    ]:
        with pytest.raises(error, match=words):
            sm.measure(tmp_path / "x.npy", labels=labels)
    with pytest.raises(sm.ReadError, match="a label for each of 100 rows in 'y', got 99"):
        sm.measure(tmp_path / "both.npz", labels="y")
    with pytest.raises(sm.ReadError, match=r"row 0 of .*both.npz.*: expected an integer label, got 0.5"):
        sm.measure(tmp_path / "both.npz", labels="z")
    with pytest.raises(ValueError, match=r"got 99 labels .* more than 100 rows"):
        sm.measure(iter([VALUES]), sm.NeuralCollapseMetric(100), labels=np.arange(99))
    with pytest.raises(ValueError, match="expected labels for 'neural_collapse', got None"):
        sm.measure(VALUES, sm.NeuralCollapseMetric(2))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    for module, suffix in (("safetensors", ".safetensors"), ("pyarrow", ".parquet")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(b"x")
        with pytest.raises(
            ModuleNotFoundError, match=rf'need {module}: pip install "spectralmetrics\[files\]"'
        ):
            sm.measure(path)
