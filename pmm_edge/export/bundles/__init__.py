"""Folders that other programs take as they are: DeepStream's tracker, Triton's model repository."""

from pmm_edge.export.bundles.bundle import Bundle
from pmm_edge.export.bundles.deepstream import deepstream_bundle
from pmm_edge.export.bundles.triton import triton_bundle

__all__ = ["Bundle", "deepstream_bundle", "triton_bundle"]
