"""Train person re-identification networks, export them for edge devices, and verify the export.

    import pmm_edge as pmm

    run = pmm.train("/data/Market-1501", preset="market1501")
    model = pmm.export(run.folder, precision="fp16").files[0].path
    pmm.bench(model).report.passed
    embeddings = pmm.load(model).embed(crops)  # a list of (H, W, 3) uint8 RGB arrays -> (N, D) float32

Names are imported on first use; `import pmm_edge` does not import torch.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pmm_edge.bench import bench as bench
    from pmm_edge.bench.calibrate import calibrate as calibrate
    from pmm_edge.errors import PmmError as PmmError
    from pmm_edge.export import export as export
    from pmm_edge.gallery import open_gallery as open_gallery
    from pmm_edge.model import build_model as build_model
    from pmm_edge.model import load_released_checkpoint as load_released_checkpoint
    from pmm_edge.retrieval import evaluate as evaluate
    from pmm_edge.retrieval import pool as pool
    from pmm_edge.runtime import embed_files as embed_files
    from pmm_edge.runtime import load as load
    from pmm_edge.runtime.shards import embed_shards as embed_shards
    from pmm_edge.spec import ModelSpec as ModelSpec
    from pmm_edge.trainer.step import pmm_loss as pmm_loss
    from pmm_edge.trainer.train import train as train

_MODULES = {
    "ModelSpec": "spec",
    "PmmError": "errors",
    "build_model": "model",
    "calibrate": "bench.calibrate",
    "embed_files": "runtime.embed_files",
    "embed_shards": "runtime.shards",
    "evaluate": "retrieval",
    "load": "runtime",
    "load_released_checkpoint": "model",
    "open_gallery": "gallery",
    "pmm_loss": "trainer.step",
    "pool": "retrieval",
    "train": "trainer.train",
}
"""The module of each public name. The packages `export` and `bench` can be called themselves."""
__all__ = ["bench", "export", *_MODULES]


def __getattr__(name: str) -> object:
    if name in ("bench", "export"):
        return import_module(f"pmm_edge.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'pmm_edge' has no attribute '{name}'")
    return getattr(import_module(f"pmm_edge.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class CallableModule(ModuleType):
    """A package that is called like its function of the same name: `pmm_edge.bench(...)`, `pmm_edge.export(...)`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)
