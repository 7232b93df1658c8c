"""BLEU and chrF of translations, by sacrebleu, with its signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfcli.errors import UserError

SAMPLES = 1000
"""Resamples of the bootstrap (Koehn 2004)."""


def check() -> None:
    """Raise UserError if sacrebleu is not installed."""
    _metrics()


def _metrics() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise UserError(
            "BLEU and chrF need sacrebleu, which is not installed",
            hint="pip install 'tfcli[translate]', or: pip install sacrebleu",
        ) from None
    return metrics


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return {"bleu", "chrf"} (Papineni et al. 2002; Popovic 2015) of whole texts, 0 to 100, cased."""
    metrics = _metrics()
    refs = [list(references)]
    return {
        "bleu": float(metrics.BLEU().corpus_score(list(answers), refs).score),
        "chrf": float(metrics.CHRF().corpus_score(list(answers), refs).score),
    }


def assess(answers: Sequence[str], references: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the scores with signatures and, for more than one text, 95 % intervals; and lines for people."""
    metrics = _metrics()
    refs, scores, lines = [list(references)], dict[str, Any](), []
    interval: dict[str, list[float]] = {}
    signatures: dict[str, str] = {}
    for name, metric in (("bleu", metrics.BLEU()), ("chrf", metrics.CHRF())):
        if len(references) > 1:
            drawn = metric.corpus_score(list(answers), refs, n_bootstrap=SAMPLES)
            mean, half = float(drawn._mean), float(drawn._ci)
            interval[name] = [mean - half, mean + half]
        scores[name] = float(metric.corpus_score(list(answers), refs).score)
        signatures[name] = str(metric.get_signature())
        between = f"  (95 % interval {interval[name][0]:.2f} to {interval[name][1]:.2f})" if name in interval else ""
        lines.append(f"{name:5} {scores[name]:6.2f}{between}  {signatures[name]}")
    return {**scores, "examples": len(references), "interval": interval, "signature": signatures}, lines
