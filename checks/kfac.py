"""K-FAC factors from an "inputs" and a "gradients" probe against curvlinops' factors: an MLP and a small CNN.

    python -m pip install curvlinops-for-pytorch
    python checks/kfac.py

It is not among the tests, because curvlinops installs torchvision, whose build must fit torch's build. The
largest differences, relative to the largest entry of a factor, must be below 1e-12.
"""

import torch
from curvlinops import KFACLinearOperator
from torch import nn

from spectralmetrics import CovarianceMetric, LayerProbe

SIZES = (40, 24, 8)  # batches of several sizes: their mean losses scale gradients differently


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(True), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)), (12,)


def cnn():
    convolutions = nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2)
    return nn.Sequential(*convolutions, nn.ReLU(True), nn.Flatten(), nn.Linear(32, 4)), (1, 10, 10)


def patches_of(convolution):
    """A metric, updated by a hook with the patches to which a convolution applies its kernel."""
    metric = CovarianceMetric(center=False)

    def look(module, args):
        found = nn.functional.unfold(
            args[0], module.kernel_size, module.dilation, module.padding, module.stride
        )  # (N, C * kernel, positions)
        metric.update(found.mT.flatten(0, 1).detach())

    return metric, convolution.register_forward_pre_hook(look)


def factors_of_probes(model, data):
    """Layer -> second moments of its inputs, and of the gradients of each sample's loss."""
    linear = LayerProbe(model, CovarianceMetric(), layers=nn.Linear, observe="inputs")
    gradients = LayerProbe(model, CovarianceMetric(), observe="gradients", max_map_size=None)
    convolutions = {
        name: patches_of(each) for name, each in model.named_children() if isinstance(each, nn.Conv2d)
    }
    for x, y in data:
        gradients.gradient_scale = 1 / len(x)
        nn.functional.cross_entropy(model(x), y).backward()
    inputs = linear.covariances("train", center=False)
    inputs |= {name: metric.compute() for name, (metric, _) in convolutions.items()}
    outputs = gradients.covariances("train", center=False)
    rows = {name: int(gradients["train", name]["covariance"].count) for name in outputs}
    for probe in (linear, gradients):
        probe.remove()
    for _, handle in convolutions.values():
        handle.remove()
    samples = sum(len(x) for x, _ in data)
    # curvlinops sums over the positions of a sample, the probe's rows take a mean.
    return {name: (inputs[name], outputs[name] * rows[name] / samples) for name in outputs}


def factors_of_curvlinops(model, data):
    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        data,
        fisher_type="empirical",
        check_deterministic=False,  # the check would compute the factors again, and add them
    )
    operator.compute_kronecker_factors()
    return {
        name: (operator._input_covariances[name], operator._gradient_covariances[name])
        for name in operator._gradient_covariances
    }


def main():
    for new in (mlp, cnn):
        torch.manual_seed(0)
        model, shape = new()
        model.double()
        data = [(torch.randn(size, *shape).double(), torch.randint(4, (size,))) for size in SIZES]
        own, others = factors_of_probes(model, data), factors_of_curvlinops(model, data)
        assert own.keys() == others.keys()
        for layer, pairs in own.items():
            for which, mine, other in zip(("inputs", "gradients"), pairs, others[layer], strict=True):
                difference = float((mine - other).abs().max() / other.abs().max())
                print(f"{new.__name__}: {layer:>2} {which:>9} {tuple(other.shape)!s:>10}  {difference:.1e}")
                assert difference < 1e-12, (new.__name__, layer, which)


if __name__ == "__main__":
    main()
