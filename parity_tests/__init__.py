"""Numerical equality of the twins, and every other test."""
