"""Write benchmarks/results/accelerators.md: `python -m benchmarks.accelerators [--whole]`; `--quick` prints."""

import argparse
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accelerators import cases, gpu, tpu
from outlook_common.op_cases import BY_NAME

RESULTS = Path(__file__).parents[1] / "results" / "accelerators.md"

HEAD = """# Compiled for TPU and GPU, on a machine that has neither

By `python -m benchmarks.accelerators{arguments}`; jax {jax}, libtpu {libtpu}, jax-cuda12-plugin {cuda}.
**Nothing here was run on an accelerator: every figure but the seconds is the compiler's estimate.** {done} of
{all} programs were compiled. None is the default: on a TPU it is pallas where its kernels can run, on a GPU composite.
{verdict}

- **/ reference**: the kcycles of a TPU, or the bytes of a GPU, against those of the reference in the same program.
- **kcycles**: in thousands, XLA:TPU's `estimated_cycles` of its own operations and, as XLA has no estimate of a Pallas
  kernel, the bundles of its schedule (LLO), one a cycle; loops by their trip counts. What a kernel waits for memory is
  not in its bundles.
- **bytes / floor**: what operations read and write, against operands and results once; on a TPU without the kernels'
  own. A TPU's count has its tiles of 8 × 128, which heads and channels of (6, 32) fill to 19 %; the floor has not.
- **kernels**: what XLA:GPU starts, calls of cuBLAS and cuDNN too. **Registers** and **spilled bytes** by `ptxas -v`
  for sm_90a; **atomics**: `atom` and `red` in the PTX.
- **compile s**: tracing, lowering and compiling on this machine, beside other jobs; for a TPU also writing the bundles,
  which takes as long again. Without: [a whole training step](step_compile_v5e.md).
"""


class Row(NamedTuple):
    """A program, compiled."""

    target: str
    program: str
    implementation: str
    figures: dict[str, Any]


def compiled(programs: list[tuple[str, cases.Program]], chips: tuple[str, ...]) -> Iterator[Row]:
    """Compile for each target; what cannot be compiled has its error for a figure."""
    for implementation, program in programs:
        for target in (*chips, "H100"):
            try:
                figures = gpu.compile_for(program) if target == "H100" else tpu.compile_for(program, target)
            except Exception as error:  # of compilers: one program fails, the others still count
                figures = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            yield Row(target, program.name, implementation, figures)


def against_reference(row: Row, rows: list[Row]) -> float | None:
    """Return a row's time by the estimates, or its bytes, as a multiple of the reference's; None if there is none."""
    figure = "bytes / floor" if row.target == "H100" else "kcycles"
    for other in rows:
        if other[:3] == (row.target, row.program, "reference") and figure in other.figures and figure in row.figures:
            ratio: float = row.figures[figure] / other.figures[figure]
            return ratio
    return None


def verdict(rows: list[Row]) -> str:
    """Return whether None is slower than the reference anywhere."""
    ratios = [(row, against_reference(row, rows)) for row in rows if row.implementation == "None"]
    slower = [f"{row.program} ({row.target}): {ratio:.2f}" for row, ratio in ratios if ratio and ratio > 1]
    if slower:
        return f"**None is slower than the reference in {len(slower)} cases**: {'; '.join(slower)}."
    return f"In none of {sum(ratio is not None for _, ratio in ratios)} cases is None slower than the reference."


def shared() -> Iterator[str]:
    """Yield what sixteen chips exchange, where batch and heads are shared among them; AssertionError if anything."""
    case = BY_NAME["volo_d2"].with_batch(64)
    for backward in (False, True):
        program = cases.op(case, "bfloat16", "composite", backward=backward)
        shares: dict[str, tpu.Axes] = {"batch": (("data", "heads"),), "batch and heads": ("data", None, None, "heads")}
        for name, axes in shares.items():
            found = tpu.collectives_when_shared(program, axes)
            assert not found, f"{program.name}, shared by {name}: {found}"
            yield f"- {program.name}, composite, by {name}: no collectives"


def table(rows: list[Row]) -> Iterator[str]:
    """Yield a table of each target."""
    for target in dict.fromkeys(row.target for row in rows):
        own = [
            row._replace(figures={"/ reference": _ratio(against_reference(row, rows))} | row.figures)
            for row in rows
            if row.target == target
        ]
        names = list(dict.fromkeys(chain.from_iterable(row.figures for row in own)))
        yield f"\n## {target}\n\n| program | implementation | {' | '.join(names)} |\n|---|---|{'---:|' * len(names)}"
        for row in own:
            yield f"| {row.program} | {row.implementation} | {' | '.join(_shown(row.figures.get(n)) for n in names)} |"


def write(text: list[str]) -> None:
    """Write what there is so far: whole models compile for minutes each."""
    RESULTS.write_text("\n".join(text) + "\n")


def main() -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.accelerators", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="print four programs, for v5e, v6e and H100")
    parser.add_argument("--whole", action="store_true", help="VOLO-D1 too, which compiles for many minutes")
    parser.add_argument("--implementations", nargs="*", choices=cases.IMPLEMENTATIONS, help="these alone")
    parser.add_argument("--v6e", action="store_true", help="for a v6e too")
    parser.add_argument("--no-shared", action="store_true", help="leave out what is shared among sixteen chips")
    options = parser.parse_args()
    names = options.implementations
    programs = cases.quick() if options.quick else cases.full(names or cases.IMPLEMENTATIONS)
    if options.whole:
        programs += [("None", cases.model(32, "bfloat16", train=train)) for train in (False, True)]
    given = "".join(
        [
            " --whole" * options.whole,
            " --v6e" * options.v6e,
            f" --implementations {' '.join(names)}" if names else "",
            " --no-shared" * options.no_shared,
        ]
    )
    libraries = {"jax": "jax", "libtpu": "libtpu", "cuda": "jax-cuda12-plugin"}
    versions = {name: version(library) for name, library in libraries.items()}
    rows: list[Row] = []
    for row in compiled(programs, ("v5e:2x2", *["v6e:2x2"] * (options.v6e or options.quick))):
        print(*row, flush=True)
        rows.append(row)
        done = len({(each.program, each.implementation) for each in rows})
        head = HEAD.format(arguments=given, done=done, all=len(programs), verdict=verdict(rows), **versions)
        if not options.quick:
            write([head, *table(rows)])
    print(verdict(rows))
    if not (options.quick or options.no_shared):
        write([head, *table(rows), "\n## Sixteen chips (v5e:4x4)\n", *shared()])


def _ratio(figure: float | None) -> str | None:
    return None if figure is None else f"{figure:.2f}"


def _shown(figure: Any) -> str:
    if figure is None:
        return ""
    return figure if isinstance(figure, str) else f"{figure:,.1f}" if isinstance(figure, float) else f"{figure:,}"


if __name__ == "__main__":
    main()
