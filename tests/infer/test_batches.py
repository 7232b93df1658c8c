"""Batches of texts of similar length."""

import torch

from tfcli.infer.batches import by_length


def test_visits_each_once() -> None:
    """Catches a text that is never read, and batches beyond what was asked for."""
    lengths = [7, 1, 30, 2, 2, 9, 100, 1]
    batches = by_length(lengths, device=torch.device("cpu"), positions=40, most=3)
    assert sorted(index for chosen in batches for index in chosen) == list(range(8))
    for chosen in batches:
        longest = max(lengths[index] for index in chosen)
        assert len(chosen) == 1 or (len(chosen) <= 3 and len(chosen) * longest <= 40)
