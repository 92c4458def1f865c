"""Train a VOLO in JAX, from one device to a pod: `python -m examples.imagenet.train_jax digits.toml runs/digits`.

The same script runs on every process (`--distributed` finds the others on TPU pods and under Slurm). It goes on from
the last checkpoint in its folder, on whatever devices there are now, and saves when it is told to stop (SIGTERM).
"""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.progress import track

import outlook_jax
from examples.imagenet.data import LocalData, Source, TrainingData, held_out, mix_box, sources
from examples.imagenet.log import Log
from examples.imagenet.recipe import Recipe, decays, layer_scales, learning_rates
from outlook_jax.losses import TokenLabelGTCrossEntropy

EVALUATION_BATCH = 64  # per device

Weights = tuple[nnx.State, nnx.State]  # parameters, statistics


class State(NamedTuple):
    """What is trained and saved."""

    weights: Weights
    optimizer: optax.OptState
    average: Weights


class Trainer:
    """A model, its optimizer and their compiled steps on a mesh."""

    def __init__(self, recipe: Recipe, mesh: Mesh, rates: np.ndarray) -> None:
        self.recipe, self.mesh, how = recipe, mesh, recipe.training
        dtypes: dict[str, Any] = {"dtype": how.dtype, "param_dtype": how.param_dtype}

        def fresh() -> outlook_jax.VOLO:
            return outlook_jax.VOLO(recipe.model, rngs=nnx.Rngs(how.seed), **dtypes)

        # Abstract first: no device ever holds the whole model.
        model = nnx.eval_shape(fresh)
        self.graph, *_ = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        still = nnx.view(model, deterministic=True, use_running_average=True)
        self.graph_in_evaluation, *_ = nnx.split(still, nnx.Param, nnx.BatchStat, ...)
        self.optimizer = _optimizer(recipe, nnx.state(model, nnx.Param), rates)

        def initial() -> tuple[State, nnx.State]:
            _, params, statistics, streams = nnx.split(fresh(), nnx.Param, nnx.BatchStat, ...)
            weights = (params, statistics)
            return State(weights, self.optimizer.init(params), weights), streams

        self.replicated, self.by_batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        shapes, _ = jax.eval_shape(initial)
        self.shardings = self._shardings(shapes, outlook_jax.named_shardings(model, mesh, rules=how.sharding))
        self.state, self.streams = jax.jit(initial, out_shardings=(self.shardings, self.replicated))()
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=(self.shardings, self.replicated))
        self._hits = jax.jit(self._count_hits, out_shardings=self.replicated)

    def step(self, step: int, images: np.ndarray, targets: np.ndarray) -> jax.Array:
        """Train on this process' part of a batch; return the loss."""
        box, dtype = mix_box(self.recipe, step), self.recipe.training.param_dtype
        batch = (self._global(array.astype(dtype)) for array in (images, targets))
        self.state, loss = self._step(self.state, step, *batch, box)
        return loss

    def accuracy(self, source: Source) -> tuple[float, float]:
        """Return top-1 and top-5 of the averaged weights on what is held out."""
        hits = np.zeros(2)
        for images, labels in _evaluation_batches(source, self.recipe):
            hits += jax.device_get(self._hits(self.state.average, self._global(images), self._global(labels)))
        return float(hits[0] / len(source)), float(hits[1] / len(source))

    def _global(self, local: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self.by_batch, local)

    def _shardings(self, shapes: State, of_model: nnx.State) -> State:
        """Shard the optimizer's moments and the averages as the parameters they belong to."""
        params, statistics = (nnx.filter_state(of_model, kind) for kind in (nnx.Param, nnx.BatchStat))
        optimizer = optax.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            shapes.optimizer,
            params,
            transform_non_params=lambda _: self.replicated,
        )
        return State((params, statistics), optimizer, (params, statistics))

    def _loss(self, params: nnx.State, statistics: nnx.State, key: jax.Array, batch: Any, box: Any) -> Any:
        images, targets = batch
        model = nnx.merge(self.graph, params, statistics, self.streams, copy=True)
        nnx.reseed(model, default=key)
        model = outlook_jax.gather_weights(model, self.mesh, self.recipe.training.sharding)
        outputs = model.forward_train(images, box if self.recipe.model.use_mix_token else None)
        return TokenLabelGTCrossEntropy()(outputs, targets), nnx.state(model, nnx.BatchStat)

    def _update(self, state: State, step: jax.Array, images: jax.Array, targets: jax.Array, box: Any) -> Any:
        how, (params, statistics) = self.recipe.training, state.weights
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(how.seed), step), how.accumulate)

        def part(carried: Any, key_and_batch: Any) -> Any:
            statistics, total = carried
            key, batch = key_and_batch
            (loss, statistics), gradients = gradient(params, statistics, key, batch, box)
            return (statistics, jax.tree.map(jnp.add, total, gradients)), loss

        parts = jax.tree.map(lambda x: x.reshape(-1, how.accumulate, *x.shape[1:]).swapaxes(0, 1), (images, targets))
        zeros = jax.tree.map(jnp.zeros_like, params)
        (statistics, total), losses = jax.lax.scan(part, (statistics, zeros), (keys, parts))
        gradients = jax.tree.map(lambda x: x / how.accumulate, total)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, params)
        weights = (optax.apply_updates(params, updates), statistics)
        average = jax.tree.map(lambda new, old: _averaged(new, old, how.ema), weights, state.average)
        return State(weights, optimizer, average), losses.mean()

    def _count_hits(self, weights: Weights, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(self.graph_in_evaluation, *weights, self.streams)(images)
        best = jax.lax.top_k(logits, 5)[1] == labels[:, None]
        return jnp.stack([best[:, 0].sum(), best.sum()])


def _averaged(new: jax.Array, old: jax.Array, decay: float) -> jax.Array:
    """Return the moving average; of BatchNorm's counters, which are integers, the last one."""
    return optax.incremental_update(new, old, 1 - decay) if jnp.issubdtype(old.dtype, jnp.floating) else new


def _optimizer(recipe: Recipe, params: nnx.State, rates: np.ndarray) -> optax.GradientTransformation:
    """Return AdamW with clipping, decay of matrices alone, and a rate per block."""
    how = recipe.training
    flat = [(path, ".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(params)]
    scales = layer_scales([name for _, name, _ in flat], recipe.model, how.layer_decay)

    def tree(of: Callable[[str, Any], Any]) -> nnx.State:
        return nnx.from_flat_state((path, variable.replace(of(name, variable))) for path, name, variable in flat)

    by_block = tree(lambda name, variable: scales[name])
    return optax.chain(
        optax.clip_by_global_norm(how.clip) if how.clip else optax.identity(),
        optax.scale_by_adam(),
        optax.add_decayed_weights(how.weight_decay, tree(lambda name, variable: decays(name, variable.shape))),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, by_block)),
        optax.scale_by_learning_rate(lambda count: jnp.asarray(rates)[count]),
    )


def _training_batches(data: TrainingData, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this process' part of each batch from a step on, read ahead by threads."""
    local = LocalData(data, step, jax.process_index(), jax.process_count())
    dataset = grain.MapDataset.source(local).batch(local.local)
    threads = max(data.recipe.data.workers, 1)
    for batch in dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)):
        yield batch.image, batch.target


def _evaluation_batches(source: Source, recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield whole batches for all devices, this process' part, filled up with images of no class."""
    batch, process, processes = EVALUATION_BATCH * jax.local_device_count(), jax.process_index(), jax.process_count()
    mine = range(process, len(source), processes)
    for start in range(0, -(-len(source) // processes), batch):
        taken = [held_out(source, index, recipe) for index in mine[start : start + batch]]
        images = np.zeros((batch, *recipe.model.img_size, recipe.model.in_chans), np.float32)
        labels = np.full(batch, -1)
        for i, (image, label) in enumerate(taken):
            images[i], labels[i] = image, label
        yield images, labels


def train(recipe: Recipe, folder: Path, *, stop: threading.Event | None = None) -> tuple[float, float]:
    """Train to the end, or until told to stop; return top-1 and top-5 of the averaged weights."""
    how = recipe.training
    if how.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    training, evaluation = sources(recipe)
    data = TrainingData(training, recipe)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    trainer = Trainer(recipe, mesh, learning_rates(how, data.steps_per_epoch))
    options = ocp.CheckpointManagerOptions(max_to_keep=how.keep, save_interval_steps=how.save_every)
    log = Log(folder, writes=jax.process_index() == 0)
    with ocp.CheckpointManager(folder.resolve() / "checkpoints", options=options) as manager:
        start = 0
        if (last := manager.latest_step()) is not None:
            wanted = jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                trainer.state,
                trainer.shardings,
            )
            trainer.state = manager.restore(last, args=ocp.args.StandardRestore(wanted))
            start = last + 1
        steps = range(start, len(data) // how.batch)
        batches = _training_batches(data, start)
        for step, (images, targets) in zip(track(steps, "training"), batches, strict=True):
            loss = trainer.step(step, images, targets)
            log.write(step, loss=float(loss))
            stopped = manager.reached_preemption(step) or (stop is not None and stop.is_set())
            manager.save(step, args=ocp.args.StandardSave(trainer.state), force=stopped or step == steps[-1])
            if stopped:
                raise SystemExit(f"stopped after step {step}; the same command goes on")
    top1, top5 = trainer.accuracy(evaluation)
    log.write(steps.stop, top1=top1, top5=top5)
    return top1, top5


def main(
    recipe: Annotated[Path, typer.Argument(help="TOML file")],
    folder: Annotated[Path, typer.Argument(help="where checkpoints and losses go")],
    epochs: Annotated[int | None, typer.Option(help="instead of the recipe's")] = None,
    distributed: Annotated[bool, typer.Option(help="one of several processes, as the environment says")] = False,
) -> None:
    """Train a VOLO; run it again to go on."""
    if distributed:
        jax.distributed.initialize()
    stop = threading.Event()
    if not distributed:  # JAX itself notices the signal in each of several processes
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    changed = {} if epochs is None else {"epochs": epochs}
    top1, top5 = train(Recipe.read(recipe, **changed), folder, stop=stop)
    print(f"top-1 {top1:.2%}, top-5 {top5:.2%}")


if __name__ == "__main__":
    typer.run(main)
