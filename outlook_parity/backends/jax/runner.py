"""Run a JAX model under control and keep what it computed, as NumPy arrays in float64 under torch names.

It runs on a recast copy with every global setting pinned; the caller's model and settings stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import outlook_jax.losses
from outlook_common.arrays import to_numpy
from outlook_parity.backends.jax.attributes import add_operations, attributes_of, mark
from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.model import weights_of
from outlook_parity.backends.jax.settings import jax_device, pinned
from outlook_parity.core.attributes import Facts
from outlook_parity.core.dropout import Draws
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.pytree import named_leaves
from outlook_parity.core.recorder import ROOT, Recorder
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.runner import Run, Runner, Training, called_again, prefixed
from outlook_parity.core.task import OUTPUT, Task, is_array
from outlook_parity.mapping.names import Names


class JaxRunner(Runner):
    """A JAX model.

    Args:
        model: the model.
        names: what parameters and modules are called in PyTorch.
        task: from the request, what training minimises.
    """

    name = "jax"

    def __init__(self, model: JaxModel, names: Names, task: Callable[[Request], Task]) -> None:
        self.model = model
        self._names = names
        self._task = task

    def weights(self) -> dict[str, np.ndarray]:
        """See `Runner`."""
        return self._under_torch_names(weights_of(self.model))

    def run(self, request: Request, *, gradients: bool = True, again: bool = False) -> Run:
        """See `Runner`."""
        place = jax_device(request.device)
        with pinned(request.dtype, place):
            model, parameters, buffers, inputs = self._placed(request, place)
            asked = {name: x for name, x in inputs.items() if gradients and _is_floating(x)}

            def forward(parameters: Values, asked: Values, buffers: Values, inputs: Values) -> Any:
                output, after = model.call(parameters, buffers, _in_order(request, inputs | asked))
                outputs = _outputs(output)
                graded = {name: leaf for name, leaf in outputs.items() if _is_floating(leaf)}
                return graded, ({name: leaf for name, leaf in outputs.items() if name not in graded}, after)

            shapes, (others, _) = jax.eval_shape(forward, parameters, asked, buffers, inputs)
            order = [*shapes, *others]
            cotangents = {
                name: jax.device_put(request.cotangent(name, shape.shape).astype(shape.dtype), place)
                for name, shape in (shapes.items() if gradients else ())
            }

            @jax.jit
            def evaluate(parameters: Values, buffers: Values, inputs: Values, cotangents: Values) -> Any:
                asked = {name: x for name, x in inputs.items() if gradients and _is_floating(x)}
                of = partial(forward, buffers=buffers, inputs=inputs)
                if not gradients:
                    graded, (others, after) = of(parameters, asked)
                    return graded | others, after, ({}, {})
                graded, pullback, (others, after) = jax.vjp(of, parameters, asked, has_aux=True)
                return graded | others, after, pullback(cotangents)

            outputs, buffers, (of_parameters, of_inputs) = evaluate(parameters, buffers, inputs, cotangents)

            def call(inputs: Inputs) -> dict[str, np.ndarray]:
                nonlocal buffers
                placed = {name: jax.device_put(x, place) for name, x in request.rounded_inputs(inputs).items()}
                outputs, buffers, _ = evaluate(parameters, buffers, placed, cotangents)
                return {name: wide(outputs[name]) for name in order}

            others_again = called_again(request, call) if again else {}
        named = {name: wide(array) for name, array in of_inputs.items()} | self._under_torch_names(of_parameters)
        found = {name: wide(outputs[name]) for name in order}
        return Run(found, {name: outputs[name].dtype.name for name in order}, named, others_again)

    def watch(self, request: Request, recorder: Recorder | None) -> dict[str, np.ndarray]:
        """See `Runner`."""
        place = jax_device(request.device)
        with pinned(request.dtype, place):
            model, parameters, buffers, inputs = self._placed(request, place, one_by_one=True)
            watching = {} if recorder is None else {"recorder": recorder, "module_name": self._names.module}
            output = model.call(parameters, buffers, _in_order(request, inputs), **watching)[0]
            return {name: wide(leaf) for name, leaf in _outputs(output).items()}

    def train(self, request: Request) -> Training:
        """See `Runner`."""
        place = jax_device(request.device)
        trained: dict[str, np.ndarray] = {}
        draws = Draws(request.seed)
        with pinned(request.dtype, place):
            model, *start, inputs = self._placed(request, place, training=True)
            task = self._task(request)
            targets = {name: jax.device_put(request.fixed(target), place) for name, target in task.targets.items()}

            def loss_of(parameters: Values, buffers: Values, inputs: Values, targets: Values) -> Any:
                draws.begin()
                called = model.model_for_loss(parameters, buffers, draws)
                loss = task.loss(called, _in_order(request, inputs), targets, outlook_jax.losses)
                return loss, called.after()

            differentiate = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
            for name, make in OPTIMIZERS.items():
                optimizer, (parameters, buffers), losses = make.jax(), start, []
                state = optimizer.init(parameters)
                update = jax.jit(partial(_update, optimizer))
                for _ in range(request.steps):
                    (loss, buffers), gradients = differentiate(parameters, buffers, inputs, targets)
                    parameters, state = update(gradients, state, parameters)
                    losses.append(wide(loss))
                after = self._under_torch_names(parameters | {name: buffers[name] for name in model.statistics})
                for slot, kind in make.jax_state.items():
                    if (kept := optax.tree_utils.tree_get(state, slot)) is not None:
                        after |= {f"{kind} of {key}": a for key, a in self._under_torch_names(kept).items()}
                trained |= prefixed(name, {"losses": np.stack(losses), **after})
        return Training(trained, list(draws.drawn))

    def describe(self, request: Request) -> Facts:
        """See `Runner`."""
        seen: dict[str, Any] = {}

        def around(path: str, module: Any) -> AbstractContextManager[Any]:
            seen[path] = module
            return mark(path)

        place = jax_device("cpu")
        with pinned(request.dtype, place):
            model, parameters, buffers, inputs = self._placed(request, place, one_by_one=True)

            def call(parameters: Values, buffers: Values, inputs: Values) -> Any:
                watching = {"around": around, "module_name": self._names.module}
                return _outputs(model.call(parameters, buffers, _in_order(request, inputs), **watching)[0])

            jaxpr = jax.make_jaxpr(call)(parameters, buffers, inputs).jaxpr
            facts = attributes_of(seen, PRECISIONS[request.dtype].products)
        add_operations(jaxpr, facts)
        if self.model.mode is not None:
            facts.setdefault(ROOT, {})["mode"] = self.model.mode
        return facts

    @contextmanager
    def module(self, request: Request, path: str) -> Iterator[Any]:
        """Enter where the module with this torch path can be called, in eval mode; None if it cannot be had."""
        place = jax_device(request.device)
        with pinned(request.dtype, place):
            model, parameters, buffers, _ = self._placed(request, place, one_by_one=True)
            modules = {self._names.module(flax): module for flax, module in model.merged(parameters, buffers).items()}
            yield modules.get(path)

    def _placed(
        self, request: Request, place: jax.Device, *, training: bool = False, one_by_one: bool = False
    ) -> tuple[JaxModel, Values, Values, Values]:
        """Return the model, its parameters and buffers and the inputs, in the dtype and on the device asked for."""
        one_by_one |= training and self.model.drops  # masks are shared draw by draw
        model = self.model.prepared(PRECISIONS[request.dtype].storage, training=training, one_by_one=one_by_one)

        def rounded(name: str, value: Any) -> Any:
            recast = name not in model.rates and jnp.issubdtype(value.dtype, jnp.floating)
            return request.rounded(self._torch_name(name), to_numpy(value)) if recast else value

        def placed(values: Values) -> Values:
            return {name: jax.device_put(rounded(name, value), place) for name, value in values.items()}

        inputs = {name: jax.device_put(array, place) for name, array in request.rounded_inputs().items()}
        return model, placed(model.parameters), placed(model.buffers), inputs

    def _torch_name(self, flax: str) -> str:
        return self._names.by_flax[flax].torch if flax in self._names.by_flax else flax

    def _under_torch_names(self, values: Values) -> dict[str, np.ndarray]:
        """Return arrays under torch names, in torch's layout."""
        return self._names.under_torch_names({flax: wide(value) for flax, value in values.items()})


def wide(array: Any) -> np.ndarray:
    """Return an array as NumPy's in float64."""
    return np.asarray(array).astype(np.float64)


def _in_order(request: Request, inputs: Values) -> tuple[Any, ...]:
    """Return the arguments; JAX gives dictionaries in the order of their keys."""
    return tuple(inputs[name] for name in request.inputs)


def _is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _outputs(output: Any) -> Values:
    """Return the outputs by name, as arrays."""
    found = {name: jnp.asarray(leaf) for name, leaf in named_leaves(output, is_array, OUTPUT).items()}
    for name, array in found.items():
        if jnp.iscomplexobj(array):
            raise TypeError(f"{name} of the JAX model is complex; give its real and imaginary parts")
    return found


def _update(optimizer: optax.GradientTransformation, gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state
