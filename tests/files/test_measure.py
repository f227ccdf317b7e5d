"""The same rows give the same numbers in every container."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import spectralmetrics as sm
from spectralmetrics.cli import main
from spectralmetrics.files.fields import as_tensor, torch_dtype
from spectralmetrics.recording import read_records
from tests.files.world import SAVE, rows, save
from tests.metrics.properties import assert_same
from tests.oracles import relative_error, two_pass_covariance

EXTRAS = {".safetensors": "safetensors", ".parquet": "pyarrow"}
FORMATS = [*SAVE]


@pytest.fixture(params=FORMATS)
def suffix(request):
    if request.param in EXTRAS:
        pytest.importorskip(EXTRAS[request.param], reason="the extra `files` is not installed")
    return request.param


def covariance_of(measured):
    return measured.sums.covariance()


def assert_measures(measured, values, tolerance=1e-12):
    values = torch.as_tensor(values).double()
    assert int(measured.sums.num_observations) == len(values)
    assert relative_error(covariance_of(measured), two_pass_covariance(values)) < tolerance
    assert_same(measured.sums.mean(), values.mean(0), 1e-12)


def test_every_format_holds_the_same_rows_and_labels(suffix, tmp_path):
    values = rows()
    labels = torch.arange(len(values)) % 3
    path = tmp_path / f"rows{suffix}"
    beside = save(tmp_path / "labels.npy", labels=labels)
    if suffix == ".npy":
        measured = sm.measure(save(path, embedding=values), labels=beside, block_rows=70)
    else:
        measured = sm.measure(save(path, embedding=values, label=labels), labels="label", block_rows=70)
    assert_measures(measured, values)
    expected = sm.measure(values, labels=labels)
    assert set(measured.values) == set(expected.values) >= {"linear_probe", "effective_rank"}
    for name, value in expected.values.items():
        if name not in ("linear_probe",):  # it depends on which rows are in which fold
            assert_same(measured.values[name], value, 1e-9)
    assert measured.summary.rows[0].kind == "float32"


def test_twenty_shards_in_three_formats_are_one_array(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra `files` is not installed")
    pytest.importorskip("safetensors", reason="the extra `files` is not installed")
    values = rows(2000)
    folder = tmp_path / "shards"
    folder.mkdir()
    for index, shard in enumerate(values.split(100)):
        save(folder / f"shard-{index}{('.npy', '.safetensors', '.parquet')[index % 3]}", embedding=shard)
    (folder / "README.md").write_text("what these are")
    (folder / "meta.json").write_text("{}")
    (folder / ".cache.npy").write_text("")
    measured = sm.measure(folder, folds=4)
    assert_measures(measured, values)
    for index, fold in enumerate(measured.sums.folds):  # whole files, dealt in numeric order
        expected = torch.cat(values.split(100)[index::4])
        assert relative_error(fold.covariance(), two_pass_covariance(expected)) < 1e-12
    assert set(measured.intervals) >= {"intrinsic_dimension", "effective_rank"}
    ends = measured.intervals["effective_rank"]
    assert ends.low <= measured.values["effective_rank"] <= ends.high
    text = str(measured)
    assert "2,000 x 12 float32 in 20 parts, 4 folds of whole files" in text
    assert "effective_rank" in text
    assert max(map(len, text.splitlines())) <= 100


def test_one_array_is_dealt_by_blocks_from_all_over_it():
    values = rows(1600)
    measured = sm.measure(values.numpy(), folds=4)
    blocks = values.split(50)  # eight for each fold
    for index, fold in enumerate(measured.sums.folds):
        assert relative_error(fold.covariance(), two_pass_covariance(torch.cat(blocks[index::4]))) < 1e-12
    assert int(sm.measure(values, folds=1).sums.num_observations) == 1600
    assert not sm.measure(values, folds=1).intervals


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.asfortranarray(rows().numpy()), "float32"),
        (rows().numpy().astype(">f4"), "float32"),
        (rows().numpy().astype(">f8"), "float64"),
        (rows().numpy().astype(np.longdouble), "longdouble"),
        (rows().numpy().astype(np.float16), "float16"),
        (rows().bfloat16().view(torch.int16).numpy().view("V2"), "bfloat16"),
        (np.asfortranarray(rows().bfloat16().view(torch.int16).numpy().view("V2")), "bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numpy_dtypes_and_orders(value, dtype, tmp_path):
    np.save(tmp_path / "rows.npy", value)
    np.savez_compressed(tmp_path / "rows.npz", rows=value)
    expected = rows().bfloat16() if dtype == "bfloat16" else torch.from_numpy(value.astype(np.float64))
    for name in ("rows.npy", "rows.npz"):
        measured = sm.measure(tmp_path / name, block_rows=77)
        assert_measures(measured, expected)
        assert measured.summary.rows[0].kind == np.dtype(value.dtype).name if dtype != "bfloat16" else dtype
    assert torch_dtype(value.dtype) == as_tensor(value[:1]).dtype


def test_a_mean_far_from_zero_does_not_cost_digits(tmp_path):
    values = 1e8 + rows().double()
    np.save(tmp_path / "far.npy", values)
    assert_measures(sm.measure(tmp_path / "far.npy"), values, 1e-9)
    assert relative_error(sm.moments_of(values).covariance(), two_pass_covariance(values)) < 1e-9


def test_one_row_has_no_variance_and_two_have():
    rows = torch.randn(2, 6)
    assert str(sm.measure(rows[:1])).splitlines()[-1] == (
        "One row has no variance, and all statistics are zero: measure more rows."
    )
    assert "effective_rank" not in str(sm.measure(rows[:1]))
    assert "effective_rank" in str(sm.measure(rows))
    with pytest.warns(UserWarning, match="fewer observations than twice"):  # one direction about zero
        assert "effective_rank       1.000" in str(sm.measure(rows[:1], center=False))


def test_missing_rows_are_left_out_with_their_labels_and_counted(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra `files` is not installed")
    import pyarrow.parquet as pq

    values = rows(400).double()
    labels = torch.arange(400) % 2
    missing = torch.zeros(400, dtype=torch.bool)
    missing[[0, 7, 399]] = True
    holed = values.clone()
    holed[missing] = torch.nan
    holed[5, 3] = torch.inf
    kept = ~missing
    kept[5] = False
    expected = sm.measure(values[kept], labels=labels[kept], folds=1)
    lists = [None if gone else row.tolist() for row, gone in zip(holed, missing, strict=True)]
    for kind in (pa.list_(pa.float64()), pa.list_(pa.float64(), 12), pa.large_list(pa.float64())):
        table = pa.table({"v": pa.array(lists, kind), "class": labels.tolist()})
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=64)
        measured = sm.measure(tmp_path / "rows.parquet", labels="class", folds=1, block_rows=33)
        assert_measures(measured, values[kept])
        assert int(measured.sums.num_left_out) == 4
        assert measured.findings[0].kind == "non_finite"
        assert "4 rows with NaN or infinities left out" in str(measured)
        for name in ("linear_probe", "neural_collapse"):
            assert_same(measured.values[name], expected.values[name], 1e-9)


def test_columns_of_numbers_are_features_and_integers_never(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra `files` is not installed")
    values = rows(300, 4).double() + 1 / 3
    columns = {f"f{index}": values[:, index] for index in range(4)}
    labels = torch.arange(300) % 3
    path = save(tmp_path / "wide.parquet", id=torch.arange(300), **columns, target=labels.double())
    measured = sm.measure(path, column="f*", block_rows=41)
    assert_measures(measured, values)
    assert_measures(sm.measure(path, labels="target"), values)
    import pandas

    frame = pandas.read_parquet(path)
    frame["text"], frame["count"] = "words", pandas.array([1, None, 3] * 100, dtype="Int64")
    assert_measures(sm.measure(frame, column="f[0-3]"), values)
    assert_measures(sm.measure(frame, labels="target"), values)


class Column:
    """A nullable numeric column as in pandas 2: objects, unless floats are asked for."""

    dtype = SimpleNamespace(kind="f")

    def __init__(self, values):
        self.values = values

    def to_numpy(self, dtype=object, na_value=None):
        return np.array([na_value if each.isnan() else float(each) for each in self.values], dtype)


class Frame:
    to_numpy = None  # only its existence is checked

    def __init__(self, columns):
        self.columns = columns

    def __getitem__(self, name):
        return self.columns[name]


def test_columns_that_know_what_is_missing():
    values = rows(300, 4).double()
    holed = values.clone()
    holed[7, 2] = torch.nan
    measured = sm.measure(Frame({f"f{index}": Column(holed[:, index]) for index in range(4)}))
    assert_measures(measured, values[torch.arange(300) != 7])
    assert int(measured.sums.num_left_out) == 1


def test_iterables_give_their_items(tmp_path):
    values = rows(900)
    np.save(tmp_path / "a.npy", values[:300])
    items = [tmp_path / "a.npy", values[300:600], {"embedding": values[600:].numpy(), "id": np.arange(300)}]
    assert_measures(sm.measure(iter(items)), values)
    assert_measures(sm.measure(items, folds=1), values)
    labels = np.arange(900) % 2
    expected = sm.measure(values, [sm.NeuralCollapseMetric(2)], labels=labels)
    found = sm.measure(iter(items), [sm.NeuralCollapseMetric(2)], labels=labels)
    assert_same(found.values["neural_collapse"], expected.values["neural_collapse"], 1e-9)


def test_empty_files_are_skipped_and_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 12), np.float32))
    (tmp_path / "b.pt").touch()
    np.save(tmp_path / "c.npy", rows(200))
    with pytest.warns(UserWarning, match=r"skipped.*a\.npy.*b\.pt"):
        measured = sm.measure(tmp_path)
    assert_measures(measured, rows(200))
    with pytest.raises(ValueError, match=r"expected rows in `source`, got none in .*a\.npy"):
        sm.measure(tmp_path / "a.npy")


def test_a_file_named_twice_is_read_once(tmp_path):
    path = save(tmp_path / "real.npy", embedding=rows(200))
    (tmp_path / "link.npy").symlink_to(path)
    with pytest.warns(UserWarning, match=r"read once, though named twice: .*real.npy"):
        assert_measures(sm.measure(tmp_path), rows(200))


def test_the_second_moment_about_zero_is_rankme():
    values = rows(500).double()
    singular = torch.linalg.svdvals(values)
    share = singular / singular.sum()
    expected = torch.exp(-(share * share.log()).sum())
    assert_same(sm.measure(values, center=False).values["effective_rank"], expected, 1e-9)
    given = sm.measure(values, sm.EffectiveRankMetric(), center=False).values["effective_rank"]
    assert_same(given, expected, 1e-9)


def test_a_wide_source_is_sketched():
    measured = sm.measure(torch.randn(64, 9000), block_rows=16)
    assert isinstance(measured.sums, sm.sums.Sketch)
    assert measured.intervals["intrinsic_dimension"].low > 1
    with pytest.raises(ValueError, match=r"expected at most 8192 features for 'covariance'.* sketch_size=512"):
        sm.measure(torch.randn(64, 9000), sm.CovarianceMetric())


def test_metrics_without_a_matrix_and_progress():
    seen = []
    values = rows(500)
    measured = sm.measure(
        values, sm.RootMeanSquareMetric(), block_rows=200, folds=1, progress=lambda *done: seen.append(done)
    )
    assert_same(measured.values["rms"], values.double().square().mean().sqrt(), 1e-9)
    assert seen == [(200, 500), (400, 500), (500, 500)]
    with pytest.raises(ZeroDivisionError):
        sm.measure(values, progress=lambda done, total: 1 / 0)


# -- runs and the command line --------------------------------------------------------------------------------


def test_recorded_runs_are_runs(tmp_path, capsys):
    first, second = rows(600), rows(600, seed=1) * 1.5
    np.save(tmp_path / "first.npy", first)
    np.save(tmp_path / "second.npy", second)
    for name in ("first", "second"):
        command = ["measure", str(tmp_path / f"{name}.npy"), "--record", str(tmp_path / name)]
        assert main(command) == 0
        assert "600 x 12 float32, 8 folds of blocks" in capsys.readouterr().out
    assert main(command) == 2
    assert "already holds records" in capsys.readouterr().err
    [row] = sm.compare(tmp_path / "first", tmp_path / "second")
    assert row["layer"] == "embeddings"
    assert row["frechet_distance"] > 0.01
    assert row["subspace_overlap"] > 0.5
    recorded = {row["statistic"]: row["value"] for row in read_records(tmp_path / "first")}
    again = {
        row["statistic"]: row["value"]
        for row in sm.recompute(tmp_path / "first", statistics=["effective_rank"])
    }
    assert recorded["effective_rank"] == again["effective_rank"]
    assert main(["summary", str(tmp_path / "first")]) == 0
    assert "embeddings  float32" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    assert (tmp_path / "first" / "report.html").stat().st_size > 10_000


def test_rows_that_correspond_are_compared_by_cka(tmp_path, capsys):
    values, mixing = rows(5000), torch.randn(12, 7)
    np.save(tmp_path / "a.npy", values)
    holed = values @ mixing
    holed[::50] = torch.nan
    sm.measure(tmp_path / "a.npy", record=tmp_path / "a", block_rows=300)
    for name, source in {"b": holed, "c": iter(holed.split(77)), "d": holed[torch.randperm(5000)]}.items():
        sm.measure(source, record=tmp_path / name, folds=3)
    sm.measure(values[1:], record=tmp_path / "e")
    found = {name: sm.compare(tmp_path / "a", tmp_path / name)[0]["linear_cka"] for name in "bcde"}
    whole = torch.arange(5000) % 50 > 0
    expected = float(sm.functional.linear_cka(values[whole], (values @ mixing)[whole]))
    assert found["b"] == found["c"] == pytest.approx(expected, abs=0.05)
    assert abs(found["d"]) < 0.05
    assert found["e"] is None
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert f"Linear CKA of rows of the same numbers: embeddings {found['b']:.3f}\n" in capsys.readouterr().out
    assert "so that they do not correspond" in sm.describe_comparison(tmp_path / "a", tmp_path / "d")


def test_shards_that_a_shell_has_sorted_are_read_in_numeric_order(tmp_path, capsys):
    values = rows(300)
    order = [0, 1, 10, 11, 2, 9]
    for place, index in enumerate(sorted(order)):
        np.save(tmp_path / f"s{index}.npy", values[place * 50 : place * 50 + 50])
    labels = torch.arange(300) // 50
    (tmp_path / "labels.txt").write_text("\n".join(map(str, labels.tolist())))
    paths = [str(tmp_path / f"s{index}.npy") for index in order]
    assert main(["measure", *paths, "--labels", str(tmp_path / "labels.txt"), "--folds", "1"]) == 0
    expected = sm.measure(values, labels=labels, folds=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "neural_collapse" in line)
    assert line.split()[1] == sm.table.number(float(expected.values["neural_collapse"]))
