"""What every command returns: 0 pass, 1 mismatch, 2 error (bad file, bad usage), 3 asked for and not run."""

MISMATCH, ERROR, NOT_RUN = 1, 2, 3

OF_VERDICTS = {"pass": 0, "mismatch": MISMATCH, "not-run": NOT_RUN}
