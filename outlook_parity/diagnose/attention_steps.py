"""Which step inside outlook attention differs: both ops run on probes, each of which shows one step.

Only results are compared, so it works for any implementation. Peaked logits make the softmax pick one position of each
window, equal logits average it, and values of one leave only how windows are added up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import outlook_jax.attention
import outlook_torch.attention
from outlook_common.arrays import to_numpy, to_tensor
from outlook_common.config import OutlookAttentionConfig
from outlook_common.geometry import WindowGrid, window_grid
from outlook_parity.compare.modules import Suspect
from outlook_parity.compare.patterns import CLOSE

PEAK = 1e4


@dataclass(frozen=True)
class Probe:
    """Operands for both ops, and the step that is wrong if the results differ."""

    step: str
    operands: Callable[
        [np.random.Generator, WindowGrid, tuple[int, ...], tuple[int, ...]], tuple[np.ndarray, np.ndarray]
    ]


def _ones_peaked(rng: Any, grid: Any, value: Any, logits: Any) -> tuple[np.ndarray, np.ndarray]:
    peaked = np.zeros(logits)
    peaked[..., grid.places // 2] = PEAK
    return np.ones(value), peaked


def _equal_weights(rng: Any, grid: Any, value: Any, logits: Any) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal(value), np.zeros(logits)


def _each_its_own(rng: Any, grid: Any, value: Any, logits: Any) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal(value), np.broadcast_to(PEAK * np.eye(grid.places), logits)


def _same_everywhere(rng: Any, grid: Any, value: Any, logits: Any) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal(value), np.broadcast_to(rng.standard_normal(logits[-2:]), logits)


def _per_head(rng: Any, grid: Any, value: Any, logits: Any) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal(value), np.broadcast_to(rng.standard_normal(logits[-3:]), logits)


def _all_different(rng: Any, grid: Any, value: Any, logits: Any) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal(value), rng.standard_normal(logits)


# With equal weights only the windows can differ: in how they are added up, which values of one and one position per
# window show, or else in which pixels they have.
WINDOWS = Probe("aggregate (which pixels a window has)", _equal_weights)
FOLD = Probe("fold (how windows are added up)", _ones_peaked)

# If they do not, in this order: each probe adds one step to those before.
WEIGHTS = (
    Probe("aggregate (the order of positions in a window)", _each_its_own),
    Probe("softmax (over which positions, or which of the two axes)", _same_everywhere),
    Probe("aggregate (which head has which channels)", _per_head),
    Probe("aggregate (which window has which weights)", _all_different),
)


def wrong_step(torch_module: Any, jax_module: Any, suspect: Suspect, x: np.ndarray) -> str | None:
    """Return the step that differs between the twins' layers on `x` (B, H, W, C), None if unknown."""
    if not (
        isinstance(torch_module, outlook_torch.attention.OutlookAttention)
        and isinstance(jax_module, outlook_jax.attention.OutlookAttention)
    ):
        return None
    if suspect.before == ".".join(filter(None, (suspect.path, "attn"))):
        return "pool (averages before the logits)"
    calls: dict[str, list[Any]] = {"torch": [], "jax": []}
    with _recorded(calls), torch.no_grad():
        torch_module(to_tensor(x))
        jax_module(jnp.asarray(x))
    if not calls["torch"] or not calls["jax"]:
        return None
    for name, index in (("value", 0), ("logits", 1)):
        if _differ(*(to_numpy(calls[twin][0][0][index]) for twin in ("torch", "jax"))):
            return {"value": "proj (heads of the values)", "logits": "logits (scale, heads or order of positions)"}[
                name
            ]
    config: OutlookAttentionConfig = torch_module.config
    grid = window_grid(x.shape[1:3], config.kernel_size, config.stride, config.padding)
    (value, logits), rng = calls["torch"][0][0][:2], np.random.default_rng(0)
    torch_op, jax_op = (calls[twin][0][1] for twin in ("torch", "jax"))

    def differs(probe: Probe) -> bool:
        v, a = (
            np.array(array, x.dtype) for array in probe.operands(rng, grid, tuple(value.shape), tuple(logits.shape))
        )
        with torch.no_grad():
            result = to_numpy(torch_op(to_tensor(v), to_tensor(a)))
        return _differ(result, to_numpy(jax_op(jnp.asarray(v), jnp.asarray(a))))

    if differs(WINDOWS):
        return FOLD.step if differs(FOLD) else WINDOWS.step
    return next((probe.step for probe in WEIGHTS if differs(probe)), None)


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return True
    bound = 1e-12 if one.dtype == np.float64 else 100 * float(np.finfo(np.float32).eps)
    return bool(np.abs(one - other).max() > min(bound, CLOSE * 100) * max(float(np.abs(other).max()), 1e-30))


@contextmanager
def _recorded(calls: dict[str, list[Any]]) -> Iterator[None]:
    """Record the operands of the layers' ops, and a function that calls the op again with the same settings."""
    owners: dict[str, Any] = {"torch": outlook_torch.attention, "jax": outlook_jax.attention}
    originals = {name: owner.outlook_attention for name, owner in owners.items()}

    def recording(name: str) -> Callable[..., Any]:
        def call(value: Any, logits: Any, **settings: Any) -> Any:
            calls[name].append(((value, logits), lambda v, a: originals[name](v, a, **settings)))
            return originals[name](value, logits, **settings)

        return call

    for name, owner in owners.items():
        owner.outlook_attention = recording(name)
    try:
        yield
    finally:
        for name, owner in owners.items():
            owner.outlook_attention = originals[name]
