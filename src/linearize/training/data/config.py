"""The `data` part of a recipe."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from linearize.errors import InputError
from linearize.numbers import Count, Number, parse_number


def _parse_heldout(value: object) -> float | int:
    number = parse_number(value)
    if number <= 0 or (number > 1 and not isinstance(number, int)):
        raise InputError(f"heldout {value!r}: give a fraction between 0 and 1, or a whole number of documents")
    return number


class SourceConfig(BaseModel):
    """A source of text in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    """A data SPEC, as `--data` takes it."""
    weight: Annotated[Number, Field(gt=0)] | None = None
    """Its share of the training tokens, relative to those of the other sources; none: each document once."""


class DataConfig(BaseModel):
    """How text becomes training rows and a held-out set; the `data` part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceConfig, ...] = ()
    """Where the text is from, in place of `--data`; either all have a weight or none (see `mixture.weighted`)."""
    whole_files: bool = False
    """A `.txt` file is one document, unless lines of an end token separate several; else blank lines do."""
    length: Annotated[Count, Field(ge=2)] = 1024
    """Tokens per packed sequence."""
    heldout: Annotated[float | int, BeforeValidator(_parse_heldout)] = 0.05
    """Documents never trained on: a fraction of all if below 1, else their number."""
    max_heldout_tokens: Annotated[Count, Field(ge=1)] = 65536
    """No further document is held out once the next one would pass this many tokens."""
    measured_tokens: Annotated[Count, Field(ge=2)] | None = None
    """Held-out tokens that a conversion measures before, during and after its stages, at most; none: so many that this
    takes little of the time (see `conversion.text.measured_tokens`)."""
    seed: int = Field(default=0, ge=0)
    """Draws the held-out documents; nothing else that training uses."""
    keep_whole: bool = False
    """Training rows cut no document that fits into one; costs padding (see `pack`). Held-out rows always do so."""
    answer_only: bool = False
    """Next-token loss on the answers alone, where rows have prompt and answer; else on all text."""
    self_tokens: Annotated[Count, Field(ge=1)] = 1_000_000
    """Tokens to sample from the teacher for the data SPEC `self`."""
    self_temperature: Annotated[Number, Field(gt=0)] = 1.0
    """Sampling temperature of that text."""
    self_seed: int = Field(default=0, ge=0)
    """Seed of that text."""
    self_prompt: str | None = None
    """How each text begins; none: BOS alone."""
    self_batch: Annotated[Count, Field(ge=1)] = 64
    """Texts sampled at a time; part of what the seed reproduces."""
    self_max_new_tokens: Annotated[Count, Field(ge=1)] | None = None
    """The longest text; none: `length`. Never beyond the teacher's context."""
    pseudo_temperature: Annotated[Number, Field(ge=0)] = 1.0
    """Sampling temperature of the teacher's answers to `pseudo:PATH`; 0: greedy."""
    pseudo_max_new_tokens: Annotated[Count, Field(ge=1)] = 512
    """The longest answer. Never beyond the teacher's context."""
    pseudo_seed: int = Field(default=0, ge=0)
    """Seed of the answers."""
    pseudo_batch: Annotated[Count, Field(ge=1)] = 16
    """Prompts answered at a time; with sampling part of what the seed reproduces."""

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> Self:
        without = [source.path for source in self.sources if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(f"source {without[0]!r} has no weight, but others do: give each one a weight, or none")
        return self

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights of the sources; None where each document is read once."""
        weights = tuple(source.weight for source in self.sources if source.weight is not None)
        return weights or None
