"""What a probe asks of ``torch.compile``: to look at hooks."""

from __future__ import annotations

from typing import Any


def heed_hooks() -> None:
    """Have compiled models look whether they have hooks, from now on and in this process.

    Unless it is told otherwise, Dynamo takes it that a module compiled without hooks never gets any, and that
    all instances of a class have the same: a model probed later, or beside another instance of its class, would
    run the graph of the unprobed one. ``torch._dynamo.config.skip_nnmodule_hook_guards`` tells it otherwise,
    for all models of the process, at the cost of a comparison per module and call. What was compiled before is
    compiled anew when it runs next, once.
    """
    import torch._dynamo

    dynamo: Any = torch._dynamo
    if not getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        return
    dynamo.config.skip_nnmodule_hook_guards = False
    if dynamo.convert_frame.input_codes.seen:  # compiled while hooks were ignored
        dynamo.reset_code_caches()


def ignores_hooks() -> bool:
    """Whether compiled models would ignore hooks again, because somebody has set it so since."""
    import torch._dynamo

    return bool(getattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False))
