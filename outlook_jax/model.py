"""The VOLO model (sections 3 and 4.1), with token labelling ("All Tokens Matter", Jiang et al., 2021)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, PrecisionLike
from jax import Array, lax
from jaxtyping import Float

from outlook_common.config import FeatureInfo, VOLOConfig, volo_config
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
from outlook_jax.batch_norm import AxisNames
from outlook_jax.blocks import ClassBlock, Downsample, Outlooker, PatchEmbed, Transformer, unchanged
from outlook_jax.draws import CountedRngs
from outlook_jax.layers import LayerOptions, Statistics, dropout, layer_norm, linear, parameter
from outlook_jax.ops import IMPLEMENTATIONS
from outlook_jax.scan import run_blocks


class VOLO(nnx.Module):
    """VOLO: images (B, H, W, C) in, logits out. Parameters are named as in timm and in the released checkpoints.

    Args:
        config: sizes and options of the model.
        implementation: that of outlook attention; see `outlook_attention`.
        scan_layers: whether equal blocks of a stage run as one loop, which compiles in the time of one block; False
            calls each separately.
        dtype: dtype of the computation; None infers it from images and parameters, as Flax does.
        param_dtype: dtype of the parameters.
        precision: precision of every product, as in `jax.lax.dot_general`.
        axis_name: of `jax.shard_map`, over which BatchNorm takes its statistics, as Flax's does; see `BatchNorm`.
        ghost_batches: in how many parts of the batch BatchNorm takes them, each for itself, as PyTorch's ranks do.
        deterministic: True means evaluation, as `model.eval()`: no dropout, running statistics in BatchNorm.
        rngs: random streams `params` and `dropout`, the latter for the mixing boxes too.
    """

    def __init__(
        self,
        config: VOLOConfig,
        *,
        implementation: ImplementationRequest = None,
        scan_layers: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        axis_name: AxisNames = None,
        ghost_batches: int = 1,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        check_implementation(implementation, IMPLEMENTATIONS)
        self.config = config
        self.scan_layers = scan_layers
        self.grad_checkpointing = False
        self.batch_norm_folded = False  # see `fold_batch_norm`
        self.pruned = False  # see `prune_intermediate_layers`
        self._pretrained_cfg: tuple[tuple[str, Any], ...] = ()  # pairs, since what is static must be hashable
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.deterministic = deterministic
        counted = CountedRngs(rngs)
        self.rngs = counted.dropout.fork()
        options = self._options(counted)
        features = config.num_features

        # Either is None in a pruned model too.
        self.pos_embed: nnx.Param[Array] | None = parameter((1, *config.token_map, features), **options)
        has_class_token = config.post_layers is not None
        self.cls_token = parameter((1, 1, features), **options) if has_class_token else None
        statistics: Statistics = {"axis_name": axis_name, "ghost_batches": ghost_batches}
        self.patch_embed = PatchEmbed(
            config.patch_size, config.in_chans, config.stem_hidden_dim, config.embed_dims[0], statistics, **options
        )
        self.pos_drop = dropout(config.pos_drop_rate, **options)

        def outlookers(stage: int) -> nnx.Module:
            return nnx.List(
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

        def transformers(stage: int) -> nnx.Module:
            return nnx.List(
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

        def downsample(stage: int) -> nnx.Module:
            return Downsample(config.embed_dims[stage], config.embed_dims[stage + 1], **options)

        def class_blocks(count: int) -> nnx.List[ClassBlock]:
            return nnx.List(
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
        self.network = nnx.List(parts[part.kind](part.stage) for part in config.network)
        self.post_network = None if config.post_layers is None else class_blocks(len(config.post_layers))
        self.aux_head = self._make_aux_head(**options)
        self.norm: Callable[[Array], Array] = layer_norm(features, **options)
        self.head_drop = dropout(config.drop_rate, **options)
        self.head = self._make_head(**options)
        counted.finish()

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without a classifier."""
        return self.config.num_classes

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Preparation of images, in timm's words; known of models that were made by a name or loaded."""
        return dict(self._pretrained_cfg)

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: Mapping[str, Any]) -> None:
        self._pretrained_cfg = tuple(cfg.items())

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

    def __call__(
        self,
        images: Float[Array, "B rows columns in_chans"],
        *,
        token_labels: bool = False,
        mix_box: MixBox | None = None,
    ) -> Float[Array, "B *tokens classes"] | tuple[Array, Array, MixBox]:
        """Return the logits: those of the class token + 0.5 * the maximum of the auxiliary head over the tokens.

        Args:
            images: (B, H, W, C), normalised as the variant says.
            token_labels: return what `forward_train` does: for what calls the model itself and no other method of it.
            mix_box: likewise, with `token_labels`.

        Returns:
            (B, classes), or the features if there is no classifier; a score per token with `global_pool=""`.

        Raises:
            ValueError: the images have another rank, other channels, or a size that does not fit.
        """
        if token_labels or mix_box is not None:
            return self.forward_train(images, mix_box)
        return self.forward_head(self.forward_features(images))

    def forward_train(
        self, images: Float[Array, "B rows columns in_chans"], mix_box: MixBox | None = None
    ) -> Float[Array, "B *tokens classes"] | tuple[Array, Array, MixBox]:
        """Return the inputs of the token-labelling losses.

        In training with an auxiliary head, the patches of each image inside the box are replaced by those of its
        partner, the batch in reverse order, and the tokens' logits are swapped back.

        Args:
            images: (B, H, W, C).
            mix_box: (y1, x1, y2, x2) in tokens, the upper bounds exclusive. None draws one with `use_mix_token`, from
                the model's `dropout` stream, and mixes nothing without. It may be traced.

        Returns:
            (cls, aux, mix_box) with shapes (B, classes) and (B, tokens, classes). As in the original, without an
            auxiliary head `cls` alone, and in evaluation what the model itself returns.

        Raises:
            ValueError: as for the model itself; or `mix_box` is given in evaluation or without auxiliary head, or
                does not lie inside the map of tokens.
        """
        training = not self.deterministic
        if mix_box is not None and not (training and self.aux_head is not None):
            raise ValueError(f"mix_box={tuple(mix_box)} needs training mode and the auxiliary head")
        if not training:
            return self(images)
        x = self._embed(images)
        H, W = (side // self.config.pooling_scale for side in x.shape[1:3])
        if mix_box is not None:
            check_mix_box(mix_box, (H, W))
        elif self.config.use_mix_token and self.aux_head is not None:
            mix_box = draw_mix_box(self.rngs(), (H, W))

        if mix_box is not None:
            y1, x1, y2, x2 = (bound * self.config.pooling_scale for bound in mix_box)
            x = mix(x, (y1, x1, y2, x2))
        x = self._tokens_to_features(self._forward_network(x))
        if self.aux_head is None:
            return self.forward_head(x)
        cls = self.head(self.head_drop(self._pool(x)))
        aux = self.aux_head(self.head_drop(x)[:, 1:])
        if mix_box is not None:
            aux = mix(aux.reshape(-1, H, W, self.num_classes), mix_box).reshape(aux.shape)
        return cls, aux, (0, 0, 0, 0) if mix_box is None else mix_box

    def forward_features(self, images: Float[Array, "B rows columns in_chans"]) -> Float[Array, "B T C"]:
        """Return the normalised tokens (B, T, C), the class token first if there is one."""
        return self._tokens_to_features(self._forward_network(self._embed(images)))

    def forward_head(self, x: Float[Array, "B T C"], pre_logits: bool = False) -> Float[Array, "B *tokens classes"]:
        """Return the logits of `forward_features`' tokens, or with `pre_logits` the classifier's input."""
        out = self.head_drop(self._pool(x))
        if pre_logits:
            return out
        out = self.head(out)
        if self.aux_head is None or self.config.global_pool == "":
            return out
        aux = self.aux_head(self.head_drop(x)[:, 1:])
        return out + 0.5 * aux.max(axis=1)

    def forward_intermediates(
        self,
        images: Float[Array, "B rows columns in_chans"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Layout = "NHWC",
        intermediates_only: bool = False,
    ) -> list[Float[Array, "B _ _ _"]] | tuple[Array, list[Float[Array, "B _ _ _"]]]:
        """Return the feature maps after the stages, without the class token, and the features.

        Args:
            images: (B, H, W, C).
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
            x = self._forward_parts([index], x)
            if index in taken:
                feature = self.norm(x) if norm and index >= 2 else x
                intermediates.append(feature.transpose(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
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
        self.network = nnx.List(list(self.network)[: plan.parts])
        if plan.pos_embed:
            del self.pos_embed  # NNX lets no attribute change between an array and None
            self.pos_embed = None
        if plan.norm:
            del self.norm
            self.norm = unchanged
        if plan.head:
            del self.cls_token, self.post_network, self.aux_head, self.head
            self.cls_token = self.post_network = self.aux_head = None
            self.head = unchanged
        return list(plan.stages)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, *, rngs: nnx.Rngs) -> None:
        """Replace the heads by new ones for `num_classes`, 0 for none; `global_pool=None` keeps the pooling."""
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        options = self._options(rngs)
        del self.aux_head, self.head  # NNX lets no attribute change between None and an array
        self.aux_head, self.head = self._make_aux_head(**options), self._make_head(**options)

    def get_classifier(self) -> Any:
        """Return the head of the class token."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set the mode for `nnx.view`, as `nnx.Dropout` does.

        Args:
            deterministic: True makes `forward_train` return what the model itself does; None leaves it as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that should not decay."""
        return set(NO_WEIGHT_DECAY)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return groups of parameters for layer-wise learning rates; `coarse` (timm's) has no effect."""
        return dict(GROUP_MATCHER)

    def _options(self, rngs: nnx.Rngs) -> LayerOptions:
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "deterministic": self.deterministic,
            "rngs": rngs,
        }

    def _embed(self, images: Float[Array, "B rows columns in_chans"]) -> Float[Array, "B H W C"]:
        check_images(images.shape, "NHWC", self.config)
        return self.patch_embed(images)

    def _forward_network(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        # Stages that follow each other without a downsampling run as one, so that equal blocks share one loop.
        def kind(index: int) -> tuple[bool, bool]:
            return isinstance(self.network[index], nnx.List), index >= 2

        for _, indices in groupby(range(len(self.network)), key=kind):
            x = self._forward_parts(list(indices), x)
        return x

    def _forward_parts(self, indices: Sequence[int], x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        if indices[0] == 2:  # after the outlookers and their downsampling
            x = self.pos_drop(x + self._pos_embed(x.shape[1:3]).astype(x.dtype))
        parts = [self.network[index] for index in indices]
        stages = [part for part in parts if isinstance(part, nnx.List)]
        if stages:
            return self._run_blocks(chain.from_iterable(stages), x)
        for part in parts:
            x = part(x)
        return x

    def _pos_embed(self, size: Sequence[int]) -> Float[Array, "1 H W C"]:
        assert self.pos_embed is not None
        if self.pos_embed.shape[1:3] == tuple(size):
            return self.pos_embed[...]
        rows, columns = (
            jnp.asarray(bicubic_matrix(old, new), self.pos_embed.dtype)
            for old, new in zip(self.pos_embed.shape[1:3], size, strict=True)
        )
        return jnp.einsum("hH,wW,bHWc->bhwc", rows, columns, self.pos_embed[...], precision=lax.Precision.HIGHEST)

    def _tokens_to_features(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T C"]:
        B, H, W, C = x.shape
        x = x.reshape(B, H * W, C)
        if self.post_network is not None:
            assert self.cls_token is not None
            token = jnp.zeros_like(x[:, :1]) + self.cls_token[...].astype(x.dtype)  # sharded as x, explicitly too
            x = self._run_blocks(self.post_network, jnp.concatenate([token, x], axis=1))
        return self.norm(x)

    def _run_blocks(self, blocks: Iterable[nnx.Module], x: Array) -> Array:
        return run_blocks(blocks, x, scan=self.scan_layers, remat=self.grad_checkpointing)

    def _pool(self, x: Float[Array, "B T C"]) -> Float[Array, "B *tokens C"]:
        return {"token": lambda: x[:, 0], "avg": lambda: x.mean(axis=1), "": lambda: x}[self.config.global_pool]()

    def _make_head(self, **options: Unpack[LayerOptions]) -> Any:
        return linear(self.num_features, self.num_classes, **options) if self.num_classes > 0 else unchanged

    def _make_aux_head(self, **options: Unpack[LayerOptions]) -> Any:
        return self._make_head(**options) if self.config.use_aux_head and self.num_classes > 0 else None


def mix(x: Float[Array, "B H W C"], box: MixBox) -> Float[Array, "B H W C"]:
    """Replace the inside of the box by that of the batch in reverse order; applied twice it undoes itself."""
    y1, x1, y2, x2 = (jnp.asarray(bound, jnp.int32) for bound in box)
    rows = jnp.arange(x.shape[1], dtype=jnp.int32)[:, None]
    columns = jnp.arange(x.shape[2], dtype=jnp.int32)[None, :]
    inside = (rows >= y1) & (rows < y2) & (columns >= x1) & (columns < x2)
    return jnp.where(inside[None, :, :, None], x[::-1], x)


def draw_mix_box(key: Array, token_map: tuple[int, int]) -> MixBox:
    """Draw a box with a random centre; its share of the map, before clipping, is uniform in [0, 1]."""
    keys = jax.random.split(key, 3)
    side = jnp.sqrt(jax.random.uniform(keys[0], dtype=jnp.float32))
    bounds = []
    for size, centre_key in zip(token_map, keys[1:], strict=True):
        length, centre = (size * side).astype(jnp.int32), jax.random.randint(centre_key, (), 0, size, jnp.int32)
        bounds.append((jnp.maximum(0, centre - length // 2), jnp.minimum(size, centre + (length + 1) // 2)))
    (y1, y2), (x1, x2) = bounds
    return y1, x1, y2, x2


def volo(
    name: str,
    *,
    implementation: ImplementationRequest = None,
    scan_layers: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    axis_name: AxisNames = None,
    ghost_batches: int = 1,
    deterministic: bool = False,
    rngs: nnx.Rngs,
    **overrides: Any,
) -> VOLO:
    """Make a released variant with new weights; `overrides` change fields of its `VOLOConfig`.

    Raises:
        TypeError: an override is not a field.
        ValueError: the variant or `implementation` is unknown, or the fields do not fit each other; the message says
            the nearest name.
    """
    model = VOLO(
        volo_config(name, **overrides),
        implementation=implementation,
        scan_layers=scan_layers,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        axis_name=axis_name,
        ghost_batches=ghost_batches,
        deterministic=deterministic,
        rngs=rngs,
    )
    model.pretrained_cfg = pretrained_cfg(name, model.config)
    return model
