"""Lift casts to float32 inside a JAX model to float64, for the truth run.

Operations are changed as they are bound, under `jit` and outside of it alike: dtypes asked for and operands in float32
become float64. What JAX keeps of functions traced meanwhile counts for such runs alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax._src.lax.lax as lax_internal
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from outlook_parity.core.recorder import ROOT
from outlook_parity.core.truth import Truth

_LIFTED = {np.dtype(np.float32): np.dtype(np.float64), np.dtype(np.complex64): np.dtype(np.complex128)}

# Bits of numbers, which mean something else in another dtype.
_OF_BITS = ("bitcast_convert_type", "random_bits", "random_wrap", "random_unwrap", "random_seed")

# Explicit bits of the exponent and of the mantissa, in the same order of dtypes.
_FLOAT32, _FLOAT64 = (8, 23), (11, 52)

# Part of the key of everything that JAX keeps of a function.
_context = jax.make_user_context(default_value=None)  # type: ignore[no-untyped-call]


@contextmanager
def lifted(truth: Truth, where: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Compute in float64 what the model would compute in float32; casts to half precisions stay.

    Args:
        truth: keeps what was lifted.
        where: returns the path of the module whose code runs, None if unknown.
    """
    bind, convert, eval_shape = Primitive.bind, lax_internal._convert_element_type, jax.eval_shape
    checking_shapes = 0

    def see(arg: Any) -> None:
        if getattr(arg, "dtype", None) in _LIFTED and not isinstance(arg, jax.core.Tracer) and not checking_shapes:
            truth.saw_constant(where(), arg)

    def count() -> None:
        truth.lifted[where() or ROOT] += not checking_shapes

    def lifting_eval_shape(function: Any, *args: Any, **options: Any) -> Any:
        nonlocal checking_shapes
        # Linen checks the shapes of parameters by their initialisers, whose constants are no part of the model.
        own = getattr(function, "__module__", "").startswith("flax.")
        checking_shapes += own
        try:
            return eval_shape(function, *args, **options)
        finally:
            checking_shapes -= own

    def lifting_bind(self: Primitive, *args: Any, **params: Any) -> Any:
        for arg in args:
            see(arg)
        if self.name in _OF_BITS or _has_functions(params):
            return bind(self, *args, **params)  # type: ignore[no-untyped-call]
        new = _lifted_params(params)
        if new != params:
            count()
        operands = args if self.name == "convert_element_type" else map(_widened, args)
        return bind(self, *operands, **new)  # type: ignore[no-untyped-call]

    def lifting_convert(operand: Any, new_dtype: Any = None, *args: Any, **options: Any) -> Any:
        if isinstance(operand, np.generic):
            see(operand)
        if new_dtype in _LIFTED:
            count()
        return convert(operand, _LIFTED.get(new_dtype, new_dtype), *args, **options)

    def lifting_array(make: Callable[..., Any]) -> Callable[..., Any]:
        def call(value: Any, dtype: Any = None, *args: Any, **options: Any) -> Any:
            # Python numbers would be rounded before anything is bound.
            return make(value, _lifted_dtype(dtype), *args, **options)

        return call

    def _widened(arg: Any) -> Any:
        if getattr(arg, "dtype", None) not in _LIFTED:
            return arg
        if not isinstance(arg, jax.Array):
            return np.asarray(arg).astype(_LIFTED[arg.dtype])
        return convert(arg, _LIFTED[arg.dtype])

    with ExitStack() as stack:
        stack.enter_context(_context(True))
        stack.enter_context(patch.object(Primitive, "bind", lifting_bind))
        stack.enter_context(patch.object(lax_internal, "_convert_element_type", lifting_convert))
        for make in (jnp.array, jnp.asarray):
            stack.enter_context(patch.object(jnp, make.__name__, lifting_array(make)))
        stack.enter_context(patch.object(jax, "eval_shape", lifting_eval_shape))
        yield


def _lifted_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        return _LIFTED.get(np.dtype(dtype), dtype)
    except TypeError:  # none of NumPy's
        return dtype


def _lifted_params(params: Mapping[str, Any]) -> dict[str, Any]:
    new = {name: _LIFTED.get(x, x) if isinstance(x, np.dtype) else x for name, x in params.items()}
    if (new.get("exponent_bits"), new.get("mantissa_bits")) == _FLOAT32:
        new["exponent_bits"], new["mantissa_bits"] = _FLOAT64
    return new


def _has_functions(params: Mapping[str, Any]) -> bool:
    """Whether an operation runs others: those are lifted as they are traced."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(part, "jaxpr") or callable(part):
                return True
    return False
