"""A tiny Llama, ways to spread it over processes, and the outputs of its layers in one process."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from tests.distributed import spread

VOCABULARY, WIDTH, HEADS, INNER = 40, 16, 4, 24


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        samples, steps, _ = x.shape
        # Heads come first: torch 2.8 multiplies only DTensors that are sharded along the first dimension.
        q, k, v = (
            w(x).view(samples, steps, -1, WIDTH // HEADS).permute(2, 0, 1, 3)
            for w in (self.wq, self.wk, self.wv)
        )
        weights = ((q @ k.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return self.wo((weights @ v).permute(1, 2, 0, 3).reshape(samples, steps, -1))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.feed_forward = Attention(), FeedForward()

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def mesh_of(world):
    return init_device_mesh("cpu", (world,))


def llama(dtype=torch.float64, blocks=1):
    torch.manual_seed(0)
    return Llama(blocks).to(dtype)


KINDS = (nn.Linear, nn.RMSNorm, nn.Embedding)


def tokens(seed, samples=5, steps=6):
    return torch.randint(VOCABULARY, (samples, steps), generator=torch.Generator().manual_seed(seed))


def plan(*, is_local=True, sequence=False, blocks=1):
    """A plan for ``parallelize_module`` like torchtitan's: tensor parallel, or also sequence parallel."""
    columns, rows = ColwiseParallel, RowwiseParallel
    between = Shard(1) if sequence else Replicate()
    found = {
        "output": columns(input_layouts=between, output_layouts=Replicate(), use_local_output=is_local),
    }
    for number in range(blocks):
        prefix = f"layers.{number}."
        for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"):
            found[prefix + name] = columns(use_local_output=is_local)
        for name in ("attention.wo", "feed_forward.w2"):
            found[prefix + name] = rows(output_layouts=between, use_local_output=is_local or not sequence)
        if sequence:
            for name in ("attention_norm", "ffn_norm"):
                found[prefix + name] = SequenceParallel(use_local_output=is_local)
            for name in ("attention", "feed_forward"):
                found[prefix + name] = PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
                )
    if sequence:
        found["tokens"] = rows(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=is_local)
        found["norm"] = SequenceParallel(use_local_output=is_local)
    return found


def whole(values):
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def loss_of(output):
    return whole(output).float().square().mean()


def outputs(batches, kinds=KINDS, model=None):
    """Layer -> (N, T, D) for each batch, in one process without a probe."""
    return spread.outputs(llama() if model is None else model, batches, kinds)


def rows(batches, kinds=KINDS, model=None):
    """Layer -> (n, D), in one process without a probe."""
    return {
        name: torch.cat([each.flatten(0, -2) for each in found])
        for name, found in outputs(batches, kinds, model).items()
    }
