"""A gallery: embeddings of people with identity, camera, time and source, to search and to delete from."""

from pmm_edge.gallery.gallery import Gallery, Hit, SearchResult, open_gallery
from pmm_edge.gallery.inputs import EmbeddingModel

__all__ = ["EmbeddingModel", "Gallery", "Hit", "SearchResult", "open_gallery"]
