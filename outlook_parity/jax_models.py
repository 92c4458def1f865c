"""NNX modules, Linen modules and plain functions alike: parameters and buffers by path, and a pure function of them."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from outlook_common.weights.arrays import to_numpy
from outlook_jax.blocks import DropPath, DropRate
from outlook_parity.masks import Draws
from outlook_parity.request import round_to
from outlook_parity.tape import Arrays, Tape
from outlook_parity.trees import leaves, replaced

Values = dict[str, Any]

# Of the path of a module and the module: a context that its calls run in.
Around = Callable[[str, Any], AbstractContextManager[Any]]

# The arguments by which modules are told whether they train, and what they are in training.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "eval_mode": False,
}
# Switches of models under which their modules do not run one by one.
SWITCHES = ("scan_layers", "grad_checkpointing")


class JaxModel(ABC):
    """A model as a pure function.

    Attributes:
        parameters: by path, joined by ".".
        buffers: everything else that it is a function of; what of it are weights is in `statistics`.
        statistics: the paths of the buffers that are weights.
        rates: those of rates at which things are dropped, which keep their dtype whatever is computed in.
    """

    parameters: Values
    buffers: Values
    statistics: tuple[str, ...]
    rates: tuple[str, ...] = ()

    @abstractmethod
    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "JaxModel":
        """Return a copy that computes in `dtype`, trains or not, and if asked calls its modules one by one."""

    @abstractmethod
    def call(self, parameters: Values, buffers: Values, inputs: Sequence[Any], **watching: Any) -> tuple[Any, Values]:
        """Return what it gives, and its buffers afterwards.

        With `tape` and `module_name`, each call of a module is written to the tape, under the name that the function
        gives for its path, and replaced by what the tape plays. With `draws`, those decide what is dropped.
        """

    def modules(self) -> dict[str, Any]:
        """Return all modules by path; none where they are made only while the model runs."""
        return {}

    def merged(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        """Return all modules by path, with these weights, to be called; none where they cannot be."""
        return {}

    @property
    def mode(self) -> str | None:
        """Whether the model as given trains: "training" or "eval"; None if it does not say."""
        return None

    @property
    def drops(self) -> bool:
        """Whether a module drops anything in training, as far as can be seen before it runs."""
        return True

    @property
    def own_dropout(self) -> str | None:
        """The path of a module that drops at random without asking a dropout module, None if none is known."""
        return None

    @abstractmethod
    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Return what the model was made of with these parameters and statistics; an NNX module is changed."""

    def model_for_loss(self, parameters: Values, buffers: Values, draws: Draws) -> Any:
        """Return what a loss can call, and once it has, `after()` gives the buffers."""
        return _Callable(self, parameters, buffers, draws)


class _Callable:
    def __init__(self, model: JaxModel, parameters: Values, buffers: Values, draws: Draws) -> None:
        self._model, self._parameters, self._buffers, self._draws = model, parameters, buffers, draws

    def __call__(self, *inputs: Any) -> Any:
        output, self._buffers = self._model.call(self._parameters, self._buffers, inputs, draws=self._draws)
        return output

    def after(self) -> Values:
        return self._buffers


class NNXModel(JaxModel):
    """An `nnx.Module`."""

    def __init__(self, module: nnx.Module) -> None:
        self.module = module
        self._graph, *states = nnx.split(module, nnx.Param, ...)
        self._variables = [
            {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
            for state in states
        ]
        self.parameters, self.buffers = (
            {name: variable.get_value() for name, (_, variable) in variables.items()} for variables in self._variables
        )
        # What else a module keeps, caches and counts of its own, PyTorch need not have: it shows in what it computes.
        self.statistics = tuple(
            name for name, (_, variable) in self._variables[1].items() if isinstance(variable, nnx.BatchStat)
        )
        self.rates = tuple(name for name, (_, v) in self._variables[1].items() if isinstance(v, DropRate))

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "NNXModel":
        """See `JaxModel`."""
        module = nnx.clone(self.module)
        module.train() if training else module.eval()  # type: ignore[no-untyped-call]
        for _, part in nnx.iter_modules(module):
            if getattr(part, "dtype", None) is not None:
                part.dtype = dtype  # type: ignore[attr-defined]
            for switch in SWITCHES if one_by_one else ():
                if getattr(part, switch, False) is True:
                    setattr(part, switch, False)
        return NNXModel(module)

    def call(self, parameters: Values, buffers: Values, inputs: Sequence[Any], **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        model = self._merged(parameters, buffers)
        with _watched_nnx(model, **watching):
            output = model(*inputs)
        return output, self._buffers_of(model)

    def modules(self) -> dict[str, Any]:
        """See `JaxModel`."""
        return _modules_of(self.module)

    def merged(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        """See `JaxModel`."""
        return _modules_of(self._merged(parameters, buffers))

    @property
    def mode(self) -> str | None:
        """See `JaxModel`."""
        flags = ("deterministic", "use_running_average")
        known = {getattr(part, flag) for part in self.modules().values() for flag in flags if hasattr(part, flag)}
        return {frozenset({True}): "eval", frozenset({False}): "training"}.get(frozenset(known))

    @property
    def drops(self) -> bool:
        """See `JaxModel`."""
        kinds = (nnx.Dropout, DropPath)
        return any(isinstance(part, kinds) and not _never(part) for part in self.modules().values())

    @property
    def own_dropout(self) -> str | None:
        """See `JaxModel`."""
        return next((path for path, part in self.modules().items() if _drops_by_itself(part)), None)

    def model_for_loss(self, parameters: Values, buffers: Values, draws: Draws) -> Any:
        """Return the module itself: losses call other methods of it too."""
        return _NNXForLoss(self, self._merged(parameters, buffers), draws)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        variables = self._variables[0] | self._variables[1]
        changed = [
            (path, variable.replace(jnp.asarray(weights[name])))
            for name, (path, variable) in variables.items()
            if name in weights
        ]
        nnx.update(self.module, nnx.from_flat_state(changed))
        return self.module

    def _merged(self, parameters: Values, buffers: Values) -> Any:
        states = [
            nnx.from_flat_state(
                [(path, variable.replace(values[name])) for name, (path, variable) in variables.items()]
            )
            for variables, values in zip(self._variables, (parameters, buffers), strict=True)
        ]
        return nnx.merge(self._graph, *states, copy=True)  # else its buffers could not be written to

    def _buffers_of(self, model: nnx.Module) -> Values:
        state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param)))
        return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def _modules_of(module: nnx.Module) -> dict[str, Any]:
    return {".".join(map(str, path)): part for path, part in nnx.iter_modules(module)}


class _NNXForLoss:
    """An NNX module whose every method runs under shared masks."""

    def __init__(self, owner: NNXModel, module: Any, draws: Draws) -> None:
        self._owner, self._module, self._draws = owner, module, draws

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _watched_nnx(self._module, draws=self._draws):
            return self._module(*args, **kwargs)

    def forward_train(self, *args: Any, **kwargs: Any) -> Any:
        with _watched_nnx(self._module, draws=self._draws):
            return self._module.forward_train(*args, **kwargs)

    def after(self) -> Values:
        return self._owner._buffers_of(self._module)


class LinenModel(JaxModel):
    """A Linen module with its variables."""

    def __init__(
        self, module: linen.Module, variables: Mapping[str, Any], mode: Mapping[str, bool] | None = None
    ) -> None:
        self.module = module
        self._mode = mode or {}
        unboxed = linen.meta.unbox(dict(variables))
        self.parameters = _flat(unboxed.get("params", {}))
        self._collection: dict[str, str] = {}
        self.buffers = {}
        for collection, tree in unboxed.items():
            if collection != "params":
                flat = _flat(tree)
                self.buffers |= flat
                self._collection |= dict.fromkeys(flat, collection)
        self.statistics = tuple(name for name, kind in self._collection.items() if kind == "batch_stats")

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "LinenModel":
        """See `JaxModel`."""
        accepted = inspect.signature(type(self.module).__call__).parameters
        mode = {name: value == training for name, value in MODES.items() if name in accepted}
        module = self.module
        if getattr(module, "dtype", None) is not None:
            module = module.clone(dtype=dtype)
        return LinenModel(module, self._variables(self.parameters, self.buffers), mode)

    def call(self, parameters: Values, buffers: Values, inputs: Sequence[Any], **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        mutable = sorted(set(self._collection.values()))
        rngs = {"dropout": jax.random.key(0)}
        with _watched_linen(**watching):
            output, changed = self.module.apply(
                self._variables(parameters, buffers), *inputs, mutable=mutable, rngs=rngs, **dict[str, Any](self._mode)
            )
        after: Values = {}
        for tree in changed.values():
            after |= _flat(tree)
        return output, buffers | {name: value for name, value in after.items() if name in buffers}

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        new = {name: jnp.asarray(array) for name, array in weights.items()}
        parameters = {name: new.get(name, value) for name, value in self.parameters.items()}
        buffers = {name: new.get(name, value) for name, value in self.buffers.items()}
        return self.module, self._variables(parameters, buffers)

    def _variables(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        collections: dict[str, Any] = {"params": _nested(parameters)}
        for collection in set(self._collection.values()):
            own = {name: value for name, value in buffers.items() if self._collection[name] == collection}
            collections[collection] = _nested(own)
        return collections


def _flat(tree: Any) -> Values:
    return dict(traverse_util.flatten_dict(tree, sep="."))  # type: ignore[no-untyped-call]


def _nested(values: Values) -> Any:
    return traverse_util.unflatten_dict(values, sep=".")  # type: ignore[no-untyped-call]


class FunctionModel(JaxModel):
    """A function of arrays, without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.parameters, self.buffers, self.statistics = {}, {}, ()

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "FunctionModel":
        """See `JaxModel`."""
        return self

    def call(self, parameters: Values, buffers: Values, inputs: Sequence[Any], **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        return self._function(*inputs), buffers

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        return self._function


def jax_model(model: Any) -> JaxModel:
    """Return an NNX module, a pair of a Linen module and its variables, a bound Linen module, or a function as a model.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(model, nnx.Module):
        return NNXModel(model)
    if isinstance(model, linen.Module) and model.scope is not None:
        model = model.unbind()
    match model:
        case (nnx.bridge.ToLinen() as bridge, Mapping() as variables):
            return NNXModel(_from_bridge(bridge, variables))
        case (linen.Module() as module, Mapping() as variables):
            return LinenModel(module, variables)
        case _ if callable(model) and not isinstance(model, linen.Module):
            return FunctionModel(model)
    raise TypeError(
        "the JAX model must be an nnx.Module, a pair (linen module, variables), a bound linen module or a function, "
        f"got {type(model).__name__}"
    )


def weights_of(model: JaxModel) -> Values:
    """Return the parameters and statistics by path."""
    return {**model.parameters, **{name: model.buffers[name] for name in model.statistics}}


def shapes_of(model: JaxModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters and statistics."""
    return {name: tuple(value.shape) for name, value in weights_of(model).items()}


def transposed_of(model: JaxModel) -> set[str]:
    """Return the paths of transposed convolutions that are told to take their kernel as PyTorch does."""
    return {path for path, part in model.modules().items() if getattr(part, "transpose_kernel", False)}


def _from_bridge(bridge: nnx.bridge.ToLinen, variables: Mapping[str, Any]) -> nnx.Module:
    """Return the NNX module inside a Linen module of `nnx.bridge.to_linen`, with its variables."""
    module: nnx.Module = bridge.nnx_class(*bridge.args, **bridge.kwargs, rngs=nnx.Rngs(0))
    for tree in linen.meta.unbox(dict(variables)).values():
        nnx.update(module, tree)
    return module


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _arrays(tree: Any) -> Arrays:
    return [to_numpy(leaf) for leaf in leaves(tree, _is_floating)]


def _traced(tree: Any) -> bool:
    """Whether this is inside a transformation, a scan or remat say, where arrays have no values yet."""
    return any(True for _ in leaves(tree, lambda leaf: isinstance(leaf, jax.core.Tracer)))


def _replaced(tree: Any, given: Arrays | None) -> Any:
    if given is None:
        return tree
    new = {
        id(leaf): jax.device_put(round_to(array, leaf.dtype.name), leaf.sharding)
        for leaf, array in zip(leaves(tree, _is_floating), given, strict=True)
    }
    return replaced(tree, _is_floating, new)


@contextmanager
def _watched_nnx(
    model: nnx.Module,
    tape: Tape | None = None,
    module_name: Callable[[str], str] = str,
    draws: Draws | None = None,
    around: Around | None = None,
) -> Iterator[None]:
    """Let a tape see every call of a module of `model`, and `draws` decide what is dropped.

    Python looks up `__call__` in the class: so the classes are changed meanwhile, and other objects of them left alone.
    """
    if tape is None and draws is None and around is None:
        yield
        return
    paths = {id(part): path for path, part in _modules_of(model).items()}
    running: list[int] = []

    def watching(honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or (running and running[-1] == id(self)):  # the latter in super().__call__
                return honest(self, *args, **kwargs)
            running.append(id(self))
            try:
                if draws is not None and isinstance(self, nnx.Dropout | DropPath):
                    return _dropped(self, draws, path, *args, **kwargs)
                if around is not None:
                    with around(module_name(path), self):
                        return honest(self, *args, **kwargs)
                if tape is None or _traced((args, kwargs)) or not tape.watches(name := module_name(path)):
                    return honest(self, *args, **kwargs)
                args, kwargs = _replaced((args, kwargs), tape.enter(name, _arrays((args, kwargs))))
                output = honest(self, *args, **kwargs)
                return _replaced(output, tape.leave(_arrays(output)))
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


def _never(module: Any) -> bool:
    return isinstance(module, nnx.Dropout) and module.rate == 0


def _drops_by_itself(module: Any) -> bool:
    attention = isinstance(module, nnx.MultiHeadAttention | linen.MultiHeadDotProductAttention)
    return attention and module.dropout_rate > 0


def _dropped(module: Any, draws: Draws, path: str, x: jax.Array, **kwargs: Any) -> jax.Array:
    """Return what dropout, or stochastic depth, makes of `x`, decided by `draws`."""
    asked = kwargs.get("deterministic")
    if module.deterministic if asked is None else asked:
        return x
    if isinstance(module, DropPath):
        keep = 1 - module.rate[...]
        kept = draws.uniform((x.shape[0],) + (1,) * (x.ndim - 1), path) < keep
        return x * (kept / jnp.where(keep > 0, keep, 1)).astype(x.dtype)
    if module.rate == 0:
        return x
    return x * jnp.asarray(draws.mask(x.shape, module.rate, path), x.dtype)


@contextmanager
def _watched_linen(
    tape: Tape | None = None,
    module_name: Callable[[str], str] = str,
    draws: Draws | None = None,
    around: Around | None = None,
) -> Iterator[None]:
    """Do for Linen what `_watched_nnx` does for NNX."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = ".".join(context.module.path)
        if draws is not None and _drops_by_itself(context.module):
            raise ValueError(f"{path} draws dropout of its own, which the twins cannot share: leave out the training")
        if draws is not None and isinstance(context.module, linen.Dropout):
            asked = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
            deterministic = context.module.deterministic if asked is None else asked
            rate = 0.0 if deterministic else context.module.rate
            return args[0] * jnp.asarray(draws.mask(args[0].shape, rate, path), args[0].dtype) if rate else args[0]
        if around is not None:
            with around(module_name(path), context.module):
                return call(*args, **kwargs)
        if tape is None or _traced((args, kwargs)) or not tape.watches(name := module_name(path)):
            return call(*args, **kwargs)
        args, kwargs = _replaced((args, kwargs), tape.enter(name, _arrays((args, kwargs))))
        output = call(*args, **kwargs)
        return _replaced(output, tape.leave(_arrays(output)))

    with linen.intercept_methods(intercept):
        yield
