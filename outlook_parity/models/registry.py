"""How this package's own models are verified: the one door to what is special about them.

Everything else of the verifier treats models alike and asks here. No framework: what concerns one framework's layers
is in `torch_layers.py` and `jax_layers.py`, what tells the steps of outlook attention apart in
`diagnose/attention_steps.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from outlook_common.axes import MeshAxes, in_flax, mesh_axes
from outlook_common.config import OutlookAttentionConfig, VOLOConfig
from outlook_common.volo import MixBox
from outlook_common.weights.identify import table_for
from outlook_common.weights.tables.base import LAYOUTS
from outlook_parity.core.layout import Axes
from outlook_parity.core.task import OUTPUT, Task, mean_square
from outlook_parity.mapping.names import Names, WeightName

if TYPE_CHECKING:
    from outlook_parity.compare.modules import Suspect

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Kind:
    """What models with one type of configuration have in common."""

    torch_axes: Axes
    task: Callable[[Any, Shape, np.random.Generator], Task]


@dataclass(frozen=True)
class KnownModel:
    """A model of this package, as its configuration describes it.

    Attributes:
        config: the configuration.
        torch_axes: the order in which PyTorch takes the axes of the input, which has its channels last.
    """

    config: OutlookAttentionConfig | VOLOConfig
    torch_axes: Axes
    _task: Callable[[Any, Shape, np.random.Generator], Task]

    def names(self) -> Names:
        """Return the names of its weights in both frameworks, with their layouts."""
        entries = table_for(self.config).entries
        return Names([WeightName(entry.torch, entry.flax, LAYOUTS[entry.layout]) for entry in entries], {})

    def mesh_axes(self, mesh: Mapping[str, int], rules: str) -> dict[str, tuple[MeshAxes, ...]]:
        """Return what the axes of each weight are put on by rules of `outlook_common.axes`, by Flax path."""
        entries = table_for(self.config).entries
        on = mesh_axes(entries, mesh, rules)
        return {entry.flax: in_flax(entry, on[entry.torch]) for entry in entries}

    def task(self, shape: Shape, rng: np.random.Generator) -> Task:
        """Return what training steps minimise for an input of this shape, with random targets."""
        return self._task(self.config, shape, rng)


def known_model(model: Any) -> KnownModel | None:
    """Return how a model of either framework is verified, None if it is not one of this package."""
    config: Any = getattr(model, "config", None)
    kind = next((kind for known, kind in KINDS.items() if isinstance(config, known)), None)
    return None if kind is None else KnownModel(config, kind.torch_axes, kind.task)


def _map_task(config: OutlookAttentionConfig, shape: Shape, rng: np.random.Generator) -> Task:
    """Return the mean square of a map of the input's shape."""
    return mean_square({OUTPUT: rng.standard_normal(shape)})


def _token_labelling(config: VOLOConfig, shape: Shape, rng: np.random.Generator) -> Task:
    """Return VOLO's training loss, on mixed tokens; without auxiliary head the mean square."""
    H, W = shape[1] // config.stride, shape[2] // config.stride
    if not (config.use_aux_head and config.num_classes > 0):
        tokens = (H * W + (config.post_layers is not None),) if config.global_pool == "" else ()
        logits = (shape[0], *tokens, config.num_classes or config.num_features)
        return mean_square({OUTPUT: rng.standard_normal(logits)})
    scores = np.exp(2 * rng.standard_normal((shape[0], config.num_classes, 2 + H * W)))

    def loss(model: Any, inputs: Sequence[Any], targets: Mapping[str, Any], losses: Any) -> Any:
        outputs = model.forward_train(inputs[0], mix_box((H, W)))
        return losses.TokenLabelCrossEntropy()(outputs, targets[OUTPUT])

    return Task({OUTPUT: scores / scores.sum(axis=1, keepdims=True)}, loss)


def mix_box(token_map: tuple[int, int]) -> MixBox:
    """Return a fixed box (y1, x1, y2, x2), off the centre and of unequal sides where the map has room for it."""
    H, W = token_map
    y1, x1 = H // 5, W // 3
    return y1, x1, max(y1 + 1, H * 3 // 5), max(x1 + 1, W * 6 // 7)


KINDS: dict[type, _Kind] = {
    OutlookAttentionConfig: _Kind((0, 1, 2, 3), _map_task),
    VOLOConfig: _Kind((0, 3, 1, 2), _token_labelling),
}


# Attributes that modules of this package have in their configuration: attribute -> its field.
CONFIG_FIELDS = {"scale": "qk_scale", "heads": "num_heads", "window": "kernel_size", "window stride": "stride"}


def config_attributes(module: Any) -> dict[str, Any]:
    """Return the attributes of one module that are in its configuration; none of a module without one."""
    values = {name: getattr(getattr(module, "config", None), field, None) for name, field in CONFIG_FIELDS.items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float | tuple)}


def wrong_step(torch_module: Any, jax_module: Any, suspect: "Suspect", x: np.ndarray) -> str | None:
    """Return the step inside a module of this package that differs; see `attention_steps.wrong_step`."""
    from outlook_parity.diagnose import attention_steps

    return attention_steps.wrong_step(torch_module, jax_module, suspect, x)
