"""Train small language models over a grid of learning rates and batch sizes, and read their spectra on the way.

The runs test two published claims: the spectrum of activations early in training predicts the later loss
(arXiv:2605.05683); the effective rank (RankMe) and the exponent of the spectrum (α-ReQ) pass through three
phases (arXiv:2509.23024). The models are GPTs of 0.8 million parameters on the sources of Python's standard
library, character by character. Every model of the grid trains on the same number of tokens.

The script writes the corpus once, into ``language_corpus.txt`` beside this file, from the library of the
running Python. Each result contains the digest of its corpus. Every finished run is a line of
``language.jsonl`` and is not measured again. ``reproduction/language_report.py`` reads them.

    python -m reproduction.language [--device cuda] [--jobs 2] [--seeds 1] [--tokens 4194304]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import sysconfig
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectralmetrics import (
    EffectiveRankMetric,
    LayerProbe,
    ParticipationRatioMetric,
    PowerLawExponentMetric,
    SaturationMetric,
)

HERE = Path(__file__).parent
RESULTS, CORPUS = HERE / "language.jsonl", HERE / "language_corpus.txt"
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
BATCHES = (16, 32, 64, 128)
CONTEXT, WIDTH, DEPTH, HEADS = 128, 128, 4, 4
WARM_UP = 0.02
"""The learning rate rises for this share of the training, then falls to a tenth along a cosine."""
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0)
"""Shares of the training after which models of the grid are measured."""
FOLLOWED = 36
"""Number of measurements in a run for phases, evenly spaced in log(step)."""
WORDS = 4096
WINDOWS, PROBED = 1024, 32
"""Validation windows of the final loss; every 32nd also gives spectra and losses during training."""
DOCUMENT = "\f"
METRICS = {
    "rankme": EffectiveRankMetric(center=False),
    "effective_rank": EffectiveRankMetric(),
    "participation_ratio": ParticipationRatioMetric(),
    "saturation": SaturationMetric(),
    "exponent": PowerLawExponentMetric(),
    "tail_exponent": PowerLawExponentMetric(first=11, last=100),
}


@dataclass(frozen=True)
class Setting:
    """Settings of a run; equal settings mean the same run."""

    kind: str  # "grid" or "phases"
    vocabulary: str  # "characters" or "words"
    rate: float
    batch: int
    seed: int
    tokens: int

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * CONTEXT)

    def moments(self) -> list[int]:
        """The numbers of steps after which the model is measured."""
        if self.kind == "grid":
            return sorted({round(share * self.steps) for share in SHARES})
        several = FOLLOWED - 1
        return sorted({0, *(round(self.steps ** (i / (several - 1))) for i in range(several))})


# -- the text ------------------------------------------------------------------------------------------------


def write_corpus(path: Path) -> None:
    """Write the sources of the standard library, as printable ASCII, one document each."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = re.compile(
        r"(^|/)(tests?|site-packages|dist-packages|encodings|__pycache__|config-.*)/|(^|/)_sysconfigdata"
    )
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py") if file.resolve().is_file())
    texts = [
        re.sub(r"[^ -~\n]", "", (root / file).read_text("utf-8", errors="ignore").expandtabs())
        for file in files
        if not left_out.search(file)
    ]
    partial = path.with_suffix(".partial")
    partial.write_text(DOCUMENT.join(texts), encoding="ascii")
    partial.replace(path)


@cache
def load(path: Path, vocabulary: str) -> tuple[Tensor, Tensor, int, str]:
    """Tokens to train and to validate on (every twelfth document), size of the vocabulary, digest."""
    text = path.read_text("ascii")
    documents = text.split(DOCUMENT)
    train = "\n".join(document for i, document in enumerate(documents) if i % 12)
    validation = "\n".join(documents[::12])
    digest = hashlib.sha256(text.encode()).hexdigest()
    characters = sorted(set(train + validation))
    if vocabulary == "characters":
        ids = torch.full((128,), -1)
        ids[[ord(character) for character in characters]] = torch.arange(len(characters))
        parts = [
            ids[torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8).long()]
            for part in (train, validation)
        ]
        return parts[0], parts[1], len(characters), digest
    counts = Counter(pieces(train))
    kept = [piece for piece, _ in counts.most_common() if len(piece) > 1][: WORDS - len(characters)]
    number = {piece: i for i, piece in enumerate(characters + kept)}

    def encode(part: str) -> Tensor:
        found = (piece if piece in number else tuple(piece) for piece in pieces(part))
        return torch.tensor(
            [number[p] for piece in found for p in ((piece,) if isinstance(piece, str) else piece)]
        )

    return encode(train), encode(validation), len(number), digest


def pieces(text: str) -> list[str]:
    """Words with the space before them, runs of spaces or line ends, and single signs."""
    return re.findall(r" ?[A-Za-z]+| +|\n+|.", text)


# -- the model -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(samples, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(samples, length, WIDTH))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT-2 with tied embeddings."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                inner = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * DEPTH) if inner else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# -- a run ---------------------------------------------------------------------------------------------------


def learning_rate(setting: Setting, step: int) -> float:
    warm = max(1, round(WARM_UP * setting.steps))
    if step < warm:
        return setting.rate * (step + 1) / warm
    done = (step - warm) / max(1, setting.steps - warm)
    return setting.rate * (0.55 + 0.45 * math.cos(math.pi * done))


def loss_on(model: nn.Module, windows: Tensor) -> float:
    """Mean cross-entropy in nats for each token."""
    with torch.no_grad():
        losses = [
            functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
            for part in windows.split(PROBED)
        ]
    return float(torch.stack(losses).mean())


class Observer:
    """Measures a copy of the model on the CPU, on some windows.

    A GPU that many processes share would take longer for the eigenvalues than for all of the training.
    """

    def __init__(self, model: GPT, windows: Tensor) -> None:
        self.copy = deepcopy(model).cpu().eval()
        self.windows = windows.cpu()
        # The outputs of all linear layers but the head, of all blocks, and of the last norm.
        self.probe = LayerProbe(self.copy, METRICS, layers=[nn.Linear, Block, "norm"], exclude="head")

    def __call__(self, model: GPT) -> tuple[float, dict[str, dict[str, float | None]]]:
        """The loss, and the statistics of every layer."""
        self.copy.load_state_dict(model.state_dict())
        loss = loss_on(self.copy, self.windows)
        values = self.probe.compute("eval")
        self.probe.reset()
        layers = {
            layer: {name: rounded(values.get(f"{name}/eval/{layer}", math.nan)) for name in METRICS}
            for layer in self.probe.layers
        }
        return loss, layers


def rounded(value: Any) -> float | None:
    """The value with five digits; None if it is not finite, since JSON has no such numbers."""
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None


def measure(setting: Setting, corpus: Path, device: str) -> dict[str, Any]:
    """Train one model and return its line of the results."""
    started = time.perf_counter()
    train, validation, size, digest = load(corpus, setting.vocabulary)
    train, validation = train.to(device), validation.to(device)
    torch.manual_seed(setting.seed)
    model = GPT(size).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    window = torch.arange(CONTEXT + 1, device=device)
    starts = torch.linspace(0, len(validation) - CONTEXT - 1, WINDOWS).long().to(device)
    held_out = validation[starts[:, None] + window]
    generator = torch.Generator().manual_seed(setting.seed)
    # The same seed draws the same tokens in the same order for every batch size.
    drawn = torch.randint(len(train) - CONTEXT - 1, (setting.steps * setting.batch,), generator=generator).to(
        device
    )
    losses = torch.zeros(setting.steps, device=device)
    recent = max(1, setting.steps // 100)
    observe = Observer(model, held_out[:: WINDOWS // PROBED])
    moments, measured = setting.moments(), []
    for step in range(setting.steps + 1):
        if step in moments:
            held_out_loss, layers = observe(model)
            seen = losses[max(0, step - recent) : step]
            measured.append(
                {
                    "step": step,
                    "train_loss": rounded(seen.mean()),
                    "validation_loss": rounded(held_out_loss),
                    "layers": layers,
                }
            )
        if step == setting.steps:
            break
        batch = train[drawn[step * setting.batch : (step + 1) * setting.batch, None] + window]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(setting, step)
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step] = loss.detach()
    return {
        **asdict(setting),
        "steps": setting.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary_size": size,
        "validation_loss": rounded(loss_on(model, held_out)),
        "train_loss": rounded(losses[-max(1, setting.steps // 20) :].mean()),
        "moments": measured,
        "seconds": round(time.perf_counter() - started, 2),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "corpus": digest,
    }


# -- all runs ------------------------------------------------------------------------------------------------


def settings(options: argparse.Namespace) -> list[Setting]:
    """All settings, seed by seed, so that a stop leaves whole grids; the runs with most steps first."""
    return [
        Setting(options.kind, vocabulary, rate, batch, seed, options.tokens)
        for seed in range(options.seeds)
        for vocabulary in options.vocabularies
        for batch in sorted(options.batches)
        for rate in options.rates
    ]


def read(results: Path) -> list[dict[str, Any]]:
    """The finished runs, without a line that a stop has cut short."""
    runs = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return runs


def prepare() -> None:
    """Use one thread in each process, and ignore warnings (of values that are not finite, too)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def work(setting: Setting, corpus: Path, device: str, deadline: float) -> dict[str, Any] | None:
    return measure(setting, corpus, device) if time.time() < deadline else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that train")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2**22, help="tokens that each model of the grid sees")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--kind", choices=("grid", "phases"), default="grid", help="phases: measured often")
    parser.add_argument("--vocabularies", nargs="+", choices=("characters", "words"), default=["characters"])
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after so many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    options = parser.parse_args()
    started = time.time()
    keys = set(Setting.__dataclass_fields__)
    kept = [{key: value for key, value in run.items() if key in keys} for run in read(options.results)]
    missing = [setting for setting in settings(options) if asdict(setting) not in kept]
    if not missing:
        return
    if not options.corpus.exists():
        write_corpus(options.corpus)
    print(f"{len(missing)} runs of {options.corpus}, {options.corpus.stat().st_size} characters", flush=True)
    context = multiprocessing.get_context("spawn")
    deadline = started + options.seconds
    with (
        ProcessPoolExecutor(options.jobs, mp_context=context, initializer=prepare) as pool,
        options.results.open("a+b") as lines,
    ):
        lines.seek(0)
        if lines.read()[-1:] not in (b"", b"\n"):
            lines.write(b"\n")  # ends a line that a stop has cut short
        futures = {
            pool.submit(work, setting, options.corpus, options.device, deadline): setting for setting in missing
        }
        for future in as_completed(futures):
            setting = futures[future]
            try:
                run = future.result()
            except Exception as error:  # the other runs go on
                print(f"{setting}: {type(error).__name__}: {error}", flush=True)
                continue
            if run is None:
                continue
            lines.write(json.dumps(run, separators=(",", ":")).encode() + b"\n")
            lines.flush()
            print(
                f"{time.time() - started:.0f} s: {setting.kind}, {setting.vocabulary}, rate {setting.rate:g},"
                f" batch {setting.batch}, seed {setting.seed}: loss {run['validation_loss']},"
                f" {run['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
