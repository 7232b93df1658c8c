"""Files of labelled data: their text in any encoding, what is held out of them, and how sure scores on them are."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tfcli.errors import UserError, nearest
from tfcli.tasks.report import Report
from tfcli.text import files, hf_data
from tfcli.text.files import Count

SEED = 0
"""The split does not change with the seed of a run, so that runs compare."""
DRAWS = 1000
"""Resamples of a bootstrap."""


def texts(
    path: Path, name: str, report: Report, *, encoding: str = "utf-8", errors: Literal["strict", "replace"] = "strict"
) -> Iterator[str]:
    """The text of a file in pieces, without a byte order mark; ``report`` is told what was replaced.

    Raises UserError for an encoding that is not known, and for bytes that are not in it.
    """
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        raise UserError(f"unknown encoding {encoding!r}", hint="such as utf-8, latin-1, cp1252 or utf-16") from None
    if known == "utf-8":
        count = Count(name=name)
        yield from files.texts(path, name, errors, count)
        report.note("invalid bytes that became U+FFFD", count.replaced)
        return
    data = b"".join(files.blocks(path, name))
    try:
        text = data.decode(known, errors)
    except (UnicodeDecodeError, LookupError, ValueError) as error:
        raise UserError(f"{name} is not {encoding}: {error}", hint="name its encoding: --set data.encoding=") from None
    if errors == "replace":
        report.note("invalid bytes that became U+FFFD", text.count("\ufffd"))
    yield text.removeprefix("\ufeff")


def split(groups: Sequence[Hashable], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the training and the held-out part of examples, those of one group on the same side.

    Whole groups are drawn at random until the held-out part is closest to ``fraction`` of the examples. Raises
    UserError where there is but one group.
    """
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    names = list(sizes)
    if len(names) < 2:
        raise UserError("the data has nothing that could be held out", hint="give more of it, or a file with --val")
    want = fraction * len(groups)
    chosen: set[Hashable] = set()
    held = 0
    for place in np.random.default_rng(SEED).permutation(len(names)):
        group = names[place]
        if not chosen or (len(chosen) < len(names) - 1 and abs(held + sizes[group] - want) < abs(held - want)):
            chosen.add(group)
            held += sizes[group]
    return (
        [index for index, group in enumerate(groups) if group not in chosen],
        [index for index, group in enumerate(groups) if group in chosen],
    )


def content_hash(paths: Sequence[str | Path]) -> str:
    """SHA-256 of the bytes of files, decompressed, in their order; of a data set ``hf:NAME`` that of its rows."""
    whole = hashlib.sha256()
    for path in paths:
        if hf_data.is_named(path):
            whole.update(hf_data.digest(hf_data.rows(str(path))[1]).encode())
            continue
        one = hashlib.sha256()
        for block in files.blocks(Path(path), str(path)):
            one.update(block)
        whole.update(one.digest())
    return whole.hexdigest()


def check(paths: Sequence[str]) -> None:
    """Raise UserError for a file that is not there, with the nearest name."""
    for path in map(Path, paths):
        if hf_data.is_named(path):
            continue
        if path.is_dir():
            raise UserError(f"{path} is a directory", hint="name the files in it that are to be read")
        if not path.exists():
            beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            guess = nearest(path.name, beside)
            raise UserError(f"no such file: {path}", hint=f"did you mean {path.parent / guess}?" if guess else None)


def interval(
    columns: npt.NDArray[np.float64], value: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (Efron 1979) of a score over examples, the same one every time.

    ``columns`` (N, K) hold K numbers of each example; ``value`` gives the scores (draws,) of sums (draws, K).
    """
    draw = np.random.default_rng(SEED)
    size = len(columns)
    sums = np.stack([columns[draw.integers(0, size, size)].sum(axis=0) for _ in range(DRAWS)])
    low, high = np.percentile(value(sums), [2.5, 97.5])
    return float(low), float(high)
