"""Predicting masked tokens with an encoder and its masked-language head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tfcli.errors import UserError
from tfcli.infer.batches import by_length, padded
from tfcli.model import heads
from tfcli.model.heads import MaskedHead
from tfcli.model.transformer import Transformer
from tfcli.text.tokenizers.codec import Codec
from tfcli.text.tokenizers.sentencepiece import MASK

NAMES = (MASK, "<mask>")
"""Names of the mask token: BERT's and RoBERTa's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """A candidate for a masked token: its text without leading space, and its probability."""

    word: str
    probability: float


def mask_piece(codec: Codec) -> tuple[int, str] | None:
    """Return id and name of the mask token; None where the vocabulary has none."""
    for name in NAMES:
        ids = codec.encode_special(name)
        if len(ids) == 1 and codec.piece(ids[0]) == name and not codec.id_bytes(ids[0]):
            return ids[0], name
    return None


class Filler:
    """A model and its tokenizer for masked tokens. Raises UserError for a model that cannot predict them."""

    def __init__(self, model: Transformer, codec: Codec) -> None:
        mask = mask_piece(codec)
        if mask is None or not isinstance(heads.of(model), MaskedHead):
            raise UserError(
                f"{codec.name} belongs to a model that does not fill in: it lacks "
                + ("[MASK]" if mask is None else "a masked-language head"),
                hint="make one that does: tfcli pretrain corpus.txt --arch bert",
            )
        self.model, self.codec = model, codec
        self.id, self.name = mask

    def encode(self, text: str) -> list[int]:
        """Encode a text; the mask may be written as [MASK] or in the tokenizer's form.

        Raises UserError for a text without a mask, and for one longer than the context.
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
        """Return, for each mask of each text in order, the ``top`` likeliest tokens, the likeliest first.

        Each mask is predicted with the others still masked. Special tokens are excluded; probabilities are not
        renormalized.
        """
        encoded = [self.encode(text) for text in texts]
        out: list[list[list[Guess]]] = [[] for _ in texts]
        for batch in by_length([len(ids) for ids in encoded], device=self.model.device):
            tokens_BT, real_BT = padded([encoded[index] for index in batch], self.model.device)
            hidden_BTD = self.model(tokens_BT, mask_BT=real_BT)
            masked_BT = (tokens_BT == self.id) & real_BT
            shares_NV = heads.masked_logits(self.model, hidden_BTD[masked_BT]).softmax(dim=-1)
            for row, guesses in zip(masked_BT.nonzero()[:, 0].tolist(), self._best(shares_NV, top), strict=True):
                out[batch[row]].append(guesses)
        return out

    def _best(self, shares_NV: torch.Tensor, top: int) -> list[list[Guess]]:
        shares_NV = shares_NV[:, : self.codec.vocab_size].clone()
        special = [id for id in range(self.codec.vocab_size) if not self.codec.id_bytes(id)]
        shares_NV[:, special] = -1.0
        best = shares_NV.topk(min(top, max(1, self.codec.vocab_size - len(special))), dim=-1)
        return [
            [Guess(word=self._word(id), probability=share) for id, share in zip(ids, shares, strict=True)]
            for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _word(self, id: int) -> str:
        """Return the text of a token, or its name in the vocabulary for white space and parts of a character."""
        text = self.codec.decode([id]).strip()
        return self.codec.piece(id) if not text or "\ufffd" in text else text
