"""Errors from user code, re-raised with model, shapes and line."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # frames below are the verifier's own


@contextmanager
def user_code_errors(framework: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Re-raise errors from user code with the model, its input shapes and the line.

    Raises:
        TypeError: in place of one.
        ValueError: in place of anything else.
    """
    try:
        yield
    except Exception as error:
        given = ", ".join(f"{name} of shape {tuple(shape)}" for name, shape in shapes.items())
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        own = (str(PACKAGE), "<")
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "site-packages" not in frame.filename and not frame.filename.startswith(own)
        ]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"the {framework} model fails on {given}: {what}{where}") from error
