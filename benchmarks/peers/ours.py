"""This package, measured as the peers are.

    python -m benchmarks.peers.ours lolcats --teacher DIR --text tokens.npz --out FILE

`teacher` has contexts alone. The others take mixer, loss, learning rate and schedule from the recipe of that name (of
`mamba-in-llama` the second stage, which trains all weights), in fp32 with one row per optimiser step. Contexts of
`mamba` are read with every layer converted, training keeps half of the layers: what the peer's code can do on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from benchmarks.peers.measure import Method, measure, publish
from benchmarks.peers.options import SECTIONS, Text, check, parser, window_options
from linearize.evaluation.speed.running import feed
from linearize.metrics.report import provenance
from linearize.modeling import LinearizedForCausalLM
from linearize.ops.layout import Layout
from linearize.recipes.schema import Recipe, load_recipe
from linearize.training.config import Batch
from linearize.training.loop import run_stage

RECIPES = {"lolcats": ("lolcats", 0), "window-linear": ("window-linear", 0), "mamba": ("mamba-in-llama", 1)}
METHODS = ("teacher", *RECIPES)
WINDOWED = ("lolcats", "window-linear")
LARGEST_DIFFERENCE = 1e-5  # of outputs of attention, in parts of the largest


class Teacher(Method):
    """The teacher itself: softmax attention of PyTorch with a growing cache."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = AutoConfig.from_pretrained(options.teacher)
        if options.layers is not None:
            config.num_hidden_layers = options.layers
        self.options, self.num_layers = options, config.num_hidden_layers
        self.teacher: Any = AutoModelForCausalLM.from_pretrained(options.teacher, config=config, dtype=torch.float32)
        self.teacher.eval().requires_grad_(False)
        self.model: Any = self.teacher

    def convert(self) -> None:
        """See `Method`; nothing to do."""

    def logits(self, ids_BT: Tensor) -> Tensor:
        """See `Method`."""
        logits: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits

    def step(self, ids_BT: Tensor) -> None:
        """Not for a teacher."""
        raise NotImplementedError("a teacher is not trained")

    def train(self, rows_RT: Tensor) -> list[float]:
        """Not for a teacher."""
        raise NotImplementedError("a teacher is not trained")

    def prefill(self, ids_BT: Tensor) -> Any:
        """See `Method`."""
        return feed(self.model, DynamicCache(config=self.model.config), ids_BT)[1]

    def decode(self, cache: Any, ids_B1: Tensor) -> Any:
        """See `Method`."""
        return feed(self.model, cache, ids_B1)[1]


class Student(Teacher):
    """A student of a recipe, trained by one of its stages."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.recipe, self.stage = recipe_of(name, options)
        self.reads_contexts: Any = None
        self.run: Any = None

    def convert(self) -> None:
        """See `Method`."""
        torch.manual_seed(self.options.seed)
        plan: Any = self.recipe.plan.resolve(self.num_layers)
        mixer = next(config for config in plan if config is not None)
        self.model = LinearizedForCausalLM.from_teacher(self.teacher, plan)
        whole = (
            self.model if None not in plan else LinearizedForCausalLM.from_teacher(self.teacher, [mixer] * len(plan))
        )
        self.reads_contexts = whole

    def step(self, ids_BT: Tensor) -> None:
        """See `Method`."""
        if self.run is None:
            self.run = self.stage.build(self.model, self.teacher)
            self.run.calibrate(batch_of(ids_BT))
        loss = self.run.loss(batch_of(ids_BT))
        (loss.sum / loss.count).backward()
        self.model.zero_grad(set_to_none=True)

    def train(self, rows_RT: Tensor) -> list[float]:
        """The package's own loop, without held-out text in between."""
        config = self.stage.model_copy(update={"tokens": rows_RT.numel(), "length": rows_RT.shape[1]})

        def batches(step: int) -> Iterator[Batch]:
            return (batch_of(rows_RT[None, number % len(rows_RT)]) for number in itertools.count(step))

        run = config.build(self.model, self.teacher)
        result = run_stage(run, config, batches, [], length=rows_RT.shape[1])
        return [loss for _, loss in result.losses]

    def prefill(self, ids_BT: Tensor) -> Any:
        """See `Method`."""
        return feed(self.reads_contexts, None, ids_BT)[1]

    def decode(self, cache: Any, ids_B1: Tensor) -> Any:
        """See `Method`."""
        return feed(self.reads_contexts, cache, ids_B1)[1]

    def compare(self, exchange: Path) -> dict[str, float]:
        """Largest differences from the published attention on its own inputs and weights, in parts of its largest
        output, and of the whole models' logits. Raises RuntimeError beyond `LARGEST_DIFFERENCE`."""
        with np.load(exchange) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        differences = []
        with torch.inference_mode():
            for number, mixer in self.model.mixers().items():
                _load(mixer, arrays, number)
                q, k, v, y = (arrays[f"{name}_{number}"] for name in "qkvy")
                group = mixer.shape.group  # the published code repeats the heads of keys and values
                scale = q.shape[-1] ** -0.5
                ours, _ = mixer(q, k[:, ::group], v[:, ::group], scaling=scale, layout=Layout(), need_state=False)
                differences.append(float((ours - y).abs().max() / y.abs().max()))
            logits = arrays["logits"]
            whole = float((self.logits(arrays["ids"]) - logits).abs().max() / logits.abs().max())
        result = {"attention": max(differences), "logits": whole}
        if result["attention"] > LARGEST_DIFFERENCE:
            raise RuntimeError(f"attention differs from the published one by {result['attention']:.1e}")
        return result


def _load(mixer: Any, arrays: dict[str, Tensor], number: int) -> None:
    """The published weights of a layer."""
    mixer.feature_q.weight_HDF.copy_(arrays[f"feature_q_{number}"])
    mixer.feature_k.weight_HDF.copy_(arrays[f"feature_k_{number}"])
    mixer.window_factor_H.copy_(arrays[f"window_factor_{number}"].flatten())


def batch_of(ids_BT: Tensor) -> Batch:
    """Rows that are one document each."""
    return {
        "input_ids": ids_BT,
        "position_ids": torch.arange(ids_BT.shape[1]).expand_as(ids_BT),
        "labels": ids_BT,
    }


def recipe_of(name: str, options: argparse.Namespace) -> tuple[Recipe, Any]:
    """The recipe with the sizes of the command line, and the stage that is measured."""
    recipe_name, number = RECIPES[name]
    settings: dict[str, Any] = {f"stages.{number}.batch": 1, f"stages.{number}.precision": "fp32"}
    if name in WINDOWED:
        settings |= {"plan.mixer.window": options.window, "plan.mixer.window_shape": options.shape}
    if name == "lolcats":
        settings["plan.mixer.feature_dim"] = options.feature_dim
    recipe = load_recipe(recipe_name).override(settings)
    return recipe, recipe.stages[number]


def fit_options(options: argparse.Namespace, made: argparse.ArgumentParser) -> None:
    """Leave out what a method does not have. Raises ValueError where the command line asks for it."""
    if options.method == "teacher":
        if options.measure not in (list(SECTIONS), ["contexts"]):
            raise ValueError(f"--measure {' '.join(options.measure)}: a teacher has contexts alone")
        options.measure = ["contexts"]
    unused = {"exchange": options.method != "lolcats", "feature_dim": options.method != "lolcats"}
    unused |= dict.fromkeys(("window", "shape"), options.method not in WINDOWED)
    for name in (name for name, without in unused.items() if without):
        if getattr(options, name) != made.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: {options.method} has no such option: leave it out")
        delattr(options, name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    made = parser(__doc__)
    made.add_argument("method", choices=METHODS)
    window_options(made)
    options = made.parse_args(arguments)
    try:
        text = Text.load(options.text)
        fit_options(options, made)
        check(options, text)
    except ValueError as error:
        made.error(str(error))
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    origin = provenance(seed=options.seed) | {"repository": None, "load": os.getloadavg()[0]}
    method = Teacher(options) if options.method == "teacher" else Student(options.method, options)
    result = measure(method, options, text)
    if getattr(options, "exchange", None) is not None and isinstance(method, Student):
        result["differences"] = method.compare(options.exchange)
    publish(options.method, options, text, result, origin)


if __name__ == "__main__":
    main()
