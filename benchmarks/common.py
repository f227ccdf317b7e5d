"""What all benchmarks share: the machine in words, tables, and where results go."""

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import torch

from spectralmetrics.functional import compiled

RESULTS = Path(__file__).parent / "results"


def describe_machine():
    """Date, processor and versions, for the head of a result."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = {}
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        model = facts.get("model name", model)
        # Virtual machines shorten the name ("AMD EPYC"); these numbers still tell the generation.
        numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
        model += f" ({', '.join(numbers)})" if numbers else ""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "compiled": compiled.instruction_set(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "torchmetrics", "numpy")},
    }


def write_result(name, results):
    """Write ``results/{name}.json``."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({"machine": describe_machine(), "results": results}, indent=1) + "\n")
    print(f"wrote {target}")


def table(headings, rows):
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
