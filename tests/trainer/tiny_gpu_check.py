"""`gpu_check.py` with a network of 0.2 M parameters. BROKEN names a stage that fails, or `X:hang` one that hangs."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parent)]

import gpu_check  # noqa: E402
import tiny_training  # noqa: E402, F401  registers the network
import torch  # noqa: E402
import train_step  # noqa: E402

torch.set_num_threads(1)
train_step.PRODUCT_SIDES["cpu"] = 128
gpu_check.SMALL.step.backbone = "tiny"
gpu_check.SMALL.rows = "PMM"


def broken(check: gpu_check.Check) -> None:
    check.add("before", "the failure", figure=1.0)
    while os.environ["BROKEN"].endswith("hang"):
        time.sleep(1)
    os._exit(7)


if letter := os.environ.get("BROKEN", "")[:1]:
    gpu_check.STAGES[letter] = replace(gpu_check.STAGES[letter], run=broken)
gpu_check.main()
