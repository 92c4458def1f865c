"""Train a VOLO in PyTorch: `torchrun --nproc-per-node 8 -m examples.imagenet.train_torch volo_d1.toml runs/d1`.

DistributedDataParallel, or FSDP2 with `sharding = "fsdp"`; alone without torchrun. It goes on from the last checkpoint
in its folder, on however many processes there are now, and saves when it is told to stop (SIGTERM).
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

import outlook_torch
from examples.imagenet.data import LocalData, Source, TrainingData, held_out, mix_box, sources
from examples.imagenet.log import Log
from examples.imagenet.recipe import Recipe, decays, layer_scales, learning_rates
from outlook_torch.losses import TokenLabelGTCrossEntropy

EVALUATION_BATCH = 64


class Trainer:
    """A model, its optimizer and the average of its weights, in one of several processes."""

    def __init__(self, recipe: Recipe, device: torch.device, rates: np.ndarray) -> None:
        self.recipe, self.device, self.rates, how = recipe, device, rates, recipe.training
        self.dtype = getattr(torch, how.param_dtype)
        torch.manual_seed(how.seed)
        self.model = outlook_torch.VOLO(recipe.model, device=device, dtype=self.dtype)
        self.wrapped: nn.Module = self.model
        if dist.is_initialized() and how.sharding == "fsdp":
            outlook_torch.fully_shard(self.model)
        elif dist.is_initialized():
            self.wrapped = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer = _optimizer(recipe, self.model)
        self.average = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def step(self, step: int, images: Tensor, targets: Tensor) -> float:
        """Train on this process' part of a batch; return its loss."""
        how = self.recipe.training
        # What is random in a step follows from it alone.
        torch.manual_seed(int(np.random.SeedSequence((how.seed, step, _rank())).generate_state(1)[0]))
        box = mix_box(self.recipe, step) if self.recipe.model.use_mix_token else None
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[step] * group["scale"]
        self.model.train()
        total = 0.0
        parts = list(zip(images.chunk(how.accumulate), targets.chunk(how.accumulate), strict=True))
        for x, target in parts:
            waits = isinstance(self.wrapped, DistributedDataParallel) and x is not parts[-1][0]
            alone = self.wrapped.no_sync() if waits else nullcontext()
            with alone, torch.autocast(self.device.type, torch.bfloat16, enabled=how.dtype == "bfloat16"):
                outputs = self.wrapped(self._nchw(x), token_labels=True, mix_box=box)
                loss = TokenLabelGTCrossEntropy()(outputs, target.to(self.device, self.dtype)) / how.accumulate
            loss.backward()
            total += loss.item()
        if how.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), how.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                old = self.average[name]
                old.copy_(old * how.ema + tensor * (1 - how.ema) if old.is_floating_point() else tensor)
        return total

    @torch.no_grad()
    def accuracy(self, source: Source) -> tuple[float, float]:
        """Return top-1 and top-5 of the averaged weights on what is held out."""
        trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        hits = torch.zeros(2, device=self.device)
        for images, labels in _evaluation_batches(source, self.recipe):
            best = self.model(self._nchw(images)).topk(5).indices == labels[:, None].to(self.device)
            hits += torch.stack([best[:, 0].sum(), best.sum()])
        if dist.is_initialized():
            dist.all_reduce(hits)
        self.model.load_state_dict(trained)
        return hits[0].item() / len(source), hits[1].item() / len(source)

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint, which appears under its name only when it is whole; keep the last ones."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        unfinished = folder / f"unfinished-{step}"
        dcp.save({"model": model, "optimizer": optimizer, "average": self.average}, checkpoint_id=unfinished)
        if _rank() == 0:
            unfinished.rename(folder / str(step))
            for old in _steps(folder)[: -self.recipe.training.keep]:
                shutil.rmtree(folder / str(old))
        if dist.is_initialized():
            dist.barrier()

    def load(self, folder: Path, step: int) -> None:
        """Read a checkpoint of any number of processes."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer, "average": self.average}, checkpoint_id=folder / str(step))
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def _nchw(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).to(self.device, self.dtype)


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with decay of matrices alone, and a rate per block."""
    how, named = recipe.training, dict(model.named_parameters())
    scales = layer_scales(named, recipe.model, how.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((scales[name], decays(name, tuple(parameter.shape))), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "scale": scale, "weight_decay": how.weight_decay if decay else 0.0}
            for (scale, decay), parameters in groups.items()
        ],
        lr=how.learning_rate,
    )


def _training_batches(data: TrainingData, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process' part of each batch from a step on, read ahead by processes."""
    local = LocalData(data, step, _rank(), _processes())
    for sample in DataLoader(local, local.local, num_workers=data.recipe.data.workers):
        yield sample.image, sample.target


def _evaluation_batches(source: Source, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield as many batches in every process, the last filled up with images of no class."""
    mine, longest = range(_rank(), len(source), _processes()), -(-len(source) // _processes())
    for start in range(0, longest, EVALUATION_BATCH):
        indices = mine[start : start + EVALUATION_BATCH] or mine[:1]
        images, labels = default_collate([held_out(source, index, recipe) for index in indices])
        yield images, labels if start < len(mine) else torch.full_like(labels, -1)


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def train(recipe: Recipe, folder: Path, device: torch.device) -> tuple[float, float]:
    """Train to the end, or until told to stop; return top-1 and top-5 of the averaged weights."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    training, evaluation = sources(recipe)
    data = TrainingData(training, recipe)
    trainer = Trainer(recipe, device, learning_rates(recipe.training, data.steps_per_epoch))
    log, checkpoints = Log(folder, writes=_rank() == 0), folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    start = 0
    if done := _steps(checkpoints):
        trainer.load(checkpoints, done[-1])
        start = done[-1] + 1
    steps = range(start, len(data) // recipe.training.batch)
    for step, (images, targets) in zip(track(steps, "training"), _training_batches(data, start), strict=True):
        loss, stopped = _agree(trainer.step(step, images, targets), bool(told), device)
        log.write(step, loss=loss)
        if stopped or step == steps[-1] or (step + 1) % recipe.training.save_every == 0:
            trainer.save(checkpoints, step)
        if stopped:
            raise SystemExit(f"stopped after step {step}; the same command goes on")
    top1, top5 = trainer.accuracy(evaluation)
    log.write(steps.stop, top1=top1, top5=top5)
    return top1, top5


def _agree(loss: float, told: bool, device: torch.device) -> tuple[float, bool]:
    """Return the mean loss of all processes, and whether one of them was told to stop."""
    both = torch.tensor([loss / _processes(), told], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(both)
    return both[0].item(), both[1].item() > 0


def main(
    recipe: Annotated[Path, typer.Argument(help="TOML file")],
    folder: Annotated[Path, typer.Argument(help="where checkpoints and losses go")],
    epochs: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
) -> None:
    """Train a VOLO; run it again to go on."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    top1, top5 = train(Recipe.read(recipe, **({} if epochs is None else {"epochs": epochs})), folder, device)
    if _rank() == 0:
        print(f"top-1 {top1:.2%}, top-5 {top5:.2%}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
