"""The page of progress: what docs/progress.toml promises, beside what tests and benchmarks found.

Tests report to build/reports/SESSION.xml when nox runs them. What no report of this build tells is
said to be unknown, never assumed.
"""

from __future__ import annotations

import json
import statistics
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notebooks import executed_facts, sources
from workspace import ROOT

REPORTS = ROOT / "build" / "reports"
PROMISED = ROOT / "docs" / "progress.toml"
ASSETS = ROOT / "docs" / "assets"
HEAD = """\
# Progress

Made by the build of this site from what each phase promises (`docs/progress.toml`), the reports of
the tests that ran before it, the executed notebooks and the data of the benchmarks. No state is
written by hand. "Not run in this build" means just that.

"""
HOLDS, FAILS, UNKNOWN, MISSING = "holds", "**fails**", "not run in this build", "not yet"


@dataclass(frozen=True)
class Test:
    """One test of a report.

    Attributes:
        module: As in "test_cache".
        name: With its parameters.
        outcome: "passed", "failed" or "skipped".
        reason: Why it was skipped.
    """

    module: str
    name: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What one session's tests found."""

    session: str
    tests: tuple[Test, ...]
    seconds: float

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read pytest's XML."""
        suite = next(ET.parse(path).getroot().iter("testsuite"))  # noqa: S314 - written by us
        return cls(
            path.stem, tuple(map(_test, suite.iter("testcase"))), float(suite.get("time", 0))
        )

    def count(self, outcome: str) -> int:
        """Return how many tests ended so."""
        return sum(test.outcome == outcome for test in self.tests)


def reports() -> dict[str, Report]:
    """Return all reports of this build, by session."""
    return {path.stem: Report.read(path) for path in sorted(REPORTS.glob("*.xml"))}


def progress_page() -> str:
    """Return the page, as Markdown."""
    found = reports()
    lines = [HEAD]
    for phase in tomllib.loads(PROMISED.read_text(encoding="utf-8"))["phase"]:
        lines += [f"## {phase['title']}", "", "| promise | state | shown by |", "|---|---|---|"]
        for criterion in phase["criteria"]:
            state, by = judged(criterion, found)
            page = criterion.get("page", phase["page"])
            lines.append(f"| [{criterion['text']}]({page}) | {state} | {by} |")
        lines.append("")
    return "\n".join([*lines, *_tests_table(found), *_notebooks_table()])


def judged(criterion: dict[str, Any], found: dict[str, Report]) -> tuple[str, str]:
    """Return a criterion's state, and what shows it."""
    if "figure" in criterion:
        return FIGURES[criterion["figure"]]()
    if "tests" not in criterion:
        return MISSING, ""
    chosen = [match(pattern, found) for pattern in criterion["tests"]]
    shown = ", ".join(f"`{pattern}`" for pattern in criterion["tests"])
    if any(tests is None for tests in chosen):
        return UNKNOWN, shown
    tests = [test for each in chosen for test in each or ()]
    ran = [test for test in tests if test.outcome != "skipped"]
    if any(test.outcome == "failed" for test in ran) or not all(chosen):
        return FAILS, shown
    return f"{HOLDS}: {len(ran):,} tests" if ran else UNKNOWN, shown


def match(pattern: str, found: dict[str, Report]) -> list[Test] | None:
    """Return the tests that "SESSION::module::beginning" names; `None` if it did not run."""
    session, module, beginning = (*pattern.split("::"), "", "")[:3]
    report = found.get(slug(session))
    if report is None:
        return None
    return [
        test
        for test in report.tests
        if (not module or test.module == module) and test.name.startswith(beginning)
    ]


def slug(session: str) -> str:
    """Return the name of a session's report: "tests-ds-moe" for "tests(ds-moe)"."""
    return session.replace("(", "-").replace(")", "")


def _benchmark() -> tuple[str, str]:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    start = page.index("| task | ours |")
    rows = page[start:].partition("\n\n")[0].splitlines()[2:]
    met = sum(row.rstrip(" |").endswith("met") for row in rows)
    return f"{met} of {len(rows)}", "`nox -s bench -- --full`"


def _fp8() -> tuple[str, str]:
    runs = json.loads((ASSETS / "fp8.json").read_text(encoding="utf-8"))["runs"]
    last = {(run["variant"], run["seed"]): run["last"] for run in runs}
    above = [last["FP8", seed] / last["BF16", seed] - 1 for name, seed in last if name == "FP8"]
    mean = 100 * statistics.fmean(above)
    verdict = HOLDS if mean <= 0.25 else FAILS
    return f"{verdict}: {mean:+.2f}%, {len(above)} seeds", "`nox -s precision`"


def _notebooks() -> tuple[str, str]:
    every = sources()
    done = sum(
        source.is_fresh() and executed_facts(source.built)["seconds"] <= 60 * source.minutes
        for source in every
    )
    state = HOLDS if done == len(every) else "in part"
    return f"{state}: {done} of {len(every)}", "`nox -s notebooks`"


FIGURES: dict[str, Callable[[], tuple[str, str]]] = {
    "benchmark": _benchmark,
    "fp8": _fp8,
    "notebooks": _notebooks,
}


def _tests_table(found: dict[str, Report]) -> Iterable[str]:
    yield "## Tests of this build"
    yield ""
    if not found:
        yield "None ran before this build: `nox` runs all of them, then builds the site."
        return
    yield "| session | passed | failed | skipped, and why | seconds |"
    yield "|---|---|---|---|---|"
    for report in found.values():
        reasons = sorted({test.reason for test in report.tests if test.outcome == "skipped"})
        skipped = f"{report.count('skipped')}: {'; '.join(reasons)}" if reasons else "0"
        yield (
            f"| `{report.session}` | {report.count('passed'):,} | {report.count('failed')} | "
            f"{skipped.replace('|', '/')} | {report.seconds:.0f} |"
        )
    yield ""


def _notebooks_table() -> Iterable[str]:
    yield "## Notebooks"
    yield ""
    yield "| notebook | executed in | stated |"
    yield "|---|---|---|"
    for source in sources():
        seconds = f"{executed_facts(source.built)['seconds']:.0f} s" if source.is_fresh() else "-"
        page = f"notebooks/{source.path.parent.name}/{source.path.stem}.md"
        yield f"| [{source.title}]({page}) | {seconds} | {60 * source.minutes:.0f} s |"
    yield ""


def _test(case: ET.Element) -> Test:
    module = case.get("classname", "").rpartition(".")[2]
    skipped = case.find("skipped")
    if skipped is not None:
        return Test(module, case.get("name", ""), "skipped", skipped.get("message", ""))
    failed = case.find("failure") is not None or case.find("error") is not None
    return Test(module, case.get("name", ""), "failed" if failed else "passed")
