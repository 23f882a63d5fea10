"""The result of a speculative run: tokens, counts and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SpeculationStats:
    """Counts over all rows of a run.

    `target_passes`: forward passes of the target, prefill included. `draft_passes`: of the draft. `drafted`,
    `accepted`: draft tokens, and those of them that the text kept. `tokens`: new tokens of all rows.
    `lengths[n]`: how often a row kept n draft tokens of a round that had some. `draft_tokens[k]`: rounds with k draft
    tokens. `seconds`: of the whole run, prefill included; `prompt_seconds`: of prefill alone.
    """

    target_passes: int = 0
    draft_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    lengths: dict[int, int] = field(default_factory=dict)
    draft_tokens: dict[int, int] = field(default_factory=dict)

    @property
    def acceptance_rate(self) -> float:
        """Share of draft tokens that were accepted (0 where none were drafted)."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of all rows per forward pass of the target; 1 per row is plain decoding."""
        return self.tokens / self.target_passes if self.target_passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding, without prefill."""
        return self.tokens / max(self.seconds - self.prompt_seconds, 1e-9)

    def count(self, drafted: int, accepted: int) -> None:
        """Add one row's round."""
        if drafted:
            self.drafted += drafted
            self.accepted += accepted
            self.lengths[accepted] = self.lengths.get(accepted, 0) + 1

    def summary(self) -> dict[str, int | float | dict[str, int]]:
        """Return everything as plain numbers, for JSON."""
        return {
            "tokens": self.tokens,
            "target_passes": self.target_passes,
            "draft_passes": self.draft_passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": round(self.acceptance_rate, 4),
            "tokens_per_pass": round(self.tokens_per_pass, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "seconds": round(self.seconds, 4),
            "prompt_seconds": round(self.prompt_seconds, 4),
            "lengths": {str(n): self.lengths[n] for n in sorted(self.lengths)},
            "draft_tokens": {str(k): self.draft_tokens[k] for k in sorted(self.draft_tokens)},
        }

    def line(self) -> str:
        """Return one line to print."""
        return (
            f"{self.tokens} tokens in {self.target_passes} passes of the target and {self.draft_passes} of the draft; "
            f"{self.accepted} of {self.drafted} draft tokens accepted; {self.tokens_per_second:.1f} tokens per second"
        )


@dataclass(frozen=True)
class SpeculationResult:
    """The new tokens of each row (a stop token included, where one ended the row) and the counts of the run."""

    tokens: list[list[int]]
    stats: SpeculationStats
