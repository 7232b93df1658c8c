"""What stands where a text has [MASK], said by an encoder with its masked-language head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tfcli.errors import UserError
from tfcli.infer.batches import by_length
from tfcli.model import heads
from tfcli.model.heads import MaskedHead
from tfcli.model.transformer import Transformer
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import MASK

NAMES = (MASK, "<mask>")
"""What the piece is called: BERT's name, RoBERTa's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """A piece that may stand there: its text without the space before it, and its probability."""

    word: str
    probability: float


def mask_piece(codec: Codec) -> tuple[int, str] | None:
    """Id and name of the piece that covers another, None where the vocabulary has none."""
    for name in NAMES:
        ids = codec.encode_special(name)
        if len(ids) == 1 and codec.piece(ids[0]) == name and not codec.id_bytes(ids[0]):
            return ids[0], name
    return None


class Filler:
    """A model and its tokenizer, ready to fill in. Raises UserError for a model that cannot."""

    def __init__(self, model: Transformer, codec: Codec) -> None:
        found = mask_piece(codec)
        if found is None or not isinstance(heads.of(model), MaskedHead):
            raise UserError(
                f"{codec.name} belongs to a model that does not fill in: it lacks "
                + ("[MASK]" if found is None else "a masked-language head"),
                hint="make one that does: tfcli pretrain corpus.txt --arch bert",
            )
        self.model, self.codec = model, codec
        self.id, self.name = found

    def encode(self, text: str) -> list[int]:
        """The ids of a text; the mask may be written as [MASK] or as the tokenizer does.

        Raises UserError for a text without one, and for one that is longer than the model reads.
        """
        codec = self.codec
        ids = [*codec.prefix_ids, *codec.encode_special(text.replace(MASK, self.name)), *codec.suffix_ids]
        if self.id not in ids:
            raise UserError(f"there is no {self.name} in the text", hint=f'for example: "Once upon a {self.name}."')
        context = self.model.config.context
        if len(ids) > context:
            raise UserError(f"the text has {len(ids)} tokens, more than the {context} that the model reads")
        return ids

    @torch.inference_mode()
    def fill(self, texts: Sequence[str], *, top: int = 5) -> list[list[list[Guess]]]:
        """For each text, for each mask in its order, the ``top`` likeliest pieces, the likeliest first.

        Each mask is filled on its own, as if the others stayed covered. Special pieces are no answer; their share of
        the probability is left as it is.
        """
        encoded = [self.encode(text) for text in texts]
        out: list[list[list[Guess]]] = [[] for _ in texts]
        for batch in by_length([len(ids) for ids in encoded], device=self.model.device):
            longest = len(encoded[batch[0]])
            rows = [encoded[index] + [0] * (longest - len(encoded[index])) for index in batch]
            tokens_BT = torch.tensor(rows, device=self.model.device)
            lengths = torch.tensor([len(encoded[index]) for index in batch], device=self.model.device)
            real_BT = torch.arange(longest, device=self.model.device) < lengths[:, None]
            hidden_BTD = self.model(tokens_BT, mask_BT=real_BT)
            there_BT = (tokens_BT == self.id) & real_BT
            shares_NV = heads.masked_logits(self.model, hidden_BTD[there_BT]).softmax(dim=-1)
            for row, guesses in zip(there_BT.nonzero()[:, 0].tolist(), self._best(shares_NV, top), strict=True):
                out[batch[row]].append(guesses)
        return out

    def _best(self, shares_NV: torch.Tensor, top: int) -> list[list[Guess]]:
        shares_NV = shares_NV[:, : self.codec.vocab_size].clone()
        silent = [id for id in range(self.codec.vocab_size) if not self.codec.id_bytes(id)]
        shares_NV[:, silent] = -1.0
        best = shares_NV.topk(min(top, max(1, self.codec.vocab_size - len(silent))), dim=-1)
        return [
            [
                Guess(word=self._word(id), probability=share)
                for id, share in zip(ids, shares, strict=True)
            ]
            for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]  # fmt: skip

    def _word(self, id: int) -> str:
        """The text of a piece; of white space and of a part of a character its name in the vocabulary."""
        text = self.codec.decode([id]).strip()
        return self.codec.piece(id) if not text or "\ufffd" in text else text
