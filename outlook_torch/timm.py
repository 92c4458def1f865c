"""This package's VOLO in timm's registry: `import outlook_torch.timm`, `timm.create_model("outlook_volo_d1_224")`.

Weights carry timm's tag, as in "outlook_volo_d1_224.sail_in1k"; `timm.list_models("outlook_*")` lists the names.
"""

from collections.abc import Callable, Mapping
from typing import Any

from outlook_common.config import VOLO_VARIANTS, VOLOVariant, with_tuples
from outlook_common.extras import require

require("timm", needed_by="outlook_torch.timm")

from timm.models import (  # noqa: E402
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn  # noqa: E402

from outlook_common.volo import pretrained_cfg as describe  # noqa: E402
from outlook_torch.model import VOLO, volo  # noqa: E402
from outlook_torch.pretrained import from_pretrained  # noqa: E402

PREFIX = "outlook_"
TAG = "sail_in1k"

# Where weights may lie, in the words of `pretrained_cfg`, in the order in which timm looks.
_SOURCES = ("file", "hf_hub_id")

__all__: list[str] = []  # timm adds the names of what it registers


def _described(name: str, variant: VOLOVariant) -> dict[str, Any]:
    described = {**describe(name, variant.config), "hf_hub_id": variant.hub_id, "fixed_input_size": True}
    del described["architecture"]  # timm's own is the registered name
    return described


default_cfgs = generate_default_cfgs(
    {f"{PREFIX}{name}.{TAG}": _described(name, variant) for name, variant in VOLO_VARIANTS.items()}
)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """Return timm's factory of a released variant."""
    registered = PREFIX + name

    def create(
        pretrained: bool = False,
        *,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        out_indices: Any = 3,
        **arguments: Any,
    ) -> nn.Module:
        cfg: Any = resolve_pretrained_cfg(registered, pretrained_cfg, pretrained_cfg_overlay)

        def make(**arguments: Any) -> VOLO:
            arguments = with_tuples(arguments)
            if not pretrained:
                return volo(name, **arguments)
            source = _source_of_weights(cfg.to_dict(), registered)
            return from_pretrained(source, variant=name, cache_dir=cache_dir, **arguments).train()

        # The weights are loaded by `make`, which adapts them to other sizes as `from_pretrained` does.
        return build_model_with_cfg(
            make,
            registered,
            pretrained=False,
            pretrained_cfg=cfg.to_dict(),
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **arguments,
        )

    create.__name__ = create.__qualname__ = registered
    create.__doc__ = f"{name} of outlook_torch; arguments are fields of `VOLOConfig`, `implementation` and timm's."
    return create


def _source_of_weights(cfg: Mapping[str, Any], registered: str) -> str:
    """Return the file, folder or Hub id that a `pretrained_cfg` names.

    Raises:
        ValueError: it names none of them.
    """
    for key in _SOURCES:
        if cfg.get(key):
            return str(cfg[key])
    raise ValueError(
        f"the pretrained_cfg of {registered} names no weights in {' or '.join(_SOURCES)}; load others by "
        "outlook_torch.load_weights"
    )


for _name in VOLO_VARIANTS:
    globals()[PREFIX + _name] = register_model(_entry_point(_name))
