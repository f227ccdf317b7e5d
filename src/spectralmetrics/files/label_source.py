"""Labels of rows: the name of a column, a file, or the labels themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralmetrics.files.fields import Columns, Field, ReadError, field_of_array, field_of_tensor
from spectralmetrics.files.readers import READERS, read_columns


def read_labels(field: Field, name: str, start: int, stop: int) -> Tensor:
    """Labels of some rows, shape (n,), int64; -1 for a row without one."""
    labels = field.read(start, stop)
    if labels.is_floating_point():
        is_there = labels.isfinite()
        wrong = is_there & (labels != labels.round())
        if bool(wrong.any()):
            row = int(wrong.to(torch.uint8).argmax())
            raise ReadError(name, f"expected an integer label, got {float(labels[row])}", start + row)
        labels = torch.where(is_there, labels, -1)
    return labels.to(torch.int64)


def labels_of(labels: Any) -> tuple[str | None, Field | None]:
    """The name of the column of labels, or the field of all labels."""
    if labels is None:
        return None, None
    if isinstance(labels, (str, Path)):
        path = Path(os.path.expanduser(labels))
        if not path.is_file():
            if isinstance(labels, Path) or path.suffix.lower() in READERS:
                raise FileNotFoundError(f"expected a file of labels, found no {str(labels)!r}")
            return str(labels), None
        columns = _read_text(path) if path.suffix == ".txt" else read_columns(path)
        candidates = [name for name, each in columns.fields.items() if each.is_integer and len(each.shape) == 1]
        if len(candidates) != 1:
            raise ReadError(
                str(path), f"expected one column of integer labels of shape (N,), got {columns.listed()}"
            )
        return None, columns.fields[candidates[0]]
    field = field_of_tensor(labels) if isinstance(labels, Tensor) else field_of_array(np.asanyarray(labels))
    if len(field.shape) != 1 or not (field.is_integer or field.is_floating):
        raise TypeError(
            f"expected labels as integers of shape (N,), the name of a column or a file, got {field}"
        )
    return None, field


def is_file(name: str, other: Any) -> bool:
    """True if two paths are one file."""
    if not isinstance(other, (str, Path)):
        return False
    return os.path.isfile(name) and os.path.isfile(other) and os.path.samefile(name, other)


def _read_text(path: Path) -> Columns:
    try:
        return Columns(str(path), {"": field_of_array(np.loadtxt(path, dtype=np.int64, ndmin=1))})
    except ValueError as error:
        raise ReadError(str(path), f"expected an integer in each line: {error}") from error
