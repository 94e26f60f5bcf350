"""`gpu_check.py` on a CPU with a network of 0.2 M parameters, which takes seconds."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parent)]

import gpu_check  # noqa: E402

if "--child" in sys.argv:
    import gpu_stages
    import tiny_training  # noqa: F401  registers the network
    import torch
    import train_step

    torch.set_num_threads(1)
    train_step.PRODUCT_SIDES["cpu"] = 128
    gpu_stages.SMALL.step.backbone, gpu_stages.SMALL.rows = "tiny", "PMM"
gpu_check.main()
