"""VOLO in training: gradients, optimizer steps, dropout, mixing boxes and initial weights of both twins."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.models.volo
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common import VOLOConfig
from outlook_common.weights import table_for
from outlook_jax.blocks import DropPath as JaxDropPath
from outlook_jax.losses import TokenLabelCrossEntropy as JaxLoss
from outlook_jax.model import draw_mix_box as draw_mix_box_jax
from outlook_torch.blocks import DropPath as TorchDropPath
from outlook_torch.losses import TokenLabelCrossEntropy as TorchLoss
from outlook_torch.model import draw_mix_box as draw_mix_box_torch
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.runners import relative_error
from parity_tests.support.volo import (
    draw_images,
    draw_weights,
    jax_logits,
    jax_volo,
    jit,
    last,
    small_config,
    timm_arguments,
    timm_volo,
    torch_volo,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

Array = np.ndarray

FORWARD, GRADIENT, STATISTICS, STEPS = 1e-12, 1e-10, 1e-12, 1e-9

# What `timm_step` and the twins' steps return: (cls, aux), gradients and buffers under PyTorch's names.
Step = tuple[tuple[Array, Array], dict[str, Array], dict[str, Array]]

BOX = (1, 0, 3, 2)


def _cotangents(config: VOLOConfig, batch: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(9)
    tokens = config.token_map[0] * config.token_map[1]
    return (
        rng.standard_normal((batch, config.num_classes)),
        rng.standard_normal((batch, tokens, config.num_classes)),
    )


def _torch_gradients(model: torch.nn.Module, cls: torch.Tensor, aux: torch.Tensor, cotangents: Any) -> Step:
    torch.autograd.backward((cls, aux), [torch.from_numpy(c) for c in cotangents])
    return (
        (cls.detach().numpy(), aux.detach().numpy()),
        {name: parameter.grad.numpy() for name, parameter in model.named_parameters()},
        {name: buffer.numpy() for name, buffer in model.named_buffers()},
    )


def timm_step(config: VOLOConfig, weights: dict[str, Array], images: Array, monkeypatch: pytest.MonkeyPatch) -> Step:
    monkeypatch.setattr(timm.models.volo, "rand_bbox", lambda *args, **kwargs: BOX)
    model = timm_volo(replace(config, use_mix_token=True), weights).train()
    features, aux, box = model.forward_train(torch.from_numpy(images))
    assert box == BOX
    # timm 1.0.31 returns the class token's features; the original its logits.
    return _torch_gradients(model, model.head(features), aux, _cotangents(config, len(images)))


def torch_step(
    config: VOLOConfig, weights: dict[str, Array], images: Array, *, grad_checkpointing: bool = False
) -> Step:
    model = torch_volo(config, weights).train()
    model.set_grad_checkpointing(grad_checkpointing)
    cls, aux, box = model.forward_train(torch.from_numpy(images), mix_box=BOX)
    assert box == BOX
    return _torch_gradients(model, cls, aux, _cotangents(config, len(images)))


def jax_step(
    config: VOLOConfig,
    weights: dict[str, Array],
    images: Array,
    *,
    grad_checkpointing: bool = False,
    scan_layers: bool = True,
) -> Step:
    model = jax_volo(config, weights, scan_layers=scan_layers)
    model.set_grad_checkpointing(grad_checkpointing)
    cotangents = _cotangents(config, len(images))

    @jit
    def step(model: outlook_jax.VOLO, images: jax.Array) -> Any:
        def objective(model: outlook_jax.VOLO) -> Any:
            cls, aux, box = model.forward_train(images, mix_box=BOX)
            assert box == BOX
            return (cls * cotangents[0]).sum() + (aux * cotangents[1]).sum(), (cls, aux)

        return nnx.grad(objective, has_aux=True)(model)

    gradients, outputs = step(model, last(images))
    return (
        (np.asarray(outputs[0]), np.asarray(outputs[1])),
        _gradients_by_torch_name(config, gradients),
        {name: array for name, array in outlook_jax.export_weights(model).items() if _is_buffer(name)},
    )


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")


def _gradients_by_torch_name(config: VOLOConfig, gradients: nnx.State) -> dict[str, Array]:
    by_path = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(gradients)}
    return {
        entry.torch: np.array(entry.to_torch(np.asarray(by_path[entry.flax][...])))
        for entry in table_for(config).entries
        if not _is_buffer(entry.torch)
    }


def assert_steps_equal(step: Step, truth: Step) -> None:
    for output, exact in zip(step[0], truth[0], strict=True):
        assert relative_error(output, exact) <= FORWARD
    assert step[1].keys() == truth[1].keys()
    for name, exact in truth[1].items():
        assert relative_error(step[1][name], exact) <= GRADIENT, name
    assert step[2].keys() == truth[2].keys()
    for name, exact in truth[2].items():
        assert step[2][name].dtype == exact.dtype, name
        assert relative_error(step[2][name], exact) <= STATISTICS, name


def test_training_outputs_gradients_and_statistics_of_both_twins_equal_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(qkv_bias=True, img_size=(24, 40))
    weights, images = draw_weights(config), draw_images(config, batch=3)
    truth = timm_step(config, weights, images, monkeypatch)
    assert_steps_equal(torch_step(config, weights, images), truth)
    assert_steps_equal(jax_step(config, weights, images), truth)


def test_gradient_checkpointing_and_unrolled_blocks_give_the_same_step() -> None:
    config = small_config()
    weights, images = draw_weights(config), draw_images(config, batch=3)
    truth = torch_step(config, weights, images)
    assert_steps_equal(torch_step(config, weights, images, grad_checkpointing=True), truth)
    assert_steps_equal(jax_step(config, weights, images, grad_checkpointing=True), truth)
    assert_steps_equal(jax_step(config, weights, images, scan_layers=False, grad_checkpointing=True), truth)


def _targets(config: VOLOConfig, batch: int) -> Array:
    tokens = config.token_map[0] * config.token_map[1]
    logits = 2 * np.random.default_rng(4).standard_normal((batch, config.num_classes, 2 + tokens))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


OPTIMIZERS: dict[str, tuple[Callable[[], optax.GradientTransformation], Callable[[Any], torch.optim.Optimizer]]] = {
    # optax's default of the decay is 1e-4, PyTorch's 1e-2.
    "adamw": (
        lambda: optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05),
        lambda parameters: torch.optim.AdamW(parameters, 1e-3, (0.9, 0.999), 1e-8, weight_decay=0.05),
    ),
    "sgd_with_momentum": (
        lambda: optax.sgd(1e-2, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    ),
}


@pytest.mark.parametrize(("jax_optimizer", "torch_optimizer"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_five_training_steps_leave_equal_losses_and_weights(
    jax_optimizer: Callable[[], optax.GradientTransformation],
    torch_optimizer: Callable[[Any], torch.optim.Optimizer],
) -> None:
    config = small_config(layers=(1, 2))
    weights, targets = draw_weights(config), _targets(config, batch=3)
    labels = jnp.asarray(targets)
    batches = [draw_images(config, batch=3, seed=step) for step in range(5)]
    boxes = [(0, 1, 2, 4), (0, 0, 0, 0), BOX, (0, 0, 4, 4), (3, 3, 4, 4)]

    model = torch_volo(config, weights).train()
    optimizer = torch_optimizer(model.parameters())
    losses = []
    for images, box in zip(batches, boxes, strict=True):
        loss = TorchLoss()(model.forward_train(torch.from_numpy(images), box), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    twin = jax_volo(config, weights)
    twin_optimizer = nnx.Optimizer(twin, jax_optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model: outlook_jax.VOLO, optimizer: nnx.Optimizer[Any], images: jax.Array, box: Any) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda model: JaxLoss()(model.forward_train(images, box), labels))(model)
        optimizer.update(model, gradients)
        return loss

    twin_losses = [
        float(step(twin, twin_optimizer, last(images), box)) for images, box in zip(batches, boxes, strict=True)
    ]
    np.testing.assert_allclose(twin_losses, losses, rtol=STEPS)
    assert len(set(losses)) == 5
    trained, twins = outlook_torch.export_weights(model), outlook_jax.export_weights(twin)
    for name, array in trained.items():
        assert relative_error(twins[name], array) <= STEPS, name
        assert (array != weights[name]).any(), f"{name} did not train"


RATES = {"drop_rate": 0.2, "pos_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.2}


def test_scanned_blocks_draw_the_same_masks_as_unrolled_ones_and_new_ones_at_each_call() -> None:
    config = small_config(**RATES, use_mix_token=True)
    weights, images = draw_weights(config), last(draw_images(config, batch=4))
    outputs = {}
    for scan_layers in (True, False):
        twin = jax_volo(config, weights, scan_layers=scan_layers)
        step = jit(lambda twin, x: twin.forward_train(x)[:2])
        outputs[scan_layers] = [np.asarray(step(twin, images)[0]) for _ in range(2)]
    for scanned, unrolled in zip(outputs[True], outputs[False], strict=True):
        assert relative_error(scanned, unrolled) <= FORWARD
    assert relative_error(outputs[True][1], outputs[True][0]) > 0.01


def test_recomputation_draws_the_same_masks_as_the_forward_pass() -> None:
    config = small_config(**RATES)
    weights, images = draw_weights(config), draw_images(config, batch=4)

    def torch_gradients(grad_checkpointing: bool) -> list[Array]:
        torch.manual_seed(0)
        model = torch_volo(config, weights).train()
        model.set_grad_checkpointing(grad_checkpointing)
        model(torch.from_numpy(images)).sin().sum().backward()
        return [parameter.grad.numpy() for parameter in model.parameters()]

    def jax_gradients(grad_checkpointing: bool) -> list[Array]:
        twin = jax_volo(config, weights)
        twin.set_grad_checkpointing(grad_checkpointing)
        gradients = jit(nnx.grad(lambda twin, x: jnp.sin(twin(x)).sum()))(twin, last(images))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]

    for gradients in (torch_gradients, jax_gradients):
        for recomputed, kept in zip(gradients(True), gradients(False), strict=True):
            assert relative_error(recomputed, kept) <= GRADIENT


def test_evaluation_draws_nothing_and_changes_nothing() -> None:
    config = small_config(**RATES, use_mix_token=True)
    weights, images = draw_weights(config), draw_images(config)
    model, twin = torch_volo(config, weights), jax_volo(config, weights)
    model.eval()
    twin.eval()
    before = jax.tree.map(np.asarray, nnx.state(twin, nnx.Not(nnx.RngKey)))
    with torch.no_grad():
        ours = [model.forward_train(torch.from_numpy(images)).numpy(), model(torch.from_numpy(images)).numpy()]
    theirs = [
        np.asarray(jit(lambda twin, x: twin.forward_train(x))(twin, last(images))),
        jax_logits(twin, last(images)),
    ]
    np.testing.assert_array_equal(*ours)
    np.testing.assert_array_equal(*theirs)
    assert relative_error(theirs[0], ours[0]) <= FORWARD
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(twin, nnx.Not(nnx.RngKey)))
    for name, array in outlook_torch.export_weights(model).items():
        np.testing.assert_array_equal(array, weights[name])


def test_a_view_for_evaluation_computes_what_evaluation_does_and_leaves_the_model_in_training() -> None:
    config = small_config(**RATES, use_mix_token=True)
    twin, images = jax_volo(config, draw_weights(config)), last(draw_images(config))
    view = nnx.view(twin, deterministic=True, use_running_average=True)
    logits, trained = jax_logits(view, images), np.asarray(jit(lambda view, x: view.forward_train(x))(view, images))
    assert not twin.patch_embed.conv[1].use_running_average
    assert not twin.deterministic
    twin.eval()
    np.testing.assert_array_equal(logits, jax_logits(twin, images))
    np.testing.assert_array_equal(trained, logits)


@pytest.mark.parametrize(
    "copied",
    [lambda twin: pickle.loads(pickle.dumps(twin)), copy.deepcopy, nnx.clone],
    ids=["pickle", "deepcopy", "clone"],
)
@pytest.mark.parametrize("overrides", [RATES, {"num_classes": 0}], ids=["rates", "no_classes"])
def test_copies_of_the_jax_twin_are_equal_and_draw_the_same(
    copied: Callable[[Any], Any], overrides: dict[str, Any]
) -> None:
    config = small_config(**overrides)
    twin, images = jax_volo(config, draw_weights(config)), last(draw_images(config, batch=4))
    other = copied(twin)
    assert other is not twin
    assert nnx.graphdef(other) == nnx.graphdef(twin)
    np.testing.assert_array_equal(jax_logits(other, images), jax_logits(twin, images))
    twin.eval()
    folded = outlook_jax.fold_batch_norm(twin)
    np.testing.assert_array_equal(jax_logits(copied(folded), images), jax_logits(folded, images))


@pytest.fixture(scope="module")
def fresh() -> tuple[torch.nn.Module, outlook_torch.VOLO, outlook_jax.VOLO]:
    """timm's and both twins' model as they come, with initial weights and rates of stochastic depth."""
    config = small_config(embed_dims=(48, 96), num_heads=(4, 4), drop_path_rate=0.3)
    torch.manual_seed(0)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: outlook_jax.VOLO(config, rngs=nnx.Rngs(0))))
    state = jax.jit(lambda: nnx.state(outlook_jax.VOLO(config, rngs=nnx.Rngs(0))), compiler_options=QUICKLY)()
    twin = nnx.merge(graphdef, state)
    return timm.models.volo.VOLO(**timm_arguments(config)), outlook_torch.VOLO(config), twin


def test_rates_of_stochastic_depth_are_timms_and_outlookers_have_none(fresh: Any) -> None:
    oracle, model, twin = fresh
    truth = [block.drop_path1.drop_prob for block in oracle.network[2]]
    assert truth[-1] == 0.3
    assert len(set(truth)) == len(truth)
    for drop_path in ("drop_path1", "drop_path2"):
        assert [getattr(block, drop_path).rate for block in model.network[2]] == truth
        rates = [float(getattr(block, drop_path).rate[...]) for block in twin.network[2]]
        np.testing.assert_allclose(rates, truth, rtol=1e-6)
    assert model.config.drop_path_rates(0) == (0.0, 0.0)
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in oracle.network[0])


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_stochastic_depth_drops_whole_samples_and_scales_the_others(rate: float) -> None:
    x = np.random.default_rng(0).standard_normal((4000, 2, 1, 3))
    rngs = nnx.Rngs(0)
    torch.manual_seed(0)
    ours = TorchDropPath(rate).train()(torch.from_numpy(x)).numpy()
    with jax.numpy_dtype_promotion("strict"):  # which users set who want no dtype to change unasked
        theirs = np.asarray(JaxDropPath(rate, rngs=rngs)(jnp.asarray(x)))
    for out in (ours, theirs):
        dropped = (out == 0).all(axis=(1, 2, 3))
        assert abs(dropped.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / len(x))
        if rate < 1:
            np.testing.assert_allclose(out[~dropped], x[~dropped] / (1 - rate), rtol=1e-6)


def test_a_box_is_drawn_inside_the_map_and_its_mixing_undone() -> None:
    config = small_config(layers=(1, 1), use_mix_token=True)
    weights, images = draw_weights(config), draw_images(config, batch=2)
    model, twin = torch_volo(config, weights).train(), jax_volo(config, weights)
    torch.manual_seed(0)
    step = jit(lambda twin, x: twin.forward_train(x))
    draws: list[list[tuple[int, ...]]] = [[], []]
    with torch.no_grad():
        for _ in range(12):
            draws[0].append(model.forward_train(torch.from_numpy(images))[2])
            draws[1].append(tuple(map(int, step(twin, last(images))[2])))
    for boxes in draws:
        assert len(set(boxes)) > 6
        assert all(0 <= y1 <= y2 <= 4 and 0 <= x1 <= x2 <= 4 for y1, x1, y2, x2 in boxes)

    # A box over the whole map swaps the images; swapped back, the tokens' logits are those without any box.
    with torch.no_grad():
        swapped = model.forward_train(torch.from_numpy(images), (0, 0, 4, 4))
        plain = model.forward_train(torch.from_numpy(images), (0, 0, 0, 0))
    assert relative_error(swapped[1].numpy(), plain[1].numpy()) <= FORWARD
    assert relative_error(swapped[0].flip(0).numpy(), plain[0].numpy()) <= FORWARD
    assert relative_error(swapped[0].numpy(), plain[0].numpy()) > 0.01


def test_the_share_of_drawn_boxes_is_as_the_original_draws_it() -> None:
    areas: dict[str, list[float]] = {"torch": [], "jax": [], "timm": []}
    torch.manual_seed(0)
    draw = jax.jit(lambda key: draw_mix_box_jax(key, (14, 14)))
    for i in range(400):
        lam = torch.distributions.Beta(1.0, 1.0).sample()
        boxes = {
            "torch": draw_mix_box_torch((14, 14)),
            "jax": draw(jax.random.key(i)),
            "timm": timm.models.volo.rand_bbox((2, 28, 28, 4), lam, scale=2),
        }
        for name, (y1, x1, y2, x2) in boxes.items():
            areas[name].append(float((y2 - y1) * (x2 - x1)) / 14**2)
    for name in ("torch", "jax"):
        assert abs(np.mean(areas[name]) - np.mean(areas["timm"])) <= 4 * np.std(areas["timm"]) * np.sqrt(2 / 400)
        assert abs(np.std(areas[name]) / np.std(areas["timm"]) - 1) <= 0.2


def test_initial_weights_of_both_twins_are_distributed_as_timms(fresh: Any) -> None:
    oracle, model, twin = fresh
    truth = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    for weights in (outlook_torch.export_weights(model), outlook_jax.export_weights(twin)):
        assert weights.keys() == truth.keys()
        for name, expected in truth.items():
            if expected.size == 1 or expected.std() == 0:
                np.testing.assert_array_equal(weights[name], expected, err_msg=name)
                continue
            assert abs(weights[name].std() / expected.std() - 1) < 6 / np.sqrt(expected.size), name
            assert abs(weights[name].mean()) < 6 * expected.std() / np.sqrt(expected.size), name
            # Convolutions are uniform: their bounds stand out.
            if "conv" in name or "proj" in name.split(".")[:3]:
                assert np.abs(weights[name]).max() < 1.2 * np.abs(expected).max(), name
