"""From a checkpoint to what runs without torch."""

from pmm_edge.export.exporter import Exported, export_onnx, export_safetensors
from pmm_edge.export.strip import inference_network

__all__ = ["Exported", "export_onnx", "export_safetensors", "inference_network"]
