"""`generate` with a compiled step gives the text without one, whatever happens to the compiler."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import left_padded, mixer, student_of, text, tiny
from test_generate_text import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import TextStreamer

from linearize.decoding.compiled import StepLoop, compiled_step
from linearize.decoding.generate import continue_text, generate_text
from linearize.errors import InputError

TOKENIZER = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
SHORT, LONG = "the cat", "the cat sat on the mat and sat there, red"
MESSAGE = "compiling a step of decoding, which takes half a minute or more\n"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing is compiled, no warning is thrown but where it is expected."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """How often a step was compiled."""
    return int(counters["stats"]["unique_graphs"])


def model_of(kind: str) -> Any:
    """A teacher of softmax layers, or a student that keeps one of two."""
    teacher = tiny_model(TOKENIZER, seed=3)
    return teacher if kind == "teacher" else student_of(teacher, [mixer("lolcats"), None])


def both(model: Any, prompt: str = SHORT, compile: str = "eager", **settings: Any) -> tuple[str, str]:
    """The text without and with a compiled step."""
    plain = continue_text(model, TOKENIZER, prompt, max_new_tokens=21, **settings)
    return plain, continue_text(model, TOKENIZER, prompt, max_new_tokens=21, compile=compile, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_same_text_from_one_graph(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Greedy and drawn, short prompts and long ones: compiled once, and said once."""
    model = model_of(kind)
    texts = []
    for settings in ({}, {"temperature": 1.4, "seed": 1}, {"temperature": 1.4, "seed": 2}):
        for prompt in (SHORT, LONG):
            plain, compiled = both(model, prompt, "aot_eager", **settings)
            assert compiled == plain != prompt
            texts.append(compiled)
    assert len(set(texts)) == len(texts) and graphs() == 1
    streamer = TextStreamer(TOKENIZER, skip_special_tokens=True)
    continue_text(model, TOKENIZER, LONG, max_new_tokens=21, compile="aot_eager", streamer=streamer)
    assert capfd.readouterr() == (texts[1] + "\n", MESSAGE)


@pytest.mark.slow
def test_other_sizes_and_moved_weights_are_compiled_again() -> None:
    model = tiny("llama", attention="sdpa", num_hidden_layers=1)
    first = compiled_step(model, rows=1, tokens=40, backend="eager")
    assert compiled_step(model, rows=1, tokens=200, backend="eager") is first
    assert compiled_step(model, rows=1, tokens=300, backend="eager") is not first  # softmax layers need more capacity
    second = compiled_step(model, rows=2, tokens=40, backend="eager")
    assert second is not None and second.batch == 2
    next(model.parameters()).data = next(model.parameters()).data.clone()
    assert compiled_step(model, rows=2, tokens=40, backend="eager") is not second


@pytest.mark.slow
def test_a_batch_behind_padding() -> None:
    """Through transformers' `generate`: rows of several lengths, one of which ends before the others."""
    model = student_of(tiny("llama", attention="sdpa", num_hidden_layers=2), [mixer("lolcats"), None])
    ids, mask = left_padded(text(3, 13), [13, 2, 7])
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    stop = int(model.generate(ids, **settings, eos_token_id=-1)[1, 13 + 4])
    expected = model.generate(ids, **settings, eos_token_id=stop)
    ended = (expected[:, 13:] == 0).any(1)
    assert ended[1] and not ended.all()
    step = compiled_step(model, rows=3, tokens=28, backend="eager")
    assert step is not None
    with torch.inference_mode():
        actual: Tensor = model.generate(ids, **settings, eos_token_id=stop, custom_generate=StepLoop(step))
    assert torch.equal(actual, expected) and graphs() == 1


def no_compiler(_: Any) -> None:
    raise RuntimeError("No working C++ compiler found")


def reads_a_value(model: nn.Module) -> None:
    """As experts do that are chosen by value: nothing that `fullgraph=True` can trace."""
    model.register_forward_hook(lambda _, __, out: None if out.logits.sum() > 0 else out)


def no_static_form(model: Any) -> None:
    model.train()


@pytest.mark.parametrize(
    ("harm", "backend", "why"),
    [
        (no_compiler, "broken", "No working C\\+\\+ compiler"),
        (reads_a_value, "eager", "[Bb]ranching"),
        (no_static_form, "eager", "eval mode"),
    ],
)
def test_where_nothing_compiles(
    harm: Callable[[Any], None], backend: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One warning, and the text all the same."""
    if harm is no_compiler:
        torch._dynamo.register_backend(compiler_fn=lambda graph, inputs: no_compiler(graph), name="broken")
    model = model_of("student")
    if harm is not no_compiler:
        harm(model.lm if harm is reads_a_value else model)
    plain = continue_text(model, TOKENIZER, LONG, max_new_tokens=9)
    with pytest.warns(UserWarning, match=f"goes on without torch.compile: .*{why}") as warned:
        result = continue_text(model, TOKENIZER, LONG, max_new_tokens=9, compile=backend)
    assert result == plain and len(warned) == 1
    assert capfd.readouterr().err == MESSAGE


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_inductor() -> None:
    """For real, in a model of one layer."""
    model = tiny("llama", attention="sdpa", num_hidden_layers=1, vocab_size=len(TOKENIZER))
    plain, compiled = both(model, compile="inductor")
    assert compiled == plain and graphs() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "other", "compile": True}, "compile and a draft model were both given"),
        ({"prompt_lookup": True, "compile": True}, "compile and prompt lookup were both given"),
        ({"compile": "abacus"}, "unknown backend of torch.compile 'abacus'"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = model_of("teacher")
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        generate_text(tmp_path, "the", device="cpu", **settings)


@pytest.mark.parametrize(("name", "asked"), [("num_beams", "beam search"), ("num_return_sequences", "3 texts")])
def test_generation_configs_of_more_than_one_text(name: str, asked: str) -> None:
    model = model_of("teacher")
    setattr(model.generation_config, name, 3)
    with pytest.raises(InputError, match=asked):
        continue_text(model, TOKENIZER, SHORT, compile="eager")
