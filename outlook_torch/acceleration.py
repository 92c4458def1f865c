"""Replace the outlook attention in models of timm or of the original VOLO, and undo it."""

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from outlook_common.dispatch import ImplementationRequest
from outlook_torch.attention import OutlookAttention

Model = TypeVar("Model", bound=nn.Module)

# Attributes of the layers of timm and of the original: parts to share, and numbers to read.
PARTS = {"v": nn.Linear, "attn": nn.Linear, "attn_drop": nn.Dropout, "proj": nn.Linear, "proj_drop": nn.Dropout}
NUMBERS = ("num_heads", "kernel_size", "padding", "stride", "scale")
# Their other parts, without parameters and not needed here.
WINDOWS = ("unfold", "pool")

# A module's hooks, which stay registered.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",  # of which kind the backward hooks are
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def accelerate(model: Model, *, implementation: ImplementationRequest = None) -> Model:
    """Replace outlook attention of timm or of the original VOLO by this package's, in place.

    Parameters, dropouts and hooks are shared, not copied: names in `state_dict()`, optimizers and checkpoints stay
    valid. Logits are the same to rounding. Copies of the model (`copy.deepcopy`) stay accelerated. Layers with parts of
    other kinds, as adapters and quantization put there, stay as they are: adapt or quantize afterwards. So do layers
    that are accelerated already: to change their `implementation`, `restore` the model first.

    Args:
        model: anything that contains such layers.
        implementation: see `outlook_attention`.

    Returns:
        The model itself; or the new layer, if `model` is such a layer.

    Raises:
        ValueError: there is no such layer in it, or `implementation` is unknown; the message says what was looked for.
    """
    if isinstance(model, nn.Module) and _is_foreign(model):
        return _twin_of(model, implementation)  # type: ignore[return-value]
    if _replaced_by(model) is not None:
        return model
    found = list(_children(model))
    replaced = 0
    for parent, name, child in found:
        if _is_foreign(child):
            setattr(parent, name, _twin_of(child, implementation))
            replaced += 1
    if not replaced and not any(_replaced_by(child) is not None for _, _, child in found):
        own = sum(isinstance(child, OutlookAttention) for _, _, child in found)
        others = sum(_has_the_name(child) for _, _, child in found)
        parts = ", ".join(f"{name} ({kind.__name__})" for name, kind in PARTS.items())
        raise ValueError(
            f"{type(model).__name__} has no outlook attention to replace among its {len(found)} modules ({own} are of "
            f"this package already, {others} of that name have other parts: adapt or quantize after accelerate, not "
            f"before); looked for modules of a class named OutlookAttention with {parts}, {', '.join(NUMBERS)}"
        )
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: put the original layers back, with the current weights and parts.

    Raises:
        ValueError: nothing in the model was accelerated.
    """
    if _replaced_by(model) is not None:
        return _original_of(model)  # type: ignore[return-value]
    accelerated = [(parent, name, child) for parent, name, child in _children(model) if _replaced_by(child) is not None]
    if not accelerated:
        raise ValueError(f"{type(model).__name__} has no layer that accelerate() put there")
    for parent, name, child in accelerated:
        setattr(parent, name, _original_of(child))
    return model


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name, module) of all submodules; replacing some does not change the list."""
    yield from [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]


def _has_the_name(module: nn.Module) -> bool:
    return type(module).__name__ == "OutlookAttention" and not isinstance(module, OutlookAttention)


def _is_foreign(module: nn.Module) -> bool:
    if not _has_the_name(module):
        return False
    parts = all(isinstance(getattr(module, name, None), kind) for name, kind in PARTS.items())
    # A layer with further weights computes something else.
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    known = {name for name, _ in module.named_children()} <= {*PARTS, *WINDOWS}
    return parts and known and not own and all(hasattr(module, name) for name in NUMBERS)


def _twin_of(module: nn.Module, implementation: ImplementationRequest) -> OutlookAttention:
    parts = {name: getattr(module, name) for name in PARTS}
    num_heads, kernel_size, padding, stride, scale = (getattr(module, name) for name in NUMBERS)
    twin = OutlookAttention(
        parts["v"].in_features,
        num_heads,
        kernel_size,
        padding,
        stride,
        qkv_bias=parts["v"].bias is not None,
        attn_drop=parts["attn_drop"].p,
        proj_drop=parts["proj_drop"].p,
        qk_scale=scale,
        implementation=implementation,
        device="meta",
    )
    for name, part in parts.items():
        setattr(twin, name, part)
    _share_hooks(module, twin)
    # Not as a submodule: its parameters would appear twice.
    twin.__dict__["_replaced"] = module
    twin.training = module.training
    return twin


def _original_of(twin: nn.Module) -> nn.Module:
    """Return the layer that `twin` replaced, with the current mode and parts of `twin`."""
    original = _replaced_by(twin)
    assert original is not None
    for name in PARTS:
        setattr(original, name, getattr(twin, name))
    for name, part in original.named_children():
        if name not in PARTS:  # the pool, which the twin has not
            part.train(twin.training)
    original.training = twin.training
    _share_hooks(twin, original)
    return original


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    target.__dict__.update({name: source.__dict__[name] for name in _HOOKS})


def _replaced_by(module: nn.Module) -> nn.Module | None:
    replaced: nn.Module | None = module.__dict__.get("_replaced")
    return replaced
