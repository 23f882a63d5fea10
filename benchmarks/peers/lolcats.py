"""LoLCATs' published code (github.com/HazyResearch/lolcats), run from a checkout of its own in its own environment.

    git clone https://github.com/HazyResearch/lolcats PEER
    PYTHONPATH=. PEER_VENV/bin/python -m benchmarks.peers.lolcats --repo PEER --teacher DIR --text tokens.npz --out FILE

Loader, attention, feature maps, trainer, optimiser and settings are theirs. What differs from their command line: fp32
on a CPU in place of bf16 on a GPU, one row per optimiser step in place of eight, our tokens, no evaluation in between.
`--exchange FILE` writes weights, inputs and outputs of their attention, which `benchmarks.peers.ours` compares with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.measure import Method, measure, publish
from benchmarks.peers.options import Text, check, parser, window_options
from benchmarks.peers.repository import open_repository, provenance, teacher_folder

MODEL_CONFIGS = {
    "terraced": "configs/model/distill_llama3_1_8b_lk_smd_wtk64_fd64_w01.yaml",
    "sliding": "configs/model/distill_llama3_1_8b_lk_smd_wsw64_fd64_w01.yaml",
}
DISTILL_CONFIG = "configs/experiment/distill_alpaca_clean_xent0_mse1000_lr1e-2.yaml"


class PublishedLolcats(Method):
    """Their Llama classes, converted by their functions and trained by their trainer of attention transfer."""

    def __init__(self, repository: Path, folder: Path, options: argparse.Namespace) -> None:
        self.options, self.folder = options, folder
        yaml = importlib.import_module("omegaconf").OmegaConf
        self.config = yaml.load(repository / MODEL_CONFIGS[options.shape])
        self.distill = yaml.load(repository / DISTILL_CONFIG)
        rope = importlib.import_module("transformers").AutoConfig.from_pretrained(folder).rope_theta
        self.config.model.update(
            pretrained_model_name_or_path=str(folder), cache_dir=None, torch_dtype="float32", device_map="cpu",
            rope_theta=rope, rope_scaling=None,
        )  # fmt: skip
        self.config.attention.window_size = options.window
        self.config.attention.learned_kernel_kwargs.update(
            feature_dim=options.feature_dim, zero_init=not options.random_init
        )
        self.model: Any = self._loader().load(model_type=None).eval()

    def _loader(self) -> Any:
        return importlib.import_module("src.model.pretrained").get_pretrained_loader(**self.config.model)

    def convert(self) -> None:
        """As in their `distill_llama.py`."""
        kind = self.config.attention.attention_type
        load_and_convert = importlib.import_module("src.model.load_model").load_and_convert_attns
        torch.manual_seed(self.options.seed)
        del self.model
        model = self._loader().load(model_type=kind)
        model.state_chunk_len = self.config.attention.state_chunk_len
        self.model, _ = load_and_convert(model, self.config, attention_type=kind, train_attention=True)
        self._toggle(False)
        self.compute_loss = self._trainer().compute_loss

    def _trainer(self, rows: Sequence[dict[str, Tensor]] = ()) -> Any:
        """Their trainer over batches, with their optimiser and schedule."""
        trainers = importlib.import_module("src.trainer")
        optimizer = trainers.get_optimizer(model=self.model, **self.distill.optimizer)
        scheduler = trainers.get_scheduler(optimizer=optimizer, **self.distill.lr_scheduler)
        settings = dict(self.distill.trainer) | {"evaluation_strategy": "no", "gradient_accumulation_steps": 1}
        return trainers.get_trainer(settings.pop("name"))(
            model=self.model,
            args=SimpleNamespace(lr_scheduler=dict(self.distill.lr_scheduler)),
            train_loader=rows,
            eval_loader=[],
            optimizer_and_scheduler=(optimizer, scheduler),
            device=torch.device("cpu"),
            wandb=None,
            save_checkpoints=False,
            save_results=False,
            initial_eval=False,
            **settings,
        )

    def _toggle(self, train: bool) -> None:
        """Attention transfer, or the student as it is."""
        importlib.import_module("src.model.convert_model").toggle_attention(self.model, train=train)
        self.model.train(train)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """See `Method`."""
        return self.model(ids_BT, use_cache=False).logits

    def step(self, ids_BT: Tensor) -> None:
        """See `Method`."""
        self._toggle(True)
        self.compute_loss(self.model, {"input_ids": ids_BT})[0].backward()
        self.model.zero_grad(set_to_none=True)
        self._toggle(False)

    def train(self, rows_RT: Tensor) -> list[float]:
        """One epoch of their training loop."""
        trainer = self._trainer([{"input_ids": row_1T} for row_1T in rows_RT.split(1)])
        compute_loss, losses = trainer.compute_loss, []

        def recorded(*arguments: Any, **named: Any) -> Any:
            loss, metrics = compute_loss(*arguments, **named)
            losses.append(float(loss))
            return loss, metrics

        trainer.compute_loss = recorded
        self._toggle(True)
        trainer.train_step(self.model, 0)
        self._toggle(False)
        return losses

    def prefill(self, ids_BT: Tensor) -> Any:
        """See `Method`; their forward computes the logits of all tokens, this those of the last alone."""
        out = self.model.model(ids_BT, use_cache=True)
        self.model.lm_head(out.last_hidden_state[:, -1:])
        return out.past_key_values

    def decode(self, cache: Any, ids_B1: Tensor) -> Any:
        """See `Method`."""
        return self.model(ids_B1, past_key_values=cache, use_cache=True).past_key_values

    def exchange(self, ids_1T: Tensor, out: Path) -> None:
        """Write random feature maps and factors, by layer q, k, v and the output of their attention with them, and the
        logits of the whole model."""
        generator = torch.Generator().manual_seed(self.options.seed)
        arrays: dict[str, Any] = {"ids": ids_1T.numpy()}
        layers = [layer.self_attn for layer in self.model.model.layers]
        with torch.no_grad():
            for number, attention in enumerate(layers):
                for name, parameter in _maps(attention).items():
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
                    arrays[f"{name}_{number}"] = parameter.numpy()
        for number, attention in enumerate(layers):
            attention.quadratic_attention = _recording(attention.quadratic_attention, arrays, number)
        with torch.inference_mode():
            arrays["logits"] = self.logits(ids_1T).numpy()
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, **arrays)


def _maps(attention: Any) -> dict[str, Tensor]:
    """What attention transfer trains in a layer."""
    return {
        "feature_q": attention.feature_map_q.mlp.layer,
        "feature_k": attention.feature_map_k.mlp.layer,
        "window_factor": attention.window_factors,
    }


def _recording(published: Any, arrays: dict[str, Any], number: int) -> Any:
    """Their attention function, whose inputs and output go into `arrays`."""

    def attention(q: Tensor, k: Tensor, f_q: Tensor, f_k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Any:
        y, weights = published(q, k, f_q, f_k, v, *rest, **named)
        for name, tensor in {"q": q, "k": k, "v": v, "y": y}.items():
            arrays[f"{name}_{number}"] = tensor.detach().numpy()
        return y, weights

    return attention


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    made = parser(__doc__)
    window_options(made)
    made.add_argument("--repo", type=Path, required=True, help="checkout of HazyResearch/lolcats")
    made.add_argument("--random-init", action="store_true", help="without their --lk_zero_init")
    options = made.parse_args(arguments)
    try:
        text = Text.load(options.text)
        check(options, text)
        open_repository(options.repo, ("src/model/load_model.py", DISTILL_CONFIG, MODEL_CONFIGS[options.shape]))
        folder = teacher_folder(options.teacher, options.layers)
    except ValueError as error:
        made.error(str(error))
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    origin = provenance(options.repo, options.seed)
    with contextlib.redirect_stdout(sys.stderr):  # their code prints
        method = PublishedLolcats(options.repo, folder, options)
        result = measure(method, options, text)
        if options.exchange is not None:
            method.exchange(text.train_T[None, : options.step_lengths[0]], options.exchange)
    publish("lolcats-published", options, text, result, origin)


if __name__ == "__main__":
    main()
