"""timm's VOLO is the oracle; its import wants torchvision, whose compiled operators may not load beside PyTorch."""

import torch

_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as its library


def declare_missing_torchvision_operators() -> None:
    """Declare the two operators that torchvision's Python side refers to, if its own did not load."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
