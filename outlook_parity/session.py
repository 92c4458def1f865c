"""All passes over one pair of twins: what runs, in which precision, and the rows that it gives."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from outlook_parity.compare import tensors as compare
from outlook_parity.compare.determinism import self_noise
from outlook_parity.compare.modules import Suspect, verify_layers
from outlook_parity.compare.tensors import Tensors
from outlook_parity.core.attributes import Difference, differences
from outlook_parity.core.check import TWINS, Check, SelfNoise
from outlook_parity.core.dropout import Draw
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.request import Inputs, Request, places_and_size
from outlook_parity.core.runner import Run
from outlook_parity.diagnose import causes
from outlook_parity.diagnose.precision import unrounded

if TYPE_CHECKING:
    from outlook_parity.core.runner import Runner
    from outlook_parity.pair import Pair

# Which pass over a model gives what each level compares.
LEVELS = {"forward": "evaluation", "layers": "layers", "gradients": "evaluation", "training": "training"}

Progress = Callable[[str, int, int], None]


class Session:
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

    def _twin(self, name: str) -> "Runner":
        """Return the twin that computes this; "truth", "up" and "down" are PyTorch's."""
        return self._pair.jax if name == "jax" else self._pair.torch

    def _run(self, name: str, request: Request, *, gradients: bool) -> Run:
        """Run a twin, and measure how far it is from itself."""
        result = self._twin(name).run(request, gradients=gradients, again=True)
        self.self_noise += self_noise(name, request.dtype, result.outputs, result.again)
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
            for optimizer in OPTIMIZERS:
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
                wrong=wrong,
                suspects=suspects,
                differences=said,
                weights=self.weights,
                draws=self._draws,
                trained=self._trained,
                in_full=unrounded(self.checks),
                wrong_step=self._wrong_step,
                hint=self._pair.names.hint,
            )
        )

    def _wrong_step(self, suspect: Suspect) -> str | None:
        """Return the step inside our own attention that is wrong."""
        from outlook_parity.diagnose.attention_steps import wrong_step

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


def runs_of(which: str, dtype: str) -> int:
    """Return how many runs a pass takes in one precision."""
    return _RUNS[which](dtype)


_RUNS: dict[str, Callable[[str], int]] = {
    "evaluation": lambda dtype: len(_runs(dtype)),
    "layers": lambda dtype: 4 if dtype == TRUTH else 5,
    "training": lambda dtype: len(_runs(dtype)),
}


def steps_of(progress: Progress | None, *, total: int) -> Callable[..., None]:
    """Return what to call before each run: it counts them for `progress`, and those that come again."""
    done = count()

    def step(what: str, *, again: bool = False) -> None:
        nonlocal total
        if again:
            total += 1
        if progress is not None:
            progress(what, next(done), total)

    return step
