"""The steps of what passes cost, from readings of which some are wrong."""

from itertools import combinations_with_replacement

import numpy as np
import pytest

from edge_shiftkv.speculative.costs import PassCosts, Recent


def steps_of(readings, most=5):
    costs = PassCosts(most)
    for n, cost in readings:
        costs.add(n, cost)
    return [costs.of(n) for n in range(1, most + 1)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_rising_steps_are_nearer_to_the_readings(seed):
    """Against all of them, by brute force: the best ones take their values from the readings."""
    rng = np.random.default_rng(seed)
    readings = [(int(n), float(1 + rng.exponential())) for n in rng.integers(2, 6, 9)] + [(n, 1.5) for n in range(2, 6)]

    def error(steps):
        return sum(abs(steps[n - 1] - cost) for n, cost in readings)

    values = sorted({cost for _, cost in readings})
    best = min(error((1.0, *steps)) for steps in combinations_with_replacement(values, 4))
    found = steps_of(readings)
    assert found == sorted(found)
    assert error(found) == pytest.approx(best)


def test_a_disturbed_reading_is_outvoted_by_longer_passes():
    assert steps_of([(2, 1.3), (3, 3.9), (4, 1.4), (5, 1.8)]) == [1.0, 1.3, 1.4, 1.4, 1.8]
    assert steps_of([(n, 0.9) for n in range(2, 6)]) == [1.0] * 5  # none takes less than one over one token


def test_costs_between_two_lengths_and_above_the_longest():
    costs = PassCosts(3)
    costs.add(2, 1.4)
    costs.add(3, 2.0)
    assert [costs.of(n) for n in (1, 1.5, 2.25, 3, 7)] == pytest.approx([1, 1.2, 1.55, 2.0, 2.0])


def test_what_was_read_long_ago_is_hoped_to_be_wrong_until_it_is_read_again():
    costs = PassCosts(3)
    costs.add(2, 1.2)
    costs.add(3, 9.0)
    costs.elapsed(255)
    assert costs.of(3, hopeful=True) == 9.0
    costs.add(2, 1.2)
    costs.elapsed(1)
    assert costs.of(3, hopeful=True) == 1.2
    assert costs.of(3) == 9.0
    costs.add(3, 1.6)
    assert costs.of(3) == costs.of(3, hopeful=True) == 1.6
    costs.add(3, 9.0)  # two of three
    assert costs.of(3) == 9.0


def test_the_lower_of_two_readings_counts_and_only_the_last_nine():
    recent = Recent()
    assert recent.value == 0.0
    for value in (3.0, 1.0):
        recent.add(value)
    assert recent.value == 1.0
    for value in [2.0] * 9:
        recent.add(value)
    assert recent.value == 2.0


def test_what_a_pass_costs_now_counts_after_a_few_readings():
    costs = PassCosts(3)
    for cost in [1.4] * 30 + [1.8] * 9:
        costs.add(2, cost)
    assert costs.of(2) == 1.8
