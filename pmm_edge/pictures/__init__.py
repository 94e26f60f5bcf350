"""Pictures of what a network sees: attention of its stages, ranked galleries and the mixing of training."""

from pmm_edge.errors import PmmError


class UnsuitableError(PmmError):
    """A kind of picture cannot be drawn for this model or these images, although another kind can."""
