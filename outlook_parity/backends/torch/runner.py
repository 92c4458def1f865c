"""Run a PyTorch model under control and keep what it computed, as NumPy arrays in float64.

It runs on a recast copy with every global setting pinned; the caller's model and settings stay as they are.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import outlook_torch.losses
from outlook_common.arrays import to_numpy, to_tensor
from outlook_parity.backends.torch.attributes import attributes_of, listening
from outlook_parity.backends.torch.dropout import shared_masks
from outlook_parity.backends.torch.hooks import watched
from outlook_parity.backends.torch.model import copied, dtype_of, kinds_of, weights_of, wide
from outlook_parity.backends.torch.settings import pinned, torch_device
from outlook_parity.core.attributes import Facts
from outlook_parity.core.dropout import Draws
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.pytree import named_leaves
from outlook_parity.core.recorder import ROOT, Recorder
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.runner import Run, Runner, Training, called_again, prefixed
from outlook_parity.core.task import OUTPUT, Task, is_array
from outlook_torch.blocks import DropPath


class TorchRunner(Runner):
    """A `torch.nn.Module`, or a function as one.

    Args:
        model: the module.
        axes: by input, the order in which it takes the axes, which are given as JAX has them.
        task: from the request, what training minimises.
        out_axes: by output, the order in which JAX has the axes, where it is another one.
        compared: the names of the weights that are compared, all if None.
    """

    name = "torch"

    def __init__(
        self,
        model: torch.nn.Module,
        axes: Mapping[str, tuple[int, ...]],
        task: Callable[[Request], Task],
        out_axes: Mapping[str, tuple[int, ...]] | None = None,
        compared: Collection[str] | None = None,
    ) -> None:
        self.model = model
        self._axes = axes
        self._task = task
        self._out_axes = out_axes or {}
        self._compared = compared

    def weights(self) -> dict[str, np.ndarray]:
        """See `Runner`."""
        return self._weights_of(self.model)

    def run(self, request: Request, *, gradients: bool = True, again: bool = False) -> Run:
        """See `Runner`."""
        place = torch_device(request.device)
        with pinned(request.dtype, place):
            model = self._recast(request, place).eval()
            parameters = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
            inputs = self._inputs(request, place)
            asked = {name: x.requires_grad_() for name, x in inputs.items() if gradients and x.is_floating_point()}
            with torch.set_grad_enabled(gradients):
                # Copies, which a model may change in place, as those that gradients are asked of it may not.
                outputs = self._outputs(model(*(x.clone() for x in inputs.values())))
            named: dict[str, np.ndarray] = {}
            if gradients:
                named = _gradients(outputs, asked | parameters, request)
                for name in asked:
                    named[name] = named[name].transpose(np.argsort(self._axes[name]))

            def call(inputs: Inputs) -> dict[str, np.ndarray]:
                with torch.no_grad():
                    return _wide_all(self._outputs(model(*self._inputs(request, place, inputs).values())))

            found = _wide_all(outputs)
            return Run(
                found, {n: dtype_of(t) for n, t in outputs.items()}, named, called_again(request, call) if again else {}
            )

    def watch(self, request: Request, recorder: Recorder | None) -> dict[str, np.ndarray]:
        """See `Runner`."""
        place = torch_device(request.device)
        with pinned(request.dtype, place), torch.no_grad():
            model = self._recast(request, place).eval()
            with watched(model, recorder or Recorder(known=())):
                return _wide_all(self._outputs(model(*self._inputs(request, place).values())))

    def train(self, request: Request) -> Training:
        """See `Runner`."""
        place = torch_device(request.device)
        trained: dict[str, np.ndarray] = {}
        draws = Draws(request.seed)
        with pinned(request.dtype, place):
            for name, make in OPTIMIZERS.items():
                model = self._recast(request, place).train().requires_grad_()
                task = self._task(request)
                targets = {
                    output: self._as_in_torch(output, to_tensor(request.fixed(target)).to(place))
                    for output, target in task.targets.items()
                }
                optimizer, losses = make.torch(model.parameters()), []
                for _ in range(request.steps):
                    inputs = list(self._inputs(request, place).values())  # anew: a model may change them in place
                    optimizer.zero_grad()
                    draws.begin()
                    with shared_masks(model, draws):
                        loss = task.loss(model, inputs, targets, outlook_torch.losses)
                    loss.backward()
                    optimizer.step()
                    losses.append(wide(loss))
                after = self._weights_of(model)
                state = {
                    f"{kind} of {key}": wide(optimizer.state[parameter][slot])
                    for slot, kind in make.torch_state.items()
                    for key, parameter in model.named_parameters()
                    if slot in optimizer.state.get(parameter, {})
                }
                trained |= prefixed(name, {"losses": np.stack(losses), **after, **state})
        return Training(trained, list(draws.drawn))

    def kinds(self) -> dict[str, str]:
        """Return the types of the modules by path."""
        return kinds_of(self.model)

    def describe(self, request: Request) -> Facts:
        """See `Runner`."""
        place = torch_device("cpu")
        with pinned(request.dtype, place), torch.no_grad():
            model = self._recast(request, place).eval()
            facts = attributes_of(model, PRECISIONS[request.dtype].products)
            with listening(model, facts):
                model(*self._inputs(request, place).values())
        facts[ROOT]["mode"] = "training" if self.model.training else "eval"
        return facts

    @contextmanager
    def module(self, request: Request, path: str) -> Iterator[Any]:
        """Enter where the module with this path can be called, in eval mode; None if there is none."""
        place = torch_device(request.device)
        with pinned(request.dtype, place):
            yield dict(self._recast(request, place).eval().named_modules()).get(path)

    def _weights_of(self, model: torch.nn.Module) -> dict[str, np.ndarray]:
        compared = self._compared
        return {n: wide(tensor) for n, tensor in weights_of(model).items() if compared is None or n in compared}

    def _recast(self, request: Request, place: torch.device) -> torch.nn.Module:
        model = copied(self.model).to(device=place, dtype=getattr(torch, PRECISIONS[request.dtype].storage.name))
        given = weights_of(self.model)
        with torch.no_grad():
            # From the given values, not from the recast copy: each is rounded once, and alike in both twins.
            for name, own in weights_of(model).items():
                own.copy_(to_tensor(request.rounded(name, to_numpy(given[name]))))
        for module in model.modules():
            if isinstance(module, DropPath):
                module.rate = float(np.float32(module.rate))  # as the JAX twin keeps it
        return model

    def _outputs(self, output: Any) -> dict[str, torch.Tensor]:
        """Return the outputs by name, their axes as JAX has them."""
        named = named_leaves(output, is_array, OUTPUT)
        found = {name: leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf) for name, leaf in named.items()}
        for name, tensor in found.items():
            if tensor.is_complex():
                raise TypeError(f"{name} of the torch model is complex; give its real and imaginary parts")
        return {
            name: tensor.permute(self._out_axes[name]) if name in self._out_axes else tensor
            for name, tensor in found.items()
        }

    def _as_in_torch(self, output: str, target: torch.Tensor) -> torch.Tensor:
        axes = self._out_axes.get(output)
        return target if axes is None else target.permute(*np.argsort(axes).tolist())

    def _inputs(self, request: Request, place: torch.device, inputs: Inputs | None = None) -> dict[str, torch.Tensor]:
        rounded = request.rounded_inputs(inputs)
        return {name: to_tensor(array.transpose(self._axes[name])).to(place) for name, array in rounded.items()}


def _gradients(
    outputs: Mapping[str, torch.Tensor], asked: Mapping[str, torch.Tensor], request: Request
) -> dict[str, np.ndarray]:
    """Return the gradients of the sum of floating-point outputs times their cotangents; zero where there are none."""
    graded = {name: output for name, output in outputs.items() if output.requires_grad}
    if not asked:
        return {}
    if not graded:
        return {name: np.zeros(tuple(tensor.shape)) for name, tensor in asked.items()}
    cotangents = [
        to_tensor(request.cotangent(name, tuple(t.shape))).to(t.device, t.dtype) for name, t in graded.items()
    ]
    found = torch.autograd.grad(
        list(graded.values()), list(asked.values()), cotangents, materialize_grads=True, allow_unused=True
    )
    return dict(zip(asked, map(wide, found), strict=True))


def _wide_all(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: wide(tensor) for name, tensor in tensors.items()}
