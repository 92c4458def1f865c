"""The parts of an Optax optimizer, recognised by the transformations it is made of.

Not by its state: Adamax, NAdam, RAdam, Yogi and LAMB keep theirs in `ScaleByAdamState`, as Adam does, and mean
something else by it. Optax's transformations are functions in functions: which one it is stands in the name of the
outer one, and what it was made with in the variables that the inner one closes over.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from outlook_common.weights.train_states import ADAM, SGD
from outlook_common.weights.training import not_carried

Variables = Mapping[str, Any]
Update = Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """A transformation with a state.

    Attributes:
        name: Optax's.
        moments: kind, as PyTorch calls it -> the moments of all parameters.
        step: the number of steps it has made; None if it does not count them.
        counts: all counters of steps.
        accumulated: the number of gradients accumulated for the next step; None if it does not do so.
        zeroed: what is zero after a whole step.
    """

    name: str
    moments: Mapping[str, Any] = field(default_factory=dict)
    step: Any = None
    counts: tuple[Any, ...] = ()
    accumulated: Any = None
    zeroed: tuple[Any, ...] = ()


def parts_of(optimizer: nnx.Optimizer[Any]) -> Iterator[Part]:
    """Yield the parts of an optimizer that have a state which is carried, or set to the step.

    Raises:
        TypeError: it has a part that is neither, or that makes Adam or SGD another optimizer.
    """
    return _parts(optimizer.tx.update, optimizer.opt_state)


def _parts(update: Update, state: Any) -> Iterator[Part]:
    name, variables = _made_by(update)
    if (own := _OWN.get(name)) is not None:
        yield own(name, variables, state)
    for inner, its_state in _WRAPPERS.get(name, _nothing_inside)(variables, state):
        yield from _parts(inner, its_state)
    if own is None and name not in _WRAPPERS and name not in _CHANGING_GRADIENTS:
        is_users = not name.startswith(_OPTAX)
        if not is_users or _has_state(state):
            raise not_carried(f"or has the part {name}" if is_users else f"optax's {name.removeprefix(_OPTAX)}")


def _made_by(update: Update) -> tuple[str, Variables]:
    """Return which transformation has this update function, "optax.…" for Optax's, and what it was made with."""
    if (owner := getattr(update, "__self__", None)) is not None:
        name, variables = type(owner).__name__, {"self": owner}
    else:
        name = getattr(update, "__qualname__", type(update).__name__).partition(".<locals>")[0]
        cells = getattr(update, "__closure__", None) or ()
        names = update.__code__.co_freevars if cells else ()
        variables = dict(zip(names, (cell.cell_contents for cell in cells), strict=True))
    package = (getattr(owner or update, "__module__", None) or "").partition(".")[0]
    return f"{package}.{name}", variables


_OPTAX = "optax."


def _has_state(state: Any) -> bool:
    import jax

    return bool(jax.tree.leaves(state))


# Transformations that keep what is carried, or count steps.


def _adam(name: str, variables: Variables, state: Any) -> Part:
    if variables.get("nesterov"):
        raise not_carried("optax's scale_by_adam(nesterov=True), which is NAdam")
    moments = dict(zip(ADAM, (state.mu, state.nu), strict=True))
    return Part(name, moments, state.count, (state.count,))


def _trace(name: str, variables: Variables, state: Any) -> Part:
    return Part(name, {SGD[0]: state.trace})


def _counter(name: str, variables: Variables, state: Any) -> Part:
    return Part(name, counts=(state.count,) if "count" in getattr(state, "_fields", ()) else ())


def _injected(name: str, variables: Variables, state: Any) -> Part:
    schedules = getattr(state, "hyperparams_states", {}).values()
    counts = tuple(schedule.count for schedule in schedules if type(schedule).__name__ == "WrappedScheduleState")
    return Part(name, counts=(state.count, *counts))


def _multi_steps(name: str, variables: Variables, state: Any) -> Part:
    import jax

    accumulated = jax.tree.leaves(state.acc_grads, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    step, count = state.gradient_step, state.mini_step
    return Part(name, step=step, counts=(step,), accumulated=count, zeroed=(count, *accumulated))


_OWN: dict[str, Callable[[str, Variables, Any], Part]] = {
    "optax.scale_by_adam": _adam,
    "optax.trace": _trace,
    "optax.scale_by_schedule": _counter,
    "optax.add_decayed_weights": _counter,
    "optax.inject_hyperparams": _injected,
    "optax.MultiSteps": _multi_steps,
}

# Wrappers that leave the state of what they wrap whole: what is inside.

Inside = Iterable[tuple[Update, Any]]


def _nothing_inside(variables: Variables, state: Any) -> Inside:
    return ()


def _made_anew(variables: Variables, state: Any) -> Inside:
    return [
        (variables["inner_factory"](**variables["other_hps"], **_values(state.hyperparams)).update, state.inner_state)
    ]


def _values(hyperparams: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "get_value", lambda value=value: value)() for name, value in hyperparams.items()}


_WRAPPERS: dict[str, Callable[[Variables, Any], Inside]] = {
    "optax.with_extra_args_support": lambda made, state: [(made["tx"].update, state)],
    "optax.chain": lambda made, state: zip(made["update_fns"], state, strict=True),
    "optax.named_chain": lambda made, state: [(tx.update, state[name]) for name, tx in made["transforms"]],
    "optax.masked": lambda made, state: [(made["inner"].update, state.inner_state)],
    "optax.partition": lambda made, state: [
        (tx.update, state.inner_states[label].inner_state) for label, tx in made["transforms"].items()
    ],
    "optax.apply_if_finite": lambda made, state: [(made["inner"].update, state.inner_state)],
    "optax.inject_hyperparams": _made_anew,
    "optax.MultiSteps": lambda made, state: [(made["self"].inner_opt.update, state.inner_opt_state)],
}

# Transformations beside them that keep no moments and make no other optimizer: what they do is a hyperparameter.
_CHANGING_GRADIENTS = {
    f"optax.{name}"
    for name in (
        "identity", "set_to_zero", "scale", "clip", "clip_by_block_rms", "clip_by_global_norm", "adaptive_grad_clip",
        "per_example_global_norm_clip", "zero_nans", "keep_params_nonnegative", "centralize", "stateless",
        "stateless_with_tree_map",
    )
}  # fmt: skip
