"""What works with PyTorch alone: op, layer, VOLO, weights, training."""

from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

import outlook_torch
from outlook_common.op_cases import CASES
from parity_tests.support.oracle import Operands, attend

draw = np.random.default_rng(0).standard_normal

# The op: every implementation, in float64, against the formula in NumPy.
for case in CASES:
    if np.prod(case.logits_shape) > 10**6:
        continue
    operands = Operands(draw(case.value_shape), 2 * draw(case.logits_shape), draw(case.value_shape))
    truth = attend(operands, case.grid)
    for implementation in (None, "composite", "reference"):
        op = partial(outlook_torch.outlook_attention, **case.window, implementation=implementation)
        value, logits = (torch.from_numpy(x).requires_grad_() for x in operands[:2])
        out = op(value, logits)
        results = (out, *torch.autograd.grad(out, (value, logits), torch.from_numpy(operands.cotangent)))
        for result, exact, bound in zip(results, truth, (1e-12, 1e-10, 1e-10), strict=True):
            error = np.abs(result.detach().numpy() - exact).max()
            assert error <= bound * np.abs(exact).max(), (case.name, implementation)

# The layer shares its weights through a file.
layer, other = (outlook_torch.OutlookAttention(24, 2).eval() for _ in range(2))
x = torch.from_numpy(draw((2, 9, 7, 24)).astype(np.float32))
outlook_torch.save_weights(layer, "layer.safetensors")
outlook_torch.load_weights(other, "layer.safetensors")
assert torch.equal(layer(x), other(x))

# A small VOLO makes steps, and goes on from a file.
model = outlook_torch.volo(
    "volo_d1_224", layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4), img_size=64, num_classes=5
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = torch.from_numpy(draw((2, 3, 64, 64)).astype(np.float32)), torch.tensor([1, 2])
for _ in range(3):
    logits, aux, _ = model.forward_train(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss = loss + 0.5 * torch.nn.functional.cross_entropy(aux.transpose(1, 2), labels[:, None].expand(aux.shape[:2]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
for name in ("training.safetensors", "training.pth"):
    outlook_torch.save_training(model, optimizer, name)
    assert outlook_torch.load_training(model, optimizer, name) == 3

if find_spec("jax") is None:
    try:
        import outlook_jax
    except ImportError as error:
        assert "outlook-attention[jax]" in str(error)  # noqa: PT017 - this is no test module
    else:
        raise AssertionError(f"{outlook_jax} needs JAX")
