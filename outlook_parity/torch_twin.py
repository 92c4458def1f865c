"""Run a PyTorch model under control and keep what it computed, as NumPy arrays in float64.

It runs on a recast copy with every global setting pinned; the caller's model and settings stay as they are.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

import outlook_torch.losses
from outlook_common.weights.arrays import to_numpy, to_tensor
from outlook_parity.masks import Draws
from outlook_parity.names import TorchLeaf
from outlook_parity.optimizers import OPTIMIZERS
from outlook_parity.precisions import PRECISIONS
from outlook_parity.request import Inputs, Request, round_to
from outlook_parity.semantics import Facts
from outlook_parity.subjects import OUTPUT, Task, is_array
from outlook_parity.tape import ROOT, Arrays, Tape
from outlook_parity.torch_semantics import attributes_of, kinds_of, listening
from outlook_parity.torch_settings import pinned, torch_device
from outlook_parity.trees import leaves, named_leaves, replaced
from outlook_parity.twin import Run, Training, Twin, called_again, prefixed
from outlook_torch.blocks import DropPath


class TorchTwin(Twin):
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
        """See `Twin`."""
        return self._weights_of(self.model)

    def run(self, request: Request, *, gradients: bool = True, again: bool = False) -> Run:
        """See `Twin`."""
        place = torch_device(request.device)
        with pinned(request.dtype, place):
            model = self._recast(request, place).eval()
            parameters = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
            inputs = self._inputs(request, place)
            asked = {name: x.requires_grad_() for name, x in inputs.items() if gradients and x.is_floating_point()}
            with torch.set_grad_enabled(gradients):
                outputs = self._outputs(model(*inputs.values()))
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
                found, {n: _dtype(t) for n, t in outputs.items()}, named, called_again(request, call) if again else {}
            )

    def watch(self, request: Request, tape: Tape | None) -> dict[str, np.ndarray]:
        """See `Twin`."""
        place = torch_device(request.device)
        with pinned(request.dtype, place), torch.no_grad():
            model = self._recast(request, place).eval()
            with watched(model, tape or Tape(known=())):
                return _wide_all(self._outputs(model(*self._inputs(request, place).values())))

    def train(self, request: Request) -> Training:
        """See `Twin`."""
        place = torch_device(request.device)
        trained: dict[str, np.ndarray] = {}
        draws = Draws(request.seed)
        with pinned(request.dtype, place):
            inputs = list(self._inputs(request, place).values())
            for name, make in OPTIMIZERS.items():
                model = self._recast(request, place).train().requires_grad_()
                task = self._task(request)
                targets = {
                    output: self._as_in_torch(output, to_tensor(request.fixed(target)).to(place))
                    for output, target in task.targets.items()
                }
                optimizer, losses = make.torch(model.parameters()), []
                for _ in range(request.steps):
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
        """See `Twin`."""
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
        model = _copied(self.model).to(device=place, dtype=getattr(torch, PRECISIONS[request.dtype].storage.name))
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


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the torch model cannot be copied, and is verified on copies: {reason}; does it keep a result of an "
            "earlier call?"
        ) from error


class FunctionModule(torch.nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        """Return what the function does."""
        return self.function(*inputs)


@contextmanager
def watched(model: torch.nn.Module, tape: Tape) -> Iterator[None]:
    """Write every call of a module to the tape, and replace it by what the tape plays."""
    handles = []
    for path, module in model.named_modules():
        if not tape.watches(path):
            continue

        def before(module: torch.nn.Module, args: Any, kwargs: Any, path: str = path) -> Any:
            given = tape.enter(path, _arrays((args, kwargs)))
            return None if given is None else _replaced((args, kwargs), given)

        def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
            # Flax's attention does not give its weights, PyTorch's does.
            attention = isinstance(module, torch.nn.MultiheadAttention)
            told, rest = (output[0], output[1:]) if attention else (output, None)
            given = tape.leave(_arrays(told))
            if given is None:
                return None
            return _replaced(told, given) if rest is None else (_replaced(told, given), *rest)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _arrays(tree: Any) -> Arrays:
    # Copies: what a module changes in place afterwards must not change what was written down.
    return [to_numpy(leaf).copy() for leaf in leaves(tree, _is_floating)]


def _replaced(tree: Any, given: Arrays) -> Any:
    found = leaves(tree, _is_floating)
    new = {
        id(leaf): to_tensor(round_to(array, _dtype(leaf))).to(leaf.device)
        for leaf, array in zip(found, given, strict=True)
    }
    return replaced(tree, _is_floating, new)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# As they are before anything is put in their place.
_RANDOM: dict[str, Callable[..., Any]] = {
    "dropout": torch.nn.functional.dropout,
    "attention": torch.nn.functional.scaled_dot_product_attention,
    "rand": torch.rand,
}


class _Masks(TorchFunctionMode):
    """Answers whoever asks PyTorch for dropout, or for uniform random numbers, from `draws`."""

    def __init__(self, draws: Draws, where: Callable[[], str]) -> None:
        super().__init__()
        self._draws, self._where = draws, where
        self._replacements: dict[Any, Callable[..., Any]] = {
            _RANDOM["dropout"]: self._dropout,
            _RANDOM["attention"]: self._attention,
            _RANDOM["rand"]: self._rand,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))

    def inside_functions(self) -> AbstractContextManager[Any]:
        """Return a context in which PyTorch's own functions, multi-head attention above all, ask here too."""
        return patch.multiple(torch.nn.functional, dropout=self._dropout, scaled_dot_product_attention=self._attention)

    def _dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return x
        return x * to_tensor(self._draws.mask(tuple(x.shape), p, self._where())).to(x.device, x.dtype)

    def _attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if dropout_p == 0 or attn_mask is not None or is_causal:
            return _RANDOM["attention"](q, k, v, attn_mask, dropout_p, is_causal, **kwargs)
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        weights = (q @ k.transpose(-1, -2) * scale).softmax(dim=-1)
        return self._dropout(weights, dropout_p) @ v

    def _rand(self, *shape: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return to_tensor(self._draws.uniform(sizes, self._where())).to(device, dtype)


@contextmanager
def shared_masks(model: torch.nn.Module, draws: Draws) -> Iterator[None]:
    """Let what the model drops be decided by `draws`."""
    inside: list[str] = []

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    handles = []
    for path, module in model.named_modules():
        enter = module.register_forward_pre_hook(lambda module, args, path=path: inside.append(path))
        handles += [enter, module.register_forward_hook(leave)]
    try:
        masks = _Masks(draws, lambda: inside[-1] if inside else "")
        with masks, masks.inside_functions():
            yield
    finally:
        for handle in handles:
            handle.remove()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def compared_weights(model: torch.nn.Module) -> list[str]:
    """Return the parameters and BatchNorm's running statistics; that it counts batches, Flax does not know."""
    statistics = [name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return [*dict(model.named_parameters()), *statistics]


def torch_leaves(model: torch.nn.Module) -> dict[str, TorchLeaf]:
    """Return what `compared_weights` are, by name."""
    kinds, shapes = kinds_of(model), {name: tuple(tensor.shape) for name, tensor in weights_of(model).items()}
    return {name: TorchLeaf(kinds[name.rpartition(".")[0]], shapes[name]) for name in compared_weights(model)}


def wide(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array in float64."""
    return to_numpy(tensor.double())
