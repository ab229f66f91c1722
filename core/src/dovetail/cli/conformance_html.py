"""The report of ``dovetail conformance`` as one HTML page that needs no other file."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dovetail.testing.conformance.report import Part, Report, ScenarioResult

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #ddd; }
td:first-child { white-space: nowrap; font-family: ui-monospace, monospace; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; font-size: 13px; }
.passed, .yes { color: #116329; } .failed, .no { color: #b42318; } .skipped { color: #8a6100; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd; } th, td { border-color: #333; } pre { background: #22252a; }
  .passed, .yes { color: #5cc27d; } .failed, .no { color: #ff8a7a; } .skipped { color: #e3b341; }
}
"""


def page(report: Report) -> str:
    """The whole page."""
    title = report.verdict.rstrip(".")
    facts = f"{report.distribution} {report.version}, suites of dovetail-core {report.core}, {report.seconds:.1f} s"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f'<h1 class="{"yes" if report.conforms else "no"}">{escape(title)}</h1><p>{escape(facts)}</p>',
            *(_section(part) for part in report.parts),
            "</body></html>",
        ]
    )


def _section(part: Part) -> str:
    counts = ", ".join(f"{part.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
    problem = f'<p class="no">{escape(part.problem)}</p>' if part.problem else ""
    rows = "\n".join(_row(found) for found in part.scenarios)
    head = "<tr><th>scenario</th><th>behaviour</th><th>outcome</th><th>seconds</th></tr>"
    table = f"<table>{head}{rows}</table>" if rows else ""
    return f"<h2>{escape(part.kind)} {escape(part.name)}</h2><p>{counts}</p>{problem}{table}"


def _row(found: ScenarioResult) -> str:
    return (
        f"<tr><td>{escape(found.scenario)}</td><td>{escape(found.behaviour)}{_failures(found)}</td>"
        f'<td class="{found.outcome}">{found.outcome}{_reason(found)}</td><td>{found.seconds:.2f}</td></tr>'
    )


def _reason(found: ScenarioResult) -> str:
    return f"<br>{escape(', '.join(found.reasons))}" if found.outcome == "skipped" else ""


def _failures(found: ScenarioResult) -> str:
    """Each failed test with its message, unfolded, and the whole story behind it, folded."""
    parts = []
    for test in found.tests:
        if test.outcome == "failed":
            whole = f"<details><summary>all of it</summary><pre>{escape(test.details)}</pre></details>"
            message = f"<pre>{escape(test.test)}\n{escape(test.reason)}</pre>"
            parts.append(message if test.details.strip() == test.reason.strip() else message + whole)
    return "".join(parts)
