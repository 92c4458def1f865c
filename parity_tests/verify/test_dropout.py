"""Dropout masks that both twins share."""

import random
from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from outlook_parity import NameMap, Report, load_torch_weights, verify
from outlook_parity.backends.torch.dropout import shared_masks
from outlook_parity.core.dropout import Draws

pytestmark = pytest.mark.usefixtures("quick_compilation")


def draw(shape: tuple[int, ...], rate: float = 0.25, seed: int = 0, before: int = 0) -> np.ndarray:
    draws = Draws(seed)
    for _ in range(before):
        draws.uniform((3,), "")
    return draws.mask(shape, rate, "")


def test_the_same_draw_of_a_step_is_the_same_and_others_are_not() -> None:
    shape = (40, 50)
    assert np.array_equal(draw(shape), draw(shape))
    assert not np.array_equal(draw(shape), draw(shape, before=1))
    assert not np.array_equal(draw(shape), draw(shape, seed=1))
    draws = Draws(0)
    first = draws.mask(shape, 0.25, "a")
    draws.mask(shape, 0.25, "b")
    draws.begin()
    assert np.array_equal(draws.mask(shape, 0.25, "a"), first)
    assert [drawn.where for drawn in draws.drawn] == ["a"]


def test_a_mask_drops_at_its_rate_and_keeps_the_mean() -> None:
    mask = draw((100, 100))
    assert set(np.unique(mask)) == {0.0, 1 / 0.75}
    assert mask.mean() == pytest.approx(1.0, abs=0.02)
    assert not draw((10, 10), rate=1.0).any()


@pytest.mark.parametrize("places", [(5, 5), (1, 5), (5, 1)], ids=str)
def test_masks_of_attention_are_the_same_in_either_order_of_the_places(places: tuple[int, int]) -> None:
    mask, other = draw((2, 3, *places)), draw((2, 3, *places[::-1]))
    assert np.array_equal(mask, other.swapaxes(-1, -2))
    assert len({row.tobytes() for row in mask.reshape(6, -1)}) > 3  # each head has its own
    outlook = draw((2, 3, 4, 2, 9, 9))
    assert not np.array_equal(outlook, outlook.swapaxes(-1, -2))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 6, 5, 4), (0, 2, 3, 1)),
        ((2, 6, 6, 6), (0, 2, 3, 1)),
        ((4, 4, 5, 6), (0, 2, 3, 1)),
        ((3, 7, 5), (1, 0, 2)),
        ((2, 3, 4, 5, 6), (0, 2, 3, 4, 1)),
    ],
    ids=str,
)
def test_masks_of_maps_and_sequences_are_the_same_in_any_order_of_their_axes(
    shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    mask = draw(shape)
    assert np.array_equal(mask.transpose(axes), draw(tuple(shape[axis] for axis in axes)))
    assert 0.6 < (mask > 0).mean() < 0.9


class TorchDrops(torch.nn.Module):
    """A convolution, what is to be dropped of its map, and the mean of it."""

    def __init__(self, drop: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Linear(6, 2)
        self.drop = drop

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y = self.conv(images)
        return self.head((self.drop(y) if self.training else y).square().mean((2, 3)))


class NNXDrops(nnx.Module):
    def __init__(self, together: tuple[int, ...]) -> None:
        rngs = nnx.Rngs(0)
        self.conv, self.head = nnx.Conv(3, 6, (3, 3), padding=1, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
        self.drop = nnx.Dropout(0.4, broadcast_dims=together, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        return self.head((self.drop(self.conv(images)) ** 2).mean((1, 2)))


class LinenDrops(linen.Module):
    together: tuple[int, ...]

    @linen.compact
    def __call__(self, images: Any, train: bool = False) -> Any:
        y = linen.Conv(6, (3, 3), padding=1, name="conv")(images)
        y = linen.Dropout(0.4, broadcast_dims=self.together, deterministic=not train)(y)
        return linen.Dense(2, name="head")((y**2).mean((1, 2)))


def nnx_drops(together: tuple[int, ...]) -> Any:
    return NNXDrops(together)


def linen_drops(together: tuple[int, ...]) -> Any:
    module = LinenDrops(together)
    return module, module.init(jax.random.key(0), jnp.ones((1, 6, 5, 3)))


def bernoulli(x: torch.Tensor) -> torch.Tensor:
    return x * x.new_empty((len(x), 1, 1, 1)).bernoulli_(0.6) / 0.6


def floor(x: torch.Tensor) -> torch.Tensor:
    return x * (0.6 + torch.rand((len(x), 1, 1, 1), dtype=x.dtype)).floor() / 0.6


# How PyTorch drops, and which axes Flax's dropout must drop together for the same.
DROPS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "numbers": (lambda x: torch.nn.functional.dropout(x, 0.4), ()),
    "channels": (lambda x: torch.nn.functional.dropout2d(x, 0.4), (1, 2)),
    "samples, by bernoulli_": (bernoulli, (1, 2, 3)),
    "samples, by rand": (floor, (-3, -2, -1)),
}


def trained(name: str, make: Callable[[tuple[int, ...]], Any], together: tuple[int, ...]) -> Report:
    theirs, images = TorchDrops(DROPS[name][0]), np.random.default_rng(0).standard_normal((8, 6, 5, 3))
    names = NameMap(torch_axes=(0, 3, 1, 2))
    ours = load_torch_weights(make(together), theirs, names)
    return verify(theirs, ours, images, levels=["training"], dtypes=["float64"], names=names, steps=2)


@pytest.mark.parametrize("make", [nnx_drops, linen_drops], ids=["nnx", "linen"])
@pytest.mark.parametrize("name", DROPS)
def test_whatever_drops_the_same_trains_alike(name: str, make: Any) -> None:
    report = trained(name, make, DROPS[name][1])
    assert report.verdict == "pass", str(report)


class UniformDrops(NNXDrops):
    """What is dropped of samples, by `jax.random.uniform`, as in FlaxBeit."""

    def __init__(self, keep: float) -> None:
        super().__init__(())
        self.drop.rate, self.keep = 0.0, keep

    def __call__(self, images: Any) -> Any:
        y = self.conv(images)
        if not self.drop.deterministic:
            numbers = jax.random.uniform(jax.random.key(0), shape=(len(y), 1, 1, 1), dtype=y.dtype)
            y = y * jnp.floor(self.keep + numbers) / self.keep
        return self.head((y**2).mean((1, 2)))


@pytest.mark.parametrize(("keep", "verdict"), [(0.6, "pass"), (0.7, "mismatch")])
def test_uniform_numbers_of_jax_are_those_of_torch(keep: float, verdict: str) -> None:
    report = trained("samples, by rand", lambda together: UniformDrops(keep), ())
    assert report.verdict == verdict, str(report)


@pytest.mark.parametrize("make", [nnx_drops, linen_drops], ids=["nnx", "linen"])
@pytest.mark.parametrize(("name", "together"), [("numbers", (1, 2)), ("channels", ()), ("numbers", (3,))])
def test_what_drops_other_numbers_together_is_a_mismatch(name: str, together: tuple[int, ...], make: Any) -> None:
    report = trained(name, make, together)
    assert report.verdict == "mismatch"
    assert "1 dropout masks in torch, 1 in jax; they differ from mask 1 on" in str(report.cause)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"}], ids=str)
def test_attention_under_a_mask_drops_what_the_masks_say(options: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(5, 5).tril().bool()
    masks = {"bool": keep, "float": torch.zeros(5, 5, dtype=torch.float64).masked_fill(~keep, -torch.inf)}
    options = options | ({"attn_mask": masks[options["attn_mask"]]} if "attn_mask" in options else {})
    with shared_masks(torch.nn.Identity(), draws := Draws(0)):
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **options)
    weights = (q @ k.mT / 2).masked_fill(~keep, -torch.inf).softmax(-1)
    assert torch.equal(found, weights * torch.from_numpy(Draws(0).mask((2, 2, 5, 5), 0.3, "")) @ v)
    assert len(draws.drawn) == 1


@pytest.mark.parametrize("keep", [0.0, 1.0], ids=["all dropped", "none"])
def test_attention_and_dropout_take_their_arguments_by_keyword(keep: float) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with shared_masks(torch.nn.Identity(), Draws(0, keep_all=keep == 1.0)):
        found = torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=1 - keep / 2)
        others = [
            torch.nn.functional.dropout(input=v, p=1 - keep / 2),
            torch.nn.functional.dropout2d(input=v, p=1 - keep / 2),
            v * (torch.rand(size=(5, 4)) > 1 - keep),
        ]
    assert torch.allclose(found, 2 * keep * (q @ k.mT / 2).softmax(-1) @ v)
    for other, factor in zip(others, (2.0, 2.0, 1.0), strict=True):
        assert torch.equal(other, factor * keep * v)


class TorchLayerDrop(torch.nn.Module):
    """Two layers, each of which is left out in training at a rate, as in BART, and dropout behind."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.drop = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(6)), torch.nn.Dropout(0.4)
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not (self.training and torch.rand([]) < self.rate):
                x = x + layer(x).tanh()
        return self.drop(x)


class LayerDrop(nnx.Module):
    def __init__(self, rate: float | None) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(6)])
        self.drop, self.rate = nnx.Dropout(0.4, rngs=rngs), rate

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            left_out = self.rate is not None and random.uniform(0, 1) < self.rate and not self.drop.deterministic
            x = x if left_out else x + jnp.tanh(layer(x))
        return self.drop(x)


@pytest.mark.parametrize(
    ("theirs", "ours", "verdict"),
    [(0.5, 0.5, "pass"), (0.5, 0.1, "mismatch"), (0.0, None, "pass"), (0.5, None, "mismatch")],
)
def test_layers_left_out_by_single_random_numbers_are_the_same(theirs: float, ours: float | None, verdict: str) -> None:
    module = TorchLayerDrop(theirs)
    port = load_torch_weights(LayerDrop(ours), module)
    x = np.random.default_rng(0).standard_normal((8, 6))
    report = verify(module, port, x, levels=["training"], dtypes=["float64"], steps=1)
    assert report.verdict == verdict, str(report)
    assert any("they decide nothing" in note for note in report.notes) == (theirs == 0.0)


class TorchCrossed(torch.nn.Module):
    """Attention over itself, whose masks JAX draws for all samples, and dropout that the other twin may lack."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.drop = torch.nn.Linear(6, 6), torch.nn.Dropout(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (x @ x.mT).softmax(-1)[:, None]
        weights = torch.nn.functional.dropout(weights, 0.25, self.training)
        return self.drop(self.linear((weights @ x[:, None])[:, 0]))


class Crossed(nnx.Module):
    def __init__(self) -> None:
        self.linear, self.drop = nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Dropout(0.0, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        weights = jax.nn.softmax(x @ x.swapaxes(-1, -2))[:, None]
        if not self.drop.deterministic:
            weights = weights * jax.random.bernoulli(jax.random.key(0), 0.75, (1, 1, *weights.shape[-2:])) / 0.75
        return self.drop(self.linear((weights @ x[:, None])[:, 0]))


def test_a_dropout_that_is_missing_is_placed_behind_masks_that_cannot_be_shared() -> None:
    theirs = TorchCrossed()
    ours = load_torch_weights(Crossed(), theirs)
    x = np.random.default_rng(0).standard_normal((2, 5, 6))
    report = verify(theirs, ours, x, levels=["training"], dtypes=["float64"], steps=1)
    assert report.first_divergence == "drop"
    assert "2 dropout masks in torch, 1 in jax; they differ from mask 2 on, in drop" in str(report.cause)


def test_random_numbers_of_its_own_in_training_excuse_no_twin() -> None:
    names = NameMap(torch_axes=(0, 3, 1, 2))
    theirs = TorchDrops(lambda x: x + torch.randn_like(x))
    images, before = np.random.default_rng(0).standard_normal((8, 6, 5, 3)), torch.random.get_rng_state()
    ours = load_torch_weights(nnx_drops(()), theirs, names)
    ours.drop.rate = 0
    report = verify(theirs, ours, images, levels=["training"], dtypes=["float64"], names=names, steps=1)
    wrong = {row.name for row in report.checks if row.verdict == "mismatch"}
    assert {"SGD: losses", "SGD: conv.weight", "AdamW: losses"} <= wrong
    assert torch.equal(torch.random.get_rng_state(), before)
