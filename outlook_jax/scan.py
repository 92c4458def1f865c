"""Run equal blocks as one `lax.scan`, so that compile time hardly grows with depth."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from outlook_common.constants import ATTENTION_CHECKPOINT_NAME, OP_CHECKPOINT_NAME
from outlook_jax.blocks import DropRate

# Norms, GELUs and softmaxes are computed again in less time than their results take to be written and read, and so are
# the products of queries and keys, of which there are T*T per head: a training step of VOLO-D1 needs half the memory.
_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(OP_CHECKPOINT_NAME, ATTENTION_CHECKPOINT_NAME),
)

# Kinds of variables in the blocks of this package.
_KNOWN = (nnx.Param, nnx.RngState, DropRate)


def run_blocks(blocks: Iterable[nnx.Module], x: Array, *, scan: bool, remat: bool) -> Array:
    """Return block_n(…block_1(x)); each block keeps its own parameters.

    Args:
        blocks: modules from an array to an array of the same shape and dtype.
        x: input of the first block.
        scan: whether neighbours that differ in nothing but their variables' values are stacked and run by
            `lax.scan`; else each is called by itself, as whoever watches single modules needs. So is a block with
            variables of other kinds than this package's have. What is sown inside a loop (`sow`) is lost.
        remat: whether the backward pass recomputes each block from its input. Else, of stacked blocks, it finds the
            results of products with weights and of both attentions kept and recomputes what lies between them.
    """
    blocks = list(blocks)
    for _, equal in groupby(blocks, key=_signature if scan else id):
        x = _run_equal(list(equal), x, remat)
    return x


def _run_equal(blocks: Sequence[nnx.Module], x: Array, remat: bool) -> Array:
    if len(blocks) == 1:
        run = nnx.remat(_call) if remat else _call
        return run(blocks[0], x)
    graphdef = nnx.graphdef(blocks[0])
    states = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    x, streams = _scan(graphdef, states, x, remat)
    if _draws(blocks[0]):  # else they are as before, and a module must not be written to from inside a trace
        for index, block in enumerate(blocks):
            nnx.update(block, jax.tree.map(lambda leaf, index=index: leaf[index], streams))
    return x


# Compiled by itself too, so that a model that runs outside of `jax.jit` compiles a stage once and not at every call.
@partial(jax.jit, static_argnums=(0, 3))
def _scan(graphdef: nnx.GraphDef[Any], states: list[Any], x: Array, remat: bool) -> tuple[Array, Any]:
    def step(x: Array, state: Any) -> tuple[Array, Any]:
        block = nnx.merge(graphdef, state)
        x = block(x)
        return x, nnx.to_pure_dict(nnx.state(block, nnx.RngState))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return lax.scan(jax.checkpoint(step, prevent_cse=False, policy=None if remat else _PRODUCTS), x, stacked)


def _call(block: nnx.Module, x: Array) -> Array:
    return block(x)


def _signature(block: nnx.Module) -> Any:
    if nnx.state(block, nnx.Not(nnx.Any(*_KNOWN))):
        return id(block)  # it may change variables of other kinds, and a loop returns random streams alone
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(nnx.state(block)))
    return nnx.graphdef(block), structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _draws(block: nnx.Module) -> bool:
    """Whether a module of the block draws random numbers when called; all such have `deterministic`."""
    return any(not module.deterministic for _, module in nnx.iter_modules(block) if hasattr(module, "deterministic"))
