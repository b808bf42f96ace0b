"""Pictures and labels from folders, .npz, .npy, IDX files and arrays."""

from __future__ import annotations

from ebbflow.data.images import Images, from_array, to_float
from ebbflow.data.readers import read

__all__ = ["Images", "from_array", "read", "to_float"]
