"""The model card of a saved VOLO: what it is, how to load it, what a parity run found."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from outlook_common.config import VOLOConfig
from outlook_common.flops import multiply_adds, parameters
from outlook_common.version import __version__
from outlook_common.weights.described import changed_fields
from outlook_common.weights.tables.volo import volo_table

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

PAPER = """@article{yuan2022volo,
  title = {VOLO: Vision Outlooker for Visual Recognition},
  author = {Yuan, Li and Hou, Qibin and Jiang, Zihang and Feng, Jiashi and Yan, Shuicheng},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year = {2022}
}"""
# Fields of a configuration that timm's `create_model` cannot change, or does not have.
NOT_IN_TIMM = {
    "layers", "embed_dims", "num_heads", "out_kernel", "out_stride", "out_padding", "dynamic_img_size",
}  # fmt: skip
_VERDICTS = {"pass": "PASS", "mismatch": "MISMATCH", "not-run": "NOT RUN"}


@runtime_checkable
class ParityReport(Protocol):
    """What a card takes of an `outlook_parity.Report`, whose text says what was compared."""

    @property
    def verdict(self) -> str:
        """Either "pass", "mismatch" or "not-run"."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Versions and devices."""


def model_card(
    config: VOLOConfig,
    cfg: Mapping[str, Any],
    *,
    source: str,
    license_name: str | None = None,
    report: ParityReport | None = None,
) -> "ModelCard":
    """Return the card of a model.

    Args:
        config: of the model.
        cfg: its `pretrained_cfg`, complete.
        source: where it can be loaded from: a Hub id or a folder.
        license_name: of the weights, as the Hub calls it ("apache-2.0"); None leaves it out.
        report: of `outlook_parity.verify` on this model; its verdict becomes part of the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    task = "image-classification" if config.num_classes else "image-feature-extraction"
    in_timm = not NOT_IN_TIMM & changed_fields(config, cfg).keys()
    data = ModelCardData(
        license=license_name,
        library_name="outlook-attention",
        pipeline_tag=task,
        tags=["outlook-attention", "volo", "jax", "flax", "pytorch", *(["timm"] if in_timm else [])],
    )
    parts = [f"# {volo_table(config).model}", _facts(config, cfg), _usage(source, in_timm=in_timm)]
    if report is not None:
        parts.append(_parity(report))
    parts.append(f"## Citation\n\n```bibtex\n{PAPER}\n```")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def _facts(config: VOLOConfig, cfg: Mapping[str, Any]) -> str:
    rows, columns = config.img_size
    facts = {
        "architecture": f"VOLO, layers {config.layers}, channels {config.embed_dims}, heads {config.num_heads}",
        "parameters": f"{parameters(config) / 1e6:.2f} M",
        "multiply-adds": f"{multiply_adds(config) / 1e9:.2f} G for one image",
        "images": f"{rows}x{columns} pixels, {config.in_chans} channels, crop_pct {cfg['crop_pct']}, "
        f"{cfg['interpolation']}, mean {cfg['mean']}, std {cfg['std']}",
        "classes": str(config.num_classes or "none: features"),
        "saved by": f"outlook-attention {__version__}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items())])


def _usage(source: str, *, in_timm: bool) -> str:
    twins = ("outlook_jax", "outlook_torch")
    lines = "\n".join(f'{twin.removeprefix("outlook_")}_model = {twin}.from_pretrained("{source}")' for twin in twins)
    imports = "\n".join(f"import {twin}" for twin in twins)
    text = f"## Usage\n\n```python\n{imports}\n\n{lines}\n```"
    if in_timm:
        text += f'\n\nIn timm: `timm.create_model("hf-hub:{source}", pretrained=True)`.'
    return text


def _parity(report: ParityReport) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in report.environment.items())
    return (
        f"## Parity of the JAX and the PyTorch twin\n\n**{_VERDICTS.get(report.verdict, report.verdict)}** — {report}"
        f"\n\n| | |\n|---|---|\n{rows}"
    )
