"""Token-labelling losses of VOLO's training ("All Tokens Matter", Jiang et al., 2021, equation 3).

Letters as elsewhere, and: T tokens, X classes. Targets are probabilities. A target of token labelling has one column
per role: (B, X, 2 + T) holds the ground truth, then the label of the class token, then one label per token.

The arguments that the original accepts and never reads (`mixup_active`, `smoothing`, `classes`) are left out.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from outlook_common.volo import MixBox, check_loss_weights, check_repeats

__all__ = [
    "SoftTargetCrossEntropy",
    "TokenLabelCrossEntropy",
    "TokenLabelGTCrossEntropy",
    "TokenLabelSoftTargetCrossEntropy",
    "soft_target_cross_entropy",
]


def soft_target_cross_entropy(logits: Float[Array, "R X"], target: Float[Array, "B X"]) -> Float[Array, ""]:
    """Return the mean over R of -sum(target * log_softmax(logits)).

    The target repeats if R is a multiple of B (several augmentations of one batch).

    Raises:
        ValueError: R is no multiple of B.
    """
    repeats = check_repeats(logits.shape[0], target.shape[0])
    target = jnp.tile(target, (repeats, 1))
    return -(target * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1).mean()


class SoftTargetCrossEntropy:
    """`soft_target_cross_entropy` as an object."""

    def __call__(self, logits: Float[Array, "R X"], target: Float[Array, "B X"]) -> Float[Array, ""]:
        """Return the loss."""
        return soft_target_cross_entropy(logits, target)


class TokenLabelSoftTargetCrossEntropy:
    """Cross entropy of the class token alone, with the second column of a (B, X, 2) target, or with a (B, X) one."""

    def __call__(
        self, logits: Float[Array, "R X"], target: Float[Array, "B X"] | Float[Array, "B X 2"]
    ) -> Float[Array, ""]:
        """Return the loss."""
        return soft_target_cross_entropy(logits, target if target.ndim == 2 else target[:, :, 1])


class TokenLabelCrossEntropy:
    """Token labelling without ground truth: the class token's loss plus the mean of the tokens' losses.

    Args:
        dense_weight: weight of the tokens' loss.
        cls_weight: weight of the class token's loss.

    Raises:
        ValueError: the weights do not add up to more than zero.
    """

    def __init__(self, dense_weight: float = 1.0, cls_weight: float = 1.0) -> None:
        check_loss_weights(dense_weight, cls_weight)
        self.dense_weight = dense_weight
        self.cls_weight = cls_weight

    def __call__(
        self,
        outputs: tuple[Float[Array, "B X"], Float[Array, "B T X"], MixBox],
        target: Float[Array, "B X"] | Float[Array, "B X columns"],
    ) -> Float[Array, ""]:
        """Return the loss of what `VOLO.forward_train` returns.

        Args:
            outputs: (cls, aux, mix_box).
            target: (B, X, 2 + T), or (B, X) for one label that every token shares.
        """
        cls, aux, mix_box = outputs
        target_cls = self.class_target(target)
        # Inside the box the class token saw the batch in reverse order; the tokens' logits are swapped back already.
        seen = jnp.asarray(_share_outside(mix_box, aux.shape[1]), target_cls.dtype)
        target_cls = seen * target_cls + (1 - seen) * target_cls[::-1]
        loss_cls = soft_target_cross_entropy(cls, target_cls)
        loss_aux = soft_target_cross_entropy(aux.reshape(-1, aux.shape[2]), _token_targets(target, aux.shape[1]))
        return self.cls_weight * loss_cls + self.dense_weight * loss_aux

    def class_target(self, target: Float[Array, "B X"] | Float[Array, "B X columns"]) -> Float[Array, "B X"]:
        """Return the label of the class token."""
        return target if target.ndim == 2 else target[:, :, 1]


class TokenLabelGTCrossEntropy(TokenLabelCrossEntropy):
    """Token labelling with ground truth, which makes up half of the class token's label where the two agree.

    Where the class token's label says another class than the ground truth, the truth makes up a tenth.
    """

    def class_target(self, target: Float[Array, "B X"] | Float[Array, "B X columns"]) -> Float[Array, "B X"]:
        """Return the label of the class token, blended with the ground truth."""
        if target.ndim == 2:
            return target
        truth, label = target[:, :, 0], target[:, :, 1]
        agree = (truth.argmax(axis=-1) == label.argmax(axis=-1)).astype(target.dtype)[:, None]
        share = 0.9 - 0.4 * agree
        return label * share + truth * (1 - share)


def _share_outside(mix_box: MixBox, tokens: int) -> float | Array:
    """Return the share of tokens that lie outside the box."""
    y1, x1, y2, x2 = mix_box
    return 1 - (y2 - y1) * (x2 - x1) / tokens


def _token_targets(target: Float[Array, "B X"] | Float[Array, "B X columns"], tokens: int) -> Float[Array, "BT X"]:
    """Return one label per token, those of an image after one another."""
    if target.ndim == 2:
        return jnp.repeat(target, tokens, axis=0)
    return target[:, :, 2:].swapaxes(1, 2).reshape(-1, target.shape[1])
