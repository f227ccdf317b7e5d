"""Time that a probe adds to training steps on a GPU; time and error of single updates there.

    python benchmarks/accelerator.py [--device cuda] [--models gpt vit resnet] [--rounds 9] [--steps 8] [--tiny]

The networks come from ``transformers``, with random weights: a Llama of GPT-2's size (12 blocks of width 768,
16 sequences of 1,024 tokens), ViT-B/16 (64 images of 224 x 224) and ResNet-50 (128 images), trained in
bfloat16 by autocast. Each arm has its own network and optimizer. A round runs all arms in turn for some steps,
and waits for the device after each arm. An arm's cost is its time relative to the same round's step without
hooks; for a compiled arm, relative to the compiled step. The script reports medians over the rounds, with the
least and the largest. The probe leaves out the Llama's head (32,000 features).

The second table shows single updates: time of the host, time until the device is done, and the largest error
of an entry as a share of the size of its summands. ``--tiny`` tries the script on any device.
"""

import copy
import gc
import statistics
import time
import warnings

import torch
from common import MARGINALS, Parser, table, write_result
from torch import nn

import spectralmetrics as sm

ARMS = {
    "no hook": None,
    "a hook that does nothing": "empty",
    "exact": {},
    "exact, float32 products": {"metrics": sm.SaturationMetric(gram_dtype=torch.float32)},
    "exact, 8 folds": {"metrics": sm.SaturationMetric(folds=8)},
    "4 rows per feature": {"rows_per_feature": 4},
    "4 rows per feature, every 8th step": {"rows_per_feature": 4, "every_n_steps": 8},
    "budget of 3 %": {"budget": 0.03},
    "seven marginals": {"metrics": [metric() for metric in MARGINALS]},
    "history": {"metrics": sm.HistoryMetric()},
    "gradients": {"observe": "gradients"},
    "compiled, no hook": None,
    "compiled, exact": {},
    "compiled, 4 rows per feature, every 8th step": {"rows_per_feature": 4, "every_n_steps": 8},
    "compiled, budget of 3 %": {"budget": 0.03},
}
SETTLING_STEPS = 150  # a budget's first observation is expensive


def gpt(tiny):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=64 if tiny else 768,
        intermediate_size=128 if tiny else 2048,
        num_hidden_layers=2 if tiny else 12,
        num_attention_heads=2 if tiny else 12,
    )
    tokens = torch.randint(0, 32_000, (2, 64) if tiny else (16, 1024))
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def vit(tiny):
    import transformers

    config = transformers.ViTConfig(num_hidden_layers=2 if tiny else 12, num_labels=1000)
    images = torch.randn(2 if tiny else 64, 3, 224, 224)
    return transformers.ViTForImageClassification(config), labelled(images)


def resnet(tiny):
    import transformers

    config = transformers.ResNetConfig(depths=[1, 1, 1, 1] if tiny else [3, 4, 6, 3], num_labels=1000)
    images = torch.randn(2 if tiny else 128, 3, 224, 224)
    return transformers.ResNetForImageClassification(config), labelled(images)


def labelled(images):
    return {"pixel_values": images, "labels": torch.arange(len(images)) % 1000}


MODELS = {"gpt": gpt, "vit": vit, "resnet": resnet}


class Arm:
    """A network, its optimizer, and its hooks or probe."""

    def __init__(self, model, inputs, name, device):
        self.settings, self.device, self.inputs = ARMS[name], device, inputs
        self.model, self.probe = copy.deepcopy(model), None
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4)
        if self.settings == "empty":
            for layer in self.model.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    layer.register_forward_hook(lambda module, args, output: None)
        elif self.settings is not None:
            head = {"exclude": "lm_head"} if hasattr(self.model, "lm_head") else {}
            self.probe = sm.LayerProbe(self.model, **head, **self.settings)
        self.runs = torch.compile(self.model) if name.startswith("compiled") else self.model

    def step(self):
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.runs(**self.inputs).loss
        loss.backward()
        self.optimizer.step()

    def run(self, steps):
        """Seconds of some steps; seconds until the host had launched them."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        host = time.perf_counter() - start
        synchronize(self.device)
        return time.perf_counter() - start, host


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(name, arms, options, device):
    torch.manual_seed(0)
    model, inputs = MODELS[name](options.tiny)
    model, inputs = model.to(device), {key: value.to(device) for key, value in inputs.items()}
    running, states = {}, {}
    for arm in arms:
        before = memory(device)
        running[arm] = Arm(model, inputs, arm, device)
        running[arm].run(3 if options.tiny else SETTLING_STEPS if "budget" in arm else 2 * options.steps)
        states[arm] = memory(device) - before
    seconds = {arm: [] for arm in arms}
    for _ in range(options.rounds):
        for arm, each in running.items():
            seconds[arm].append([whole / options.steps for whole in each.run(options.steps)])
    results = []
    for arm, times in seconds.items():
        base = seconds["compiled, no hook" if arm.startswith("compiled") else "no hook"]
        added = [100 * (one[0] / other[0] - 1) for one, other in zip(times, base, strict=True)]
        probe = running[arm].probe
        result = {
            "model": name,
            "arm": arm,
            "layers": 0 if probe is None else len(probe.layers),
            "step ms": 1e3 * statistics.median(whole for whole, _ in times),
            "host ms": 1e3 * statistics.median(host for _, host in times),
            "added percent": added,
            "state bytes": states[arm] - states["no hook"],
        }
        if probe is not None and arm == "exact":
            start = time.perf_counter()
            probe.compute("train")
            result["compute seconds"] = time.perf_counter() - start
        results.append(result)
    print(table(HEADS, map(row, results)), flush=True)
    return results


def memory(device):
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


HEADS = ["model", "arm", "layers", "step ms", "host ms", "added %", "least … most", "states MiB", "compute s"]


def row(result):
    added = result["added percent"]
    return [
        result["model"],
        result["arm"],
        result["layers"] or "",
        f"{result['step ms']:.1f}",
        f"{result['host ms']:.1f}",
        f"{statistics.median(added):.1f}",
        f"{min(added):.1f} … {max(added):.1f}",
        f"{result['state bytes'] / 2**20:.0f}",
        f"{result['compute seconds']:.2f}" if "compute seconds" in result else "",
    ]


SIZES = [(256, 1024), (8192, 1024), (32768, 256), (8192, 4096)]


def updates(options, device):
    """Time of single updates with rows far from zero, and the error of their sums."""
    results = []
    for rows, width in [(64, 32)] if options.tiny else SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            drawn = torch.randn(rows, width, device=device) * torch.logspace(0, -2, width, device=device) + 3
            drawn = drawn.to(dtype)
            exact = drawn.double() - drawn.double().mean(0)
            truth, size = exact.mT @ exact, exact.square().sum(0).sqrt()
            for gram in (torch.float32, torch.float64):
                metric = sm.CovarianceMetric(gram_dtype=gram).to(device)
                metric.update(drawn)
                error = (metric.compute() * rows - truth).abs() / (size[:, None] * size)
                for _ in range(40):  # past the steps at which the origin moves most often
                    metric.update(drawn)
                synchronize(device)
                start = time.perf_counter()
                for _ in range(50):
                    metric.update(drawn)
                host = time.perf_counter() - start
                synchronize(device)
                results.append(
                    {
                        "rows": rows,
                        "width": width,
                        "dtype": str(dtype).removeprefix("torch."),
                        "products": str(gram).removeprefix("torch."),
                        "host us": 2e4 * host,
                        "us": 2e4 * (time.perf_counter() - start),
                        "error": float(error.max()),
                    }
                )
    print(table_of_updates(results), flush=True)
    return results


def table_of_updates(results):
    cells = [[f"{each:.3g}" if isinstance(each, float) else each for each in row.values()] for row in results]
    return table(list(results[0]), cells)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a trial of the script, with small networks")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(name)
    results = {"device": name, "updates": updates(options, device), "steps": []}
    for model in options.models:
        # Compiling the two networks for images takes too long.
        arms = [arm for arm in options.arms if model == "gpt" or not arm.startswith("compiled")]
        results["steps"] += measure(model, arms, options, device)
        gc.collect()
        if not options.tiny:
            write_result("accelerator", results)


if __name__ == "__main__":
    main()
