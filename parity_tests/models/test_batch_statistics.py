"""Of which part of the batch BatchNorm's statistics are: of all of it, of all devices along an axis, of each part."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import outlook_jax
from outlook_jax.batch_norm import BatchNorm
from parity_tests.support.runners import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

C = 3


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return 2 + np.random.default_rng(0).standard_normal((8, 4, 5, C)) * np.arange(1, 9)[:, None, None, None]


def normalised(x: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    norm = BatchNorm(C, param_dtype=jnp.float64, **options)
    return norm(x), norm.mean[...], norm.var[...]


def in_torch(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    norm = torch.nn.BatchNorm2d(C, dtype=torch.float64)
    out = norm(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return out.detach().numpy(), norm.running_mean.numpy(), norm.running_var.numpy()


def far(ours: Any, theirs: Any) -> float:
    return max(relative_error(np.asarray(a), b) for a, b in zip(ours, theirs, strict=True))


def test_statistics_along_an_axis_are_those_of_the_whole_batch_on_every_device(x: np.ndarray) -> None:
    with jax.enable_x64(True):
        shares = jnp.asarray(x.reshape(4, 2, 4, 5, C))
        out, mean, variance = jax.vmap(lambda x: normalised(x, axis_name="i"), axis_name="i")(shares)
        whole = in_torch(x)
        assert far((out.reshape(x.shape), mean[0], variance[0]), whole) <= 1e-12
        assert far((mean[3], variance[3]), whole[1:]) <= 1e-12
        apart = jax.vmap(normalised)(shares)
        assert far((apart[0].reshape(x.shape),), whole[:1]) > 0.05


def test_ghost_batches_are_the_ranks_of_pytorch_and_the_running_statistics_those_of_rank_0(x: np.ndarray) -> None:
    with jax.enable_x64(True):
        out, mean, variance = normalised(jnp.asarray(x), ghost_batches=4)
        ranks = [in_torch(part) for part in x.reshape(4, 2, 4, 5, C)]
        assert far((out,), [np.concatenate([rank[0] for rank in ranks])]) <= 1e-12
        assert far((mean, variance), ranks[0][1:]) <= 1e-12
        assert far((mean,), [ranks[1][1]]) > 0.05


def test_evaluation_needs_no_axis_and_no_parts(x: np.ndarray) -> None:
    for options in ({"axis_name": "i"}, {"ghost_batches": 3}):
        with jax.enable_x64(True):
            out, *_ = normalised(jnp.asarray(x), use_running_average=True, **options)
            assert far((out,), [x / np.sqrt(1 + 1e-5)]) <= 1e-12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ghost_batches": 3}, "a batch of 8 has no 3 equal parts"),
        ({"ghost_batches": 0}, "at least 1, got 0"),
        ({"ghost_batches": 2, "axis_name": "i"}, "ghost_batches=2 takes statistics apart, axis_name='i' together"),
    ],
)
def test_what_cannot_be_is_refused_with_numbers(x: np.ndarray, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        normalised(jnp.asarray(x, jnp.float32), **options)


def test_a_model_hands_both_to_every_batch_norm() -> None:
    sizes: dict[str, Any] = {"layers": (1, 1, 1, 1), "img_size": 32}
    for options in ({"axis_name": "data"}, {"ghost_batches": 2}):
        model = nnx.eval_shape(
            lambda options=options: outlook_jax.volo("volo_d1_224", rngs=nnx.Rngs(0), **options, **sizes)
        )
        norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)]
        assert len(norms) == 3
        for name, value in options.items():
            assert {getattr(norm, name) for norm in norms} == {value}
