"""NNX modules as pure functions."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as linen
import numpy as np
from flax import nnx

from outlook_parity.backends.jax.base import JaxModel, Values, placed_like
from outlook_parity.backends.jax.dropout import drops_by_itself, never_drops
from outlook_parity.backends.jax.hooks import modules_of, watched_nnx
from outlook_parity.core.calls import Arguments, argument_names, called
from outlook_parity.core.dropout import Draws
from outlook_parity.models.jax_layers import SWITCHES, DropPath, DropRate


class NNXModel(JaxModel):
    """An `nnx.Module`."""

    def __init__(self, module: nnx.Module) -> None:
        self.module = module
        self._graph, *states = nnx.split(module, nnx.Param, ...)
        leaves = [list(nnx.to_flat_state(state)) for state in states]
        # Numbers and booleans stay what they are: code may branch on them.
        self._fixed = [(path, leaf) for path, leaf in leaves[1] if not hasattr(leaf, "dtype")]
        self._variables = [
            {".".join(map(str, path)): (path, leaf) for path, leaf in found if hasattr(leaf, "dtype")}
            for found in leaves
        ]
        self.parameters, self.buffers = (
            {name: _value(leaf) for name, (_, leaf) in variables.items()} for variables in self._variables
        )
        self.constants = tuple(
            name for name, (_, leaf) in self._variables[1].items() if not isinstance(leaf, nnx.Variable)
        )
        # Other state, caches and counters say, PyTorch need not have: it shows in the outputs.
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

    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        model = self._merged(parameters, buffers)
        with watched_nnx(model, **watching):
            output = called(model, inputs)
        return output, self._buffers_of(model)

    def modules(self) -> dict[str, Any]:
        """See `JaxModel`."""
        return modules_of(self.module)

    def merged(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        """See `JaxModel`."""
        return modules_of(self._merged(parameters, buffers))

    @property
    def argument_names(self) -> frozenset[str] | None:
        """See `JaxModel`."""
        return argument_names(type(self.module).__call__)

    @property
    def mode(self) -> str | None:
        """See `JaxModel`."""
        flags = ("deterministic", "use_running_average")
        values = {getattr(part, flag) for part in self.modules().values() for flag in flags if hasattr(part, flag)}
        return {frozenset({True}): "eval", frozenset({False}): "training"}.get(frozenset(values))

    @property
    def drops(self) -> bool:
        """See `JaxModel`."""
        kinds = (nnx.Dropout, DropPath)
        parts = self.modules().values()
        return any(drops_by_itself(part) or (isinstance(part, kinds) and not never_drops(part)) for part in parts)

    def model_for_loss(self, parameters: Values, buffers: Values, draws: Draws) -> Any:
        """Return the module with shared masks: losses call other methods of it too."""
        return _NNXForLoss(self, self._merged(parameters, buffers), draws)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        variables = self._variables[0] | self._variables[1]
        changed = [
            (path, variable.replace(placed_like(weights[name], variable.get_value())))
            for name, (path, variable) in variables.items()
            if name in weights
        ]
        nnx.update(self.module, nnx.from_flat_state(changed))
        return self.module

    def _merged(self, parameters: Values, buffers: Values) -> Any:
        # Flat: Flax flattens a nested state by a function that refers to itself, and so keeps all its arrays until
        # Python collects garbage.
        states = [
            nnx.FlatState(
                [(path, _replaced(leaf, values[name])) for name, (path, leaf) in variables.items()] + fixed, sort=True
            )
            for variables, values, fixed in zip(self._variables, (parameters, buffers), ([], self._fixed), strict=True)
        ]
        return nnx.merge(self._graph, *states, copy=True)  # else its buffers could not be written to

    def _buffers_of(self, model: nnx.Module) -> Values:
        states: Any = nnx.split(model, nnx.Param, ...)  # not `nnx.state`, which flattens the parameters too
        others = nnx.to_flat_state(states[2])
        return {".".join(map(str, path)): _value(leaf) for path, leaf in others if hasattr(leaf, "dtype")}


def _value(leaf: Any) -> Any:
    """Return the array of a variable; what `nnx.data` marks is one itself."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _replaced(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


class _NNXForLoss:
    """An NNX module whose every method runs under shared masks."""

    def __init__(self, owner: NNXModel, module: Any, draws: Draws) -> None:
        self._owner, self._module, self._draws = owner, module, draws

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._masked(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return partial(self._masked, getattr(self._module, name))

    def _masked(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with watched_nnx(self._module, draws=self._draws):
            return method(*args, **kwargs)

    def after(self) -> Values:
        return self._owner._buffers_of(self._module)


def from_bridge(bridge: nnx.bridge.ToLinen, variables: Mapping[str, Any]) -> nnx.Module:
    """Return the NNX module inside a Linen module of `nnx.bridge.to_linen`, with its variables."""
    module: nnx.Module = bridge.nnx_class(*bridge.args, **bridge.kwargs, rngs=nnx.Rngs(0))
    for tree in linen.meta.unbox(dict(variables)).values():
        nnx.update(module, tree)
    return module
