"""A self-contained HTML page of sections."""

from collections.abc import Iterable
from html import escape
from string import Template

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.55 system-ui, sans-serif; color: #1e293b; background: #f8fafc; margin: 0; }
main { max-width: 880px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: #475569; }
p.lead { font-size: 18px; color: #0f172a; }
ul { margin: 0; padding-left: 20px; color: #475569; }
section { background: white; border: 1px solid #e2e8f0; border-radius: 12px; padding: 20px 24px; margin-top: 24px; }
svg { width: 100%; height: auto; display: block; font-family: system-ui, sans-serif; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 5em; }
th { font-weight: 600; font-size: 14px; color: #64748b; }
tr:last-child td { border-bottom: none; }
code { font: 14px ui-monospace, monospace; }
</style>
</head>
<body><main>
<h1>$title</h1>
$lead<p>$summary</p>
$sections
</main></body>
</html>
"""
)


def page(title: str, summary: str, sections: Iterable[str], lead: str = "") -> str:
    """A page of sections, opened by a sentence of conclusion."""
    return _PAGE.substitute(
        title=escape(title),
        lead=f'<p class="lead">{escape(lead)}</p>\n' if lead else "",
        summary=escape(summary),
        sections="\n".join(sections),
    )


def section(heading: str, text: str, content: str) -> str:
    """A section of a page; ``content`` is HTML."""
    heading, text = (escape(part, quote=False) for part in (heading, text))
    return f'<section><h2>{heading}</h2><p>{text}</p><div class="wide">{content}</div></section>'


def table_of(columns: Iterable[str], rows: Iterable[list[str]]) -> str:
    """A table as HTML."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
