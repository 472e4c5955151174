"""Results as lines of text: tables of what one model did, and of how another differs from it."""

from collections.abc import Mapping, Sequence
from typing import Any

_NAMING = ("task", "measure", "domain")  # columns of words, which stand on the left


def results_lines(reports: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that `results` returned."""
    lines = []
    left_out: dict[str, str] = {}
    for name, report in reports.items():
        lines += ["", f"== {name}"] if len(reports) > 1 else []
        lines += domain_lines(report["domains"]) + task_lines(report["tasks"])
        left_out |= report["left_out"]
    lines += [f"continuation leaves out {domain}: {reason}" for domain, reason in left_out.items()]
    for comparison in comparisons:
        lines += comparison_lines(comparison)
    return lines


def domain_lines(domains: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Bits per byte by domain: `domains` of a `report`."""
    return _table(
        ["domain", "bits/byte", "95% interval", "perplexity", "nats/token", "tokens", "bytes"],
        [
            [
                domain,
                f"{result['bits_per_byte']:.4f}",
                _interval(result),
                f"{result['perplexity']:.2f}",
                f"{result['nats_per_token']:.4f}",
                f"{result['num_tokens']:,}",
                f"{result['num_bytes']:,}",
            ]
            for domain, result in domains.items()
        ],
    )


def task_lines(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each task's score by domain: `tasks` of a `report`."""
    lines = _table(
        ["task", "domain", "score", "", "95% interval", "chance", "items"],
        [
            [
                name,
                domain,
                task["score"],
                f"{result['score']:.4f}",
                _interval(result),
                f"{result['chance']:.4f}" if "chance" in result else "",
                f"{result['num_items']:,}",
            ]
            for name, task in tasks.items()
            for domain, result in task["domains"].items()
        ],
    )
    lines += [
        f"{name}: {task['truncated']} contexts were cut off at their beginning, to fit the model"
        for name, task in tasks.items()
        if task["truncated"]
    ]
    return lines


def comparison_lines(comparison: Mapping[str, Any]) -> list[str]:
    """How the second model differs from the first: one of `comparisons` in `comparison.json`."""
    heading = f"{comparison['second']} less {comparison['first']}; p paired, and adjusted over a measure's domains"
    return [
        "",
        heading,
        *_table(
            ["measure", "domain", "difference", "95% interval", "p", "adjusted"],
            [
                [
                    measure,
                    domain,
                    f"{found['difference']:+.4f}",
                    _interval(found, "+"),
                    p_value_text(found["p_value"]),
                    p_value_text(found["p_value_holm"]),
                ]
                for measure, domains in comparison["measures"].items()
                for domain, found in domains.items()
            ],
        ),
    ]


def p_value_text(p_value: float) -> str:
    """Four digits; what is smaller than they can say is said to be smaller, for no p-value is 0."""
    return f"{p_value:.4f}" if p_value >= 1e-4 else "<.0001"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An empty line, then columns as wide as they must be; no lines at all without rows."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [""]
    for row in (header, *rows):
        cells = [
            text.ljust(width) if name in _NAMING else text.rjust(width)
            for name, text, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _interval(result: Mapping[str, Any], sign: str = "") -> str:
    """A 95% interval; there is none where all is one document."""
    return "" if result["low"] is None else f"{result['low']:{sign}.4f} {result['high']:{sign}.4f}"
