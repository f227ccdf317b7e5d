"""Streams of batches, and checks of the sums over them by plain formulas."""

import dataclasses

import numpy as np
import torch
from hypothesis import strategies as st

from spectralmetrics.sums import Observations
from tests.oracles import two_pass_covariance


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of a stream: its number and its observations."""

    number: int
    observations: Observations

    def __post_init__(self):
        if self.observations.labels is None:  # 0, 1, 2 or none; only sums of classes use them
            labels = (7 * torch.arange(self.observations.num_observations) + self.number) % 4 - 1
            start = 1000 * self.number
            object.__setattr__(
                self, "observations", dataclasses.replace(self.observations, labels=labels, start=start)
            )

    def of(self, label):
        """This batch with only the rows of one class valid; with None, the rows of all classes."""
        labels, valid = self.observations.labels, self.observations.valid
        chosen = labels >= 0 if label is None else labels == label
        valid = chosen if valid is None else chosen & valid
        return dataclasses.replace(self, observations=dataclasses.replace(self.observations, valid=valid))

    def kept(self):
        """Mask (N,) of the rows that count: valid and finite."""
        rows = self.observations.rows()
        valid = self.observations.valid
        return rows.isfinite().all(1) & (torch.ones(len(rows), dtype=torch.bool) if valid is None else valid)

    def left_out(self):
        """Number of valid rows that are not finite."""
        valid = self.observations.valid
        every = self.observations.num_observations if valid is None else int(valid.sum())
        return every - int(self.kept().sum())

    def rows(self):
        return self.observations.rows()[self.kept()].double()


def rows_of(batches):
    """Rows that count, (N, D); (0, 0) without batches."""
    return torch.cat([batch.rows() for batch in batches]) if batches else torch.zeros(0, 0, dtype=torch.float64)


def stream(seed, sizes, features, *, means=(0.0,), first=0, bad=0.0, masked=False, maps=False, dtype=None):
    """Batches of these sizes, each about one of the means in turn, with a share of ``bad`` rows."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index, size in enumerate(sizes):
        rows = torch.randn(size, features, generator=generator, dtype=torch.float64)
        rows = rows * torch.logspace(0, -1, features, dtype=torch.float64) + means[index % len(means)]
        spoiled = torch.rand(size, generator=generator) < bad
        rows[spoiled, index % features] = (torch.nan, torch.inf, -torch.inf)[index % 3]
        rows = rows.to(dtype or torch.float64)
        valid = torch.rand(size, generator=generator) < 0.7 if masked and index % 2 else None
        if maps and size % 2 == 0:  # (N, D) -> (2, D, N / 2), with rows in the same order
            observations = Observations(rows.view(2, -1, features).mT.contiguous(), 1, valid)
        else:
            observations = Observations(rows, valid=valid)
        batches.append(Batch(first + index, observations))
    return batches


def streams(**fixed):
    """Any stream: one batch or many, small or large, near zero or far away."""
    drawn = {
        "seed": st.integers(0, 10**6),
        "sizes": st.lists(st.sampled_from([1, 2, 3, 8, 40, 300]), min_size=1, max_size=7),
        "features": st.integers(1, 6),
        "means": st.sampled_from([(0.0,), (1e4,), (0.0, 1e3, -1e3), (1e6, 1e6 + 5)]),
        "bad": st.sampled_from([0.0, 0.3]),
        "masked": st.booleans(),
        "maps": st.booleans(),
        "dtype": st.sampled_from([torch.float64, torch.float32]),
    }
    drawn.update({name: st.just(value) for name, value in fixed.items()})
    return st.builds(stream, **drawn)


# -- what each kind must hold, in extended precision --------------------------------------------------------


def check_mean(sums, batches, error):
    """Check counts and mean against the rows that count; return these and their largest squared deviation."""
    rows = rows_of(batches)
    assert int(sums.num_observations) == len(rows)
    assert int(sums.num_left_out) == sum(batch.left_out() for batch in batches)
    if not len(rows):
        return rows, None
    extended = rows.numpy().astype(np.longdouble)
    mean = extended.mean(0)
    spread = np.abs(extended - mean).max() ** 2 + np.longdouble(1e-300)
    # The mean is one float64, so it cannot be more exact.
    scale = np.abs(mean).max() + np.sqrt(spread)
    assert np.abs(sums.mean().numpy() - mean).max() <= max(error, 1e-15) * scale
    return rows, spread


def check_moments(sums, batches, error=1e-12):
    """Check counts, mean, variances and covariance against the rows that count."""
    rows, spread = check_mean(sums, batches, error)
    if not len(rows):
        return
    for center in (True, False):
        exact = two_pass_covariance(rows, center=center)
        bound = error * (spread if center else np.abs(exact).max() + spread)
        difference = sums.covariance(center=center).numpy().astype(np.longdouble) - exact
        assert np.abs(difference).max() <= bound
        assert np.abs(sums.variances(center=center).numpy() - exact.diagonal()).max() <= bound


def check_folds(sums, batches, error=1e-12):
    """Check the whole against all rows, and each fold against every g-th batch."""
    check_moments(sums, batches, error)
    for turn, fold in enumerate(sums.folds):
        check_moments(fold, [batch for batch in batches if batch.number % sums.number == turn], error)


def check_sketch(sums, batches, error=1e-12):
    """Check that trace, mean and image are exact, and that eigenvalues never exceed the rows' own."""
    rows, spread = check_mean(sums, batches, error)
    if not len(rows):
        return
    exact = two_pass_covariance(rows, center=True)
    omega = sums.test_matrix().numpy().astype(np.longdouble)
    bound = error * spread * len(omega)
    assert np.abs(sums.variances().numpy() - exact.diagonal()).max() <= bound
    assert np.abs(sums.covariance_image().numpy() - exact @ omega).max() <= bound
    true = np.linalg.eigvalsh(exact.astype(np.float64))[::-1]
    known = sums.eigenvalues().numpy()
    shown = min(len(known), len(true))
    slack = 100 * max(error, 1e-12) * float(spread) * len(omega)
    assert (known[:shown] <= true[:shown] + slack).all()
    rest = float(sums.variances().sum()) - known.sum()
    assert (true[:shown] <= known[:shown] + rest + slack).all()


def check_labelled(sums, batches, error=1e-12):
    """Check the moments against the rows with a label, and each class mean against its rows."""
    labelled = [batch.of(None) for batch in batches]
    check_moments(sums, labelled, error)
    for turn, fold in enumerate(sums.each):
        check_moments(fold, [batch for batch in labelled if batch.number % sums.number == turn], error)
    everything = rows_of(labelled).numpy().astype(np.longdouble)
    for label in range(sums.num_classes):
        rows = rows_of([batch.of(label) for batch in batches]).numpy().astype(np.longdouble)
        assert int(sums.class_counts[:, label].sum()) == len(rows)
        if len(rows):
            spread = np.abs(everything - everything.mean(0)).max() + np.longdouble(1e-300)
            deviation = rows.mean(0) - everything.mean(0)
            assert np.abs(sums.class_means()[label].numpy() - deviation).max() <= 10 * error * spread
    assert int(sums.strays.sum()) == 0


def check_marginals(sums, batches, error=1e-12):
    """Check counts, mean, variances, magnitudes, zeros and maxima against the rows that count."""
    rows, spread = check_mean(sums, batches, error)
    if not len(rows):
        return
    extended = rows.numpy().astype(np.longdouble)
    for center, exact in ((True, extended.var(0)), (False, (extended**2).mean(0))):
        bound = error * (spread if center else exact.max() + spread)
        assert np.abs(sums.variances(center=center).numpy() - exact).max() <= bound
    magnitudes = np.abs(extended).mean(0)
    assert np.abs(sums.magnitudes().numpy() - magnitudes).max() <= 1e-12 * magnitudes.max()
    np.testing.assert_array_equal(sums.largest.numpy(), np.abs(extended).max(0))
    np.testing.assert_array_equal(sums.zeros().numpy(), (extended == 0).sum(0))


def check_history(sums, batches, error=1e-12):
    """Check that exactly the last batches have a row, in order of their numbers."""
    numbers = sorted({batch.number for batch in batches})[-sums.steps :]
    rows = sums.forwards().numpy()
    assert rows[:, 0].tolist() == numbers
    for row in rows:
        same = [batch for batch in batches if batch.number == row[0]]
        values = rows_of(same).numpy().astype(np.longdouble)
        assert row[1] == -1
        assert row[3:5].tolist() == [len(values), sum(batch.left_out() for batch in same)]
        assert row[2] == (np.abs(values).max() if len(values) else 0)
        scale = (np.abs(values).max() if len(values) else 0) + 1e-300
        assert abs(row[5] - values.sum()) <= 1e-12 * scale * max(values.size, 1)
        assert abs(row[6] - (values**2).sum()) <= 1e-12 * scale**2 * max(values.size, 1)
        assert row[7] == (values != 0).sum()


def check_numbered(sums, batches, error=None):
    """Check against the rows whose numbers have the smallest splitmix64 hashes."""

    def hashed(number):
        mixed, whole = (number + 1) * 0x9E3779B97F4A7C15 % 2**64, 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % whole
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % whole
        return ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53

    found = {}
    for batch in batches:
        numbers = 1000 * batch.number + batch.kept().nonzero()[:, 0]
        found |= dict(zip(map(hashed, numbers.tolist()), batch.rows(), strict=True))
    expected = sorted(found)[: sums.capacity]
    assert sums.keys[: len(expected)].tolist() == expected
    assert not sums.keys[len(expected) :].isfinite().any()
    assert all(torch.equal(row, found[key]) for row, key in zip(sums.rows, expected, strict=False))


def check_reservoir(sums, batches, error=None):
    """Check against the rows with the smallest keys, whole and in order of their keys."""
    keys, rows = [], []
    for batch in batches:
        count = batch.observations.num_observations
        # seed, process, batch: a repeated run draws the same sample again.
        entropy = np.random.SeedSequence([sums.seed, 0, batch.number]).generate_state(1, np.uint64)
        drawn = torch.rand(
            count, generator=torch.Generator().manual_seed(int(entropy[0]) >> 1), dtype=torch.float64
        )
        keys.append(drawn[batch.kept()])
        rows.append(batch.rows())
    keys, rows = torch.cat(keys).numpy(), torch.cat(rows).numpy()
    order = np.argsort(keys, kind="stable")[: sums.capacity]
    found = sums.keys.isfinite().numpy()
    np.testing.assert_array_equal(sums.keys.numpy()[found], keys[order])
    np.testing.assert_array_equal(sums.rows.numpy()[found], rows[order])
    assert found[: len(order)].all()
