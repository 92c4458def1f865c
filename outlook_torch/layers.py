"""Layers of the released models: their initial weights."""

from typing import TypedDict

import torch
from torch import nn

from outlook_common.constants import INIT_STD

Device = torch.device | str | None
Dtype = torch.dtype | None


class LayerOptions(TypedDict, total=False):
    """Keywords that every block passes on to its layers."""

    device: Device
    dtype: Dtype


def initialize_linear(module: nn.Module) -> None:
    """Draw the weights of a linear layer as timm does; other modules stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def draw(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Fill `tensor` with what a new module has as its parameter or buffer of this name."""
    weight = name == "weight"
    if isinstance(module, nn.Linear) and weight:
        nn.init.trunc_normal_(tensor, std=INIT_STD)
    elif isinstance(module, nn.Conv2d):
        bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
        nn.init.uniform_(tensor, -bound, bound)
    else:
        nn.init.constant_(tensor, float(weight or name == "running_var"))


def initialize_parameter(parameter: nn.Parameter | None) -> None:
    """Draw a parameter outside any layer."""
    if parameter is not None:
        nn.init.trunc_normal_(parameter, std=INIT_STD)
