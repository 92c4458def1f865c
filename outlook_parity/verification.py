"""`verify`: do two twins compute the same thing? Float64 to rounding, lower precisions to the same rounding noise."""

import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from outlook_common.extras import require
from outlook_parity import causes, compare
from outlook_parity.compare import Tensors
from outlook_parity.layers import MODEL, Suspect, verify_layers
from outlook_parity.masks import Draw
from outlook_parity.names import Given
from outlook_parity.precisions import PRECISIONS
from outlook_parity.report import Check, Report, SelfNoise, notes_on
from outlook_parity.request import Inputs, Request, inputs_of, places_and_size
from outlook_parity.rounding import notes_on_products, unrounded
from outlook_parity.semantics import Difference, differences
from outlook_parity.twin import Run

if TYPE_CHECKING:
    from outlook_parity.pair import Pair
    from outlook_parity.twin import Twin

TRUTH = "float64"
DEVICES = ("cpu", "gpu", "tpu")

# Which pass over a model gives what each level compares.
LEVELS = {"forward": "evaluation", "layers": "layers", "gradients": "evaluation", "training": "training"}
STEPS = 3
OPTIMIZER_NAMES = ("SGD", "AdamW")
TWINS = ("torch", "jax")

Progress = Callable[[str, int, int], None]


def verify(
    torch_model: Any,
    jax_model: Any,
    inputs: Any,
    *,
    levels: Sequence[str] | None = None,
    dtypes: Sequence[str] = (TRUTH, "float32"),
    training_dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    steps: int = STEPS,
    names: Given | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare two twins that hold the same weights.

    In float64, on the CPU, their weights must be equal, and outputs and gradients agree to rounding. In each lower
    precision, on `device`, each twin's error against the float64 truth must be within a small factor of the other's.
    Both run on recast copies, in eval mode but for the training steps, where nothing is dropped: the models, their
    modes and all global settings stay as they are.

    Args:
        torch_model: a `torch.nn.Module`, or a function.
        jax_model: its twin: an `nnx.Module`, a pair of a Linen module and its variables, or a function.
        inputs: what both are called with, as JAX takes it (maps channels last): an array (NumPy, or anything it reads),
            a sequence of them, or a mapping from names, which are the report's, both in the order of the arguments.
            Floating-point numbers must vary along each of their axes; integers and booleans (ids, masks) are neither
            rounded nor differentiated. Images for a VOLO go to PyTorch with the channels first, as it takes them.
        levels: "forward" (the outputs: of tuples, lists, mappings and dataclasses each leaf by its path), "layers"
            (what every module gives, on its own input and on the other twin's), "gradients" (of the sum of outputs
            times random cotangents, with respect to inputs and every parameter), "training" (losses, and every
            parameter, buffer and state of the optimizer after the last step, of SGD with momentum and of AdamW). None
            for all that the pair allows; what was left out is among the notes.
        dtypes: the precisions, of "float64", "float32", "tf32", "bfloat16", "float16". In "tf32" numbers are float32,
            and products may round what they multiply to TF32, which some GPUs do; elsewhere it does not run.
        training_dtypes: those of `dtypes` to train in, which takes the longest; None for all.
        device: "cpu", "gpu" or "tpu", for the lower precisions; PyTorch's part of a TPU run is on the CPU.
        seed: of the cotangent and of what is trained on.
        steps: of training, with each optimizer.
        names: what corresponds to what in models that are not of this package, where Flax's usual names do not say it,
            and in which order PyTorch takes the axes of the inputs.
        progress: called before each run and once after the last, with what runs next, how many runs are done, and
            how many there are.

    Returns:
        The report. Its verdict is "not-run" if the device is absent, or has no TF32 and that was asked for, or if the
        inputs can tell nothing. NaN, Inf, missing tensors and empty comparisons never pass.

    Raises:
        ValueError: a level, dtype or device is unknown, or none is given, or a level cannot be had of plain functions;
            or there are no training steps.
        TypeError: the inputs are no numbers, or a model is none, or returns something that holds no arrays.
        ImportError: PyTorch or JAX is not installed.
    """
    _check_request(levels, dtypes, training_dtypes, device, steps)
    for module, extra in (("torch", "torch"), ("jax", "jax"), ("flax", "jax"), ("optax", "parity")):
        require(module, extra=extra, needed_by="outlook_parity.verify")
    from outlook_parity.pair import device_absence, device_names, make_pair, products_absence, products_of

    inputs = inputs_of(inputs)
    reason = compare.refusal(inputs) or device_absence(device)
    if reason:
        return Report("not-run", reason=reason, environment=versions())

    pair = make_pair(torch_model, jax_model, inputs, names or Given())
    notes = []
    if levels is None:
        levels = [level for level in LEVELS if level not in pair.refused]
        notes = [f"the level {level!r} was left out: {why}" for level, why in pair.refused.items()]
    if impossible := [f"{level!r} ({pair.refused[level]})" for level in levels if level in pair.refused]:
        raise ValueError(f"levels that cannot be had of this pair: {', '.join(impossible)}")

    levels = [level for level in LEVELS if level in levels]  # each once, in whatever order they are asked for
    trained = dtypes if training_dtypes is None else training_dtypes
    asked = [(level, dtype) for dtype in dtypes for level in levels if level != "training" or dtype in trained]
    absent = {dtype: why for dtype in dtypes if (why := products_absence(device, dtype))}
    passes = dict.fromkeys((dtype, LEVELS[level]) for level, dtype in asked if dtype not in absent)
    step = _steps(progress, total=sum(_RUNS[which](dtype) for dtype, which in passes))
    session = _Session(pair, inputs, levels, device=device, seed=seed, steps=steps, step=step)
    session.checks += compare.compare_weights(session.weights["torch"], session.weights["jax"], pair.names.expected)
    for dtype, which in passes:
        session.run(which, dtype)
    session.checks += [
        Check(level, dtype, MODEL, "not-run", bound=0.0, note=absent[dtype])
        for level, dtype in asked
        if dtype in absent
    ]
    step("")

    verdict, reason = compare.judge(
        session.checks, [*([("weights", "as given")] if pair.names.expected else []), *asked]
    )
    said = session.differences()
    found = session.explanation(said) if verdict == "mismatch" else causes.Explanation(None, None)
    return Report(
        verdict,
        checks=tuple(session.checks),
        reason=reason,
        first_divergence=found.path,
        cause=found.cause,
        differences=tuple(map(str, said)),
        notes=(*notes_on(session.self_noise), *notes_on_products(session.checks), *notes),
        self_noise=tuple(session.self_noise),
        curves=session.curves,
        environment=versions() | device_names(device) | products_of(dtypes),
    )


class _Session:
    """All passes over one pair, and the rows that they gave."""

    def __init__(
        self,
        pair: "Pair",
        inputs: Inputs,
        levels: Sequence[str],
        *,
        device: str,
        seed: int,
        steps: int,
        step: Callable[..., None],
    ) -> None:
        self.checks: list[Check] = []
        self._pair, self._inputs, self._levels = pair, inputs, levels
        self._device, self._seed, self._steps, self._step = device, seed, steps, step
        self.self_noise: list[SelfNoise] = []
        self._again: list[Check] = []
        self._first: dict[str, dict[str, Run]] = {}  # per dtype, of each twin, as a user computes it
        self._ran: dict[str, None] = {}  # in which precisions, in order
        self._suspects: list[Suspect] = []
        self._inputs_of: dict[tuple[str, str], np.ndarray] = {}  # by dtype and suspect's path, as JAX takes them
        self._draws: dict[str, Sequence[Draw]] = {}
        self._trained: dict[str, Tensors] = {}
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.weights = {"torch": pair.torch.weights(), "jax": pair.jax.weights()}
        self._whole: set[str] = set()  # the outputs that are whole numbers

    def run(self, which: str, dtype: str) -> None:
        """Run one pass in one precision."""
        self._ran[dtype] = None
        if which == "layers":
            self._layers(dtype)
            return
        here = [level for level in self._levels if LEVELS[level] == which]
        run = self._evaluate if which == "evaluation" else self._train
        traced: dict[str, dict[str, Tensors]] = {level: {} for level in here}
        summed = places_and_size(self._inputs)

        def compute(name: str, run_dtype: str, **settings: Any) -> None:
            for level, tensors in run(name, self._request(dtype, run_dtype, **settings), here).items():
                traced[level][name] = tensors

        def rows() -> list[Check]:
            return [
                check
                for level in here
                for check in compare.compare_level(level, dtype, traced[level], summed, self._whole)
            ]

        for name, run_dtype in _runs(dtype):
            self._step(f"{which}: {name} in {run_dtype}")
            compute(name, run_dtype)
        found = rows()
        if any(map(compare.may_be_a_jump, found)):
            self._step(f"{which}: what rounding can do", again=True)
            for name, moved in (("up", compare.MOVED), ("down", -compare.MOVED)):
                compute(name, TRUTH, moved=moved)
            found = rows()
        self.checks += found

    def _request(self, dtype: str, run_dtype: str, **settings: Any) -> Request:
        place = "cpu" if run_dtype == TRUTH else self._device
        given: dict[str, Any] = {"inputs": self._inputs, "dtype": run_dtype, "device": place, "rounded_to": dtype}
        return Request(**given | {"seed": self._seed, "steps": self._steps} | settings)

    def _twin(self, name: str) -> "Twin":
        """Return the twin that computes this; "truth", "up" and "down" are PyTorch's."""
        return self._pair.jax if name == "jax" else self._pair.torch

    def _run(self, name: str, request: Request, *, gradients: bool) -> Run:
        """Run a twin, and measure how far it is from itself."""
        result = self._twin(name).run(request, gradients=gradients, again=True)
        self.self_noise += compare.self_noise(name, request.dtype, result.outputs, result.again)
        self._whole |= {output for output, dtype in result.dtypes.items() if "float" not in dtype}
        first = self._first.setdefault(request.dtype, {})
        first[name] = replace(result, gradients={})
        if len(first) == len(TWINS) and request.dtype == TRUTH:
            again = {twin: run.again for twin, run in first.items()}
            self._again = compare.compare_again(request.dtype, again)
        return result

    def _evaluate(self, name: str, request: Request, levels: Sequence[str]) -> dict[str, Tensors]:
        gradients = "gradients" in levels
        if name in TWINS:
            result = self._run(name, request, gradients=gradients)
            for output, dtype in result.dtypes.items():
                if output not in self._whole:
                    self.checks += compare.compare_dtype(name, request.dtype, dtype, output)
            if self._again and "forward" in levels:
                self.checks += self._again
                self._again = []
        else:
            result = self._twin(name).run(request, gradients=gradients)
        found = {"forward": result.outputs, "gradients": result.gradients}
        return {level: found[level] for level in levels}

    def _train(self, name: str, request: Request, levels: Sequence[str]) -> dict[str, Tensors]:
        result = self._twin(name).train(request)
        if name in TWINS:
            self._draws[name] = result.draws
            if request.dtype == TRUTH:
                self._trained[name] = result.tensors
            for optimizer in OPTIMIZER_NAMES:
                losses = result.tensors[f"{optimizer}: losses"]
                self.curves.setdefault(optimizer, {}).setdefault(name, losses.tolist())
        return {"training": result.tensors}

    def _layers(self, dtype: str) -> None:
        torch, jax = self._pair.torch, self._pair.jax
        request = partial(Request, self._inputs, seed=self._seed, rounded_to=dtype)
        own = request(dtype=dtype, device="cpu" if dtype == TRUTH else self._device)
        for name in TWINS:
            if name not in self._first.get(dtype, {}):
                self._step(f"layers: {name} as it is, and again")
                self._run(name, own, gradients=False)
        found = verify_layers(torch, jax, request, dtype, self._device, self._step)
        truth = found.outputs.get("truth")
        for name in TWINS:
            plain, watched = (self._floating(o) for o in (self._first[dtype][name].outputs, found.outputs[name]))
            self.checks += compare.compare_self(name, dtype, plain, watched, truth and self._floating(truth))
        self.checks += found.checks
        self._suspects += found.suspects
        self._inputs_of |= {(dtype, path): array for path, array in found.inputs.items()}

    def _floating(self, outputs: Tensors) -> Tensors:
        return {name: array for name, array in outputs.items() if name not in self._whole}

    def differences(self) -> list[Difference]:
        """Return what the models say differently about themselves."""
        found: dict[str, Difference] = {}
        # As told to compute products in full, and to compute them in TF32 where that was asked for.
        for dtype in dict.fromkeys(("float32", *(d for d in self._ran if PRECISIONS[d].products != "full"))):
            request = self._request(dtype, dtype, device="cpu")
            torch, jax = self._pair.torch.describe(request), self._pair.jax.describe(request)
            found |= {str(said): said for said in differences(torch, jax, self._pair.torch.kinds())}
        return list(found.values())

    def explanation(self, said: list[Difference]) -> causes.Explanation:
        """Return where the twins first go different ways, and why, as far as that is known."""
        wrong = [check for check in self.checks if check.verdict == "mismatch"]
        suspects = sorted(self._suspects, key=lambda suspect: suspect.dtype != TRUTH)
        return causes.explain(
            causes.Evidence(
                wrong,
                suspects,
                said,
                self.weights,
                self._draws,
                self._trained,
                unrounded(self.checks),
                self._wrong_step,
                self._pair.names.hint,
            )
        )

    def _wrong_step(self, suspect: Suspect) -> str | None:
        """Return the step inside our own attention that is wrong."""
        from outlook_parity.op_steps import wrong_step

        request = self._request(suspect.dtype, suspect.dtype, device="cpu")
        x = self._inputs_of.get((suspect.dtype, suspect.path))
        if x is None:
            return None
        pair, path = self._pair, suspect.path
        with pair.torch.module(request, path) as torch, pair.jax.module(request, path) as jax:
            return wrong_step(torch, jax, suspect, x)


def _runs(dtype: str) -> list[tuple[str, str]]:
    """Return what to run to judge one dtype, as (what, dtype); the truth is PyTorch's, at the same rounded values."""
    twins = [("torch", dtype), ("jax", dtype)]
    return twins if dtype == TRUTH else [*twins, ("truth", TRUTH)]


def _check_request(
    levels: Sequence[str] | None, dtypes: Sequence[str], training_dtypes: Sequence[str] | None, device: str, steps: int
) -> None:
    for dtype in training_dtypes or ():
        if dtype not in dtypes:
            raise ValueError(f"training_dtypes has {dtype!r}, which is not among dtypes: {', '.join(dtypes)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for what, asked, known in (
        ("level", tuple(LEVELS) if levels is None else levels, LEVELS),
        ("dtype", dtypes, PRECISIONS),
        ("device", [device], DEVICES),
    ):
        if not asked or isinstance(asked, str):
            raise ValueError(f"{what}s must be a sequence of at least one of {', '.join(known)}, got {asked!r}")
        for name in asked:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


# How many runs each pass takes.
_RUNS: dict[str, Callable[[str], int]] = {
    "evaluation": lambda dtype: len(_runs(dtype)),
    "layers": lambda dtype: 4 if dtype == TRUTH else 5,
    "training": lambda dtype: len(_runs(dtype)),
}


def _steps(progress: Progress | None, *, total: int) -> Callable[..., None]:
    done = count()

    def step(what: str, *, again: bool = False) -> None:
        nonlocal total
        if again:
            total += 1
        if progress is not None:
            progress(what, next(done), total)

    return step


def load_torch_weights(jax_model: Any, torch_model: Any, names: Given | None = None) -> Any:
    """Give a JAX model the weights of its PyTorch twin; see `outlook_parity.pair.load_torch_weights`."""
    from outlook_parity import pair

    return pair.load_torch_weights(jax_model, torch_model, names)


def versions() -> dict[str, str]:
    """Return what everything was computed with."""
    packages = {}
    for name in ("numpy", "torch", "jax", "jaxlib", "flax"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}
