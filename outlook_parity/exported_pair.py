"""A model and an exported program as a pair of twins: outputs alone, in the program's precision."""

from collections.abc import Mapping
from typing import Any

from outlook_common.text import listed
from outlook_parity.backends.exported.base import Exported
from outlook_parity.backends.exported.runner import ExportedRunner
from outlook_parity.backends.jax.model import as_jax_model
from outlook_parity.backends.jax.runner import JaxRunner
from outlook_parity.backends.torch.model import as_torch_module
from outlook_parity.backends.torch.runner import TorchRunner
from outlook_parity.core.layout import Axes, fitting_axes
from outlook_parity.core.masks import output_masks
from outlook_parity.core.outputs import Output, OutputMatch, match_outputs
from outlook_parity.core.plan import LEVELS
from outlook_parity.core.precision import TRUTH
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.runner import Runner
from outlook_parity.core.task import no_task
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.output_axes import Shapes, output_axes
from outlook_parity.mapping.user import NameMap, torch_axes_of
from outlook_parity.models.registry import known_model
from outlook_parity.pair import Pair

LEVEL = "forward"


def make_exported_pair(
    torch_model: Any, jax_model: Any, inputs: Inputs, name_map: NameMap, output_mask: Any = None
) -> Pair:
    """Return a model and an exported program as a pair of twins.

    Args:
        torch_model: a module or a function; or an `Exported`.
        jax_model: its twin, see `as_jax_model`; or an `Exported`. One of both is a model.
        inputs: by name, as JAX takes them.
        name_map: the user's map; its axes alone count.
        output_mask: see `output_masks`.

    Raises:
        TypeError: the model is none.
        ValueError: both are programs; or the program takes other inputs.
    """
    if isinstance(torch_model, Exported) and isinstance(jax_model, Exported):
        raise ValueError(
            f"{torch_model.label} and {jax_model.label} are both exported programs: one twin must be a model, which "
            "computes the float64 truth"
        )
    of_torch = isinstance(torch_model, Exported)
    exported = torch_model if of_torch else jax_model
    model: Any = as_jax_model(jax_model) if of_torch else as_torch_module(torch_model)
    known = known_model(model if not of_torch else getattr(model, "module", None))
    torch_axes = torch_axes_of(name_map, inputs, known.torch_axes if known else None)
    taken, layout = _axes(exported, inputs, torch_axes, of_torch=of_torch)

    def runners(out_axes: Mapping[str, Axes], matched: OutputMatch | None) -> tuple[Any, Any]:
        if of_torch:
            jax = JaxRunner(model, Names([], {}), no_task, matched, weightless=True)
            return ExportedRunner("torch", exported, taken, out_axes), jax
        torch = TorchRunner(model, torch_axes, no_task, out_axes, [], matched)
        return torch, ExportedRunner("jax", exported, taken, outputs=matched)

    plain = runners({}, None)
    torch_outputs, jax_outputs = (_outputs(runner, inputs, exported.dtype) for runner in plain)
    matched = match_outputs(torch_outputs, jax_outputs, lambda one, other: bool(fitting_axes(one, other)))

    def shapes(torch: Mapping[str, Output], jax: Mapping[str, Output]) -> tuple[Shapes, Shapes]:
        ours = {name: output.shape for name, output in torch.items()}
        return ours, {name: output.shape for name, output in matched.of_jax(jax).items()}

    def shapes_of(inputs: Inputs) -> tuple[Shapes, Shapes]:
        torch, jax = (_outputs(runner, inputs, exported.dtype) for runner in plain)
        return shapes(torch, jax)

    torch_shapes, jax_shapes = shapes(torch_outputs, jax_outputs)
    # What the order of the inputs' axes says of that of the outputs': nothing where both twins take them alike.
    relative = {name: axes for name, axes in torch_axes.items() if (taken[name] == axes) == of_torch}
    found = output_axes(torch_shapes, jax_shapes, name_map.out_axes, relative, inputs, shapes_of)
    masks = output_masks(output_mask, inputs, jax_shapes)
    torch, jax = runners(found.orders, matched)
    why = f"{exported.label} has outputs alone, for {LEVEL!r}"
    notes = [] if exported.dtype == TRUTH else [_judged(exported, "JAX" if of_torch else "torch")]
    return Pair(
        torch,
        jax,
        Names([], {}),
        {level: why for level in LEVELS if level != LEVEL},
        masks=masks,
        notes=(*layout, *notes, *matched.notes, *found.notes, *masks.notes),
        truth="jax" if of_torch else "torch",
        precision=exported.dtype,
    )


def _judged(exported: Exported, twin: str) -> str:
    return (
        f"{exported.label} computes in {exported.dtype} alone: its error was judged by that of {twin} in "
        f"{exported.dtype}, both against {twin} in float64"
    )


def _axes(
    exported: Exported, inputs: Inputs, torch_axes: Mapping[str, Axes], *, of_torch: bool
) -> tuple[dict[str, Axes], list[str]]:
    """Return in which order the program takes the axes of the inputs, and a note if not as its twin would.

    As the twin does in whose place it stands, unless its declared shapes take them as the other twin does alone.
    """
    same = {name: tuple(range(array.ndim)) for name, array in inputs.items()}
    usual, other = (dict(torch_axes), same) if of_torch else (same, dict(torch_axes))
    for axes in (usual, other):
        try:
            exported.check_inputs(inputs, axes)
        except ValueError:
            continue
        changed = [f"{name} in the order {list(axes[name])}" for name in inputs if axes[name] != usual[name]]
        note = f"{exported.label} takes the axes as {'JAX' if of_torch else 'torch'} does, by its shapes"
        return axes, [f"{note}: {listed(changed)}"] if changed else []
    exported.check_inputs(inputs, usual)
    raise AssertionError("unreachable: the check above has raised")


def _outputs(runner: Runner, inputs: Inputs, dtype: str) -> dict[str, Output]:
    run = runner.run(Request(inputs, dtype, "cpu", 0, dtype), gradients=False)
    return {name: Output(array.shape, "float" in run.dtypes[name]) for name, array in run.outputs.items()}
