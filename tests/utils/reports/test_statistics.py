import pytest

from utils.reports.statistics import mcnemar_p, newcombe_interval, wilson_interval


def test_wilson_equals_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_wilson_keeps_the_ends_exact():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 2)])
def test_a_rate_needs_counts_that_belong_together(successes, episodes):
    with pytest.raises(ValueError, match="have no rate"):
        wilson_interval(successes, episodes)


def test_newcombe_equals_a_published_interval():
    # Newcombe 1998, Statistics in Medicine 17:873-890, table II, example (a): 56/70 - 48/80.
    a, b = (48 / 80, wilson_interval(48, 80)), (56 / 70, wilson_interval(56, 70))
    low, high = newcombe_interval(*a, *b)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    assert newcombe_interval(*b, *a) == pytest.approx((-high, -low))


def test_mcnemar_equals_hand_worked_cases():
    assert mcnemar_p(5, 1) == mcnemar_p(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar_p(0, 10) == pytest.approx(2 / 2**10)
    assert mcnemar_p(0, 0) == mcnemar_p(3, 3) == 1.0
