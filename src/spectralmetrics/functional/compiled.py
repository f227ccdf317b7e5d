"""Where the compiled accumulation lived in 0.1.0; it is :mod:`spectralmetrics.sums.compiled`."""

from spectralmetrics.sums.compiled import InstructionSet, instruction_set, using

__all__ = ["InstructionSet", "instruction_set", "using"]
