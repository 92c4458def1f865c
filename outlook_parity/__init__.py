"""The verifier: whether two twins compute the same thing. Importing it imports no framework."""

from outlook_parity.report import Check, Noise, Report
from outlook_parity.verify import verify

__all__ = ["Check", "Noise", "Report", "verify"]
