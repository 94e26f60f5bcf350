"""From an ONNX file of ours to a TensorRT engine, whatever the graph's precision. Needs no torch."""

from pmm_edge.export.tensorrt.builder import BuiltEngine, build_engine

__all__ = ["BuiltEngine", "build_engine"]
