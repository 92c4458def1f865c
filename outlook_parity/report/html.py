"""Report as one HTML page: no network, no other file."""

import json
from importlib.resources import files
from typing import Any

TEMPLATE = "page.html"
PLACEHOLDER = '<script type="application/json" id="report">REPORT</script>'


def render(report: dict[str, Any]) -> str:
    """Return the page of a report.

    Args:
        report: `Report.to_json` as a mapping, with "title", "sentence" and "advice" beside it.
    """
    # A script element takes its text as it is: "</script>" in a name would end it.
    data = json.dumps(report, allow_nan=False).replace("<", "\\u003c")
    template = files("outlook_parity.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return template.replace(PLACEHOLDER, PLACEHOLDER.replace("REPORT", data))
