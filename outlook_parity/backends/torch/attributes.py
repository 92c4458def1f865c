"""Read attributes of PyTorch modules, and of the functions that they call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from outlook_parity.backends.torch.hooks import running
from outlook_parity.core.attributes import VARIANCE, Attributes, ints_of, pairs_of
from outlook_parity.core.precision import Products
from outlook_parity.core.resizing import TORCH_A, resizing
from outlook_parity.models.registry import config_attributes

# Padding modes that Flax's convolutions leave to an operation before.
PADDED_BEFORE = ("circular", "reflect")


def _padding(module: Any, axes: int) -> Any:
    if not isinstance(module.padding, str):
        return pairs_of(module.padding, axes)
    before_and_after = module._reversed_padding_repeated_twice  # of the last axis first
    return tuple(zip(before_and_after[-2::-2], before_and_after[::-2], strict=True))


def _convolution(module: Any) -> dict[str, Any]:
    axes = len(module.kernel_size)
    return {
        "kernel size": tuple(module.kernel_size),
        "stride": ints_of(module.stride, axes),
        "padding mode": module.padding_mode,
        **({} if module.padding_mode in PADDED_BEFORE else {"padding": _padding(module, axes)}),
        "dilation": ints_of(module.dilation, axes),
        "groups": module.groups,
        "bias": module.bias is not None,
    }


def _norm(module: Any) -> dict[str, Any]:
    return {"eps": float(module.eps), "variance": VARIANCE[False]}


_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)

# Types of modules -> reads their attributes; the first that fits.
READERS: list[tuple[tuple[type, ...], Callable[[Any], dict[str, Any]]]] = [
    ((torch.nn.LayerNorm,), _norm),
    ((torch.nn.GroupNorm,), lambda module: _norm(module) | {"groups": module.num_groups}),
    (
        (torch.nn.modules.batchnorm._BatchNorm,),
        lambda module: _norm(module) | {"momentum": float(module.momentum or 0.0)},
    ),
    (_CONVOLUTIONS, _convolution),
    (
        (torch.nn.Linear,),
        lambda module: {"bias": module.bias is not None, "features": module.out_features},
    ),
    ((torch.nn.modules.dropout._DropoutNd,), lambda module: {"dropout rate": float(module.p)}),
]


def attributes_of(model: torch.nn.Module, products: Products) -> Attributes:
    """Return the attributes of the modules; `products` is how PyTorch is set to compute products."""
    found: Attributes = {}
    for path, module in model.named_modules():
        read = next((read for types, read in READERS if isinstance(module, types)), None)
        found[path] = {} if read is None else read(module)
        if isinstance(module, (torch.nn.Linear, *_CONVOLUTIONS)):
            found[path]["precision"] = products
        found[path] |= config_attributes(module)
    return found


def numbers_of(value: Any, axes: int) -> list[float]:
    """Return a number for each axis of what is given as one or as several."""
    return [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)] * axes


class _Listener(TorchFunctionMode):
    """Notes the arguments of functions."""

    def __init__(self, note: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        listeners: dict[Any, Callable[..., None]] = {
            torch.nn.functional.gelu: self._gelu,
            torch.nn.functional.interpolate: self._interpolate,
            torch.nn.functional.avg_pool2d: self._pool,
            torch.nn.functional.layer_norm: self._layer_norm,
        }
        if func in listeners:
            named = dict(kwargs)
            first = (named.pop("input"),) if "input" in named else ()  # it may be given by keyword, as all others
            listeners[func](*first, *args, **named)
        return func(*args, **kwargs)

    def _gelu(self, x: Any, *, approximate: str = "none") -> None:
        self._note("GELU", {"none": "exact"}.get(approximate, approximate))

    def _interpolate(
        self,
        x: Any,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> None:
        old = tuple(x.shape[2:])
        given = None if scale_factor is None or recompute_scale_factor else numbers_of(scale_factor, len(old))
        wanted = numbers_of(scale_factor if size is None else size, len(old))
        new = [int(one) if size is not None else int(before * one) for before, one in zip(old, wanted, strict=True)]
        found = resizing(mode, old, new, given, antialias=antialias, a=TORCH_A, corners=bool(align_corners))
        for name, value in found.items():
            self._note(name, value)

    def _pool(
        self,
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        if any(ints_of(padding, 2)):
            self._note("pool divisor", "whole window" if count_include_pad else "pixels inside")

    def _layer_norm(
        self, x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> None:
        self._note("eps", float(eps))


@contextmanager
def listening(model: torch.nn.Module, attributes: Attributes) -> Iterator[None]:
    """Add the attributes of the functions that the model calls meanwhile."""
    with running(model) as path:

        def note(name: str, value: Any) -> None:
            attributes.setdefault(path(), {})[name] = value

        with _Listener(note):
            yield
