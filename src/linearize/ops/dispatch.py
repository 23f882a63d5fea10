"""Which backend of an operation runs a call, and why: rules tried in order, unless a test or a benchmark forces one."""

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
MAX_MULTI_TOKEN = 32  # beyond so many tokens, matrices of pairs cost more than chunks
OUR_OWN = (AssertionError, InputError, torch.OutOfMemoryError, torch.AcceleratorError, KeyboardInterrupt)


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What a rule may look at; can be made without tensors.

    `device`: its type. `dtype`: what the backend is given. `tokens`: T. `whole`: every token has an output (the scan:
    and the state wanted is that after all). `gradients`: whether they are asked for. `opaque`: a kernel stands behind
    an operator of its own, which `torch.compile` keeps whole.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    layout: Layout = field(default_factory=Layout)
    whole: bool = True
    gradients: bool = False
    opaque: bool = False


@dataclass(frozen=True, kw_only=True)
class Query:
    """A kind of call that a person asks about: so many tokens of whole rows, after past ones or not."""

    device: str
    dtype: torch.dtype
    tokens: int
    past: bool = False
    gradients: bool = False

    def call(self, kind: Callable[..., CallKind], **more: Any) -> CallKind:
        """The call that an operation would see; `more`: what its rules look at besides."""
        return kind(device=self.device, dtype=self.dtype, tokens=self.tokens, gradients=self.gradients, **more)

    def wide(self) -> Query:
        """The same in at least fp32, as recurrences compute."""
        return replace(self, dtype=torch.promote_types(self.dtype, torch.float32))


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come through one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@dataclass(frozen=True, eq=False)
class Rule:
    """When a backend runs. `why_not_chosen`: the reason against it for a call (None: there is none). `why`: its merit.

    `built`: it is compiled at its first use, and never tried again in this process where that fails. `unsupported`: the
    reason why it cannot do a call even where it is forced (`why_not_chosen` may be a preference); None: it can.
    """

    backend: str
    why_not_chosen: Callable[..., str | None]
    why: str
    built: bool = False
    unsupported: Callable[..., str | None] | None = None


class Dispatcher:
    """The rules of one operation; `forced`: the backend that is forced (None: the rules decide); `broken`: what did not
    build.

    A backend is forced for all threads, by an attribute, which `torch.compile` can trace.
    """

    def __init__(self, operation: str, rules: Sequence[Rule]) -> None:
        self.operation, self.rules = operation, tuple(rules)
        self.broken: dict[str, str] = {}
        self.forced: str | None = None

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Force one backend inside the `with` block (tests, benchmarks).

        Raises:
            InputError: no such backend; and, from the operation itself, a call that the backend cannot do.
        """
        if all(rule.backend != name for rule in self.rules):
            raise unknown(f"backend of {self.operation}", name, [rule.backend for rule in self.rules])
        before, self.forced = self.forced, name
        try:
            yield
        finally:
            self.forced = before

    def choice(self, call: Call) -> tuple[str, str]:
        """The backend for a call, and why: what it is good for, and what kept the backends before it away."""
        if (forced := self.forced) is not None:
            return forced, "forced"
        before: list[str] = []
        for rule in self.rules:
            reason = self.broken.get(rule.backend) or rule.why_not_chosen(call)
            if reason is None:
                return rule.backend, "; ".join([rule.why, *before])
            before.append(f"not {rule.backend}: {reason}")
        raise AssertionError(f"no backend of {self.operation} takes {call}: {before}")

    def run(self, call: Call, invoke: Callable[[str], Result]) -> Result:
        """`invoke(backend)` of the backend chosen; where one does not build, one warning and the next backend."""
        if (forced := self.forced) is not None:
            self._check(forced, call)
            return invoke(forced)
        rule = next(r for r in self.rules if r.backend not in self.broken and r.why_not_chosen(call) is None)
        if not rule.built or torch.compiler.is_compiling():  # what is traced is built later
            return invoke(rule.backend)
        try:
            return invoke(rule.backend)
        except OUR_OWN:
            raise
        except Exception as error:
            self.broken[rule.backend] = reason = f"it does not build here ({_line(error)})"
            then, _ = self.choice(call)
            warnings.warn(f"{self.operation}: not {rule.backend}: {reason}; {then} runs instead", stacklevel=3)
        return self.run(call, invoke)

    def _check(self, forced: str, call: Call) -> None:
        """Raises an `InputError` if the backend that is forced cannot do the call."""
        unsupported = next(rule.unsupported for rule in self.rules if rule.backend == forced)
        reason = None if unsupported is None else unsupported(call)
        if reason is not None:
            raise InputError(
                f"{self.operation}: the backend {forced!r} is forced and cannot run this call: {reason}; force none, "
                f"or another of {', '.join(rule.backend for rule in self.rules)}"
            )


def _line(error: Exception) -> str:
    """The last line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def more_than(most: int) -> Callable[[Call], str | None]:
    """A rule's reason against calls of more than `most` tokens."""
    return lambda call: f"more than {most} token{'s' if most > 1 else ''}" if call.tokens > most else None


def always(call: Call) -> str | None:
    """No reason against any call."""
    return None
