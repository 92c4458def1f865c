"""A training saved in one framework goes on in the other: same weights, same moments, same trajectory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common.weights import WeightsError, convert, read_arrays
from outlook_jax import load_training as load_jax
from outlook_jax import save_training as save_jax
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_torch import load_training as load_torch
from outlook_torch import save_training as save_torch
from parity_tests.support.runners import layer_pair
from parity_tests.support.volo import QUICKLY, draw_images, draw_weights, jax_volo, last, small_config, torch_volo

Array = np.ndarray
STEPS = 3

X = np.random.default_rng(1).standard_normal((2, 5, 6, 12))
TARGET = np.random.default_rng(2).standard_normal(X.shape)

make_layers = partial(layer_pair, 12, 3, qkv_bias=True, attn_drop=0.0)


def train_torch(model: Any, optimizer: torch.optim.Optimizer, loss: Callable[[Any], torch.Tensor]) -> list[float]:
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@partial(jax.jit, static_argnums=(0, 2), compiler_options=QUICKLY)
def step_jax(graph: Any, state: Any, loss: Callable[[Any], jax.Array]) -> Any:
    model, optimizer = nnx.merge(graph, state)
    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value, nnx.state((model, optimizer))


def train_jax(model: Any, optimizer: nnx.Optimizer, loss: Callable[[Any], jax.Array]) -> list[float]:
    losses = []
    for _ in range(STEPS):
        graph, state = nnx.split((model, optimizer))
        value, state = step_jax(graph, state, loss)
        nnx.update((model, optimizer), state)
        losses.append(float(value))
    return losses


def torch_loss(layer: Any) -> torch.Tensor:
    return ((layer(torch.from_numpy(X)) - torch.from_numpy(TARGET)) ** 2).mean()


def jax_loss(layer: Any) -> jax.Array:
    return jnp.mean((layer(jnp.asarray(X)) - jnp.asarray(TARGET)) ** 2)


def assert_close(found: dict[str, Array], expected: dict[str, Array], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() <= bound * np.abs(array).max(), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_in_the_other_framework_as_in_its_own(tmp_path: Path, name: str) -> None:
    """Three steps in PyTorch, then three in both from the file; then from JAX's file three in PyTorch and in JAX."""
    file = tmp_path / "a.safetensors"
    torch_layer, jax_layer = make_layers(seed=0)
    torch_optimizer = OPTIMIZERS[name].torch(torch_layer.parameters())
    jax_optimizer = nnx.Optimizer(jax_layer, OPTIMIZERS[name].jax(), wrt=nnx.Param)
    train_torch(torch_layer, torch_optimizer, torch_loss)
    save_torch(torch_layer, torch_optimizer, file, step=STEPS)
    assert load_jax(jax_layer, jax_optimizer, file) == STEPS

    theirs = train_torch(torch_layer, torch_optimizer, torch_loss)
    ours = train_jax(jax_layer, jax_optimizer, jax_loss)
    assert np.allclose(ours, theirs, rtol=1e-12)
    assert ours[0] != ours[-1]
    assert_close(outlook_jax.export_weights(jax_layer), outlook_torch.export_weights(torch_layer), 1e-12)

    save_jax(jax_layer, jax_optimizer, file)
    again, _ = make_layers(seed=1)
    again_optimizer = OPTIMIZERS[name].torch(again.parameters())
    assert load_torch(again, again_optimizer, file) == 2 * STEPS
    theirs = train_torch(again, again_optimizer, torch_loss)
    ours = train_jax(jax_layer, jax_optimizer, jax_loss)
    assert np.allclose(theirs, ours, rtol=1e-12)
    assert_close(outlook_torch.export_weights(again), outlook_jax.export_weights(jax_layer), 1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_without_its_moments_would_go_elsewhere(tmp_path: Path, name: str) -> None:
    layer, _ = make_layers(seed=0)
    optimizer = OPTIMIZERS[name].torch(layer.parameters())
    train_torch(layer, optimizer, torch_loss)
    save_torch(layer, optimizer, tmp_path / "a.npz", step=STEPS)
    other, _ = make_layers(seed=1)
    outlook_torch.load_weights(other, tmp_path / "a.npz", prefix="model")
    forgetful = OPTIMIZERS[name].torch(other.parameters())
    train_torch(layer, optimizer, torch_loss)
    train_torch(other, forgetful, torch_loss)
    with pytest.raises(AssertionError):
        assert_close(outlook_torch.export_weights(other), outlook_torch.export_weights(layer), 1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".orbax"])
def test_every_bit_comes_back_in_either_framework(tmp_path: Path, suffix: str) -> None:
    layer, twin = make_layers(seed=0)
    optimizer = OPTIMIZERS["AdamW"].torch(layer.parameters())
    twin_optimizer = nnx.Optimizer(twin, OPTIMIZERS["AdamW"].jax(), wrt=nnx.Param)
    train_torch(layer, optimizer, torch_loss)
    save_torch(layer, optimizer, tmp_path / "a.npz")
    load_jax(twin, twin_optimizer, tmp_path / "a.npz")
    save_jax(twin, twin_optimizer, tmp_path / f"b{suffix}")
    load_torch(layer, optimizer, tmp_path / f"b{suffix}")
    save_torch(layer, optimizer, tmp_path / "b.npz")
    load_jax(twin, twin_optimizer, tmp_path / "b.npz")
    save_jax(twin, twin_optimizer, tmp_path / "c.npz")
    files = [read_arrays(tmp_path / f"{name}.npz") for name in "abc"]
    assert files[0]["optimizer.step"] == STEPS
    kept = {name.split(".")[1] for name in files[0] if name.startswith("optimizer.")}
    assert kept == {"exp_avg", "exp_avg_sq", "step"}
    for found in files[1:]:
        assert found.keys() == files[0].keys()
        assert all(found[name].tobytes() == files[0][name].tobytes() for name in found)


def test_before_the_first_step_the_moments_are_zero(tmp_path: Path) -> None:
    for name in OPTIMIZERS:
        layer, twin = make_layers(seed=0)
        save_torch(layer, OPTIMIZERS[name].torch(layer.parameters()), tmp_path / "a.npz", step=0)
        save_jax(twin, nnx.Optimizer(twin, OPTIMIZERS[name].jax(), wrt=nnx.Param), tmp_path / "b.npz")
        a, b = (read_arrays(tmp_path / f"{file}.npz") for file in "ab")
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_weights_of_a_training_load_and_convert_by_their_prefix(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    save_torch(layer, torch.optim.AdamW(layer.parameters()), tmp_path / "a.safetensors")
    outlook_jax.load_weights(twin, tmp_path / "a.safetensors", prefix="model")
    with pytest.raises(WeightsError, match="prefix='model'"):
        outlook_jax.load_weights(twin, tmp_path / "a.safetensors")
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.npz", prefix="model").written_naming == "flax"


def test_chains_and_schedules_of_optax_go_on_at_the_step(tmp_path: Path) -> None:
    _, twin = make_layers(seed=0)
    schedule = optax.cosine_decay_schedule(1e-3, 100)
    make = partial(nnx.Optimizer, tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), wrt=nnx.Param)
    first = make(twin)
    save_jax(twin, first, tmp_path / "a.npz", step=7)
    second = make(twin)
    assert load_jax(twin, second, tmp_path / "a.npz") == 7
    flat = dict(nnx.to_flat_state(nnx.state(second)))
    counts = {path: int(variable.get_value()) for path, variable in flat.items() if path[-1] in ("count", "step")}
    assert len(counts) == 3
    assert set(counts.values()) == {7}


def test_part_of_the_parameters_may_be_trained(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    is_proj = nnx.All(nnx.Param, nnx.PathContains("proj"))
    optimizer = torch.optim.AdamW(layer.proj.parameters())
    save_torch(layer, optimizer, tmp_path / "a.npz")
    twin_optimizer = nnx.Optimizer(twin, optax.adamw(1e-3), wrt=is_proj)
    load_jax(twin, twin_optimizer, tmp_path / "a.npz")
    save_jax(twin, twin_optimizer, tmp_path / "b.npz")
    assert read_arrays(tmp_path / "a.npz").keys() == read_arrays(tmp_path / "b.npz").keys()


# Errors


def test_what_does_not_fit_is_an_error_and_nothing_is_loaded(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    adamw, sgd = torch.optim.AdamW(layer.parameters()), torch.optim.SGD(layer.parameters(), momentum=0.9)
    save_torch(layer, adamw, tmp_path / "a.npz")
    before = outlook_torch.export_weights(layer)
    with pytest.raises(WeightsError, match="the moments exp_avg, exp_avg_sq, the optimizer needs momentum_buffer"):
        load_torch(layer, sgd, tmp_path / "a.npz")
    with pytest.raises(WeightsError, match="the optimizer needs none"):
        load_jax(twin, nnx.Optimizer(twin, optax.sgd(1e-3), wrt=nnx.Param), tmp_path / "a.npz")
    outlook_torch.save_weights(layer, tmp_path / "b.npz")
    with pytest.raises(WeightsError, match=r"no training, it has no count of steps, optimizer\.step"):
        load_torch(layer, adamw, tmp_path / "b.npz")
    save_torch(layer, torch.optim.AdamW(layer.proj.parameters()), tmp_path / "c.npz")
    with pytest.raises(WeightsError, match=r"optimizer\.exp_avg(?s:.*)missing \(4\)(?s:.*)v\.weight"):
        load_torch(layer, adamw, tmp_path / "c.npz")
    for name, array in outlook_torch.export_weights(layer).items():
        assert np.array_equal(array, before[name])


def test_optimizers_of_other_kinds_are_named(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    for optimizer, words in (
        (torch.optim.AdamW(layer.parameters(), amsgrad=True), "max_exp_avg_sq"),
        (torch.optim.RMSprop(layer.parameters()), "the state of RMSprop"),
    ):
        with pytest.raises(TypeError, match=f"the optimizer keeps {words}, of which nothing is known; known: exp_avg"):
            save_torch(layer, optimizer, tmp_path / "a.npz")
    with pytest.raises(TypeError, match="of which nothing is known"):
        save_jax(twin, nnx.Optimizer(twin, optax.amsgrad(1e-3), wrt=nnx.Param), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="SGD counts no steps; give step="):
        save_torch(layer, torch.optim.SGD(layer.parameters()), tmp_path / "a.npz")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="2 of the optimizer's 2 parameters are not of this model"):
        save_torch(layer, torch.optim.AdamW(other.parameters()), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


# A whole model


@pytest.mark.slow  # compiles the training step of a VOLO twice
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_of_a_volo_goes_on_in_the_other_framework(tmp_path: Path, name: str) -> None:
    config = small_config()
    images = draw_images(config)
    labels = np.array([1, 4])

    def loss_torch(model: Any) -> torch.Tensor:
        logits, aux, _ = model.forward_train(torch.from_numpy(images))
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)) + (aux**2).mean()

    def loss_jax(model: Any) -> jax.Array:
        logits, aux, _ = model.forward_train(jnp.asarray(last(images)))
        picked = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
        return picked.mean() + jnp.mean(aux**2)

    model = torch_volo(config, draw_weights(config)).train()
    twin = jax_volo(config, draw_weights(config, seed=9))
    twin.train()
    optimizer = OPTIMIZERS[name].torch(model.parameters())
    twin_optimizer = nnx.Optimizer(twin, OPTIMIZERS[name].jax(), wrt=nnx.Param)
    train_torch(model, optimizer, loss_torch)
    save_torch(model, optimizer, tmp_path / "a.safetensors", step=STEPS)
    assert load_jax(twin, twin_optimizer, tmp_path / "a.safetensors") == STEPS
    theirs, ours = train_torch(model, optimizer, loss_torch), train_jax(twin, twin_optimizer, loss_jax)
    assert np.allclose(ours, theirs, rtol=1e-10)
    assert_close(outlook_jax.export_weights(twin), outlook_torch.export_weights(model), 1e-9)
