"""A VOLO's configuration from a TOML or JSON file."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlook_common.config import VOLOConfig, volo_config, with_tuples
from outlook_common.text import printable
from outlook_common.weights.checkpoint import Shapes
from outlook_common.weights.formats.base import PathLike
from outlook_common.weights.identify import as_in_file

_PARSERS = {".toml": tomllib.loads, ".json": json.loads}
# Fields that a checkpoint shows, and that need not be given.
_OF_FILE = ("img_size", "num_classes", "in_chans")


def config_of(fields: Mapping[str, Any]) -> VOLOConfig:
    """Return the configuration with these fields; with `variant`, the others are changes to that released one.

    Raises:
        TypeError: a field is unknown, or missing.
        ValueError: the fields contradict each other, or the variant is unknown.
    """
    given = with_tuples(fields)
    return volo_config(given.pop("variant"), **given) if "variant" in given else VOLOConfig(**given)


def read_config(source: PathLike | Mapping[str, Any] | VOLOConfig, shapes: Shapes) -> VOLOConfig:
    """Return the configuration that a user gives for a checkpoint.

    Args:
        source: a `.toml` or `.json` file, or a mapping, of fields of `VOLOConfig`, at the top or in the table `model`;
            or the configuration itself.
        shapes: of the checkpoint, which show image size, class count and channels where `source` does not.

    Raises:
        ValueError: the file is of another kind or cannot be parsed, or the fields are unknown, missing or
            contradictory.
        OSError: the file cannot be opened.
    """
    if isinstance(source, VOLOConfig):
        return source
    label, fields = ("the given configuration", source) if isinstance(source, Mapping) else _read(Path(source))
    if isinstance(inner := fields.get("model"), Mapping):
        fields = inner
    try:
        config = config_of(fields)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{label}: {str(error).removeprefix('VOLOConfig.__init__() ')}") from error
    shown = as_in_file(config, shapes)
    return replace(config, **{name: getattr(shown, name) for name in _OF_FILE if name not in fields})


def _read(path: Path) -> tuple[str, Mapping[str, Any]]:
    if (parse := _PARSERS.get(path.suffix.lower())) is None:
        raise ValueError(f"{path}: a configuration is a file in {' or '.join(_PARSERS)}")
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as {path.suffix[1:].upper()}: {printable(error)}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: it holds {type(found).__name__}, expected fields of VOLOConfig by name")
    return str(path), found
