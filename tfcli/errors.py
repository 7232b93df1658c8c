"""Errors that are meant for people, and their exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TfcliError(Exception):
    """An error with a complete message: what was given, what was expected, what to do.

    ``exit_code`` follows the shell contract: 1 the run failed, 2 usage or bad input, 130 interrupted.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} ({hint})")
        self.message = message
        self.hint = hint


class UserError(TfcliError):
    """Bad input or usage, which the user can fix (exit code 2)."""

    exit_code = 2


class RunError(TfcliError):
    """A run that failed: divergence, a full disk, a broken invariant (exit code 1)."""


class Interrupted(TfcliError):
    """Stopped by Ctrl-C or SIGTERM after saving (exit code 130)."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known spelling closest to ``word``, or None when nothing is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def absent(message: str, word: str, there: Iterable[str]) -> UserError:
    """A UserError for a ``word`` that is not ``there``, with the nearest spelling and all that are."""
    there = [str(each) for each in there]
    guess = nearest(word, there)
    return UserError(message, hint=(f"did you mean {guess!r}? " if guess else "") + f"it has: {', '.join(there)}")


def unknown(kind: str, word: str, known: Iterable[str]) -> UserError:
    """A UserError for an unknown ``kind`` of thing, with the nearest known spelling or the whole list."""
    known = sorted(known)
    guess = nearest(word, known)
    hint = f"did you mean {guess!r}?" if guess else "known: " + ", ".join(known)
    return UserError(f"unknown {kind} {word!r}", hint=hint)
