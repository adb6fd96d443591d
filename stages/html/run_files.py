"""What a report is drawn from: the files of a run. Reads, never measures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ...errors import fail
from ..config import RunConfig
from ..recipe import dump, load_saved


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run's files, read."""

    name: str
    config: RunConfig
    report: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """config.yaml, as it was run."""
        return dump(self.config)


def read_run(folder: Path, suite: str | None = None) -> RunFiles:
    """Reads a run's files.

    Args:
        suite: draw report-SUITE.json; left out, the full suite's where it measured this artifact, else report.json.

    Raises:
        ValueError: no run, or one that was not evaluated.
    """
    if not (folder / "config.yaml").is_file():
        raise fail("report", "must be a run directory", str(folder), "Point to the folder with config.yaml.")
    config = load_saved(folder)
    names = config.stage_names()
    done = {name: _json(folder / name / "DONE") for name in names}
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    log = (folder / "log.txt").read_text().splitlines() if (folder / "log.txt").is_file() else []
    return RunFiles(
        name=folder.resolve().name,
        config=config,
        report=_report(folder, suite),
        metrics=_metrics(lines, folder / "metrics.jsonl"),
        plan=_json(folder / "plan.json") or {},
        env=_json(folder / "env.json") or {},
        summaries={name: record["summary"] for name, record in done.items() if record},
        seconds=stage_seconds(log, names),
    )


def _metrics(lines: list[str], file: Path) -> list[dict[str, Any]]:
    """The steps' numbers; a last line that is not whole yet is left out, for the run may be writing it."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                got = repr(line[:60])
                raise fail(f"{file}, line {number}", "must be a line of JSON", got, "Delete that line.") from error
    return found


def _report(folder: Path, suite: str | None) -> dict[str, Any]:
    usual = _json(folder / "report.json")
    if suite is not None:
        report = _json(folder / f"report-{suite}.json")
        if report is None and usual and usual.get("stamp", {}).get("evaluate", {}).get("suite") == suite:
            report = usual
    else:
        full = _json(folder / "report-full.json")
        artifacts = {r.get("stamp", {}).get("artifact") for r in (full, usual) if r is not None}
        same = full is not None and len(artifacts) == 1
        report = full if same else usual
    if report is None:
        do = f"Run: ssmorph eval {folder}" + (f" --suite {suite}" if suite else "")
        raise fail("report", "must be an evaluated run", f"{folder} without its report", do)
    return report


def _json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise fail(str(file), "must be JSON", error, "Delete it: it is made again.") from error


def stage_seconds(log: list[str], names: list[str]) -> dict[str, float]:
    """Wall time of each stage from the log's times; pauses between an interruption and its resumption do not count."""
    seconds = dict.fromkeys(names, 0.0)
    current, before = "", None
    for line in log:
        try:
            now = datetime.fromisoformat(line[:19])
        except ValueError:
            continue
        text = line[20:]
        if text.endswith(": starting"):
            current = text.removesuffix(": starting")
        elif text.startswith(("evaluate:", "done:", "data:")):
            current = ""
        elif current in seconds and before is not None:
            seconds[current] += (now - before).total_seconds()
        before = now
    return seconds
