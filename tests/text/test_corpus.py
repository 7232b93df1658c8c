"""From text to shards: the split, the data report, the cache, and failing files and disks."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_reports
import numpy as np
import pytest
from text_samples import prose

from tfcli import disk
from tfcli.config.options import DataOptions, TokenizerOptions
from tfcli.errors import RunError, UserError
from tfcli.text.corpus import prepare as corpora
from tfcli.text.corpus.prepare import Corpus, Sample, prepare, split_point
from tfcli.text.corpus.shards import HEADER_BYTES, Shard, ShardWriter
from tfcli.text.tokenizers.sentencepiece import Tokenizer


def make(tmp_path: Path, *specs: Path, tokenizer: Tokenizer | TokenizerOptions, **settings: Any) -> Corpus:
    options = DataOptions(**{key: settings.pop(key) for key in ("val_fraction", "val", "errors") if key in settings})
    return prepare(
        [str(spec) for spec in specs], options=options, tokenizer=tokenizer, cache=tmp_path / "c", **settings
    )


def text_of(shard: Shard, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(shard.ids)


def test_one_document_is_cut_in_its_text(tmp_path: Path, bpe: Tokenizer) -> None:
    """Catches text lost, doubled or leaked at the split, and an end-of-text id in the middle of a document."""
    text = prose(3000)
    (tmp_path / "a.txt").write_text(text)
    notes: list[str] = []
    made = make(tmp_path, tmp_path / "a.txt", tokenizer=bpe, on_note=notes.append)
    train, val = text_of(made.train, bpe), text_of(made.val, bpe)
    assert train + val == text
    assert abs(len(train.encode()) - int(len(text.encode()) * 0.9)) <= 1  # é may straddle the cut
    assert made.train.ids[-1] != bpe.eos_id
    assert made.val.ids[-1] == bpe.eos_id
    assert int((made.train.ids == bpe.eos_id).sum() + (made.val.ids == bpe.eos_id).sum()) == 1
    assert (made.train.bytes, made.val.bytes) == (len(train.encode()), len(val.encode()))
    assert notes == [f"held out for validation: the last {len(text.encode()) - int(len(text.encode()) * 0.9):,} bytes "
                     "of the text, 10.0%"]  # fmt: skip


def test_ascii_is_split_as_nanogpt_splits_it(tmp_path: Path, bpe: Tokenizer) -> None:
    text = prose(500).replace("é", "e")
    (tmp_path / "a.txt").write_text(text)
    made = make(tmp_path, tmp_path / "a.txt", tokenizer=bpe)
    assert text_of(made.train, bpe) == text[: int(len(text) * 0.9)]


def test_many_documents_are_split_between_them(tmp_path: Path, bpe: Tokenizer) -> None:
    """Catches documents that are cut, or not ended by the end-of-text id."""
    rows = [f"row {n} é\nline" for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    made = make(tmp_path, tmp_path / "a.jsonl", tokenizer=bpe, val_fraction=0.2, explicit_val_fraction=True)
    for shard, expected in ((made.train, rows[:40]), (made.val, rows[40:])):
        ends = np.flatnonzero(shard.ids == bpe.eos_id)
        assert [bpe.decode(part) for part in np.split(shard.ids, ends + 1)[:-1]] == expected
        assert shard.documents == len(expected)
        assert shard.bytes == sum(len(row.encode()) for row in expected)


def test_where_the_split_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "HELD_OUT_BYTES", 50)
    assert split_point([1000], 0.1, capped=False) == 900
    assert split_point([1000], 0.1, capped=True) == 950
    assert split_point([100] * 10, 0.2, capped=False) == 800
    assert split_point([20] * 100, 0.1, capped=True) == 1960  # two whole documents are at most 50 bytes
    assert split_point([900, 100], 0.1, capped=False) == 900  # no whole document is a tenth of two: cut by bytes
    assert split_point([100] * 10, 0.2, capped=True) == 950  # the last document alone is too large: within it
    assert split_point([10] * 5, 0.0, capped=False) == 50
    with pytest.raises(UserError, match="fraction"):
        split_point([10], 1.0, capped=False)


def test_a_file_held_out(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(prose(100, seed=1))
    (tmp_path / "b.txt").write_text(prose(20, seed=2))
    made = make(tmp_path, tmp_path / "a.txt", tokenizer=bpe, val=str(tmp_path / "b.txt"))
    assert text_of(made.train, bpe) == prose(100, seed=1)
    assert text_of(made.val, bpe) == prose(20, seed=2)
    names = [source["name"] for source in made.data_report["sources"]]
    assert names == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_the_data_report_counts_everything(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "the \u4e00 and\n".encode() + b"\xff of\n")
    (tmp_path / "b.jsonl").write_text('{"text": "same"}\n{"text": ""}\n{"text": "same"}\n{"text": "same"}\n')
    (tmp_path / "z.txt").write_text("")
    made = make(tmp_path, tmp_path, tokenizer=bpe, errors="replace")
    data_report = made.data_report
    data_reports.check(data_report, "pretrain")
    assert data_report["duplicates"] == {"within_train": 1, "across_splits": 1}
    a, b, z = (str(tmp_path / name) for name in ("a.txt", "b.jsonl", "z.txt"))
    assert data_report["repaired"] == {
        "count": 1,
        "reasons": [{"reason": "invalid UTF-8 that became U+FFFD", "count": 1, "places": [f"{a}:2"]}],
    }
    assert data_report["dropped"] == {
        "count": 3,
        "reasons": [
            {"reason": "empty documents", "count": 2, "places": [f"{b}:2", z]},
            {"reason": "byte order marks", "count": 1, "places": [a]},
        ],
    }
    assert [row["documents"] for row in data_report["sources"]] == [1, 3, 0]
    for key in ("tokens", "bytes"):
        total = getattr(made.train, key) + getattr(made.val, key)
        assert data_report[key] == total == sum(row[key] for row in data_report["sources"])
    bytes_of_two = 6  # U+4E00 and U+FFFD, not line breaks
    assert data_report["byte_fallback_rate"] * data_report["tokens"] == pytest.approx(bytes_of_two)
    assert data_report["unknown_rate"] == 0
    assert data_report["tokenizer_hash"] == bpe.hash


def test_the_tokenizer_does_not_see_held_out_text(tmp_path: Path) -> None:
    """Catches the held-out split leaking into the vocabulary."""
    text = prose(900).replace("é", "e") + "ZQZQZQZQZQ " * 900
    (tmp_path / "a.txt").write_text(text)
    share = 1 - len(prose(900).replace("é", "e")) / len(text)
    sizes = {"explicit_val_fraction": True, "vocab_size_for": lambda size: 300 + size % 10}
    made = make(tmp_path, tmp_path / "a.txt", tokenizer=TokenizerOptions(), val_fraction=share, **sizes)
    assert 300 <= made.tokenizer.vocab_size < 310
    assert set(made.tokenizer.pieces("ZQ")) == {"<0x5A>", "<0x51>"}


def test_the_sample_is_fair_bounded_and_before_the_cut() -> None:
    """Catches a tokenizer trained on the head of the corpus only."""
    sample = Sample(100 * corpora.BLOCK)
    chunk = "word " * (1 << 17)
    for index in range(50):
        sample.add(index * len(chunk), chunk, len(chunk))
    held = list(sample.chunks(10**9))
    assert 0.9 < sum(len(part.text) for part in held) / (100 * corpora.BLOCK) < 2.1
    offsets = np.array([offset for offset, _ in sample._blocks]) / (50 * len(chunk))
    assert 0.4 < offsets.mean() < 0.6
    assert offsets.max() > 0.9
    cut = 7 * len(chunk) + 3
    assert sum(len(part.text) for part in sample.chunks(cut)) < sum(len(part.text) for part in held) / 3


def test_shards_are_reused_and_rebuilt_when_damaged(tmp_path: Path, bpe: Tokenizer) -> None:
    """Catches encoding twice, a stale cache after the text changed, and trust in a damaged file."""
    path = tmp_path / "a.txt"
    path.write_text(prose(200))
    made = make(tmp_path, path, tokenizer=bpe)
    first = made.train.path.stat().st_mtime_ns
    assert make(tmp_path, path, tokenizer=bpe).train.path.stat().st_mtime_ns == first
    ids = made.train.ids.copy()
    for damage in ("cut", "flip", "magic"):
        data = bytearray(made.train.path.read_bytes())
        if damage == "cut":
            del data[-100:]
        else:
            data[0 if damage == "magic" else HEADER_BYTES + 50] ^= 1
        made.train.path.unlink()
        made.train.path.write_bytes(data)
        notes: list[str] = []
        again = make(tmp_path, path, tokenizer=bpe, on_note=notes.append)
        assert (again.train.ids == ids).all()
        assert any("again" in note for note in notes)
    path.write_text(prose(200, seed=3))
    assert make(tmp_path, path, tokenizer=bpe).train.path != made.train.path


def test_a_trained_tokenizer_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(300))
    options = TokenizerOptions(vocab_size=300)
    one, two = (make(tmp_path, tmp_path / "a.txt", tokenizer=options) for _ in range(2))
    assert one.tokenizer.hash == two.tokenizer.hash
    assert one.data_report == two.data_report


def test_shards_say_what_is_wrong_with_them(tmp_path: Path, bpe: Tokenizer) -> None:
    path = tmp_path / "x.bin"
    with ShardWriter(path, tokenizer_hash=bpe.hash, vocab_size=bpe.vocab_size) as writer:
        writer.write(np.arange(100, dtype=np.int32))
        writer.count(documents=2, bytes=300)
    shard = Shard.open(path, bpe.hash)
    assert shard.ids.dtype == np.uint16
    assert (shard.tokens, shard.documents, shard.bytes, shard.vocab_size) == (100, 2, 300, 400)
    assert shard.ids.tolist() == list(range(100))
    with pytest.raises(UserError, match="another tokenizer"):
        Shard.open(path, "ab" * 32)
    (tmp_path / "short.bin").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        Shard.open(tmp_path / "short.bin")
    for content in (b"", b"some text", b"TFSHARD\0 and no more"):
        (tmp_path / "no.bin").write_bytes(content)
        with pytest.raises(UserError, match="not a token shard"):
            Shard.open(tmp_path / "no.bin")
    with pytest.raises(UserError, match="cannot be read"):
        Shard.open(tmp_path / "missing.bin")


def test_large_vocabularies_are_wide_and_empty_shards_open(tmp_path: Path) -> None:
    """Catches ids above 65535 wrapped around, and a memory map of nothing."""
    with ShardWriter(tmp_path / "w.bin", tokenizer_hash="00" * 32, vocab_size=70_000) as writer:
        writer.write(np.array([69_999, 3], np.int32))
    assert Shard.open(tmp_path / "w.bin").ids.tolist() == [69_999, 3]
    with ShardWriter(tmp_path / "e.bin", tokenizer_hash="00" * 32, vocab_size=9):
        pass
    assert len(Shard.open(tmp_path / "e.bin").ids) == 0


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(prose(100))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"token shards cannot be written to .*: the disk is full"):
        make(tmp_path, tmp_path / "a.txt", tokenizer=bpe)
    assert [path for path in (tmp_path / "c").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("content", ["", " \n\t\n "])
def test_no_text_is_refused(tmp_path: Path, bpe: Tokenizer, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=r"no text in .*a\.txt"):
        make(tmp_path, tmp_path / "a.txt", tokenizer=bpe)


def test_a_cache_that_cannot_be_made(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "c").write_text("a file")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(RunError, match="cannot be made"):
        make(tmp_path, tmp_path / "a.txt", tokenizer=bpe)


def test_progress_covers_all_stages_and_ends_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(300))
    seen: dict[str, tuple[int, int]] = {}
    options = TokenizerOptions(vocab_size=300)
    make(tmp_path, tmp_path / "a.txt", tokenizer=options, on_progress=lambda s, d, t: seen.update({s: (d, t)}))
    assert list(seen) == ["scan", "train", "encode"]
    assert all(done == total > 0 for done, total in seen.values())


def test_text_that_changes_meanwhile_is_noticed(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches shards of another text than the one that was checked."""
    path = tmp_path / "a.txt"
    path.write_text(prose(50))
    key = corpora._key

    def meddle(*arguments: Any) -> str:
        path.write_text(prose(60))
        return key(*arguments)

    monkeypatch.setattr(corpora, "_key", meddle)
    with pytest.raises(RunError, match="changed while it was read"):
        make(tmp_path, path, tokenizer=bpe)
    assert not list((tmp_path / "c").rglob("*.bin"))


def pipe(text: str) -> str:
    """The name of a pipe with ``text`` in it, as the shell makes it for <(...)."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    return f"/dev/fd/{reading}"


def left(tmp_path: Path) -> list[str]:
    """Return the names in the cache that are not folders of shards."""
    return [path.name for path in (tmp_path / "c").iterdir() if not (path / "data.json").exists()]


def test_copies_of_piped_text_are_removed(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a copy of the text left on the disk forever."""
    made = make(tmp_path, Path(pipe(prose(50))), tokenizer=bpe, val=pipe(prose(9, seed=1)))
    assert (text_of(made.train, bpe), text_of(made.val, bpe)) == (prose(50), prose(9, seed=1))
    assert left(tmp_path) == []

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some text")))
    with pytest.raises(UserError, match="no such file"):
        make(tmp_path, Path("-"), tmp_path / "missing.txt", tokenizer=bpe)
    assert left(tmp_path) == []

    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                assert len(left(tmp_path)) == 1
                raise KeyboardInterrupt
            return super().read(4)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Interrupted(b"some text")))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Path("-"), tokenizer=bpe)
    assert left(tmp_path) == []


def test_the_same_text_under_another_name_is_found_again(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a corpus encoded once for every way to write its path, and a data report with another run's names."""
    for name, seed in (("a.txt", 1), ("b.txt", 2), ("v.txt", 3)):
        (tmp_path / name).write_text(prose(40, seed=seed))
    monkeypatch.chdir(tmp_path)
    one = make(tmp_path, Path("a.txt"), Path("b.txt"), tokenizer=bpe, val="v.txt")
    two = make(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", tokenizer=bpe, val=str(tmp_path / "v.txt"))
    assert one.train.path == two.train.path
    assert [row["name"] for row in one.data_report["sources"]] == ["a.txt", "b.txt", "v.txt"]
    for first, second in zip(one.data_report["sources"], two.data_report["sources"], strict=True):
        assert second == {**first, "name": str(tmp_path / first["name"])}
    swapped = make(tmp_path, Path("b.txt"), Path("a.txt"), tokenizer=bpe, val="v.txt")
    assert swapped.train.path != one.train.path


def test_only_what_dead_processes_left_is_swept(tmp_path: Path, bpe: Tokenizer) -> None:
    """Catches leftovers of a killed run that stay forever, and the files of a live run removed."""
    (tmp_path / "a.txt").write_text(prose(50))
    folder = make(tmp_path, tmp_path / "a.txt", tokenizer=bpe).train.path.parent
    mine = disk.aside(folder / "train.bin")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{process.pid}."))
    elsewhere = folder / f".train.bin.another-machine.{process.pid}.tmp"
    spool = tmp_path / "c" / f"tfcli-x{disk.mark()}".replace(f".{os.getpid()}.", f".{process.pid}.")
    spool.mkdir()
    for path in (mine, dead, elsewhere, spool / "stdin.txt", folder / "notes.tmp"):
        path.write_text("half")
    (folder / "data.json").unlink()
    make(tmp_path, tmp_path / "a.txt", tokenizer=bpe)
    assert not dead.exists()
    assert not spool.exists()
    assert elsewhere.exists()
    assert (folder / "notes.tmp").exists()
