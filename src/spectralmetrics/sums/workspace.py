"""Memory that each thread keeps and reuses."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# The most memory that a thread keeps for one role.
_KEPT_WORKSPACE_BYTES = 2**26
_KEPT = threading.local()


def workspace(like: Tensor, role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of any content; on a CPU it is reused for the same role, since fresh pages are slow there."""
    size = math.prod(shape)
    if like.device.type != "cpu" or size * dtype.itemsize > _KEPT_WORKSPACE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=like.device)
    name = f"{role}, {dtype}"
    kept: Tensor | None = getattr(_KEPT, name, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=dtype, device="cpu")
        setattr(_KEPT, name, kept)
    return kept[:size].view(tuple(shape))
