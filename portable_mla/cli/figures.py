"""Figures: what a replay measured, and how it is shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import mean, median

from portable_mla.cli.accuracy import Check
from portable_mla.cli.decode_loop import StepTimes, Workload
from portable_mla.cli.replay import Scheduler, Step
from portable_mla.cli.report import Section


@dataclass
class Figures:
    """One replay, step by step."""

    workload: Workload
    times: list[StepTimes] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    finished: int = 0
    unfinished: int = 0
    waiting: int = 0
    preemptions: int = 0
    pages_returned: bool = False

    def add(self, step: Step, times: StepTimes) -> None:
        """Count one step."""
        self.steps.append(step)
        self.times.append(times)

    def close(self, scheduler: Scheduler, *, unfinished: int, pages_returned: bool) -> None:
        """Count the requests, after the last step."""
        self.finished, self.unfinished, self.waiting = scheduler.finished, unfinished, scheduler.waiting
        self.preemptions, self.pages_returned = scheduler.preemptions, pages_returned

    @property
    def mismatches(self) -> list[Check]:
        """Checks that are out of their bounds."""
        return [check for check in self.checks if not check.passed]

    @property
    def worst_row_rms(self) -> float:
        """Of all checks; infinite if a result was not a number."""
        return max(check.row_rms for check in self.checks)

    @property
    def worst_lse_share(self) -> float:
        """Of all checks; infinite if a result was not a number."""
        return max(check.lse_share for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether every check passed and every page came back."""
        return not self.mismatches and self.pages_returned

    def values(self) -> dict[str, int | float | bool | None]:
        """Every figure by name; errors that are not finite are None."""
        tokens = sum(len(step.requests) for step in self.steps)
        kv_tokens = sum(step.kv_tokens for step in self.steps)
        attention = sum(times.attention for times in self.times)
        total = sum(times.total for times in self.times)
        read = kv_tokens * self.workload.row_bytes * self.workload.layers
        return {
            "steps": len(self.steps),
            "requests_finished": self.finished,
            "requests_unfinished": self.unfinished,
            "requests_waiting": self.waiting,
            "preemptions": self.preemptions,
            "prompt_tokens": sum(tokens for step in self.steps for _, tokens in step.prefills),
            "tokens": tokens,
            "mean_batch": tokens / len(self.steps),
            "mean_context": kv_tokens / tokens,
            "plan_us_mean": 1e6 * mean(times.plan for times in self.times),
            "plan_us_median": 1e6 * median(times.plan for times in self.times),
            "attention_us_mean": 1e6 * mean(times.attention for times in self.times),
            "attention_us_median": 1e6 * median(times.attention for times in self.times),
            "step_us_mean": 1e6 * total / len(self.steps),
            "tokens_per_second": tokens / total,
            "cache_gb_per_second": read / attention / 1e9,
            "checks": len(self.checks),
            "checked_rows": sum(check.rows for check in self.checks),
            "worst_row_rms": _finite(self.worst_row_rms),
            "row_rms_bound": self.checks[0].row_rms_bound,
            "worst_lse_share": _finite(self.worst_lse_share),
            "pages_returned": self.pages_returned,
            "passed": self.passed,
        }

    def sections(self) -> tuple[Section, ...]:
        """What a person reads."""
        return Section("Replay", ("figure", "value"), self._speed()), Section(
            "Accuracy against the float64 reference", ("figure", "value"), self._accuracy()
        )

    def _speed(self) -> tuple[tuple[str, str], ...]:
        values = self.values()
        layers = self.workload.layers
        return (
            ("steps", f"{values['steps']}"),
            ("requests", f"{self.finished} finished, {self.unfinished} cut off, {self.waiting} still waiting"),
            ("preemptions", f"{self.preemptions}"),
            ("tokens", f"{values['tokens']} decoded, {values['prompt_tokens']} prefilled"),
            ("mean batch", f"{values['mean_batch']:.1f} requests"),
            ("mean context", f"{values['mean_context']:.0f} tokens"),
            ("plan", f"{values['plan_us_mean']:.0f} us a step (median {values['plan_us_median']:.0f})"),
            (
                "attention",
                f"{values['attention_us_mean']:.0f} us a step (median {values['attention_us_median']:.0f}), "
                f"{layers} layers",
            ),
            ("plan and attention", f"{values['step_us_mean']:.0f} us a step"),
            ("throughput", f"{values['tokens_per_second']:.0f} tokens/s through the attention of {layers} layers"),
            ("cache read", f"{values['cache_gb_per_second']:.3g} GB/s"),
        )

    def _accuracy(self) -> tuple[tuple[str, str], ...]:
        wrong, rows = self.mismatches, sum(check.rows for check in self.checks)
        bound = self.checks[0].row_rms_bound
        return (
            ("compared", f"{len(self.checks)} steps, one layer each, {rows} rows"),
            ("worst row relative RMS", f"{self.worst_row_rms:.2e} (bound {bound:.2e})"),
            ("worst LSE error", f"{self.worst_lse_share:.3f} of its bound 1e-4 + 2e-6 |lse|"),
            ("pages", "all returned to the pool" if self.pages_returned else "FAILED: some are still owned"),
            ("result", f"FAILED: {len(wrong)} of {len(self.checks)} checks" if wrong else "passed"),
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
