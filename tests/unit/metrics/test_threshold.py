"""The threshold of multi-label classification is compared with all thresholds that differ."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from peftcli.metrics.threshold import best_threshold


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_higher_micro_f1(seed: int) -> None:
    generator = np.random.default_rng(seed)
    actual = generator.random((20, 3)) < 0.3
    probabilities = np.clip(generator.normal(0.2 + 0.3 * actual, 0.2), 0.01, 0.99).round(2)
    threshold, score = best_threshold(probabilities, actual)
    every = [0.0, *np.unique(probabilities)]
    best = max(f1_score(actual, probabilities >= one, average="micro", zero_division=0) for one in every)
    assert score == pytest.approx(best)
    assert f1_score(actual, probabilities >= threshold, average="micro", zero_division=0) == pytest.approx(best)
    assert not np.isin(threshold, probabilities) or threshold == 0.5


def test_of_equal_thresholds_the_nearest_to_a_half_is_taken() -> None:
    assert best_threshold(np.array([[0.1], [0.9]]), np.array([[False], [True]])) == (0.5, 1.0)


def test_without_a_label_nothing_is_better_than_another() -> None:
    assert best_threshold(np.array([[0.1], [0.9]]), np.array([[False], [False]])) == (0.5, 0.0)
