"""Plant every fault of the tests, in both twins, and print how many are called a mismatch, where, and for what.

python -m parity_tests.faults.__main__
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from outlook_parity import Report
from parity_tests import conftest
from parity_tests.faults import test_attention as test_faults
from parity_tests.faults import test_hidden as test_faults_hidden
from parity_tests.faults import test_volo as test_faults_volo
from parity_tests.faults.test_attention import AnythingWith
from parity_tests.support.small_volo import check as check_volo
from parity_tests.support.small_volo import small_volo


class Planted(NamedTuple):
    """One fault in one twin, and what the report must say of it."""

    where: str
    name: str
    run: Callable[[pytest.MonkeyPatch], Report]
    path: str | None
    cause: str


def planted() -> Iterator[Planted]:
    for fault in test_faults.FAULTS:

        def layer(patch: pytest.MonkeyPatch, fault: test_faults.Fault = fault) -> Report:
            layers = test_faults.pair(fault.sizes)
            fault.plant(layers, patch)
            return test_faults.check(layers, fault.dtype)

        yield Planted("the layer", fault.name, layer, fault.path, fault.cause)
    for kind in test_faults_volo.FAULTS:
        for twin, name in enumerate(("torch", "jax")):

            def model(patch: pytest.MonkeyPatch, fault: test_faults_volo.Fault = kind, twin: int = twin) -> Report:
                models = small_volo(**fault.rates)
                fault.plant[twin](models, patch)
                return check_volo(models, fault.level, dtypes=(fault.dtype,))

            yield Planted("a VOLO", f"{name}: {kind.name}", model, kind.path, kind.cause)
    for hidden in test_faults_hidden.FAULTS:
        for twin, name in enumerate(("torch", "jax")):

            def small(patch: pytest.MonkeyPatch, fault: test_faults_hidden.Fault = hidden, twin: int = twin) -> Report:
                return test_faults_hidden.check(test_faults_hidden.models(fault, twin), fault)

            yield Planted("faults that hide", f"{name}: {hidden.name}", small, hidden.path, hidden.cause)


def main() -> None:
    assert conftest
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    tally: dict[str, list[int]] = {}
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for fault in planted():
        if only and fault.where != only:
            continue
        patch = pytest.MonkeyPatch()
        with suppress(SystemExit):
            report = fault.run(patch)
        patch.undo()
        cause = report.cause or ""
        # A place that no module has, an optimizer say, must be told as none; a cause that is but a place tells no kind.
        found = [
            1,
            report.verdict == "mismatch",
            report.first_divergence == fault.path,
            fault.cause not in ("", fault.path) and cause == AnythingWith(fault.cause),
        ]
        counts = tally.setdefault(fault.where, [0] * len(found))
        tally[fault.where] = [count + int(new) for count, new in zip(counts, found, strict=True)]
        marks = "".join("+" if new else "-" for new in found[1:])
        print(f"{marks}  {fault.where}: {fault.name}: {report.verdict}, {report.first_divergence}, {cause}", flush=True)
    total = [sum(column) for column in zip(*tally.values(), strict=True)]
    print("\nin                planted  mismatch  right place  right cause")
    for where, (count, *shares) in {**tally, "all": total}.items():
        print(f"{where:<18}{count:>7}" + "".join(f"{share:>7} ({share / count:.0%})" for share in shares))


if __name__ == "__main__":
    main()
