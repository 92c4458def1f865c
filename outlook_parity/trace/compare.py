"""Verdict on two traces. Imports no framework."""

from collections.abc import Mapping

from outlook_parity.compare import tensors as compare
from outlook_parity.compare.modules import Suspect, propagated, shown_path
from outlook_parity.compare.tensors import Tensors
from outlook_parity.diagnose import causes
from outlook_parity.diagnose.precision import notes_on_products
from outlook_parity.report.report import Report
from outlook_parity.trace.file import TraceFile, environment_of, refusal


def compare_traces(one: TraceFile, other: TraceFile, truth: TraceFile | None = None) -> Report:
    """Compare what two twins computed on their own machines: output, gradients, and every module on its own input.

    Args:
        one: of either framework.
        other: of the other.
        truth: in float64 of the same rounded numbers; needed in lower precisions.

    Raises:
        ValueError: inputs, weights, dtypes or seeds are not the same, or the truth is missing.
    """
    if reason := refusal(one, other, truth):
        raise ValueError(f"these traces cannot be compared: {reason}")
    traces = {one.header.framework: one, other.header.framework: other}
    dtype = one.header.dtype
    lower = {} if dtype == "float64" or truth is None else {"truth": truth}
    computed: Mapping[str, TraceFile] = traces | lower
    checks = [
        check
        for twin, trace in traces.items()
        for output, given in trace.header.output_dtypes.items()
        if "float" in given
        for check in compare.compare_dtype(twin, dtype, given, output)
    ]
    whole = {n for trace in traces.values() for n, d in trace.header.output_dtypes.items() if "float" not in d}
    levels = {
        "forward": {twin: trace.outputs for twin, trace in computed.items()},
        "gradients": {twin: trace.gradients for twin, trace in computed.items() if trace.gradients},
    }
    asked = []
    for level, tensors in levels.items():
        if tensors:
            found: dict[str, Tensors] = {twin: tensors.get(twin, {}) for twin in computed}
            checks += compare.compare_level(level, dtype, found, one.header.summed, whole)
            asked.append((level, dtype))
    suspects: list[Suspect] = []
    if traces["torch"].events and traces["jax"].events:
        rows, suspects = propagated(
            traces["torch"].events, traces["jax"].events, None if not lower else lower["truth"].events, dtype
        )
        checks += rows
        asked.append(("layers", dtype))
    verdict, why = compare.judge(checks, asked)
    first = suspects[0] if verdict == "mismatch" and suspects else None
    found_at = causes.Explanation(None, None)
    if first is not None:
        found_at = causes.Explanation(
            shown_path(first.path),
            f"{shown_path(first.path)} is the first module whose results differ; {first.how}".rstrip("; "),
        )
    return Report(
        verdict,
        checks=tuple(checks),
        reason=why,
        first_divergence=found_at.path,
        cause=found_at.cause,
        notes=tuple(notes_on_products(checks)),
        environment=environment_of(traces["torch"].header) | environment_of(traces["jax"].header),
    )
