"""What composite promises beyond the op's numbers: derivatives of any kind, batching, memory, and no recompilation."""

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.test_util import check_grads
from torch._subclasses.fake_tensor import FakeTensorMode

import outlook_jax
import outlook_torch
from outlook_common.dispatch import choose
from outlook_common.op_cases import BY_NAME, Case
from outlook_jax.ops import IMPLEMENTATIONS as JAX_IMPLEMENTATIONS
from outlook_jax.ops.choice import choose_by_platform
from outlook_jax.ops.composite.maps import UNROLLED
from outlook_jax.ops.pallas import pallas_or_composite, pallas_or_reference
from outlook_torch.ops import IMPLEMENTATIONS as TORCH_IMPLEMENTATIONS
from outlook_torch.ops.composite import sums
from outlook_torch.ops.composite.samples import most_samples, samples
from parity_tests.support.runners import draw, relative_error, to_torch

some_cases = pytest.mark.parametrize(
    "case",
    [
        Case("phases_of_unequal_size", 5, 3, 2, 2, stride=(2, 1), B=1),
        Case("pixels_without_a_window", 5, 5, 1, 2, kernel_size=(2, 3), stride=(3, 2), padding=(0, 1), B=1),
    ],
    ids=lambda case: case.name,
)


@some_cases
def test_torch_derivatives_of_first_and_second_order(case: Case) -> None:
    operands = draw(case, seed=1)
    value, logits = (to_torch(x).requires_grad_() for x in (operands.value, operands.logits))

    def op(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return outlook_torch.outlook_attention(value, logits, **case.window, implementation="composite")

    assert torch.autograd.gradcheck(op, (value, logits), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (value, logits), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.unchecked  # inside of vmap tensors lack the mapped axis
def test_forward_mode_inside_forward_mode_is_left_to_the_reference() -> None:
    operands = draw(BY_NAME["volo_d1"].with_batch(1), seed=3)
    value, logits = to_torch(operands.value), to_torch(operands.logits)

    def second(mode: str, implementation: str | None) -> torch.Tensor:
        def along(t: torch.Tensor) -> torch.Tensor:
            out = outlook_torch.outlook_attention(value * t, logits * t, stride=2, implementation=implementation)
            return out.square().sum()

        outer = {"forward": torch.func.jacfwd, "reverse": torch.func.jacrev}[mode]
        return outer(torch.func.jacfwd(along))(torch.ones((), dtype=torch.float64))

    expected = second("reverse", "composite")
    torch.testing.assert_close(second("forward", None), expected, rtol=1e-12, atol=0)
    with pytest.raises(NotImplementedError, match="forward mode inside forward mode needs the reference"):
        second("forward", "composite")


def test_jax_derivatives_of_first_and_second_order_in_both_modes() -> None:
    case = Case("pixels_without_a_window", 4, 3, 1, 2, kernel_size=(2, 1), stride=(3, 2), padding=(1, 0), B=1)
    operands = draw(case, seed=2)

    @jax.jit
    def op(value: jax.Array, logits: jax.Array) -> jax.Array:
        return outlook_jax.outlook_attention(value, logits, **case.window, implementation="composite")

    check_grads(op, (jnp.asarray(operands.value), jnp.asarray(operands.logits)), order=2, eps=1e-4)


@pytest.mark.parametrize("axes", [(0, 0), (1, None), (None, 2)], ids=str)
def test_vmap_equals_a_loop_in_both_twins(axes: tuple[int | None, int | None]) -> None:
    case = BY_NAME["stride_not_dividing"]
    many = [draw(case, seed=seed) for seed in range(3)]
    stacked = [
        np.stack([getattr(o, name) for o in many], axis or 0) if axis is not None else getattr(many[0], name)
        for name, axis in zip(("value", "logits"), axes, strict=True)
    ]
    out = jax.vmap(
        lambda v, a: outlook_jax.outlook_attention(v, a, **case.window, implementation="composite"), in_axes=axes
    )(*map(jnp.asarray, stacked))
    theirs = torch.func.vmap(
        lambda v, a: outlook_torch.outlook_attention(v, a, **case.window, implementation="composite"), in_dims=axes
    )(*map(to_torch, stacked))
    for index in range(3):
        value, logits = (
            to_torch(np.take(x, index, axis) if axis is not None else x) for x, axis in zip(stacked, axes, strict=True)
        )
        expected = outlook_torch.outlook_attention(value, logits, **case.window, implementation="reference").numpy()
        assert relative_error(np.asarray(out[index]), expected) <= 1e-12
        assert relative_error(theirs[index].numpy(), expected) <= 1e-12


def test_gradients_per_sample_by_vmap_of_grad_in_both_twins() -> None:
    case = BY_NAME["small_map"]
    operands = draw(case, seed=3)
    value, logits = operands.value[:, None], operands.logits[:, None]

    def loss(package: object, value: object, logits: object, implementation: str) -> object:
        out = package.outlook_attention(value, logits, **case.window, implementation=implementation)  # type: ignore[attr-defined]
        return (out**2).sum()

    def ours(implementation: str) -> tuple[np.ndarray, np.ndarray]:
        a = jax.vmap(jax.grad(lambda v, x: loss(outlook_jax, v, x, implementation)))(
            jnp.asarray(value), jnp.asarray(logits)
        )
        b = torch.func.vmap(torch.func.grad(lambda v, x: loss(outlook_torch, v, x, implementation)))(
            to_torch(value), to_torch(logits)
        )
        return np.asarray(a), b.numpy()

    for result, expected in zip(ours("composite"), ours("reference"), strict=True):
        assert relative_error(result, expected) <= 1e-10


def test_nothing_of_the_size_of_all_windows_lives_across_the_forward() -> None:
    """The reference keeps K*K times the value; composite the value, the probabilities, and what little they need."""
    case = Case("wide", 14, 14, 1, 256, B=1)
    operands = draw(case, seed=4, dtype="float32")
    allowed = operands.value.nbytes + 5 * operands.logits.nbytes // 2
    assert operands.value.nbytes * case.grid.places > 2 * allowed

    def kept_by_torch(implementation: str) -> int:
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            kept[x.data_ptr()] = x.numel() * x.element_size()
            return x

        value, logits = to_torch(operands.value).requires_grad_(), to_torch(operands.logits).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outlook_torch.outlook_attention(value, logits, **case.window, implementation=implementation)
        return sum(kept.values())

    def kept_by_jax(implementation: str) -> int:
        _, pullback = jax.vjp(
            lambda v, a: outlook_jax.outlook_attention(v, a, **case.window, implementation=implementation),
            jnp.asarray(operands.value),
            jnp.asarray(operands.logits),
        )
        return sum(x.nbytes for x in jax.tree.leaves(pullback))

    for kept in (kept_by_torch, kept_by_jax):
        assert kept("composite") <= allowed
        assert kept("reference") > allowed


def test_more_channels_than_one_round_adds_up_give_the_same_sum_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["small_map"]
    value, logits, cotangent, _ = draw(case, seed=5)

    def gradient() -> np.ndarray:
        op = lambda a: outlook_jax.outlook_attention(jnp.asarray(value), a, **case.window, implementation="composite")  # noqa: E731
        return np.asarray(jax.vjp(op, jnp.asarray(logits))[1](jnp.asarray(cotangent))[0])

    assert case.D <= UNROLLED
    at_once = gradient()
    monkeypatch.setattr("outlook_jax.ops.composite.maps.UNROLLED", case.D // 2)
    jax.clear_caches()
    assert relative_error(gradient(), at_once) <= 1e-14


@pytest.mark.unchecked  # of shapes alone
def test_a_cpus_program_has_the_products_of_one_displacement_and_one_addition_of_weights_in_jax() -> None:
    case = BY_NAME["volo_d1"]
    op = partial(outlook_jax.outlook_attention, **case.window, implementation="composite")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (case.value_shape, case.logits_shape)]

    def exported(f: Callable[..., jax.Array], *shapes: jax.ShapeDtypeStruct) -> str:
        return jax.export.export(jax.jit(f), platforms=["cpu"])(*shapes).mlir_module()

    gradient = exported(lambda value, logits, out: jax.vjp(partial(op, value), logits)[1](out), *shapes, shapes[0])
    # Of 64 displacements, with half of the 32 channels each, it would be 1,024.
    assert 0 < gradient.count("stablehlo.multiply") - UNROLLED <= 16
    forward = exported(op, *shapes)
    # Of 9 places it would be 9, as on other platforms.
    assert forward.count("stablehlo.dynamic_update_slice") + forward.count("stablehlo.scatter") == 1


@pytest.mark.unchecked  # of memory alone
def test_the_gradient_of_logits_is_moved_back_once_for_all_that_read_it_in_jax() -> None:
    case = Case("map_of_14", 14, 14, 3, 8, B=4)
    layer = outlook_jax.OutlookAttention(
        case.dim, case.N, **case.window, deterministic=True, implementation="composite", rngs=nnx.Rngs(0)
    )
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    gradients = jax.jit(jax.grad(lambda p, x: nnx.merge(graph, p, rest)(x).sum(), argnums=(0, 1)))
    with jax.default_device(jax.devices("cpu")[0]):
        x = jnp.zeros((case.B, case.H, case.W, case.dim), jnp.float32)
        program = gradients.lower(parameters, x).compile()
    # With a copy each for the gradients of input, weight and bias it would be 6.8.
    assert program.memory_analysis().temp_size_in_bytes < 6 * 4 * prod(case.logits_shape)


@pytest.mark.unchecked  # of shapes alone
def test_symbolic_shapes_are_for_the_reference_in_jax() -> None:
    for axes in ("batch, 56, 56, 6, 32", "2, rows, 56, 6, 32"):
        value = jax.ShapeDtypeStruct(jax.export.symbolic_shape(axes), jnp.float32)
        assert choose_by_platform(value, value, None, BY_NAME["volo_d1"].grid) is JAX_IMPLEMENTATIONS["reference"].run
        with pytest.raises(NotImplementedError, match=r"symbolic shape .*; the reference takes a symbolic batch$"):
            choose("composite", JAX_IMPLEMENTATIONS, value, None, None, None)


@pytest.mark.unchecked  # its sizes become symbols
@pytest.mark.parametrize("name", ["mix", "gram"])
def test_the_torch_operators_are_what_torch_expects_of_an_operator(name: str) -> None:
    case = BY_NAME["stride_not_dividing"]
    operands = draw(case, seed=6)
    weights = to_torch(operands.logits).permute(0, 3, 4, 5, 1, 2)
    first = weights if name == "mix" else to_torch(operands.cotangent)
    sizes = [[3, 3], [2, 2], [1, 1]]
    results = torch.library.opcheck(
        getattr(torch.ops.outlook_attention, name).default, (first, to_torch(operands.value), *sizes)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("name", "batch", "ours", "theirs"),
    [
        ("volo_d1", 1, "composite", "composite"),
        ("seed_512", 1, "composite", "composite"),
        ("small_map", 4, "composite", "composite"),  # 1,568 numbers in value for each image
        ("small_map", 2, "composite", "reference"),
        ("small_map", 1, "reference", "reference"),
        ("kernel_5", 4, "reference", "composite"),
        ("kernel_5", 64, "reference", "composite"),  # 8 channels per head for 25 places
    ],
)
def test_what_takes_longer_is_not_chosen_unless_asked_for(name: str, batch: int, ours: str, theirs: str) -> None:
    case = BY_NAME[name].with_batch(batch)
    torch_operands = torch.empty(case.value_shape), torch.empty(case.logits_shape), None, case.grid
    jax_operands = *(jnp.empty(shape, jnp.float32) for shape in (case.value_shape, case.logits_shape)), None, case.grid
    assert choose(None, TORCH_IMPLEMENTATIONS, *torch_operands) is TORCH_IMPLEMENTATIONS[ours].run
    assert (
        choose_by_platform(*jax_operands)
        is {"composite": pallas_or_composite, "reference": pallas_or_reference}[theirs]
    )
    for implementations, operands in ((TORCH_IMPLEMENTATIONS, torch_operands), (JAX_IMPLEMENTATIONS, jax_operands)):
        assert choose("composite", implementations, *operands) is implementations["composite"].run


@pytest.mark.parametrize(("batch", "with_gradients"), [(4, "reference"), (8, "composite")])
def test_with_gradients_torch_chooses_composite_from_larger_maps_on(batch: int, with_gradients: str) -> None:
    case = BY_NAME["small_map"].with_batch(batch)
    value, logits = torch.empty(case.value_shape), torch.empty(case.logits_shape, requires_grad=True)

    def chosen() -> object:
        return choose(None, TORCH_IMPLEMENTATIONS, value, logits, None, case.grid)

    assert chosen() is TORCH_IMPLEMENTATIONS[with_gradients].run
    with torch.no_grad():
        assert chosen() is TORCH_IMPLEMENTATIONS["composite"].run


def results_of(case: Case, value: torch.Tensor, logits: torch.Tensor) -> list[torch.Tensor]:
    """The output, the gradients, and a gradient of the gradient's."""
    value, logits = value.clone().requires_grad_(), logits.clone().requires_grad_()
    out = outlook_torch.outlook_attention(value, logits, **case.window, implementation="composite")
    grads = torch.autograd.grad(out.square().sum(), (value, logits), create_graph=True)
    return [out, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (value, logits))]


def test_batches_of_too_many_samples_are_cut_and_give_the_same_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["stride_not_dividing"].with_batch(5)
    operands = draw(case, seed=7)
    value, logits = to_torch(operands.value), to_torch(operands.logits)
    whole = results_of(case, value, logits)
    samples_of_an_image = len(samples(case.grid, case.N, value.device).slots)
    assert 0 < samples_of_an_image <= most_samples(case.grid, case.N)
    lengths: list[int] = []
    kernel = torch.embedding_bag

    def counted(weight: torch.Tensor, indices: torch.Tensor, *args: object, **kwargs: object) -> object:
        lengths.append(len(indices))
        return kernel(weight, indices, *args, **kwargs)

    monkeypatch.setattr(torch, "embedding_bag", counted)
    for images, calls in ((2, [2, 2, 1]), (1, [1] * 5)):
        # One sample more would be one image more.
        monkeypatch.setattr(sums, "SAMPLES", (images + 1) * samples_of_an_image)
        lengths.clear()
        for result, expected in zip(results_of(case, value, logits), whole, strict=True):
            assert torch.equal(result, expected)
        assert lengths[: len(calls)] == [n * samples_of_an_image for n in calls]


@pytest.mark.unchecked  # of a device that is not there
def test_an_image_of_too_many_samples_for_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["seed_512"]
    monkeypatch.setattr(sums, "SAMPLES", 25 * 28 * 28)
    with FakeTensorMode():
        for device, refused in (("cuda", True), ("cpu", False)):
            value, logits = (torch.empty(s, device=device) for s in (case.value_shape, case.logits_shape))
            reason = TORCH_IMPLEMENTATIONS["composite"].refusal(value, logits, None, case.grid)
            assert (reason is not None) == refused
            assert (
                not refused
                or "an image has up to 19600 samples; PyTorch's kernels on CUDA take fewer than 19600" in reason
            )


@pytest.mark.parametrize("name", ["reference", "composite"])
def test_deterministic_algorithms_are_all_there_are_in_torch(name: str) -> None:
    """On a CPU; PyTorch raises where an algorithm of its own is not deterministic."""
    case = BY_NAME["small_map"]
    operands = draw(case, seed=8, dtype="float32")
    value, logits = to_torch(operands.value).requires_grad_(), to_torch(operands.logits).requires_grad_()

    def run() -> list[torch.Tensor]:
        out = outlook_torch.outlook_attention(value, logits, **case.window, implementation=name)
        return [out, *torch.autograd.grad(out.square().sum(), (value, logits))]

    as_ever = run()
    torch.use_deterministic_algorithms(True)
    try:
        for result, expected in zip(run(), as_ever, strict=True):
            assert torch.equal(result, expected)
    finally:
        torch.use_deterministic_algorithms(False)
