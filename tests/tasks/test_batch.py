"""Batches of examples of different lengths: cut and padded, nothing lost."""

import torch

from tfcli.tasks.common.batch import Batch, mask, pad

ROWS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


def batch() -> Batch:
    return Batch({"tokens_BT": pad(ROWS), "mask_BT": mask(ROWS), "targets": torch.arange(4)})


def test_padding_is_marked() -> None:
    """Catches a mask of another length than the rows, and rows without a token."""
    made = batch()
    assert made["tokens_BT"].tolist()[1] == [4, 0, 0, 0, 0]
    assert made["mask_BT"].sum(dim=1).tolist() == [3, 1, 5, 2]
    assert (len(made), made.real_tokens) == (4, 11)
    assert pad([[], []]).shape == mask([[], []]).shape == (2, 1)
    assert pad([[1], [2, 3]], value=-100).tolist() == [[1, -100], [2, 3]]


def test_parts_are_short_and_whole() -> None:
    """Catches targets that no longer belong to their rows, an example lost, and padding that a part does not need."""
    parts = batch().split(2)
    assert [part["tokens_BT"].shape[1] for part in parts] == [5, 2]
    seen = {}
    for part in parts:
        for row, real, target in zip(part["tokens_BT"], part["mask_BT"], part["targets"], strict=True):
            seen[int(target)] = row[real].tolist()
    assert seen == dict(enumerate(ROWS))
    whole = batch()
    assert whole.split(4) == [whole]
