"""Which form of an operation runs a call, and why: rules tried in order, unless a test or a benchmark forces a form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from linearize.errors import InputError, unknown
from linearize.ops.layout import Layout

Result = TypeVar("Result")
CallKind = TypeVar("CallKind")
OUR_OWN = (AssertionError, InputError, torch.OutOfMemoryError, torch.AcceleratorError, KeyboardInterrupt)


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What a rule may look at; can be made without tensors.

    `device`: its type. `dtype`: what the form is given. `tokens`: T. `whole`: every token has an output (the scan: and
    the state wanted is that after all). `gradients`: whether they are asked for. `opaque`: a kernel stands behind an
    operator of its own, which `torch.compile` keeps whole.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    layout: Layout = field(default_factory=Layout)
    whole: bool = True
    gradients: bool = False
    opaque: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A kind of call that a person asks about: so many tokens of whole rows, after past ones or not."""

    device: str
    dtype: torch.dtype
    tokens: int
    past: bool = False
    gradients: bool = False

    def call(self, kind: Callable[..., CallKind], **more: Any) -> CallKind:
        """The call that an operation would see; `more`: what its rules look at besides."""
        return kind(device=self.device, dtype=self.dtype, tokens=self.tokens, gradients=self.gradients, **more)

    def wide(self) -> Asked:
        """The same in at least fp32, as recurrences compute."""
        return replace(self, dtype=torch.promote_types(self.dtype, torch.float32))


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come through one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@dataclass(frozen=True, eq=False)
class Rule:
    """A form, why it is not for a call (None: it is), why it is taken where it is; `built`: compiled at its first use.

    A built form that fails at it is never tried again in this process. `cannot`: why a call is beyond the form even
    where somebody forces it (what a form is refused for may be mere taste); None: it can.
    """

    form: str
    refuses: Callable[..., str | None]
    why: str
    built: bool = False
    cannot: Callable[..., str | None] | None = None


class Dispatcher:
    """The rules of one operation, the form that is forced (None: the rules decide), and which forms did not build here.

    Forced for all threads: by an attribute, which `torch.compile` can trace.
    """

    def __init__(self, operation: str, rules: Sequence[Rule]) -> None:
        self.operation, self.rules = operation, tuple(rules)
        self.broken: dict[str, str] = {}
        self.forced: str | None = None

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Force one form inside the `with` block (tests, benchmarks).

        Raises:
            InputError: no such form; and, from the operation itself, a call that the form cannot do.
        """
        if all(rule.form != name for rule in self.rules):
            raise unknown(f"form of {self.operation}", name, [rule.form for rule in self.rules])
        before, self.forced = self.forced, name
        try:
            yield
        finally:
            self.forced = before

    def choice(self, call: Call) -> tuple[str, str]:
        """The form for a call, and why: what it is good for, and what kept the forms before it away."""
        if (forced := self.forced) is not None:
            return forced, "forced"
        before: list[str] = []
        for rule in self.rules:
            reason = self.broken.get(rule.form) or rule.refuses(call)
            if reason is None:
                return rule.form, "; ".join([rule.why, *before])
            before.append(f"not {rule.form}: {reason}")
        raise AssertionError(f"no form of {self.operation} takes {call}: {before}")

    def run(self, call: Call, invoke: Callable[[str], Result]) -> Result:
        """`invoke(form)` of the form chosen; where one does not build, one warning and the next form."""
        if (forced := self.forced) is not None:
            self._check(forced, call)
            return invoke(forced)
        rule = next(r for r in self.rules if r.form not in self.broken and r.refuses(call) is None)
        if not rule.built or torch.compiler.is_compiling():  # what is traced is built later
            return invoke(rule.form)
        try:
            return invoke(rule.form)
        except OUR_OWN:
            raise
        except Exception as error:
            self.broken[rule.form] = reason = f"it does not build here ({_line(error)})"
            then, _ = self.choice(call)
            warnings.warn(f"{self.operation}: not {rule.form}: {reason}; {then} runs instead", stacklevel=3)
        return self.run(call, invoke)

    def _check(self, forced: str, call: Call) -> None:
        """Raises an `InputError` if the form that is forced cannot do the call."""
        cannot = next(rule.cannot for rule in self.rules if rule.form == forced)
        reason = None if cannot is None else cannot(call)
        if reason is not None:
            raise InputError(
                f"{self.operation}: the form {forced!r} is forced and cannot run this call: {reason}; force none, or "
                f"another of {', '.join(rule.form for rule in self.rules)}"
            )


def _line(error: Exception) -> str:
    """The last line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def more_than(most: int) -> Callable[[Call], str | None]:
    """Refuses more tokens than `most`."""
    return lambda call: f"more than {most} token{'s' if most > 1 else ''}" if call.tokens > most else None


def never(call: Call) -> str | None:
    """Refuses nothing."""
    return None
