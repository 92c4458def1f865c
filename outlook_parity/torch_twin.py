"""Run a PyTorch model under control and keep what it computed, as NumPy arrays in float64.

It runs on a recast copy with every global setting pinned: matrix products at full precision (no TF32), no autocast. The
caller's model and settings stay as they are.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import outlook_torch.losses
from outlook_common.weights.arrays import to_numpy, to_tensor
from outlook_parity.masks import Draws
from outlook_parity.optimizers import OPTIMIZERS
from outlook_parity.request import Request, round_to
from outlook_parity.semantics import Facts
from outlook_parity.subjects import Task
from outlook_parity.tape import ROOT, Arrays, Tape
from outlook_parity.torch_semantics import attributes_of, kinds_of, listening
from outlook_parity.twin import Run, Training, Twin, prefixed
from outlook_torch.blocks import DropPath


class TorchTwin(Twin):
    """A `torch.nn.Module`, or a function, whose forward takes and returns one tensor.

    Args:
        model: the module.
        axes: the order in which it takes the axes of the input, which has them as JAX does.
        task: from the request, what training minimises.
        out_axes: the order in which JAX has the axes of its output, None for the same.
        compared: the names of the weights that are compared, all if None.
    """

    name = "torch"

    def __init__(
        self,
        model: torch.nn.Module,
        axes: tuple[int, ...],
        task: Callable[[Request], Task],
        out_axes: tuple[int, ...] | None = None,
        compared: Collection[str] | None = None,
    ) -> None:
        self.model = model
        self._axes = axes
        self._task = task
        self._out_axes = out_axes
        self._compared = compared

    def weights(self) -> dict[str, np.ndarray]:
        """See `Twin`."""
        return self._weights_of(self.model)

    def run(self, request: Request, *, gradients: bool = True) -> Run:
        """See `Twin`."""
        place = torch_device(request.device)
        with pinned(place):
            model = self._recast(request, place).eval()
            parameters = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
            x = self._inputs(request, place)
            with torch.set_grad_enabled(gradients):
                output = self._as_in_jax(_one_tensor(model(x.requires_grad_(gradients))))
            named = {}
            if gradients:
                cotangent = to_tensor(request.cotangent(tuple(output.shape))).to(place, output.dtype)
                found = torch.autograd.grad(
                    output, [x, *parameters.values()], cotangent, materialize_grads=True, allow_unused=True
                )
                named = dict(zip(["input", *parameters], map(wide, found), strict=True))
                named["input"] = named["input"].transpose(np.argsort(self._axes))
        return Run(wide(output), str(output.dtype).removeprefix("torch."), named)

    def watch(self, request: Request, tape: Tape | None) -> np.ndarray:
        """See `Twin`."""
        place = torch_device(request.device)
        with pinned(place), torch.no_grad():
            model = self._recast(request, place).eval()
            with watched(model, tape or Tape(known=())):
                return wide(self._as_in_jax(_one_tensor(model(self._inputs(request, place)))))

    def train(self, request: Request) -> Training:
        """See `Twin`."""
        place = torch_device(request.device)
        trained: dict[str, np.ndarray] = {}
        draws = Draws(request.seed)
        with pinned(place):
            x = self._inputs(request, place)
            for name, make in OPTIMIZERS.items():
                model = self._recast(request, place).train().requires_grad_()
                task = self._task(request)
                target = to_tensor(request.fixed(task.target)).to(place)
                if self._out_axes is not None:
                    target = target.permute(*np.argsort(self._out_axes).tolist())
                optimizer, losses = make.torch(model.parameters()), []
                for _ in range(request.steps):
                    optimizer.zero_grad()
                    draws.begin()
                    with shared_masks(model, draws):
                        loss = task.loss(model, x, target, outlook_torch.losses)
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
        with pinned(place), torch.no_grad():
            model = self._recast(request, place).eval()
            facts = attributes_of(model)
            with listening(model, facts):
                model(self._inputs(request, place))
        facts[ROOT]["mode"] = "training" if self.model.training else "eval"
        return facts

    @contextmanager
    def module(self, request: Request, path: str) -> Iterator[Any]:
        """Enter where the module with this path can be called, in eval mode; None if there is none."""
        place = torch_device(request.device)
        with pinned(place):
            yield dict(self._recast(request, place).eval().named_modules()).get(path)

    def _weights_of(self, model: torch.nn.Module) -> dict[str, np.ndarray]:
        compared = self._compared
        return {n: wide(tensor) for n, tensor in weights_of(model).items() if compared is None or n in compared}

    def _recast(self, request: Request, place: torch.device) -> torch.nn.Module:
        model = copy.deepcopy(self.model).to(device=place, dtype=getattr(torch, request.dtype))
        given = weights_of(self.model)
        with torch.no_grad():
            # From the given values, not from the recast copy: each is rounded once, and alike in both twins.
            for name, own in weights_of(model).items():
                own.copy_(to_tensor(request.rounded(name, to_numpy(given[name]))))
        for module in model.modules():
            if isinstance(module, DropPath):
                module.rate = float(np.float32(module.rate))  # as the JAX twin keeps it
        return model

    def _as_in_jax(self, output: torch.Tensor) -> torch.Tensor:
        return output if self._out_axes is None else output.permute(self._out_axes)

    def _inputs(self, request: Request, place: torch.device) -> torch.Tensor:
        return to_tensor(request.rounded("input", request.inputs).transpose(self._axes)).to(place)


class FunctionModule(torch.nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the function does."""
        return self.function(x)


@contextmanager
def watched(model: torch.nn.Module, tape: Tape) -> Iterator[None]:
    """Write every call of a module to the tape, and replace it by what the tape plays."""
    handles = []
    for path, module in model.named_modules():
        if not tape.watches(path):
            continue

        def before(module: torch.nn.Module, args: Any, kwargs: Any, path: str = path) -> Any:
            given, leaves = tape.enter(path, _arrays((args, kwargs))), (args, kwargs)
            return None if given is None else _replaced(leaves, given)

        def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
            given = tape.leave(_arrays(output))
            return None if given is None else _replaced(output, given)

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
    return [to_numpy(leaf).copy() for leaf in pytree.tree_leaves(tree) if _is_floating(leaf)]


def _replaced(tree: Any, given: Arrays) -> Any:
    leaves, structure = pytree.tree_flatten(tree)
    arrays = iter(given)
    new = [
        to_tensor(round_to(next(arrays), _dtype(leaf))).to(leaf.device) if _is_floating(leaf) else leaf
        for leaf in leaves
    ]
    return pytree.tree_unflatten(new, structure)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class _Masks(TorchFunctionMode):
    """Answers whoever asks PyTorch for dropout, or for uniform random numbers, from `draws`."""

    def __init__(self, draws: Draws, where: Callable[[], str]) -> None:
        super().__init__()
        self._draws, self._where = draws, where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacements: dict[Any, Callable[..., Any]] = {
            torch.nn.functional.dropout: self._dropout,
            torch.nn.functional.scaled_dot_product_attention: self._attention,
            torch.rand: self._rand,
        }
        replacement = replacements.get(func)
        return func(*args, **(kwargs or {})) if replacement is None else replacement(*args, **(kwargs or {}))

    def _dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return x
        return x * to_tensor(self._draws.mask(tuple(x.shape), p, self._where())).to(x.device, x.dtype)

    def _attention(self, q: Any, k: Any, v: Any, *args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        if dropout_p == 0 or args or kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            honest: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention
            return honest(q, k, v, *args, dropout_p=dropout_p, **kwargs)
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
        with _Masks(draws, lambda: inside[-1] if inside else ""):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _one_tensor(output: Any) -> torch.Tensor:
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"the torch model must return one tensor, got {type(output).__name__}")
    return output


def torch_device(device: str) -> torch.device:
    """Return PyTorch's device of this kind. It has none for TPUs: there its twin runs on the CPU."""
    return torch.device("cuda" if device == "gpu" else "cpu")


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def compared_weights(model: torch.nn.Module) -> list[str]:
    """Return the parameters and BatchNorm's running statistics; that it counts batches, Flax does not know."""
    statistics = [name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return [*dict(model.named_parameters()), *statistics]


def wide(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array in float64."""
    return to_numpy(tensor.double())


# Where PyTorch keeps the precision of its float32 products; set one by one, for a mixture of them cannot be read
# through the older, global switches.
_PRECISION_SWITCHES = attrgetter("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def pinned(device: torch.device) -> Iterator[None]:
    """Compute with every global setting pinned, and put them back."""
    switches = _PRECISION_SWITCHES(torch.backends)
    precisions = [switch.fp32_precision for switch in switches]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        # On CUDA this would demand an environment variable; rounding is measured there, not equality.
        torch.use_deterministic_algorithms(device.type == "cpu")
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
