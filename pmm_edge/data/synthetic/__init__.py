"""Procedurally drawn pedestrians in the layout of Market-1501: a reID data set that needs no download."""

from pmm_edge.data.synthetic.cached import cached_synthetic
from pmm_edge.data.synthetic.dataset import SyntheticConfig, count_images, make_synthetic
from pmm_edge.data.synthetic.sheet import contact_sheet

__all__ = ["SyntheticConfig", "cached_synthetic", "contact_sheet", "count_images", "make_synthetic"]
