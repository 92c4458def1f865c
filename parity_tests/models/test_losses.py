"""The token-labelling losses: both twins against values worked out in NumPy, and each other's gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import outlook_jax.losses
import outlook_torch.losses
from parity_tests.support.runners import relative_error

Array = np.ndarray

B, T, X = 4, 6, 5
BOX = (0, 1, 2, 3)  # 4 of the 6 tokens, on a map of 2x3

LOSSES = ("TokenLabelCrossEntropy", "TokenLabelGTCrossEntropy")
TWINS: dict[str, tuple[Any, Callable[[Array], Any]]] = {
    "torch": (outlook_torch.losses, lambda array: torch.from_numpy(array)),
    "jax": (outlook_jax.losses, jnp.asarray),
}
every_twin = pytest.mark.parametrize(("losses", "to_array"), TWINS.values(), ids=TWINS.keys())


def draw(seed: int = 0) -> tuple[Array, Array, Array]:
    """Draw (cls, aux, target); the class token's label says the true class for half of the batch."""
    rng = np.random.default_rng(seed)
    target = rng.dirichlet(np.ones(X), size=(B, 2 + T)).transpose(0, 2, 1)
    for b in range(B):
        agree = target[b, :, 1].argmax() == target[b, :, 0].argmax()
        if agree != (b % 2 == 0):
            target[b, :, 1] = np.roll(target[b, :, 0 if b % 2 == 0 else 1], 0 if b % 2 == 0 else 1)
    return rng.standard_normal((B, X)), rng.standard_normal((B, T, X)), target


def cross_entropy(logits: Array, target: Array) -> float:
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(np.mean([-(target[row] * log_probabilities[row]).sum() for row in range(len(logits))]))


def expected_loss(name: str, cls: Array, aux: Array, target: Array, dense_weight: float, cls_weight: float) -> float:
    """Work the loss out row by row, for BOX, which covers two thirds of the tokens."""
    labels = target[:, :, 1].copy()
    if name == "TokenLabelGTCrossEntropy":
        for b in range(B):
            truth = 0.5 if target[b, :, 0].argmax() == labels[b].argmax() else 0.1
            labels[b] = truth * target[b, :, 0] + (1 - truth) * labels[b]
    mixed = np.stack([labels[b] / 3 + labels[B - 1 - b] * 2 / 3 for b in range(B)])
    tokens = [cross_entropy(aux[b, t][None], target[b, :, 2 + t][None]) for b in range(B) for t in range(T)]
    return cls_weight * cross_entropy(cls, mixed) + dense_weight * float(np.mean(tokens))


@pytest.mark.parametrize("name", LOSSES)
@every_twin
def test_dense_losses_are_as_worked_out_by_hand(losses: Any, to_array: Callable[[Array], Any], name: str) -> None:
    cls, aux, target = draw()
    agreeing = [target[b, :, 0].argmax() == target[b, :, 1].argmax() for b in range(B)]
    assert any(agreeing)
    assert not all(agreeing)
    loss = getattr(losses, name)(dense_weight=0.5, cls_weight=2.0)
    value = float(loss((to_array(cls), to_array(aux), BOX), to_array(target)))
    np.testing.assert_allclose(value, expected_loss(name, cls, aux, target, 0.5, 2.0), rtol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@every_twin
def test_a_single_label_is_every_tokens_label(losses: Any, to_array: Callable[[Array], Any], name: str) -> None:
    cls, aux, target = draw(1)
    label = target[:, :, 1]
    value = float(getattr(losses, name)()((to_array(cls), to_array(aux), (0, 0, 0, 0)), to_array(label)))
    tokens = [cross_entropy(aux[b, t][None], label[b][None]) for b in range(B) for t in range(T)]
    np.testing.assert_allclose(value, cross_entropy(cls, label) + np.mean(tokens), rtol=1e-13)


@every_twin
def test_soft_target_repeats_for_several_augmentations(losses: Any, to_array: Callable[[Array], Any]) -> None:
    cls, _, target = draw(2)
    logits = np.concatenate([cls, 2 * cls])
    value = float(losses.SoftTargetCrossEntropy()(to_array(logits), to_array(target[:, :, 1])))
    expected = (cross_entropy(cls, target[:, :, 1]) + cross_entropy(2 * cls, target[:, :, 1])) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-13)


@every_twin
def test_soft_target_of_token_labels_is_their_second_column(losses: Any, to_array: Callable[[Array], Any]) -> None:
    cls, _, target = draw(3)
    loss = losses.TokenLabelSoftTargetCrossEntropy()
    expected = cross_entropy(cls, target[:, :, 1])
    for given in (np.ascontiguousarray(target[:, :, :2]), np.ascontiguousarray(target[:, :, 1])):
        np.testing.assert_allclose(float(loss(to_array(cls), to_array(given))), expected, rtol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_the_twins_are_equal_and_the_box_may_be_traced(name: str) -> None:
    cls, aux, target = draw(4)
    leaves = [torch.from_numpy(array).requires_grad_() for array in (cls, aux)]
    getattr(outlook_torch.losses, name)()((*leaves, BOX), torch.from_numpy(target)).backward()

    loss = getattr(outlook_jax.losses, name)()
    gradient = jax.jit(jax.grad(lambda outputs, box, target: loss((*outputs, box), target)))
    gradients = gradient((jnp.asarray(cls), jnp.asarray(aux)), BOX, jnp.asarray(target))
    for theirs, ours in zip(gradients, leaves, strict=True):
        assert relative_error(np.asarray(theirs), ours.grad.numpy()) <= 1e-13


@pytest.mark.parametrize("name", LOSSES)
@every_twin
def test_weights_that_leave_no_loss_are_an_error(losses: Any, to_array: Callable[[Array], Any], name: str) -> None:
    with pytest.raises(ValueError, match=r"must be positive, got dense_weight=0\.0, cls_weight=0\.0"):
        getattr(losses, name)(dense_weight=0.0, cls_weight=0.0)


@every_twin
def test_a_target_that_does_not_repeat_evenly_is_an_error(losses: Any, to_array: Callable[[Array], Any]) -> None:
    cls, _, target = draw(5)
    with pytest.raises(ValueError, match="4 rows, which is no multiple of the target's 3"):
        losses.SoftTargetCrossEntropy()(to_array(cls), to_array(target[:3, :, 1]))
