"""SGD and AdamW in both frameworks, with every setting explicit."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optax
    import torch

# How many numbers are updated at once: each by its own gradient, so a part of a parameter as well as all of it.
MOST_NUMBERS = 1 << 18

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 0.05
# Few bits each: optax computes 1 - beta**step in float32, where for the usual 0.999 the result is wrong by 2e-5.
BETAS = (0.875, 0.9375)
# AdamW divides a gradient by its own size. Where the true gradient is zero (of a key's bias, to which softmax is
# invariant) the computed one is rounding alone, and with the usual 1e-8 would change the parameter by a learning rate.
EPSILON = 1e-3


@dataclass(frozen=True)
class Optimizer:
    """One optimizer in both frameworks; names of its state in each -> in the report."""

    torch: "Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]"
    jax: "Callable[[], optax.GradientTransformation]"
    torch_state: Mapping[str, str]
    jax_state: Mapping[str, str]


# Each framework is imported by its own runner alone: twins may run on different machines.


def _torch_optimizer(name: str, *settings: Any, **more: Any) -> "Callable[..., torch.optim.Optimizer]":
    def make(parameters: "Iterable[torch.nn.Parameter]") -> "torch.optim.Optimizer":
        import torch

        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, *settings, **more)
        return optimizer

    return make


def _jax_optimizer(name: str, *settings: Any, **more: Any) -> "Callable[[], optax.GradientTransformation]":
    def make() -> "optax.GradientTransformation":
        import optax

        return getattr(optax, name)(*settings, **more)

    return make


OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": Optimizer(
        _torch_optimizer("SGD", LEARNING_RATE, momentum=MOMENTUM),
        _jax_optimizer("sgd", LEARNING_RATE, momentum=MOMENTUM),
        {"momentum_buffer": "momentum"},
        {"trace": "momentum"},
    ),
    "AdamW": Optimizer(
        _torch_optimizer("AdamW", LEARNING_RATE, BETAS, EPSILON, weight_decay=WEIGHT_DECAY),
        _jax_optimizer("adamw", LEARNING_RATE, *BETAS, eps=EPSILON, eps_root=0.0, weight_decay=WEIGHT_DECAY),
        {"exp_avg": "first moment", "exp_avg_sq": "second moment"},
        {"mu": "first moment", "nu": "second moment"},
    ),
}
