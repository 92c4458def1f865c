"""A training saved in one framework continues in the other: weights, moments, trajectory."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common.weights import WeightsError, convert, read_arrays
from outlook_jax import load_training as load_jax
from outlook_jax import save_training as save_jax
from outlook_parity.core.optimizers import BETAS, EPSILON, LEARNING_RATE, OPTIMIZERS, WEIGHT_DECAY
from outlook_torch import load_training as load_torch
from outlook_torch import save_training as save_torch
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.runners import layer_pair
from parity_tests.support.volo import draw_images, draw_weights, jax_volo, last, small_config, torch_volo

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
def test_training_continues_in_the_other_framework_as_in_its_own(tmp_path: Path, name: str) -> None:
    """Three steps in PyTorch, then three in both from the file; then from JAX's file three in PyTorch and in JAX."""
    file = tmp_path / "a.safetensors"
    torch_layer, jax_layer = make_layers(seed=0)
    torch_optimizer = OPTIMIZERS[name].torch(torch_layer.parameters())
    jax_optimizer = nnx.Optimizer(jax_layer, OPTIMIZERS[name].jax(), wrt=nnx.Param)
    train_torch(torch_layer, torch_optimizer, torch_loss)
    save_torch(torch_layer, torch_optimizer, file, step=STEPS)
    assert load_jax(jax_layer, jax_optimizer, file) == STEPS

    torch_losses = train_torch(torch_layer, torch_optimizer, torch_loss)
    jax_losses = train_jax(jax_layer, jax_optimizer, jax_loss)
    assert np.allclose(jax_losses, torch_losses, rtol=1e-12)
    assert jax_losses[0] != jax_losses[-1]
    assert_close(outlook_jax.export_weights(jax_layer), outlook_torch.export_weights(torch_layer), 1e-12)

    save_jax(jax_layer, jax_optimizer, file)
    again, _ = make_layers(seed=1)
    again_optimizer = OPTIMIZERS[name].torch(again.parameters())
    assert load_torch(again, again_optimizer, file) == 2 * STEPS
    torch_losses = train_torch(again, again_optimizer, torch_loss)
    jax_losses = train_jax(jax_layer, jax_optimizer, jax_loss)
    assert np.allclose(torch_losses, jax_losses, rtol=1e-12)
    assert_close(outlook_torch.export_weights(again), outlook_jax.export_weights(jax_layer), 1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_without_its_moments_diverges(tmp_path: Path, name: str) -> None:
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


def test_chains_and_schedules_of_optax_continue_at_the_step(tmp_path: Path) -> None:
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


# Wrappers of optimizers

ADAMW = OPTIMIZERS["AdamW"]


def settings() -> dict[str, Any]:
    return dict(zip(("b1", "b2"), BETAS, strict=True)) | {"eps": EPSILON, "weight_decay": WEIGHT_DECAY}


def by_name(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: "frozen" if path[0].key == "v" else "trained", params)


def two_gradients_each(tx: optax.GradientTransformation) -> optax.MultiSteps:
    wide = {"accumulator_dtype": jnp.float64} if "accumulator_dtype" in signature(optax.MultiSteps).parameters else {}
    return optax.MultiSteps(tx, 2, **wide)  # before Optax had the argument, sums had the dtype of the parameters


WRAPPED: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e6), optax.stateless(lambda g, _: g), ADAMW.jax()),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1e6)), ("adamw", ADAMW.jax())),
    "masked": lambda: optax.masked(ADAMW.jax(), lambda params: jax.tree.map(lambda _: True, params)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(LEARNING_RATE, **settings()),
    "inject_hyperparams, a schedule": lambda: optax.inject_hyperparams(optax.adamw)(
        optax.constant_schedule(LEARNING_RATE), **settings()
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(ADAMW.jax(), 3),
    "MultiSteps": lambda: two_gradients_each(ADAMW.jax()),
    "MultiSteps as a transformation": lambda: two_gradients_each(ADAMW.jax()).gradient_transformation(),
    "in one another": lambda: two_gradients_each(
        optax.apply_if_finite(optax.chain(optax.clip(1e6), ADAMW.jax()), 3),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_optimizer_makes_the_steps_that_the_other_framework_would(tmp_path: Path, name: str) -> None:
    layer, twin = make_layers(seed=0)
    optimizer = ADAMW.torch(layer.parameters())
    train_torch(layer, optimizer, torch_loss)
    save_torch(layer, optimizer, tmp_path / "a.npz")
    twin_optimizer = nnx.Optimizer(twin, WRAPPED[name](), wrt=nnx.Param)
    assert load_jax(twin, twin_optimizer, tmp_path / "a.npz") == STEPS
    train_torch(layer, optimizer, torch_loss)
    for _ in range(2 if "MultiSteps" in repr(type(twin_optimizer.opt_state)) else 1):
        train_jax(twin, twin_optimizer, jax_loss)
    assert_close(outlook_jax.export_weights(twin), outlook_torch.export_weights(layer), 1e-12)
    save_jax(twin, twin_optimizer, tmp_path / "b.npz")
    again, _ = make_layers(seed=1)
    again_optimizer = ADAMW.torch(again.parameters())
    assert load_torch(again, again_optimizer, tmp_path / "b.npz") == 2 * STEPS
    train_torch(again, again_optimizer, torch_loss)
    train_torch(layer, optimizer, torch_loss)
    assert_close(outlook_torch.export_weights(again), outlook_torch.export_weights(layer), 1e-12)


def test_model_and_optimizer_makes_the_step_that_the_other_framework_would(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    optimizer = ADAMW.torch(layer.parameters())
    train_torch(layer, optimizer, torch_loss)
    save_torch(layer, optimizer, tmp_path / "a.npz")
    both = nnx.ModelAndOptimizer(twin, ADAMW.jax())
    load_jax(twin, both, tmp_path / "a.npz")
    step = nnx.jit(lambda both: both.update(nnx.grad(jax_loss)(both.model)))
    for _ in range(STEPS):
        step(both)
    train_torch(layer, optimizer, torch_loss)
    assert_close(outlook_jax.export_weights(twin), outlook_torch.export_weights(layer), 1e-12)


def test_a_partition_carries_the_moments_of_what_it_trains(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    layer.v.requires_grad_(False)
    optimizer = ADAMW.torch([*layer.attn.parameters(), *layer.proj.parameters()])
    train_torch(layer, optimizer, torch_loss)
    save_torch(layer, optimizer, tmp_path / "a.npz")
    tx = optax.partition({"trained": ADAMW.jax(), "frozen": optax.set_to_zero()}, by_name)
    twin_optimizer = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    load_jax(twin, twin_optimizer, tmp_path / "a.npz")
    train_jax(twin, twin_optimizer, jax_loss)
    train_torch(layer, optimizer, torch_loss)
    assert_close(outlook_jax.export_weights(twin), outlook_torch.export_weights(layer), 1e-12)
    save_jax(twin, twin_optimizer, tmp_path / "b.npz")
    assert load_torch(layer, optimizer, tmp_path / "b.npz") == 2 * STEPS


def test_adam_and_sgd_side_by_side_are_carried_within_jax(tmp_path: Path) -> None:
    _, twin = make_layers(seed=0)
    tx = optax.partition({"trained": ADAMW.jax(), "frozen": optax.sgd(1e-3, momentum=0.9)}, by_name)
    first = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    train_jax(twin, first, jax_loss)
    save_jax(twin, first, tmp_path / "a.npz")
    _, again = make_layers(seed=1)
    second = nnx.Optimizer(again, tx, wrt=nnx.Param)
    load_jax(again, second, tmp_path / "a.npz")
    for model, optimizer in ((twin, first), (again, second)):
        train_jax(model, optimizer, jax_loss)
    assert_close(outlook_jax.export_weights(again), outlook_jax.export_weights(twin), 0.0)


def test_accumulated_gradients_are_not_dropped_in_silence(tmp_path: Path) -> None:
    _, twin = make_layers(seed=0)
    optimizer = nnx.Optimizer(twin, optax.MultiSteps(optax.adam(1e-3), 4), wrt=nnx.Param)
    nnx.jit(lambda twin, optimizer: optimizer.update(twin, nnx.grad(jax_loss)(twin)))(twin, optimizer)
    with pytest.raises(ValueError, match=r"optax\.MultiSteps has accumulated 1 gradients for its next step"):
        save_jax(twin, optimizer, tmp_path / "a.npz")


# Errors


def test_a_training_that_does_not_match_is_an_error_and_nothing_is_loaded(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    adamw, sgd = torch.optim.AdamW(layer.parameters()), torch.optim.SGD(layer.parameters(), momentum=0.9)
    save_torch(layer, adamw, tmp_path / "a.npz")
    before = outlook_torch.export_weights(layer)
    with pytest.raises(WeightsError, match="the moments exp_avg, exp_avg_sq, the optimizer needs momentum_buffer"):
        load_torch(layer, sgd, tmp_path / "a.npz")
    with pytest.raises(WeightsError, match="the optimizer needs none"):
        load_jax(twin, nnx.Optimizer(twin, optax.sgd(1e-3), wrt=nnx.Param), tmp_path / "a.npz")
    outlook_torch.save_weights(layer, tmp_path / "b.npz")
    with pytest.raises(WeightsError, match=r"not a training: it has no step count optimizer\.step"):
        load_torch(layer, adamw, tmp_path / "b.npz")
    save_torch(layer, torch.optim.AdamW(layer.proj.parameters()), tmp_path / "c.npz")
    with pytest.raises(WeightsError, match=r"optimizer\.exp_avg(?s:.*)missing \(4\)(?s:.*)v\.weight"):
        load_torch(layer, adamw, tmp_path / "c.npz")
    for name, array in outlook_torch.export_weights(layer).items():
        assert np.array_equal(array, before[name])


def test_an_optimizer_without_a_step_count_or_of_another_model_is_an_error(tmp_path: Path) -> None:
    layer, twin = make_layers(seed=0)
    with pytest.raises(ValueError, match="SGD counts no steps; give step="):
        save_torch(layer, torch.optim.SGD(layer.parameters()), tmp_path / "a.npz")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="2 of the optimizer's 2 parameters are not of this model"):
        save_torch(layer, torch.optim.AdamW(other.parameters()), tmp_path / "a.npz")
    _, second = make_layers(seed=1)
    with pytest.raises(ValueError, match="the ModelAndOptimizer is of another model"):
        save_jax(twin, nnx.ModelAndOptimizer(second, optax.adam(1e-3)), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


# Which optimizer it is: by what it does, since many keep moments of the same names


class OwnStep(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


class Wrapping(torch.optim.Optimizer):
    """Wraps an optimizer as Accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


def is_optimizer(function: Any) -> bool:
    """Whether a function makes one of Optax's optimizers."""
    return (
        isinstance(function, FunctionType | partial)
        and next(iter(inspect.signature(function).parameters), "") == "learning_rate"
    )


# Arguments that some of them have no default for.
ANY = {
    "learning_rate": 1e-3,
    "b2": 0.99,
    "alpha": 0.5,
    "beta": 0.5,
    "l2_norm_clip": 1.0,
    "noise_multiplier": 1,
    "seed": 0,
}
OPTAX = {
    f"{name}{suffix}": partial(getattr(module, name), **more)
    for module in (optax, optax.contrib)
    for name in dir(module)
    if not name.startswith(("_", "scale_by_")) and is_optimizer(getattr(module, name))
    for suffix, more in {"": {}, " with nesterov": {"nesterov": True}}.items()
    if more.keys() <= inspect.signature(getattr(module, name)).parameters.keys()
}
OPTAX_CARRIED = {"adam", "adamw", "sgd", "sgd with nesterov"}
TORCH_CARRIED = {"Adam", "AdamW", "SGD"}
TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}


def test_there_are_many_optimizers_to_tell_apart() -> None:
    assert OPTAX.keys() >= OPTAX_CARRIED | {"adamax", "adabelief", "nadam", "radam", "yogi", "lion", "amsgrad", "lamb"}
    assert TORCH.keys() >= TORCH_CARRIED | {"Adamax", "NAdam", "RAdam", "Adafactor", "RMSprop", "Adagrad"}


@pytest.mark.parametrize("name", sorted(OPTAX.keys() - OPTAX_CARRIED))
def test_another_optimizer_of_optax_is_named_and_neither_saved_nor_loaded(tmp_path: Path, name: str) -> None:
    needed = inspect.signature(OPTAX[name]).parameters
    given = {key: ANY[key] for key, value in needed.items() if value.default is value.empty and key in ANY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the seed of noise
        tx = OPTAX[name](**given)
        layer, twin = make_layers(seed=0)
        optimizer = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"the optimizer is optax's \w+.*; carried are Adam and AdamW \(torch"):
        save_jax(twin, optimizer, tmp_path / "a.npz")
    save_torch(layer, torch.optim.AdamW(layer.parameters()), tmp_path / "b.npz")
    with pytest.raises(TypeError, match="the optimizer is optax's"):
        load_jax(twin, optimizer, tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        *((kind, name) for name, kind in TORCH.items() if name not in TORCH_CARRIED | {"SparseAdam", "LBFGS", "Muon"}),
        (lambda parameters: torch.optim.LBFGS(parameters), "LBFGS"),
        (lambda parameters: torch.optim.AdamW(parameters, amsgrad=True), "AdamW with amsgrad=True"),
        (lambda parameters: torch.optim.SGD(parameters, momentum=0.9, dampening=0.1), "SGD with dampening"),
        (OwnStep, "OwnStep"),
        (
            lambda parameters: Wrapping(torch.optim.AdamW(parameters)),
            r"Wrapping, whose state is not carried; pass the one it wraps, its \.optimizer",
        ),
    ],
)
def test_another_optimizer_of_pytorch_is_named_and_neither_saved_nor_loaded(
    tmp_path: Path, make: Any, words: str
) -> None:
    layer, twin = make_layers(seed=0)
    optimizer = make(list(layer.parameters()))
    with pytest.raises(TypeError, match=f"the optimizer is {words}.*; carried are Adam and AdamW"):
        save_torch(layer, optimizer, tmp_path / "a.npz", step=1)
    save_jax(twin, nnx.Optimizer(twin, optax.adam(1e-3), wrt=nnx.Param), tmp_path / "b.npz")
    with pytest.raises(TypeError, match=f"the optimizer is {words}"):
        load_torch(layer, optimizer, tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: optax.chain(optax.scale_by_adam(), optax.trace(0.9)),
            "optax.scale_by_adam and optax.trace of the same",
        ),
        (lambda: optax.chain(optax.adam(1e-3), optax.scale_by_trust_ratio()), "optax's scale_by_trust_ratio"),
        (lambda: optax.flatten(optax.adam(1e-3)), "optax's flatten"),
        (lambda: optax.conditionally_mask(optax.adam(1e-3), lambda step: step > 3), "optax's conditionally_mask"),
        (lambda: optax.contrib.schedule_free(optax.adam(1e-3), 1e-3), "optax's schedule_free"),
        (lambda: optax.chain(optax.adam(1e-3), own_momentum()), r"or has the part parity_tests\.own_momentum"),
    ],
)
def test_wrappers_and_chains_that_mean_something_else_are_named(tmp_path: Path, make: Any, words: str) -> None:
    _, twin = make_layers(seed=0)
    with pytest.raises(TypeError, match=f"the optimizer is {words}"):
        save_jax(twin, nnx.Optimizer(twin, make(), wrt=nnx.Param), tmp_path / "a.npz")


def own_momentum() -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        raise NotImplementedError

    return optax.GradientTransformation(lambda params: params, update)


# A whole model


@pytest.mark.slow  # compiles the training step of a VOLO twice
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_of_a_volo_continues_in_the_other_framework(tmp_path: Path, name: str) -> None:
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
    torch_losses, jax_losses = train_torch(model, optimizer, loss_torch), train_jax(twin, twin_optimizer, loss_jax)
    assert np.allclose(jax_losses, torch_losses, rtol=1e-10)
    assert_close(outlook_jax.export_weights(twin), outlook_torch.export_weights(model), 1e-9)
