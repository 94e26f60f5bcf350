"""Synthetic pedestrians in the layout of Market-1501: a reID data set that needs no download."""

from pmm_edge.data.synthetic.generate import (
    SyntheticConfig,
    cached_synthetic,
    contact_sheet,
    count_images,
    make_synthetic,
)

__all__ = ["SyntheticConfig", "cached_synthetic", "contact_sheet", "count_images", "make_synthetic"]
