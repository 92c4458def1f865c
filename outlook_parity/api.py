"""`verify`: whether two models compute the same thing; to rounding in float64, with equal noise in lower precisions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outlook_common.extras import require
from outlook_parity.compare.determinism import notes_on
from outlook_parity.compare.excused import check_waivers
from outlook_parity.compare.modules import MODEL
from outlook_parity.compare.noise import rounding_units
from outlook_parity.compare.tensors import judge, notes_on_inputs, refusal
from outlook_parity.core.attributes import ONLY_AS_CAUSE
from outlook_parity.core.check import Check
from outlook_parity.core.environment import versions
from outlook_parity.core.memory import bytes_of, resident_bytes, too_large
from outlook_parity.core.plan import LEVELS, STEPS, Plan, Progress
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.request import DEVICES, Inputs, Request, inputs_of, keywords_of, named_inputs
from outlook_parity.core.sharding import RULES, ShardingRequest
from outlook_parity.diagnose.causes import Explanation
from outlook_parity.diagnose.precision import notes_on_products
from outlook_parity.mapping.found import note_on_correspondence
from outlook_parity.mapping.toml import write_name_map
from outlook_parity.mapping.user import NameMap
from outlook_parity.report.report import LEVEL_LEFT_OUT, Report
from outlook_parity.session import Session

if TYPE_CHECKING:
    from outlook_parity.backends.devices import Availability
    from outlook_parity.backends.exported.base import Exported
    from outlook_parity.pair import Pair


def verify(
    torch_model: Any,
    jax_model: Any,
    inputs: Any,
    *,
    levels: Sequence[str] | None = None,
    dtypes: Sequence[str] = (TRUTH, "float32"),
    training_dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    steps: int = STEPS,
    names: NameMap | None = None,
    ignore: Mapping[str, str] | None = None,
    output_mask: Any = None,
    memory: str | None = None,
    progress: Progress | None = None,
    write_map: Path | None = None,
    devices: int | None = None,
    sharding: str = "data",
) -> Report:
    """Compare two twins that hold the same weights.

    In float64, on the CPU, their weights must be equal, and outputs and gradients agree to rounding. In each lower
    precision, on `device`, each twin's error against the float64 truth must be within a small factor of the other's.
    Both run on recast copies, in eval mode but for the training steps, where masks that both share decide what is
    dropped: the models, their modes and all global settings stay as they are.

    A JAX twin whose weights or inputs are sharded over a mesh runs so, on as many devices; what lies on one device is
    then whole on all, and inputs are split along the batch over the mesh's first axis. PyTorch's runs in one process.

    Args:
        torch_model: a `torch.nn.Module`, or a function. Either twin may be an exported program instead: the path of an
            .onnx file, of one of `torch.export.save` or of AOTInductor (.pt2), or of a serialized `jax.export`
            (.jax_export), or what `torch.export.export` and `jax.export.export` return. It has the level "forward"
            alone, in the precision of its inputs; the other twin computes the float64 truth. A .pt2 can execute any
            code when it is loaded: give none that you do not trust.
        jax_model: its twin: an `nnx.Module`, a pair of a Linen module and its variables, a pair of a function and the
            pytree of weights that it takes first, a pair of what `haiku.transform` returns and its parameters, an
            `equinox.Module`, a `keras.Model` on JAX, a `FlaxPreTrainedModel`, or a function of the inputs alone.
        inputs: what both are called with, as JAX takes it (maps channels last): an array (NumPy, or anything it reads),
            a sequence of them, or a mapping from names, which are the report's: passed by keyword if both models have
            arguments of all these names, else in the order given.
            Floating-point numbers must vary along each of their axes; integers and booleans (ids, masks) are neither
            rounded nor differentiated. Images for a VOLO go to PyTorch with the channels first, as it takes them.
        levels: "forward" (the outputs: of tuples, lists, mappings and dataclasses each leaf by its path), "layers"
            (what every module gives, on its own input and on the other twin's), "gradients" (of the sum of outputs
            times random cotangents, with respect to inputs and every parameter), "training" (losses, and every
            parameter, buffer and state of the optimizer after the last step, of SGD with momentum and of AdamW). None
            for all that the pair allows; what was left out is among the notes.
        dtypes: the precisions, of "float64", "float32", "tf32", "bfloat16", "float16". In "tf32" numbers are float32,
            and products may round what they multiply to TF32, which some GPUs do; elsewhere it does not run.
        training_dtypes: those of `dtypes` to train in, which takes the longest; None for all.
        device: "cpu", "gpu" or "tpu", for the lower precisions; PyTorch's part of a TPU run is on the CPU.
        seed: of the cotangent and of what is trained on.
        steps: of training, with each optimizer.
        names: what corresponds to what in models that are not of this package, where Flax's usual names do not say it,
            and in which order PyTorch takes the axes of the inputs.
        ignore: patterns of names of rows, as in "*.mask_token", and why each is ignored: such rows are skipped.
        output_mask: not 0 at the positions of the outputs that count, those of no padding say: an array for the leading
            axes of every output that has them, or a mapping from outputs to such arrays. A sample for which an integer
            input with "mask" in its name is 0 everywhere never counts.
        memory: what the process may hold, as in "2GiB"; what takes more, by an estimate from weights and intermediate
            results, is not run, and the verdict "not-run". None for no bound. Gradients and activations wait in a
            temporary file (see `tempfile`) until they are compared, whatever this is.
        progress: called before each run and once after the last, with what runs next, how many runs are done, and
            how many there are.
        write_map: a file to write what was found to correspond to, as `read_name_map` reads it.
        devices: over how many devices to spread a JAX twin that lies on one; the CPU needs as many, for float64.
        sharding: how: "data", where all have the weights and each its part of the batch, or "fsdp", where each weight
            is split too: of this package's models as by `outlook_jax.partition_specs`, else along its longest axis that
            the devices divide.

    Returns:
        The report. Its verdict is "not-run" if the device is absent, or there are fewer than `devices`, or it has no
        TF32 and that was asked for, or if the inputs can tell nothing, or a level takes more memory than was given.
        NaN, Inf, missing tensors and empty comparisons never pass.

    Raises:
        ValueError: a level, dtype or device is unknown, or none is given, or a level cannot be had of plain functions;
            or there are no training steps; or `memory` is no size; a model fails, with the module that ran, shapes and
            line; or a pattern of `ignore` matches nothing.
        TypeError: the inputs are no numbers, or a model is none, or returns something that holds no arrays.
        ImportError: PyTorch or JAX is not installed.
    """
    _check_arguments(levels, dtypes, training_dtypes, device, steps, devices, sharding)
    check_waivers(ignore or {})
    budget = None if memory is None else bytes_of(memory)
    exported = {twin: _exported(model) for twin, model in (("torch", torch_model), ("jax", jax_model))}
    if any(exported.values()):
        _check_exported(device, memory, devices)
    arrays = inputs_of(inputs)
    available = _availability(device, dtypes, devices)
    if reason := refusal(arrays) or available.absence:
        return Report("not-run", reason=reason, environment=versions())
    spread = ShardingRequest(devices, sharding, named_inputs(inputs))
    if any(exported.values()):
        models = exported["torch"] or torch_model, exported["jax"] or jax_model
        pair = _exported_pair(*models, arrays, names or NameMap(), output_mask)
    else:
        pair = _pair(torch_model, jax_model, arrays, names, keywords_of(inputs), output_mask, spread)
    if write_map is not None:
        write_name_map(write_map, pair.names, names.torch_axes if names else None)
    chosen = _levels(levels, pair.refused)
    dtypes, one_alone = _dtypes(dtypes, pair.precision)
    trained = dtypes if training_dtypes is None else training_dtypes
    plan = Plan(chosen, dtypes, trained, device, seed, steps, available.missing_products)
    if budget is not None:
        plan = replace(plan, too_large=too_large(chosen, pair.sizes(arrays), budget, resident_bytes()))
    session = Session(pair, arrays, plan, progress)
    session.run()
    session.notes += notes_on_inputs(arrays)
    if ignore:
        session.waive(ignore)
    left_out = {} if levels is not None else pair.refused
    found = _report(session, plan, left_out, has_weights=bool(pair.names.expected), environment=available.environment)
    notes = (one_alone, note_on_correspondence(pair.names), str(pair.sharding) if pair.sharding else None)
    return replace(found, notes=(*found.notes, *(note for note in notes if note)), sharding=pair.sharding)


def _check_arguments(
    levels: Sequence[str] | None,
    dtypes: Sequence[str],
    training_dtypes: Sequence[str] | None,
    device: str,
    steps: int,
    devices: int | None,
    sharding: str,
) -> None:
    for dtype in training_dtypes or ():
        if dtype not in dtypes:
            raise ValueError(f"training_dtypes has {dtype!r}, which is not among dtypes: {', '.join(dtypes)}")
    for what, count in (("steps", steps), ("devices", 1 if devices is None else devices)):
        if count < 1:
            raise ValueError(f"{what} must be at least 1, got {count}")
    for what, values, known in (
        ("level", LEVELS if levels is None else levels, LEVELS),
        ("dtype", dtypes, PRECISIONS),
        ("device", [device], DEVICES),
        ("sharding", [sharding], RULES),
    ):
        if not values or isinstance(values, str):
            raise ValueError(f"{what}s must be a sequence of at least one of {', '.join(known)}, got {values!r}")
        for name in values:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    require("torch", "jax", "flax", "optax", needed_by="outlook_parity.verify")


# Both import the frameworks: only once they are needed.


def _availability(device: str, dtypes: Sequence[str], devices: int | None) -> "Availability":
    from outlook_parity.backends.devices import availability

    return availability(device, dtypes, devices)


def _pair(
    torch_model: Any,
    jax_model: Any,
    inputs: Inputs,
    names: NameMap | None = None,
    keywords: tuple[str, ...] = (),
    output_mask: Any = None,
    sharding: ShardingRequest | None = None,
) -> "Pair":
    from outlook_parity.pair import make_pair

    return make_pair(torch_model, jax_model, inputs, names or NameMap(), keywords, output_mask, sharding)


def _exported(model: Any) -> "Exported | None":
    from outlook_parity.backends.exported.registry import as_exported

    return as_exported(model)


def _exported_pair(torch_model: Any, jax_model: Any, inputs: Inputs, names: NameMap, output_mask: Any) -> "Pair":
    from outlook_parity.exported_pair import make_exported_pair

    return make_exported_pair(torch_model, jax_model, inputs, names, output_mask)


def _check_exported(device: str, memory: str | None, devices: int | None) -> None:
    """Raise a ValueError for options that exported programs do not have."""
    for option, value, possible in (("device", device, "cpu"), ("memory", memory, None), ("devices", devices, None)):
        if value != possible:
            raise ValueError(
                f"{option}={value!r} is for two models: an exported program runs on the CPU, and takes what it takes"
            )


def _dtypes(dtypes: Sequence[str], precision: str | None) -> tuple[Sequence[str], str | None]:
    """Return the precisions that can be compared, and as a note which were left out.

    Raises:
        ValueError: none can.
    """
    left_out = [dtype for dtype in dtypes if precision not in (None, dtype)]
    if not left_out:
        return dtypes, None
    if len(left_out) == len(dtypes):
        raise ValueError(f"the exported program computes in {precision} alone, and dtypes are {', '.join(dtypes)}")
    return [str(precision)], f"left out, for the exported program computes in {precision} alone: {', '.join(left_out)}"


def _levels(levels: Sequence[str] | None, refused: Mapping[str, str]) -> Sequence[str]:
    """Return the levels to compare: those given, else all that the pair allows.

    Raises:
        ValueError: a level is given that the pair does not allow.
    """
    if levels is None:
        return [level for level in LEVELS if level not in refused]
    if impossible := [f"{level!r} ({refused[level]})" for level in levels if level in refused]:
        raise ValueError(f"levels that cannot be had of this pair: {', '.join(impossible)}")
    return levels


def _report(
    session: Session, plan: Plan, left_out: Mapping[str, str], *, has_weights: bool, environment: Mapping[str, str]
) -> Report:
    """Return the verdict on all rows, and the cause of a mismatch."""
    not_run = [
        Check(level, dtype, MODEL, "not-run", bound=0.0, note=absence)
        for level, dtype in plan.requested
        if (absence := plan.absence(level, dtype)) is not None
    ]
    checks = [*session.checks, *not_run]
    verdict, reason = judge(checks, [*([("weights", "as given")] if has_weights else []), *plan.requested])
    differing = session.differences()
    explained = session.explanation(differing) if verdict == "mismatch" else Explanation(None, None)
    omitted = [f"{LEVEL_LEFT_OUT}{level!r} was left out: {why}" for level, why in left_out.items()]
    return Report(
        verdict,
        checks=tuple(checks),
        reason=reason,
        first_divergence=explained.path,
        cause=explained.cause,
        differences=tuple(str(difference) for difference in differing if difference.attribute not in ONLY_AS_CAUSE),
        notes=(*notes_on(session.self_noise), *notes_on_products(checks), *session.notes, *omitted),
        self_noise=tuple(session.self_noise),
        curves=session.curves,
        environment={**versions(), **environment},
    )


def difference_map(
    torch_model: Any, jax_model: Any, inputs: Any, *, device: str = "cpu", seed: int = 0, dtype: str = "float32"
) -> np.ndarray:
    """Return |jax - torch| of the first sample's output in units of rounding: eps of `dtype` times torch's RMS.

    Args:
        torch_model: as in `verify`.
        jax_model: likewise.
        inputs: likewise.
        device: "cpu", "gpu" or "tpu".
        seed: of the request; outputs in eval mode do not depend on it.
        dtype: the precision that both compute in.

    Returns:
        (h, w, C) of a map, in general the output's shape without its batch axis; of several outputs the first.

    Raises:
        TypeError: a model is none.
        ValueError: a model fails on these inputs.
    """
    arrays = inputs_of(inputs)
    pair = _pair(torch_model, jax_model, arrays, None, keywords_of(inputs))
    request = Request(arrays, dtype, device, seed, rounded_to=dtype, keywords=pair.keywords)
    torch, jax = (runner.run(request, gradients=False).outputs for runner in (pair.torch, pair.jax))
    output = next(iter(torch))
    return rounding_units(torch[output][0], jax[output][0], dtype)
