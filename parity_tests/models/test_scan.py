"""Blocks run as one loop: what the backward pass finds kept, and what it computes again."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from outlook_jax import scan
from outlook_jax.blocks import Outlooker, Transformer
from outlook_parity.backends.jax.jaxprs import bodies_of

BLOCKS: dict[str, Callable[..., nnx.Module]] = {
    "outlooker": partial(Outlooker, 16, 2, implementation="composite"),
    "transformer": partial(Transformer, 16, 2),
}


def stack(kind: str, *, remat: bool = False) -> tuple[Callable[..., Array], Any, Array]:
    """Return a function of parameters and input, and both."""
    rngs = nnx.Rngs(0)
    blocks: Any = nnx.List(BLOCKS[kind](deterministic=True, rngs=rngs) for _ in range(3))
    graph, parameters, rest = nnx.split(blocks, nnx.Param, ...)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 16)), jnp.float32)

    def run(parameters: Any, x: Array) -> Array:
        return scan.run_blocks(nnx.merge(graph, parameters, rest), x, scan=True, remat=remat)

    return run, parameters, x


def primitives(program: Any) -> Iterator[str]:
    for equation in program.eqns:
        yield equation.primitive.name
        for inner in bodies_of(equation):
            yield from primitives(inner)


def kept_bytes(run: Callable[..., Array], parameters: Any, x: Array) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.vjp(run, parameters, x)[1]))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_training_step_keeps_products_and_attention_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_scan", inspect.unwrap(scan._scan))  # else the cache of `jax.jit` answers
    found, rematted = kept_bytes(*stack(kind)), kept_bytes(*stack(kind, remat=True))
    monkeypatch.setattr(scan, "_PRODUCTS", jax.checkpoint_policies.everything_saveable)
    assert rematted < found < 0.7 * kept_bytes(*stack(kind))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # The sum itself and its transpose; five products with weights, and two transposes of each.
        ("outlooker", {"outlook_mix": 2, "outlook_gram": 1, "dot_general": 3 * 5}),
        # Four products with weights and the two of attention; that of queries and keys once more.
        ("transformer", {"dot_general": 3 * 6 + 1}),
    ],
)
def test_what_is_kept_is_not_computed_again_in_the_backward_pass(kind: str, expected: dict[str, int]) -> None:
    run, *operands = stack(kind)
    program = jax.make_jaxpr(jax.grad(lambda *operands: run(*operands).sum(), argnums=(0, 1)))(*operands)
    found = Counter(primitives(program.jaxpr))
    assert {name: found[name] for name in expected} == expected


def test_implementations_may_be_listed() -> None:
    make = partial(Outlooker, 16, 2, implementation=["composite", "reference"], deterministic=True, rngs=nnx.Rngs(0))
    blocks = [make() for _ in range(2)]
    run = partial(scan.run_blocks, blocks, scan=True, remat=False)
    assert jax.eval_shape(run, jnp.zeros((2, 8, 8, 16))).shape == (2, 8, 8, 16)


def test_state_that_a_user_puts_into_blocks_is_kept() -> None:
    make = partial(Outlooker, 16, 2, rngs=nnx.Rngs(0))
    blocks = [make() for _ in range(2)]
    for block in blocks:
        block.norm1 = nnx.BatchNorm(16, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 16)), jnp.float32)
    scan.run_blocks(blocks, x, scan=True, remat=False)
    assert all(jnp.any(block.norm1.mean[...] != 0) for block in blocks)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_this_package_run_as_one_loop(kind: str) -> None:
    names = Counter(primitives(jax.make_jaxpr(stack(kind)[0])(*stack(kind)[1:])))
    assert names["scan"] == 1
