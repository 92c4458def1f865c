"""This package's PyTorch layers and losses, as far as the verifier treats them specially."""

import numpy as np
import torch

from outlook_torch import losses
from outlook_torch.blocks import DropPath

__all__ = ["losses", "round_rates"]


def round_rates(model: torch.nn.Module) -> None:
    """Round the rates of stochastic depth to float32, as the JAX twin keeps them."""
    for module in model.modules():
        if isinstance(module, DropPath):
            module.rate = float(np.float32(module.rate))
