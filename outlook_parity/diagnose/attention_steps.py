"""Which step inside outlook attention goes wrong: both twins' ops are asked questions that each tell one step.

Only answers are compared, so that it works for any implementation. Peaked logits make the softmax pick one place of
each window, equal ones average it, and ones for values leave nothing but how the windows are put back together.
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
class Question:
    """What is asked of both ops, and which step is wrong if the answers differ."""

    step: str
    ask: Callable[[np.random.Generator, WindowGrid, tuple[int, ...], tuple[int, ...]], tuple[np.ndarray, np.ndarray]]


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


# Weights that are all equal leave the windows alone to differ. If they do, it is in how they are added up, which ones
# as values and one place per window show, or else in which pixels they have.
WINDOWS = Question("aggregate (which pixels a window has)", _equal_weights)
FOLD = Question("fold (how windows are added up)", _ones_peaked)

# If not, in this order: each asks for one step more than those before.
WEIGHTS = (
    Question("aggregate (the order of places in a window)", _each_its_own),
    Question("softmax (over which places, or which of the two axes)", _same_everywhere),
    Question("aggregate (which head has which channels)", _per_head),
    Question("aggregate (which window has which weights)", _all_different),
)


def wrong_step(torch_module: Any, jax_module: Any, suspect: Suspect, x: np.ndarray) -> str | None:
    """Return the step that differs between the twins' layers on `x` (B, H, W, C), None if it cannot be told."""
    if not (
        isinstance(torch_module, outlook_torch.attention.OutlookAttention)
        and isinstance(jax_module, outlook_jax.attention.OutlookAttention)
    ):
        return None
    if suspect.before == ".".join(filter(None, (suspect.path, "attn"))):
        return "pool (averages before the logits)"
    calls: dict[str, list[Any]] = {"torch": [], "jax": []}
    with _overheard(calls), torch.no_grad():
        torch_module(to_tensor(x))
        jax_module(jnp.asarray(x))
    if not calls["torch"] or not calls["jax"]:
        return None
    for name, index in (("value", 0), ("logits", 1)):
        ours, theirs = (to_numpy(calls[twin][0][0][index]) for twin in ("torch", "jax"))
        if _differ(ours, theirs):
            return {"value": "proj (heads of the values)", "logits": "logits (scale, heads or order of places)"}[name]
    config: OutlookAttentionConfig = torch_module.config
    grid = window_grid(x.shape[1:3], config.kernel_size, config.stride, config.padding)
    (value, logits), rng = calls["torch"][0][0][:2], np.random.default_rng(0)
    ask_torch, ask_jax = (calls[twin][0][1] for twin in ("torch", "jax"))

    def answers_differ(question: Question) -> bool:
        v, a = (np.array(array, x.dtype) for array in question.ask(rng, grid, tuple(value.shape), tuple(logits.shape)))
        with torch.no_grad():
            answer = to_numpy(ask_torch(to_tensor(v), to_tensor(a)))
        return _differ(answer, to_numpy(ask_jax(jnp.asarray(v), jnp.asarray(a))))

    if answers_differ(WINDOWS):
        return FOLD.step if answers_differ(FOLD) else WINDOWS.step
    return next((question.step for question in WEIGHTS if answers_differ(question)), None)


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return True
    bound = 1e-12 if one.dtype == np.float64 else 100 * float(np.finfo(np.float32).eps)
    return bool(np.abs(one - other).max() > min(bound, CLOSE * 100) * max(float(np.abs(other).max()), 1e-30))


@contextmanager
def _overheard(calls: dict[str, list[Any]]) -> Iterator[None]:
    """Note what the layers call their ops with, and how to call them again."""
    owners: dict[str, Any] = {"torch": outlook_torch.attention, "jax": outlook_jax.attention}
    honest = {name: owner.outlook_attention for name, owner in owners.items()}

    def listener(name: str) -> Callable[..., Any]:
        def call(value: Any, logits: Any, **settings: Any) -> Any:
            calls[name].append(((value, logits), lambda v, a: honest[name](v, a, **settings)))
            return honest[name](value, logits, **settings)

        return call

    for name, owner in owners.items():
        owner.outlook_attention = listener(name)
    try:
        yield
    finally:
        for name, owner in owners.items():
            owner.outlook_attention = honest[name]
