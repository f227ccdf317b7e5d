"""Weight matrices in checkpoints: .safetensors, its index or folder, and .pt with weights only."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralmetrics.extras import from_extra
from spectralmetrics.parameters import weight_in, why_no_numbers
from spectralmetrics.torch_private import load_tensors
from spectralmetrics.weights import (
    WeightMatrix,
    WeightSummary,
    first_reason,
    summarise_weights,
    without_wrappers,
)

_NESTED = ("state_dict", "model_state_dict", "model", "module", "weights")
_OPTIMISERS = ("optim", "optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "lr_schedulers")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


class _Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: its shape.
        dtype: its dtype; None if PyTorch has none like it.
        storage: a key that is equal for tensors that share their memory; None if unknown.
        bring: reads the tensor.
        is_meta: True if the tensor was saved without its values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    storage: object
    bring: Callable[[], Tensor]
    is_meta: bool = False


def checkpoint_spectra(
    path: str | Path,
    statistics: Any = None,
    since: str | Path | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> WeightSummary:
    """The spectra of the weight matrices in a checkpoint, one in memory at a time.

    Args:
        path: a ``.safetensors`` file, its ``.index.json``, a folder that holds either, or a ``.pt``, ``.pth``,
            ``.bin`` or ``.ckpt`` file of tensors alone. State dicts inside are found, optimizer states
            left out, prefixes of wrappers dropped.
        statistics: see :func:`~spectralmetrics.weight_spectra`.
        since: an earlier checkpoint of the same model: the statistics of the difference are read, too.
        progress: called with the number of matrices done and the number of all.

    Returns:
        A row for each matrix; skipped tensors are listed with the reason. A file does not say which
        convolutions are transposed. Those whose bias has another length than the weight's first dimension are
        read as :func:`~spectralmetrics.weight_spectra` reads them; others, such as those with as many inputs as
        outputs, as if they were not transposed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file of another kind, one that is damaged, one that holds Python objects, or one
            without matrices.
        ModuleNotFoundError: for ``.safetensors`` without the extra ``spectralmetrics[weights]``.
    """
    stored = read_checkpoint(Path(path))
    skipped: dict[str, str] = {}
    matrices = list(_matrices(stored, skipped))
    if not matrices:
        why = first_reason(skipped)
        raise ValueError(
            f"expected weight matrices in {str(path)!r}, got {len(stored)} tensors, none of them one{why}"
        )
    before = None if since is None else _LazyTensors(read_checkpoint(Path(since)))
    return summarise_weights(matrices, statistics, before, skipped, progress)


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors in files; an access reads the tensor."""

    def __init__(self, stored: Mapping[str, _Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].bring()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def read_checkpoint(path: Path) -> dict[str, _Stored]:
    """The tensors in a checkpoint by name, without prefixes of wrappers; none is read yet.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: see :func:`checkpoint_spectra`.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint, found no {str(path)!r}")
    tensors: dict[str, _Stored] = {}
    files: dict[str, Path] = {}  # tensor -> its file
    for file in _files(path):
        read = _safetensors if file.suffix == ".safetensors" else _pickled
        found = {without_wrappers(name): stored for name, stored in read(file).items()}
        if (twice := next((name for name in found if name in files), None)) is not None:
            raise ValueError(
                f"expected the files of one checkpoint in {str(path)!r}, got {twice!r} in {files[twice].name!r}"
                f" and in {file.name!r}: give the path of one file"
            )
        tensors |= found
        files |= dict.fromkeys(found, file)
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if indices:
            return _files(indices[0])
        for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"):
            if files := sorted(path.glob(pattern)):
                return files
        raise ValueError(f"expected .safetensors or .pt files in {str(path)!r}, found none")
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"expected the index of a checkpoint in {str(path)!r}, it has no weight_map"
            ) from error
        if missing := [name for name in names if not (path.parent / name).is_file()]:
            raise FileNotFoundError(f"{str(path)!r} names {missing[0]!r}, which is not beside it")
        return [path.parent / name for name in names]
    if path.suffix != ".safetensors" and path.suffix not in _PICKLES:
        raise ValueError(
            f"expected a .safetensors, .pt, .pth, .bin or .ckpt file, an index or a folder, got {str(path)!r}"
        )
    return [path]


def _safetensors(path: Path) -> dict[str, _Stored]:
    with from_extra("weights", ".safetensors files need safetensors"):
        import safetensors
    try:
        with safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            described = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as .safetensors: {error}") from error

    def bring(name: str) -> Tensor:
        with safetensors.safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return {
        name: _Stored(shape, _SAFETENSORS_DTYPES.get(dtype), None, partial(bring, name))
        for name, (shape, dtype) in described.items()
    }


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _pickled(path: Path) -> dict[str, _Stored]:
    is_zip = zipfile.is_zipfile(path)
    try:
        content = load_tensors(path, is_zip)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = is_zip or file.read(len(pickle.PROTO)) == pickle.PROTO
        if not is_pickle:
            raise ValueError(f"{str(path)!r} cannot be read as a PyTorch checkpoint: it is none") from error
        raise ValueError(
            f"{str(path)!r} holds Python objects besides tensors, which could run code when they are read: save"
            " the model's state_dict() alone, as in torch.save(model.state_dict(), path) or .safetensors"
        ) from error
    except Exception as error:  # a damaged file raises any kind of error
        raise ValueError(f"{str(path)!r} cannot be read as a PyTorch checkpoint: {error}") from error
    return {
        name: _Stored(tuple(value.shape), value.dtype, _storage_of(value), lambda v=value: v, value.is_meta)  # type: ignore[misc]
        for name, value in _flat(_state_dict(content)).items()
    }


def _state_dict(content: Any) -> Any:
    """The state dict inside the saved content of a checkpoint."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = inner
    return content


def _flat(content: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        return {prefix or "weight": content}
    tensors: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            if str(key) not in _OPTIMISERS and isinstance(value, (Tensor, Mapping)):
                tensors.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return tensors


def _storage_of(value: Tensor) -> object:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return None
    return value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride()


def _matrices(stored: Mapping[str, _Stored], skipped: dict[str, str]) -> Iterator[WeightMatrix]:
    seen: dict[object, str] = {}
    for name, tensor in stored.items():
        if tensor.storage is not None and tensor.storage in seen:
            skipped[name] = f"it is {seen[tensor.storage]!r}"
            continue
        if tensor.storage is not None:
            seen[tensor.storage] = name
        if reason := _reason(tensor) or _part(name, stored):
            skipped[name] = reason
            continue
        bring = tensor.bring
        if f"{name.removesuffix('_orig')}_mask" in stored:
            name = name.removesuffix("_orig")
            bring = partial(weight_in, _LazyTensors(stored), name)  # type: ignore[assignment]
        layer = name.removesuffix(".weight")
        if len(tensor.shape) == 3 and "expert" in name:
            for expert in range(tensor.shape[0]):
                yield WeightMatrix(f"{layer}.{expert}", "", name, bring, expert)
        else:
            groups = _groups_of_transposed(stored, name, tensor.shape)
            yield WeightMatrix(layer, "", name, bring, inputs_first=groups > 0, groups=max(groups, 1))


def _groups_of_transposed(stored: Mapping[str, _Stored], name: str, shape: tuple[int, ...]) -> int:
    """The groups of a weight of shape (in, out / groups, *kernel), known by a bias of length out; else 0.

    That is a transposed convolution or, without a kernel, a ``Conv1D`` of transformers. A bias as long as the
    first dimension says nothing.
    """
    bias = stored.get(f"{name.removesuffix('weight')}bias")
    if bias is None or len(bias.shape) != 1 or bias.shape[0] == shape[0] or 0 in shape:
        return 0
    groups, rest = divmod(bias.shape[0], shape[1])
    fits = groups == 1 or (groups > 1 and len(shape) > 2 and shape[0] % groups == 0)
    return groups if fits and not rest else 0


def _part(name: str, stored: Mapping[str, _Stored]) -> str:
    """The reason why a tensor is only a part of a weight; empty if it is a whole weight."""
    own, _, end = name.rpartition("_")
    if end == "mask" and f"{own}_orig" in stored:
        return f"it is the mask of {own!r}"
    made_of = {"g": ("v",), "v": ("g",), "orig": ("mask", "u")}.get(end, ())
    is_part = any(f"{own}_{other}" in stored for other in made_of) and f"{own}_mask" not in stored
    if is_part and end in ("g", "v"):
        # weight_norm has a size for each row, and no matrix of a gate beside a matrix of values.
        is_part = sum(size > 1 for size in stored[f"{own}_g"].shape) <= 1
    if is_part or "parametrizations" in name.split("."):
        return "it is a part of a weight: load the model, and weight_spectra(model) reads the whole"
    return ""


def _reason(tensor: _Stored) -> str:
    """The reason why a tensor is not a matrix that can be read; empty if it is."""
    if len(tensor.shape) < 2:
        return "it is no matrix"
    if tensor.is_meta:
        return "it was saved on the meta device, without its values"
    if tensor.dtype is None:
        return "PyTorch has no such dtype"
    return why_no_numbers(tensor.dtype, tensor.shape)
