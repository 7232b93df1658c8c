"""Shared by the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import small_trainer


@pytest.fixture(autouse=True)
def closed_metrics() -> Iterator[None]:
    """Close what the trainers of a test wrote to."""
    yield
    while small_trainer.OPEN:
        small_trainer.OPEN.pop().close()
