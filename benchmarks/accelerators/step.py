"""What XLA:TPU takes to compile VOLO's training step, whole and by its parts.

    python -m benchmarks.accelerators.step ["step, stacked" …] [--variant volo_d5_224] [--scoped-vmem-kib 8192] …

Nothing is run. Each program that is compiled goes into benchmarks/results/step_compile_v5e.json, beside those of
earlier calls, and the table is written anew.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import outlook_jax
from benchmarks.accelerators import hlo, tpu
from outlook_common.config import VOLO_VARIANTS
from outlook_jax.losses import TokenLabelCrossEntropy
from outlook_jax.scan import run_blocks

RESULTS = Path(__file__).parents[1] / "results" / "step_compile_v5e.json"
CHIPS = "v5e:2x2"

HEAD = """# Compile time of VOLO's training step for a TPU v5e

By `python -m benchmarks.accelerators.step`; jax {jax}, libtpu {libtpu}, on 2 cores of an AMD EPYC beside other jobs.
**Nothing here was run on a TPU: every figure but the seconds is the compiler's estimate.** VOLO-D1 unless another is
named; AdamW on token labels, batch 32, bfloat16, parameters and moments in float32, one chip. Parts: loss and gradients
by parameters and, but for the stem, by input. `stacked`: in the training state weights of one name in equal blocks
are one array, and so are vectors of one length, moments too.

- **processor s**: tracing, lowering and compiling, of both cores together.
- **kcycles**: in thousands, XLA:TPU's estimate of its own operations, loops by their trip counts, without Pallas
  kernels: the same are in every row of a program.
- **scoped VMEM**: the compiler option `xla_tpu_scoped_vmem_limit_kib`: what one operation may have of the chip's fast
  memory beside its operands. The code of a product is one window, unrolled: products and convolutions are 76 % of the
  bundles of one transformer block and 90 % of the stem's, counted in dumps of both (`benchmarks.accelerators.llo`).
"""


class Program(NamedTuple):
    """A function, the shapes of its operands, and how many of them are given up for the results."""

    run: Callable[..., Any]
    operands: Sequence[Any]
    donated: int = 0


def stacked(parameters: nnx.State[Any, Any]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return what stacks weights of one name in equal blocks, and vectors of one length, and its inverse."""
    tree: Any
    paths, tree = jax.tree.flatten_with_path(parameters)
    groups: dict[Any, list[int]] = {}
    for index, (path, leaf) in enumerate(paths):
        name = re.sub(r"\d+", "", jax.tree_util.keystr(path)) if leaf.ndim > 1 else "vectors"
        groups.setdefault((name, leaf.shape), []).append(index)

    def stack(parameters: Any) -> list[jax.Array]:
        leaves = jax.tree.leaves(parameters)
        return [jnp.stack([leaves[index] for index in group]) for group in groups.values()]

    def unstack(arrays: list[jax.Array]) -> Any:
        rows: dict[int, jax.Array] = {}
        for array, group in zip(arrays, groups.values(), strict=True):
            rows |= zip(group, array, strict=True)
        return tree.unflatten([rows[index] for index in range(len(rows))])

    return stack, unstack


def steps(model: outlook_jax.VOLO, batch: int, dtype: str) -> dict[str, Program]:
    """Return the whole step, and what it is made of."""
    config = model.config
    graph, parameters, *rest = nnx.split(model, nnx.Param, ...)
    stack, unstack = stacked(parameters)
    adamw = optax.adamw(1e-3, weight_decay=0.05)
    rows, columns = config.token_map
    data = (
        jax.ShapeDtypeStruct((batch, *config.img_size, config.in_chans), dtype),
        jax.ShapeDtypeStruct((batch, config.num_classes, 2 + rows * columns), dtype),
    )

    def forward(parameters: Any, rest: Any, images: jax.Array, targets: jax.Array) -> Any:
        model = nnx.merge(graph, parameters, *rest, copy=True)
        outputs: Any = model.forward_train(images, (2, 2, 8, 8))
        return TokenLabelCrossEntropy()(outputs, targets), nnx.state(model, nnx.BatchStat)

    gradients = jax.value_and_grad(forward, has_aux=True)

    def update(parameters: Any, moments: Any, gradients: Any) -> Any:
        updates, moments = adamw.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    def step(parameters: Any, moments: Any, *operands: Any) -> Any:
        found, derivatives = gradients(parameters, *operands)
        return update(parameters, moments, derivatives), found

    def stacked_step(arrays: Any, moments: Any, *operands: Any) -> Any:
        found, derivatives = gradients(unstack(arrays), *operands)
        return update(arrays, moments, stack(derivatives)), found

    arrays = jax.eval_shape(stack, parameters)
    moments, moments_of_arrays = (jax.eval_shape(adamw.init, each) for each in (parameters, arrays))
    return {
        "step": Program(step, (parameters, moments, rest, *data), donated=2),
        "step, stacked": Program(stacked_step, (arrays, moments_of_arrays, rest, *data), donated=2),
        "loss and gradients": Program(gradients, (parameters, rest, *data)),
        "loss": Program(forward, (parameters, rest, *data)),
        "update": Program(update, (parameters, moments, parameters), donated=2),
        "update, stacked": Program(update, (arrays, moments_of_arrays, arrays), donated=2),
    }


def parts(model: outlook_jax.VOLO, batch: int, dtype: str) -> dict[str, Program]:
    """Return the sum and the gradients of each part of the model, of blocks as the model runs them."""
    config = model.config

    def blocks(modules: nnx.List[Any], x: jax.Array) -> jax.Array:
        return run_blocks(modules, x, scan=model.scan_layers, remat=model.grad_checkpointing)

    def part(module: Any, *shape: int, run: Any = lambda module, x: module(x), by: Any = (0, 1)) -> Program:
        graph, parameters, *rest = nnx.split(module, nnx.Param, ...)

        def sum_of(parameters: Any, x: jax.Array, rest: Any) -> jax.Array:
            return run(nnx.merge(graph, parameters, *rest, copy=True), x).astype(jnp.float32).sum()

        return Program(jax.value_and_grad(sum_of, by), (parameters, jax.ShapeDtypeStruct((batch, *shape), dtype), rest))

    network: Any = model.network
    patches = [size // config.patch_size for size in config.img_size]
    tokens = 1 + config.token_map[0] * config.token_map[1]
    transformers = nnx.List([block for stage in network[2:] for block in stage])
    return {
        "stem": part(model.patch_embed, *config.img_size, config.in_chans, by=0),
        "outlookers": part(network[0], *patches, config.embed_dims[0], run=blocks),
        "downsampling": part(network[1], *patches, config.embed_dims[0]),
        "transformers": part(transformers, *config.token_map, config.num_features, run=blocks),
        "one transformer": part(network[2][0], *config.token_map, config.num_features),
        "class blocks": part(model.post_network, tokens, config.num_features, run=blocks),
    }


def compile_for(program: Program, options: dict[str, Any]) -> dict[str, float]:
    """Compile for one chip; return figures, all but the seconds by the compiler's estimates."""
    one = jax.sharding.SingleDeviceSharding(tpu.topology(CHIPS, bundles=False).devices[0])
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tuple(program.operands))
    start = time.process_time()
    lowered = jax.jit(program.run, donate_argnums=tuple(range(program.donated))).lower(*operands)
    compiled: Any = lowered.compile(options)
    seconds = time.process_time() - start
    operations, memory = hlo.operations(compiled.as_text()), compiled.memory_analysis()
    return {
        "processor s": round(seconds, 1),
        "code MB": round(memory.generated_code_size_in_bytes / 1e6, 1),
        "operations": len(operations),
        "temp MB": round(memory.temp_size_in_bytes / 1e6),
        "kcycles": round(sum(tpu.estimated_cycles(each) * each.times for each in operations) / 1e3),
        "Pallas kernels": sum(tpu.KERNEL in each.text for each in operations),
    }


def table(rows: dict[str, dict[str, float]], programs: Sequence[str]) -> str:
    """Return the page, with its rows in the order of the programs."""
    names = list(next(iter(rows.values())))
    lines = [f"| program | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row in sorted(rows, key=lambda row: (programs.index(row.split(";")[0]), row)):
        lines.append(f"| {row} | {' | '.join(f'{rows[row][name]:,}' for name in names)} |")
    return HEAD.format(**{name: version(name) for name in ("jax", "libtpu")}) + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.accelerators.step", description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", help="by name; all that there are by default")
    parser.add_argument("--variant", default="volo_d1_224", choices=VOLO_VARIANTS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--implementation", help="of outlook attention")
    parser.add_argument("--unrolled", action="store_true", help="blocks one by one: scan_layers=False")
    parser.add_argument("--remat", action="store_true", help="set_grad_checkpointing()")
    parser.add_argument("--scoped-vmem-kib", type=int, help="xla_tpu_scoped_vmem_limit_kib")
    parser.add_argument("--effort", type=float, help="jax_exec_time_optimization_effort, from -1 to 1")
    given = vars(parser.parse_args())

    def fresh() -> outlook_jax.VOLO:
        options = {"scan_layers": not given["unrolled"], "implementation": given["implementation"]}
        model = outlook_jax.volo(given["variant"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)
        model.set_grad_checkpointing(given["remat"])
        model.train()
        return model

    if given["effort"] is not None:
        jax.config.update("jax_exec_time_optimization_effort", given["effort"])
    options = {"xla_tpu_scoped_vmem_limit_kib": given["scoped_vmem_kib"]} if given["scoped_vmem_kib"] else {}
    sizes = nnx.eval_shape(fresh), given["batch"], "bfloat16"
    programs = steps(*sizes) | parts(*sizes)
    names = given.pop("programs") or list(programs)
    said = {name.replace("_", " "): value for name, value in given.items() if value != parser.get_default(name)}
    suffix = "".join(f"; {name}" if value is True else f"; {name} {value}" for name, value in said.items())
    for name in names:
        figures = compile_for(programs[name], options)
        print(name + suffix, figures, flush=True)
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        rows[name + suffix] = figures
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(rows, list(programs)))


if __name__ == "__main__":
    main()
