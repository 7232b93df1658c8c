"""The interface of every model for training and scoring."""

from __future__ import annotations

from torch import Tensor, nn

from tfcli.config.model import ModelConfig


class Model(nn.Module):
    """A module from token ids (B, T) to hidden states (B, T, D): ``model(tokens_BT, dtype=..., dropout=...)``."""

    config: ModelConfig

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed cross-entropy (nats, fp32) of the targets (B, T) given the hidden states (B, T, D)."""
        raise NotImplementedError

    def compiled_parts(self) -> list[nn.Module]:
        """Return the parts that torch.compile speeds up in training; none by default."""
        return []
