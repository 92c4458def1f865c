"""Read, match, convert and write weights without a framework."""

from outlook_common.weights.conversion import Conversion, convert
from outlook_common.weights.errors import Problem, WeightsError
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
