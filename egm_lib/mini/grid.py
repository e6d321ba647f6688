"""The grid on which the miniature's boxes lie."""

from __future__ import annotations

import numpy as np

from egm_lib.mini.scenes import SIZE_PX

# Step of coordinates in 0..1000, in answers and traces: 2.56 px; most things have 14 px or more
GRID_1000 = 20
LEVELS = 1000 // GRID_1000 + 1


def grid_length(length_px: float) -> int:
    """A length in pixels on the answer grid (0..1000)."""
    return min(round(length_px / SIZE_PX * 1000 / GRID_1000) * GRID_1000, 1000)


def level(value_px: float) -> int:
    """The grid step (0..LEVELS-1) nearest to a coordinate in pixels."""
    return int(np.clip(round(value_px / SIZE_PX * (LEVELS - 1)), 0, LEVELS - 1))
