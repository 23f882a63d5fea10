"""A deeper teacher out of a small one: each layer is followed by copies that start as nothing, then all are trained.

Speculation pays where the target is much deeper than its draft; the real teachers at hand have five layers. This makes
one of `--times` as many (identity-started blocks as in LLaMA Pro, 2401.02415), trained on text like any other, so that
what is measured on it is a trained model and not random weights. The small teacher, or a student of it, is the draft.

    python scripts/deepen.py TEACHER --data stories.txt --out deep --times 4 --steps 150
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize.decoding.loading import pad_token
from linearize.evaluation import loss_only
from linearize.training.data.loading import DataConfig, batches, document_rows, load_documents, pack, split


def deepened(teacher: PreTrainedModel, times: int) -> PreTrainedModel:
    """The same function with `times` as many layers: copies whose outputs start at zero."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = times * teacher.config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for kind in teacher.config.layer_types for _ in range(times)]
    deep = type(teacher)(config)
    weights = {name: x for name, x in teacher.state_dict().items() if ".layers." not in name}
    deep.load_state_dict(weights, strict=False)
    for i, layer in enumerate(deep.model.layers):
        layer.load_state_dict(teacher.model.layers[i // times].state_dict())
        if i % times:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.zeros_(last.weight)
    deep.generation_config = copy.deepcopy(teacher.generation_config)
    return deep


def main() -> None:
    """Deepen, train, measure, save."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("teacher")
    options.add_argument("--data", action="append", required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--times", type=int, default=4)
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    torch.manual_seed(chosen.seed)
    torch.set_flush_denormal(True)
    teacher = AutoModelForCausalLM.from_pretrained(chosen.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(chosen.teacher)
    parts = split(load_documents(chosen.data, tokenizer), DataConfig(length=chosen.length, max_heldout_tokens=16_384))
    rows = pack(parts.train, chosen.length, pad_token_id=pad_token(tokenizer))
    held_out = document_rows(parts.heldout, chosen.length, pad_token_id=pad_token(tokenizer))
    deep = deepened(teacher, chosen.times)
    losses = {"teacher": loss_only(teacher, held_out.in_order(8))[0], "start": loss_only(deep, held_out.in_order(8))[0]}
    optimiser = torch.optim.AdamW(deep.parameters(), lr=chosen.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, chosen.lr, total_steps=chosen.steps, pct_start=0.1)
    deep.train()
    for step, batch in zip(range(chosen.steps), batches(rows, chosen.batch, seed=chosen.seed), strict=False):
        loss = deep(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(deep.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step}: {float(loss):.4f}", flush=True)
    losses["end"] = loss_only(deep.eval(), held_out.in_order(8))[0]
    print(json.dumps(losses))
    deep.save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)


if __name__ == "__main__":
    main()
