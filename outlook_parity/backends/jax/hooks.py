"""Hooks around the calls of Flax modules: to record and replace, to share dropout masks, to mark operations."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

from outlook_common.arrays import to_numpy
from outlook_parity.backends.jax.dropout import dropped, dropped_in_linen
from outlook_parity.core.dropout import Draws
from outlook_parity.core.pytree import leaves, replaced
from outlook_parity.core.recorder import Arrays, Recorder
from outlook_parity.core.request import round_to
from outlook_parity.models.jax_layers import DropPath

# Of the name of a module and the module: a context that its calls run in.
Around = Callable[[str, Any], AbstractContextManager[Any]]


def modules_of(module: nnx.Module) -> dict[str, Any]:
    """Return all modules of an NNX module by path, joined by "."."""
    return {".".join(map(str, path)): part for path, part in nnx.iter_modules(module)}


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _is_integer(leaf: Any) -> bool:
    kinds = (jnp.integer, jnp.bool_)
    return isinstance(leaf, jax.Array) and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _arrays(tree: Any) -> Arrays:
    """Return the floating-point leaves of a tree; of complex ones the real and the imaginary part."""
    return [to_numpy(part) for leaf in leaves(tree, _is_inexact) for part in _parts(leaf)]


def _parts(leaf: jax.Array) -> list[jax.Array]:
    return [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]


def _integers(tree: Any) -> Arrays:
    return [to_numpy(leaf) for leaf in leaves(tree, _is_integer)]


def _has_tracers(tree: Any) -> bool:
    """Whether this is inside a transformation, such as scan or remat, where arrays have no values yet."""
    return any(True for _ in leaves(tree, lambda leaf: isinstance(leaf, jax.core.Tracer)))


def _replaced(tree: Any, new_arrays: Arrays | None) -> Any:
    if new_arrays is None:
        return tree
    arrays, new = iter(new_arrays), {}
    for leaf in leaves(tree, _is_inexact):
        parts = [round_to(next(arrays), part.dtype.name) for part in _parts(leaf)]
        array = parts[0] if len(parts) == 1 else parts[0] + 1j * parts[1]
        # What was committed to no device must not be now: a module may itself move it on to several.
        new[id(leaf)] = jax.device_put(array, leaf.sharding if leaf.committed else None)
    return replaced(tree, _is_inexact, new)


def observed(
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    name: str,
    module: Any,
    recorder: Recorder | None = None,
    around: Around | None = None,
) -> Any:
    """Return what a module gives, in the context `around`, or recorded and replaced by what the recorder replays."""
    if around is not None:
        with around(name, module):
            return call(*args, **kwargs)
    if recorder is None or _has_tracers((args, kwargs)) or not recorder.watches(name):
        return call(*args, **kwargs)
    args, kwargs = _replaced((args, kwargs), recorder.enter(name, _arrays((args, kwargs))))
    output = call(*args, **kwargs)
    return _replaced(output, recorder.leave(_arrays(output), _integers(output)))


@contextmanager
def watched_classes(paths: Mapping[int, str], kinds: Collection[type], **watching: Any) -> Iterator[None]:
    """Let `observed` see every call of the objects with these ids, which are of these classes; see `watched_nnx`."""
    if not watching:
        yield
        return
    running: list[int] = []
    module_name = watching.pop("module_name", str)

    def watching_calls(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or (running and running[-1] == id(self)):  # the latter in super().__call__
                return original(self, *args, **kwargs)
            running.append(id(self))
            try:
                bound = partial(original, self)
                return observed(bound, args, kwargs, name=module_name(path), module=self, **watching)
            finally:
                running.pop()

        return call

    with ExitStack() as changes:
        for kind in kinds:
            changes.enter_context(_method_changed(kind, watching_calls))
        yield


@contextmanager
def watched_nnx(
    model: nnx.Module,
    recorder: Recorder | None = None,
    module_name: Callable[[str], str] = str,
    draws: Draws | None = None,
    around: Around | None = None,
) -> Iterator[None]:
    """Let a recorder see every call of a module of `model`, and `draws` decide what is dropped; see `JaxModel.call`.

    Python looks up `__call__` in the class: so the classes are changed meanwhile; other objects of them behave as ever.
    """
    if recorder is None and draws is None and around is None:
        yield
        return
    paths = {id(part): path for path, part in modules_of(model).items()}
    running: list[int] = []

    def watching(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or (running and running[-1] == id(self)):  # the latter in super().__call__
                return original(self, *args, **kwargs)
            running.append(id(self))
            try:
                if draws is not None and isinstance(self, nnx.Dropout | DropPath):
                    return dropped(self, draws, path, *args, **kwargs)
                bound, name = partial(original, self), module_name(path)
                return observed(bound, args, kwargs, name=name, module=self, recorder=recorder, around=around)
            finally:
                running.pop()

        return call

    with ExitStack() as changes:
        for kind in {type(part) for _, part in nnx.iter_modules(model)}:
            changes.enter_context(_method_changed(kind, watching))
        yield


@contextmanager
def _method_changed(kind: type, change: Callable[[Any], Any]) -> Iterator[None]:
    if not any("__call__" in vars(base) for base in kind.__mro__):
        yield
        return
    own, original = vars(kind).get("__call__"), kind.__call__
    kind.__call__ = change(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is not None:
            kind.__call__ = own  # type: ignore[method-assign]
        else:
            del kind.__call__


def _is_call(context: Any) -> bool:
    """Whether a method of a Linen module is its `__call__`, which may be a function of another name."""
    own = getattr(type(context.module).__call__, "__wrapped__", None)
    return context.method_name == "__call__" or context.orig_method.func is own


@contextmanager
def watched_linen(
    recorder: Recorder | None = None,
    module_name: Callable[[str], str] = str,
    draws: Draws | None = None,
    around: Around | None = None,
) -> Iterator[None]:
    """The same as `watched_nnx`, for Linen."""
    running: list[int] = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not _is_call(context) or (running and running[-1] == id(module)):  # the latter in super().__call__
            return call(*args, **kwargs)
        path = ".".join(module.path)
        running.append(id(module))
        try:
            if draws is not None and isinstance(module, linen.Dropout):
                return dropped_in_linen(module, draws, path, *args, **kwargs)
            name = module_name(path)
            return observed(call, args, kwargs, name=name, module=module, recorder=recorder, around=around)
        finally:
            running.pop()

    with linen.intercept_methods(intercept):
        yield
