"""All runs of one pair of twins: what runs, in which precision, and the rows that it gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from outlook_parity.compare import excused
from outlook_parity.compare import residue as residues
from outlook_parity.compare import tensors as compare
from outlook_parity.compare.determinism import compare_repeated, compare_self, self_noise
from outlook_parity.compare.modules import Suspect, shown_path, verify_modules
from outlook_parity.core.attributes import Difference, differences
from outlook_parity.core.check import TWINS, Check, SelfNoise, Tensors
from outlook_parity.core.dropout import LARGEST, Draw, cannot_be_shared, has_single_numbers_alone
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.core.plan import Plan, Progress, run_counter
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.request import Inputs, Request, positions_and_size
from outlook_parity.core.runner import Run, Runner
from outlook_parity.core.sizes import resized
from outlook_parity.diagnose import causes
from outlook_parity.diagnose.precision import unrounded
from outlook_parity.diagnose.program.facts import Programs, programs_of
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
        self._unused: frozenset[str] = frozenset()
        self._stopped: frozenset[str] | None = None  # JAX's gradients that are exactly zero, None before any
        self._keep_all = False
        self._single: float | None = None  # what single random numbers are in training, None where they are shared
        self._traced: Programs | None = None
        self.notes: list[str] = list(pair.notes)

    def run(self) -> None:
        """Compare the weights, and run all passes of the plan."""
        torch, jax = (self.weights[twin] | self._pair.constants[twin] for twin in TWINS)
        self.checks += compare.compare_weights(torch, jax, self._pair.names.expected)
        methods = {"evaluation": self._evaluate, "layers": self._compare_modules, "training": self._train}
        for name, dtype in self._plan.passes:
            methods[name](dtype)
        self._step("")
        truths = {twin: self._runner(twin).truth for twin in TWINS}
        residue = residues.excuse(self.checks, self._suspects, truths)
        self.checks, self._suspects = residue.checks, residue.suspects
        self.notes += residue.notes

    def _evaluate(self, dtype: str) -> None:
        """Compare outputs and gradients in eval mode."""
        levels = self._plan.levels_of("evaluation")

        def compute(label: str, request: Request) -> dict[str, Tensors]:
            if label in TWINS:
                run = self._run_and_repeat(label, request, gradients="gradients" in levels)
                self._note_gradients(label, run)
                self.checks += self._dtype_rows(label, request.dtype, run)
            else:
                run = self._runner(label).run(request, gradients="gradients" in levels)
            return {"forward": run.outputs, "gradients": run.gradients}

        rows = self._compare("evaluation", levels, dtype, compute)
        if dtype == TRUTH and "forward" in levels:
            self.checks += compare_repeated(dtype, {twin: run.repeated for twin, run in self._jitted[dtype].items()})
        self.checks = excused.with_unused([*self.checks, *rows], self._unused)

    def _note_gradients(self, twin: str, run: Run) -> None:
        """Keep which parameters no output depends on, and which gradients are exactly zero in JAX."""
        self._unused |= run.unused
        if twin == "jax" and run.gradients and self._stopped is None:
            self._stopped = frozenset(name for name, gradient in run.gradients.items() if not gradient.any())

    def _frozen(self) -> frozenset[str]:
        """Return the parameters that are frozen in PyTorch, and through which no gradient flows in JAX."""
        frozen = self._pair.torch.frozen
        if frozen and self._stopped is None:
            self._step("gradients: jax, for what is frozen in torch", extra=True)
            self._note_gradients("jax", self._runner("jax").run(self._request(TRUTH, TRUTH), gradients=True))
        return frozen & (self._stopped or frozenset())

    def _train(self, dtype: str) -> None:
        """Compare losses, weights and optimizer state after training steps."""

        def compute(label: str, request: Request) -> dict[str, Tensors]:
            result = self._runner(label).train(replace(request, frozen=self._frozen()))
            if label in TWINS:
                self._draws[label] = result.draws
                if request.dtype == TRUTH:
                    self._trained[label] = result.tensors
                for optimizer in OPTIMIZERS:
                    losses = result.tensors[f"{optimizer}: losses"]
                    self.curves.setdefault(optimizer, {}).setdefault(label, losses.tolist())
            return {"training": result.tensors}

        levels = self._plan.levels_of("training")
        rows = self._compare("training", levels, dtype, compute)
        if self._single is None and self._single_numbers_decide_nothing(dtype):
            self._single = 0.0
            self.notes.append(
                "torch draws single random numbers in training that JAX does not, as for LayerDrop: they decide nothing"
            )
            rows = self._compare("training", levels, dtype, compute, extra=True)
        reason = cannot_be_shared(self._draws["torch"], self._draws["jax"])
        if reason and not self._keep_all:
            self._keep_all = True
            self.notes.append(
                f"nothing was dropped in training, whose masks the twins cannot share: {reason}; what dropout keeps "
                "was multiplied by 1/(1-rate) in both"
            )
            rows = self._compare("training", levels, dtype, compute, extra=True)
        self.checks = excused.with_unused([*self.checks, *rows], self._unused)

    def _single_numbers_decide_nothing(self, dtype: str) -> bool:
        """Whether torch alone draws single numbers, and trains alike whether they are the least or the largest."""
        if not has_single_numbers_alone(self._draws["torch"], self._draws["jax"]):
            return False
        self._step("training: torch with other single random numbers", extra=True)
        request = self._request(dtype, dtype)
        try:
            least, most = (self._pair.torch.train(replace(request, single=one)).tensors for one in (0.0, LARGEST))
        except (TypeError, ValueError):  # as where all layers are left out, and nothing has a gradient
            return False
        return all(np.array_equal(least[name], most[name], equal_nan=True) for name in least)

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

    def _compare(
        self, name: str, levels: Sequence[str], dtype: str, compute: Compute, *, extra: bool = False
    ) -> list[Check]:
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
            found = [check for checks in compared for check in checks]
            return excused.with_frozen(found, self._frozen()) if "gradients" in levels else found

        labels = dict.fromkeys(TWINS, dtype) | ({} if dtype == TRUTH else {"truth": TRUTH})
        for label, run_dtype in labels.items():
            self._step(f"{name}: {label} in {run_dtype}", extra=extra)
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
        return Request(
            self._inputs,
            run_dtype,
            place,
            plan.seed,
            rounded_to=dtype,
            steps=plan.steps,
            keywords=self._pair.keywords,
            keep_all=self._keep_all,
            single=self._single,
            masks=self._pair.masks.by_output,
            positions=self._pair.masks.positions,
        )

    def _runner(self, label: str) -> Runner:
        """Return the runner for a label; "truth", "up" and "down" are of the twin that computes the truth."""
        twin = label if label in TWINS else self._pair.truth
        return self._pair.jax if twin == "jax" else self._pair.torch

    def _floating(self, outputs: Tensors) -> Tensors:
        return {name: array for name, array in outputs.items() if name not in self._integer_outputs}

    def waive(self, ignore: Mapping[str, str]) -> None:
        """Skip the rows that match a pattern, with its reason; see `with_waivers`."""
        self.checks = excused.with_waivers(self.checks, ignore)
        self._suspects = [one for one in self._suspects if excused.is_ignored(shown_path(one.path), ignore) is None]

    def differences(self) -> list[Difference]:
        """Return the attributes that differ between the models."""
        found: dict[str, Difference] = {}
        dtypes = dict.fromkeys(dtype for _, dtype in self._plan.passes)
        # Products in full, and in TF32 where that was requested: a module may set its own.
        for dtype in dict.fromkeys(("float32", *(d for d in dtypes if PRECISIONS[d].products != "full"))):
            found |= {str(one): one for one in self._differing(self._request(dtype, dtype, device="cpu"))}
        return list(found.values())

    def _differing(self, request: Request) -> list[Difference]:
        torch, jax = self._pair.torch.attributes(request), self._pair.jax.attributes(request)
        return differences(torch, jax, self._pair.torch.kinds())

    def explanation(self, differing: list[Difference]) -> causes.Explanation:
        """Return where the twins first diverge, and why, as far as that is known."""
        return causes.explain(
            causes.Evidence(
                wrong=[check for check in self.checks if check.verdict == "mismatch"],
                suspects=sorted(self._suspects, key=lambda suspect: suspect.dtype != TRUTH),
                differences=differing,
                weights=self.weights,
                draws={} if self._keep_all else self._draws,
                trained=self._trained,
                unrounded=unrounded(self.checks),
                wrong_step=self._wrong_step,
                hint=self._pair.names.hint,
                programs=self._programs,
                programs_at=self._programs_at,
                differences_at=self._differences_at,
                kinds=self._pair.torch.kinds(),
            )
        )

    def _programs(self, suspect: Suspect | None) -> Programs | None:
        """Return what both twins compute; None, with a note, where a trace fails.

        Args:
            suspect: in whose precision; None for that of the first pass, and all modules.
        """
        if self._traced is None:
            dtype = self._plan.passes[0][1] if suspect is None else suspect.dtype
            within = "" if suspect is None else suspect.path
            self._traced = self._trace(self._request(dtype, dtype, device="cpu"), within)
        return self._traced

    def _programs_at(self, how: str) -> Programs | None:
        """Return what both twins compute of inputs of another size."""
        inputs = resized(self._inputs).get(how)
        if inputs is None:
            return None
        return self._trace(replace(self._request(TRUTH, TRUTH), inputs=inputs), "")

    def _differences_at(self, how: str) -> list[Difference]:
        """Return the attributes that differ for inputs of another size."""
        inputs = resized(self._inputs).get(how)
        return [] if inputs is None else self._differing(replace(self._request(TRUTH, TRUTH), inputs=inputs))

    def _trace(self, request: Request, within: str) -> Programs | None:
        def keep(path: str) -> bool:
            return not within or path == within or path.startswith(f"{within}.")

        self._step("operations: torch and jax", extra=True)
        try:
            torch, jax = (self._runner(twin).program(request, keep) for twin in TWINS)
        except Exception as error:  # the verdict stands without
            self.notes.append(f"the operations of the twins could not be traced: {error}")
            return None
        return programs_of(torch, jax)

    def _wrong_step(self, suspect: Suspect) -> str | None:
        """Return the step inside a suspect of this package that is wrong."""
        x = self._module_inputs.get((suspect.dtype, suspect.path))
        if x is None:
            return None
        request, path = self._request(suspect.dtype, suspect.dtype, device="cpu"), suspect.path
        with self._pair.torch.module(request, path) as torch, self._pair.jax.module(request, path) as jax:
            return wrong_step(torch, jax, suspect, x)
