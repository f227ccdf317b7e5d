r"""Similarity of two layers, by their directions, their distributions, or the samples that they separate.

Two layers whose units correspond, such as one layer at two epochs, can be compared direction by direction:
:func:`subspace_overlap`, :func:`frechet_distance`. Two layers whose units do not correspond, such as layers of
two networks, can be compared by which samples they separate: :func:`linear_cka`.

Linear CKA (`Kornblith et al. 2019 <https://arxiv.org/abs/1905.00414>`_) is a cosine between two matrices of
inner products between samples. For rows :math:`x_i` about their mean, let :math:`k_{ij} = x_i^\top x_j`, and
make the rows and columns of :math:`K` sum to zero without its diagonal,

.. math:: \hat K_{ij} = k_{ij} + \frac{k_{ii} + k_{jj}}{n - 2} - \frac{\operatorname{tr} K}{(n - 1)(n - 2)}
          \quad (i \ne j), \qquad \hat K_{ii} = 0.

Then :math:`\operatorname{HSIC}(X, Y) = \frac{1}{n (n - 3)} \sum_{ij} \hat K_{ij} \hat L_{ij}` is the unbiased
estimator :math:`\operatorname{HSIC}_1` of Song et al. (2012), written as an inner product (as by Székely and
Rizzo 2014). Unbiased estimates of batches can be added up (`Nguyen et al. 2021
<https://arxiv.org/abs/2010.15327>`_), and since each is an inner product, so is their sum: a ratio of such
sums lies in [−1, 1], however few samples there were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmetrics.sums.about_origin import first_of
from spectralmetrics.sums.checks import check_real, dtype_or_type
from spectralmetrics.sums.decomposition import eigenvectors, round_off

MINIMUM_SAMPLES = 4
"""The unbiased estimator divides by n − 3."""

# Fourth powers of larger values, summed over samples and features, leave the range of float64.
_LARGEST = 1e60
# Memory for a block of features in float64: larger blocks leave the cache, smaller ones need many operations.
_BLOCK_BYTES = 2**23


def subspace_overlap(left: Tensor, right: Tensor) -> Tensor:
    r"""The share of the smaller of two subspaces that lies in the larger, a number in [0, 1].

    .. math:: \frac{\lVert Q_1^\top Q_2 \rVert_F^2}{\min(k, l)},

    the mean squared cosine of the principal angles. It is 1 if one space holds the other and 0 if they are
    orthogonal. Random subspaces share :math:`\max(k, l) / D` on average: compare with that.

    Args:
        left: orthonormal columns :math:`Q_1`, shape (..., D, k), floating, k ≥ 1.
        right: orthonormal columns :math:`Q_2`, shape (..., D, l), floating, l ≥ 1.

    Returns:
        Shape (...), float64; leading dimensions are broadcast.

    Raises:
        TypeError: if one of them is not a floating tensor.
        ValueError: if the widths D differ, a space has no columns, or columns are not orthonormal.

    >>> subspace_overlap(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
    tensor(0.5000, dtype=torch.float64)
    """
    bases = []
    for name, basis in (("left", left), ("right", right)):
        _check_floating(name, basis)
        if basis.ndim < 2 or 0 in basis.shape[-2:]:
            raise ValueError(f"expected {name} of shape (..., D, k) with k >= 1, got {tuple(basis.shape)}")
        exact = basis.detach().to(torch.float64)
        deviation = (exact.mT @ exact - torch.eye(basis.shape[-1], device=basis.device)).abs()
        # Accept columns that are orthonormal to the precision in which they were computed.
        if not (deviation <= torch.finfo(basis.dtype).eps ** 0.5).all():
            raise ValueError(
                f"expected {name} to have orthonormal columns, got inner products that deviate from 0 and 1 by"
                f" {float(deviation.max()):.2g}; torch.linalg.qr makes them orthonormal"
            )
        bases.append(exact)
    if left.shape[-2] != right.shape[-2]:
        raise ValueError(
            f"expected subspaces of one space, got vectors of {left.shape[-2]} and {right.shape[-2]} features"
        )
    cosines = bases[0].mT @ bases[1]
    overlap = cosines.square().sum((-2, -1)) / min(cosines.shape[-2:])
    return overlap.clamp(max=1.0)


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    r"""The squared Fréchet distance of two normal distributions, which the FID of generated images uses.

    .. math:: \lVert \mu_1 - \mu_2 \rVert^2 + \operatorname{tr} \Sigma_1 + \operatorname{tr} \Sigma_2
              - 2 \operatorname{tr} \big(\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2}\big)^{1/2}

    (`Dowson and Landau 1982 <https://doi.org/10.1016/0047-259X(82)90077-X>`_). The last trace is the sum of the
    singular values of :math:`\Sigma_1^{1/2} \Sigma_2^{1/2}`. They are read from the eigenvalues
    :math:`\pm \sigma_i` of a symmetric matrix of twice the size, because the square roots of the eigenvalues of
    :math:`\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2}` would keep only half of the digits. Covariances may be
    singular.

    Args:
        mean_1: shape (..., D), floating.
        cov_1: symmetric positive semi-definite, shape (..., D, D), floating; directions whose variance is
            round-off count as without variance, as in
            :func:`~spectralmetrics.functional.eigenvalues`.
        mean_2: shape (..., D), floating.
        cov_2: shape (..., D, D), floating.

    Returns:
        Shape (...), float64, in squared units of the features: never negative, and 0 for equal inputs.

    Raises:
        TypeError: if one of them is not a floating tensor.
        ValueError: if widths do not fit together, or a value is not finite.

    >>> mean, covariance = torch.zeros(2), torch.diag(torch.tensor([4.0, 0.0]))
    >>> frechet_distance(mean, covariance, mean + 1, covariance / 4)
    tensor(3., dtype=torch.float64)
    """
    given = {"mean_1": mean_1, "cov_1": cov_1, "mean_2": mean_2, "cov_2": cov_2}
    for name, tensor in given.items():
        _check_floating(name, tensor)
    width = mean_1.shape[-1] if mean_1.ndim else None
    for name, tensor in given.items():
        trailing = 1 if name.startswith("mean") else 2
        if tensor.ndim < trailing or any(extent != width for extent in tensor.shape[-trailing:]):
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in given.items())
            raise ValueError(f"expected means (..., D) and covariances (..., D, D) of one width, got {shapes}")
        if trailing == 1 and not torch.isfinite(tensor).all():
            raise ValueError(f"expected a finite {name}, got one that holds NaN or infinite values")
    mean_1, mean_2 = mean_1.detach().to(torch.float64), mean_2.detach().to(torch.float64)
    roots = [_root(cov_1.detach()), _root(cov_2.detach())]
    product = roots[0].mT @ roots[1]
    common = _singular_values_twice(product).sum(-1)
    variances = sum(root.square().sum((-2, -1)) for root in roots)
    distance = (mean_1 - mean_2).square().sum(-1) + (variances - common).clamp(min=0)
    equal = (mean_1 == mean_2).all(-1) & (cov_1 == cov_2).all(-1).all(-1)
    return torch.where(equal, 0.0, distance)


def debiased_hsic(left: Tensor, right: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""The unbiased estimator :math:`\operatorname{HSIC}_1` of linear dependence between two sets of features.

    It estimates :math:`\lVert \operatorname{Cov}(x, y) \rVert_F^2` from n samples, and its mean is 0 where the
    features are uncorrelated, also for few samples of many features. It is never negative if ``left`` and
    ``right`` are the same.

    With centred rows it equals

    .. math:: \frac{1}{n (n - 3)} \Big(\lVert X^\top Y \rVert_F^2 - \frac{n}{n - 2} \sum_i k_{ii} l_{ii}
              + \frac{\operatorname{tr} K \operatorname{tr} L}{(n - 1)(n - 2)}\Big),

    which takes a matrix of D1 x D2 numbers, where the definition takes n x n of them; the smaller one is used.

    Args:
        left: rows (N, D1), floating.
        right: rows (N, D2) of the same samples, floating.
        valid: (N,) boolean, True for the samples to use; all if None.

    Returns:
        Shape (), float64; 0 if fewer than four samples are valid. Round-off counts as 0.

    Raises:
        TypeError: for rows that are not floating.
        ValueError: for rows that are not 2-D, of different numbers, or fewer than four.

    >>> rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    >>> debiased_hsic(rows, rows)
    tensor(5.1667, dtype=torch.float64)
    """
    check_pair(left, right)
    _check_valid(valid, len(left))
    samples, (width_1, width_2) = len(left), (left.shape[1], right.shape[1])
    number = torch.full((), samples, device=left.device) if valid is None else valid.sum()
    n = number.to(torch.float64)
    if width_1 * width_2 > samples * (width_1 + width_2):
        product = u_centred(_gram(left, valid), valid) * u_centred(_gram(right, valid), valid)
        return product.sum() / _pairs(n)
    x, y = _centred(left, valid), _centred(right, valid)
    x_norms, y_norms = x.square().sum(1), y.square().sum(1)
    divisor = (n - 2).clamp(min=1)
    cross = (x.mT @ y).square().sum()
    diagonal = n / divisor * (x_norms * y_norms).sum()
    traces = x_norms.sum() * y_norms.sum() / ((n - 1).clamp(min=1) * divisor)
    value = cross - diagonal + traces
    is_round_off = value.abs() <= round_off(samples) * (cross + diagonal + traces)
    return torch.where(is_round_off | (n < MINIMUM_SAMPLES), 0.0, value) / _pairs(n)


def linear_cka(left: Tensor, right: Tensor) -> Tensor:
    """Debiased linear centred kernel alignment of two sets of features of the same samples.

    1 if the features differ by a rotation, a shift and a scale only; about 0 if they are uncorrelated, for any
    number of samples, where the biased estimator approaches 1 as features outnumber samples.

    Args:
        left: rows (N, D1), floating.
        right: rows (N, D2) of the same samples, floating.

    Returns:
        Shape (), float64, in [−1, 1]; 0 where one side is constant.

    Raises:
        TypeError: for rows that are not floating.
        ValueError: for rows that are not 2-D, of different numbers, or fewer than four.

    >>> rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [3.0, 5.0], [4.0, 2.0]])
    >>> linear_cka(rows, rows.flip(1) * 2 + 1)
    tensor(1., dtype=torch.float64)
    """
    return cka(debiased_hsic(left, right), debiased_hsic(left, left), debiased_hsic(right, right))


def cka(cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    r"""Centred kernel alignment from sums of HSIC over batches: ``cross / sqrt(left * right)``.

    Args:
        cross: sums of HSIC between the two sides, shape (...), floating.
        left: sums of HSIC of the left side with itself, over the same batches, broadcastable.
        right: the same of the right side.

    Returns:
        Shape (...), float64, in [−1, 1]; 0 where a side never varied.

    >>> cka(torch.tensor([3.0, 0.0]), torch.tensor([9.0, 0.0]), torch.tensor([4.0, 1.0]))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    for name, sums in (("cross", cross), ("left", left), ("right", right)):
        check_real(name, sums)
    # The product of both could leave the range of float64.
    norms = [side.to(torch.float64).clamp(min=0).sqrt() for side in (left, right)]
    denominator = norms[0] * norms[1]
    ratio = torch.where(denominator > 0, cross.to(torch.float64) / denominator, 0.0)
    return ratio.clamp(-1.0, 1.0)


def gram(rows: Tensor) -> Tensor:
    """Inner products between samples, about one of them; :func:`u_centred` does not depend on this choice.

    The features are taken in blocks, so that wide rows are never in memory as float64. A sample with NaN or
    infinities spoils its own row and column only: its entry in the diagonal is not finite.

    Args:
        rows: (N, D), floating.

    Returns:
        Shape (N, N), float64.

    >>> gram(torch.tensor([[1.0], [3.0]]))
    tensor([[0., 0.],
            [0., 4.]], dtype=torch.float64)
    """
    _check_floating("rows", rows)
    if rows.ndim != 2:
        raise ValueError(f"expected rows of shape (N, D), got {tuple(rows.shape)}")
    return _gram(rows, None)


def u_centred(grams: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Inner products about the mean, without the diagonal, so that rows and columns sum to zero.

    .. math:: \hat K_{ij} = k_{ij} - \frac{\sum_{l \ne i} k_{il} + \sum_{l \ne j} k_{lj}}{n - 2}
              + \frac{\sum_{l \ne m} k_{lm}}{(n - 1)(n - 2)} \quad (i \ne j), \qquad \hat K_{ii} = 0

    (Székely and Rizzo 2014). The sum of :math:`\hat K_{ij} \hat L_{ij}` is n (n − 3) times
    :func:`debiased_hsic`.

    Args:
        grams: symmetric matrices of inner products, shape (..., N, N), floating. Adding a constant to all rows
            of the features does not change the result.
        valid: (N,) boolean, True for the samples to use; all if None.

    Returns:
        Shape (..., N, N), float64; zero for a matrix that is round-off, and for fewer than four valid samples.

    >>> u_centred(torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))).abs().sum()
    tensor(0., dtype=torch.float64)
    """
    _check_floating("grams", grams)
    if grams.ndim < 2 or grams.shape[-1] != grams.shape[-2]:
        raise ValueError(f"expected grams of shape (..., N, N), got {tuple(grams.shape)}")
    _check_valid(valid, grams.shape[-1])
    grams = grams.to(torch.float64)
    samples = grams.shape[-1]
    if valid is None:
        valid = torch.ones(samples, dtype=torch.bool, device=grams.device)
    n = valid.sum()
    off_diagonal = valid[:, None] & valid & ~torch.eye(samples, dtype=torch.bool, device=grams.device)
    pairs = torch.where(off_diagonal, grams, 0.0)
    rows = pairs.sum(-1)
    total = rows.sum(-1)[..., None, None]
    divisor = (n - 2).clamp(min=1)
    centred = pairs - (rows[..., :, None] + rows[..., None, :]) / divisor
    centred = centred + total / (divisor * (n - 1).clamp(min=1))
    centred = torch.where(off_diagonal & (n >= MINIMUM_SAMPLES), centred, 0.0)
    scale = torch.where(valid[:, None] & valid, grams, 0.0).abs().amax((-2, -1), keepdim=True)
    largest = centred.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > round_off(samples) * scale, centred, 0.0)


def usable_rows(rows: Tensor) -> Tensor:
    """Flags of rows that are finite and small enough for fourth powers in float64, shape (N,), boolean.

    >>> usable_rows(torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [float("inf"), 0.0]]))
    tensor([ True, False, False])
    """
    # A sum is not finite where a value is not, and takes one pass.
    if rows.dtype == torch.float64:
        return rows.abs().sum(1) <= _LARGEST
    return torch.isfinite(rows.sum(1, dtype=torch.float64))


def usable_samples(grams: Tensor) -> Tensor:
    """Flags of usable samples, (..., N), boolean, from their inner products (..., N, N).

    >>> usable_samples(gram(torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [3.0, 0.0]])))
    tensor([ True, False,  True])
    """
    return grams.diagonal(dim1=-2, dim2=-1) <= _LARGEST**2


def check_pair(left: Tensor, right: Tensor) -> None:
    """Raise a TypeError or ValueError unless these are rows of the same samples, at least four of them."""
    for name, rows in (("left", left), ("right", right)):
        _check_floating(name, rows)
        if rows.ndim != 2:
            raise ValueError(
                f"expected {name} rows of shape (N, D), got {tuple(rows.shape)}; flatten or pool the other"
                " dimensions, to give one row for each sample"
            )
    if len(left) != len(right):
        raise ValueError(f"expected rows of the same samples, got {len(left)} and {len(right)}")
    if len(left) < MINIMUM_SAMPLES:
        raise ValueError(
            f"expected a batch of at least {MINIMUM_SAMPLES} samples, got {len(left)}: the unbiased estimator"
            " divides by n - 3; drop the last batch or make batches larger"
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"expected {name} to be a floating tensor, got {dtype_or_type(tensor)}")


def _check_valid(valid: Tensor | None, samples: int) -> None:
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        kind = dtype_or_type(valid)
        raise TypeError(f"expected valid as a boolean tensor, True for samples to use, got {kind}")
    if valid.shape != (samples,):
        raise ValueError(f"expected valid of shape ({samples},), got {tuple(valid.shape)}")


def _root(covariance: Tensor) -> Tensor:
    """A matrix F with F Fᵀ = Σ, with a column for each direction that has variance, at least one."""
    values, vectors = eigenvectors(covariance)
    rank = max(int((values > 0).sum(-1).max()), 1)
    return vectors[..., :rank] * values[..., None, :rank].sqrt()


def _singular_values_twice(matrix: Tensor) -> Tensor:
    """Each singular value twice, and zeros: the magnitudes of the eigenvalues of [[0, A], [Aᵀ, 0]]."""
    rows, columns = matrix.shape[-2:]
    upper = torch.cat([matrix.new_zeros(*matrix.shape[:-2], rows, rows), matrix], -1)
    lower = torch.cat([matrix.mT, matrix.new_zeros(*matrix.shape[:-2], columns, columns)], -1)
    values: Tensor = torch.linalg.eigvalsh(torch.cat([upper, lower], -2))
    return values.abs()


def _gram(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Like :func:`gram`, about the first valid sample; None: about one of usual size that can be used."""
    samples, rows = rows.shape[0], rows.detach()
    products = torch.zeros(samples, samples, dtype=torch.float64, device=rows.device)
    if not rows.numel():
        return products
    index = _of_usual_size(rows) if valid is None else first_of(valid)
    for block in rows.split(max(_BLOCK_BYTES // (8 * samples), 64), 1):
        # Cast first: an operation between two dtypes takes many times longer.
        wide = block.to(torch.float64)
        # Subtract a sample first: equal rows give exact zeros, and a far mean costs no digits.
        pivot = wide.index_select(0, index)
        moved = wide - torch.where(pivot.abs() <= _LARGEST, pivot, 0.0)
        products.addmm_(moved, moved.mT)
    return products


def _of_usual_size(rows: Tensor) -> Tensor:
    """The index of a usable row of median size, shape (1,); reads nothing from a device.

    An outlier would cost the other rows their digits, and may be left out for its values in another layer.
    """
    rows = rows.to(torch.float32) if rows.dtype.itemsize == 1 else rows  # PyTorch has no norm of eight bits
    sizes = torch.linalg.vector_norm(rows, torch.inf, dim=1)
    is_usable = sizes <= _LARGEST
    order = torch.where(is_usable, sizes, torch.inf).argsort(stable=True)
    middle = (is_usable.sum() - 1).clamp(min=0) // 2
    return order.gather(0, middle.reshape(1))


def _centred(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Rows in float64 about the mean of valid rows; other rows are zero."""
    rows = rows.detach().to(torch.float64)
    if valid is None:
        # Subtract a row first: equal rows must give exact zeros, and a far mean must not cost digits.
        rows = rows - rows[:1]
        return rows - rows.mean(0)
    keep = valid[:, None]
    rows = torch.where(keep, rows - rows.index_select(0, first_of(valid)), 0.0)
    mean = rows.sum(0) / valid.sum().clamp(min=1)
    return torch.where(keep, rows - mean, 0.0)


def _pairs(number: Tensor) -> Tensor:
    """The divisor n (n − 3), or 1 where that is not positive."""
    return torch.where(number >= MINIMUM_SAMPLES, number * (number - 3), 1.0)
