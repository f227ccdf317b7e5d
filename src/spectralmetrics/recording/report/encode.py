"""Numbers as compressed text that fits into a page, and that a browser can read without a library."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

MISSING = -1
"""The number in an array of integers where nothing was recorded."""
UNKNOWN = -2
"""The number in an array of integers where the recorded sums give no value yet."""


def pack(content: dict[str, Any]) -> str:
    """Lists, dicts, strings, numbers and arrays as one compressed block.

    Every array is taken out, and an object ``{"array": kind, "start": first byte, "shape": shape}`` says where
    it is. The block is 4 bytes with the length of the JSON, little endian, then the JSON, then the arrays.

    - ``"integers"``: int32. Neighbours along the last axis, epochs, are nearly equal: each number is stored as
      its difference from the one before. 0, -1, 1, -2, ... become 0, 1, 2, 3, ..., so that small differences
      of both signs have leading zeros. All first bytes come first, then all second bytes, so that these zeros
      stand together and compress well.
    - ``"floats"``: float64, the bytes in the same order. NaN and infinities are kept.

    Args:
        content: JSON except for its arrays, which hold integers below 2³⁰ or floats.

    Returns:
        zlib, as base64: letters and digits that no HTML parser takes for markup.
    """
    parts: list[bytes] = []
    position = 0

    def take_out(array: object) -> dict[str, Any]:
        nonlocal position
        if not isinstance(array, np.ndarray):
            raise TypeError(f"expected JSON or an array, got {array!r}")
        kind = "floats" if array.dtype.kind == "f" else "integers"
        reference = {"array": kind, "start": position, "shape": list(array.shape)}
        parts.append(_planes(array.astype("<f8")) if kind == "floats" else _planes(_differences(array)))
        position += len(parts[-1])
        return reference

    # JSON has no NaN: a float outside an array must be finite.
    header = json.dumps(content, default=take_out, allow_nan=False, ensure_ascii=False).encode(
        errors="replace"  # a lone surrogate in a name
    )
    return compress(b"".join((len(header).to_bytes(4, "little"), header, *parts)))


def compress(content: bytes) -> str:
    """zlib, as base64."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _differences(array: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    numbers = array.astype(np.int32)
    steps = np.diff(numbers, axis=-1, prepend=np.int32(0))
    return ((steps << 1) ^ (steps >> 31)).astype("<u4")


def _planes(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()
