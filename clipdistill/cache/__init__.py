"""The teacher's embeddings, computed once: filled shard by shard, opened with proof, or adopted from another tool."""

from clipdistill.cache.adopt import adopt
from clipdistill.cache.fill import fill
from clipdistill.cache.store import TeacherCache, Views

__all__ = ["TeacherCache", "Views", "adopt", "fill"]
