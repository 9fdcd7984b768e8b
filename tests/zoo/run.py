"""Compile the models of the zoo with polyattn, compare with eager, and count what was found.

    python tests/zoo/run.py bert gpt2            # some models (names may be prefixes), a table on the terminal
    python tests/zoo/run.py --write docs/zoo.md  # all of them, and the page
    python tests/zoo/run.py --details FILE ...   # appends every refusal and mismatch with code and graph around it

Each model has a process of its own (:mod:`measure`) and a time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import models
from page import explained, page, table_row
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rows import MARK, MODES, Row

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TIME_LIMIT = 300


def start(wanted: list[tuple[str, str, str]], time_limit: float = TIME_LIMIT) -> list[Row]:
    """Rows (model, implementation, mode) measured in one process; those that do not come back say why."""
    command = [sys.executable, str(HERE / "measure.py"), json.dumps(wanted)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=time_limit, cwd=ROOT, env=environment, check=False
        )
        text, problem = done.stdout, "" if done.returncode == 0 else f"exit {done.returncode}: {last(done.stderr)}"
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        problem = f"stopped after {time_limit:g} s"
    rows = [Row(**json.loads(line.removeprefix(MARK))) for line in text.splitlines() if line.startswith(MARK)]
    have = {(row.model, row.implementation, row.mode) for row in rows}
    return rows + [Row(*key, failure=problem or "no result") for key in wanted if tuple(key) not in have]


def every_row(entry: Any) -> list[tuple[str, str, str]]:
    """All rows of an entry of the zoo."""
    return [(entry.name, implementation, mode) for implementation in entry.implementations for mode in MODES]


def last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def start_all(names: list[str], jobs: int, time_limit: float, details: Path | None) -> list[Row]:
    by_name: dict[str, list[Row]] = {}
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("models", total=len(names))
        waiting = {pool.submit(start, every_row(models.ZOO[name]), time_limit): name for name in names}
        for future in as_completed(waiting):
            name = waiting[future]
            by_name[name] = future.result()
            if details is not None:
                with details.open("a", encoding="utf-8") as file:
                    file.write(explained(by_name[name]))
            progress.update(task, advance=1, description=name)
    return [row for name in names for row in by_name[name]]


def chosen(wanted: list[str]) -> list[str]:
    if not wanted:
        return list(models.ZOO)
    names = [name for name in models.ZOO if any(name == w or name.startswith(w + ",") for w in wanted)]
    return names or [name for name in models.ZOO if any(name.startswith(w) for w in wanted)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the models of the zoo with polyattn and compare with eager.")
    parser.add_argument("names", nargs="*", help="models (all); `llama` also means `llama, padded`")
    parser.add_argument("--write", type=Path, help="write the page here")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--details", type=Path, help="append refusals and differences with code and graphs here")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds for one model")
    options = parser.parse_args()
    begin = time.monotonic()
    rows = start_all(chosen(options.names), options.jobs, options.time_limit, options.details)
    minutes = (time.monotonic() - begin) / 60
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1), encoding="utf-8")
    if options.write:
        options.write.write_text(page(rows, minutes), encoding="utf-8")
    for row in rows:
        print(table_row(row))
    complete = sum(row.complete for row in rows)
    sound = sum(row.sound for row in rows)
    print(f"{complete} of {len(rows)} rows complete, {sound} sound, in {minutes:.1f} minutes")
    return 0 if sound == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
