"""What every model here is to those who train or score it, whatever it is made of."""

from __future__ import annotations

from torch import Tensor, nn

from tfcli.config.model import ModelConfig


class Model(nn.Module):
    """A module that turns token ids (B, T) into hidden states (B, T, D), and these into the loss of targets.

    Called as ``model(tokens_BT, dtype=..., dropout=...)``.
    """

    config: ModelConfig

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy (nats, fp32) of the targets (B, T) given the hidden states (B, T, D)."""
        raise NotImplementedError

    def compiled_parts(self) -> list[nn.Module]:
        """The parts that torch.compile speeds up in training; none by default."""
        return []
