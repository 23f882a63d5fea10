"""A teacher whose weights are read block by block: for every family the numbers are those of a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, mixer
from teacher_folder import write_teacher
from transformers import AutoModelForCausalLM

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.blocks import LoadedBlocks
from linearize.modeling.io.streamed_teacher import StreamedBlocks, StreamedTeacher
from linearize.modeling.probe import probe

CPU = torch.device("cpu")


def streamed(folder: Path) -> StreamedTeacher:
    return StreamedTeacher(str(folder), device=CPU)


def batch(rows: int = 3, tokens: int = 31) -> dict[str, torch.Tensor]:
    """Rows of two documents each."""
    ids = torch.randint(3, 40, (rows, tokens), generator=torch.Generator().manual_seed(1))
    position = torch.cat([torch.arange(4), torch.arange(tokens - 4)]).expand(rows, -1)
    return {"input_ids": ids, "position_ids": position.contiguous()}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_of_every_family_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    write_teacher(tmp_path, family, shard="30KB", tie_word_embeddings=family in ("gemma2", "gpt2", "qwen2"))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    source = streamed(tmp_path)
    assert source.sites == probe(model)
    torch.manual_seed(5)
    student = LinearizedForCausalLM.from_teacher(model, [None, *[mixer("lolcats")] * (LAYERS - 1)])
    blocks, loaded = StreamedBlocks(source, student.config, seed=5), LoadedBlocks(model, student)
    ids = batch()
    hidden = blocks.enter()(ids)
    assert torch.equal(hidden, loaded.enter()(ids))
    for span in (range(0, 2), range(2, 3)):
        one, other = blocks.pair(span), loaded.pair(span)
        teacher_out, student_out = one.outputs(ids, hidden), one.student_outputs(ids, hidden)
        torch.testing.assert_close(teacher_out, loaded.teacher(span).outputs(ids, hidden), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(student_out, other.student_outputs(ids, hidden), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(teacher_out, student_out, atol=1e-3)
        inside = {name for name, p in one.teacher.get_submodule(source.layers).named_parameters() if p.is_meta}
        assert not inside
        hidden = teacher_out
    logits = blocks.head(blocks.hidden_input.as_tuple).logits(ids, hidden)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_only_what_a_block_needs_has_weights(tmp_path: Path) -> None:
    write_teacher(tmp_path, num_hidden_layers=5)
    source = streamed(tmp_path)
    real = {name for name, p in source.tree(range(2, 4)).named_parameters() if not p.is_meta}
    assert {name.split(".")[2] for name in real if name.startswith("model.layers.")} == {"2", "3"}
    assert {name for name in real if not name.startswith("model.layers.")} == {"model.norm.weight"}
    assert all(p.is_meta for p in source.skeleton.parameters())
