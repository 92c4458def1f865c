"""Run a JAX model under control and keep what it computed, as NumPy arrays in float64 under torch names.

It runs on a recast copy with every global setting pinned: matrix products at full precision, the x64 mode on for
float64 and off below. The caller's model and settings stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import outlook_jax.losses
from outlook_common.weights.arrays import to_numpy
from outlook_parity.compare import DTYPES
from outlook_parity.jax_models import JaxModel, Values
from outlook_parity.jax_semantics import add_operations, attributes_of, mark
from outlook_parity.masks import Draws
from outlook_parity.names import Names
from outlook_parity.optimizers import OPTIMIZERS
from outlook_parity.request import Request
from outlook_parity.semantics import Facts
from outlook_parity.subjects import Task
from outlook_parity.tape import ROOT, Tape
from outlook_parity.twin import Run, Training, Twin, prefixed


class JaxTwin(Twin):
    """A JAX model that takes and returns one array.

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
        """See `Twin`."""
        buffers = {name: self.model.buffers[name] for name in self.model.statistics}
        return self._under_torch_names(self.model.parameters | buffers)

    def run(self, request: Request, *, gradients: bool = True) -> Run:
        """See `Twin`."""
        place = jax_device(request.device)
        with pinned(request.dtype, place):
            model, parameters, buffers, x = self._placed(request, place)

            def forward(parameters: Values, x: jax.Array) -> jax.Array:
                return model.call(parameters, buffers, x)[0]

            @jax.jit
            def evaluate(parameters: Values, x: jax.Array, cotangent: jax.Array) -> Any:
                if not gradients:
                    return forward(parameters, x), {}, x
                output, pullback = jax.vjp(forward, parameters, x)
                return output, *pullback(cotangent.astype(output.dtype))

            shape = _one_array(jax.eval_shape(forward, parameters, x))
            cotangent = jax.device_put(request.cotangent(shape.shape), place)
            output, of_parameters, of_input = evaluate(parameters, x, cotangent)
        named = {"input": wide(of_input), **self._under_torch_names(of_parameters)} if gradients else {}
        return Run(wide(output), output.dtype.name, named)

    def watch(self, request: Request, tape: Tape | None) -> np.ndarray:
        """See `Twin`."""
        place = jax_device(request.device)
        with pinned(request.dtype, place):
            model, parameters, buffers, x = self._placed(request, place, one_by_one=True)
            watching = {} if tape is None else {"tape": tape, "module_name": self._names.module}
            return wide(model.call(parameters, buffers, x, **watching)[0])

    def train(self, request: Request) -> Training:
        """See `Twin`."""
        place = jax_device(request.device)
        trained: dict[str, np.ndarray] = {}
        draws = Draws(request.seed)
        with pinned(request.dtype, place):
            model, *start, x = self._placed(request, place, training=True)
            task = self._task(request)
            target = jax.device_put(request.fixed(task.target), place)

            def loss_of(parameters: Values, buffers: Values, x: jax.Array, target: jax.Array) -> Any:
                draws.begin()
                called = model.model_for_loss(parameters, buffers, draws)
                loss = task.loss(called, x, target, outlook_jax.losses)
                return loss, called.after()

            differentiate = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
            for name, make in OPTIMIZERS.items():
                optimizer, (parameters, buffers), losses = make.jax(), start, []
                state = optimizer.init(parameters)
                update = jax.jit(partial(_update, optimizer))
                for _ in range(request.steps):
                    (loss, buffers), gradients = differentiate(parameters, buffers, x, target)
                    parameters, state = update(gradients, state, parameters)
                    losses.append(wide(loss))
                after = self._under_torch_names(parameters | {name: buffers[name] for name in model.statistics})
                for slot, kind in make.jax_state.items():
                    if (kept := optax.tree_utils.tree_get(state, slot)) is not None:
                        after |= {f"{kind} of {key}": a for key, a in self._under_torch_names(kept).items()}
                trained |= prefixed(name, {"losses": np.stack(losses), **after})
        return Training(trained, list(draws.drawn))

    def describe(self, request: Request) -> Facts:
        """See `Twin`."""
        seen: dict[str, Any] = {}

        def around(path: str, module: Any) -> AbstractContextManager[Any]:
            seen[path] = module
            return mark(path)

        place = jax_device("cpu")
        with pinned(request.dtype, place):
            model, parameters, buffers, x = self._placed(request, place, one_by_one=True)
            call = partial(model.call, around=around, module_name=self._names.module)
            jaxpr = jax.make_jaxpr(call)(parameters, buffers, x).jaxpr
            facts = attributes_of(seen)
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
    ) -> tuple[JaxModel, Values, Values, jax.Array]:
        """Return the model, its parameters and buffers and the inputs, in the dtype and on the device asked for."""
        one_by_one |= training and self.model.drops  # masks are shared draw by draw
        model = self.model.prepared(DTYPES[request.dtype], training=training, one_by_one=one_by_one)

        weights = {*model.parameters, *model.statistics}

        def placed(values: Values) -> Values:
            return {
                name: jax.device_put(
                    request.rounded(self._torch_name(name), to_numpy(value)) if name in weights else value,
                    place,
                )
                for name, value in values.items()
            }

        x = jax.device_put(request.rounded("input", request.inputs), place)
        return model, placed(model.parameters), placed(model.buffers), x

    def _torch_name(self, flax: str) -> str:
        return self._names.by_flax[flax].torch if flax in self._names.by_flax else flax

    def _under_torch_names(self, values: Values) -> dict[str, np.ndarray]:
        """Return arrays under torch names; what has none keeps its own, and so has no counterpart in torch."""
        named = {}
        for flax, value in values.items():
            array, weight = wide(value), self._names.by_flax.get(flax)
            named[self._torch_name(flax)] = array if weight is None else weight.to_torch(array)
        return named


def wide(array: Any) -> np.ndarray:
    """Return an array as NumPy's in float64."""
    return np.asarray(array).astype(np.float64)


def _one_array(output: Any) -> Any:
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise TypeError(f"the JAX model must return one array, got {type(output).__name__}")
    return output


def _update(optimizer: optax.GradientTransformation, gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state


def jax_device(device: str) -> jax.Device:
    """Return JAX's first device of this kind; a RuntimeError if it has none."""
    return jax.devices(device)[0]


@contextmanager
def pinned(dtype: str, device: jax.Device) -> Iterator[None]:
    """Compute with every global setting pinned, and put them back."""
    with ExitStack() as settings:
        settings.enter_context(jax.enable_x64(dtype == "float64"))
        settings.enter_context(jax.default_matmul_precision("highest"))
        settings.enter_context(jax.default_device(device))
        settings.enter_context(jax.debug_nans(False))
        yield
