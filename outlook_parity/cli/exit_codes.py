"""Exit codes of every command: 0 pass, 1 mismatch, 2 error (bad file, bad usage), 3 asked for and not run."""

PASS, MISMATCH, ERROR, NOT_RUN = range(4)

BY_VERDICT = {"pass": PASS, "mismatch": MISMATCH, "not-run": NOT_RUN}
