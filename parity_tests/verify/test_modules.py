"""The level "layers": every module of both twins, propagated and alone on the other's numbers."""

import numpy as np
import pytest
import torch

from outlook_parity import Report
from outlook_parity.compare.modules import MODEL
from outlook_parity.core.check import PROPAGATED
from outlook_parity.core.layout import Axes, fitting_axes, nearest_axes
from outlook_parity.core.recorder import Key, Recorder
from outlook_parity.core.request import Request
from outlook_parity.mapping.user import NameMap
from outlook_parity.pair import make_pair
from parity_tests.support.small_volo import check, small_images, small_volo, wrong

pytestmark = pytest.mark.usefixtures("quick_compilation")

VIEWS = (PROPAGATED, "torch", "jax")


DTYPES = [
    pytest.param("float64"),
    pytest.param("float32", marks=pytest.mark.slow(reason="compiles every operation again, and the truth's")),
]


@pytest.fixture(scope="module", params=DTYPES)
def honest(request: pytest.FixtureRequest) -> Report:
    return check(small_volo(scan_layers=True), "layers", dtypes=(request.param,))


def wrong_alone(report: Report) -> set[str]:
    return {row.name for row in report.checks if row.verdict == "mismatch" and row.view in ("torch", "jax")}


def test_honest_twins_pass_also_where_blocks_run_as_a_loop(honest: Report) -> None:
    assert honest.verdict == "pass", [row for row in honest.checks if row.verdict == "mismatch"]
    assert (honest.first_divergence, honest.cause) == (None, None)


def test_every_module_with_weights_has_a_row_per_dtype_and_view(honest: Report) -> None:
    torch_model, _ = small_volo()
    owners = {name.rpartition(".")[0] or MODEL for name, _ in torch_model.named_parameters()}
    rows = {(row.name, row.view) for row in honest.checks if row.level == "layers"}
    assert {(owner, view) for owner in owners for view in VIEWS} <= rows


def test_watching_changes_nothing_and_a_reversed_batch_gives_the_same(honest: Report) -> None:
    rows = {row.name: row for row in honest.checks if row.level == "self-check"}
    assert set(rows) == {
        "torch: watched against plain",
        "jax: module by module against jit",
    }
    assert {row.verdict for row in rows.values()} == {"pass"}
    equal = 1.0 if rows["torch: watched against plain"].torch_noise else 0.0  # the factor, or the difference
    assert rows["torch: watched against plain"].measured == equal
    again = {(noise.twin, noise.how): noise for noise in honest.self_noise}
    assert set(again) == {(twin, how) for twin in ("torch", "jax") for how in ("called twice", "batch reversed")}
    assert all(noise.units < 100 for noise in again.values())
    assert honest.notes == ()


@pytest.mark.parametrize("twin", [0, 1], ids=["torch", "jax"])
def test_a_fault_is_found_where_it_is_and_propagates(twin: int) -> None:
    models = small_volo()
    block = models[twin].network[2][0]
    if twin == 0:
        block.mlp.register_forward_hook(lambda module, args, output: output * 1.001)
    else:
        block.norm2.epsilon = 1e-3
    report = check(models, "layers")
    expected = ("network.2.0.mlp", "network.2.0.norm2")[twin]
    assert report.verdict == "mismatch"
    assert report.first_divergence == expected
    assert wrong_alone(report) == {expected}
    behind = [row.name for row in report.checks if row.view == PROPAGATED and row.verdict == "mismatch"]
    assert {"network.2.0", "network.2.1", "norm", "head", MODEL} <= set(behind)
    assert not any(name.startswith(("patch_embed", "network.0", "network.1")) for name in behind)


@pytest.mark.parametrize("twin", [0, 1], ids=["torch", "jax"])
def test_what_goes_wrong_between_modules_is_told_from_what_goes_wrong_in_them(
    twin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = small_volo()
    owner = type(models[twin])
    honest = owner._pos_embed
    monkeypatch.setattr(owner, "_pos_embed", lambda self, size: 1.01 * honest(self, size))
    report = check(models, "layers")
    assert wrong_alone(report) == {MODEL}
    assert report.first_divergence == MODEL
    assert report.cause is not None
    assert "pos_drop" in report.cause  # which comes first behind it


@pytest.mark.slow(reason="compiles every operation in two precisions")
def test_a_fault_in_a_lower_precision_alone_is_found_there() -> None:
    models = small_volo()

    def rounded(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output if output.dtype == torch.float64 else output.bfloat16().to(output.dtype)

    models[0].network[1].register_forward_hook(rounded)
    report = check(models, "layers", dtypes=("float64", "float32"))
    assert report.first_divergence == "network.1"
    assert {row.dtype for row in report.checks if row.verdict == "mismatch"} == {"float32"}


def test_a_tape_plays_to_each_module_what_it_holds() -> None:
    models = small_volo()
    pair = make_pair(*models, {"input": small_images()}, NameMap())
    request = Request({"input": small_images()}, "float64", "cpu", 0, "float64")
    recorded, again = Recorder(), Recorder()
    for twin in (pair.torch, pair.jax):
        recorded, again = Recorder(), Recorder()
        output = twin.watch(request, recorded)
        assert np.array_equal(twin.watch(request, again)["output"], output["output"])
        assert list(recorded.events) == list(again.events)
        doubled = {Key("head", 0, "out"): [2 * array for array in recorded.events[Key("head", 0, "out")]]}
        played = Recorder(doubled)
        twin.watch(request, played)
        assert np.array_equal(played.events[Key("head", 0, "out")][0], recorded.events[Key("head", 0, "out")][0])
        difference = played.events[Key("", 0, "out")][0] - recorded.events[Key("", 0, "out")][0]
        assert difference == pytest.approx(recorded.events[Key("head", 0, "out")][0])


def nearest_fitting(torch: np.ndarray, jax: np.ndarray) -> Axes | None:
    fitting = fitting_axes(torch.shape, jax.shape)
    return nearest_axes(torch, jax, fitting) if fitting else None


def test_axes_are_told_by_shapes_and_where_those_leave_a_choice_by_the_numbers() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 5))
    assert nearest_fitting(x.transpose(0, 3, 1, 2), x) == (0, 2, 3, 1)
    assert nearest_fitting(x, x) == (0, 1, 2, 3)
    assert nearest_fitting(x[:, :3].transpose(0, 3, 1, 2), x[:, :3]) == (0, 2, 3, 1)
    assert nearest_fitting(x[:, :3], x[:, :, :3]) is None


def test_the_levels_forward_and_layers_agree() -> None:
    models = small_volo()
    models[1].norm.epsilon = 1e-4
    report = check(models, "forward", "layers")
    assert "output" in wrong(report)
    assert report.first_divergence == "norm"
