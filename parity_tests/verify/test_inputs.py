"""Inputs by keyword, masks, and outputs that are named here and not there."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from outlook_parity import Report, verify
from outlook_parity.core.outputs import Output, match_outputs
from outlook_parity.core.request import Request

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, 4, 3, 5))
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])


def check(torch_model: Any, jax_model: Any, inputs: Any, **options: Any) -> Report:
    return verify(torch_model, jax_model, inputs, levels=("forward", "gradients"), dtypes=("float64",), **options)


def torch_pool(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x.sin() * mask[..., None]).sum(1)


def jax_pool(mask: Any, x: Any) -> Any:
    return (jnp.sin(x) * mask[..., None]).sum(1)


def test_arguments_in_another_order_are_passed_by_keyword() -> None:
    assert check(torch_pool, jax_pool, {"x": X, "mask": MASK}).verdict == "pass"
    assert check(torch_pool, jax_pool, {"mask": MASK, "x": X}).verdict == "pass"


def test_a_single_input_by_keyword_need_not_be_the_first_argument() -> None:
    def theirs(y: torch.Tensor | None = None, x: torch.Tensor | None = None) -> Any:
        return x.sin() if x is not None else y.cos()  # type: ignore[union-attr]

    assert check(theirs, lambda x: jnp.sin(x), {"x": X}).verdict == "pass"
    assert check(theirs, lambda x: jnp.cos(x), {"x": X}).verdict == "mismatch"


def test_names_that_one_model_does_not_have_are_the_order_of_the_arguments() -> None:
    assert check(lambda a, b: a.sin() - b, lambda x, y: jnp.sin(x) - y, {"x": X, "y": Y}).verdict == "pass"
    assert check(lambda a, b: a.sin() - b, lambda x, y: jnp.sin(x) - y, {"a": X, "b": Y}).verdict == "pass"


def test_a_mask_of_ones_is_a_note_where_another_input_tells_something() -> None:
    report = check(torch_pool, jax_pool, {"x": X, "mask": np.ones_like(MASK)})
    assert report.verdict == "pass"
    assert report.notes == ("input.mask is 1 everywhere: no fault could be seen in what it decides",)
    alone = check(lambda m: m.sum() * 1.0, lambda m: m.sum() * 1.0, np.ones((3, 4), int))
    assert alone.verdict == "not-run"
    assert "is 1 everywhere" in str(alone.reason)


def test_boolean_masks_reach_both_models_as_they_are() -> None:
    report = check(
        lambda x, mask: x.exp().masked_fill(~mask[..., None], 0.5),
        lambda x, mask: jnp.where(mask[..., None], jnp.exp(x), 0.5),
        {"x": X, "mask": MASK.astype(bool)},
    )
    assert report.verdict == "pass", str(report)


def softmaxed(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x.sum(-1) + (1 - mask) * -1e9).softmax(-1)


def softmaxed_in_jax(x: Any, mask: Any) -> Any:
    logits = jnp.where(mask > 0, x.sum(-1), -1e30)
    powers = jnp.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_samples_that_are_all_padding_are_excluded_with_a_note() -> None:
    mask = MASK.copy()
    mask[2] = 0
    report = check(softmaxed, softmaxed_in_jax, {"x": X, "mask": mask})
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert "samples 2 of 4 were excluded: input.mask is 0 everywhere in them" in report.notes
    wrong = check(softmaxed, lambda x, mask: softmaxed_in_jax(1.01 * x, mask), {"x": X, "mask": mask})
    assert wrong.verdict == "mismatch"


def test_positions_that_do_not_count_are_given_by_output_mask() -> None:
    def theirs(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x.sin() * mask[..., None]

    def ours(x: Any, mask: Any) -> Any:
        return jnp.where(mask[..., None] > 0, jnp.sin(x), jnp.cos(x))

    inputs = {"x": X, "mask": MASK}
    assert check(theirs, ours, inputs).verdict == "mismatch"
    for given in (MASK, {"output": MASK}, MASK.astype(bool)):
        report = check(theirs, ours, inputs, output_mask=given)
        assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
        assert "15 of 60 numbers of output were excluded by output_mask" in report.notes
    assert check(theirs, lambda x, mask: 2 * ours(x, mask), inputs, output_mask=MASK).verdict == "mismatch"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((7, 3)), r"output_mask of shape \(7, 3\) fits the leading axes of no output: output \(4, 3, 5\)"),
        ({"logits": MASK}, "output_mask names logits; the outputs are output"),
        (np.zeros((4, 3)), "0 everywhere: nothing would be compared"),
    ],
    ids=["shape", "name", "zeros"],
)
def test_an_output_mask_that_fits_nothing_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(torch.sin, jnp.sin, X, output_mask=mask)


def test_a_mapping_here_and_a_tuple_there_are_matched_by_position() -> None:
    def theirs(x: torch.Tensor) -> Any:
        return {"states": x.sin(), "features": x.cos()}

    report = check(theirs, lambda x: (jnp.sin(x), jnp.cos(x)), X)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    matched = "output.states of torch and output.0 of JAX, output.features of torch and output.1 of JAX"
    assert f"outputs were matched by position: {matched}" in report.notes
    assert check(theirs, lambda x: (jnp.cos(x), jnp.sin(x)), X).verdict == "mismatch"


def test_a_bare_array_is_matched_with_the_only_output_of_its_shape_and_the_rest_is_said() -> None:
    def theirs(x: torch.Tensor) -> Any:
        return {"states": x.sin(), "pooled": x.mean(1), "cache": object()}

    report = check(theirs, lambda x: jnp.sin(x), X)
    wrong = [row for row in report.checks if row.verdict == "mismatch"]
    assert {(row.name, row.note) for row in wrong if row.level == "forward"} == {("output.pooled", "missing in jax")}
    report = check(theirs, lambda x: jnp.sin(x), X, ignore={"*output.pooled*": "the port has no pooling"})
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert "not compared, as it holds no arrays: output.cache (object) of torch" in report.notes
    assert "not all outputs compared" in str(report)


def test_an_output_that_one_model_knows_and_does_not_give_is_missing() -> None:
    def theirs(x: torch.Tensor) -> Any:
        return {"states": x.sin(), "pooled": x.mean(1)}

    assert check(theirs, lambda x: {"states": jnp.sin(x), "pooled": None}, X).verdict == "mismatch"
    assert check(theirs, lambda x: {"states": jnp.sin(x)}, X).verdict == "mismatch"


def test_an_item_that_a_tuple_lacks_is_missing() -> None:
    report = check(lambda x: (x.sin(), x.cos()), lambda x: (jnp.sin(x),), X)
    assert report.verdict == "mismatch"
    assert next(row.note for row in report.checks if row.verdict == "mismatch") == "missing in jax"


def test_outputs_of_one_shape_are_not_matched_by_it() -> None:
    one, other = Output((2, 3), True), Output((2, 3), True)
    matched = match_outputs({"output.a": one, "output.b": other}, {"output": one}, lambda a, b: a == b)
    assert matched.torch_names == {}


def test_training_reaches_outputs_that_are_matched_and_masked() -> None:
    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.arange(1.0, 6.0))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
            return {"states": x.sin() * self.scale * mask[..., None], "cache": object()}

    def ours(weights: Any, x: Any, mask: Any) -> Any:
        return (jnp.where(mask[..., None] > 0, jnp.sin(x) * weights["scale"], 7.0),)

    weights = {"scale": jnp.arange(1.0, 6.0)}
    options: dict[str, Any] = {"levels": ("forward", "training"), "dtypes": ("float64",)}
    inputs = {"x": X, "mask": MASK}
    report = verify(Theirs(), (ours, weights), inputs, **options, output_mask=MASK)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert verify(Theirs(), (ours, weights), inputs, **options).verdict == "mismatch"


def test_a_single_number_is_perturbed_as_an_array_is() -> None:
    request = Request({"x": X}, "float64", "cpu", 0, "float32", perturbed=16.0)
    for shape in ((), (1,), (3, 2)):
        moved = request.rounded("scale", np.full(shape, 2.5))
        assert isinstance(moved, np.ndarray)
        np.testing.assert_allclose(np.abs(moved / 2.5 - 1), 16 * np.finfo(np.float32).eps, rtol=1e-6)
