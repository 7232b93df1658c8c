"""Texts as vectors: the mean of a model's hidden states over the tokens of a text, normalized to length 1.

This is the pooling of Sentence-BERT (Reimers and Gurevych 2019, 3), as of all-MiniLM-L6-v2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tfcli.infer.batches import by_length, padded
from tfcli.model.transformer import Transformer


@torch.inference_mode()
def embed(model: Transformer, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Return vectors (N, D) of texts given as ids, at least one each and at most the model's context, in order."""
    out = np.empty((len(texts), model.config.width), np.float32)
    for batch in by_length([len(text) for text in texts], device=model.device):
        tokens_BT, real_BT = padded([texts[index] for index in batch], model.device)
        hidden_BTD = model(tokens_BT, mask_BT=real_BT).float()
        mean_BD = (hidden_BTD * real_BT[..., None]).sum(dim=1) / real_BT.sum(dim=1, keepdim=True)
        out[batch] = F.normalize(mean_BD, dim=-1).cpu().numpy()
    return out
