"""`outlook verify`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from outlook_common.config import VOLO_VARIANTS
from outlook_parity.cli.exit_codes import OF_VERDICTS
from outlook_parity.core.precision import IN_WORDS
from outlook_parity.mapping.user import name_map_from_options
from outlook_parity.models.builtin import LAYER, Model, Options, make
from outlook_parity.models.user import load_factory, read_inputs

DEFAULT_MODEL = "volo_d1_224"


def verify(
    model: Annotated[
        str, typer.Option(help=f"A released variant ({', '.join(VOLO_VARIANTS)}), or {LAYER}: outlook attention alone.")
    ] = DEFAULT_MODEL,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A weight file, or for a whole model a folder or Hub id (owner/name@revision) too.",
            show_default="random weights",
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Where in the file the model lies: network.0.0.attn")] = "",
    device: Annotated[str, typer.Option(help="Where the lower precisions run: cpu, gpu or tpu.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help=f"{IN_WORDS}; repeat it for several.")] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="forward, layers, gradients or training; repeat it for several.")
    ] = None,
    training_dtype: Annotated[
        list[str] | None,
        typer.Option(help="Which of the dtypes to train in.", show_default="the first, as it takes long"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps, with SGD and with AdamW.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of everything random: weights, cotangents, targets.")] = 0,
    torch_factory: Annotated[
        str | None, typer.Option("--torch", help="Your own PyTorch model instead: package.module:factory.")
    ] = None,
    jax_factory: Annotated[
        str | None,
        typer.Option("--jax", help="Its JAX twin: a factory of an NNX module, (Linen module, variables) or function."),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="What both are called with, as JAX takes it: .safetensors, .npz or .npy, several arrays in the order "
            "of their names."
        ),
    ] = None,
    torch_axes: Annotated[
        str | None,
        typer.Option(help="The order in which PyTorch takes their axes, as in 0,3,1,2.", show_default="as JAX"),
    ] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="TOML: what corresponds to what, where the names do not say it.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Of the layer: heads; 6 without a weight file, else what it holds.", min=1)
    ] = None,
    kernel_size: Annotated[int, typer.Option(help="Of the layer: window size in pixels.", min=1)] = 3,
    stride: Annotated[int, typer.Option(help="Of the layer: stride of the windows in pixels.", min=1)] = 2,
    padding: Annotated[
        int | None, typer.Option(help="Of the layer: in pixels; (kernel size - 1) // 2 if not given.", min=0)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture: the photo beside how the twins' results differ.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the report as JUnit XML, for CI.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every tensor, not the worst of each part.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Verify that the twins compute the same thing from the same weights on real photos.

    The two photos inside scikit-learn are prepared as the variant's images are. Compared are logits, the gradients of
    the images and of every parameter, and training steps: losses, parameters and BatchNorm's buffers.

    With --model layer one photo is cut into 8x8 patches: a map of 28x28 places with 192 channels, the first that
    VOLO-D1's outlook attention sees; for weights of other channels the patches go through a random linear map.

    With --torch, --jax and --inputs any two models are verified: see docs/port-a-model.md.

    Exit codes: 0 pass, 1 mismatch, 2 error, 3 asked for and not run (no such device, or none with TF32).
    """
    dtypes = dtype or ["float64", "float32"]
    options = Options(model, weights, prefix, seed, num_heads, kernel_size, stride, padding)
    console = Console(stderr=True)
    if plot is not None and torch_factory is not None:
        raise ValueError("--plot shows a photo; of twins of your own --html shows the report")
    for option, value in (("--map", map_file), ("--torch-axes", torch_axes)):
        if value is not None and torch_factory is None:
            raise ValueError(f"{option} tells about twins of your own: --torch, --jax and --inputs are not given")
    names = name_map_from_options(map_file, torch_axes)
    with _progress(console) as on_step:
        from outlook_parity.api import verify as verify_models
        from outlook_parity.report.terminal import show

        made = _theirs(torch_factory, jax_factory, inputs) or make(options)
        report = verify_models(
            made.torch_model,
            made.jax_model,
            made.inputs,
            dtypes=dtypes,
            training_dtypes=training_dtype or dtypes[:1],
            device=device,
            seed=seed,
            steps=steps,
            progress=on_step,
            levels=level,
            names=names,
        )
    if plot is not None and report.verdict != "not-run":
        _plot(plot, made, report, device, seed)
    if html is not None:
        report.to_html(html, title=made.title)
    if junit is not None:
        report.to_junit(junit)
    if as_json:
        typer.echo(report.to_json())
    else:
        show(report, Console(), title=made.title, every_row=show_all or model == LAYER)
        for kind, path in (("page", html), ("JUnit", junit)):
            if path is not None:
                Console().print(f"{kind}: {path}", highlight=False, soft_wrap=True)
        if plot is not None and report.verdict != "not-run":
            Console().print(f"picture: {plot}", highlight=False, soft_wrap=True)
    raise typer.Exit(OF_VERDICTS[report.verdict])


def _theirs(torch_factory: str | None, jax_factory: str | None, inputs: Path | None) -> Model | None:
    """Return the user's own twins, None if none are named.

    Raises:
        ValueError: only some of the three are given.
    """
    given = {"--torch": torch_factory, "--jax": jax_factory, "--inputs": inputs}
    if not any(given.values()):
        return None
    if lacking := [option for option, value in given.items() if not value]:
        raise ValueError(f"twins of your own take --torch, --jax and --inputs; {' and '.join(lacking)} not given")
    assert torch_factory is not None
    assert jax_factory is not None
    assert inputs is not None
    arrays = read_inputs(inputs)
    shapes = ", ".join(f"{array.dtype} {array.shape}" for array in arrays.values())
    title = f"{torch_factory} and {jax_factory} on {inputs.name}, {shapes}"
    torch_model, jax_model = load_factory(torch_factory, "--torch"), load_factory(jax_factory, "--jax")
    return Model(title, torch_model, jax_model, arrays, photo=np.zeros((1, 1, 3), np.uint8))


def _plot(path: Path, made: Model, report: Any, device: str, seed: int) -> None:
    from outlook_parity.compare.noise import rms
    from outlook_parity.core.request import Request, inputs_of
    from outlook_parity.mapping.user import NameMap
    from outlook_parity.pair import make_pair
    from outlook_parity.report.plot import save_model_plot, save_plot

    if made.inputs.shape[-1] == made.photo.shape[-1]:
        return save_model_plot(path, made.photo, report)
    inputs = inputs_of(made.inputs)
    request = Request(inputs, "float32", device, seed, rounded_to="float32")
    pair = make_pair(made.torch_model, made.jax_model, inputs, NameMap())
    outputs = [twin.run(request, gradients=False).outputs["output"][0] for twin in (pair.torch, pair.jax)]
    unit = np.finfo(np.float32).eps * rms(outputs[0])
    return save_plot(path, made.photo, np.abs(outputs[1] - outputs[0]) / unit, report)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on a terminal, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading the frameworks", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
