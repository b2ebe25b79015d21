"""The main job: stages on disk, and the order they run in. The only room that imports every
other.
"""

from w2sjax.pipeline.order import USER_ERRORS, cache_directory, run

__all__ = ["USER_ERRORS", "cache_directory", "run"]
