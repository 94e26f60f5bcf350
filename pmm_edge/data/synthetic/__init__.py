"""Synthetic pedestrians in the layout of Market-1501: a reID data set that needs no download."""

from pmm_edge.data.synthetic.generate import SyntheticConfig as SyntheticConfig
from pmm_edge.data.synthetic.generate import cached_synthetic as cached_synthetic
from pmm_edge.data.synthetic.generate import contact_sheet as contact_sheet
from pmm_edge.data.synthetic.generate import make_synthetic as make_synthetic
