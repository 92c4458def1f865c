"""Pairs of twins that `benchmarks.verify` measures the verifier with."""
