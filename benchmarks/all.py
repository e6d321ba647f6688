"""Every benchmark but two, one after another, and a table of what they took.

    python benchmarks/all.py                      # all
    python benchmarks/all.py parsing reward       # these

What a benchmark prints is shown and kept in data/bench/NAME.txt; the table is kept in
data/bench/summary.md. One that fails does not end the others. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from egm_lib.files import project_root, write_text

FOLDER = Path(__file__).parent
SCRIPTS = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
del SCRIPTS["latency_scale"]  # hours on its own: `make latency-scale`
del SCRIPTS["real_size"]  # needs a GPU
HEADER = """\
| benchmark | exit status | wall s | CPU s | peak MiB |
|---|---|---|---|---|
"""


def run(script: Path, log: Path) -> tuple[int, float, float, float]:
    """(exit status, wall seconds, CPU seconds, peak MiB of its largest process)."""
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s, cpu_s = time.monotonic() - began, used.ru_utime + used.ru_stime
    return process.returncode, wall_s, cpu_s, used.ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/all.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}")
    names = parser.parse_args().names or list(SCRIPTS)
    if unknown := set(names) - set(SCRIPTS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    out = project_root() / "data" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    rows, failed = "", False
    for name in names:
        print(f"== {name}", flush=True)
        status, *cost = run(SCRIPTS[name], out / f"{name}.txt")
        failed |= status != 0
        rows += f"| {name} | {status} | " + " | ".join(f"{each:,.0f}" for each in cost) + " |\n"
        write_text(out / "summary.md", HEADER + rows)
    print(f"\n{HEADER}{rows}\nkept in {out.relative_to(project_root())}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
