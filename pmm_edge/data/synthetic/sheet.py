"""A contact sheet: what a data set looks like at a glance."""

from __future__ import annotations

import io

from PIL import Image

from pmm_edge.data.synthetic.dataset import Shot, SyntheticConfig, plan, render

GAP = 4


def contact_sheet(config: SyntheticConfig | None = None, identities: int = 8) -> Image.Image:
    """Test identities as rows, cameras as columns; a gap where a camera never saw the person.

    The rows follow the identities' numbers, so neighbours share their clothes (`SyntheticConfig.group_size`).
    """
    config = config or SyntheticConfig()
    first = config.train_identities + 1
    pids = range(first, first + min(identities, config.test_identities))
    cell_width, cell_height = config.width + GAP, config.height + GAP
    sheet = Image.new("RGB", (cell_width * config.cameras + GAP, cell_height * len(pids) + GAP), (250, 250, 250))
    for shot in plan(config):
        row = shot.pid - first
        if 0 <= row < len(pids) and shot.kind in ("drawn", "detected") and shot.number == 0:
            place = GAP + (shot.camera - 1) * cell_width, GAP + row * cell_height
            sheet.paste(_picture(config, shot), place)
    return sheet


def _picture(config: SyntheticConfig, shot: Shot) -> Image.Image:
    return Image.open(io.BytesIO(render(config, shot)))
