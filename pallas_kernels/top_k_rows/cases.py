"""Rows for `top_k_rows`: (columns, k), and rows with ties within and across blocks."""

import numpy as np

SHAPES = ((1, 1), (20, 20), (63, 5), (64, 20), (65, 20), (97, 97), (1000, 20), (4099, 3),
          (49152, 20), (128256, 20))  # fmt: skip


def build_rows(columns: int, seed: int = 0) -> np.ndarray:
    """Random rows, few distinct values, all equal, mostly -inf, ascending and descending."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((8, columns), np.float32)
    rows[1] = rng.integers(0, 3, columns)
    rows[2] = 1.0
    rows[3] = -np.inf
    rows[3, columns // 2] = 2.0
    rows[4] = np.arange(columns)
    rows[5] = -np.arange(columns)
    rows[6, -1] = rows[6, 0] = 9.0
    return rows
