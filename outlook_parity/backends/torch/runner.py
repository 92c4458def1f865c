"""PyTorch's runner.

Models run as recast copies with every global setting pinned; the user's model and settings stay as they are.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from outlook_common.arrays import to_numpy, to_tensor
from outlook_parity.backends.torch.attributes import attributes_of, listening
from outlook_parity.backends.torch.dropout import shared_masks
from outlook_parity.backends.torch.hooks import watched
from outlook_parity.backends.torch.model import copied, dtype_of, kinds_of, to_array, to_float64, weights_of
from outlook_parity.backends.torch.optimizer import Stepper
from outlook_parity.backends.torch.program import traced
from outlook_parity.backends.torch.settings import one_thread, pinned, torch_device
from outlook_parity.backends.torch.truth import find_constants, lifted
from outlook_parity.core.attributes import Attributes
from outlook_parity.core.calls import called
from outlook_parity.core.dropout import Draws
from outlook_parity.core.optimizers import OPTIMIZERS, Optimizer
from outlook_parity.core.outputs import Beside, OutputMatch, output_leaves
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.program import Program
from outlook_parity.core.recorder import ROOT, Recorder
from outlook_parity.core.request import Inputs, Request, positions_and_size
from outlook_parity.core.runner import Run, Runner, Training, guarded, prefixed, repeat_calls
from outlook_parity.core.stored import Computed, Stored
from outlook_parity.core.task import MASK, NamedOutputs, Task
from outlook_parity.core.truth import Truth, or_unlifted
from outlook_parity.models.torch_layers import losses as own_losses
from outlook_parity.models.torch_layers import round_rates

# Of a number and a weight, if each weight is applied at every position of the inputs: with fewer a model is small.
MOST_PRODUCTS = 1 << 31


class TorchRunner(Runner):
    """A `torch.nn.Module`, or a function as one.

    Args:
        model: the module.
        axes: input -> the order in which it takes the axes; inputs are as JAX has them.
        task: for a request, what training minimises.
        out_axes: output -> the order in which JAX has its axes, where it is another one.
        compared: the names of the weights that are compared, all if None.
        outputs: which of its outputs are compared; None for all, of a model of this package.
    """

    name = "torch"

    def __init__(
        self,
        model: torch.nn.Module,
        axes: Mapping[str, tuple[int, ...]],
        task: Callable[[Request], Task],
        out_axes: Mapping[str, tuple[int, ...]] | None = None,
        compared: Collection[str] | None = None,
        outputs: OutputMatch | None = None,
    ) -> None:
        self.model = model
        self._axes = axes
        self._task = task
        self._out_axes = out_axes or {}
        self._compared = None if compared is None else frozenset(compared)
        self._matched = outputs
        self.beside = Beside()  # what the last outputs held besides arrays
        self.truth = Truth()
        self._searched = False  # for float32 constants

    def weights(self) -> Computed:
        """See `Runner`."""
        return Computed({name: partial(to_float64, tensor) for name, tensor in self._compared_of(self.model)})

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters with requires_grad=False, if only some are."""
        trained = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        return frozenset(name for name, on in trained.items() if not on) if any(trained.values()) else frozenset()

    def shapes(self, request: Request) -> dict[str, tuple[int, ...]]:
        """See `Runner`."""
        return {name: tuple(array.shape[i] for i in self._axes[name]) for name, array in request.inputs.items()}

    @guarded
    @or_unlifted
    def run(self, request: Request, *, gradients: bool = True, repeat: bool = False) -> Run:
        """See `Runner`."""
        place = torch_device(request.device)
        with self._pinned(request, place), ExitStack() as lifting:
            model = self._recast(request, place).eval()
            lifting.enter_context(self._lifted(request, model))
            parameters = {
                name: parameter.requires_grad_()
                for name, parameter in model.named_parameters()
                if self._compared is None or name in self._compared
            }
            inputs = self._inputs(request, place)
            graded = {name: x.requires_grad_() for name, x in inputs.items() if gradients and x.is_floating_point()}
            with torch.set_grad_enabled(gradients):
                # Copies, which a model may change in place, as leaves with gradients may not be.
                copies = {name: x.clone() for name, x in inputs.items()}
                outputs = self._outputs(called(model, request.arguments(copies)))
            found = Stored()
            unused: list[str] = []
            if gradients:
                alone = frozenset() if self._matched is None else self._matched.alone  # JAX has none such
                common = {name: output for name, output in outputs.items() if name not in alone}
                for name, gradient in _gradients(common, graded | parameters, request, unused):
                    found[name] = gradient.transpose(np.argsort(self._axes[name])) if name in graded else gradient

            def call(inputs: Inputs) -> dict[str, np.ndarray]:
                with torch.no_grad():
                    arguments = request.arguments(self._inputs(request, place, inputs))
                    return _all_float64(self._outputs(called(model, arguments)))

            return Run(
                outputs=Stored(request.masked(_all_float64(outputs)).items()),
                dtypes={name: dtype_of(tensor) for name, tensor in outputs.items()},
                gradients=found,
                repeated=repeat_calls(request, call) if repeat else {},
                unused=frozenset(unused).intersection(parameters),
            )

    @guarded
    @or_unlifted
    def watch(self, request: Request, recorder: Recorder | None) -> dict[str, np.ndarray]:
        """See `Runner`."""
        place = torch_device(request.device)
        with self._pinned(request, place), torch.no_grad():
            model = self._recast(request, place).eval()
            with self._lifted(request, model), watched(model, recorder or Recorder(modules=())):
                outputs = self._outputs(called(model, request.arguments(self._inputs(request, place))))
                return request.masked(_all_float64(outputs))

    @guarded
    @or_unlifted
    def train(self, request: Request) -> Training:
        """See `Runner`."""
        place = torch_device(request.device)
        trained = Stored()
        draws = Draws(request.seed, keep_all=request.keep_all, single=request.single)
        with self._pinned(request, place):
            task = self._task(request)
            targets = {
                output: self._as_in_torch(output, to_tensor(request.fixed(target)).to(place))
                for output, target in task.targets.items()
            }
            for name, optimizer in OPTIMIZERS.items():
                trained.update(prefixed(name, self._steps(request, place, task, targets, draws, optimizer)))
        return Training(trained, list(draws.drawn))

    def _steps(
        self,
        request: Request,
        place: torch.device,
        task: Task,
        targets: Mapping[str, torch.Tensor],
        draws: Draws,
        optimizer: Optimizer,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Train with one optimizer; yield the losses, the weights afterwards and the optimizer's state."""
        model = self._recast(request, place).train().requires_grad_()
        stepper, losses = Stepper(optimizer.torch, model), []
        for _ in range(request.steps):
            inputs = request.arguments(self._inputs(request, place))  # anew: a model may change them in place
            draws.begin()
            with self._lifted(request, model):
                with shared_masks(model, draws):
                    loss = task.loss(self._for_loss(model), inputs, targets, own_losses)
                loss.backward()
            for path, parameter in model.named_parameters():
                # JAX has zeros where nothing depends on a parameter, and its weights decay all the same.
                if parameter.grad is None or path in request.frozen:
                    parameter.grad = torch.zeros_like(parameter)
            stepper.step()
            losses.append(to_float64(loss))
        yield "losses", np.stack(losses)
        yield from ((name, to_array(tensor)) for name, tensor in self._compared_of(model))
        yield from stepper.slots(optimizer.torch_state)

    def kinds(self) -> dict[str, str]:
        """See `Runner`."""
        return kinds_of(self.model)

    @guarded
    def attributes(self, request: Request) -> Attributes:
        """See `Runner`."""
        place = torch_device("cpu")
        with pinned(request.dtype, place), torch.no_grad():
            model = self._recast(request, place).eval()
            found = attributes_of(model, PRECISIONS[request.dtype].products)
            with self._lifted(request, model), listening(model, found):
                called(model, request.arguments(self._inputs(request, place)))
        found[ROOT]["mode"] = "training" if self.model.training else "eval"
        return found

    @guarded
    def program(self, request: Request, keep: Callable[[str], bool]) -> Program:
        """See `Runner`."""
        place = torch_device("cpu")
        with pinned(request.dtype, place):
            model = self._recast(request, place).eval()
            inputs = self._inputs(request, place)
            with self._lifted(request, model), traced(model, inputs.values(), keep) as program:
                called(model, request.arguments(inputs))
        return program

    @contextmanager
    def module(self, request: Request, path: str) -> Iterator[Any]:
        """See `Runner`."""
        place = torch_device(request.device)
        with pinned(request.dtype, place):
            yield dict(self._recast(request, place).eval().named_modules()).get(path)

    @contextmanager
    def _pinned(self, request: Request, place: torch.device) -> Iterator[None]:
        """Pin every setting; a small model runs on one thread."""
        weights = sum(weight.numel() for weight in self.model.parameters())
        small = weights * positions_and_size(request.inputs)[0] <= MOST_PRODUCTS
        with pinned(request.dtype, place), one_thread() if small else nullcontext():
            yield

    def _lifted(self, request: Request, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Return a context in which casts of the model to float32 are lifted, in the truth run."""
        if not self.truth.lifts(request):
            return nullcontext()
        if not self._searched:
            find_constants(
                self.model, set(weights_of(self.model) if self._compared is None else self._compared), self.truth
            )
            self._searched = True
        return lifted(model, self.truth)

    def _compared_of(self, model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
        """Return the weights of a model that are compared."""
        compared = self._compared
        return [(name, x) for name, x in weights_of(model).items() if compared is None or name in compared]

    def _recast(self, request: Request, place: torch.device) -> torch.nn.Module:
        model = copied(self.model).to(device=place, dtype=getattr(torch, PRECISIONS[request.dtype].storage.name))
        originals = weights_of(self.model)
        with torch.no_grad():
            # From the originals, not from the recast copy: each is rounded once, and alike in both twins.
            for name, weight in weights_of(model).items():
                weight.copy_(to_tensor(request.rounded(name, to_numpy(originals[name]))))
        round_rates(model)
        return model

    def _outputs(self, output: Any) -> dict[str, torch.Tensor]:
        """Return the outputs by name, their axes as JAX has them."""
        self.beside = Beside()
        named = output_leaves(output, self.beside)
        found = {name: leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf) for name, leaf in named.items()}
        for name, tensor in found.items():
            if tensor.is_complex():
                raise TypeError(f"{name} of the torch model is complex; give its real and imaginary parts")
        return {
            name: tensor.permute(self._out_axes[name]) if name in self._out_axes else tensor
            for name, tensor in found.items()
        }

    def _for_loss(self, model: torch.nn.Module) -> Any:
        """Return a model for a loss, whose outputs have the names of the targets."""
        if self._matched is None:
            return model
        return lambda *inputs, **named: NamedOutputs(output_leaves(model(*inputs, **named)))

    def _as_in_torch(self, output: str, target: torch.Tensor) -> torch.Tensor:
        axes = self._out_axes.get(output.removesuffix(MASK))
        return target if axes is None else target.permute(*np.argsort(axes).tolist())

    def _inputs(self, request: Request, place: torch.device, inputs: Inputs | None = None) -> dict[str, torch.Tensor]:
        rounded = request.rounded_inputs(inputs)
        return {name: to_tensor(array.transpose(self._axes[name])).to(place) for name, array in rounded.items()}


def _gradients(
    outputs: Mapping[str, torch.Tensor], wrt: Mapping[str, torch.Tensor], request: Request, unused: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the gradients of the sum of floating-point outputs times their cotangents; zero where there are none.

    `unused` is filled with the names of what no output depends on. What was yielded is freed.
    """
    floating = {name: output for name, output in outputs.items() if output.requires_grad}
    gradients: list[torch.Tensor | None] = [None] * len(wrt)
    if floating and wrt:
        cotangents = [
            to_tensor(request.cotangent(name, tuple(t.shape))).to(t.device, t.dtype) for name, t in floating.items()
        ]
        of, to = list(floating.values()), list(wrt.values())
        gradients = list(torch.autograd.grad(of, to, cotangents, allow_unused=True))
    for index, (name, tensor) in enumerate(wrt.items()):
        gradient, gradients[index] = gradients[index], None
        if gradient is None:
            unused.append(name)
        yield name, np.zeros(tuple(tensor.shape)) if gradient is None else to_array(gradient)


def _all_float64(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: to_float64(tensor) for name, tensor in tensors.items()}
