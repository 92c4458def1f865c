"""Which PyTorch module runs; every call of one written to a recorder, and replaced by what the recorder plays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from outlook_common.arrays import to_numpy, to_tensor
from outlook_parity.backends.torch.model import dtype_of
from outlook_parity.core.pytree import leaves, replaced
from outlook_parity.core.recorder import ROOT, Arrays, Recorder
from outlook_parity.core.request import round_to


@contextmanager
def running(model: torch.nn.Module) -> Iterator[Callable[[], str]]:
    """Give a function that returns the path of the module whose code runs, "" outside of all."""
    inside: list[str] = []

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    handles = []
    for path, module in model.named_modules():
        enter = module.register_forward_pre_hook(lambda module, args, path=path: inside.append(path))
        handles += [enter, module.register_forward_hook(leave)]
    try:
        yield lambda: inside[-1] if inside else ROOT
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    """Write every call of a module to the recorder, and replace it by what the recorder plays."""
    handles = []
    for path, module in model.named_modules():
        if not recorder.watches(path):
            continue

        def before(module: torch.nn.Module, args: Any, kwargs: Any, path: str = path) -> Any:
            given = recorder.enter(path, _arrays((args, kwargs)))
            return None if given is None else _replaced((args, kwargs), given)

        def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
            # Flax's attention does not give its weights, PyTorch's does.
            attention = isinstance(module, torch.nn.MultiheadAttention)
            told, rest = (output[0], output[1:]) if attention else (output, None)
            given = recorder.leave(_arrays(told), _whole(told))
            if given is None:
                return None
            return _replaced(told, given) if rest is None else (_replaced(told, given), *rest)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not _is_inexact(leaf)


def _arrays(tree: Any) -> Arrays:
    """Return the numbers of a tree, of complex ones the real and the imaginary part."""
    # Copies: what a module changes in place afterwards must not change what was written down.
    return [to_numpy(part).copy() for leaf in leaves(tree, _is_inexact) for part in _parts(leaf)]


def _parts(leaf: torch.Tensor) -> list[torch.Tensor]:
    return [leaf.real, leaf.imag.resolve_neg()] if leaf.is_complex() else [leaf]


def _whole(tree: Any) -> Arrays:
    return [to_numpy(leaf).copy() for leaf in leaves(tree, _is_whole)]


def _replaced(tree: Any, given: Arrays) -> Any:
    arrays, new = iter(given), {}
    for leaf in leaves(tree, _is_inexact):
        parts = [to_tensor(round_to(next(arrays), dtype_of(part))).to(leaf.device) for part in _parts(leaf)]
        new[id(leaf)] = parts[0] if len(parts) == 1 else torch.complex(*parts)
    return replaced(tree, _is_inexact, new)
