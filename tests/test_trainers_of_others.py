"""Students under transformers' Trainer and trl's SFTTrainer, DPOTrainer and GRPOTrainer, as objects and by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from models import student_of, tiny

from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")

NAMES = ["lolcats", "mamba2", "gated_delta_net"]
SETTINGS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False, "seed": 3,
    "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
TEXTS = [f"one cat sat on mat number {n} and saw {n * 7} birds" for n in range(8)]


def saved_student(name: str, folder: Path) -> tuple[LinearizedForCausalLM, Path]:
    """A hybrid with a tokenizer next to it, in memory and as its folder."""
    teacher = tiny("llama", attention="sdpa", vocab_size=258)
    model = student_of(teacher, [MIXERS[name](), None, MIXERS[name]()])
    model.save_pretrained(folder)
    byte_tokenizer(pad_token="</s>").save_pretrained(folder)
    return model, folder


def changed(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    return {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}


def state(model: Any) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["object", "path"])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(name: str, by: str, packing: bool, tmp_path: Path) -> None:
    model, folder = saved_student(name, tmp_path / "student")
    before = state(model)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_length=64, packing=packing, packing_strategy="wrapped", **SETTINGS
    )
    trainer = trl.SFTTrainer(
        model=str(folder) if by == "path" else model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_tokenizer(pad_token="</s>"),
    )
    assert isinstance(trainer.model, LinearizedForCausalLM)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0] and losses[0] < 20
    assert any(".mixer." in k for k in changed(before, trainer.model))


def test_sft_trainers_loss_is_the_students_own(tmp_path: Path) -> None:
    model, _ = saved_student("mamba2", tmp_path / "student")
    settings = trl.SFTConfig(output_dir=str(tmp_path / "out"), max_length=64, **{**SETTINGS, "max_steps": 1})
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=byte_tokenizer(pad_token="</s>"),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        rows = [row[mask.bool()][None] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        total = sum(model(row, labels=row, use_cache=False).loss * (row.shape[1] - 1) for row in rows)
        result = trainer.compute_loss(model, batch)
    torch.testing.assert_close(result, total / sum(row.shape[1] - 1 for row in rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["object", "path"])
def test_dpo_trainer(name: str, by: str, tmp_path: Path) -> None:
    model, folder = saved_student(name, tmp_path / "student")
    before = state(model)
    rows = {"prompt": TEXTS, "chosen": [" yes it did"] * 8, "rejected": [" no never, not even once"] * 8}
    trainer = trl.DPOTrainer(
        model=str(folder) if by == "path" else model,
        ref_model=None if by == "path" else LinearizedForCausalLM.from_pretrained(folder),
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), max_length=96, beta=0.1, **SETTINGS),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=byte_tokenizer(pad_token="</s>"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - 0.6931) < 1e-3 and losses[1] < losses[0]
    assert any(".mixer." in k for k in changed(before, trainer.model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["object", "path"])
def test_grpo_trainer(name: str, by: str, tmp_path: Path) -> None:
    """Two steps on what the student itself generates: the reward differs by completion, and every weight moves."""
    model, folder = saved_student(name, tmp_path / "student")
    before, seen = state(model), []

    def reward(completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    trainer = trl.GRPOTrainer(
        model=str(folder) if by == "path" else model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"), max_completion_length=7, **{**SETTINGS, "per_device_train_batch_size": 4},
            num_generations=4,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        processing_class=byte_tokenizer(pad_token="</s>"),
    )  # fmt: skip
    assert isinstance(trainer.model, LinearizedForCausalLM)
    trainer.train()
    assert len(seen) == 8 and len(set(seen)) > 2
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 2 and max(norms) > 0
    still = set(before) - changed(before, trainer.model)
    assert all(".mixer.feature_" in key for key in still), "feature maps alone: the texts are within the window"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(checkpointing: bool, tmp_path: Path) -> None:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, _ = saved_student("gated_delta_net", tmp_path / "student")
    before = state(model)
    tokenizer = byte_tokenizer(pad_token="</s>")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "out"), gradient_checkpointing=checkpointing, **SETTINGS),
        train_dataset=[tokenizer(text) for text in TEXTS],
        eval_dataset=[tokenizer(text) for text in TEXTS[:3]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    assert any(".mixer." in k for k in changed(before, model))
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 20


@pytest.mark.parametrize("name", NAMES)
def test_peft(name: str, tmp_path: Path) -> None:
    """Adapters train under transformers' Trainer, are merged, and the student loads with them from its folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    import linearize

    model, _ = saved_student(name, tmp_path / "student")
    tokenizer = byte_tokenizer(pad_token="</s>")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    before = state(adapted)
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(output_dir=str(tmp_path / "out"), **SETTINGS),
        train_dataset=[tokenizer(text) for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    moved = changed(before, adapted)
    assert moved and all(".lora_" in key for key in moved)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        logits = linearize.load(tmp_path / "tuned", device="cpu")(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_config_names_no_code_of_its_own() -> None:
    assert student_of(tiny("llama"), MIXERS["mamba2"]()).config.auto_map == {}
