"""Which examples of a data set are held out where no file is given for it: the one place that draws them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tfcli.tasks.common.report import Report

Item = TypeVar("Item")
GIVEN: Mapping[str, Any] = {"rule": "given"}
"""How the held-out part is chosen where a file is given for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Indices of the training and of the held-out part, each in the order of the data, and how they were chosen."""

    train: list[int]
    held_out: list[int]
    how: Mapping[str, Any]
    """For data.json and run.json: {"rule", "fraction", "seed"}."""

    def of(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """The two parts of ``items``."""
        return [items[index] for index in self.train], [items[index] for index in self.held_out]


def split(
    count: int,
    fraction: float,
    seed: int,
    *,
    labels: Sequence[Sequence[str]] | None = None,
    groups: Sequence[Hashable] | None = None,
    things: str = "examples",
    report: Report | None = None,
) -> Split:
    """Hold out ``fraction`` of ``count`` examples, drawn by ``seed``; neither part is empty.

    With ``labels`` (those of each example) stratified: of each label the same part. With ``groups`` (one each) the
    examples of one group stay together. Raises UserError where there is too little, with what ``report`` says.
    """
    generator = np.random.default_rng(seed % 2**64)
    if labels is not None and all(len(each) == 1 for each in labels):
        rule, held = "stratified", _by_label([each[0] for each in labels], fraction, generator)
    elif labels is not None:
        rule, held = "stratified, each label by itself", _by_labels(labels, fraction, generator)
    elif groups is not None:
        rule, held = "random groups", _by_group(groups, fraction, generator)
    else:
        size = min(max(1, round(count * fraction)), count - 1)
        rule, held = "random", set(generator.permutation(count)[: max(0, size)].tolist())
    if not 0 < len(held) < count:
        said = f"{count:,} {things} are too few to hold some out"
        if groups is not None and count > 1:
            said = f"the {count:,} {things} are of one group, so none can be held out"
        raise (report or Report()).too_few(said, hint="give more, or a file with --val")
    return Split(
        train=[index for index in range(count) if index not in held],
        held_out=sorted(held),
        how={"rule": rule, "fraction": fraction, "seed": seed},
    )


def last(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str], Mapping[str, Any]]:
    """The last ``fraction`` of a text held out, as in ``pretrain``, and how: a text is not shuffled.

    Whole documents where there are several, else from a line's end.
    """
    how = {"rule": "end of text", "fraction": fraction}
    if len(documents) > 1:
        ends = np.cumsum([len(text) for text in documents])
        cut = int(np.abs(ends[:-1] - (1 - fraction) * ends[-1]).argmin()) + 1
        return list(documents[:cut]), list(documents[cut:]), how
    (text,) = documents
    at = int(len(text) * (1 - fraction))
    at = text.rfind("\n", 1, at) + 1 or at
    return [text[:at]], [text[at:]], how


def _by_label(labels: Sequence[str], fraction: float, generator: np.random.Generator) -> set[int]:
    """Of each label the same part; a label with one example stays in training."""
    indices: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        indices.setdefault(label, []).append(index)
    held: set[int] = set()
    for label in sorted(indices):
        there = indices[label]
        size = min(round(len(there) * fraction) or (len(there) >= 5), len(there) - 1)
        held.update(generator.permutation(there)[:size].tolist())
    return held or _spare(indices.values(), max(1, round(len(labels) * fraction)), generator)


def _spare(groups: Iterable[list[int]], wanted: int, generator: np.random.Generator) -> set[int]:
    """Where there are few of each label: one each of as many as are wanted, where one is left to learn from."""
    spare = [indices[-1] for indices in groups if len(indices) > 1]
    return set(generator.permutation(spare)[:wanted].tolist())


def _by_labels(labels: Sequence[Sequence[str]], fraction: float, generator: np.random.Generator) -> set[int]:
    """Examples of several labels, so that of each label about ``fraction`` is held out.

    Iterative stratification (Sechidis et al. 2011, algorithm 1): the examples of the label of which the fewest are left
    go one by one to the side that still lacks most of it, where both lack the same to the one that lacks most examples,
    else to training; those without a label come last.
    """
    left: dict[str, set[int]] = {}
    for index, each in enumerate(labels):
        for label in each:
            left.setdefault(label, set()).add(index)
    shares = (1 - fraction, fraction)
    lacking = [share * len(labels) for share in shares]
    lacking_of = {label: [share * len(indices) for share in shares] for label, indices in left.items()}
    held: set[int] = set()

    def give(index: int, wanted: Sequence[float]) -> None:
        learnt, tested = ((round(wanted[side], 6), round(lacking[side], 6)) for side in (0, 1))
        side = int(tested > learnt)
        if side:
            held.add(index)
        lacking[side] -= 1
        for label in labels[index]:
            lacking_of[label][side] -= 1
            left[label].discard(index)

    while rest := {label: indices for label, indices in left.items() if indices}:
        rarest = min(rest, key=lambda label: (len(rest[label]), label))
        for index in generator.permutation(sorted(rest[rarest])):
            give(int(index), lacking_of[rarest])
    for index in generator.permutation([index for index, each in enumerate(labels) if not each]):
        give(int(index), lacking)
    return held or _spare([list(range(len(labels)))], max(1, round(len(labels) * fraction)), generator)


def _by_group(groups: Sequence[Hashable], fraction: float, generator: np.random.Generator) -> set[int]:
    """Whole groups, drawn until their examples are closest to ``fraction`` of all."""
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    names = list(sizes)
    want = fraction * len(groups)
    chosen: set[Hashable] = set()
    held = 0
    for place in generator.permutation(len(names)):
        group = names[place]
        if not chosen or (len(chosen) < len(names) - 1 and abs(held + sizes[group] - want) < abs(held - want)):
            chosen.add(group)
            held += sizes[group]
    return {index for index, group in enumerate(groups) if group in chosen}
