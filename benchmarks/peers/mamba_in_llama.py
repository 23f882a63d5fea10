"""The Mamba in the Llama's published code (github.com/jxiw/MambaInLlama), from a checkout of its own.

    git clone https://github.com/jxiw/MambaInLlama PEER
    PYTHONPATH=. PEER_VENV/bin/python -m benchmarks.peers.mamba_in_llama --repo PEER --teacher DIR --text tokens.npz

Model, start from the attention's weights, decoding and loss are theirs; optimiser, learning rate and schedule are those
of their config, in a loop of our own (theirs is TRL's, over chats). On a CPU none of their kernels runs: they are
replaced by the references of the mamba_ssm package, which are not meant to be fast (see `README.md`). `--device cuda`
replaces nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.measure import Method, measure, publish
from benchmarks.peers.options import Text, check, parser
from benchmarks.peers.repository import open_repository, provenance, teacher_folder

CONFIG = "llama3.2_3B/largest_llama3_ft_mamba_0.5.yaml"
LAYERS = ("mamba.hybrid_mamba_layer", "mamba_inference.hybrid_mamba_layer")
WRAPPERS = ("mamba.hybrid_wrapper", "mamba_inference.hybrid_wrapper")


def use_references() -> None:
    """Put the references of mamba_ssm where their code calls kernels of CUDA and Triton, and a CPU for its GPU."""
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")  # imported when mamba_ssm is
    norms: Any = importlib.import_module("mamba_ssm.ops.triton.layer_norm")
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update_ref

    def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, **named: Any) -> Tensor:
        unused = {"residual": None, "dropout_p": 0.0, "prenorm": False, "residual_in_fp32": False}
        assert named == unused, named
        normed: Tensor = norms.rms_norm_ref(x, weight, bias, eps=eps, upcast=True)
        return normed

    norms.rms_norm_fn = rms_norm
    for name in LAYERS:
        layer: Any = importlib.import_module(name)
        layer.selective_scan_fn, layer.selective_state_update = scan, update
    for name in WRAPPERS:
        wrapper: Any = importlib.import_module(name)
        wrapper.MambaDecoderLayer = _on_cpu(wrapper.MambaDecoderLayer)


def _on_cpu(layer: Any) -> Any:
    """The decoder layer, whatever device is asked for."""

    class OnCPU(layer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named | {"device": "cpu"})

    return OnCPU


@contextlib.contextmanager
def without_cuda(active: bool) -> Iterator[None]:
    """`module.cuda()` does nothing inside the `with` block."""
    before = nn.Module.cuda
    if active:
        nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.cuda = before  # type: ignore[method-assign]


class PublishedMamba(Method):
    """Their hybrid with every other layer Mamba, trained end to end; contexts are read by their decoding model with
    every layer Mamba, as its softmax layers need flash-attn."""

    def __init__(self, repository: Path, folder: Path, options: argparse.Namespace) -> None:
        self.options, self.folder = options, folder
        self.settings = importlib.import_module("yaml").safe_load((repository / CONFIG).read_text(encoding="utf-8"))
        transformers = importlib.import_module("transformers")
        self.transformers = transformers
        self.teacher: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager"
        )
        self.teacher.to(options.device).eval().requires_grad_(False)
        self.config = self.teacher.config
        self.model: Any = self.teacher
        self.reads_contexts: Any = None
        alignment = ModuleType("alignment")  # the trainer's module derives a config from it
        alignment.SFTConfig = transformers.TrainingArguments  # type: ignore[attr-defined]
        sys.modules.setdefault("alignment", alignment)
        self.compute_loss = importlib.import_module("trainer.kd_trainer").KDTrainer.compute_loss
        self.trainer = SimpleNamespace(
            teacher_model=self.teacher, kl_weight=self.settings["kl_weight"], ce_weight=self.settings["ce_weight"]
        )

    def convert(self) -> None:
        """As in their `train_distill.py`, every other layer from the first on, weights from the attention's."""
        torch.manual_seed(self.options.seed)
        count = self.config.num_hidden_layers
        kept = [number for number in range(count) if number not in range(0, count, 2)]
        if self.options.measure == ["contexts"]:  # nothing else is in memory then
            self.model = self.teacher = self.trainer.teacher_model = None
        else:
            self.model = self._converted(kept).model.eval()
        if "contexts" in self.options.measure:
            self.reads_contexts = self._decoding(self._converted([]))

    def _converted(self, kept: list[int]) -> Any:
        """Their wrapper for training; `kept`: the layers with softmax attention."""
        wrapper = importlib.import_module(WRAPPERS[0]).MambaTransformerHybridModelWrapper
        with without_cuda(self.options.device == "cpu"):
            return wrapper.init_distillation(
                None, str(self.folder), self._config(kept), attn_layers=kept, dtype=torch.float32,
                attn_implementation="eager", init_with_kqvo=True,
            )  # fmt: skip

    def _config(self, kept: list[int]) -> Any:
        """Their config of the new layers, from the teacher's sizes."""
        teacher = self.config
        return importlib.import_module("mamba.hybrid_mamba_config").MambaConfig(
            d_model=teacher.hidden_size,
            ssm_cfg={"expand": 1},
            rms_norm_eps=teacher.rms_norm_eps,
            d_inner=teacher.hidden_size,
            d_xb=teacher.num_key_value_heads * (teacher.hidden_size // teacher.num_attention_heads),
            intermediate_size=teacher.intermediate_size,
            hidden_act=teacher.hidden_act,
            n_layer=teacher.num_hidden_layers,
            attn_layers=kept,
        )

    def _decoding(self, trained: Any) -> Any:
        """Their decoding model, with the weights of one for training."""
        module = importlib.import_module(WRAPPERS[1])
        model = self.transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, torch_dtype=torch.float32, attn_implementation="eager"
        )
        with tempfile.TemporaryDirectory() as folder, without_cuda(self.options.device == "cpu"):
            torch.save(trained.model.state_dict(), Path(folder) / "pytorch_model.bin")
            return module.MambaTransformerHybridModelWrapper(
                folder, model, trained.mamba_config, attn_layers=[], dtype=torch.float32
            ).eval()

    def logits(self, ids_BT: Tensor) -> Tensor:
        """See `Method`."""
        logits: Tensor = self.model(ids_BT.to(self.options.device), use_cache=False).logits
        return logits

    def _loss(self, ids_BT: Tensor) -> Tensor:
        ids = ids_BT.to(self.options.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        loss: Tensor = self.compute_loss(self.trainer, self.model, batch)
        return loss

    def step(self, ids_BT: Tensor) -> None:
        """See `Method`; all weights have gradients."""
        self.model.train()
        self._loss(ids_BT).backward()
        self.model.zero_grad(set_to_none=True)
        self.model.eval()

    def train(self, rows_RT: Tensor) -> list[float]:
        """All weights, with the learning rate, warm-up and schedule of their config and its trainer's clipping at 1."""
        losses = []
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings["learning_rate"], weight_decay=0.0)
        steps = len(rows_RT)
        warmup = int(self.settings["warmup_ratio"] * steps)
        schedule = self.transformers.get_scheduler(self.settings["lr_scheduler_type"], optimizer, warmup, steps)
        self.model.train()
        for row_1T in rows_RT.split(1):
            loss = self._loss(row_1T)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        self.model.eval()
        return losses

    def prefill(self, ids_BT: Tensor) -> Any:
        """See `Method`."""
        parameters = importlib.import_module("mamba_ssm.utils.generation").InferenceParams
        states = parameters(max_seqlen=ids_BT.shape[1] + self.options.new_tokens + 1, max_batch_size=len(ids_BT))
        return self.decode(states, ids_BT)

    def decode(self, cache: Any, ids_B1: Tensor) -> Any:
        """See `Method`; the states are changed in place."""
        self.reads_contexts(ids_B1.to(self.options.device), inference_params=cache, num_last_tokens=1)
        cache.seqlen_offset += ids_B1.shape[1]
        return cache


def decoding_difference(method: PublishedMamba, ids_1T: Tensor) -> float:
    """Largest difference of the last token's logits, read at once and token by token, in parts of the largest."""
    model, states = method.reads_contexts, method.prefill(ids_1T[:, :-2])
    states = method.decode(states, ids_1T[:, -2:-1])
    last = model(ids_1T[:, -1:].to(method.options.device), inference_params=states, num_last_tokens=1).logits
    whole = model(ids_1T.to(method.options.device), num_last_tokens=1).logits
    return float((last - whole).abs().max() / whole.abs().max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    made = parser(__doc__)
    made.set_defaults(step_lengths=[128, 256], train_tokens=2048, train_length=128)
    made.add_argument("--repo", type=Path, required=True, help="checkout of jxiw/MambaInLlama")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = made.parse_args(arguments)
    try:
        text = Text.load(options.text)
        check(options, text)
        open_repository(options.repo, ("mamba/hybrid_wrapper.py", "trainer/kd_trainer.py", CONFIG))
        folder = teacher_folder(options.teacher, options.layers)
    except ValueError as error:
        made.error(str(error))
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    origin = provenance(options.repo, options.seed)
    with contextlib.redirect_stdout(sys.stderr):  # their code prints
        if options.device == "cpu":
            use_references()
        method = PublishedMamba(options.repo, folder, options)
        result = measure(method, options, text)
        if "contexts" in options.measure:
            with torch.inference_mode():
                result["decoding_difference"] = decoding_difference(method, text.train_T[None, :64])
    publish("mamba-published", options, text, result, origin)


if __name__ == "__main__":
    main()
