"""Distances, CMC / mAP / mINP, re-ranking and pooling of tracklets, in numpy alone."""

from pmm_edge.retrieval.distances import pairwise_distances
from pmm_edge.retrieval.metrics import RetrievalResult, evaluate, evaluate_distances
from pmm_edge.retrieval.reranking import rerank_distances
from pmm_edge.retrieval.tracklets import pool

__all__ = ["RetrievalResult", "evaluate", "evaluate_distances", "pairwise_distances", "pool", "rerank_distances"]
