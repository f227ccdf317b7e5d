"""The name that the compiled accumulation had in 0.1.0; it is :mod:`spectralmetrics.sums.compiled`."""

from spectralmetrics.sums.compiled import InstructionSet, describe, instruction_set, using

__all__ = ["InstructionSet", "describe", "instruction_set", "using"]
