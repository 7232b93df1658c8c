"""The training and the validation part of a data set: files of their own, or a split drawn by the seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from tfcli.tasks.common.options import FinetuneConfig
from tfcli.tasks.common.report import Report

Item = TypeVar("Item")
Info = TypeVar("Info")
GIVEN: Mapping[str, Any] = {"rule": "given"}
"""The rule of a held-out part with a file of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Halves(Generic[Item, Info]):
    """The training and the held-out part of the data, and how they were chosen."""

    train: list[Item]
    held_out: list[Item]
    how: Mapping[str, Any]
    """Rule of the split, for data.json and run.json."""
    infos: list[Info]
    """Second result of ``read``, for the training files and those of --val, if given."""


def halves(
    specs: Sequence[str],
    config: FinetuneConfig,
    report: Report,
    read: Callable[[Sequence[str]], tuple[list[Item], Info]],
    *,
    things: str,
    note: Callable[[str], None] | None = None,
    labels: Callable[[list[Item]], Sequence[Sequence[str]]] | None = None,
    groups: Callable[[list[Item]], Sequence[Hashable]] | None = None,
) -> Halves[Item, Info]:
    """Read the training files, and hold out the file of --val or else a split, as ``split`` draws it."""
    report.part = "both" if config.data.val is None else "train"
    whole, info = read(specs)
    if config.data.val is not None:
        report.part = "val"
        held_out, other = read([config.data.val])
        return Halves(train=whole, held_out=held_out, how=GIVEN, infos=[info, other])
    drawn = split(
        len(whole), config.data.val_fraction, config.seed, labels=None if labels is None else labels(whole),
        groups=None if groups is None else groups(whole), things=things, report=report,
    )  # fmt: skip
    train, held_out = drawn.of(whole)
    if note is not None:
        counts = f"{len(held_out):,} of {len(whole):,} {things}"
        note(f"held out: {counts}, {drawn.how['rule']}; --val FILE gives others")
    return Halves(train=train, held_out=held_out, how=drawn.how, infos=[info])


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Indices of the training and the held-out part, each in the order of the data, and how they were chosen."""

    train: list[int]
    held_out: list[int]
    how: Mapping[str, Any]
    """{"rule", "fraction", "seed"}, for data.json and run.json."""

    def of(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """Return the two parts of ``items``."""
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

    With ``labels`` (those of each example) the split is stratified; with ``groups`` (one each) the examples of a group
    stay together. Raises UserError where there are too few, with what ``report`` says.
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
        problem = f"{count:,} {things} are too few to hold some out"
        if groups is not None and count > 1:
            problem = f"the {count:,} {things} are of one group, so none can be held out"
        raise (report or Report()).too_few(problem, hint="give more, or a file with --val")
    return Split(
        train=[index for index in range(count) if index not in held],
        held_out=sorted(held),
        how={"rule": rule, "fraction": fraction, "seed": seed},
    )


def last(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str], Mapping[str, Any]]:
    """Hold out the last ``fraction`` of a text, unshuffled, as ``pretrain`` does; return both parts and the rule.

    Of several documents whole ones; a single one is cut after a line.
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
    """Draw the same share of each label; a label with one example stays in training."""
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
    """Draw one example each of ``wanted`` groups that have another to train on."""
    spare = [indices[-1] for indices in groups if len(indices) > 1]
    return set(generator.permutation(spare)[:wanted].tolist())


def _by_labels(labels: Sequence[Sequence[str]], fraction: float, generator: np.random.Generator) -> set[int]:
    """Draw examples of several labels, so that about ``fraction`` of each label is held out.

    Iterative stratification (Sechidis et al. 2011, algorithm 1): the examples of the rarest remaining label go one by
    one to the side that lacks most of it; ties go to the side that lacks more examples, then to training. Examples
    without a label come last.
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
        train, held_out = ((round(wanted[side], 6), round(lacking[side], 6)) for side in (0, 1))
        side = int(held_out > train)
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
    """Draw whole groups, until their examples are closest to ``fraction`` of all."""
    sizes = Counter(groups)
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
