"""Train a small VOLO in two ranks by DistributedDataParallel or FSDP2, and print how far they are from one, as JSON.

Started by `test_torch_ranks.py` for each rank: with its number, that of all ranks, a port and a folder.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import outlook_torch
from outlook_common.config import VOLOConfig
from outlook_parity.models.builtin import draw_weights
from outlook_torch.losses import TokenLabelCrossEntropy
from outlook_torch.placement import gathered
from parity_tests.support import across_frameworks
from parity_tests.support.divisible_sizes import TWO_STAGES

STEPS = 2
BATCH = 4
BOX = (0, 1, 2, 2)
CONFIG = VOLOConfig(**TWO_STAGES | {"num_classes": 5})

Outcome = dict[str, np.ndarray]


def make(device: str = "cpu") -> outlook_torch.VOLO:
    model = outlook_torch.VOLO(CONFIG, dtype=torch.float64, device=device)
    if device == "cpu":
        outlook_torch.load_weights(model, draw_weights(CONFIG))
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    scores = np.exp(2 * rng.standard_normal((BATCH, CONFIG.num_classes, 2 + 4)))
    images = rng.standard_normal((BATCH, 3, *CONFIG.img_size)) * np.arange(1, BATCH + 1)[:, None, None, None]
    return torch.from_numpy(images), torch.from_numpy(scores / scores.sum(axis=1, keepdims=True))


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3)


def trained(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, own: outlook_torch.VOLO, box: Any = BOX
) -> Outcome:
    """Return the losses of this rank's part, the first gradients, and weights and statistics after the steps."""
    optimizer, losses, gradients = optimizer_of(model), [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = TokenLabelCrossEntropy()(model(images, token_labels=True, mix_box=box), targets)
        loss.backward()
        if step == 0:
            gradients = {f"gradient of {n}": gathered(p.grad).numpy().copy() for n, p in own.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return {"losses": np.array(losses), **gradients, **outlook_torch.export_weights(own)}


def as_ranks(images: torch.Tensor, targets: torch.Tensor, ranks: int) -> list[Outcome]:
    """Return what ranks compute, by one process: each part of the batch by itself, the mean of the gradients."""
    models = [make() for _ in range(ranks)]
    optimizers = [optimizer_of(model) for model in models]
    parts = list(zip(models, images.chunk(ranks), targets.chunk(ranks), strict=True))
    losses: list[list[float]] = [[] for _ in range(ranks)]
    first: Outcome = {}
    for step in range(STEPS):
        for rank, (model, x, y) in enumerate(parts):
            model.zero_grad()
            loss = TokenLabelCrossEntropy()(model.forward_train(x, BOX), y)
            loss.backward()
            losses[rank].append(loss.item())
        for same in zip(*(model.parameters() for model in models), strict=True):
            mean = torch.stack([one.grad for one in same]).mean(0)
            for one in same:
                one.grad = mean.clone()
        if step == 0:
            first = {f"gradient of {n}": p.grad.numpy().copy() for n, p in models[0].named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
    return [
        {"losses": np.array(own), **first, **outlook_torch.export_weights(model)}
        for own, model in zip(losses, models, strict=True)
    ]


def distance(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    found: dict[str, float] = {}
    for name, array in ours.items():
        kind = name.split(" ")[0] if name.startswith(("losses", "gradient")) else "weights"
        kind = "statistics" if "running" in name else kind
        error = float(np.abs(array - theirs[name]).max() / np.abs(theirs[name]).max())
        found[kind] = max(found.get(kind, 0.0), error)
    return found


def fsdp(model: outlook_torch.VOLO, **options: Any) -> outlook_torch.VOLO:
    outlook_torch.fully_shard(model, **options)
    return model


def shards(model: torch.nn.Module) -> dict[str, str]:
    return {name: str(parameter.placements) for name, parameter in model.named_parameters()}


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except OSError as error:
        return str(error)
    return ""


def in_files(folder: Path) -> dict[str, Any]:
    """Return what comes of saving and loading what the ranks share."""
    model = fsdp(make())
    before = shards(model)
    optimizer = optimizer_of(model)
    images, targets = batch()
    TokenLabelCrossEntropy()(model(images, token_labels=True, mix_box=BOX), targets).backward()
    optimizer.step()
    outlook_torch.save_training(model, optimizer, folder / "training.safetensors")
    trained_weights = outlook_torch.export_weights(model)
    moments = [gathered(state["exp_avg"]).clone() for state in optimizer.state.values()]
    fresh = fsdp(make("meta"))
    outlook_torch.load_weights(fresh, folder / "training.safetensors", prefix="model")
    again = optimizer_of(fresh)
    step = outlook_torch.load_training(fresh, again, folder / "training.safetensors")
    loaded = outlook_torch.export_weights(fresh)
    resumed = [gathered(state["exp_avg"]) for state in again.state.values()]
    return {
        "equal": all(np.array_equal(loaded[name], array) for name, array in trained_weights.items()),
        "moments": all(map(torch.equal, moments, resumed)),
        "step": step,
        "kept": shards(fresh) == before,
        "split along": before["network.0.0.mlp.fc1.weight"],
        "refused": refusal(lambda: outlook_torch.save_weights(model, folder / "missing" / "weights.npz")),
    }


def drawn() -> dict[str, Any]:
    """Return whether weights that are drawn after `fully_shard` on the meta device are those of one rank."""
    outcomes = []
    for spread in (False, True):
        model = make("meta")
        if spread:
            outlook_torch.fully_shard(model)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        model.init_weights()
        outcomes.append(outlook_torch.export_weights(model))
    one, shared = outcomes
    return {"alike": all(np.array_equal(one[name], array) for name, array in shared.items())}


def for_jax(rank: int, ranks: int, folder: Path) -> None:
    """Write what a rank has after training by DistributedDataParallel, without mixing, which JAX does by whole batches.

    The statistics of BatchNorm are left to each rank: those of the rank 0 are the ones that JAX keeps.
    """
    own = outlook_torch.VOLO(across_frameworks.CONFIG, dtype=torch.float64)
    outlook_torch.load_weights(own, draw_weights(own.config))
    images, targets = (np.split(array, ranks)[rank] for array in across_frameworks.batch(0))
    part = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(targets)
    wrapped = DistributedDataParallel(own, forward_sync_buffers=False)
    np.savez(folder / f"ddp_{rank}.npz", **trained(wrapped, *part, own, across_frameworks.BOX))


def main(rank: int, ranks: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=ranks)
    images, targets = batch()
    part = (images.chunk(ranks)[rank], targets.chunk(ranks)[rank])
    expected = as_ranks(images, targets, ranks)
    ddp = make()
    found: dict[str, Any] = {}
    found["ddp"] = distance(
        trained(DistributedDataParallel(ddp, forward_sync_buffers=False), *part, ddp), expected[rank]
    )
    sharded = fsdp(make())
    found["fsdp"] = distance(trained(sharded, *part, sharded), expected[rank])
    methods = fsdp(make())
    cls, aux, _ = methods.forward_train(part[0], BOX)
    reference = make().forward_train(part[0], BOX)
    found["forward_train"] = max(
        float((a - b).abs().max().detach()) for a, b in zip((cls, aux), reference[:2], strict=True)
    )
    found["files"] = in_files(folder)
    for_jax(rank, ranks, folder)
    found["drawn"] = drawn()
    found["statistics apart"] = distance(expected[1], expected[0])["statistics"]
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
