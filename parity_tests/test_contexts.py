"""What the tests share between the programs that JAX lowers and compiles for them."""

import os
from importlib import import_module
from tempfile import gettempdir

import jax
import numpy as np
from jax._src.interpreters import mlir

from parity_tests.support import contexts


def test_programs_share_a_context_until_they_are_many_or_their_constants_large(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(mlir, "make_ir_context", lambda: made.append(None) or object())
    monkeypatch.setattr(mlir, "_numpy_array_attribute", lambda value: value)
    contexts.reuse_contexts(programs=3, constants=100)
    first = mlir.make_ir_context()
    assert [mlir.make_ir_context() is first for _ in range(3)] == [True, True, False]
    mlir._numpy_array_attribute(np.zeros(100, np.int8))
    second = mlir.make_ir_context()
    mlir._numpy_array_attribute(np.zeros(1, np.int8))
    assert mlir.make_ir_context() is not second
    assert len(made) == 3


def test_programs_in_one_context_have_their_own_constants() -> None:
    lowered = [jax.jit(lambda x, c=c: x + np.full(3, c)).lower(np.zeros(3)) for c in (1.0, 2.0)]
    assert lowered[0].compiler_ir().context is lowered[1].compiler_ir().context
    assert [program.compile()(np.zeros(3)).tolist() for program in lowered] == [[1.0] * 3, [2.0] * 3]


def test_no_module_puts_what_changes_by_process_into_the_keys_of_kept_compilations() -> None:
    import_module("benchmarks.accelerators.tpu")  # whose options for libtpu name a temporary folder
    assert all(gettempdir() not in os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
