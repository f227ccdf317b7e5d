"""Names of other libraries that our documentation uses, and their pages.

Sphinx downloads the libraries' own lists first. If they cannot be reached, these lists take their place: a
build without a network links the same names, without warnings.
"""

import zlib
from pathlib import Path

LIBRARIES = {
    "python": ("https://docs.python.org/3", {}),
    "torch": (
        "https://docs.pytorch.org/docs/stable",
        {
            "torch.Tensor": "tensors.html",
            "torch.device": "tensor_attributes.html",
            "torch.dtype": "tensor_attributes.html",
            "torch.Generator": "generated/$.html",
            "torch.distributed.tensor.DTensor": "distributed.tensor.html",
            "torch.amp.GradScaler": "amp.html",
            "torch.nn.Module": "generated/$.html",
            "torch.nn.ModuleDict": "generated/torch.nn.ModuleDict.html",
            "torch.nn.Sequential": "generated/$.html",
            "torch.nn.TransformerEncoderLayer": "generated/$.html",
            "torch.optim.Optimizer": "optim.html",
        },
    ),
    "torchmetrics": (
        "https://lightning.ai/docs/torchmetrics/stable",
        {
            "torchmetrics.Metric": "references/metric.html",
            "torchmetrics.MetricCollection": "pages/overview.html",
            "torchmetrics.metric.Metric": "references/metric.html#torchmetrics.Metric",
            "torchmetrics.collections.MetricCollection": "pages/overview.html#torchmetrics.MetricCollection",
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable",
        {"numpy.ndarray": "reference/generated/$.html", "numpy.load": "reference/generated/$.html"},
    ),
    "scipy": (
        "https://docs.scipy.org/doc/scipy",
        {"scipy.linalg.eigh": "reference/generated/$.html", "scipy.stats.t": "reference/generated/$.html"},
    ),
}
"""Library -> the address of its documentation, and name -> page (`$`: the name)."""
FUNCTIONS = {"numpy.load", "scipy.linalg.eigh"}
DATA = {"scipy.stats.t"}


def inventory(library: str) -> bytes:
    """A list of names, in Sphinx's format."""
    lines = []
    for name, page in LIBRARIES[library][1].items():
        role = "function" if name in FUNCTIONS else "data" if name in DATA else "class"
        address = page.replace("$", name)
        lines.append(f"{name} py:{role} 1 {address if '#' in address else f'{address}#{name}'} -\n")
    head = f"# Sphinx inventory version 2\n# Project: {library}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    return head.encode() + zlib.compress("".join(lines).encode())


def mapping(folder: Path) -> dict[str, tuple[str, tuple[str | None, str]]]:
    """``intersphinx_mapping``: each library's own list, and ours, which this writes into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for library, (address, _) in LIBRARIES.items():
        path = folder / f"{library}.inv"
        path.write_bytes(inventory(library))
        found[library] = (address, (None, str(path)))
    return found
