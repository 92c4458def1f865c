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
from outlook_parity.models import LAYER, Model, Options, make

EXIT_CODES = {"pass": 0, "mismatch": 1, "not-run": 3}
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
    dtype: Annotated[
        list[str] | None, typer.Option(help="float64, float32, bfloat16 or float16; repeat it for several.")
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="forward, layers, gradients or training; repeat it for several.")
    ] = None,
    training_dtype: Annotated[
        list[str] | None,
        typer.Option(help="Which of the dtypes to train in.", show_default="the first, as it takes long"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps, with SGD and with AdamW.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of everything random: weights, cotangents, targets.")] = 0,
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
    show_all: Annotated[bool, typer.Option("--all", help="Show every tensor, not the worst of each part.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Verify that the twins compute the same thing from the same weights on real photos.

    The two photos inside scikit-learn are prepared as the variant's images are. Compared are logits, the gradients of
    the images and of every parameter, and training steps: losses, parameters and BatchNorm's buffers.

    With --model layer one photo is cut into 8x8 patches: a map of 28x28 places with 192 channels, the first that
    VOLO-D1's outlook attention sees; for weights of other channels the patches go through a random linear map.

    Exit codes: 0 pass, 1 mismatch, 2 error, 3 asked for and not run (no such device).
    """
    dtypes = dtype or ["float64", "float32"]
    options = Options(model, weights, prefix, seed, num_heads, kernel_size, stride, padding)
    console = Console(stderr=True)
    with _progress(console) as on_step:
        import outlook_parity
        from outlook_parity.report import show

        made = make(options)
        settings: dict[str, Any] = {} if level is None else {"levels": level}
        report = outlook_parity.verify(
            made.torch_model,
            made.jax_model,
            made.inputs,
            dtypes=dtypes,
            training_dtypes=training_dtype or dtypes[:1],
            device=device,
            seed=seed,
            steps=steps,
            progress=on_step,
            **settings,
        )
    if plot is not None and report.verdict != "not-run":
        _plot(plot, made, report, device, seed)
    if as_json:
        typer.echo(report.to_json())
    else:
        show(report, Console(), title=made.title, every_row=show_all or model == LAYER)
        if plot is not None and report.verdict != "not-run":
            Console().print(f"picture: {plot}", highlight=False, soft_wrap=True)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _plot(path: Path, made: Model, report: Any, device: str, seed: int) -> None:
    from outlook_parity import compare
    from outlook_parity.names import Given
    from outlook_parity.pair import make_pair
    from outlook_parity.plot import save_model_plot, save_plot
    from outlook_parity.request import Request

    if made.inputs.shape[-1] == made.photo.shape[-1]:
        return save_model_plot(path, made.photo, report)
    request = Request(made.inputs, "float32", device, seed, rounded_to="float32")
    pair = make_pair(made.torch_model, made.jax_model, made.inputs, Given())
    outputs = [twin.run(request, gradients=False).output[0] for twin in (pair.torch, pair.jax)]
    unit = np.finfo(np.float32).eps * compare.rms(outputs[0])
    return save_plot(path, made.photo, np.abs(outputs[1] - outputs[0]) / unit, report)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on a terminal, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading the frameworks", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
