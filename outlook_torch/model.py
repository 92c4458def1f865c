"""The VOLO model (sections 3 and 4.1), with token labelling ("All Tokens Matter", Jiang et al., 2021)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from outlook_common.config import FeatureInfo, VOLOConfig, volo_config
from outlook_common.constants import INIT_STD, NORM_EPSILON
from outlook_common.dispatch import ImplementationRequest, check_implementation
from outlook_common.interpolation import bicubic_matrix
from outlook_common.volo import (
    GROUP_MATCHER,
    NO_WEIGHT_DECAY,
    Layout,
    MixBox,
    check_images,
    check_layout,
    check_mix_box,
    pretrained_cfg,
    prune_plan,
    stage_ends,
    take_indices,
)
from outlook_torch.blocks import ClassBlock, Downsample, DropPath, Outlooker, PatchEmbed, Transformer
from outlook_torch.interpolation import symbolic_bicubic_matrix
from outlook_torch.layers import Device, Dtype, LayerOptions, draw, initialize_linear, initialize_parameter
from outlook_torch.ops import IMPLEMENTATIONS
from outlook_torch.ops.symbolic import is_symbolic
from outlook_torch.placement import put_like
from outlook_torch.tracing import checked_images, option, scriptable, traceable

fx.wrap("checked_images")


class VOLO(nn.Module):
    """VOLO: images (B, C, H, W) in, logits out. Parameters are named as in timm and in the released checkpoints.

    Args:
        config: sizes and options of the model.
        implementation: that of outlook attention; see `outlook_attention`.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: VOLOConfig,
        *,
        implementation: ImplementationRequest = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        check_implementation(implementation, IMPLEMENTATIONS)
        self.config = config
        self.grad_checkpointing = False
        self.batch_norm_folded = False  # see `fold_batch_norm`
        self.pruned = False  # see `prune_intermediate_layers`
        self.pretrained_cfg: dict[str, Any] = {}  # for `timm.data`; known of models that were made by a name
        options: LayerOptions = {"device": device, "dtype": dtype}
        features = config.num_features

        # Either is None in a pruned model too.
        self.pos_embed: nn.Parameter | None = nn.Parameter(torch.empty(1, *config.token_map, features, **options))
        has_class_token = config.post_layers is not None
        self.cls_token = nn.Parameter(torch.empty(1, 1, features, **options)) if has_class_token else None
        self.patch_embed = PatchEmbed(
            config.patch_size, config.in_chans, config.stem_hidden_dim, config.embed_dims[0], **options
        )
        self.pos_drop = nn.Dropout(config.pos_drop_rate)

        def outlookers(stage: int) -> nn.Module:
            return nn.Sequential(
                *(
                    Outlooker(
                        config.embed_dims[stage],
                        config.num_heads[stage],
                        config.out_kernel,
                        config.out_padding,
                        config.out_stride,
                        config.mlp_ratio[stage],
                        config.qkv_bias,
                        config.attn_drop_rate,
                        implementation=implementation,
                        **options,
                    )
                    for _ in range(config.layers[stage])
                )
            )

        def transformers(stage: int) -> nn.Module:
            return nn.Sequential(
                *(
                    Transformer(
                        config.embed_dims[stage],
                        config.num_heads[stage],
                        config.mlp_ratio[stage],
                        config.qkv_bias,
                        config.attn_drop_rate,
                        drop_path,
                        **options,
                    )
                    for drop_path in config.drop_path_rates(stage)
                )
            )

        def downsample(stage: int) -> nn.Module:
            return Downsample(config.embed_dims[stage], config.embed_dims[stage + 1], **options)

        def class_blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                ClassBlock(
                    features,
                    config.num_heads[-1],
                    config.mlp_ratio[-1],
                    config.qkv_bias,
                    config.attn_drop_rate,
                    **options,
                )
                for _ in range(count)
            )

        parts = {"outlooker": outlookers, "transformer": transformers, "downsample": downsample}
        self.network = nn.ModuleList(parts[part.kind](part.stage) for part in config.network)
        self.post_network = None if config.post_layers is None else class_blocks(len(config.post_layers))
        self.aux_head = self._make_aux_head(**options)
        self.norm: nn.Module = nn.LayerNorm(features, eps=NORM_EPSILON, **options)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = self._make_head(**options)
        self._initialize()

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without a classifier."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the classifier's input."""
        return self.feature_info[-1]["num_chs"]

    @property
    def head_hidden_size(self) -> int:
        """Channels of `forward_head(pre_logits=True)`."""
        return self.num_features

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Channels, reduction and module name of each stage, as timm describes them."""
        return self.config.feature_info[: len(stage_ends(self.config, len(self.network)))]

    @traceable
    def forward(
        self,
        images: Float[Tensor, "B in_chans rows columns"],
        *,
        token_labels: bool = False,
        mix_box: MixBox | None = None,
    ) -> Float[Tensor, "B *tokens classes"] | tuple[Tensor, Tensor, MixBox]:
        """Return the logits: those of the class token + 0.5 * the maximum of the auxiliary head over the tokens.

        Args:
            images: (B, C, H, W), normalised as the variant says.
            token_labels: return what `forward_train` does: for DistributedDataParallel, `torch.compile` and others that
                call the model itself and no other method of it.
            mix_box: likewise, with `token_labels`.

        Returns:
            (B, classes), or the features if there is no classifier; a score per token with `global_pool=""`.

        Raises:
            ValueError: the images have another rank, other channels, or a size that does not fit.
        """
        token_labels, mix_box = option(token_labels), option(mix_box)
        if token_labels or mix_box is not None:
            return self.forward_train(images, mix_box)
        return self.forward_head(self.forward_features(images))

    def forward_train(
        self, images: Float[Tensor, "B in_chans rows columns"], mix_box: MixBox | None = None
    ) -> Float[Tensor, "B *tokens classes"] | tuple[Tensor, Tensor, MixBox]:
        """Return the inputs of the token-labelling losses.

        In training with an auxiliary head, the patches of each image inside the box are replaced by those of its
        partner, the batch in reverse order, and the tokens' logits are swapped back.

        Args:
            images: (B, C, H, W).
            mix_box: (y1, x1, y2, x2) in tokens, the upper bounds exclusive. None draws one with `use_mix_token`, from
                PyTorch's default generator, and mixes nothing without.

        Returns:
            (cls, aux, mix_box) with shapes (B, classes) and (B, tokens, classes). As in the original, without an
            auxiliary head `cls` alone, and in evaluation what the model itself returns.

        Raises:
            ValueError: as for the model itself; or `mix_box` is given in evaluation or without auxiliary head, or
                does not lie inside the map of tokens.
        """
        if mix_box is not None and not (self.training and self.aux_head is not None):
            raise ValueError(f"mix_box={tuple(mix_box)} needs training mode and the auxiliary head")
        if not self.training:
            return self(images)
        x = self._embed(images)
        H, W = (side // self.config.pooling_scale for side in x.shape[1:3])
        if mix_box is not None:
            check_mix_box(mix_box, (H, W))
        elif self.config.use_mix_token and self.aux_head is not None:
            mix_box = draw_mix_box((H, W))

        if mix_box is not None:
            y1, x1, y2, x2 = (bound * self.config.pooling_scale for bound in mix_box)
            x = mix(x, (y1, x1, y2, x2))
        x = self._tokens_to_features(self._forward_network(x))
        if self.aux_head is None:
            return self.forward_head(x)
        cls = self.head(self.head_drop(self._pool(x)))
        aux = self.aux_head(self.head_drop(x)[:, 1:])
        if mix_box is not None:
            aux = mix(aux.unflatten(1, (H, W)), mix_box).flatten(1, 2)
        return cls, aux, (0, 0, 0, 0) if mix_box is None else mix_box

    def forward_features(self, images: Float[Tensor, "B in_chans rows columns"]) -> Float[Tensor, "B T C"]:
        """Return the normalised tokens (B, T, C), the class token first if there is one."""
        return self._tokens_to_features(self._forward_network(self._embed(images)))

    def forward_head(self, x: Float[Tensor, "B T C"], pre_logits: bool = False) -> Float[Tensor, "B *tokens classes"]:
        """Return the logits of `forward_features`' tokens, or with `pre_logits` the classifier's input."""
        out = self.head_drop(self._pool(x))
        if pre_logits:
            return out
        out = self.head(out)
        if self.aux_head is None or self.config.global_pool == "":
            return out
        aux = self.aux_head(self.head_drop(x)[:, 1:])
        return out + 0.5 * aux.amax(dim=1)

    def forward_intermediates(
        self,
        images: Float[Tensor, "B in_chans rows columns"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Layout = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Float[Tensor, "B _ _ _"]] | tuple[Tensor, list[Float[Tensor, "B _ _ _"]]]:
        """Return the feature maps after the stages, without the class token, and the features.

        Args:
            images: (B, C, H, W).
            indices: of the stages; None for all, an int for the last n.
            norm: whether to apply the final norm, to the stages that have its channels: those after `pos_embed`.
            stop_early: whether to stop after the last stage asked for; then its map replaces the features.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: whether to return the list alone.

        Raises:
            ValueError: as for the model itself; or `indices` or `output_fmt` is unknown.
        """
        check_layout(output_fmt)
        ends = stage_ends(self.config, len(self.network))
        taken = {ends[index] for index in take_indices(len(ends), indices)}
        x, intermediates = self._embed(images), []
        stop = max(taken) if stop_early else len(self.network) - 1
        for index in range(len(self.network)):
            x = self._forward_part(index, x)
            if index in taken:
                feature = self.norm(x) if norm and index >= 2 else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
            if index == stop:
                break
        if intermediates_only:
            return intermediates
        last = index == len(self.network) - 1
        return self._tokens_to_features(x) if last else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, in place, what `forward_intermediates` does not need for these stages, as timm does.

        Parts after the last stage asked for are removed, and then the heads too; without the third part, before which
        `pos_embed` is added, also `pos_embed` and the norm. A pruned model neither loads nor saves weights.

        Args:
            indices: of the stages; None for all, an int for the last n.
            prune_norm: whether to remove the final norm in any case.
            prune_head: whether to remove class token, its blocks and both heads in any case.

        Returns:
            The stages asked for, counted from the first: -1 would now mean another one.

        Raises:
            ValueError: `indices` is unknown.
        """
        plan = prune_plan(self.config, len(self.network), indices, prune_norm=prune_norm, prune_head=prune_head)
        self.config = plan.config
        self.pruned = self.pruned or plan.incomplete
        self.network = self.network[: plan.parts]
        if plan.pos_embed:
            self.pos_embed = None
        if plan.norm:
            self.norm = nn.Identity()
        if plan.head:
            self.cls_token = self.post_network = self.aux_head = None
            self.head = nn.Identity()
        return list(plan.stages)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the heads by new ones for `num_classes`, 0 for none; `global_pool=None` keeps the pooling."""
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        weight = self.patch_embed.proj.weight
        options: LayerOptions = {"device": weight.device, "dtype": weight.dtype}
        self.aux_head, self.head = self._make_aux_head(**options), self._make_head(**options)
        for head in (self.head, self.aux_head):
            if head is not None:
                head.apply(initialize_linear).train(self.training)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew, for a model that was made on the meta device: after `to_empty`.

        Of a model after `fully_shard` every rank draws each weight whole and keeps its part: with the same seed the
        weights do not depend on how many ranks there are.
        """
        for path, module in self.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                drawn = torch.empty(tensor.shape, dtype=tensor.dtype)
                if path:
                    draw(module, name, drawn)
                else:
                    nn.init.trunc_normal_(drawn, std=INIT_STD)  # those outside any layer
                tensor.copy_(put_like(drawn, tensor))

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what `torch.jit.script` compiles instead of this source: a graph with the same parameters."""
        return scriptable(self, leaves=(DropPath,))

    def get_classifier(self) -> nn.Module:
        """Return the head of the class token."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that should not decay."""
        return set(NO_WEIGHT_DECAY)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return groups of parameters for layer-wise learning rates; `coarse` (timm's) has no effect."""
        return dict(GROUP_MATCHER)

    def _embed(self, images: Float[Tensor, "B in_chans rows columns"]) -> Float[Tensor, "B H W C"]:
        cfg = self.config
        if is_symbolic(images):
            size = (0, 0) if cfg.dynamic_img_size else cfg.img_size
            images = checked_images(images, cfg.in_chans, *size, cfg.stride)
        else:
            check_images(images.shape, "NCHW", cfg)
        return self.patch_embed(images)

    def _forward_network(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w c"]:
        for index in range(len(self.network)):
            x = self._forward_part(index, x)
        return x

    def _forward_part(self, index: int, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w c"]:
        if index == 2:  # after the outlookers and their downsampling
            x = self.pos_drop(x + self._pos_embed(x).to(x.dtype))
        part = self.network[index]
        return self._run_blocks(part, x) if isinstance(part, nn.Sequential) else part(x)

    def _pos_embed(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "1 H W C"]:
        assert self.pos_embed is not None
        if not self.config.dynamic_img_size:
            return self.pos_embed
        # In a program whose sizes may be symbols: whether they are the model's own would tie them down.
        symbolic = torch.compiler.is_compiling() or is_symbolic(x)
        size, own = (x.shape[1], x.shape[2]), self.config.token_map
        if not symbolic and own == size:
            return self.pos_embed
        matrix = symbolic_bicubic_matrix if symbolic else _bicubic_matrix
        rows, columns = (
            matrix(old, new, self.pos_embed.device).to(self.pos_embed.dtype) for old, new in zip(own, size, strict=True)
        )
        # Not einsum, which takes symbolic sizes for constants.
        resized: Tensor = (rows @ self.pos_embed[0].flatten(1)).unflatten(1, self.pos_embed.shape[2:])  # type: ignore[no-untyped-call]
        return (columns @ resized)[None]

    def _tokens_to_features(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B T C"]:
        x = x.flatten(1, 2)
        if self.post_network is not None:
            assert self.cls_token is not None
            # Not len(x), which torch.export takes for a constant.
            token = self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)
            x = self._run_blocks(self.post_network, torch.cat([token, x], dim=1))
        return self.norm(x)

    def _run_blocks(self, blocks: nn.Sequential | nn.ModuleList, x: Tensor) -> Tensor:
        recomputed = self.grad_checkpointing and not is_symbolic(x)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if recomputed else block(x)
        return x

    def _pool(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B *tokens C"]:
        return {"token": lambda: x[:, 0], "avg": lambda: x.mean(dim=1), "": lambda: x}[self.config.global_pool]()

    def _make_head(self, **options: Unpack[LayerOptions]) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes, **options) if self.num_classes > 0 else nn.Identity()

    def _make_aux_head(self, **options: Unpack[LayerOptions]) -> nn.Module | None:
        return self._make_head(**options) if self.config.use_aux_head and self.num_classes > 0 else None

    def _initialize(self) -> None:
        """Draw the weights as timm does; convolutions keep PyTorch's own initialization."""
        self.apply(initialize_linear)
        for parameter in (self.pos_embed, self.cls_token):
            initialize_parameter(parameter)


def _bicubic_matrix(size: int, new_size: int, device: torch.device) -> Float[Tensor, "new old"]:
    return torch.tensor(bicubic_matrix(size, new_size), device=device)


def mix(x: Float[Tensor, "B H W C"], box: MixBox) -> Float[Tensor, "B H W C"]:
    """Replace the inside of the box by that of the batch in reverse order; applied twice it undoes itself."""
    y1, x1, y2, x2 = box
    rows = torch.arange(x.shape[1], device=x.device)[:, None]
    columns = torch.arange(x.shape[2], device=x.device)[None, :]
    inside = (rows >= y1) & (rows < y2) & (columns >= x1) & (columns < x2)
    return torch.where(inside[None, :, :, None], x.flip(0), x)


def draw_mix_box(token_map: tuple[int, int]) -> MixBox:
    """Draw a box with a random centre; its share of the map, before clipping, is uniform in [0, 1]."""
    side = float(torch.rand(())) ** 0.5
    bounds = []
    for size in token_map:
        length, centre = int(size * side), int(torch.randint(size, ()))
        bounds.append((max(0, centre - length // 2), min(size, centre + (length + 1) // 2)))
    (y1, y2), (x1, x2) = bounds
    return y1, x1, y2, x2


def volo(
    name: str,
    *,
    implementation: ImplementationRequest = None,
    device: Device = None,
    dtype: Dtype = None,
    **overrides: Any,
) -> VOLO:
    """Make a released variant with new weights; `overrides` change fields of its `VOLOConfig`.

    Raises:
        TypeError: an override is not a field.
        ValueError: the variant or `implementation` is unknown, or the fields do not fit each other; the message says
            the nearest name.
    """
    model = VOLO(volo_config(name, **overrides), implementation=implementation, device=device, dtype=dtype)
    model.pretrained_cfg = pretrained_cfg(name, model.config)
    return model
