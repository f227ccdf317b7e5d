"""Shared by all benchmarks: a description of the machine, tables, and the folder for results."""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import torch

import spectralmetrics as sm
from spectralmetrics.functional import compiled

RESULTS = Path(__file__).parent / "results"
MARGINALS = [  # the metrics that need no matrix
    sm.RootMeanSquareMetric,
    sm.SpreadMetric,
    sm.MaxAbsMetric,
    sm.ZeroShareMetric,
    sm.DeadFeaturesMetric,
    sm.DormantFeaturesMetric,
    sm.OutlierFeaturesMetric,
]
# Processor time (of all threads) is for machines that others use.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Parser(argparse.ArgumentParser):
    """Reads a benchmark's options, and prints what it runs on before it measures."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, *arguments):
        options = super().parse_args(*arguments)
        print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), flush=True)
        return options


def describe_machine():
    """Date, processor, load, versions, and the instructions of the sums, for the head of a result."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = {}
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        model = facts.get("model name", model)
        # Virtual machines shorten the name ("AMD EPYC"); these numbers still give the generation.
        numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
        model += f" ({', '.join(numbers)})" if numbers else ""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "",
        "compiled": compiled.instruction_set(),
        "sums": compiled.describe(),
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
