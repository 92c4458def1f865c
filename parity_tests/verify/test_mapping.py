"""Which weights correspond: by names, structure, order and equal weights; and that no fault is excused by it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from outlook_parity import NameMap, Report, WeightEntry, load_torch_weights, read_name_map, verify
from outlook_parity.mapping.infer import TorchLeaf, derive_names
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.toml import name_map_text

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIM, HEADS = 8, 2
X = np.random.default_rng(0).standard_normal((3, 5, DIM))

Shapes = Mapping[str, tuple[int, ...]]


def checked(torch_model: Any, jax_model: Any, x: np.ndarray = X) -> Report:
    """Verify the outputs and the weights."""
    return verify(torch_model, jax_model, x, levels=("forward",), dtypes=("float64",))


def leaves(weights: Shapes, kind: str = "Linear") -> dict[str, TorchLeaf]:
    return {name: TorchLeaf(kind if name.endswith("weight") else "", shape) for name, shape in weights.items()}


def found(torch_weights: Shapes, jax_weights: Shapes, name_map: NameMap | None = None, **more: Any) -> Names:
    """Return what corresponds among weights of linear layers."""
    modules = {".".join(name.split(".")[:n]) for name in torch_weights for n in range(name.count(".") + 1)}
    return derive_names(leaves(torch_weights), modules, jax_weights, (), name_map or NameMap(), **more)


def pairs(names: Names) -> dict[str, list[str]]:
    return {flax: [weight.torch for weight in pieces] for flax, pieces in names.pieces.items()}


def linear(name: str, inwards: int = DIM, outwards: int = DIM) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outwards, inwards), f"{name}.bias": (outwards,)}


def dense(name: str, inwards: int = DIM, outwards: int = DIM) -> dict[str, tuple[int, ...]]:
    return {f"{name}.kernel": (inwards, outwards), f"{name}.bias": (outwards,)}


# By names.


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.0.fc", "blocks_0.fc"),
        ("layers.0.fc", "blocks_0/~/fc"),
        ("encoder.layer.0.attention.q_proj", "encoder.FlaxLayer_0.attn.query"),
        ("0", "layers.0"),
        ("mlp.linear", "mlp/dense"),
        ("layer1.0.conv1", "layer1_0.conv_1"),
    ],
)
def test_usual_names_of_containers_counters_and_parts_correspond(theirs: str, ours: str) -> None:
    other = {"head": 3}
    names = found(
        linear(theirs) | linear(theirs.replace("0", "1")) | linear("head", outwards=other["head"]),
        dense(ours) | dense(ours.replace("0", "1")) | dense("head", outwards=other["head"]),
    )
    assert pairs(names)[f"{ours}.kernel"] == [f"{theirs}.weight"]
    assert pairs(names)[f"{ours.replace('0', '1')}.bias"] == [f"{theirs.replace('0', '1')}.bias"]
    assert not names.found.left


def test_counters_that_skip_and_begin_elsewhere_correspond_by_rank() -> None:
    theirs = {**linear("net.1"), **linear("net.3"), **linear("net.5")}
    ours = {**dense("net.dense"), **dense("net.dense_1"), **dense("net.dense_2")}
    names = pairs(found(theirs, ours))
    assert [names[f"net.{name}.kernel"] for name in ("dense", "dense_1", "dense_2")] == [
        ["net.1.weight"],
        ["net.3.weight"],
        ["net.5.weight"],
    ]


def test_layers_in_the_only_chunk_of_one_twin_correspond_to_those_of_the_other() -> None:
    theirs = {**linear("blocks.0.fc1"), **linear("blocks.0.fc2"), **linear("blocks.1.fc1"), **linear("blocks.1.fc2")}
    ours = {name.replace("blocks.", "blocks.0.blocks."): shape for name, shape in theirs.items()}
    assert pairs(found(theirs, ours)) == {ours: [name] for ours, name in zip(ours, theirs, strict=True)}
    two = {name.replace("blocks.0.blocks.1", "blocks.1.blocks.0"): shape for name, shape in ours.items()}
    assert "blocks.1.fc1.weight" not in pairs(found(theirs, two))["blocks.0.blocks.0.fc1.weight"]


def test_a_weight_in_a_module_of_its_own_corresponds_to_one_in_none() -> None:
    theirs = {"pos_embed": (1, 5, DIM), "cls_token": (1, 1, DIM), **linear("head")}
    ours = {"global_pos_embed.weight": (5, DIM), "cls_token": (1, DIM), **dense("head")}
    names = found(theirs, ours)
    assert pairs(names)["global_pos_embed.weight"] == ["pos_embed"]
    assert names.by_flax["global_pos_embed.weight"].reshaped == ((1, 5, DIM), (5, DIM))
    assert not names.found.left


def test_a_layer_that_is_missing_moves_no_other() -> None:
    theirs = {**linear("net.0"), **linear("net.1"), **linear("net.2")}
    ours = {**dense("net.0"), **dense("net.2")}
    names = found(theirs, ours)
    assert pairs(names)["net.2.kernel"] == ["net.2.weight"]
    assert sorted(names.found.left) == ["net.1.bias", "net.1.weight"]


def test_a_bias_that_is_missing_is_not_one_of_another_layer() -> None:
    # Containers without counterpart, whose layers are looked for among all that is left.
    theirs = {**linear("a.q"), **linear("b.q"), "c.x.weight": (7, 7)}
    ours = {**dense("a.q"), **dense("b.q"), "d.y.kernel": (9, 9)}
    del theirs["a.q.bias"], ours["b.q.bias"]
    names = found(theirs, ours)
    assert names.found.left == ["b.q.bias", "c.x.weight"]
    assert names.found.candidates == {"a.q.bias": ["b.q.bias"], "d.y.kernel": []}


# By structure and order.


def ordered(torch_order: str, jax_order: str) -> Callable[[], Any]:
    return lambda: tuple({p: i for i, p in enumerate(order.split())} for order in (torch_order, jax_order))


def test_layers_alike_correspond_in_the_order_of_execution_and_without_it_not_at_all() -> None:
    theirs, ours = {**linear("x"), **linear("y")}, {**dense("first"), **dense("second")}
    names = pairs(found(theirs, ours, order=ordered("y x", "first second")))
    assert names["first.kernel"] == ["y.weight"]
    assert names["second.bias"] == ["x.bias"]
    unknown = found(theirs, ours)
    assert sorted(unknown.found.left) == sorted(theirs)
    assert unknown.found.candidates["first.kernel"] == ["x.weight", "y.weight"]
    assert found(theirs, ours, order=ordered("x y", "first")).found.left  # one is not called


def test_blocks_correspond_as_blocks_and_names_tell_inside_of_them() -> None:
    def block(of: Callable[..., Any], name: str, query: str, key: str) -> dict[str, tuple[int, ...]]:
        return {**of(f"{name}.{query}"), **of(f"{name}.{key}"), **of(f"{name}.fc1", DIM, 16)}

    theirs = {**block(linear, "layers.0", "q", "k"), **block(linear, "layers.1", "q", "k")}
    ours = {**block(dense, "early", "query", "key"), **block(dense, "late", "query", "key")}
    # Each block calls its key first in JAX: names decide.
    order = ordered("layers.0 layers.0.q layers.0.k layers.1 layers.1.q", "early early.key early.query late late.key")
    names = pairs(found(theirs, ours, order=order))
    assert names["early.query.kernel"] == ["layers.0.q.weight"]
    assert names["late.key.kernel"] == ["layers.1.k.weight"]


def test_an_embedding_is_no_kernel_of_the_same_size() -> None:
    theirs = {"a.weight": TorchLeaf("Embedding", (9, 4)), "b.weight": TorchLeaf("Linear", (9, 4))}
    names = derive_names(theirs, {"a", "b"}, {"x.kernel": (4, 9), "y.embedding": (9, 4)}, (), NameMap())
    assert pairs(names) == {"x.kernel": ["b.weight"], "y.embedding": ["a.weight"]}


# By equal weights.


def values(exchanged: bool = False) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((DIM, DIM)) for _ in range(2))
    theirs = {"x.weight": first, "y.weight": second}
    ours = {"p.kernel": first.T, "r.kernel": second.T} if not exchanged else {"p.kernel": second.T, "r.kernel": first.T}
    return theirs.__getitem__, ours.__getitem__


SQUARES = {"x.weight": (DIM, DIM), "y.weight": (DIM, DIM)}, {"p.kernel": (DIM, DIM), "r.kernel": (DIM, DIM)}


def test_equal_weights_break_a_tie_and_override_neither_order_nor_layout() -> None:
    tie = found(*SQUARES, values=values())
    assert (pairs(tie)["p.kernel"], tie.found.counts["values"]) == (["x.weight"], 2)
    assert pairs(found(*SQUARES, values=values(exchanged=True)))["p.kernel"] == ["y.weight"]
    order = ordered("x y", "p r")
    assert pairs(found(*SQUARES, values=values(exchanged=True), order=order))["p.kernel"] == ["x.weight"]
    theirs, _ = values()
    turned = found(*SQUARES, values=(theirs, {"p.kernel": theirs("x.weight"), "r.kernel": theirs("y.weight")}.get))
    assert turned.found.left == ["x.weight", "y.weight"]
    same = np.ones((DIM, DIM))
    assert found(*SQUARES, values=(lambda name: same, lambda name: same)).found.left


# Layouts.


def assert_both_ways(names: Names, torch_weights: Shapes, jax_weights: Shapes) -> None:
    """Every number of either twin comes back when it is converted there and back."""
    rng = np.random.default_rng(0)
    theirs = {name: rng.standard_normal(shape) for name, shape in torch_weights.items()}
    ours = {name: names.in_flax_layout(name, theirs) for name in jax_weights}
    assert {name: None if a is None else a.shape for name, a in ours.items()} == jax_weights
    back = names.under_torch_names({name: a for name, a in ours.items() if a is not None})
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        assert np.array_equal(back[name], array), name


Q, K, V = (f"attn.{name}" for name in ("query", "key", "value"))
LAYOUTS: dict[str, tuple[Shapes, Shapes]] = {
    "fused in torch": (linear("attn.qkv", DIM, 3 * DIM), {**dense(Q), **dense(K), **dense(V)}),
    "fused in JAX": ({**linear(Q), **linear(K), **linear(V)}, dense("attn.qkv", DIM, 3 * DIM)),
    "fused in torch, heads split in JAX": (
        linear("attn.c_attn", DIM, 3 * DIM),
        {f"{n}.{leaf}": s for n in (Q, K, V) for leaf, s in {"kernel": (DIM, 2, 4), "bias": (2, 4)}.items()},
    ),
    "fused, in an axis of their own in JAX": (
        {**linear(Q), **linear(K), **linear(V)},
        {"attn.qkv.kernel": (DIM, 3, DIM), "attn.qkv.bias": (3, DIM)},
    ),
    "keys and values with fewer heads": (
        linear("attn.qkv", DIM, DIM + 8),
        {**dense(Q), **dense(K, DIM, 4), **dense(V, DIM, 4)},
    ),
    "fused gate": (linear("mlp.gate_up_proj", DIM, 32), {**dense("mlp.gate", DIM, 16), **dense("mlp.up", DIM, 16)}),
    "out of heads": (linear("o_proj"), {"out.kernel": (2, 4, DIM), "out.bias": (DIM,)}),
    "stacked in JAX": (
        {**linear("layers.0.fc", DIM, 6), **linear("layers.1.fc", DIM, 6), **linear("layers.2.fc", DIM, 6)},
        {"scan.fc.kernel": (3, DIM, 6), "scan.fc.bias": (3, 6)},
    ),
    "stacked in torch": (
        {"experts.fc.weight": (3, 6, DIM), "experts.fc.bias": (3, 6)},
        {**dense("experts_0.fc", DIM, 6), **dense("experts_1.fc", DIM, 6), **dense("experts_2.fc", DIM, 6)},
    ),
    "stacked and split": (
        {**linear("layers.0.qkv", DIM, 3 * DIM), **linear("layers.1.qkv", DIM, 3 * DIM)},
        {f"layers.{n}.{leaf}": s for n in "qkv" for leaf, s in {"kernel": (2, DIM, DIM), "bias": (2, DIM)}.items()},
    ),
    "an axis of length 1": ({"pos": (1, 5, DIM)}, {"pos": (5, DIM)}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts_are_found_and_convert_both_ways(name: str) -> None:
    theirs, ours = LAYOUTS[name]
    names = found(theirs, ours)
    assert not names.found.left
    assert not names.found.candidates
    assert_both_ways(names, theirs, ours)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_map_that_is_written_gives_the_same_correspondence(name: str, tmp_path: Path) -> None:
    theirs, ours = LAYOUTS[name]
    names = found(theirs, ours)
    (tmp_path / "map.toml").write_text(name_map_text(names))
    read = found(theirs, ours, read_name_map(tmp_path / "map.toml"))
    assert read.pieces == names.pieces
    assert read.found.counts == {"map": len(ours), "names": 0, "structure": 0, "values": 0}


def test_parts_of_stacked_and_split_weights_are_the_right_ones() -> None:
    names = found(*LAYOUTS["stacked and split"])
    whole = np.arange(3 * DIM * DIM, dtype=float).reshape(3 * DIM, DIM)
    arrays = {f"layers.{n}.qkv.weight": whole + 1000 * n for n in range(2)}
    key = names.in_flax_layout("layers.k.kernel", arrays)
    assert key is not None
    assert np.array_equal(key[1], whole[DIM : 2 * DIM].T + 1000)


def test_the_layout_of_a_kind_is_that_which_fits_most_of_it() -> None:
    def shapes(turned: bool) -> Shapes:
        return {"a.kernel": (12, 4) if turned else (4, 12), "b.kernel": (4, 4), "c.kernel": (4, 4)}

    theirs = {f"{n}.weight": TorchLeaf("Conv1D", s) for n, s in (("a", (4, 12)), ("b", (4, 4)), ("c", (4, 4)))}
    for turned, axes in ((True, (1, 0)), (False, None)):
        names = derive_names(theirs, set("abc"), shapes(turned), (), NameMap())
        assert [names.by_flax[f"{name}.kernel"].axes for name in "abc"] == [axes] * 3
    linears = derive_names(
        leaves({n: leaf.shape for n, leaf in theirs.items()}), set("abc"), shapes(True), (), NameMap()
    )
    assert linears.by_flax["b.kernel"].axes == (1, 0)


def test_weight_norm_corresponds_under_its_old_and_new_names() -> None:
    theirs = {f"conv.parametrizations.weight.original{i}": s for i, s in enumerate([(4, 1, 1), (4, 3, 2)])}
    names = pairs(found(theirs, {"conv.weight_g": (4, 1, 1), "conv.weight_v": (4, 3, 2)}))
    assert names["conv.weight_g"] == ["conv.parametrizations.weight.original0"]
    assert names["conv.weight_v"] == ["conv.parametrizations.weight.original1"]


def test_of_a_tied_weight_the_name_counts_that_the_other_twin_has() -> None:
    theirs, ours = {"x.weight": (4, 4), "y.weight": (4, 4)}, {"a.kernel": (4, 4), "y.kernel": (4, 4)}
    assert pairs(found(theirs, ours, aliases={"a.weight": "x.weight"}))["a.kernel"] == ["x.weight"]
    more = {**ours, "x.kernel": (4, 4)}  # tied in PyTorch alone: one has no counterpart
    assert list(found(theirs, more, aliases={"a.weight": "x.weight"}).found.candidates) == ["a.kernel"]


# Maps.


def test_maps_take_expressions_splits_permutations_reshapes_and_stacks(tmp_path: Path) -> None:
    theirs = {
        **{f"encoder.{i}.lin.{leaf}": s for i in range(2) for leaf, s in {"weight": (6, DIM), "bias": (6,)}.items()},
        **{f"deep.{i}.w": (4, 5) for i in range(3)},
        "fused": (12, 5),
    }
    ours = {
        **{f"enc.layer_{i}.z.{leaf}": s for i in range(2) for leaf, s in {"kernel": (DIM, 6), "bias": (6,)}.items()},
        "piled": (3, 5, 4),
        "one": (5, 2, 2),
        "two": (5, 2, 2),
        "three": (5, 2, 2),
    }
    (tmp_path / "map.toml").write_text(
        r"""
        [modules]
        'enc/layer_(\d+)/z' = 'encoder.\1.lin'
        [weights]
        piled = { name = "deep.#.w", stack = 3, permute = [1, 0] }
        one = { name = "fused", split = [0, 3], permute = [1, 0], reshape = [5, 2, 2] }
        two = { name = "fused", split = [1, 3, 0], permute = [1, 0], reshape = [5, 2, 2] }
        three = { name = "fused", cuts = [[0, 8, 12]], permute = [1, 0], reshape = [5, 2, 2] }
        """
    )
    names = found(theirs, ours, read_name_map(tmp_path / "map.toml"))
    assert pairs(names)["enc.layer_1.z.kernel"] == ["encoder.1.lin.weight"]
    assert pairs(names)["piled"] == ["deep.0.w", "deep.1.w", "deep.2.w"]
    assert_both_ways(names, theirs, ours)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (WeightEntry("none"), "'none', which is not there"),
        (WeightEntry("x", split=(0, 5)), r"split \[0, 5\] does not fit 'x', of shape \(4, 6\)"),
        (WeightEntry("x", reshape=(4, 7)), r"the shape \(4, 7\); JAX has \(6, 4\)"),
        (WeightEntry("x"), r"the shape \(4, 6\); JAX has \(6, 4\)"),
        (WeightEntry("x", permute=(0, 2, 1)), r"permute \[0, 2, 1\] .* does not fit shape \(4, 6\)"),
        (WeightEntry("x", stack=3), r"of shape \(6, 4\), is no stack of 3"),
        (WeightEntry("x", cuts=((0, 3, 9),)), r"cut \[0, 3, 9\] does not fit"),
    ],
)
def test_an_entry_that_does_not_fit_is_an_error_with_shapes(entry: WeightEntry, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found({"x": (4, 6)}, {"y": (6, 4)}, NameMap(weights={"y": entry}))


@pytest.mark.parametrize(
    ("name_map", "message"),
    [
        (NameMap(modules={r"bloc_(\d+)": r"\1"}), r"expression 'bloc_.*' matches none of"),
        (NameMap(weights={"(": "x"}), "no regular expression"),
        (NameMap(weights={"(.)": r"\2"}), "does not fit"),
    ],
)
def test_an_expression_that_is_wrong_is_an_error(name_map: NameMap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found({"x": (4, 6)}, {"y": (6, 4)}, name_map)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = { nam = 'b' }", "did you mean 'name'"),
        ("a = { permute = [0] }", "needs name"),
        ("a = { name = 'b', permute = [0, 0] }", r"permute must be a permutation .*; got \[0, 0\]"),
        ("a = { name = 'b', split = 3 }", r"split must be \[k, n\] or \[k, n, axis\]; got 3"),
        ("a = { name = 'b', stack = true }", "stack must be a number of layers; got True"),
        ("a = ['b']", "must be a string, a table with name"),
    ],
)
def test_a_table_that_is_wrong_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text(f"[weights]\n{text}\n")
    with pytest.raises(ValueError, match=message):
        read_name_map(tmp_path / "map.toml")


# What is not found.


def test_what_is_not_found_is_noted_with_candidates_in_few_words() -> None:
    from outlook_parity.mapping.found import note_on_correspondence

    many = {f"very_long_name_of_a_module_{chr(97 + i)}{chr(97 + j)}.weight": (4, 4) for i in range(9) for j in range(9)}
    ours = {
        name.replace("very", "other").replace("weight", "kernel").replace("_module", f"_{i}x"): (4, 4)
        for i, name in enumerate(many)
    }
    note = note_on_correspondence(found(many | linear("head", 4, 3), ours | dense("head", 4, 3)))
    assert note is not None
    assert "weights that correspond: 2 by names; 81 of JAX without counterpart: " in note
    assert "(may be very_long_name" in note
    assert len(note) <= 2000
    assert note_on_correspondence(found(linear("a"), dense("a"))) is None


# Whole models.


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TorchBlock() for _ in range(2))
        self.head = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ScannedBlock(linen.Module):
    """A block with heads of their own, for a scan."""

    @linen.compact
    def __call__(self, x: Any, _: None) -> tuple[Any, None]:
        attend = linen.MultiHeadDotProductAttention(HEADS, name="attn")
        return x + attend(linen.LayerNorm(epsilon=1e-5, name="norm")(x)), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        scan = linen.scan(ScannedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(name="scan")(x, None)
        return linen.Dense(DIM)(jnp.tanh(linen.Dense(DIM)(x)))


def test_a_scan_over_blocks_with_heads_is_the_twin_of_numbered_blocks_with_one_matrix() -> None:
    torch.manual_seed(0)
    theirs, module = TorchStack().eval(), Scanned()
    ours = load_torch_weights((module, module.init(jax.random.key(0), X)), theirs, inputs=X)
    with pytest.raises(ValueError, match=r"Dense_0.* no counterpart"):  # it runs after Dense_1
        load_torch_weights(ours, theirs)
    report = verify(theirs, ours, X, levels=("forward", "gradients"), dtypes=("float64",))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    variables = jax.tree.map(lambda leaf: leaf, ours[1])
    kernel = variables["params"]["scan"]["attn"]["query"]["kernel"]
    variables["params"]["scan"]["attn"]["query"]["kernel"] = kernel[::-1]
    assert checked(theirs, (module, variables)).verdict == "mismatch"


class Named(nnx.Module):
    """`nnx.Sequential` has its layers in `.layers`."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.early, self.late = (nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(2))
        self.net = nnx.Sequential(nnx.Linear(DIM, DIM, rngs=rngs), jnp.tanh, nnx.Linear(DIM, DIM, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        return self.net(jnp.tanh(self.late(jnp.tanh(self.early(x)))))


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.net = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x).tanh()
        return self.net(x)


def named_pair() -> tuple[Numbered, Any]:
    torch.manual_seed(0)
    theirs = Numbered()
    return theirs, load_torch_weights(Named(), theirs, inputs=X)


def exchange(one: Any, other: Any) -> None:
    first, second = jnp.array(one.kernel[...]), jnp.array(other.kernel[...])
    one.kernel[...], other.kernel[...] = second, first


def turn(layer: Any) -> None:
    layer.kernel[...] = jnp.array(layer.kernel[...]).T


FAULTS: dict[str, Callable[[Any], None]] = {
    "named and numbered, exchanged": lambda model: exchange(model.early, model.late),
    "of the same name, exchanged": lambda model: exchange(model.net.layers[0], model.net.layers[2]),
    "of a name and of none, exchanged": lambda model: exchange(model.early, model.net.layers[2]),
    "named and numbered, turned": lambda model: turn(model.early),
    "of the same name, turned": lambda model: turn(model.net.layers[2]),
}


def test_named_layers_are_the_twins_of_numbered_ones_in_the_order_of_execution(tmp_path: Path) -> None:
    theirs, ours = named_pair()
    report = checked(theirs, ours)
    assert report.verdict == "pass", report.cause
    assert report.notes == ("weights that correspond: 4 by names, 4 by structure",)
    file = tmp_path / "map.toml"
    options = {"levels": ("forward",), "dtypes": ("float64",)}
    verify(theirs, ours, X, **options, write_map=file)
    written = verify(theirs, ours, X, **options, names=read_name_map(file))
    assert (written.verdict, written.notes) == ("pass", ())
    with pytest.raises(ValueError, match=r"early.* no counterpart in torch.*with inputs=, the order"):
        load_torch_weights(Named(), theirs)


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_exchanged_or_turned_are_called(fault: str) -> None:
    theirs, ours = named_pair()
    FAULTS[fault](ours)
    report = checked(theirs, ours)
    assert report.verdict == "mismatch"
    assert any(row.level == "weights" and row.verdict == "mismatch" for row in report.checks)
    assert report.cause is not None
    assert report.cause.startswith("weight ")
