"""What ``labkit regress`` found, for people and for machines: a text table, JUnit XML, and one HTML page."""

from __future__ import annotations

import html
import os
from pathlib import Path
from xml.etree import ElementTree

from labkit._files import write_text
from labkit.regress import Report, Result, clean


def write(report: Report) -> None:
    """Write ``report.html`` and ``junit.xml`` to the report's folder, each whole or not at all."""
    write_text(report.out / "report.html", page(report))
    write_text(report.out / "junit.xml", junit(report))


# Text


def line(result: Result) -> str:
    """One line about one notebook."""
    numbers = f"{len(result.metrics)} number{'s' if len(result.metrics) != 1 else ''}"
    return f"{clean(result.name)}: {result.verdict}, {result.seconds:.0f} s, {result.peak / 1e9:.2f} GB, {numbers}"


def table(report: Report) -> str:
    """The notebooks, what is wrong with each, and a verdict in words."""
    head = ("notebook", "verdict", "seconds", "peak GB", "numbers")
    rows = [head] + [(r.name, r.verdict, f"{r.seconds:.1f}", f"{r.peak / 1e9:.2f}", counts(r)) for r in report.results]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row, result in zip(rows, [None, *report.results]):
        name, verdict, seconds, peak, numbers = row
        columns = (f"{name:<{widths[0]}}", f"{verdict:<{widths[1]}}", f"{seconds:>{widths[2]}}", f"{peak:>{widths[3]}}")
        lines.append("  ".join((*columns, numbers)))
        lines += [f"    {problem}" for problem in result.problems] if result else []
    lines += [f"baseline written: {path}" for path in report.updated]
    lines += ["", f"{verdict_in_words(report)} Report: {report.out / 'report.html'}"]
    return clean("\n".join(lines))


def counts(result: Result) -> str:
    """For example ``"11 ok, 1 drift"``."""
    found = [(len(result.of(v)), v) for v in ("ok", "drift", "missing", "new")]
    return ", ".join(f"{n} {v}" for n, v in found if n) or "none"


def verdict_in_words(report: Report) -> str:
    """One or two sentences: is all as it was, and is all of it there?"""
    done, bad = len(report.results), [r for r in report.results if not r.ok]
    left = report.planned - done
    text = f"{done} notebook{'s' if done != 1 else ''} ran in profile {report.profile!r}: "
    if not done:
        text = f"No notebook ran in profile {report.profile!r}"
    elif bad:
        text += f"{done - len(bad)} fine, {len(bad)} not ({', '.join(r.name for r in bad)})"
    else:
        text += "every number agrees with its baseline"
        new = sum(len(r.of("new")) for r in report.results)
        text = (
            text
            if not new
            else text.removesuffix("every number agrees with its baseline")
            + (
                f"nothing failed, and {new} number{'s are' if new != 1 else ' is'} new (`labkit regress --update` keeps them)"
            )
        )
    return text + (f"; {left} did not get to run." if left else ".")


# JUnit XML


def junit(report: Report) -> str:
    """A test suite for each notebook: that it ran, each of its numbers, and its budgets."""
    root = ElementTree.Element("testsuites", name=f"labkit regress ({report.profile})")
    for r in report.results:
        suite = ElementTree.SubElement(root, "testsuite", name=clean(r.name), time=f"{r.seconds:.3f}")
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in (
            ("profile", report.profile),
            ("peak_bytes", str(r.peak)),
            ("machine", report.machine),
            ("versions", report.versions),
        ):
            ElementTree.SubElement(properties, "property", name=name, value=clean(value))
        ran = _case(suite, r, "runs", r.seconds)
        if r.error:
            ElementTree.SubElement(ran, "error", message=clean(r.error), type="timeout" if r.timed_out else "error")
        for m in r.metrics:
            case = _case(suite, r, m.name)
            if m.verdict in ("drift", "missing"):
                ElementTree.SubElement(case, "failure", message=clean(m.text), type=m.verdict)
            ElementTree.SubElement(case, "system-out").text = clean(m.text)
        budget = _case(suite, r, "budget of time and memory")
        if r.over:
            ElementTree.SubElement(budget, "failure", message=clean(" ".join(r.over)), type="budget")
        suite.set("tests", str(len(suite.findall("testcase"))))
        suite.set("errors", str(len(suite.findall("testcase/error"))))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
    for count in ("tests", "errors", "failures"):
        root.set(count, str(sum(int(suite.get(count)) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite, result: Result, name: str, seconds: float = 0.0):
    return ElementTree.SubElement(
        suite, "testcase", classname=clean(f"notebooks.{result.name}"), name=clean(name), time=f"{seconds:.3f}"
    )


# HTML

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
body { color: #1b1f24; background: #fff }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 1.8em 0 .3em }
table { border-collapse: collapse; width: 100% } td.n { text-align: right; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25em .8em .25em 0 } th { font-weight: 600; border-bottom: 1px solid #8886 }
.ok { color: #13693a } .bad { color: #b3261e; font-weight: 600 } .new { color: #7a4b00 }
.small { color: #57606a; font-size: .88em }
.track { fill: #8883 } .fill { fill: #2f6fb0 } .fill.over { fill: #b3261e }
.mark { stroke: currentColor; stroke-dasharray: 2 2 }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #16181b } .ok { color: #6cc38f } .bad { color: #ff8a80 } .new { color: #e3b341 }
  .small { color: #9aa4af } .fill { fill: #6ba6e0 } .fill.over { fill: #ff8a80 }
}
"""


def page(report: Report) -> str:
    """The report as one HTML page that needs nothing else; links lead to the executed notebooks beside it."""
    scale = {
        "seconds": max([report.max_seconds or 0, *(r.alone for r in report.results)], default=0),
        "peak": max([(report.max_gb or 0) * 1e9, *(r.peak for r in report.results)], default=0),
    }
    rows = "".join(_row(r, report, scale) for r in report.results)
    sections = "".join(_section(r, report.out) for r in report.results)
    heads = ("notebook", "verdict", "seconds", "", "peak GB", "", "numbers")
    head = "".join(f"<th>{h}</th>" for h in heads)
    verdict = verdict_in_words(report)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>labkit regress: {"fine" if report.ok else "not fine"}</title><style>{STYLE}</style></head><body>
<h1>labkit regress</h1>
<p class="{"ok" if report.ok else "bad"}">{_escape(verdict)}</p>
<p class="small">{_escape(report.machine)}; {_escape(report.versions)}</p>
<table><tr>{head}</tr>{rows}</table>
<p class="small">Bars: seconds (on a busy machine no more than the notebook's own CPU time explains), and the peak memory of
papermill and the kernel together. The dashed line is the budget.</p>
{sections}</body></html>
"""


def _row(r: Result, report: Report, scale: dict) -> str:
    gb = None if report.max_gb is None else report.max_gb * 1e9
    return (
        f'<tr><td><a href="#{_escape(r.name)}">{_escape(r.name)}</a></td>'
        f'<td class="{"ok" if r.ok else "bad"}">{_escape(r.verdict)}</td>'
        f'<td class="n">{r.seconds:.1f}</td><td>{bar(r.alone, report.max_seconds, scale["seconds"], "seconds")}</td>'
        f'<td class="n">{r.peak / 1e9:.2f}</td><td>{bar(r.peak, gb, scale["peak"], "bytes at peak")}</td>'
        f"<td>{_escape(counts(r))}</td></tr>"
    )


def bar(value: float, budget: float | None, longest: float, what: str, width: int = 120) -> str:
    """A horizontal bar as SVG: ``longest`` fills it, a dashed line marks the budget, over it the bar is red."""
    per = (width - 2) / longest if longest > 0 else 0.0
    over = budget is not None and value > budget
    mark = (
        "" if budget is None else f'<line class="mark" x1="{budget * per:.1f}" x2="{budget * per:.1f}" y1="0" y2="14"/>'
    )
    label = f"{value:.4g} {what}" + ("" if budget is None else f", the budget is {budget:.4g}")
    return (
        f'<svg width="{width}" height="14" role="img" aria-label="{label}"><title>{label}</title>'
        f'<rect class="track" y="3" width="{width}" height="8" rx="2"/>'
        f'<rect class="fill{" over" if over else ""}" y="3" width="{value * per:.1f}" height="8" rx="2"/>{mark}</svg>'
    )


def _section(r: Result, out: Path) -> str:
    problems = "".join(f'<li class="bad">{_escape(p)}</li>' for p in r.problems)
    cells = "".join(
        f"<tr><td>{_escape(m.name)}</td>"
        f'<td class="n">{_number(m.value)}</td><td class="n">{_number(m.expected)}</td>'
        f'<td class="n">{_number(m.tolerance, 2)}</td>'
        f'<td>{_escape(m.label)}</td><td class="{_class(m.verdict)}">{m.verdict}</td></tr>'
        for m in r.metrics
    )
    head = "<tr><th>number</th><th>now</th><th>baseline</th><th>±</th><th>how it was got</th><th>verdict</th></tr>"
    link = ""
    if r.executed:
        name = os.path.relpath(r.executed, out)
        link = f' <a class="small" href="{_escape(name)}">executed notebook</a>'
    return (
        f'<h2 id="{_escape(r.name)}">{_escape(r.name)}{link}</h2>'
        + (f"<ul>{problems}</ul>" if problems else "")
        + (f"<table>{head}{cells}</table>" if cells else "<p>It recorded no numbers.</p>")
    )


def _escape(text: str) -> str:
    return html.escape(clean(text))


def _class(verdict: str) -> str:
    return {"ok": "ok", "new": "new"}.get(verdict, "bad")


def _number(value: float | None, digits: int = 6) -> str:
    return "" if value is None else f"{value:.{digits}g}"
