"""File formats, one per module; `registry` maps suffixes to them."""
