"""tfcli: from a text file to a small, fast language model on the machine you have.

The library face of the command line. Importing it costs nothing; torch enters when a function is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load", "pretrain"]

if TYPE_CHECKING:
    from tfcli.infer.engine import load
    from tfcli.train.pretrain import pretrain


def __dir__() -> list[str]:
    """What there is, imported or not yet."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562)."""
    if name == "load":
        from tfcli.infer.engine import load

        return load
    if name == "pretrain":
        from tfcli.train.pretrain import pretrain

        return pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
