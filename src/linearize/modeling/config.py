"""The student's config: the teacher's own, and the plan."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from linearize.errors import InputError, unknown
from linearize.modeling.library_internals import run_config_checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from linearize.mixers import AttentionShape, MixerConfig
    from linearize.modeling.probe import AttentionSite

MIXER_LAYER = "linearize_mixer"
SHARED_FIELDS = (
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "initializer_range",
)


class LinearizeConfig(PreTrainedConfig):
    """Config of a student: `teacher` (its config as a dict) and `plan` (one mixer or None per layer).

    `attention`, `shapes`: names of the attention modules inside the teacher's class and their sizes, by layer.
    `teacher_name`: where the teacher came from. `mixer_packages`: by name of a mixer that is not ours the package that
    registers it; absent where all are ours.
    What is not set here is read from the teacher's config, so that tools which look for `hidden_size` and the like
    find it.
    """

    model_type = "linearized"
    has_no_defaults_at_init = True
    auto_map: ClassVar[dict[str, str]] = {}  # trl and transformers read it; exports with code of their own set theirs

    def __init__(
        self,
        teacher: dict[str, Any] | None = None,
        plan: list[dict[str, Any] | None] | None = None,
        attention: list[str] | None = None,
        shapes: list[dict[str, Any]] | None = None,
        teacher_name: str | None = None,
        linearize_version: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher = teacher or {}
        self.plan: list[dict[str, Any] | None] = []
        self.attention = attention or []
        self.shapes = shapes or []
        self.teacher_name = teacher_name
        self.linearize_version = linearize_version
        for name in SHARED_FIELDS:
            for fields in (self.teacher, self._text()):
                if name in fields:
                    kwargs.setdefault(name, fields[name])
        super().__init__(**kwargs)
        self.plan = plan or []  # after the parent's checks, which know only transformers' own layer types

    def __getattr__(self, name: str) -> Any:
        teacher = self.__dict__.get("teacher", {})
        if not name.startswith("_") and teacher:
            for fields in (teacher, self._text()):
                for known in (name, _renamed(fields.get("model_type", "")).get(name, name)):
                    if known in fields and not name.endswith("_config"):
                        return copy.deepcopy(fields[known])  # transformers completes some of them in place
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _text(self) -> dict[str, Any]:
        """The teacher's fields that describe its language model (those of a model with images are one level down)."""
        text: dict[str, Any] = self.teacher.get("text_config") or self.teacher
        return text

    def set_vocab_size(self, size: int) -> None:
        """Another number of tokens, wherever it is said: here, in the teacher's config, and in its text part."""
        self.vocab_size = size
        resized = {
            name: size for name in (_renamed(self._text().get("model_type", "")).get("vocab_size"), "vocab_size")
        }
        changed: list[dict[str, Any]] = []
        for fields in (self.teacher, self._text()):
            changed.append({**fields, **{name: size for name in resized if name in fields}})
        self.teacher = changed[0] if self._text() is self.teacher else {**changed[0], "text_config": changed[1]}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> LinearizeConfig:
        """Itself: a student is a language model, its plan speaks of the layers of that."""
        return self

    def teacher_config(self) -> PreTrainedConfig:
        """The teacher's config as an object of its own class."""
        fields = {k: v for k, v in self.teacher.items() if k not in ("model_type", "transformers_version")}
        return AutoConfig.for_model(self.teacher["model_type"], **fields)

    def mixers(self) -> list[MixerConfig | None]:
        """The plan as configs, checked.

        Raises:
            InputError: an unknown mixer, or a plan that does not fit the model.
        """
        if len(self.plan) != len(self.attention):
            raise InputError(
                f"the plan has {len(self.plan)} layers and the model {len(self.attention)}: the folder is damaged"
            )
        packages = getattr(self, "mixer_packages", None)
        return [None if entry is None else parse_mixer(entry, packages) for entry in self.plan]

    def set_plan(self, plan: Sequence[MixerConfig | None]) -> None:
        """Another plan, and the packages that its mixers come from."""
        from linearize.mixers import mixer_package

        self.plan = [None if mixer is None else mixer.model_dump() for mixer in plan]
        packages = {str(m.inner.name): mixer_package(m) for m in plan if m is not None and mixer_package(m)}  # type: ignore[attr-defined]
        if packages:
            self.mixer_packages = packages

    def attention_shapes(self) -> list[AttentionShape]:
        """Sizes of the teacher's attention, by layer."""
        from linearize.mixers import AttentionShape

        return [AttentionShape(**sizes) for sizes in self.shapes]

    @property
    def layer_types(self) -> list[str] | None:
        """One cache layer type per layer; ours where a mixer sits, the teacher's elsewhere (never written to disk)."""
        if not self.plan:
            return None
        kept = self._text().get("layer_types")
        window = self._text().get("sliding_window") if self._text().get("use_sliding_window", True) else None
        default = "full_attention" if window is None else "sliding_attention"
        return [
            MIXER_LAYER if entry is not None else (kept[i] if kept else default) for i, entry in enumerate(self.plan)
        ]

    def validate(self) -> None:
        """Run the parent's checks that apply: the teacher's own config checks its rotary positions, and `mixers` checks
        the plan, whose layer type is not on transformers' list."""
        run_config_checks(self, without=("validate_layer_type", "validate_rope"))


def _renamed(model_type: str) -> dict[str, str]:
    """What a family calls the common fields (GPT-2: `n_layer` for `num_hidden_layers`)."""
    names: dict[str, str] = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    return names


def parse_mixer(entry: dict[str, Any], packages: dict[str, str] | None = None) -> MixerConfig:
    """A mixer's config from its dict form. `packages`: where mixers come from that are not ours, by name.

    Raises:
        InputError: an unknown mixer name.
    """
    from linearize.mixers import LAYERS

    name = str(entry.get("name"))
    if name not in LAYERS:
        if package := (packages or {}).get(name):
            raise InputError(f"mixer {name!r} is in the package {package}, which is not installed here: install it")
        raise unknown("mixer", name, LAYERS)
    return LAYERS[name].model_validate(entry)


def student_config(
    teacher: PreTrainedModel, sites: Sequence[AttentionSite], plan: Sequence[MixerConfig | None], name: str | None
) -> LinearizeConfig:
    """Return the config of a student of this teacher, whose plan was checked (`surgery.check_plan`)."""
    from linearize.version import __version__

    fields = teacher.config.to_dict()
    config = LinearizeConfig(
        teacher={
            k: v for k, v in fields.items() if k not in ("architectures", "_name_or_path", "transformers_version")
        },
        plan=[{}] * len(plan),
        attention=[site.name for site in sites],
        shapes=[vars(site.shape) for site in sites],
        teacher_name=name,
        linearize_version=__version__,
        dtype=teacher.dtype,
    )
    config.set_plan(plan)
    return config
