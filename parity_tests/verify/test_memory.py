"""What a verification takes: results that wait in a file, a budget of memory, and how much is optimized."""

import gc
from collections.abc import Iterator
from functools import partial

import jax
import jax._src.compiler as compiler_internal
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import outlook_parity.backends.jax.optimizer
import outlook_parity.backends.jax.runner as runner_of_jax
import outlook_parity.backends.jax.work as work_of_xla
import outlook_parity.backends.torch.optimizer
from outlook_parity import NameMap, Report, load_torch_weights, verify
from outlook_parity.backends.jax.work import MOST_CONVOLVED, MOST_NUMBERS, Work, compiled_for, work_of
from outlook_parity.core.memory import Sizes, bytes_of, needed, shown, too_large
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.core.recorder import Key, StoredEvents, shapes_of
from outlook_parity.core.request import Request
from outlook_parity.core.stored import LEAST_BYTES, Stored
from outlook_parity.mapping.layouts import Part
from outlook_parity.mapping.names import Names, WeightName
from outlook_parity.pair import make_pair

pytestmark = pytest.mark.usefixtures("quick_compilation")


# As this module is imported, before `quick_compilation` replaces it.
USUAL_OPTIONS = compiler_internal.get_compile_options


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo `quick_compilation`."""
    monkeypatch.setattr(compiler_internal, "get_compile_options", USUAL_OPTIONS)
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_stored_arrays_are_read_as_they_were_written_small_and_large_in_any_layout() -> None:
    rng = np.random.default_rng(0)
    large = rng.standard_normal((300, 400))
    assert large.nbytes > LEAST_BYTES
    arrays = {
        "large": large,
        "turned": large.T[::2],
        "half": large.astype(jnp.bfloat16),
        "single": large.astype(np.float32),
        "integers": rng.integers(0, 9, 100_000),
        "number": np.asarray(3.5),
        "empty": np.zeros((0, 4)),
    }
    stored = Stored(arrays.items())
    stored["large"] = large + 1  # written again, as of a tensor that is tied
    for name, array in arrays.items():
        assert stored[name].dtype == np.float64
        assert np.array_equal(stored[name], array.astype(np.float64) + (name == "large"))


def test_what_is_stored_changes_no_more() -> None:
    changing = np.ones(4)
    stored = Stored([("x", changing)])
    changing[:] = 2
    assert (stored["x"] == 1).all()


def test_shapes_of_stored_events_are_known_in_their_order() -> None:
    events, key = StoredEvents(), Key("head", 0, "out")
    events[Key("", 0, "in")] = [np.ones(3)]
    events[key] = [np.ones((200, 300)), np.ones((2, 1))]
    assert list(events) == [Key("", 0, "in"), key]
    assert shapes_of(events, key) == [(200, 300), (2, 1)] == shapes_of(dict(events), key)


def test_weights_are_grouped_by_what_makes_whole_arrays_in_torch() -> None:
    q, k = (Part(0, index, index + 1, 2) for index in range(2))
    parts = [WeightName("qk", "q", parts=(q,)), WeightName("qk", "k", parts=(k,))]
    names = Names([*parts, WeightName("w", "w"), WeightName("v", "w")], {})
    assert sorted(map(sorted, names.groups(["q", "w", "other", "k"]))) == [["k", "q"], ["other"], ["w"]]


def test_a_program_holds_what_is_used_later() -> None:
    def program(x: jax.Array) -> jax.Array:
        y = jnp.sin(x)
        z = jnp.cos(y)
        return jnp.concatenate([z, y])

    assert work_of(jax.make_jaxpr(program)(jnp.ones(10)).jaxpr) == Work(live=40, numbers=40, convolved=0, operations=3)
    chained = jax.make_jaxpr(lambda x: jnp.sin(jnp.sin(jnp.sin(x))))(jnp.ones(10))
    assert work_of(chained.jaxpr) == Work(live=20, numbers=30, convolved=0, operations=3)


def test_what_a_scan_makes_counts_as_often_as_it_runs() -> None:
    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (jnp.sin(carry), None), x, length=7)[0]

    work = work_of(jax.make_jaxpr(looped)(jnp.ones(10)).jaxpr)
    assert work.numbers == 70
    assert work.operations == 1


def test_a_convolution_along_three_axes_has_a_product_for_each_number_of_its_kernel() -> None:
    options = {"feature_group_count": 2, "use_bias": False, "rngs": nnx.Rngs(0)}
    loops, products = nnx.Conv(4, 6, (3, 5, 2), **options), nnx.Conv(4, 6, (3, 5), **options)  # type: ignore[arg-type]
    closed = jax.make_jaxpr(lambda x: (loops(x), products(x[..., 0, :])))(jnp.ones((2, 7, 8, 3, 4)))
    assert work_of(closed.jaxpr).convolved == 2 * 7 * 8 * 3 * 6 * (3 * 5 * 2 * 2)


@pytest.mark.parametrize(
    ("work", "runs", "expected"),
    [
        (Work(live=1, numbers=MOST_NUMBERS, convolved=MOST_CONVOLVED, operations=1), 1, True),
        (Work(live=1, numbers=MOST_NUMBERS // 2, convolved=MOST_CONVOLVED // 2, operations=1), 2, True),
        (Work(live=1, numbers=MOST_NUMBERS // 2 + 1, convolved=0, operations=1), 2, False),
        (Work(live=1, numbers=MOST_NUMBERS, convolved=MOST_CONVOLVED + 1, operations=1), 1, False),
        (Work(live=1, numbers=MOST_NUMBERS + 1, convolved=0, operations=1), 1, False),
        (Work(live=1, numbers=3 * MOST_NUMBERS, convolved=0, operations=3), 1, True),
        (Work(live=1, numbers=3 * MOST_NUMBERS + 1, convolved=0, operations=3), 1, False),
    ],
)
@pytest.mark.usefixtures("optimized")
def test_only_what_computes_little_is_compiled_without_optimizations(work: Work, runs: int, expected: bool) -> None:
    def options() -> tuple[bool, bool]:
        made = compiler_internal.get_compile_options(num_replicas=1, num_partitions=1)
        emitters = dict(made.env_option_overrides).get("xla_cpu_use_fusion_emitters", True)
        return made.executable_build_options.debug_options.xla_backend_optimization_level > 0, bool(emitters)

    emitters = not work_of_xla._known_options()  # newer versions of XLA have no such option
    with compiled_for(work, jax.devices("cpu")[0], runs):
        assert options() == (not expected, emitters)
        assert np.asarray(jax.jit(jnp.sin)(1.0)).item() == pytest.approx(np.sin(1.0))
    assert options() == (True, True)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), ("3KiB", 3072), ("7", 7)],
)
def test_sizes_are_read(size: str, expected: int) -> None:
    assert bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "much", "2 GiBs", "-1GB", "0", "GiB"])
def test_what_is_no_size_is_an_error(size: str) -> None:
    with pytest.raises(ValueError, match="as in '2GiB'"):
        bytes_of(size)


def test_only_levels_that_fit_are_run() -> None:
    sizes = Sizes(weights=1 << 20, largest=1 << 10, live=1 << 10, kept=1 << 19)
    takes = needed(sizes)
    assert takes["forward"] == takes["layers"] < takes["gradients"] == takes["training"]
    found = too_large(("forward", "gradients"), sizes, budget=takes["gradients"] + 99, resident=100)
    assert list(found) == ["gradients"]
    assert shown(takes["gradients"] + 100) in found["gradients"]
    assert "outlook trace" in found["gradients"]
    assert too_large(("forward", "gradients"), sizes, budget=takes["gradients"] + 100, resident=100) == {}


def pair() -> tuple[torch.nn.Module, nnx.Module]:
    torch.manual_seed(0)
    model = torch.nn.Linear(400, 300)
    return model, load_torch_weights(nnx.Linear(400, 300, rngs=nnx.Rngs(0)), model)


def trained() -> list[dict[str, np.ndarray]]:
    x = {"input": np.random.default_rng(0).standard_normal((3, 400))}
    twins = make_pair(*pair(), x, NameMap())
    request = Request(x, "float64", "cpu", 0, "float64", steps=2)
    return [dict(runner.train(request).tensors) for runner in (twins.torch, twins.jax)]


def test_optimizers_that_update_a_part_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained()
    for stepper in (outlook_parity.backends.torch.optimizer, outlook_parity.backends.jax.optimizer):
        monkeypatch.setattr(stepper, "MOST_NUMBERS", 777)  # of 120,000 weights and 300 biases
    for one, other in zip(whole, trained(), strict=True):
        assert one.keys() == other.keys()
        assert "AdamW: second moment of weight" in one
        for name, array in one.items():
            np.testing.assert_allclose(other[name], array, rtol=1e-13, atol=0, err_msg=name)


def test_the_first_training_step_is_computed_once_for_all_optimizers_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1)))
    ours = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    x = {"input": np.random.default_rng(0).standard_normal((5, 3))}
    twin = make_pair(ours, load_torch_weights(model, ours), x, NameMap()).jax
    request = Request(x, "float64", "cpu", 0, "float64", steps=3)
    computed: list[object] = []
    call = runner_of_jax._Program.__call__
    monkeypatch.setattr(runner_of_jax._Program, "__call__", lambda *args: computed.append(0) or call(*args))
    together = dict(twin.train(request).tensors)
    assert len(computed) == 1 + 2 * len(OPTIMIZERS)
    for name, optimizer in OPTIMIZERS.items():
        monkeypatch.setattr(runner_of_jax, "OPTIMIZERS", {name: optimizer})
        for tensor, array in twin.train(request).tensors.items():
            assert np.array_equal(together.pop(tensor), array), tensor
    assert not together


def check(**options: str) -> Report:
    x = np.random.default_rng(0).standard_normal((3, 400))
    return verify(*pair(), x, levels=("forward", "gradients"), dtypes=("float64",), **options)  # type: ignore[arg-type]


def test_levels_that_take_more_than_the_budget_are_not_run_and_the_verdict_says_so() -> None:
    report = check(memory="1MiB")
    assert report.verdict == "not-run"
    assert {(row.level, row.verdict) for row in report.checks} == {
        ("weights", "pass"),
        ("forward", "not-run"),
        ("gradients", "not-run"),
    }
    assert "of memory, 1.0 MiB were given" in str(report.reason)
    assert check(memory="1TiB").verdict == "pass"


def test_the_weights_that_a_run_computed_with_are_freed_at_once() -> None:
    x = {"input": np.random.default_rng(0).standard_normal((3, 400))}
    jax_twin = make_pair(*pair(), x, NameMap()).jax
    request = Request(x, "float64", "cpu", 0, "float64", steps=1)
    gc.collect()
    gc.disable()
    try:
        for run in (jax_twin.run, partial(jax_twin.watch, recorder=None), jax_twin.train):
            run(request)
            assert not [array.shape for array in jax.live_arrays() if array.size >= 400 * 300 and array.dtype == float]
    finally:
        gc.enable()
