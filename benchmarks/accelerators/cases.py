"""The programs that are compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import outlook_jax
from outlook_common.op_cases import BY_NAME, Case

# "None" is `implementation=None`: what the default takes on the platform.
IMPLEMENTATIONS = ("None", "composite", "reference")

Shapes = tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """What is compiled: a function, the shapes of its operands, and the bytes that it reads and writes at least."""

    name: str
    run: Callable[..., Any]
    operands: Shapes
    floor: int


def op(case: Case, dtype: str, implementation: str | None, *, backward: bool = False) -> Program:
    """Return the op, or its gradients by value and logits without the forward pass."""
    window: dict[str, Any] = case.window
    run = partial(outlook_jax.outlook_attention, **window, implementation=implementation)
    value, logits = (jax.ShapeDtypeStruct(shape, dtype) for shape in (case.value_shape, case.logits_shape))
    label = f"op {case.name}, batch {case.B}, {dtype}, {'backward' if backward else 'forward'}"
    if not backward:
        return Program(label, run, (value, logits), _nbytes(value, logits, value))

    def gradients(value: jax.Array, logits: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(run, value, logits)[1](cotangent)

    return Program(label, gradients, (value, logits, value), _nbytes(value, logits, value, value, logits))


def layer(case: Case, dtype: str, implementation: str | None) -> Program:
    """Return a layer's loss and gradients, by its input too; parameters in float32."""
    window: dict[str, Any] = case.window
    module = outlook_jax.OutlookAttention(
        case.dim,
        case.N,
        **window,
        deterministic=True,
        dtype=jnp.dtype(dtype),
        implementation=implementation,
        rngs=nnx.Rngs(0),
    )
    graph, parameters, *rest = nnx.split(module, nnx.Param, ...)
    x = jax.ShapeDtypeStruct((case.B, case.H, case.W, case.dim), dtype)

    def step(parameters: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        out, pull = jax.vjp(lambda p, x: nnx.merge(graph, p, *rest)(x), parameters, x)
        return out, pull(cotangent)

    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), parameters)
    label = f"layer {case.name}, batch {case.B}, {dtype}, forward and backward"
    return Program(label, step, (shapes, x, x), _nbytes(x, x, x, x) + 2 * _nbytes(*jax.tree.leaves(shapes)))


def model(batch: int, dtype: str, *, train: bool) -> Program:
    """Return VOLO-D1, or its loss and gradients."""
    module = outlook_jax.volo("volo_d1_224", dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    module.eval()
    graph, parameters, *rest = nnx.split(module, nnx.Param, ...)
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), dtype)

    def forward(parameters: Any, images: jax.Array) -> Any:
        return nnx.merge(graph, parameters, *rest)(images)

    def step(parameters: Any, images: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: jax.nn.logsumexp(forward(p, images), -1).sum())(parameters)

    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), parameters)
    label = f"VOLO-D1, batch {batch}, {dtype}, {'loss and gradients' if train else 'forward'}"
    floor = (1 + train) * _nbytes(*jax.tree.leaves(shapes)) + _nbytes(images)
    return Program(label, step if train else forward, (shapes, images), floor)


def quick() -> list[tuple[str, Program]]:
    """Return the default and the reference in programs that stand for all, with their implementations."""
    small = BY_NAME["volo_d1"].with_batch(8)
    return [
        (name, op(small, "float32", _request(name), backward=backward))
        for name in ("None", "reference")
        for backward in (False, True)
    ]


def full(implementations: Sequence[str] = IMPLEMENTATIONS) -> list[tuple[str, Program]]:
    """Return the op and the layer in every implementation."""
    d1, seed = BY_NAME["volo_d1"], BY_NAME["seed_512"]
    found: list[tuple[str, Program]] = []
    for name in implementations:
        way = _request(name)
        found += [
            (name, op(d1.with_batch(8), "float32", way)),
            (name, op(d1.with_batch(128), "bfloat16", way)),
            (name, op(d1.with_batch(128), "bfloat16", way, backward=True)),
            (name, op(seed.with_batch(32), "bfloat16", way)),
            (name, op(seed.with_batch(32), "bfloat16", way, backward=True)),
            (name, layer(d1.with_batch(128), "bfloat16", way)),
        ]
    return found


def _request(name: str) -> str | None:
    return None if name == "None" else name


def _nbytes(*arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
