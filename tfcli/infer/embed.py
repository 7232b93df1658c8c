"""Texts as vectors: the mean of a model's hidden states over the tokens of a text, of length 1.

The pooling of Sentence-BERT (Reimers and Gurevych 2019, 3), with which all-MiniLM-L6-v2 and its kin were trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tfcli.infer.batches import by_length
from tfcli.model.transformer import Transformer


@torch.inference_mode()
def embed(model: Transformer, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Vectors (N, D) of texts given as ids, at least one each and at most the model's context, in their order.

    Texts of similar length are read together, so that padding is small; it is never attended to.
    """
    out = np.empty((len(texts), model.config.width), np.float32)
    for batch in by_length([len(text) for text in texts], device=model.device):
        longest = len(texts[batch[0]])
        rows = [[*texts[index], *[0] * (longest - len(texts[index]))] for index in batch]
        lengths = torch.tensor([len(texts[index]) for index in batch])
        real_BT = (torch.arange(longest) < lengths[:, None]).to(model.device)
        hidden_BTD = model(torch.tensor(rows, device=model.device), mask_BT=real_BT).float()
        mean_BD = (hidden_BTD * real_BT[..., None]).sum(dim=1) / real_BT.sum(dim=1, keepdim=True)
        out[batch] = F.normalize(mean_BD, dim=-1).cpu().numpy()
    return out
