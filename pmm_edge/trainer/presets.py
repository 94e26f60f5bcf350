"""Configurations by name: the paper's for its data sets, and two for small machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pmm_edge.errors import ModelError, PmmError, did_you_mean
from pmm_edge.model.backbone import map_size
from pmm_edge.model.mixing import scaled_mix_blocks
from pmm_edge.runs import CONFIG, about_run
from pmm_edge.trainer.config import TrainConfig, overridden, read_toml

_PAPER = TrainConfig()

DEFAULT = "quick"
"""The preset where none is named, by a flag or in a file."""
PRESETS = {
    # Paper section 3.1: batch 64, 400 epochs, 384×128, K by data set. It has one K for CUHK03, "detected".
    "market1501": _PAPER,
    "dukemtmc-reid": replace(_PAPER, preset="dukemtmc-reid", mix_blocks=6),
    "cuhk03-detected": replace(_PAPER, preset="cuhk03-detected", mix_blocks=8),
    "cuhk03-labeled": replace(_PAPER, preset="cuhk03-labeled", mix_blocks=8),
    # The built-in set in minutes, on a CPU.
    "quick": TrainConfig(
        preset="quick",
        backbone="resnet18",
        backbone_weights="none",
        height=144,
        width=64,
        mix_blocks=1,
        mix_block_size="3x1",  # one of 12 blocks is near the paper's share, 3 of 32; of 3x2 there are only 6
        epochs=24,
        batch=32,
        erase_size=16,
        evaluate_every=8,
    ),
    # A Jetson Nano class device: an eighth of the paper's operations.
    "edge": replace(
        _PAPER, preset="edge", backbone="resnet18", height=192, width=96, mix_blocks=1, erase_size=32, epochs=120
    ),
}


def preset(name: str) -> TrainConfig:
    """A preset by its name.

    Raises:
        PmmError: there is none of this name.
    """
    if name not in PRESETS:
        raise PmmError(f"preset '{name}' is unknown", f"{did_you_mean(name, PRESETS)}Choose {', '.join(PRESETS)}")
    return PRESETS[name]


def resolved(base: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """`base` with some values replaced; K follows the number of blocks on the map unless it is among them.

    Raises:
        PmmError: a key is unknown, or a value has the wrong type or range.
    """
    config = overridden(base, values)
    if "mix_blocks" in values or _blocks(config) == _blocks(base):
        return config
    return replace(config, mix_blocks=scaled_mix_blocks(base.mix_blocks, _blocks(config), _blocks(base)))


def read_config(path: Path) -> TrainConfig:
    """Read a TOML file; what it does not name comes from the preset that it names, by default `quick`.

    Raises:
        PmmError: no such file, no TOML, an unknown key, a wrong type.
    """
    values = read_toml(path)
    return resolved(preset(str(values.get("preset", DEFAULT))), values)


def read_run_config(folder: Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
        ModelError: the folder is no run.
        PmmError: its settings are none any more.
    """
    if about_run(folder) is None or not (folder / CONFIG).exists():
        raise ModelError(f"{folder} is no run folder", "Name one that pmm train made, such as runs/<time>-quick")
    return read_config(folder / CONFIG)


def _blocks(config: TrainConfig) -> float:
    (rows, columns), (height, width) = map_size(config.height, config.width), config.block_size
    return rows * columns / (height * width)
