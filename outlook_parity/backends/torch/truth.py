"""Lift casts to float32 inside a PyTorch model to float64, for the truth run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from outlook_common.arrays import to_numpy
from outlook_parity.backends.torch.hooks import running
from outlook_parity.core.truth import Truth

_LIFTED = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces float32 by float64 wherever an operation is asked for it.

    Of operations below autograd, so casts inside PyTorch's own functions, custom gradients and backward passes count.
    """

    def __init__(self, truth: Truth, where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._truth, self._where = truth, where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is not torch.ops.aten.view and (asked := _asked_for(args, kwargs)):
            self._truth.lifted[self._where()] += asked
            args = tuple(_LIFTED.get(x, x) if isinstance(x, torch.dtype) else x for x in args)
            kwargs = {n: _LIFTED.get(x, x) if isinstance(x, torch.dtype) else x for n, x in kwargs.items()}
        return func(*args, **kwargs)


def _asked_for(args: Any, kwargs: Any) -> int:
    return sum(isinstance(x, torch.dtype) and x in _LIFTED for x in (*args, *kwargs.values()))


class _Functions(TorchFunctionMode):
    """Makes new tensors of Python numbers in float64, and lets float32 constants meet float64 in products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("dtype") in _LIFTED:
            kwargs = kwargs | {"dtype": _LIFTED[kwargs["dtype"]]}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            widened, changed = _widened(args), _widened(kwargs)
            if widened is args and changed is kwargs:
                raise
            return func(*widened, **changed)


def _widened(values: Any) -> Any:
    """Return arguments with their float32 tensors in float64; the same object if there are none."""
    if isinstance(values, torch.Tensor):
        return values.to(_LIFTED[values.dtype]) if values.dtype in _LIFTED else values
    if type(values) in (tuple, list):
        new = [_widened(value) for value in values]
        return values if all(a is b for a, b in zip(new, values, strict=True)) else type(values)(new)
    if type(values) is dict:
        named = {name: _widened(value) for name, value in values.items()}
        return values if all(named[name] is values[name] for name in values) else named
    return values


@contextmanager
def lifted(model: torch.nn.Module, truth: Truth) -> Iterator[None]:
    """Compute in float64 what the model would compute in float32; casts to half precisions stay."""
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        where = stack.enter_context(running(model))
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, default)
        stack.enter_context(_Functions())
        stack.enter_context(_Operations(truth, where))
        yield


def find_constants(model: torch.nn.Module, compared: set[str], truth: Truth) -> None:
    """Note the float32 tensors that modules hold besides the weights that are compared, and such numbers.

    A rate of `torch.linspace(…)[i].item()` is a number of float32.
    """
    for path, module in model.named_modules():
        held = dict(module._buffers) | {n: x for n, x in vars(module).items() if isinstance(x, torch.Tensor)}
        for name, tensor in held.items():
            if tensor is not None and (f"{path}.{name}" if path else name) not in compared:
                truth.saw_constant(path, to_numpy(tensor.detach()), name)
        for name, number in vars(module).items():
            if isinstance(number, float) and float(np.float32(number)) == number:
                truth.saw_constant(path, np.float32(number), name)
