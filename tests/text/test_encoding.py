"""Documents to ids: where beginnings and ends of text go."""

from pathlib import Path

import foreign
import numpy as np
import pytest
from tiny_models import tokenizer

from tfcli.formats.hf.tokenizers import load_tokenizer
from tfcli.text.corpus import encoding
from tfcli.text.corpus.encoding import encode
from tfcli.text.read.sources import Chunk
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.json import JsonTokenizer

DOCUMENTS = [Chunk("a king\n", False), Chunk("had three\n", True), Chunk("daughters", True), Chunk("well", True)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """A tokenizer whose texts begin with <s>."""
    folder = foreign.write(tmp_path_factory.mktemp("llama3"), "llama3")
    made = load_tokenizer(folder, vocab_size=800)
    assert isinstance(made, JsonTokenizer) and len(made.prefix_ids) == 1
    return made


def test_the_first_id_is_said_once(llama: Codec) -> None:
    """The beginning of text if there is one, else the end of the text before."""
    assert (llama.first_id,) == llama.prefix_ids != (llama.eos_id,)
    assert tokenizer().first_id == tokenizer().eos_id


@pytest.mark.parametrize("batch", [1, 1 << 22])
def test_ends_and_beginnings(llama: Codec, batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches the last end left out, a beginning before the first or within a document, and ends within one."""
    monkeypatch.setattr(encoding, "BATCH", batch)
    texts = ["a king\nhad three\n", "daughters", "well"]
    ids, eos, bos = [llama.encode(text) for text in texts], llama.eos_id, llama.first_id
    expected = [*ids[0], eos, bos, *ids[1], eos, bos, *ids[2], eos]
    made = encode(DOCUMENTS, llama, begin=True)
    assert made.ids.tolist() == expected
    assert (made.documents, made.bytes) == (3, sum(map(len, texts)))
    mapped = encode(DOCUMENTS, llama, begin=True, file=tmp_path / "ids")
    assert isinstance(mapped.ids, np.memmap)
    assert mapped.ids.tolist() == expected
    encoder = encode(DOCUMENTS, llama, begin=False).ids.tolist()
    assert encoder == [*ids[0], eos, *ids[1], eos, *ids[2], eos]


def test_without_a_beginning_of_text(tmp_path: Path) -> None:
    """Documents are separated by ends only; no text gives no ids, in memory and in a file."""
    codec = tokenizer()
    texts = ["a king\nhad three\n", "daughters", "well"]
    expected = [id for text in texts for id in (*codec.encode(text), codec.eos_id)]
    assert encode(DOCUMENTS, codec, begin=True).ids.tolist() == expected
    assert len(encode([], codec, begin=True).ids) == len(encode([], codec, begin=True, file=tmp_path / "i").ids) == 0
