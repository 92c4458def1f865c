"""The report as one HTML page that needs nothing else: no network, no other file."""

import json
from importlib.resources import files
from typing import Any

TEMPLATE = "page.html"
PLACE = '<script type="application/json" id="report">REPORT</script>'


def render(report: dict[str, Any]) -> str:
    """Return the page of a report, which is what its JSON holds, with "title" and "sentence"."""
    # Inside a script element nothing is escaped, and "</script>" in a name would end it.
    data = json.dumps(report, allow_nan=False).replace("<", "\\u003c")
    template = files("outlook_parity.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return template.replace(PLACE, PLACE.replace("REPORT", data))
