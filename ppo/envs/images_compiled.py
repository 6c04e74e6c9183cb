"""The inner loop of `ppo.envs.images.resize_lanczos3`, compiled.

A module of its own: numba takes 0.5 s and 75 MB to import, which environments that resize nothing are spared.
"""

import numba


@numba.njit(cache=True, error_model="numpy")
def add_weighted_rows(source, indices, weights, result):
    """Add to each row of `result` its weighted source rows, tap after tap, in float32 without fused multiply-adds.

    Args:
        source: (n, k) float32.
        indices: (taps, m) intp, rows of `source`.
        weights: (taps, m) float32.
        result: (m, k) float32, changed.
    """
    for row in range(len(result)):
        for tap in range(len(indices)):
            index, weight = indices[tap, row], weights[tap, row]
            for column in range(source.shape[1]):
                result[row, column] += weight * source[index, column]
