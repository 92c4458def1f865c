"""Read, match, convert and write weights without a framework."""

from typing import TYPE_CHECKING

from outlook_common.lazy import lazily
from outlook_common.weights.errors import Problem, WeightsError

if TYPE_CHECKING:
    from outlook_common.weights.conversion import Conversion, convert
    from outlook_common.weights.formats.registry import read_arrays, write_arrays
    from outlook_common.weights.identify import table_for
    from outlook_common.weights.inspection import Inspection, inspect
    from outlook_common.weights.match import resolve
    from outlook_common.weights.tables.base import Entry, WeightTable

__all__ = [
    "Conversion",
    "Entry",
    "Inspection",
    "Problem",
    "WeightTable",
    "WeightsError",
    "convert",
    "inspect",
    "read_arrays",
    "resolve",
    "table_for",
    "write_arrays",
]

if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = lazily(
        __name__,
        {
            "Conversion": "conversion",
            "Entry": "tables.base",
            "Inspection": "inspection",
            "WeightTable": "tables.base",
            "convert": "conversion",
            "inspect": "inspection",
            "read_arrays": "formats.registry",
            "resolve": "match",
            "table_for": "identify",
            "write_arrays": "formats.registry",
        },
    )
