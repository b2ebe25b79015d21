"""The main job: stages on disk, and the order they run in. The only room that imports every
other.
"""

from w2sjax.pipeline.order import USER_ERRORS, cache_directory, run
from w2sjax.pipeline.plan import plan

__all__ = ["USER_ERRORS", "cache_directory", "plan", "run"]
