"""Cost of a monitor: one reading of all layers, compared with a training step and with its eigenvalues alone.

    python benchmarks/monitor.py [--models gpt,resnet] [--rounds 9] [--steps 10]

The networks of `marginals.py` have a monitor, and a probe on all linear or convolutional layers that samples
(`rows_per_feature=4, every_n_steps=8`). Each round trains some steps and reads; then it decomposes the
covariance of each layer alone. Time is the thread's own processor time; medians over the rounds.
"""

import statistics
import time
import warnings

import torch
from common import Parser, table, write_result
from marginals import gpt, resnet

import spectralmetrics as sm


def timed(function):
    start = time.thread_time()
    function()
    return time.thread_time() - start


def measure(name, rounds, steps):
    torch.manual_seed(0)
    model, loss = {"gpt": gpt, "resnet": resnet}[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    probe = sm.LayerProbe(model, rows_per_feature=4, every_n_steps=8)
    monitor = sm.Monitor(probe, every=steps)

    def train():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    seconds = {"step": [], "between": [], "reading": [], "eigvalsh": []}
    for number in range(rounds + 1):
        own = [(timed(train), timed(monitor.step)) for _ in range(steps)]
        covariances = probe.covariances("train").values()
        decomposed = timed(lambda matrices=covariances: [torch.linalg.eigvalsh(each) for each in matrices])
        if number:  # the first round warms up
            *between, reading = (each for _, each in own)
            seconds["step"].append(statistics.median(each for each, _ in own))
            seconds["between"].append(statistics.median(between))
            seconds["reading"].append(reading)
            seconds["eigvalsh"].append(decomposed)
    return len(covariances), seconds


def main():
    parser = Parser(__doc__)
    parser.add_argument("--models", default="gpt,resnet")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=16, help="steps from one reading to the next")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results, rows = {}, []
    for name in options.models.split(","):
        layers, seconds = measure(name, options.rounds, options.steps)
        step, between, reading, decomposed = map(statistics.median, seconds.values())
        rows.append(
            [
                name,
                layers,
                f"{1e3 * step:.0f}",
                f"{1e6 * between:.0f}",
                f"{1e3 * reading:.0f}",
                f"{reading / decomposed:.2f}",
                f"{reading / step / 100:.2%}",
            ]
        )
        results[name] = {"layers": layers, "seconds": seconds}
    heads = ["network", "layers", "a step, ms", "step() without a reading, µs", "a reading, ms"]
    print(table([*heads, "in eigvalsh of all layers", "of a training, read every 100 steps"], rows))
    write_result("monitor", results)


if __name__ == "__main__":
    main()
