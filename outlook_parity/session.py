"""All runs of one pair of twins: what runs, in which precision, and the rows that it gives."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from outlook_parity.compare import residue as residues
from outlook_parity.compare import tensors as compare
from outlook_parity.compare.determinism import compare_repeated, compare_self, self_noise
from outlook_parity.compare.modules import Suspect, verify_modules
from outlook_parity.core.attributes import Difference, differences
from outlook_parity.core.check import TWINS, Check, SelfNoise, Tensors
from outlook_parity.core.dropout import Draw
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.core.plan import Plan, Progress, run_counter
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.request import Inputs, Request, positions_and_size
from outlook_parity.core.runner import Run, Runner
from outlook_parity.diagnose import causes
from outlook_parity.diagnose.precision import unrounded
from outlook_parity.models.registry import wrong_step

if TYPE_CHECKING:
    from outlook_parity.pair import Pair

# Of a runner's label and a request: what each level of a pass compares.
Compute = Callable[[str, Request], dict[str, Tensors]]


class Session:
    """All runs of one pair of twins.

    Attributes:
        checks: the rows that they gave.
        self_noise: how far each twin is from itself.
        curves: optimizer -> twin -> losses, in the first precision that was trained in.
        weights: of each twin, as given.
        notes: on differences that are excused, and on truths that are none.
    """

    def __init__(self, pair: "Pair", inputs: Inputs, plan: Plan, progress: Progress | None = None) -> None:
        self.checks: list[Check] = []
        self.self_noise: list[SelfNoise] = []
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.weights = {"torch": pair.torch.weights(), "jax": pair.jax.weights()}
        self._pair, self._inputs, self._plan = pair, inputs, plan
        self._step = run_counter(progress, plan.runs)
        self._jitted: dict[str, dict[str, Run]] = {}  # per precision and twin, as a user computes it
        self._integer_outputs: set[str] = set()
        self._suspects: list[Suspect] = []
        self._module_inputs: dict[tuple[str, str], np.ndarray] = {}  # by precision and suspect's path, in JAX's layout
        self._draws: dict[str, Sequence[Draw]] = {}
        self._trained: dict[str, Tensors] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        """Compare the weights, and run all passes of the plan."""
        self.checks += compare.compare_weights(self.weights["torch"], self.weights["jax"], self._pair.names.expected)
        methods = {"evaluation": self._evaluate, "layers": self._compare_modules, "training": self._train}
        for name, dtype in self._plan.passes:
            methods[name](dtype)
        self._step("")
        truths = {twin: self._runner(twin).truth for twin in TWINS}
        residue = residues.excuse(self.checks, self._suspects, truths)
        self.checks, self._suspects, self.notes = residue.checks, residue.suspects, residue.notes

    def _evaluate(self, dtype: str) -> None:
        """Compare outputs and gradients in eval mode."""
        levels = self._plan.levels_of("evaluation")

        def compute(label: str, request: Request) -> dict[str, Tensors]:
            if label in TWINS:
                run = self._run_and_repeat(label, request, gradients="gradients" in levels)
                self.checks += self._dtype_rows(label, request.dtype, run)
            else:
                run = self._runner(label).run(request, gradients="gradients" in levels)
            return {"forward": run.outputs, "gradients": run.gradients}

        rows = self._compare("evaluation", levels, dtype, compute)
        if dtype == TRUTH and "forward" in levels:
            self.checks += compare_repeated(dtype, {twin: run.repeated for twin, run in self._jitted[dtype].items()})
        self.checks += rows

    def _train(self, dtype: str) -> None:
        """Compare losses, weights and optimizer state after training steps."""

        def compute(label: str, request: Request) -> dict[str, Tensors]:
            result = self._runner(label).train(request)
            if label in TWINS:
                self._draws[label] = result.draws
                if request.dtype == TRUTH:
                    self._trained[label] = result.tensors
                for optimizer in OPTIMIZERS:
                    losses = result.tensors[f"{optimizer}: losses"]
                    self.curves.setdefault(optimizer, {}).setdefault(label, losses.tolist())
            return {"training": result.tensors}

        self.checks += self._compare("training", self._plan.levels_of("training"), dtype, compute)

    def _compare_modules(self, dtype: str) -> None:
        """Compare every module, and each twin run module by module with itself as a user runs it."""
        for twin in TWINS:
            if twin not in self._jitted.get(dtype, {}):
                self._step(f"layers: {twin} as it is, and again", extra=True)
                self._run_and_repeat(twin, self._request(dtype, dtype), gradients=False)
        found = verify_modules(
            self._pair.torch, self._pair.jax, lambda run_dtype: self._request(dtype, run_dtype), dtype, self._step
        )
        truth = found.outputs.get("truth")
        for twin in TWINS:
            jitted, by_module = (self._floating(o) for o in (self._jitted[dtype][twin].outputs, found.outputs[twin]))
            self.checks += compare_self(twin, dtype, jitted, by_module, truth and self._floating(truth))
        self.checks += found.checks
        self._suspects += found.suspects
        self._module_inputs |= {(dtype, path): array for path, array in found.inputs.items()}

    def _compare(self, name: str, levels: Sequence[str], dtype: str, compute: Compute) -> list[Check]:
        """Return the rows of both twins and, in a lower precision, of the truth.

        Where a mismatch may be a jump of the gradients, the truth is computed twice more, perturbed by rounding.
        """
        results: dict[str, dict[str, Tensors]] = {level: {} for level in levels}
        size = positions_and_size(self._inputs)

        def add(label: str, request: Request) -> None:
            computed = compute(label, request)
            for level in levels:
                results[level][label] = computed[level]

        def rows() -> list[Check]:
            compared = (
                compare.compare_level(level, dtype, results[level], size, self._integer_outputs) for level in levels
            )
            return [check for checks in compared for check in checks]

        labels = dict.fromkeys(TWINS, dtype) | ({} if dtype == TRUTH else {"truth": TRUTH})
        for label, run_dtype in labels.items():
            self._step(f"{name}: {label} in {run_dtype}")
            add(label, self._request(dtype, run_dtype))
        checks = rows()
        if any(map(compare.may_be_a_jump, checks)):
            self._step(f"{name}: what rounding can do", extra=True)
            for label, units in (("up", compare.PERTURBATION), ("down", -compare.PERTURBATION)):
                add(label, replace(self._request(dtype, TRUTH), perturbed=units))
            checks = rows()
        return checks

    def _run_and_repeat(self, twin: str, request: Request, *, gradients: bool) -> Run:
        """Run a twin, run it again, and measure how far it is from itself."""
        run = self._runner(twin).run(request, gradients=gradients, repeat=True)
        self.self_noise += self_noise(twin, request.dtype, run.outputs, run.repeated)
        self._integer_outputs |= {output for output, dtype in run.dtypes.items() if "float" not in dtype}
        self._jitted.setdefault(request.dtype, {})[twin] = replace(run, gradients={})
        return run

    def _dtype_rows(self, twin: str, dtype: str, run: Run) -> list[Check]:
        """Return a row for each output that has another dtype than the one computed in."""
        floating = {output: actual for output, actual in run.dtypes.items() if output not in self._integer_outputs}
        rows = (compare.compare_dtype(twin, dtype, actual, output) for output, actual in floating.items())
        return [row for found in rows for row in found]

    def _request(self, dtype: str, run_dtype: str, *, device: str | None = None) -> Request:
        """Return a request for a run in `run_dtype` on numbers rounded to `dtype`; float64 runs on the CPU."""
        plan = self._plan
        place = device or ("cpu" if run_dtype == TRUTH else plan.device)
        return Request(self._inputs, run_dtype, place, plan.seed, rounded_to=dtype, steps=plan.steps)

    def _runner(self, label: str) -> Runner:
        """Return the runner for a label; "truth", "up" and "down" are PyTorch's."""
        return self._pair.jax if label == "jax" else self._pair.torch

    def _floating(self, outputs: Tensors) -> Tensors:
        return {name: array for name, array in outputs.items() if name not in self._integer_outputs}

    def differences(self) -> list[Difference]:
        """Return the attributes that differ between the models."""
        found: dict[str, Difference] = {}
        dtypes = dict.fromkeys(dtype for _, dtype in self._plan.passes)
        # Products in full, and in TF32 where that was requested: a module may set its own.
        for dtype in dict.fromkeys(("float32", *(d for d in dtypes if PRECISIONS[d].products != "full"))):
            request = self._request(dtype, dtype, device="cpu")
            torch, jax = self._pair.torch.attributes(request), self._pair.jax.attributes(request)
            found |= {str(one): one for one in differences(torch, jax, self._pair.torch.kinds())}
        return list(found.values())

    def explanation(self, differing: list[Difference]) -> causes.Explanation:
        """Return where the twins first diverge, and why, as far as that is known."""
        return causes.explain(
            causes.Evidence(
                wrong=[check for check in self.checks if check.verdict == "mismatch"],
                suspects=sorted(self._suspects, key=lambda suspect: suspect.dtype != TRUTH),
                differences=differing,
                weights=self.weights,
                draws=self._draws,
                trained=self._trained,
                unrounded=unrounded(self.checks),
                wrong_step=self._wrong_step,
                hint=self._pair.names.hint,
            )
        )

    def _wrong_step(self, suspect: Suspect) -> str | None:
        """Return the step inside a suspect of this package that is wrong."""
        x = self._module_inputs.get((suspect.dtype, suspect.path))
        if x is None:
            return None
        request, path = self._request(suspect.dtype, suspect.dtype, device="cpu"), suspect.path
        with self._pair.torch.module(request, path) as torch, self._pair.jax.module(request, path) as jax:
            return wrong_step(torch, jax, suspect, x)
