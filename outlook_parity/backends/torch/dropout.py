"""Dropout of PyTorch models with masks that both twins share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from outlook_common.arrays import to_tensor
from outlook_parity.backends.torch.hooks import running
from outlook_parity.core.dropout import Draws, python_random

# The originals, before anything replaces them.
_RANDOM: dict[str, Callable[..., Any]] = {
    "dropout": torch.nn.functional.dropout,
    "attention": torch.nn.functional.scaled_dot_product_attention,
    "rand": torch.rand,
    "bernoulli": torch.Tensor.bernoulli_,
}

# Functions that drop whole channels -> how many axes a channel has.
_OF_CHANNELS = {
    torch.nn.functional.dropout1d: 1,
    torch.nn.functional.dropout2d: 2,
    torch.nn.functional.dropout3d: 3,
}


class _Masks(TorchFunctionMode):
    """Replaces dropout and uniform random numbers by those of `draws`."""

    def __init__(self, draws: Draws, where: Callable[[], str]) -> None:
        super().__init__()
        self._draws, self._where = draws, where
        self._replacements: dict[Any, Callable[..., Any]] = {
            _RANDOM["dropout"]: self._dropout,
            _RANDOM["attention"]: self._attention,
            _RANDOM["rand"]: self._rand,
            _RANDOM["bernoulli"]: self._bernoulli,
        }
        self._replacements |= {drop: partial(self._channels, axes) for drop, axes in _OF_CHANNELS.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))

    def inside_functions(self) -> AbstractContextManager[Any]:
        """Return a context for PyTorch's own functions, multi-head attention above all, which call these directly."""
        return patch.multiple(torch.nn.functional, dropout=self._dropout, scaled_dot_product_attention=self._attention)

    # The arguments have PyTorch's names: they may be given by keyword.
    def _dropout(
        self,
        input: torch.Tensor,  # noqa: A002
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> torch.Tensor:
        if not training or p == 0:
            return input
        return input * to_tensor(self._draws.mask(tuple(input.shape), p, self._where())).to(input.device, input.dtype)

    def _channels(
        self,
        axes: int,
        input: torch.Tensor,  # noqa: A002
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> torch.Tensor:
        if not training or p == 0:
            return input
        shape = input.shape[: input.ndim - axes] + (1,) * axes
        return input * to_tensor(self._draws.mask(tuple(shape), p, self._where())).to(input.device, input.dtype)

    def _bernoulli(self, x: torch.Tensor, p: float = 0.5, **kwargs: Any) -> torch.Tensor:
        kept = self._draws.uniform(tuple(x.shape), self._where()) >= 1 - p  # the same comparison as in `Draws.mask`
        return x.copy_(to_tensor(kept))

    def _attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        q, k, v = query, key, value
        if dropout_p == 0:
            return _RANDOM["attention"](q, k, v, attn_mask, dropout_p, is_causal, **kwargs)
        if kwargs.get("enable_gqa"):
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        logits = q @ k.transpose(-1, -2) * scale
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -torch.inf) if boolean else logits + attn_mask
        return self._dropout(logits.softmax(dim=-1), dropout_p) @ v

    def _rand(self, *shape: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        shape = (kwargs["size"],) if "size" in kwargs else shape
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return to_tensor(self._draws.uniform(sizes, self._where())).to(device, dtype)


@contextmanager
def shared_masks(model: torch.nn.Module, draws: Draws) -> Iterator[None]:
    """Let `draws` decide what the model drops."""
    with running(model) as path:
        masks = _Masks(draws, path)
        with masks, masks.inside_functions(), python_random(draws, path):
            yield
