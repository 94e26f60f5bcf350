"""A report as one HTML file that needs nothing beside it: no network, no script."""

from pmm_edge.bench.html.page import Picture, write_html

__all__ = ["Picture", "write_html"]
