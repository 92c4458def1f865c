"""Weights without a framework: one table per model, the files they come in, and the way between namings."""

from outlook_common.weights.convert import Conversion, convert
from outlook_common.weights.errors import Problem, WeightsError
from outlook_common.weights.files import read_arrays, write_arrays
from outlook_common.weights.models import table_for
from outlook_common.weights.resolve import resolve
from outlook_common.weights.table import Entry, WeightTable

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
