"""JAX's runner.

Models run as recast copies with every global setting pinned; the user's model and settings stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from outlook_common.arrays import to_numpy
from outlook_parity.backends.jax.attributes import add_operations, attributes_of, mark
from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.model import weights_of
from outlook_parity.backends.jax.optimizer import Stepper
from outlook_parity.backends.jax.placement import Place, Placement, placement_of
from outlook_parity.backends.jax.program import leaf_kinds, program_of
from outlook_parity.backends.jax.random import shared_bernoulli
from outlook_parity.backends.jax.resizing import listening
from outlook_parity.backends.jax.settings import pinned
from outlook_parity.backends.jax.truth import lifted
from outlook_parity.backends.jax.work import Work, compiled_for, work_of
from outlook_parity.core.attributes import Attributes
from outlook_parity.core.dropout import Draws
from outlook_parity.core.memory import release
from outlook_parity.core.optimizers import OPTIMIZERS, Optimizer
from outlook_parity.core.outputs import OutputMatch, output_leaves
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.program import Program
from outlook_parity.core.recorder import ROOT, Recorder
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.runner import Run, Runner, Training, guarded, prefixed, repeat_calls
from outlook_parity.core.stored import Computed, Kept, Shelf, Stored
from outlook_parity.core.task import NamedOutputs, Task
from outlook_parity.core.truth import Truth, or_unlifted
from outlook_parity.mapping.names import Names
from outlook_parity.models.jax_layers import losses as own_losses


class _Traced(NamedTuple):
    """What a forward pass computes: the shapes of its floating-point outputs, and how much."""

    floating: dict[str, tuple[int, ...]]
    work: Work


class _FirstStep(NamedTuple):
    """What the first training step computes before it updates anything; the gradients lie on the shelf."""

    loss: Any
    buffers: Values
    shelf: Shelf
    gradients: dict[str, Kept]

    def results(self) -> Any:
        """Return it as `jax.value_and_grad` does."""
        return (self.loss, self.buffers), {name: self.shelf.read(kept) for name, kept in self.gradients.items()}


class _Program:
    """A jitted function. What compiling it took is given back before it runs, which takes most itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._call = jax.jit(function)
        self._ready = False

    def __call__(self, *args: Any) -> Any:
        if not self._ready:
            self._call.lower(*args).compile()
            release()
            self._ready = True
        return self._call(*args)


class JaxRunner(Runner):
    """A JAX model.

    Args:
        model: the model.
        names: of weights and modules in PyTorch.
        task: for a request, what training minimises.
        outputs: which of its outputs are which of PyTorch's; None if the names are the same.
        weightless: whether the twin has no weights that these could be compared with.
        placement: where it runs; None means as the weights are sharded.
    """

    name = "jax"

    def __init__(
        self,
        model: JaxModel,
        names: Names,
        task: Callable[[Request], Task],
        outputs: OutputMatch | None = None,
        *,
        weightless: bool = False,
        placement: Placement | None = None,
    ) -> None:
        self.model = model
        self._names = names
        self._task = task
        self._matched = outputs
        self._weightless = weightless
        self._placement = placement_of(model) if placement is None else placement
        self.truth = Truth()
        self._traces: dict[tuple[tuple[int, ...], ...], _Traced] = {}  # by the shapes of the inputs

    def weights(self) -> Computed:
        """See `Runner`."""
        return Computed({} if self._weightless else self._readers(weights_of(self.model)))

    def kinds(self) -> dict[str, str]:
        """See `Runner`."""
        return {self._names.module(path): type(module).__name__ for path, module in self.model.modules().items()}

    @guarded
    @or_unlifted
    def run(self, request: Request, *, gradients: bool = True, repeat: bool = False) -> Run:
        """See `Runner`."""
        place = self._placement.on(request.device)
        with pinned(request.dtype, place.device), self._lifted(request):
            model, parameters, buffers, inputs = self._placed(request, place)
            forward = jax.jit(partial(_forward, model, request, self._outputs))  # jitted, it is traced once for all
            traced = self._traced(forward, parameters, buffers, inputs)
            evaluate = jax.jit(partial(_evaluate, forward))
            with compiled_for(traced.work, place.device):
                outputs, after = evaluate(parameters, buffers, inputs)
            floating = [name for name, output in outputs.items() if _is_floating(output)]
            order = dict.fromkeys([*floating, *outputs])
            found = Stored()
            if gradients:
                cotangents = {
                    name: place.other(self._cotangent(request, name, shape)) for name, shape in traced.floating.items()
                }
                with compiled_for(traced.work, place.device):
                    differentiate = _Program(partial(_differentiate, forward))
                    of_parameters, of_inputs = differentiate(parameters, buffers, inputs, cotangents)
                found.update((name, to_numpy(x)) for name, x in of_inputs.items())
                if not self._weightless:
                    found.update(self._under_torch_names(of_parameters))
                of_parameters.clear()
            buffers = after

            def call(inputs: Inputs) -> dict[str, np.ndarray]:
                nonlocal buffers
                placed = self._inputs(request, place, inputs)
                with compiled_for(traced.work, place.device):
                    outputs, after = evaluate(parameters, buffers, placed)
                if all(inputs[name].shape == array.shape for name, array in request.inputs.items()):
                    buffers = after  # a state that a model keeps must not be of another size
                return {name: to_float64(outputs[name]) for name in order}

            repeated = repeat_calls(request, call) if repeat else {}
            unused = self._unused_alone(forward, parameters, buffers, inputs) if gradients else frozenset()
        return Run(
            outputs=Stored(request.masked({name: to_float64(outputs[name]) for name in order}).items()),
            dtypes={name: outputs[name].dtype.name for name in order},
            gradients=found,
            repeated=repeated,
            unused=unused,
        )

    def _unused_alone(
        self, forward: Callable[..., Any], parameters: Values, buffers: Values, inputs: Values
    ) -> frozenset[str]:
        """Return the parameters that PyTorch lacks and no output depends on."""
        alone = self._names.found.candidates.keys() & parameters.keys()
        if not alone:
            return frozenset()
        jaxpr = jax.make_jaxpr(lambda given: forward(given, {}, buffers, inputs)[0:2])(parameters).jaxpr
        _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        return frozenset(
            self._torch_name(name)
            for name, so in zip(sorted(parameters), used, strict=True)
            if not so and name in alone
        )

    def _traced(self, forward: Callable[..., Any], parameters: Values, buffers: Values, inputs: Values) -> "_Traced":
        """Return what a forward pass computes; it is traced once for each shape of the inputs."""
        key = tuple(array.shape for array in inputs.values())
        if key not in self._traces:
            trace = jax.make_jaxpr(forward, return_shape=True)
            closed, (floating, _, _) = trace(parameters, _floating(inputs), buffers, inputs)
            shapes = {name: output.shape for name, output in floating.items()}
            self._traces[key] = _Traced(shapes, work_of(closed.jaxpr))
        return self._traces[key]

    def _cotangent(self, request: Request, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the cotangent of an output; zero if PyTorch has none such."""
        alone = self._matched is not None and name in self._matched.alone
        return np.zeros(shape) if alone else request.cotangent(name, shape)

    @guarded
    @or_unlifted
    def watch(self, request: Request, recorder: Recorder | None) -> dict[str, np.ndarray]:
        """See `Runner`."""
        place = self._placement.on(request.device)
        with pinned(request.dtype, place.device), self._lifted(request, recorder):
            model, parameters, buffers, inputs = self._placed(request, place, one_by_one=True)
            watching = {} if recorder is None else {"recorder": recorder, "module_name": self._names.module}
            with compiled_for(self._work(request), place.device):
                output = model.call(parameters, buffers, request.arguments(inputs), **watching)[0]
            found = {name: to_float64(leaf) for name, leaf in self._outputs(output).items()}
            return request.masked(found)

    @guarded
    @or_unlifted
    def train(self, request: Request) -> Training:
        """See `Runner`."""
        place = self._placement.on(request.device)
        trained = Stored()
        draws = Draws(request.seed, keep_all=request.keep_all, single=request.single)
        with pinned(request.dtype, place.device), self._lifted(request):
            model = self._prepared(request, training=True)
            inputs = self._inputs(request, place)
            task = self._task(request)
            targets = {name: place.other(request.fixed(target)) for name, target in task.targets.items()}

            def loss_of(parameters: Values, buffers: Values, inputs: Values, targets: Values) -> Any:
                draws.begin()
                called = model.model_for_loss(parameters, buffers, draws)
                with shared_bernoulli(draws):
                    loss = task.loss(self._renaming(called), request.arguments(inputs), targets, own_losses)
                return loss, called.after()

            compiled = _Program(jax.value_and_grad(loss_of, has_aux=True))

            def differentiate(parameters: Values, buffers: Values) -> Any:
                with compiled_for(self._work(request), place.device, 1 + (request.steps - 1) * len(OPTIMIZERS)):
                    return compiled(parameters, buffers, inputs, targets)

            first = self._first_step(request, place, model, differentiate)
            for name, optimizer in OPTIMIZERS.items():
                trained.update(prefixed(name, self._steps(request, place, model, differentiate, first, optimizer)))
        return Training(trained, list(draws.drawn))

    def _first_step(
        self, request: Request, place: Place, model: JaxModel, differentiate: Callable[..., Any]
    ) -> _FirstStep:
        """Return what is the same for every optimizer, as the model is a function of its state alone."""
        (loss, buffers), gradients = differentiate(*self._weights(model, request, place))
        shelf = Shelf()
        return _FirstStep(loss, buffers, shelf, {name: shelf.keep(to_numpy(x)) for name, x in gradients.items()})

    def _steps(
        self,
        request: Request,
        place: Place,
        model: JaxModel,
        differentiate: Callable[..., Any],
        first: _FirstStep,
        optimizer: Optimizer,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Train with one optimizer; yield the losses, the weights afterwards and the optimizer's state."""
        parameters, buffers = self._weights(model, request, place)[0], first.buffers
        stepper, losses = Stepper(optimizer.jax(), parameters), []
        for step in range(request.steps):
            (loss, buffers), gradients = differentiate(parameters, buffers) if step else first.results()
            stepper.step(parameters, gradients)
            release()
            losses.append(to_float64(loss))
        yield "losses", np.stack(losses)
        yield from self._under_torch_names(parameters | {name: buffers[name] for name in model.statistics})
        for slot, kind in optimizer.jax_state.items():
            for name, array in self._under_torch_names(dict(stepper.slot(slot))):
                yield f"{kind} of {name}", array

    def _lifted(self, request: Request, recorder: Recorder | None = None) -> AbstractContextManager[None]:
        """Return a context in which casts of the model to float32 are lifted, in the truth run."""
        if not self.truth.lifts(request):
            return nullcontext()
        for name, value in self.model.buffers.items():
            if name not in (*self.model.statistics, *self.model.rates) and _is_floating(value):
                path, _, leaf = name.rpartition(".")
                self.truth.saw_constant(self._names.module(path), to_numpy(value), leaf)
        return lifted(self.truth, lambda: None if recorder is None else recorder.inside)

    @guarded
    def work(self, request: Request) -> Work:
        """Return what a forward pass computes."""
        return self._work(request)

    def _work(self, request: Request) -> Work:
        """Return the same, without a trace if there was one; errors are the model's own."""
        traced = self._traces.get(tuple(array.shape for array in request.inputs.values()))
        if traced is not None:
            return traced.work
        place = self._placement.on("cpu")
        with pinned(request.dtype, place.device):
            model, parameters, buffers, inputs = self._placed(request, place)
            forward = partial(_forward, model, request, self._outputs)
            return self._traced(forward, parameters, buffers, inputs).work

    @guarded
    def attributes(self, request: Request) -> Attributes:
        """See `Runner`."""
        modules: dict[str, Any] = {}
        resizings: Attributes = {}
        running = [ROOT]

        @contextmanager
        def around(path: str, module: Any) -> Iterator[None]:
            modules[path] = module
            running.append(path)
            try:
                with mark(path):
                    yield
            finally:
                running.pop()

        def note(resizing: dict[str, Any]) -> None:
            resizings.setdefault(running[-1], {}).update(resizing)

        place = self._placement.on("cpu")
        with pinned(request.dtype, place.device):
            model, parameters, buffers, inputs = self._placed(request, place, one_by_one=True)

            def call(parameters: Values, buffers: Values, inputs: Values) -> Any:
                watching = {"around": around, "module_name": self._names.module}
                return self._outputs(model.call(parameters, buffers, request.arguments(inputs), **watching)[0])

            with listening(note):
                jaxpr = jax.make_jaxpr(call)(parameters, buffers, inputs).jaxpr
            found = attributes_of(modules, PRECISIONS[request.dtype].products)
        add_operations(jaxpr, found)
        for path, resizing in resizings.items():
            found.setdefault(path, {}).update(resizing)
        if self.model.mode is not None:
            found.setdefault(ROOT, {})["mode"] = self.model.mode
        return found

    @guarded
    def program(self, request: Request, keep: Callable[[str], bool]) -> Program:
        """See `Runner`."""
        place = self._placement.on("cpu")
        with pinned(request.dtype, place.device):
            model, parameters, buffers, inputs = self._placed(request, place, one_by_one=True)

            def call(parameters: Values, buffers: Values, inputs: Values) -> Any:
                watching = {"around": lambda path, module: mark(path), "module_name": self._names.module}
                return self._outputs(model.call(parameters, buffers, request.arguments(inputs), **watching)[0])

            traced = jax.make_jaxpr(call)(parameters, buffers, inputs)
            leaves = jax.tree.leaves((parameters, buffers, inputs))
            return program_of(traced, leaf_kinds(parameters, buffers, inputs), leaves)

    @contextmanager
    def module(self, request: Request, path: str) -> Iterator[Any]:
        """See `Runner`."""
        place = self._placement.on(request.device)
        with pinned(request.dtype, place.device):
            model, parameters, buffers, _ = self._placed(request, place, one_by_one=True)
            modules = {self._names.module(flax): module for flax, module in model.merged(parameters, buffers).items()}
            yield modules.get(path)

    def _outputs(self, output: Any) -> Values:
        """Return the outputs by name, as arrays."""
        found = _outputs(output)
        return found if self._matched is None else self._matched.of_jax(found)

    def _renaming(self, model: Any) -> Any:
        """Return a model for a loss, whose outputs have the names of the targets."""
        if self._matched is None:
            return model
        return lambda *inputs, **named: NamedOutputs(self._outputs(model(*inputs, **named)))

    def _placed(
        self, request: Request, place: Place, *, one_by_one: bool = False
    ) -> tuple[JaxModel, Values, Values, Values]:
        """Return the model in eval mode, its parameters and buffers and the inputs, recast and on the device."""
        model = self._prepared(request, one_by_one=one_by_one)
        return model, *self._weights(model, request, place), self._inputs(request, place)

    def _prepared(self, request: Request, *, training: bool = False, one_by_one: bool = False) -> JaxModel:
        one_by_one |= training and self.model.drops  # masks are shared draw by draw
        dtype = PRECISIONS[request.dtype].storage
        return self.model.prepared(dtype, training=training, one_by_one=one_by_one)

    def _weights(self, model: JaxModel, request: Request, place: Place) -> tuple[Values, Values]:
        """Return parameters and buffers, recast and on the device."""

        def rounded(name: str, value: Any) -> Any:
            recast = name not in model.rates and jnp.issubdtype(value.dtype, jnp.floating)
            return request.rounded(self._torch_name(name), to_numpy(value)) if recast else value

        def placed(values: Values) -> Values:
            return {name: place.weight(name, rounded(name, value), value) for name, value in values.items()}

        return placed(model.parameters), placed(model.buffers)

    def _inputs(self, request: Request, place: Place, inputs: Inputs | None = None) -> Values:
        return {name: place.input(name, array) for name, array in request.rounded_inputs(inputs).items()}

    def _torch_name(self, flax: str) -> str:
        return self._names.by_flax[flax].torch if flax in self._names.by_flax else flax

    def _under_torch_names(self, values: Values) -> Iterator[tuple[str, np.ndarray]]:
        """Yield arrays under torch names, in torch's layout; `values` is emptied."""
        for group in self._names.groups(list(values)):
            yield from self._names.under_torch_names({flax: to_numpy(values.pop(flax)) for flax in group}).items()

    def _readers(self, values: Values) -> dict[str, Callable[[], np.ndarray]]:
        """Return under torch names what returns an array in float64, in torch's layout."""

        def read(group: list[str], name: str) -> np.ndarray:
            arrays = self._names.under_torch_names({flax: to_numpy(values[flax]) for flax in group})
            return arrays[name].astype(np.float64, copy=False)

        readers: dict[str, Callable[[], np.ndarray]] = {}
        for group in self._names.groups(values):
            shapes = {flax: np.broadcast_to(np.zeros((), bool), values[flax].shape) for flax in group}
            readers |= {name: partial(read, group, name) for name in self._names.under_torch_names(shapes)}
        return readers


def to_float64(array: Any) -> np.ndarray:
    """Return a NumPy array in float64."""
    return np.asarray(array).astype(np.float64)


def _forward(
    model: JaxModel,
    request: Request,
    outputs_of: Callable[[Any], Values],
    parameters: Values,
    graded: Values,
    buffers: Values,
    inputs: Values,
) -> tuple[Values, Values, Values]:
    """Return floating-point outputs, other outputs and the buffers afterwards; `graded` inputs replace `inputs`."""
    inputs = inputs | graded
    output, after = model.call(parameters, buffers, request.arguments(inputs))
    outputs = outputs_of(output)
    floating = _floating(outputs)
    return floating, {name: leaf for name, leaf in outputs.items() if name not in floating}, after


def _evaluate(
    forward: Callable[..., tuple[Values, Values, Values]], parameters: Values, buffers: Values, inputs: Values
) -> tuple[Values, Values]:
    """Return outputs and buffers afterwards."""
    floating, others, after = forward(parameters, _floating(inputs), buffers, inputs)
    return floating | others, after


def _differentiate(
    forward: Callable[..., tuple[Values, Values, Values]],
    parameters: Values,
    buffers: Values,
    inputs: Values,
    cotangents: Values,
) -> tuple[Values, Values]:
    """Return the gradients of parameters and of floating-point inputs."""

    def floating(parameters: Values, graded: Values) -> Values:
        return forward(parameters, graded, buffers, inputs)[0]

    outputs, pullback = jax.vjp(floating, parameters, _floating(inputs))
    gradients: tuple[Values, Values] = pullback({n: cotangents[n].astype(x.dtype) for n, x in outputs.items()})
    return gradients


def _floating(values: Values) -> Values:
    return {name: x for name, x in values.items() if _is_floating(x)}


def _is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _outputs(output: Any) -> Values:
    """Return the outputs by name, as arrays."""
    found = {name: jnp.asarray(leaf) for name, leaf in output_leaves(output).items()}
    for name, array in found.items():
        if jnp.iscomplexobj(array):
            raise TypeError(f"{name} of the JAX model is complex; give its real and imaginary parts")
    return found
