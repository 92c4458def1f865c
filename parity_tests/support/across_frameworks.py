"""One training in turns: FSDP2 in ranks of PyTorch, FSDP rules on devices of JAX, and back; print the losses as JSON.

Started by `test_across_frameworks.py`: with whose turn it is, the number of the rank, that of
all ranks, a port and a folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.config import VOLOConfig
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.models.builtin import draw_weights
from parity_tests.support.divisible_sizes import TWO_STAGES

CONFIG = VOLOConfig(**TWO_STAGES)
RANKS, DEVICES = 2, 8
BATCH = 8
STEPS = 2
# The ranks of PyTorch mix tokens of their own images, JAX of the whole batch: none are mixed.
BOX = (0, 0, 0, 0)
FROM_TORCH, FROM_JAX = "from_torch", "from_jax"


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W, C), of another brightness each, and targets of a step."""
    rng = np.random.default_rng(step)
    rows, columns = CONFIG.token_map
    images = rng.standard_normal((BATCH, *CONFIG.img_size, 3)) * np.arange(1, BATCH + 1)[:, None, None, None]
    scores = np.exp(2 * rng.standard_normal((BATCH, CONFIG.num_classes, 2 + rows * columns)))
    return images, scores / scores.sum(axis=1, keepdims=True)


# In PyTorch's ranks.


def torch_steps(model: Any, optimizer: Any, steps: range, rank: int) -> list[float]:
    """Return the mean losses of all ranks, each of which trains on its part."""
    import torch
    import torch.distributed as dist

    from outlook_torch.losses import TokenLabelCrossEntropy

    losses = []
    for step in steps:
        images, targets = (torch.from_numpy(np.split(array, RANKS)[rank]) for array in batch(step))
        optimizer.zero_grad()
        outputs = model(images.permute(0, 3, 1, 2), token_labels=True, mix_box=BOX)
        loss = TokenLabelCrossEntropy()(outputs, targets)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / RANKS)
    return losses


def torch_turn(turn: str, rank: int, port: int, folder: Path) -> list[float]:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import outlook_torch

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=RANKS)
    model = outlook_torch.VOLO(CONFIG, dtype=torch.float64)
    outlook_torch.load_weights(model, draw_weights(CONFIG))
    outlook_torch.fully_shard(model)
    optimizer = OPTIMIZERS["AdamW"].torch(model.parameters())
    if turn == "torch begins":
        torch_steps(model, optimizer, range(STEPS), rank)
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / FROM_TORCH)
        start = STEPS
    else:
        start = outlook_torch.load_training(model, optimizer, folder / FROM_JAX)
        assert start == 2 * STEPS
    losses = torch_steps(model, optimizer, range(start, start + STEPS), rank)
    dist.destroy_process_group()
    return losses


# On JAX's devices.


def jax_steps(model: Any, optimizer: Any, steps: range, mesh: Any) -> list[float]:
    import jax
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    import outlook_jax
    from outlook_jax.losses import TokenLabelCrossEntropy

    @nnx.jit
    def step_of(model: Any, optimizer: Any, images: Any, targets: Any) -> jax.Array:
        def loss_of(model: Any) -> jax.Array:
            gathered = outlook_jax.gather_weights(model, mesh)
            return TokenLabelCrossEntropy()(gathered.forward_train(images, BOX), targets)

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    by_batch = NamedSharding(mesh, PartitionSpec("data"))
    return [float(step_of(model, optimizer, *jax.device_put(batch(step), by_batch))) for step in steps]


def jax_turn(folder: Path) -> list[float]:
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from flax import nnx
    from jax.sharding import AxisType, PartitionSpec

    import outlook_jax

    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    model = outlook_jax.VOLO(CONFIG, param_dtype=jnp.float64, ghost_batches=RANKS, rngs=nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), outlook_jax.named_shardings(model, mesh, "fsdp")))
    optimizer = nnx.Optimizer(model, OPTIMIZERS["AdamW"].jax(), wrt=nnx.Param)
    start = outlook_jax.load_training(model, optimizer, folder / FROM_TORCH)
    assert start == STEPS
    assert model.head.kernel.get_value().sharding.spec == PartitionSpec("data", None)
    assert optimizer.opt_state[0].mu["head"]["kernel"].get_value().sharding.spec == PartitionSpec("data", None)
    losses = jax_steps(model, optimizer, range(start, start + STEPS), mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            (folder / FROM_JAX).absolute(), {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
        )
    return losses + jax_steps(model, optimizer, range(start + STEPS, start + 2 * STEPS), mesh)


def main(turn: str, rank: int, ranks: int, port: int, folder: Path) -> None:
    print(json.dumps(jax_turn(folder) if turn == "jax goes on" else torch_turn(turn, rank, port, folder)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
