"""The teacher's embeddings, computed once: filled shard by shard, opened with proof, adopted, or several as one."""

from clipdistill.cache.adopt import adopt
from clipdistill.cache.ensemble import CachedMember, EnsembleCache
from clipdistill.cache.fill import fill
from clipdistill.cache.store import TeacherCache, Views

AnyCache = TeacherCache | EnsembleCache

__all__ = ["AnyCache", "CachedMember", "EnsembleCache", "TeacherCache", "Views", "adopt", "fill"]
