"""Weights without a framework: one table per model, the files they come in, and the way between namings."""

from outlook_common.weights.conversion import Conversion, convert
from outlook_common.weights.errors import Problem, WeightsError
from outlook_common.weights.formats.registry import read_arrays, write_arrays
from outlook_common.weights.identify import table_for
from outlook_common.weights.match import resolve
from outlook_common.weights.tables.base import Entry, WeightTable

__all__ = [
    "Conversion",
    "Entry",
    "Problem",
    "WeightTable",
    "WeightsError",
    "convert",
    "read_arrays",
    "resolve",
    "table_for",
    "write_arrays",
]
