"""Verdict on two traces. Imports no framework."""

from collections.abc import Mapping

import numpy as np

from outlook_parity.compare import tensors as compare
from outlook_parity.compare.modules import Suspect, compare_recorded, shown_path
from outlook_parity.compare.residue import possible
from outlook_parity.core.check import TWINS, Check, Tensors
from outlook_parity.diagnose.precision import notes_on_products
from outlook_parity.report.report import Report
from outlook_parity.trace.file import TraceFile, environment_of, refusal

Traces = Mapping[str, TraceFile]  # by twin, "torch" and "jax"; in lower precisions "truth" too
Expected = tuple[str, str]  # a level and a dtype that must have been compared


def compare_traces(one: TraceFile, other: TraceFile, truth: TraceFile | None = None) -> Report:
    """Compare outputs, gradients and modules of two traces; each module on its own input.

    Args:
        one: of either framework.
        other: of the other.
        truth: in float64 of the same rounded numbers; needed in lower precisions.

    Raises:
        ValueError: inputs, weights, dtypes or seeds differ, or the truth is missing.
    """
    if reason := refusal(one, other, truth):
        raise ValueError(f"these traces cannot be compared: {reason}")
    twins = {one.header.framework: one, other.header.framework: other}
    dtype = one.header.dtype
    traces = twins if dtype == "float64" or truth is None else {**twins, "truth": truth}
    checks, expected = _outputs_and_gradients(twins, traces, dtype)
    checks = [*_output_dtypes(twins, dtype), *checks]
    suspects: list[Suspect] = []
    if all(trace.events for trace in twins.values()):
        rows, suspects = _modules(traces, dtype)
        checks += rows
        expected.append(("layers", dtype))
    verdict, reason = compare.judge(checks, expected)
    path, cause = _first_divergence(suspects) if verdict == "mismatch" else (None, None)
    constants = {twin: {path or None: names for path, names in t.header.constants.items()} for twin, t in twins.items()}
    residue = possible(checks, constants)
    return Report(
        verdict,
        checks=tuple(checks),
        reason=reason,
        first_divergence=path,
        cause=cause,
        notes=(*notes_on_products(checks), *([residue] if residue else [])),
        environment=environment_of(twins["torch"].header) | environment_of(twins["jax"].header),
    )


def _output_dtypes(twins: Traces, dtype: str) -> list[Check]:
    """Check that floating-point outputs have the dtype that was asked for."""
    return [
        check
        for twin, trace in twins.items()
        for output, found in trace.header.output_dtypes.items()
        if "float" in found
        for check in compare.compare_dtype(twin, dtype, found, output)
    ]


def _outputs_and_gradients(twins: Traces, traces: Traces, dtype: str) -> tuple[list[Check], list[Expected]]:
    """Compare outputs, and gradients where a trace has them."""
    summed = next(iter(twins.values())).header.summed
    integers = {
        name for trace in twins.values() for name, found in trace.header.output_dtypes.items() if "float" not in found
    }
    levels = {
        "forward": {twin: trace.outputs for twin, trace in traces.items()},
        "gradients": {twin: trace.gradients for twin, trace in traces.items() if trace.gradients},
    }
    checks: list[Check] = []
    expected: list[Expected] = []
    for level, tensors in levels.items():
        if tensors:
            by_twin: dict[str, Tensors] = {twin: tensors.get(twin, {}) for twin in traces}
            if level == "gradients" and (jumps := _jumps(traces)):
                by_twin |= {"up": jumps, "down": dict.fromkeys(jumps, np.zeros(()))}
            checks += compare.compare_level(level, dtype, by_twin, summed, integers)
            expected.append((level, dtype))
    return checks, expected


def _jumps(traces: Traces) -> Tensors:
    """Return how far rounding can change the gradients, from the traces in float64: PyTorch's where it has them."""
    in_float64 = ("truth",) if "truth" in traces else TWINS
    return next((traces[name].jumps for name in in_float64 if traces[name].jumps), {})


def _modules(traces: Traces, dtype: str) -> tuple[list[Check], list[Suspect]]:
    truth = traces["truth"].events if "truth" in traces else None
    return compare_recorded(traces["torch"].events, traces["jax"].events, truth, dtype)


def _first_divergence(suspects: list[Suspect]) -> tuple[str | None, str | None]:
    """Return the path of the first module whose results differ, and the cause in words."""
    if not suspects:
        return None, None
    path = shown_path(suspects[0].path)
    return path, f"{path} is the first module whose results differ; {suspects[0].how}".rstrip("; ")
