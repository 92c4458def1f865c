"""The weights of PyTorch's MultiheadAttention as those of modules of their own. Imports no framework."""

from collections.abc import Mapping
from dataclasses import replace

from outlook_parity.mapping.layouts import Part
from outlook_parity.mapping.tree import Leaf

ATTENTION = "MultiheadAttention"

PROJECTIONS = ("query", "key", "value")


def with_attention(torch: Mapping[str, Leaf], jax: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return PyTorch's weights by the names they have in a tree.

    `in_proj_weight` and `in_proj_bias` become a linear layer `in_proj`; separate matrices, with the parts of their one
    bias, three layers. A JAX twin with weights of PyTorch's own names keeps them.
    """
    own = {name.rpartition(".")[2] for name in jax}
    found: dict[str, Leaf] = {}
    for name, leaf in torch.items():
        owner, _, last = name.rpartition(".")
        prefix = f"{owner}." if owner else ""
        if leaf.kind != ATTENTION or last in own:
            found[name] = leaf
        elif last in ("in_proj_weight", "in_proj_bias") and f"{prefix}q_proj_weight" not in torch:
            found[f"{prefix}in_proj.{last.removeprefix('in_proj_')}"] = replace(leaf, kind="Linear", owner=None)
        elif last == "in_proj_bias":
            size = leaf.shape[0]
            for index, projection in enumerate(PROJECTIONS):
                part = Part(0, index * size // 3, (index + 1) * size // 3, size)
                found[f"{prefix}{projection}.bias"] = replace(leaf.part(part), owner=None)
        elif last.endswith("_proj_weight"):
            projection = next(projection for projection in PROJECTIONS if last.startswith(projection[0]))
            found[f"{prefix}{projection}.weight"] = replace(leaf, kind="Linear", owner=None)
        else:
            found[name] = leaf
    return found
