"""Speed and memory over context and batch: student beside teacher, the teacher with its best cache and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from linearize.errors import InputError
from linearize.evaluation.context import Contestant, Numbers, Section, Setting, Shown, Tile
from linearize.evaluation.speed.largest_batch import largest_batch, peak_of_rows
from linearize.evaluation.speed.memory import weight_bytes
from linearize.evaluation.speed.points import Checked, Protocol, hopeless_ways, measure_point
from linearize.evaluation.speed.ways import CacheKind, Way

SHARED_ROWS = 8  # where no memory budget is given: as much as this many rows of the first contestant take


class Speed(Section):
    """Prefill, first token, decode, memory, and the largest batch in a memory budget.

    `contexts`, `batches`: all pairs are measured; contexts beyond what a model was trained on are allowed. `chunk`:
    tokens of one forward in a prefill. `new_tokens`: tokens of one repeat of decode, `repeats` repeats after `warmup`
    untimed ones; `prefill_repeats` of the prefill. `memory_budget_bytes`: for the largest batch, caches and activations
    without the weights; None: what eight rows of the first contestant take at the longest context. `most_rows`: the
    largest batch that is tried (0: none is looked for). `check_tokens`: length of the check that comes before the
    speeds. `caches`, `attentions`: what a teacher is tried with, the usual one first.
    """

    NAME: ClassVar[str] = "speed"
    TITLE: ClassVar[str] = "Speed and memory"

    contexts: tuple[int, ...] = (1024, 4096, 16384)
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 64
    repeats: int = 5
    prefill_repeats: int = 3
    warmup: int = 1
    chunk: int = 2048
    check_tokens: int = 96
    memory_budget_bytes: int | None = None
    most_rows: int = 1024
    caches: tuple[CacheKind, ...] = ("static", "dynamic")
    attentions: tuple[str, ...] = ("sdpa", "eager")

    @property
    def needs_text(self) -> bool:
        """No: it brings its own items."""
        return False

    def check(self, setting: Setting) -> None:
        """Raises InputError for sizes below what can be measured."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None:
                continue
            for size in value if isinstance(value, tuple) else (value,):
                if size < least:
                    raise InputError(f"speed: {name.replace('_', ' ')} is {size}: it must be at least {least}")
        for name in ("contexts", "batches", "caches", "attentions"):
            if not getattr(self, name):
                raise InputError(f"speed: {name} is empty: give at least one")

    def run(self, setting: Setting) -> Numbers:
        """`models`, `points`, `checks`, `largest_batch`."""
        self.check(setting)
        contexts, batches = sorted(set(self.contexts)), sorted(set(self.batches))
        steps = len(contexts) * len(batches) + len(setting.contestants)
        points: list[dict[str, Any]] = []
        checks: list[dict[str, Any]] = []
        checked: Checked = {}
        for batch in batches:
            hopeless: dict[str, set[str]] = {}
            for context in contexts:
                done = len(points) // len(setting.contestants)
                setting.progress(f"speed at {context:,} tokens, batch {batch}", done, steps)
                found = self._point(setting, context, batch, hopeless, checked)
                points += found["points"]
                checks += [check for check in found["checks"] if check not in checks]
                hopeless = {
                    row["model"]: hopeless.get(row["model"], set()) | hopeless_ways(row) for row in found["points"]
                }
        return {
            "models": {c.name: _model(c.model, c.role) for c in setting.contestants},
            "settings": self.model_dump(mode="json"),
            "points": points,
            "checks": checks,
            "largest_batch": self._largest(setting, points, steps),
        }

    def _point(
        self, setting: Setting, context: int, batch: int, hopeless: Mapping[str, set[str]], checked: Checked
    ) -> dict[str, Any]:
        protocol = Protocol(
            **{name: getattr(self, name) for name in Protocol.__dataclass_fields__ if name != "seed"}, seed=setting.seed
        )
        models = {c.name: c.model for c in setting.contestants}
        key = self._key(setting, "point") | {"context": context, "batch": batch}
        key["models"] = [[c.name, c.fingerprint] for c in setting.contestants]
        found: dict[str, Any] = setting.kept.result(
            key,
            lambda: measure_point(models, protocol, context=context, batch=batch, hopeless=hopeless, checked=checked),
        )
        return found

    def _key(self, setting: Setting, what: str) -> dict[str, Any]:
        """All settings but which contexts and batches; where it ran, since speeds do not travel."""
        device = str(setting.contestants[0].model.device)
        sizes = self.model_dump(mode="json", exclude={"contexts", "batches", "memory_budget_bytes", "most_rows"})
        return {"section": self.NAME, "what": what, **sizes, "seed": setting.seed, "device": device}

    def _largest(self, setting: Setting, points: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
        """The largest batch of each contestant that has speeds, at the longest context."""
        context, few = max(self.contexts), min(self.batches)
        at_longest = [row for row in points if row["context"] == context and row["batch"] == few and not row["reason"]]
        ways = {row["model"]: Way(row["cache"], row["attention"]) for row in at_longest}
        able = [c for c in setting.contestants if c.name in ways and self.most_rows > 0]
        sizes = {"context": context, "chunk": self.chunk, "seed": setting.seed}

        def kept(contestant: Contestant, measure: Callable[..., Any], **more: Any) -> Any:
            way = ways[contestant.name]
            key = self._key(setting, measure.__name__) | sizes | more | {"way": str(way), "name": contestant.name}
            key["model"] = contestant.fingerprint
            return setting.kept.result(key, lambda: measure(contestant.model, way, **sizes, **more))

        budget = self.memory_budget_bytes
        if budget is None and able:
            budget = kept(able[0], peak_of_rows, rows=SHARED_ROWS)
        models: dict[str, Any] = {}
        for done, contestant in enumerate(able):
            setting.progress("speed: the largest batch", steps - len(able) + done, steps)
            models[contestant.name] = kept(contestant, largest_batch, budget=budget, most=self.most_rows)
        given = self.memory_budget_bytes is not None
        return {
            "context": context,
            "budget_bytes": budget,
            "budget_from": "given" if given or not able else f"{SHARED_ROWS} rows of {able[0].name}",
            "models": models,
        }

    @classmethod
    def show(cls, numbers: Numbers) -> Shown:
        """Tables, plots of time and memory against context, crossovers."""
        from linearize.evaluation.speed.shown import show

        return show(numbers)

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Tile]]:
        """Decode, prefill and cache at the longest context."""
        from linearize.evaluation.speed.shown import headline

        return headline(numbers)


LEAST = {
    "contexts": 1,
    "batches": 1,
    "new_tokens": 1,
    "repeats": 1,
    "prefill_repeats": 1,
    "warmup": 0,
    "chunk": 1,
    "check_tokens": 2,
    "memory_budget_bytes": 1,
    "most_rows": 0,
}


def _model(model: Any, role: str) -> dict[str, Any]:
    """What a reader must know of a model to judge its speeds."""
    text = getattr(model, "lm", model).config.get_text_config()
    return {
        "role": role,
        "weight_bytes": weight_bytes(model),
        "trained_length": getattr(text, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
