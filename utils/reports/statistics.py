"""Intervals and tests for success rates."""

import math

# 95 % two-sided quantile of the normal distribution.
Z_95 = 1.959963984540054


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate (Wilson 1927).

    Raises:
        ValueError: the counts do not belong together, or there are no episodes.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"{successes} successes of {episodes} episodes have no rate")
    from scipy.stats import binomtest  # takes a second to import, and --help needs none of it

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe_interval(
    rate_a: float,
    wilson_a: tuple[float, float],
    rate_b: float,
    wilson_b: tuple[float, float],
) -> tuple[float, float]:
    """Return the 95 % interval of rate_b - rate_a from both rates' Wilson intervals.

    Newcombe 1998, Statistics in Medicine 17:873-890, method 10. It treats the two samples as
    independent, so it is too wide, if anything, when both policies play the same initial states.
    """
    (low_a, high_a), (low_b, high_b) = wilson_a, wilson_b
    difference = rate_b - rate_a
    return (
        difference - math.hypot(rate_b - low_b, high_a - rate_a),
        difference + math.hypot(high_b - rate_b, rate_a - low_a),
    )


def mcnemar_p(num_won: int, num_lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        num_won: pairs that changed from failure to success.
        num_lost: pairs that changed from success to failure.
    """
    if num_won + num_lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(num_won, num_won + num_lost, 0.5).pvalue)
