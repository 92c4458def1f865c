"""PyTorch's devices, and pinned global settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import numpy as np
import torch

from outlook_common.arrays import to_numpy, to_tensor
from outlook_parity.core.precision import PRECISIONS, Products, absence_of_products


def torch_device(device: str) -> torch.device:
    """Return PyTorch's device of this kind. It has none for TPUs: there its twin runs on the CPU."""
    return torch.device("cuda" if device == "gpu" else "cpu")


def torch_absence(device: str) -> str | None:
    """Return why PyTorch cannot run on this kind of device here, or None if it can."""
    return "PyTorch has no CUDA device here" if device == "gpu" and not torch.cuda.is_available() else None


def torch_products_absence(device: str, dtype: str) -> str | None:
    """Return why PyTorch cannot compute products in this precision on this kind of device, or None if it can."""
    place = torch_device(device)

    def multiply(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        with pinned(dtype, place), torch.no_grad():
            return to_numpy(to_tensor(one).to(place) @ to_tensor(other).to(place))

    return absence_of_products(f"PyTorch on {device}", dtype, multiply)


def torch_products(dtype: str) -> str:
    """Return PyTorch's own settings for products in this precision."""
    with pinned(dtype, torch.device("cpu")):
        states = [attrgetter(name)(torch.backends).fp32_precision for name in _GPU_SWITCHES]
    return ", ".join(f"{name} {state}" for name, state in zip(_GPU_SWITCHES, states, strict=True))


# PyTorch's switches for products of float32; set one by one, as a mixture cannot be read through the older, global
# switches.
_GPU_SWITCHES = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
_CPU_SWITCHES = ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
_FULL = "ieee"
_PRODUCTS: dict[Products, str] = {"full": _FULL, "tf32": "tf32"}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run operations on one thread: those of a small model are shorter than to wait for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def pinned(dtype: str, device: torch.device) -> Iterator[None]:
    """Compute in a precision with every global setting pinned (no autocast), then restore them.

    Random numbers begin anew: else two runs of a model that draws its own would differ as if rounding had done it.
    """
    products = _PRODUCTS[PRECISIONS[dtype].products]
    wanted = dict.fromkeys(_GPU_SWITCHES, products) | dict.fromkeys(_CPU_SWITCHES, _FULL)
    switches = [attrgetter(name)(torch.backends) for name in wanted]
    before = [switch.fp32_precision for switch in switches]
    deterministic = torch.get_deterministic_debug_mode()
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it computes whole encoder layers without calling their modules
        for switch, precision in zip(switches, wanted.values(), strict=True):
            switch.fp32_precision = precision
        # On CUDA this would demand an environment variable; rounding is measured there, not equality.
        # Not by `use_deterministic_algorithms`, which imports the compiler for two seconds, to set it too.
        torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
        torch.set_deterministic_debug_mode(deterministic)
