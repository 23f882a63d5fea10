"""`generate_text` and `chat` continue a prompt as transformers' own `generate` does, and end cleanly."""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.decoding.generate import chat, continue_text, generate_text
from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a character, so that text and tokens say the same; no pad token."""
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", *string.ascii_letters, *string.digits, *" \n:.,>"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher and its tokenizer on disk."""
    path = tmp_path_factory.mktemp("models") / "teacher"
    tokenizer = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    tiny_model(tokenizer, seed=3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=10, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval()


def greedy_by_hand(folder: Path, prompt: str, count: int) -> str:
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_streams_what_it_returns(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = generate_text(folder, "the cat", max_new_tokens=17, device="cpu")
    out, err = capfd.readouterr()
    assert text == greedy_by_hand(folder, "the cat", 17) != "the cat"
    assert out == text + "\n"
    assert "pad_token" not in err and "warn" not in err.lower()


def test_speculation_changes_nothing(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompt = "the cat sat on the mat and the cat sat"
    tokenizer = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    tiny_model(tokenizer, seed=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = generate_text(folder, prompt, max_new_tokens=25, stream=False, device="cpu")
    assert generate_text(folder, prompt, max_new_tokens=25, prompt_lookup=True, device="cpu") == plain
    assert generate_text(folder, prompt, max_new_tokens=25, stream=False, draft=tmp_path, device="cpu") == plain
    assert capfd.readouterr().out == plain + "\n"


def test_a_student_drafts_for_its_teacher(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Self-speculation: the teacher's own text, fewer passes; its statistics go to stderr."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    teacher = LlamaForCausalLM.from_pretrained(folder)
    LinearizedForCausalLM.from_teacher(teacher, [MIXERS["lolcats"](window=12), None]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = generate_text(folder, "the cat", max_new_tokens=25, stream=False, device="cpu")
    settings: dict = {"max_new_tokens": 25, "draft": tmp_path, "draft_tokens": 3, "stats": True, "device": "cpu"}
    assert generate_text(folder, "the cat", **settings) == plain
    out, err = capfd.readouterr()
    assert out == plain + "\n"
    passes, accepted = (int(n) for n in re.findall(r"in (\d+) passes.* (\d+) of \d+ draft tokens accepted", err)[0])
    assert accepted > 0 and passes < 25
    assert continue_text(teacher, tokenizer, "the cat", max_new_tokens=25, draft=teacher) == plain


def test_drafts_keep_the_distribution_cold(folder: Path) -> None:
    """At a temperature near zero drawing is greedy, with drafts as without, and the seed alone decides above."""
    common: dict = {"max_new_tokens": 20, "stream": False, "device": "cpu", "prompt_lookup": True, "draft_tokens": 3}
    assert generate_text(folder, "a red", temperature=1e-4, **common) == greedy_by_hand(folder, "a red", 20)
    drawn = [generate_text(folder, "a red", temperature=1.5, seed=seed, **common) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_draft_of_another_vocabulary(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same number of tokens, two of them the other way round."""
    tokenizer = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    tiny_model(tokenizer, seed=4).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    swapped = text.replace('"a": 2,', '"a": -1,').replace('"b": 3,', '"b": 2,').replace('"a": -1,', '"a": 3,')
    assert swapped != text
    (tmp_path / "tokenizer.json").write_text(swapped, encoding="utf-8")
    with pytest.raises(InputError, match="its vocabulary is not that of"):
        generate_text(folder, "the", draft=tmp_path, device="cpu")
    assert capfd.readouterr().out == ""


def test_sampling_follows_the_seed(folder: Path) -> None:
    def sample(seed: int, temperature: float = 1.5) -> str:
        return generate_text(
            folder, "a red", max_new_tokens=20, temperature=temperature, seed=seed, stream=False, device="cpu"
        )

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(before, torch.get_rng_state())
    assert sample(1, temperature=1e-4) == sample(2, temperature=1e-4) == greedy_by_hand(folder, "a red", 20)


def test_empty_prompt(folder: Path) -> None:
    assert generate_text(folder, "", max_new_tokens=9, stream=False, device="cpu")
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="no BOS token"):
        continue_text(tiny_model(tokenizer, seed=3), tokenizer, "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"prompt_lookup": True, "draft": "other"}, "choose one"),
        ({"draft_tokens": 0, "draft": "other"}, "draft_tokens is 0"),
        ({"draft_tokens": 4}, "draft_tokens 4 without a draft"),
        ({"stats": True}, "stats without a draft"),
        ({"device": "abacus"}, "device 'abacus'"),
    ],
)
def test_bad_settings(folder: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_text(folder, "the", **settings)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing"):
        generate_text(tmp_path / "nothing", "the", device="cpu")


def lines(*args: str, end: type[BaseException] = EOFError) -> Callable[[str], str]:
    """A stand-in for `input` that gives these lines, then ends."""
    left = list(args)

    def read(prompt: str) -> str:
        if not left:
            raise end
        return left.pop(0)

    return read


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_chat_continues_one_text(folder: Path, capfd: pytest.CaptureFixture[str], end: type[BaseException]) -> None:
    chat(folder, max_new_tokens=6, temperature=0, device="cpu", read=lines("the cat", "  ", "a red", end=end))
    out = capfd.readouterr().out
    first = greedy_by_hand(folder, "the cat", 6)
    second = greedy_by_hand(folder, first + "\na red", 6)
    assert first.removeprefix("the cat") in out
    assert second.removeprefix(first + "\na red") in out
    assert out.startswith("No chat template") and out.endswith("\n")


def test_chat_with_a_template(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    chat(tmp_path, max_new_tokens=6, temperature=0, device="cpu", read=lines("the cat", "a red"))
    out = capfd.readouterr().out
    prompt = "user: the cat\nbot:"
    first = greedy_by_hand(folder, prompt, 6).removeprefix(prompt)
    prompt = f"user: the cat\nassistant: {first}\nuser: a red\nbot:"
    second = greedy_by_hand(folder, prompt, 6).removeprefix(prompt)
    assert first in out and second in out and out.startswith("Type a message")


def test_half_of_a_surrogate_pair_in_a_prompt_is_replaced(folder: Path) -> None:
    """What a terminal or a shell passes on of bytes that are not UTF-8."""
    results = [
        generate_text(folder, prompt, max_new_tokens=3, stream=False, device="cpu") for prompt in ("a\udcff", "a\ufffd")
    ]
    assert results[0] == results[1]
