"""The one form of data.json, checked on what every command and task writes."""

from typing import Any

from tfcli.text.data_report import FORM

TOP = {
    "form", "task", "unit", "sources", "bytes", "tokens", "split", "train", "val", "dropped", "cut",
    "repaired", "notes", "byte_fallback_rate", "unknown_rate", "duplicates", "content_hash", "tokenizer_hash",
    "details",
}  # fmt: skip


def check(data: dict[str, Any], task: str) -> None:
    """Every key, of its kind, and sums that agree."""
    assert set(data) == TOP
    assert (data["form"], data["task"]) == (FORM, task)
    for source in data["sources"]:
        assert source.keys() == {"name", "part", "bytes", "documents", "tokens", "sha256"}
        assert source["part"] in ("train", "val", "both")
        assert source["bytes"] > 0 or not source["documents"]
        assert bool(source["sha256"]) == (task not in ("pretrain", "lm"))
    for key in ("bytes", "tokens"):
        assert data[key] == sum(source[key] for source in data["sources"])
    for name in ("train", "val"):
        assert data[name].keys() >= {"documents", "bytes", "tokens"}
    assert data["train"]["tokens"] + data["val"]["tokens"] == data["tokens"]
    assert 0 < data["val"]["share"] <= 1
    assert data["split"]["rule"] and (data["split"]["rule"] == "given") == ("fraction" not in data["split"])
    for action in ("dropped", "cut", "repaired"):
        assert data[action].keys() == {"count", "reasons"}
        assert data[action]["count"] == sum(reason["count"] for reason in data[action]["reasons"])
        assert all(reason.keys() == {"reason", "count", "places"} for reason in data[action]["reasons"])
        assert all(len(reason["places"]) <= 3 for reason in data[action]["reasons"])
    assert data["duplicates"].keys() == {"within_train", "across_splits"}
    assert all(isinstance(count, int) for count in [*data["notes"].values(), *data["duplicates"].values()])
    assert data["content_hash"] and data["tokenizer_hash"]
