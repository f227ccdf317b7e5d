"""Rows in files of every format."""

import numpy as np
import torch


def rows(count=1200, width=12, seed=0):
    """Rows with a decaying spectrum and a mean that is not zero, float32."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1) ** -0.5
    return 3 + scale * torch.randn(count, width, generator=generator)


def save_npy(path, **columns):
    (value,) = columns.values()
    np.save(path, np.asarray(value))


def save_npz(path, **columns):
    np.savez(path, **{name: np.asarray(value) for name, value in columns.items()})


def save_safetensors(path, **columns):
    from safetensors.torch import save_file

    save_file({name: torch.as_tensor(value).contiguous() for name, value in columns.items()}, path)


def save_pt(path, **columns):
    torch.save({name: torch.as_tensor(value) for name, value in columns.items()}, path)


def save_parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(value):
        value = np.asarray(value)
        return pa.array(value if value.ndim == 1 else list(value))

    table = pa.table({name: column(value) for name, value in columns.items()})
    pq.write_table(table, path, row_group_size=100)


SAVE = {
    ".npy": save_npy,
    ".npz": save_npz,
    ".safetensors": save_safetensors,
    ".pt": save_pt,
    ".parquet": save_parquet,
}


def save(path, **columns):
    """Write columns in the format that the suffix names."""
    SAVE[path.suffix](path, **columns)
    return path
