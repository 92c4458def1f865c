"""Pairs of models that nobody of this project wrote; run by `make test-world` in a virtual environment of its own."""
