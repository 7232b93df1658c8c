"""Bootstrap intervals."""

import numpy as np
import pytest

from tfcli.tasks.common.resample import interval


def test_an_interval_holds_the_score_and_narrows() -> None:
    """Against the normal interval of a mean, 1.96 standard errors."""
    values = np.random.default_rng(1).normal(3.0, 2.0, (400, 1))
    columns = np.concatenate([values, np.ones_like(values)], axis=1)
    low, high = interval(columns, lambda sums: sums[:, 0] / sums[:, 1])
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.04)
    assert high == pytest.approx(values.mean() + error, abs=0.04)


def test_an_interval_is_that_of_resampled_rows() -> None:
    """Against the definition, written out: sums that are made another way may not be of other draws."""
    columns = np.random.default_rng(2).normal(size=(30, 3))
    draw = np.random.default_rng(0)
    scores = [columns[draw.integers(0, 30, 30)].sum(axis=0) @ [1.0, 2.0, -1.0] for _ in range(1000)]
    found = interval(columns, lambda sums: sums @ np.array([1.0, 2.0, -1.0]))
    assert found == pytest.approx(np.percentile(scores, [2.5, 97.5]).tolist())
