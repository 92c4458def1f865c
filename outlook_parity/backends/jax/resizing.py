"""Note how JAX models resize maps: by the functions of `jax.image`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from outlook_parity.core.resizing import CUBIC, JAX_A, SCALE, TORCH_A, resizing

# Its nearest takes the place whose centre is nearest, PyTorch's "nearest" the one at the corner.
_NEAREST = "nearest-exact"


@contextmanager
def listening(note: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `note` with the attributes of every resizing meanwhile."""
    resize, scale_and_translate = jax.image.resize, jax.image.scale_and_translate
    made: list[tuple[Any, np.ndarray]] = []  # arrays of plain numbers, whose values a trace hides

    def remembering(make: Callable[..., Any]) -> Callable[..., Any]:
        def call(value: Any, *args: Any, **options: Any) -> Any:
            array = make(value, *args, **options)
            if isinstance(array, jax.core.Tracer) and not any(isinstance(x, jax.Array) for x in jax.tree.leaves(value)):
                made.append((array, np.asarray(value)))
            return array

        return call

    def numbers(scale: Any) -> list[float] | None:
        known = next((values for array, values in made if array is scale), None)
        if known is None and isinstance(scale, jax.core.Tracer):
            return None
        return [float(one) for one in np.asarray(scale if known is None else known)]

    def noted_resize(
        image: Any, shape: Sequence[int], method: Any, antialias: bool = True, *rest: Any, **more: Any
    ) -> Any:
        name, a = _method(method)
        note(resizing(name, image.shape, shape, antialias=antialias, a=a))
        return resize(image, shape, method, antialias, *rest, **more)

    def noted_scale(
        image: Any,
        shape: Sequence[int],
        spatial_dims: Sequence[int],
        scale: Any,
        translation: Any,
        method: Any,
        antialias: bool = True,
        **more: Any,
    ) -> Any:
        name, a = _method(method)
        old, new = ([sizes[axis] for axis in spatial_dims] for sizes in (image.shape, shape))
        scales = numbers(scale)
        found = resizing(name, old, new, scales, antialias=antialias, a=a)
        note({key: value for key, value in found.items() if scales is not None or key != SCALE})
        return scale_and_translate(image, shape, spatial_dims, scale, translation, method, antialias, **more)

    with (
        patch.multiple(jax.image, resize=noted_resize, scale_and_translate=noted_scale),
        patch.multiple(jnp, array=remembering(jnp.array), asarray=remembering(jnp.asarray)),
    ):
        yield


def _method(method: Any) -> tuple[str, float]:
    """Return the name of a method, and the `a` of its cubic kernel."""
    name = str(getattr(method, "name", method)).lower().replace("_", "-")
    if name.endswith("-pytorch"):
        return CUBIC, TORCH_A
    return (_NEAREST if name == "nearest" else name), JAX_A
