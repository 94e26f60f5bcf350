"""FP32 is FP32: what torch would round on a GPU is switched off, and the caller's choice put back."""

import torch

from pmm_edge.runtime.torch_backend import without_tf32


def test_products_and_convolutions_are_exact_meanwhile() -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before, products.allow_tf32 = products.allow_tf32, True
    try:
        with convolutions.flags(enabled=True, allow_tf32=True):
            with without_tf32():
                assert (products.allow_tf32, convolutions.allow_tf32) == (False, False)
            assert (products.allow_tf32, convolutions.allow_tf32) == (True, True)
    finally:
        products.allow_tf32 = before
