"""Spectra that are read together are decomposed in one batch for each width."""

import pytest
import torch

from spectralmetrics.functional import Observations, Spectrum, accumulate, empty_moments, together
from spectralmetrics.functional.together import Wanted, decompose_together


def spectrum(width, seed):
    moments = empty_moments(width)
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    accumulate(moments, Observations(rows), torch.float64)
    return Spectrum(moments)


@pytest.fixture
def decomposed(monkeypatch):
    """(function, shape) of every decomposition."""
    calls = []
    for name in ("eigh", "eigvalsh"):
        function = getattr(torch.linalg, name)

        def counting(matrix, *rest, name=name, function=function, **options):
            calls.append((name, tuple(matrix.shape)))
            return function(matrix, *rest, **options)

        monkeypatch.setattr(torch.linalg, name, counting)
    return calls


@pytest.mark.parametrize(("part", "function"), [("eigenvalues", "eigvalsh"), ("eigenvectors", "eigh")])
def test_one_decomposition_for_each_width(part, function, decomposed):
    widths = (4, 7, 4, 5, 4, 7)
    spectra = [spectrum(width, seed) for seed, width in enumerate(widths)]
    singly = [getattr(spectrum(width, seed), part) for seed, width in enumerate(widths)]
    decomposed.clear()
    told = []
    decompose_together([Wanted(each, part) for each in spectra], lambda done, of: told.append((done, of)))
    assert sorted(decomposed) == [(function, (2, 7, 7)), (function, (3, 4, 4)), (function, (5, 5))]
    assert [of for _, of in told] == [6, 6, 6]
    assert told[-1] == (6, 6)
    decomposed.clear()
    for each, expected in zip(spectra, singly, strict=True):
        torch.testing.assert_close(getattr(each, part), expected)
        assert each.eigenvalues.shape == (each.num_features,)
    assert not decomposed  # the eigenvalues came with the vectors


def test_a_batch_takes_no_more_memory_than_it_may(decomposed, monkeypatch):
    monkeypatch.setattr(together, "_BATCH_BYTES", 2 * 8 * 4 * 4)
    spectra = [spectrum(4, seed) for seed in range(5)]
    decompose_together([Wanted(each, "eigenvalues") for each in spectra])
    assert decomposed == [("eigvalsh", (2, 4, 4)), ("eigvalsh", (2, 4, 4)), ("eigvalsh", (4, 4))]
    assert all(each.knows("eigenvalues") for each in spectra)


def test_who_wants_vectors_has_the_eigenvalues_too(decomposed):
    one = spectrum(4, 0)
    decompose_together([Wanted(one, "eigenvalues"), Wanted(one, "eigenvectors"), Wanted(one, "variances")])
    assert decomposed == [("eigh", (4, 4))]


def test_an_interrupt_keeps_what_is_done(decomposed):
    def stop(done, of):
        raise KeyboardInterrupt

    spectra = [spectrum(width, width) for width in (3, 4, 5)]
    with pytest.raises(KeyboardInterrupt):
        decompose_together([Wanted(each, "eigenvalues") for each in spectra], stop)
    assert len(decomposed) == 1
    decompose_together([Wanted(each, "eigenvalues") for each in spectra])
    assert len(decomposed) == 3
