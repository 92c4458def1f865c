"""Every call of a JAX module written to a recorder, and replaced by what the recorder plays."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

from outlook_common.arrays import to_numpy
from outlook_jax.blocks import DropPath
from outlook_parity.backends.jax.dropout import dropped, dropped_in_linen, drops_by_itself
from outlook_parity.core.dropout import Draws
from outlook_parity.core.pytree import leaves, replaced
from outlook_parity.core.recorder import Arrays, Recorder
from outlook_parity.core.request import round_to

# Of the path of a module and the module: a context that its calls run in.
Around = Callable[[str, Any], AbstractContextManager[Any]]


def modules_of(module: nnx.Module) -> dict[str, Any]:
    """Return all modules of an NNX module by path, joined by "."."""
    return {".".join(map(str, path)): part for path, part in nnx.iter_modules(module)}


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _is_whole(leaf: Any) -> bool:
    kinds = (jnp.integer, jnp.bool_)
    return isinstance(leaf, jax.Array) and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _arrays(tree: Any) -> Arrays:
    """Return the numbers of a tree, of complex ones the real and the imaginary part."""
    return [to_numpy(part) for leaf in leaves(tree, _is_inexact) for part in _parts(leaf)]


def _parts(leaf: jax.Array) -> list[jax.Array]:
    return [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]


def _whole(tree: Any) -> Arrays:
    return [to_numpy(leaf) for leaf in leaves(tree, _is_whole)]


def _traced(tree: Any) -> bool:
    """Whether this is inside a transformation, a scan or remat say, where arrays have no values yet."""
    return any(True for _ in leaves(tree, lambda leaf: isinstance(leaf, jax.core.Tracer)))


def _replaced(tree: Any, given: Arrays | None) -> Any:
    if given is None:
        return tree
    arrays, new = iter(given), {}
    for leaf in leaves(tree, _is_inexact):
        parts = [round_to(next(arrays), part.dtype.name) for part in _parts(leaf)]
        new[id(leaf)] = jax.device_put(parts[0] if len(parts) == 1 else parts[0] + 1j * parts[1], leaf.sharding)
    return replaced(tree, _is_inexact, new)


@contextmanager
def watched_nnx(
    model: nnx.Module,
    recorder: Recorder | None = None,
    module_name: Callable[[str], str] = str,
    draws: Draws | None = None,
    around: Around | None = None,
) -> Iterator[None]:
    """Let a recorder see every call of a module of `model`, and `draws` decide what is dropped.

    Python looks up `__call__` in the class: so the classes are changed meanwhile, and other objects of them left alone.
    """
    if recorder is None and draws is None and around is None:
        yield
        return
    paths = {id(part): path for path, part in modules_of(model).items()}
    running: list[int] = []

    def watching(honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or (running and running[-1] == id(self)):  # the latter in super().__call__
                return honest(self, *args, **kwargs)
            running.append(id(self))
            try:
                if draws is not None and isinstance(self, nnx.Dropout | DropPath):
                    return dropped(self, draws, path, *args, **kwargs)
                if around is not None:
                    with around(module_name(path), self):
                        return honest(self, *args, **kwargs)
                if recorder is None or _traced((args, kwargs)) or not recorder.watches(name := module_name(path)):
                    return honest(self, *args, **kwargs)
                args, kwargs = _replaced((args, kwargs), recorder.enter(name, _arrays((args, kwargs))))
                output = honest(self, *args, **kwargs)
                return _replaced(output, recorder.leave(_arrays(output), _whole(output)))
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
    own, honest = "__call__" in vars(kind), kind.__call__
    kind.__call__ = change(honest)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            kind.__call__ = honest  # type: ignore[method-assign]
        else:
            del kind.__call__


@contextmanager
def watched_linen(
    recorder: Recorder | None = None,
    module_name: Callable[[str], str] = str,
    draws: Draws | None = None,
    around: Around | None = None,
) -> Iterator[None]:
    """Do for Linen what `watched_nnx` does for NNX."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = ".".join(context.module.path)
        if draws is not None and drops_by_itself(context.module):
            raise ValueError(f"{path} draws dropout of its own, which the twins cannot share: leave out the training")
        if draws is not None and isinstance(context.module, linen.Dropout):
            return dropped_in_linen(context.module, draws, path, *args, **kwargs)
        if around is not None:
            with around(module_name(path), context.module):
                return call(*args, **kwargs)
        if recorder is None or _traced((args, kwargs)) or not recorder.watches(name := module_name(path)):
            return call(*args, **kwargs)
        args, kwargs = _replaced((args, kwargs), recorder.enter(name, _arrays((args, kwargs))))
        output = call(*args, **kwargs)
        return _replaced(output, recorder.leave(_arrays(output), _whole(output)))

    with linen.intercept_methods(intercept):
        yield
