"""The learning rate of the paper's training, which follows BDB's configuration (paper section 3.1)."""

from __future__ import annotations

PAPER_EPOCHS = 400


def learning_rate(epoch: int, epochs: int = PAPER_EPOCHS) -> float:
    """The rate of an epoch, 1-based: a warm-up in steps, 1e-3 to the middle, then 1e-4 and 1e-5.

    Other lengths than 400 epochs run through the same curve in proportion.
    """
    paper_epoch = int(1 + (epoch - 1) * PAPER_EPOCHS / epochs)
    if paper_epoch < 50:
        return 1e-4 * (paper_epoch // 5 + 1)
    if paper_epoch < 200:
        return 1e-3
    if paper_epoch < 300:
        return 1e-4
    return 1e-5
