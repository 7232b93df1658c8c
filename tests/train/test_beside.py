"""Training during other work in the same process."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from small_runs import facts, start, text


def test_training_ignores_random_numbers_that_others_draw(tmp_path: Path) -> None:
    """Another thread's draws between any two operations do not change the run."""

    def draws(event: object) -> None:
        torch.manual_seed(7)
        torch.rand(3)

    start(text(tmp_path), tmp_path / "alone", settings={"train.steps": 12})
    start(text(tmp_path), tmp_path / "beside", settings={"train.steps": 12}, listen=draws)
    assert facts(tmp_path / "alone") == facts(tmp_path / "beside")


def test_two_threads_train_as_each_does_alone(tmp_path: Path) -> None:
    """Would catch dropout that draws from one generator for all."""
    corpus = text(tmp_path)
    seeds = (1, 2)
    for seed in seeds:
        start(corpus, tmp_path / f"alone-{seed}", settings={"seed": seed, "train.steps": 12})

    def beside(seed: int) -> None:
        start(corpus, tmp_path / f"beside-{seed}", settings={"seed": seed, "train.steps": 12})

    begun = [threading.Thread(target=beside, args=(seed,)) for seed in seeds]
    for thread in begun:
        thread.start()
    for thread in begun:
        thread.join()
    for seed in seeds:
        assert facts(tmp_path / f"alone-{seed}") == facts(tmp_path / f"beside-{seed}")
