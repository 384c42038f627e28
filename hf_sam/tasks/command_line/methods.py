"""List the methods: name, gradient passes per step, copies of the weights, and what each does."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence

from .help import terminal_width
from .parsers import Parser

STEPS = 1000  # of a long run, over which passes are averaged


def main(argv: Sequence[str]) -> None:
    parser = Parser("methods", description=__doc__)
    parser.add_argument("--json", action="store_true", help="Print JSON, with paper and default rho.")
    as_json = parser.parse_args(argv).json
    rows = list(method_rows())
    print(json.dumps(rows, indent=1, ensure_ascii=False) if as_json else table(rows))


def method_rows() -> Iterator[dict]:
    """Yield each method with its defaults."""
    from ...config import SAMConfig
    from ...methods import METHODS
    from ...update.schedule import Schedule

    for name, row in METHODS.items():
        config = SAMConfig(method=name)
        schedule = Schedule.resolve(config, STEPS)
        yield {
            "method": name,
            "passes": round(sum(map(schedule.passes, range(STEPS))) / STEPS, 2),
            "at_most": config.parts.ascent.may_skip,  # it may skip passes
            "copies": config.parts.copies,
            "rho": config.rho,
            "summary": row.summary,
            "paper": row.paper,
        }


def table(rows: Sequence[dict]) -> str:
    """Format the rows for a terminal."""
    width = terminal_width()
    lead = max(len(row["method"]) for row in rows) + 2
    lines = [f"{'method':<{lead}}{'passes':<9}{'copies':<8}what it does"]
    for row in rows:
        passes = f"{'<= ' if row['at_most'] else ''}{row['passes']:g}"
        begin = f"{row['method']:<{lead}}{passes:<9}{row['copies']:<8}"
        lines.append(begin + textwrap.shorten(row["summary"], max(width - len(begin), 40), placeholder=" ..."))
    note = "Passes: mean per optimizer step. Copies: of the perturbed weights, beyond stock training."
    return "\n".join([*lines, "", note])
