"""Run one twin under control and keep what it computed, as NumPy arrays in float64 under torch names.

Each twin runs on a recast copy with every global setting pinned: matrix products at full precision (no TF32), JAX's x64
mode on for float64 and off below, no autocast. The caller's models and settings stay as they are.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import ml_dtypes
import numpy as np
import optax
import torch
from flax import nnx

import outlook_jax.losses
import outlook_torch.losses
from outlook_common.weights.arrays import is_floating, to_numpy, to_tensor
from outlook_common.weights.models import table_for
from outlook_jax.blocks import DropPath as JaxDropPath
from outlook_jax.blocks import DropRate
from outlook_jax.weights import WEIGHTS
from outlook_parity.compare import DTYPES, Tensors
from outlook_parity.optimizers import OPTIMIZERS
from outlook_parity.subjects import Subject, Task, subject_of
from outlook_torch.blocks import DropPath as TorchDropPath


@dataclass(frozen=True)
class Request:
    """What a twin is asked to compute.

    Weights, inputs, targets and cotangents are first rounded to `rounded_to`: so a run in float64 gives the exact
    answer to what one in a lower precision was asked.

    Attributes:
        inputs: channels last.
        dtype: of the computation.
        device: "cpu", "gpu" or "tpu".
        seed: of the cotangent and of the training's target.
        rounded_to: a dtype.
        steps: of training, per optimizer.
        moved: by how many units of rounding of `rounded_to` inputs and weights are moved, each up or down at random.
    """

    inputs: np.ndarray
    dtype: str
    device: str
    seed: int
    rounded_to: str
    steps: int = 0
    moved: float = 0.0

    def rounded(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return weights or inputs as they are to be computed with; what is no floating-point number stays."""
        if not is_floating(values):
            return values
        values = round_to(values, self.rounded_to)
        if self.moved:
            signs = np.random.default_rng([self.seed, *name.encode()]).choice([-1.0, 1.0], values.shape)
            eps = float(ml_dtypes.finfo(DTYPES[self.rounded_to]).eps)  # type: ignore[no-untyped-call]
            values = values.astype(np.float64) * (1 + self.moved * eps * signs)
        return round_to(values, self.dtype)

    def cotangent(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the cotangent of an output of this shape, standard normal: the same in both twins."""
        values = np.random.default_rng(self.seed).standard_normal(shape)
        return round_to(round_to(values, self.rounded_to), self.dtype)

    def task(self, subject: Subject, config: Any) -> Task:
        """Return what is trained on, the target rounded."""
        task = subject.task(config, self.inputs.shape, np.random.default_rng(self.seed))
        return Task(round_to(round_to(task.target, self.rounded_to), self.dtype), task.loss)


@dataclass(frozen=True)
class Trace:
    """What one twin computed; values in float64, `output_dtype` as the model gave them."""

    output: np.ndarray
    output_dtype: str
    gradients: Tensors  # of sum(output * cotangent), for "input" and every parameter


class Twin(ABC):
    """A model of either framework, as the verifier sees it."""

    @abstractmethod
    def weights(self) -> dict[str, np.ndarray]:
        """Return every parameter and buffer in float64 under its torch name."""

    @abstractmethod
    def run(self, request: Request) -> Trace:
        """Return output and gradients, in eval mode."""

    @abstractmethod
    def train(self, request: Request) -> dict[str, np.ndarray]:
        """Return the losses of the steps, one by one, and the parameters and buffers after the last, per optimizer.

        Each optimizer starts from the same weights. In training mode, but nothing is dropped.
        """


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` in `dtype`; half precisions are rounded by way of float32, alike everywhere."""
    with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are found where the results are compared
        if dtype != "float64":
            array = array.astype(np.float32)
        return array.astype(DTYPES[dtype])


class TorchTwin(Twin):
    """A `torch.nn.Module` whose forward takes and returns one tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._config = getattr(model, "config", model)
        self._subject = subject_of(self._config)

    def weights(self) -> dict[str, np.ndarray]:
        """See `Twin`."""
        return {name: _wide(tensor) for name, tensor in _weights(self.model).items()}

    def run(self, request: Request) -> Trace:
        """See `Twin`."""
        place, axes = torch_device(request.device), self._subject.torch_axes
        with _torch_pinned(place):
            model = self._recast(request, place).eval()
            parameters = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
            x = self._inputs(request, place).requires_grad_()
            output = model(x)
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"the torch model must return one tensor, got {type(output).__name__}")
            cotangent = to_tensor(request.cotangent(tuple(output.shape))).to(place, output.dtype)
            gradients = torch.autograd.grad(output, [x, *parameters.values()], cotangent, materialize_grads=True)
        named = dict(zip(["input", *parameters], map(_wide, gradients), strict=True))
        return Trace(
            output=_wide(output),
            output_dtype=str(output.dtype).removeprefix("torch."),
            gradients=named | {"input": named["input"].transpose(np.argsort(axes))},
        )

    def train(self, request: Request) -> dict[str, np.ndarray]:
        """See `Twin`."""
        place = torch_device(request.device)
        trained: dict[str, np.ndarray] = {}
        with _torch_pinned(place):
            task = request.task(self._subject, self._config)
            x, target = self._inputs(request, place), to_tensor(task.target).to(place)
            for name, make in OPTIMIZERS.items():
                model = self._recast(request, place).train().requires_grad_()
                for module in model.modules():
                    if isinstance(module, torch.nn.Dropout | TorchDropPath):
                        module.eval()
                optimizer, losses = make.torch(model.parameters()), []
                for _ in range(request.steps):
                    optimizer.zero_grad()
                    loss = task.loss(model, x, target, outlook_torch.losses)
                    loss.backward()
                    optimizer.step()
                    losses.append(_wide(loss))
                trained |= _trained(name, losses, {key: _wide(tensor) for key, tensor in _weights(model).items()})
        return trained

    def _recast(self, request: Request, place: torch.device) -> torch.nn.Module:
        model = copy.deepcopy(self.model).to(device=place, dtype=getattr(torch, request.dtype))
        given = _weights(self.model)
        with torch.no_grad():
            # From the given values, not from the recast copy: each is rounded once, and alike in both twins.
            for name, own in _weights(model).items():
                own.copy_(to_tensor(request.rounded(name, to_numpy(given[name]))))
        return model

    def _inputs(self, request: Request, place: torch.device) -> torch.Tensor:
        x = request.rounded("input", request.inputs)
        return to_tensor(x.transpose(self._subject.torch_axes)).to(place)


class JaxTwin(Twin):
    """An `nnx.Module` that takes and returns one array; `config` says what the parameters are called in PyTorch."""

    def __init__(self, model: nnx.Module, config: Any) -> None:
        self.model = model
        self._config = config
        self._subject = subject_of(config)
        self._entries = {entry.flax: entry for entry in table_for(config).entries}

    def weights(self) -> dict[str, np.ndarray]:
        """See `Twin`."""
        return self._under_torch_names(nnx.state(self.model, nnx.Not(nnx.Any(nnx.RngState, DropRate))))

    def run(self, request: Request) -> Trace:
        """See `Twin`."""
        place = jax_device(request.device)
        with _jax_pinned(request.dtype, place):
            model = self._recast(request)
            model.eval()  # type: ignore[no-untyped-call]
            graph, parameters, others = self._split(model, request, place)
            x = jax.device_put(request.rounded("input", request.inputs), place)

            def forward(parameters: Any, x: jax.Array) -> jax.Array:
                return nnx.merge(graph, parameters, others)(x)

            @jax.jit
            def run(parameters: Any, x: jax.Array, cotangent: jax.Array) -> Any:
                output, pullback = jax.vjp(forward, parameters, x)
                return output, *pullback(cotangent.astype(output.dtype))

            shape = jax.eval_shape(forward, parameters, x)
            if not isinstance(shape, jax.ShapeDtypeStruct):
                raise TypeError(f"the JAX model must return one array, got {type(shape).__name__}")
            cotangent = jax.device_put(request.cotangent(shape.shape), place)
            output, gradients, input_gradient = run(parameters, x, cotangent)
        return Trace(
            output=np.asarray(output).astype(np.float64),
            output_dtype=output.dtype.name,
            gradients={
                "input": np.asarray(input_gradient).astype(np.float64),
                **self._under_torch_names(gradients),
            },
        )

    def train(self, request: Request) -> dict[str, np.ndarray]:
        """See `Twin`."""
        place = jax_device(request.device)
        trained: dict[str, np.ndarray] = {}
        with _jax_pinned(request.dtype, place):
            model = self._recast(request)
            model.train()  # type: ignore[no-untyped-call]
            for _, module in nnx.iter_modules(model):
                if isinstance(module, nnx.Dropout | JaxDropPath):
                    module.deterministic = True
            graph, *start = self._split(model, request, place)
            task = request.task(self._subject, self._config)
            x = jax.device_put(request.rounded("input", request.inputs), place)
            target = jax.device_put(task.target, place)

            def loss_of(parameters: Any, others: Any, x: jax.Array, target: jax.Array) -> Any:
                model = nnx.merge(graph, parameters, others, copy=True)  # else its buffers could not be written to
                return task.loss(model, x, target, outlook_jax.losses), nnx.state(model, nnx.Not(nnx.Param))

            differentiate = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
            for name, make in OPTIMIZERS.items():
                optimizer, (parameters, others), losses = make.jax(), start, []
                state = optimizer.init(parameters)
                update = jax.jit(partial(_update, optimizer))
                for _ in range(request.steps):
                    (loss, others), gradients = differentiate(parameters, others, x, target)
                    parameters, state = update(gradients, state, parameters)
                    losses.append(np.asarray(loss).astype(np.float64))
                after = self._under_torch_names(parameters) | self._under_torch_names(nnx.filter_state(others, WEIGHTS))
                trained |= _trained(name, losses, after)
        return trained

    def _recast(self, request: Request) -> nnx.Module:
        """Return a copy whose modules compute in the dtype asked for, where they were told one."""
        model = nnx.clone(self.model)
        for _, module in nnx.iter_modules(model):
            if getattr(module, "dtype", None) is not None:
                module.dtype = DTYPES[request.dtype]  # type: ignore[attr-defined]
        return model

    def _split(self, model: nnx.Module, request: Request, place: jax.Device) -> tuple[Any, Any, Any]:
        """Return the graph, the parameters and everything else, all in the dtype and on the device asked for."""

        def placed(path: Any, variable: Any) -> Any:
            values = variable.get_value()
            if not isinstance(variable, nnx.RngState):
                values = request.rounded(".".join(map(str, path)), np.asarray(values))
            return variable.replace(jax.device_put(values, place))

        graph, *states = nnx.split(model, nnx.Param, ...)
        flat = ([(path, placed(path, variable)) for path, variable in nnx.to_flat_state(state)] for state in states)
        parameters, others = map(nnx.from_flat_state, flat)
        return graph, parameters, others

    def _under_torch_names(self, state: Any) -> dict[str, np.ndarray]:
        named = {}
        for path, variable in nnx.to_flat_state(state):
            flax = ".".join(map(str, path))
            array, entry = np.asarray(variable.get_value()), self._entries.get(flax)
            # A parameter that the table does not know keeps its Flax name, and so has no counterpart in torch.
            name, array = (flax, array) if entry is None else (entry.torch, entry.to_torch(array))
            named[name] = array.astype(np.float64)
        return named


def _update(optimizer: optax.GradientTransformation, gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state


def _trained(optimizer: str, losses: list[np.ndarray], weights: Tensors) -> dict[str, np.ndarray]:
    return {f"{optimizer}: {name}": array for name, array in {"losses": np.stack(losses), **weights}.items()}


def twins(torch_model: torch.nn.Module, jax_model: nnx.Module) -> tuple[Twin, Twin]:
    """Return both models, PyTorch's first; PyTorch's has the `config` that says what the parameters are called."""
    return TorchTwin(torch_model), JaxTwin(jax_model, getattr(torch_model, "config", torch_model))


def weight_names(torch_model: torch.nn.Module) -> list[str]:
    """Return the names of all parameters and buffers that the configuration of the model calls for."""
    return [entry.torch for entry in table_for(getattr(torch_model, "config", torch_model)).entries]


def device_absence(device: str) -> str | None:
    """Return why runs on this kind of device are not possible here, or None if they are."""
    try:
        jax_device(device)
    except RuntimeError as error:
        return f"JAX has no {device} here ({str(error).splitlines()[0]})"
    if device == "gpu" and not torch.cuda.is_available():
        return "PyTorch has no CUDA device here"
    return None


def jax_device(device: str) -> jax.Device:
    """Return JAX's first device of this kind; a RuntimeError if it has none."""
    return jax.devices(device)[0]


def torch_device(device: str) -> torch.device:
    """Return PyTorch's device of this kind. It has none for TPUs: there its twin runs on the CPU."""
    return torch.device("cuda" if device == "gpu" else "cpu")


def device_names(device: str) -> dict[str, str]:
    """Return what the lower precisions ran on, per framework."""
    place = torch_device(device)
    return {
        "torch device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "jax device": jax_device(device).device_kind,
    }


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return to_numpy(tensor.double())


# Where PyTorch keeps the precision of its float32 products; set one by one, for a mixture of them cannot be read
# through the older, global switches.
_PRECISION_SWITCHES = attrgetter("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def _torch_pinned(device: torch.device) -> Iterator[None]:
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


@contextmanager
def _jax_pinned(dtype: str, device: jax.Device) -> Iterator[None]:
    with ExitStack() as settings:
        settings.enter_context(jax.enable_x64(dtype == "float64"))
        settings.enter_context(jax.default_matmul_precision("highest"))
        settings.enter_context(jax.default_device(device))
        settings.enter_context(jax.debug_nans(False))
        yield
