"""Distances, CMC / mAP / mINP and re-ranking, in numpy alone."""

from pmm_edge.retrieval.distances import pairwise_distances
from pmm_edge.retrieval.metrics import RetrievalResult, evaluate, evaluate_distances
from pmm_edge.retrieval.reranking import rerank_distances

__all__ = ["RetrievalResult", "evaluate", "evaluate_distances", "pairwise_distances", "rerank_distances"]
