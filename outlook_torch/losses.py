"""Token-labelling losses of VOLO's training ("All Tokens Matter", Jiang et al., 2021, equation 3).

Letters as elsewhere, and: T tokens, X classes. Targets are probabilities. A target of token labelling has one column
per role: (B, X, 2 + T) holds the ground truth, then the label of the class token, then one label per token.

The arguments that the original accepts and never reads (`mixup_active`, `smoothing`, `classes`) are left out.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from outlook_common.volo import MixBox, check_loss_weights, check_repeats

__all__ = [
    "SoftTargetCrossEntropy",
    "TokenLabelCrossEntropy",
    "TokenLabelGTCrossEntropy",
    "TokenLabelSoftTargetCrossEntropy",
    "soft_target_cross_entropy",
]


def soft_target_cross_entropy(logits: Float[Tensor, "R X"], target: Float[Tensor, "B X"]) -> Float[Tensor, ""]:
    """Return the mean over R of -sum(target * log_softmax(logits)).

    The target repeats if R is a multiple of B (several augmentations of one batch).

    Raises:
        ValueError: R is no multiple of B.
    """
    repeats = check_repeats(logits.shape[0], target.shape[0])
    target = target.repeat(repeats, 1)
    return -(target * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


class SoftTargetCrossEntropy(nn.Module):
    """`soft_target_cross_entropy` as a module."""

    def forward(self, logits: Float[Tensor, "R X"], target: Float[Tensor, "B X"]) -> Float[Tensor, ""]:
        """Return the loss."""
        return soft_target_cross_entropy(logits, target)


class TokenLabelSoftTargetCrossEntropy(nn.Module):
    """Cross entropy of the class token alone, with the second column of a (B, X, 2) target, or with a (B, X) one."""

    def forward(
        self, logits: Float[Tensor, "R X"], target: Float[Tensor, "B X"] | Float[Tensor, "B X 2"]
    ) -> Float[Tensor, ""]:
        """Return the loss."""
        return soft_target_cross_entropy(logits, target if target.ndim == 2 else target[:, :, 1])


class TokenLabelCrossEntropy(nn.Module):
    """Token labelling without ground truth: the class token's loss plus the mean of the tokens' losses.

    Args:
        dense_weight: weight of the tokens' loss.
        cls_weight: weight of the class token's loss.

    Raises:
        ValueError: the weights do not add up to more than zero.
    """

    def __init__(self, dense_weight: float = 1.0, cls_weight: float = 1.0) -> None:
        super().__init__()
        check_loss_weights(dense_weight, cls_weight)
        self.dense_weight = dense_weight
        self.cls_weight = cls_weight

    def forward(
        self,
        outputs: tuple[Float[Tensor, "B X"], Float[Tensor, "B T X"], MixBox],
        target: Float[Tensor, "B X"] | Float[Tensor, "B X columns"],
    ) -> Float[Tensor, ""]:
        """Return the loss of what `VOLO.forward_train` returns.

        Args:
            outputs: (cls, aux, mix_box).
            target: (B, X, 2 + T), or (B, X) for one label that every token shares.
        """
        cls, aux, mix_box = outputs
        target_cls = self.class_target(target)
        # Inside the box the class token saw the batch in reverse order; the tokens' logits are swapped back already.
        seen = _share_outside(mix_box, aux.shape[1])
        target_cls = seen * target_cls + (1 - seen) * target_cls.flip(0)
        loss_cls = soft_target_cross_entropy(cls, target_cls)
        loss_aux = soft_target_cross_entropy(aux.flatten(0, 1), _token_targets(target, aux.shape[1]))
        return self.cls_weight * loss_cls + self.dense_weight * loss_aux

    def class_target(self, target: Float[Tensor, "B X"] | Float[Tensor, "B X columns"]) -> Float[Tensor, "B X"]:
        """Return the label of the class token."""
        return target if target.ndim == 2 else target[:, :, 1]


class TokenLabelGTCrossEntropy(TokenLabelCrossEntropy):
    """Token labelling with ground truth, which makes up half of the class token's label where the two agree.

    Where the class token's label says another class than the ground truth, the truth makes up a tenth.
    """

    def class_target(self, target: Float[Tensor, "B X"] | Float[Tensor, "B X columns"]) -> Float[Tensor, "B X"]:
        """Return the label of the class token, blended with the ground truth."""
        if target.ndim == 2:
            return target
        truth, label = target[:, :, 0], target[:, :, 1]
        agree = (truth.argmax(dim=-1) == label.argmax(dim=-1)).to(target.dtype)[:, None]
        share = 0.9 - 0.4 * agree
        return label * share + truth * (1 - share)


def _share_outside(mix_box: MixBox, tokens: int) -> float:
    """Return the share of tokens that lie outside the box."""
    y1, x1, y2, x2 = mix_box
    return 1 - (y2 - y1) * (x2 - x1) / tokens


def _token_targets(target: Float[Tensor, "B X"] | Float[Tensor, "B X columns"], tokens: int) -> Float[Tensor, "BT X"]:
    """Return one label per token, those of an image after one another."""
    if target.ndim == 2:
        return target.repeat_interleave(tokens, dim=0)
    return target[:, :, 2:].transpose(1, 2).flatten(0, 1)
