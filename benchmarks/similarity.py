"""Similarity of layers: its cost relative to the forward pass, and the error that batches add.

    python benchmarks/similarity.py [--rounds 5] [--batches 32 128] [--threads 1]

Cost: two ResNet-18 for images of 32 x 32 pixels, 21 x 21 layers, forward passes in evaluation. Each round runs
every arm for some batches after one that is not timed; added time is relative to the same round's plain
forwards. ``pytorch-cka`` runs the forwards itself.

Batches: two small residual networks, trained on real digits from different seeds, 21 x 21 pairs of layers. The
error of batches is the difference from the debiased value of all 1,000 validation digits at once, for the
debiased and for the biased estimator.
"""

import statistics
import time

import cka as pytorch_cka
import torch
from common import Parser, table, write_result
from torch import nn
from training_step import resnet

import spectralmetrics as sm
from spectralmetrics import demo


def cost(batch, rounds, batches):
    models = [resnet()[0].eval() for _ in range(2)]
    images = [torch.randn(batch, 3, 32, 32) for _ in range(batches)]
    names = list(sm.probing.select_layers(models[0]))

    def forwards():
        with torch.no_grad():
            for each in images:
                for model in models:
                    model(each)

    def observed(**options):
        def run():
            with sm.LayerSimilarity(*models, **options) as similarity:
                forwards()
            similarity.compute()

        return run

    def other_package():
        pytorch_cka.compute_cka(*models, [images], layers=names, device="cpu", progress=False)

    arms = {
        "plain": forwards,
        "flatten": observed(),
        "mean": observed(feature_maps="mean"),
        "pytorch-cka 1.1.3": other_package,
    }
    seconds = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            seconds[name].append((time.perf_counter() - start) / batches)
    added = {
        name: [100 * (own / plain - 1) for own, plain in zip(values, seconds["plain"], strict=True)]
        for name, values in seconds.items()
        if name != "plain"
    }
    return {"batch": batch, "layers": len(names), "seconds": seconds, "added percent": added}


def trained(seed, images, labels):
    torch.manual_seed(seed)
    model = demo.ResidualNetwork()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


def features_of(model, images):
    features = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: features.update({name: output.flatten(1)})
        )
        for name, module in sm.probing.select_layers(model).items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return list(features.values())


def biased(left, right, batch):
    """Sums over batches of the biased HSIC, in float64."""
    sums = torch.zeros(3, len(left), len(right), dtype=torch.float64)
    for start in range(0, len(left[0]), batch):
        sides = []
        for features in (left, right):
            rows = [each[start : start + batch].double() for each in features]
            grams = [(each - each.mean(0)) @ (each - each.mean(0)).T for each in rows]
            sides.append(torch.stack(grams).flatten(1))
        x, y = sides
        sums[0] += x @ y.T
        sums[1] += (x * x).sum(1)[:, None]
        sums[2] += (y * y).sum(1)
    return sums[0] / (sums[1] * sums[2]).sqrt()


def by_batches(batches=(8, 16, 32, 64, 128, 256)):
    images, labels, validation, _ = demo.load_digits(0)
    models = [trained(seed, images, labels) for seed in range(2)]

    def similarity(batch):
        with sm.LayerSimilarity(*models) as observed, torch.no_grad():
            for part in validation.split(batch):
                for model in models:
                    model(part)
        return observed.compute().matrix

    whole = similarity(len(validation))
    features = [features_of(model, validation) for model in models]
    results = []
    for batch in batches:
        row = {"batch": batch}
        for name, values in (("debiased", similarity(batch)), ("biased", biased(*features, batch))):
            error = values - whole
            row[name] = {
                "mean error": float(error.mean()),
                "root mean square": float(error.square().mean().sqrt()),
                "largest": float(error.abs().max()),
            }
        results.append(row)
    return {"samples": len(validation), "mean of the whole": float(whole.mean()), "batches": results}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, help="threads of torch; 1 if other programs use the cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    costs = [cost(batch, options.rounds, max(64 // batch, 1)) for batch in options.batches]
    rows = []
    for result in costs:
        for name, values in result["seconds"].items():
            added = statistics.median(result["added percent"].get(name, [0.0]))
            rows.append([result["batch"], name, f"{1e3 * statistics.median(values):.0f}", f"{added:.1f}"])
    print(table(["batch", "arm", "ms a batch, both models", "added %"], rows))
    growth = by_batches()
    rows = [
        [row["batch"], *(f"{row[name][key]:.4f}" for name in ("debiased", "biased") for key in row[name])]
        for row in growth["batches"]
    ]
    keys = ("mean error", "root mean square", "largest")
    print(table(["batch", *(f"{name}, {key}" for name in ("debiased", "biased") for key in keys)], rows))
    write_result("similarity", {"cost": costs, "batches": growth})


if __name__ == "__main__":
    main()
