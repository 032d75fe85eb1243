"""Rows for `argmax_rows`, with the index that each must give."""

import numpy as np


def build_rows(columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random rows, ties, infinities and NaN: (rows, expected indices)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((12, columns), np.float32)
    expected = [int(np.flatnonzero(row == row.max())[0]) for row in noise]

    def tweak(row: int, values: dict[int, float], index: int) -> None:
        for at, value in values.items():
            noise[row, at] = value
        expected[row] = index

    last, middle = columns - 1, columns // 2
    tweak(0, {0: 9.0, last: 9.0}, 0)
    tweak(1, {last: 9.0}, last)
    tweak(2, {middle: 9.0, last: 9.0}, middle)
    tweak(3, {middle: np.nan, last: 99.0}, middle)
    tweak(4, {last: np.nan}, last)
    tweak(5, {middle: np.inf, 0: -np.inf}, middle)
    noise[6], expected[6] = -np.inf, 0
    noise[7], expected[7] = -1.0, 0
    noise[8] = -np.inf
    tweak(8, {last: -3e38}, last)
    return noise, np.array(expected, np.int32)


COLUMNS = (1, 7, 64, 1000, 1024, 4099, 49152)
