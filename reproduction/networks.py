"""ResNet-18 with the ImageNet stem, without its two early downsamplings, and both without shortcuts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 16
"""Channels of the first stage; 64 in the published network. Later stages have 2, 4 and 8 times as many."""


class Block(nn.Module):
    """Two 3x3 convolutions, with or without a shortcut past them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if shortcut and (stride > 1 or channels_in != channels_out):
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, maps: Tensor) -> Tensor:
        inner: Tensor = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(maps)))))
        return functional.relu(inner + self.downsample(maps) if self.shortcut else inner)


class ResNet18(nn.Module):
    """ResNet-18 with the layer names of the well-known implementations."""

    def __init__(self, width: int = WIDTH, early_downsampling: bool = True, shortcuts: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 7, 2 if early_downsampling else 1, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if early_downsampling else nn.Identity()
        channels = width
        for stage in range(4):
            out = width * 2**stage
            first = Block(channels, out, 2 if stage else 1, shortcuts)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, Block(out, out, 1, shortcuts)))
            channels = out
        self.fc = nn.Linear(channels, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(functional.relu(self.norm1(self.conv1(images))))
        for stage in range(4):
            maps = getattr(self, f"layer{stage + 1}")(maps)
        logits: Tensor = self.fc(maps.mean((2, 3)))
        return logits


def make(early_downsampling: bool, shortcuts: bool) -> Callable[[], nn.Module]:
    return lambda: ResNet18(early_downsampling=early_downsampling, shortcuts=shortcuts)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": make(early_downsampling=True, shortcuts=True),
    "ResNet-18, early downsampling removed": make(early_downsampling=False, shortcuts=True),
    "sequential": make(early_downsampling=True, shortcuts=False),
    "sequential, early downsampling removed": make(early_downsampling=False, shortcuts=False),
}

EXAMPLE = torch.zeros(1, 1, 32, 32)
