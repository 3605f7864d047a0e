"""What a soak has shown: its verdict, its figures and its Markdown text."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from results_file import markdown_table
from soak_traffic import Outcome

MOST_GROWTH = 0.02  # of the resident memory, from the second quarter of the requests to the last
MOST_TIE = 0.05  # nats between two tokens that rounding may exchange
_MIB = 1 << 20
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """The resident memory when so many requests had been finished: process -> bytes."""

    finished: int
    resident_bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Return the bytes of all processes."""
        return sum(self.resident_bytes.values())

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {size / _MIB:.0f} MiB" for name, size in self.resident_bytes.items())
        return f"{self.finished} requests: {shares}"


@dataclass(frozen=True)
class Parting:
    """Where a served answer left the offline one.

    Attributes:
        model: Name under which it was served.
        prompt: Number of the prompt.
        position: Of the first token that is another one, or missing.
        gap: Nats by which the offline engine preferred its own token there; None if the served one was not
            among its likeliest, or one of the answers ended.
    """

    model: str
    prompt: int
    position: int
    gap: float | None

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.gap is not None and self.gap <= MOST_TIE


@dataclass(frozen=True)
class Soak:
    """Everything that was seen.

    Attributes:
        outcomes: In the order in which they finished.
        samples: Of the memory, in order.
        seconds: From the first request to the last answer.
        unfinished: Requests that the engine still held in the end; None: the server did not answer.
        offline: Answers of the offline engine, see `soak_offline.py`.
    """

    outcomes: Sequence[Outcome]
    samples: Sequence[Sample]
    seconds: float
    unfinished: float | None
    offline: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def answered(self) -> list[Outcome]:
        """Return complete answers, and the beginnings of cancelled ones."""
        return [outcome for outcome in self.outcomes if outcome.status == 200]

    @property
    def partings(self) -> list[Parting]:
        """Return where served answers differ from the offline ones."""
        found = (self._parting(outcome) for outcome in self.answered)
        return [parting for parting in found if parting is not None]

    @property
    def growth(self) -> float:
        """Return by what share the memory grew from the second quarter to the last; the first warms up."""
        quarters: dict[int, list[int]] = {}
        for sample in self.samples:
            quarter = (4 * sample.finished - 1) // self.samples[-1].finished
            quarters.setdefault(quarter, []).append(sample.total)
        return statistics.median(quarters[3]) / statistics.median(quarters[1]) - 1

    def statuses(self) -> dict[str, dict[str, int]]:
        """Return kind of request -> HTTP status -> how many."""
        counts: dict[str, Counter[str]] = {}
        for outcome in self.outcomes:
            counts.setdefault(outcome.request.label, Counter())[str(outcome.status)] += 1
        return {kind: dict(counted) for kind, counted in sorted(counts.items())}

    def figures(self) -> dict[str, Any]:
        """Return every figure, as JSON values."""
        return {
            "requests": len(self.outcomes),
            "seconds": round(self.seconds, 1),
            "statuses": self.statuses(),
            "tokens": sum(len(outcome.tokens) for outcome in self.outcomes),
            "median_seconds": statistics.median(outcome.seconds for outcome in self.answered),
            "resident_bytes": {sample.finished: dict(sample.resident_bytes) for sample in self.samples},
            "memory_growth": self.growth,
            "unfinished": self.unfinished,
            "compared_with_offline": len(self.answered),
            "parted_from_offline": [asdict(parting) for parting in self.partings],
        }

    def _parting(self, outcome: Outcome) -> Parting | None:
        request = outcome.request
        offline = self.offline[request.model][request.prompt]
        expected = offline["tokens"][: request.max_tokens]
        if request.kind == "cancelled":
            expected = expected[: len(outcome.tokens)]
        if outcome.tokens == expected:
            return None
        pairs = enumerate(zip(outcome.tokens, expected, strict=False))
        for position, (token, offline_token) in pairs:
            if token != offline_token:
                likeliest = offline["logprobs"][position]
                is_likely = str(token) in likeliest
                gap = likeliest[str(offline_token)] - likeliest[str(token)] if is_likely else None
                return Parting(request.model, request.prompt, position, gap)
        return Parting(request.model, request.prompt, min(len(outcome.tokens), len(expected)), None)


def find_problems(soak: Soak, original: Soak | None) -> list[str]:
    """Return a line for everything that should not have been.

    Args:
        soak: Of the export.
        original: Of the uncompressed model, more than which the export's memory may not grow.
    """
    unexpected = [outcome for outcome in soak.outcomes if not outcome.is_as_expected]
    lines = [
        f"{outcome.request.label}: status {outcome.status}, {outcome.error}"
        for outcome in unexpected[:_MOST_SHOWN]
    ]
    if len(unexpected) > _MOST_SHOWN:
        lines.append(f"... and {len(unexpected) - _MOST_SHOWN} more of {len(soak.outcomes)} requests")
    if soak.unfinished is None:
        lines.append("the server did not answer in the end")
    elif soak.unfinished:
        lines.append(f"{soak.unfinished:.0f} requests were still in the engine in the end")
    if soak.growth > max(MOST_GROWTH, original.growth if original else 0.0):
        lines.append(f"the memory grew by {soak.growth:.1%} after the warm-up")
    wrong = [parting for parting in soak.partings if not parting.is_tie]
    return lines + [f"another answer than offline: {parting}" for parting in wrong]


def render(title: str, soak: Soak, original: Soak | None, problems: Sequence[str]) -> str:
    """Return the Markdown text."""
    figures, partings = soak.figures(), soak.partings
    rows = [
        [kind, ", ".join(f"{number} x {status}" for status, number in counts.items())]
        for kind, counts in soak.statuses().items()
    ]
    left = "the server was gone"
    if soak.unfinished is not None:
        left = f"the engine held {soak.unfinished:.0f} requests"
    ties = [parting.gap for parting in partings if parting.gap is not None and parting.is_tie]
    same = len(soak.answered) - len(partings)
    worst_tie = max(ties, default=0.0)
    shown = "".join(f"\n- {problem}" for problem in problems) or "nothing."
    return f"""# A soak of the server: {title}

{len(soak.outcomes)} requests to the model and to two LoRA adapters on top, in {soak.seconds:.0f} s;
{figures["tokens"]} tokens came back, half of the answers in less than {figures["median_seconds"]:.2f} s. In
the end {left}.

{markdown_table(["requests", "answers x HTTP status"], rows)}

Greedy answers: {same} of {len(soak.answered)} are token for token what an offline engine answers; {len(ties)}
leave it where two tokens are as likely, up to {worst_tie:.3f} nats ({MOST_TIE} are allowed: rounding
depends on what is computed together).

{_memory_table({"export": soak} | ({} if original is None else {"original": original}))}

What should not have been: {shown}
"""


def _memory_table(soaks: Mapping[str, Soak]) -> str:
    """Return the resident memory of all processes of the server, in MiB, and its growth."""
    rows = []
    for name, soak in soaks.items():
        quarters = soak.samples[len(soak.samples) // 4 - 1 :: len(soak.samples) // 4]
        rows += [
            [
                f"{name}, {process}",
                *(f"{sample.resident_bytes[process] / _MIB:.0f}" for sample in quarters),
                "",
            ]
            for process in soak.samples[0].resident_bytes
        ]
        totals = [f"{sample.total / _MIB:.0f}" for sample in quarters]
        rows.append([f"{name}, together", *totals, f"{soak.growth:+.1%}"])
    heads = [str(sample.finished) for sample in quarters]
    return markdown_table(["resident MiB after requests", *heads, "second quarter to last"], rows)
