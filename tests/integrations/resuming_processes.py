"""Both trainers on two processes as a script: one uninterrupted training, and one that is resumed."""

import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist


def fit(folder):
    from tests.integrations import test_resuming_lightning

    two = {"strategy": "ddp", "devices": 2}
    test_resuming_lightning.fit(folder, [test_resuming_lightning.callback(folder / "whole")], **two)
    saved = folder / "saved.ckpt"
    cut = test_resuming_lightning.Saving(saved, "on_train_batch_end", 2, 0)
    try:
        test_resuming_lightning.fit(folder, [test_resuming_lightning.callback(folder / "cut"), cut], **two)
    except KeyError:
        test_resuming_lightning.fit(folder, [test_resuming_lightning.callback(folder / "cut")], saved, **two)


def train(folder):
    from tests.integrations import test_resuming_transformers

    how = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch", "ddp_backend": "gloo"}
    test_resuming_transformers.train(folder / "other", folder / "whole", **how)
    try:
        test_resuming_transformers.train(folder, folder / "cut", fails_at=5, **how)
    except KeyError:
        test_resuming_transformers.train(folder, folder / "cut", str(folder / "checkpoint-4"), **how)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kind, folder = sys.argv[1:]
    {"lightning": fit, "transformers": train}[kind](Path(folder))
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # a gloo thread that frees a tensor while Python ends aborts it, once in a hundred runs
