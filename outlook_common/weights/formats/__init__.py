"""The kinds of files, one per module; which suffix means which stands in `outlook_common.weights.formats.registry`."""
