"""The findings for a person, and for a program.

Invariant: the text form has one line per finding, and its fix in the next.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from sidecar.doctor.finding import Check, Finding, Verdict

WIDTH = 120
VERDICT_COLUMN = max(map(len, Verdict)) + 2
INDENT = " " * (VERDICT_COLUMN + max(map(len, Check)) + 2)


def worst(findings: Iterable[Finding]) -> Verdict:
    """What the whole report says: fail before warn before ok."""
    verdicts = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in verdicts), Verdict.OK)


def as_text(findings: Sequence[Finding]) -> str:
    """Aligned lines, and a count of the verdicts at the end."""
    lines = [line for finding in findings for line in _lines(finding)]
    counts = Counter(finding.verdict for finding in findings)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    return "\n".join([*lines, "", summary])


def _lines(finding: Finding) -> Iterable[str]:
    label = f"{finding.verdict:<{VERDICT_COLUMN}}{finding.check}".ljust(len(INDENT))
    yield _wrapped(finding.reason, label, INDENT)
    if finding.fix:
        yield _wrapped(finding.fix, f"{INDENT}-> ", f"{INDENT}   ")


def _wrapped(text: str, first: str, others: str) -> str:
    """Flags and paths stay whole, so that they can be copied."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )


def as_json(findings: Sequence[Finding]) -> str:
    """One object: the worst verdict, and every finding."""
    listed = [
        {"check": finding.check, "verdict": finding.verdict, "reason": finding.reason, "fix": finding.fix}
        for finding in findings
    ]
    return json.dumps({"verdict": worst(findings), "findings": listed}, indent=2)
