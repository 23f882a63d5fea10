"""Softmax over a window only, optionally with attention sinks (StreamingLLM, 2309.17453): the control for every
linear branch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from linearize.mixers.base import AttentionShape, Mixer
from linearize.mixers.window_mixer import WindowMixer, WindowMixerConfig
from linearize.ops.window_linear import Branch, WindowLinear, WindowShape


class SlidingWindowConfig(WindowMixerConfig):
    """Window attention with no linear branch and no new parameters.

    `window`: tokens. `window_shape`: `sliding` or `terraced`. `num_sinks`: first tokens of a document that are always
    seen.
    """

    name: Literal["sliding_window"] = "sliding_window"
    window: int = Field(64, ge=1)
    window_shape: WindowShape = "sliding"
    num_sinks: int = Field(0, ge=0)

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer; it has no parameters."""
        return SlidingWindow(self, shape)


class SlidingWindow(WindowMixer):
    """y_n = softmax over the window of n."""

    config: SlidingWindowConfig

    def reset_parameters(self) -> None:
        """Nothing to start."""

    def spec(self, *, scaling: float, softcap: float | None, branch: Branch) -> WindowLinear:
        """The operation that this mixer runs."""
        config = self.config
        return WindowLinear(
            window=config.window,
            shape=config.window_shape,
            num_sinks=config.num_sinks,
            scaling=scaling,
            softcap=softcap,
            branch=branch,
        )
