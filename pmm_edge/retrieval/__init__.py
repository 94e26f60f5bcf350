"""Distances, CMC / mAP / mINP and re-ranking, in numpy alone."""

from pmm_edge.retrieval.distances import euclidean_distances
from pmm_edge.retrieval.metrics import RetrievalResult, evaluate, evaluate_distances
from pmm_edge.retrieval.reranking import rerank_distances

__all__ = ["RetrievalResult", "euclidean_distances", "evaluate", "evaluate_distances", "rerank_distances"]
