"""The optimizers of the training steps, each as both frameworks have it, with every setting given."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import optax
import torch

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 0.05
# Few bits each: optax computes 1 - beta**step in float32, where for the usual 0.999 the result is wrong by 2e-5.
BETAS = (0.875, 0.9375)
# AdamW divides a gradient by its own size. Where the true gradient is zero (of a key's bias, to which softmax is blind)
# what was computed is rounding alone, and with the usual 1e-8 would move the parameter by a whole learning rate.
EPSILON = 1e-3


@dataclass(frozen=True)
class Optimizer:
    """One optimizer in both frameworks; its state by what each calls it -> what the report calls it."""

    torch: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    jax: Callable[[], optax.GradientTransformation]
    torch_state: Mapping[str, str]
    jax_state: Mapping[str, str]


OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": Optimizer(
        lambda parameters: torch.optim.SGD(parameters, LEARNING_RATE, momentum=MOMENTUM),
        lambda: optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
        {"momentum_buffer": "momentum"},
        {"trace": "momentum"},
    ),
    "AdamW": Optimizer(
        lambda parameters: torch.optim.AdamW(parameters, LEARNING_RATE, BETAS, EPSILON, weight_decay=WEIGHT_DECAY),
        lambda: optax.adamw(LEARNING_RATE, *BETAS, eps=EPSILON, eps_root=0.0, weight_decay=WEIGHT_DECAY),
        {"exp_avg": "first moment", "exp_avg_sq": "second moment"},
        {"mu": "first moment", "nu": "second moment"},
    ),
}
