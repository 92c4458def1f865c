"""Trainings that other programs saved go on: timm's, Lightning's, PyTorch's and Optax's, in either twin."""

import argparse
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import timm.optim
import timm.utils
import torch
import torch.distributed.checkpoint as dcp
from flax import nnx, serialization
from torch.distributed.checkpoint.state_dict import get_state_dict

import outlook_jax
import outlook_torch
from outlook_common.weights import WeightsError, convert, inspect, read_arrays
from outlook_common.weights.parameter_order import names_of_numbers
from parity_tests.support.small_volo import CONFIG

Array = np.ndarray
Save = Callable[[outlook_torch.VOLO, Any, Path], Path]


def torch_model() -> outlook_torch.VOLO:
    torch.manual_seed(0)
    return outlook_torch.VOLO(CONFIG)


def jax_model() -> outlook_jax.VOLO:
    return outlook_jax.VOLO(CONFIG, rngs=nnx.Rngs(1))


def trained(make: Callable[[outlook_torch.VOLO], torch.optim.Optimizer]) -> tuple[outlook_torch.VOLO, Any]:
    """Return a model after two steps with gradients of every parameter."""
    model = torch_model()
    optimizer = make(model)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_()
    return model, optimizer


def adamw(model: outlook_torch.VOLO) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def adamw_by_name(model: outlook_torch.VOLO) -> torch.optim.Optimizer:
    named = list(model.named_parameters())[::-1]
    return torch.optim.AdamW([{"params": named[:30], "weight_decay": 0.1}, {"params": named[30:]}], 1e-3)


def sgd(model: outlook_torch.VOLO) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def timms(**options: Any) -> Callable[[outlook_torch.VOLO], torch.optim.Optimizer]:
    """Return timm's AdamW: without decay of biases, norms, `cls_token` and `pos_embed`; a rate per layer if asked."""
    return lambda model: timm.optim.create_optimizer_v2(model, "adamw", 1e-3, 0.05, **options)


def by_timm(model: outlook_torch.VOLO, optimizer: Any, folder: Path) -> Path:
    saver = timm.utils.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="volo_d1_224", lr=1e-3),
        model_ema=timm.utils.ModelEmaV3(torch_model()),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=0.5)
    return folder / "last.pth.tar"


def by_lightning(model: outlook_torch.VOLO, optimizer: Any, folder: Path) -> Path:
    """Write what Lightning's `Trainer.save_checkpoint` does, for a module with the model as its attribute `model`."""
    found = {
        "epoch": 3,
        "global_step": 2,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        | {"loss.weight": torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"completed": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "kth": None}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-3], "last_epoch": 2, "_step_count": 3}],
        "hyper_parameters": {"lr": 1e-3},
    }
    torch.save(found, folder / "epoch=3.ckpt")
    return folder / "epoch=3.ckpt"


def by_tutorial(model: outlook_torch.VOLO, optimizer: Any, folder: Path) -> Path:
    state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "loss": 0.1}
    torch.save(state, folder / "a.pt")
    return folder / "a.pt"


def by_dcp(model: outlook_torch.VOLO, optimizer: Any, folder: Path) -> Path:
    weights, moments = get_state_dict(model, optimizer)
    averaged = torch_model().state_dict()
    return in_dcp({"model": weights, "optimizer": moments, "average": averaged}, folder)


def in_dcp(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not run by several processes
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def by_dcp_in_numbers(model: outlook_torch.VOLO, optimizer: Any, folder: Path) -> Path:
    return in_dcp({"app": {"model": model.state_dict(), "optim": optimizer.state_dict()}}, folder)


TORCH: dict[str, tuple[Callable[[outlook_torch.VOLO], Any], Save]] = {
    "timm": (timms(), by_timm),
    "timm, a rate per layer": (timms(layer_decay=0.75), by_timm),
    "timm, SGD": (sgd, by_timm),
    "Lightning": (adamw, by_lightning),
    "Lightning, SGD": (sgd, by_lightning),
    "a script": (adamw, by_tutorial),
    "a script, by name in any order": (adamw_by_name, by_tutorial),
    "DCP": (timms(), by_dcp),
    "DCP, by number": (adamw, by_dcp_in_numbers),
}


def same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
        assert np.ptp(array) or not array.ndim, name  # no array of one value, which would hide an exchange


def load_in(twin: str, source: Path, folder: Path, *, momentum: bool, step: int | None) -> dict[str, Array]:
    """Return what a twin's fresh training has after loading, as `save_training` writes it."""
    if twin == "torch":
        model = torch_model()
        optimizer = (sgd if momentum else timms())(model)
        assert outlook_torch.load_training(model, optimizer, source, step=step) == 2
        outlook_torch.save_training(model, optimizer, folder / "out.npz", step=2 if momentum else None)
    else:
        twin_model = jax_model()
        tx = optax.sgd(1e-3, momentum=0.9) if momentum else optax.adamw(1e-3)
        twin_optimizer = nnx.Optimizer(twin_model, tx, wrt=nnx.Param)
        assert outlook_jax.load_training(twin_model, twin_optimizer, source, step=step) == 2
        outlook_jax.save_training(twin_model, twin_optimizer, folder / "out.npz")
    return read_arrays(folder / "out.npz")


@pytest.mark.parametrize("twin", ["torch", "jax"])
@pytest.mark.parametrize("name", TORCH)
def test_a_training_saved_in_pytorch_goes_on(tmp_path: Path, name: str, twin: str) -> None:
    make, save = TORCH[name]
    model, optimizer = trained(make)
    source = save(model, optimizer, tmp_path)
    momentum = "SGD" in name
    outlook_torch.save_training(model, optimizer, tmp_path / "expected.npz", step=2 if momentum else None)
    step = 2 if name == "timm, SGD" else None  # it says the epoch alone
    same(load_in(twin, source, tmp_path, momentum=momentum, step=step), read_arrays(tmp_path / "expected.npz"))


@pytest.mark.parametrize("name", TORCH)
def test_its_weights_load_convert_and_are_recognised(tmp_path: Path, name: str) -> None:
    make, save = TORCH[name]
    model, optimizer = trained(make)
    source = save(model, optimizer, tmp_path)
    prefix = "app.model" if name == "DCP, by number" else "model" if "Lightning" in name else ""
    found = inspect(source, prefix=prefix)
    assert found.model is not None
    assert found.model.table.model.startswith("VOLO(layers=(1, 2)")
    convert(source, tmp_path / "b.npz", prefix=prefix, to="torch")
    same(
        {name: array for name, array in read_arrays(tmp_path / "b.npz").items() if array.ndim},
        {name: array for name, array in outlook_torch.export_weights(model).items() if array.ndim},
    )


# Optax's


class State(NamedTuple):
    weights: Any
    optimizer: Any
    average: Any


def drawn(tree: Any, seed: int) -> Any:
    """Return a tree with other numbers: of a training without its compilation."""
    rng = np.random.default_rng(seed)

    def other(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.full_like(x, 2) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.int32) else x
        return jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype)

    return jax.tree.map(other, tree)


def adam_in_a_chain() -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_learning_rate(lambda count: 1e-3)
    )


def optax_training(tx: optax.GradientTransformation) -> tuple[outlook_jax.VOLO, nnx.Optimizer]:
    model = jax_model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(model, drawn(nnx.state(model, (nnx.Param, nnx.BatchStat)), 0))
    nnx.update(optimizer, jax.tree.map(lambda x: jnp.asarray(x, x.dtype), drawn(nnx.state(optimizer), 1)))
    optimizer.step.set_value(jnp.asarray(2, jnp.uint32))
    return model, optimizer


def as_the_recipe(model: outlook_jax.VOLO, optimizer: nnx.Optimizer) -> Any:
    """Return what `examples/imagenet/train_jax.py` saves: parameters and statistics apart, Optax's own state."""
    _, params, statistics, _ = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    pure = jax.tree.map(
        lambda x: x.get_value() if isinstance(x, nnx.Variable) else x,
        optimizer.opt_state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return State((params, statistics), pure, drawn((params, statistics), 5))


ORBAX: dict[str, Callable[[outlook_jax.VOLO, nnx.Optimizer], Any]] = {
    "the recipe": as_the_recipe,
    "a dictionary": lambda model, optimizer: {"model": nnx.state(model), "optimizer": nnx.state(optimizer)},
    "one state of both": lambda model, optimizer: nnx.state((model, optimizer)),
    "parameters alone": lambda model, optimizer: {
        "params": nnx.state(model, (nnx.Param, nnx.BatchStat)),
        "opt_state": nnx.state(optimizer),
        "ema_params": drawn(nnx.state(model, (nnx.Param, nnx.BatchStat)), 4),
    },
}


def every(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": adam_in_a_chain,
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "in wrappers": lambda: optax.MultiSteps(
        optax.apply_if_finite(optax.masked(optax.adamw(1e-3), lambda params: jax.tree.map(lambda _: True, params)), 3),
        2,
    ).gradient_transformation(),
}


def saved_by_orbax(tree: Any, folder: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    return folder


@pytest.mark.parametrize("twin", ["torch", "jax"])
@pytest.mark.parametrize(
    ("layout", "kind"),
    [*((layout, "adam") for layout in ORBAX), ("a dictionary", "sgd"), ("the recipe", "in wrappers")],
)
def test_a_training_saved_by_orbax_goes_on(tmp_path: Path, layout: str, kind: str, twin: str) -> None:
    model, optimizer = optax_training(OPTIMIZERS[kind]())
    _without_accumulated(optimizer)
    source = saved_by_orbax(ORBAX[layout](model, optimizer), tmp_path / "state")
    outlook_jax.save_training(model, optimizer, tmp_path / "expected.npz")
    found = load_in(twin, source, tmp_path, momentum=kind == "sgd", step=None)
    same(found, read_arrays(tmp_path / "expected.npz"))


def _without_accumulated(optimizer: nnx.Optimizer) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(optimizer)):
        if "mini_step" in path or "acc_grads" in path:
            variable.set_value(jnp.zeros_like(variable.get_value()))


def test_a_train_state_in_flaxs_own_file_goes_on(tmp_path: Path) -> None:
    model, optimizer = optax_training(optax.adamw(1e-3))
    weights = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    state = {"params": weights, "opt_state": nnx.to_pure_dict(nnx.state(optimizer))["opt_state"], "step": 2}
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(_with_text_keys(state)))
    outlook_jax.save_training(model, optimizer, tmp_path / "expected.npz")
    found = load_in("torch", tmp_path / "a.msgpack", tmp_path, momentum=False, step=None)
    same(found, read_arrays(tmp_path / "expected.npz"))


def _with_text_keys(tree: Any) -> Any:
    """Return a tree as Flax writes it: lists as mappings."""
    return {str(key): _with_text_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def test_the_recipes_weights_and_averages_load_by_their_prefix(tmp_path: Path) -> None:
    model, optimizer = optax_training(adam_in_a_chain())
    source = saved_by_orbax(as_the_recipe(model, optimizer), tmp_path / "state")
    fresh = torch_model()
    with pytest.raises(WeightsError, match="a complete one is found with prefix='weights', 'average'"):
        outlook_torch.load_weights(fresh, source)
    outlook_torch.load_weights(fresh, source, prefix="weights")
    same_weights(outlook_torch.export_weights(fresh), outlook_jax.export_weights(model))
    outlook_torch.load_weights(fresh, source, prefix="average")
    with pytest.raises(AssertionError):
        same_weights(outlook_torch.export_weights(fresh), outlook_jax.export_weights(model))


def same_weights(found: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_averages_of_the_recipe_in_pytorch_are_taken_on_request(tmp_path: Path) -> None:
    model, optimizer = trained(adamw)
    source = by_dcp(model, optimizer, tmp_path)
    fresh = trained(adamw)[0]
    outlook_torch.load_weights(fresh, source, use_ema=True)
    same_weights(outlook_torch.export_weights(fresh), outlook_torch.export_weights(torch_model()))


# What cannot go on


def rejected(state: dict[str, Any], folder: Path, words: str) -> None:
    torch.save(state, folder / "bad.pt")
    model = torch_model()
    before = outlook_torch.export_weights(model)
    with pytest.raises(WeightsError, match=words):
        outlook_torch.load_training(model, adamw(model), folder / "bad.pt")
    same_weights(outlook_torch.export_weights(model), before)


def test_another_optimizer_with_moments_of_the_same_names_is_refused(tmp_path: Path) -> None:
    for make in (torch.optim.RAdam, timm.optim.Lamb, timm.optim.NAdamW):
        model, optimizer = trained(lambda model, make=make: make(model.parameters(), 1e-3))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        rejected(state, tmp_path, "the moments exp_avg, exp_avg_sq of another optimizer than PyTorch's Adam, AdamW")
    model, optimizer = trained(lambda model: torch.optim.AdamW(model.parameters(), 1e-3, amsgrad=True))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    rejected(state, tmp_path, "it has the moments exp_avg, exp_avg_sq, max_exp_avg_sq, the optimizer needs exp_avg")


def test_what_does_not_say_which_parameter_is_which_is_refused_with_a_remedy(tmp_path: Path) -> None:
    def backwards(model: outlook_torch.VOLO) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(model.parameters())[::-1], 1e-3)

    def split_by_name(model: outlook_torch.VOLO) -> torch.optim.Optimizer:
        """Norms do not decay, biases do: vectors of the same sizes are in both groups."""
        named = dict(model.named_parameters())
        norms = [p for name, p in named.items() if "norm" in name]
        others = [p for name, p in named.items() if "norm" not in name]
        return torch.optim.AdamW([{"params": norms, "weight_decay": 0.0}, {"params": others}], 1e-3)

    for make, words in ((backwards, "none fit the shapes"), (split_by_name, "several fit the shapes")):
        model, optimizer = trained(make)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        rejected(state, tmp_path, rf"its optimizer numbers its parameters, and .*{words}.*named_parameters\(\)")


def test_several_models_or_optimizers_or_unequal_steps_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained(adamw)
    weights, moments = model.state_dict(), optimizer.state_dict()
    rejected({"student": weights, "teacher": weights, "optimizer": moments}, tmp_path, "2 models like VOLO.*student")
    rejected({"model": weights, "optimizer_states": [moments, moments]}, tmp_path, "it has 2 optimizers")
    moments["state"][3]["step"] += 1
    torch.save({"model": weights, "optimizer": moments}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=re.escape("has made [2, 3] steps")):
        outlook_torch.load_training(model, optimizer, tmp_path / "a.pt")


def test_steps_that_stand_nowhere_must_be_given(tmp_path: Path) -> None:
    model, optimizer = trained(sgd)
    source = by_timm(model, optimizer, tmp_path)
    with pytest.raises(ValueError, match=r"last\.pth\.tar: it counts no steps; give step="):
        outlook_torch.load_training(model, optimizer, source)


def test_gradients_that_a_file_has_accumulated_are_not_dropped_in_silence(tmp_path: Path) -> None:
    model, optimizer = optax_training(optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation())
    source = saved_by_orbax(as_the_recipe(model, optimizer), tmp_path / "state")
    with pytest.raises(WeightsError, match="MultiSteps has accumulated gradients"):
        outlook_torch.load_training(*trained(adamw), source)


def interleavings(a: list[str], b: list[str]) -> Iterator[list[str]]:
    if not a or not b:
        yield a + b
        return
    yield from ([a[0], *rest] for rest in interleavings(a[1:], b))
    yield from ([b[0], *rest] for rest in interleavings(a, b[1:]))


def test_orders_are_found_where_trying_all_finds_one_and_refused_elsewhere() -> None:
    rng, seen = np.random.default_rng(0), {0: 0, 1: 0, 2: 0}
    for _ in range(300):
        count = int(rng.integers(2, 7))
        numbers = list(map(str, rng.permutation(count)))
        cut = int(rng.integers(1, count))
        shapes = {number: (int(rng.integers(3)),) for number in numbers}
        order = [(f"p{i}", (int(rng.integers(3)),)) for i in range(count)]
        if rng.random() < 0.7:  # one that fits for certain
            way = list(interleavings(numbers[:cut], numbers[cut:]))[int(rng.integers(3)) % 2]
            order = [(name, shapes[number]) for (name, _), number in zip(order, way, strict=True)]
        fitting = [
            way
            for way in interleavings(numbers[:cut], numbers[cut:])
            if all(shapes[number] == shape for number, (_, shape) in zip(way, order, strict=True))
        ]
        seen[min(len(fitting), 2)] += 1
        groups = [(numbers[:cut], True), (numbers[cut:], False)]
        if len(fitting) == 1:
            expected = dict(zip(fitting[0], (name for name, _ in order), strict=True))
            assert names_of_numbers(groups, shapes, order) == expected
        else:
            with pytest.raises(ValueError, match="several" if fitting else "none"):
                names_of_numbers(groups, shapes, order)
    assert min(seen.values()) > 20
