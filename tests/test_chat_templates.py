"""Chat templates of several families: every answer counts or is reported; a template gets its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import CHAT, byte_tokenizer

from linearize.errors import InputError
from linearize.training.data.documents import Document
from linearize.training.data.loading import load_documents
from linearize.training.data.preferences import preference_of, read_preferences
from linearize.training.data.pseudo_labels import prompt_of

# Turns end in <|end|>; EOS stands once, after the last turn of a text that is whole (phi-3).
CLOSED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Turns end in another token than EOS, and nothing closes the text (ChatML with another EOS).
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A mark that is not EOS closes the text, and begins as the mark of the next turn does.
MARKED = CLOSED.replace("{{ eos_token }}", "{{ '<|over|>' }}")
# Reasoning stands in the last answer alone (qwen3): earlier answers change when a turn follows.
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].strip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system's text stands before the user's last turn (mistral v3): what came before a turn depends on what follows.
SYSTEM_LAST = (
    "{% set system = messages[0]['content'] %}{{ bos_token }}"
    "{% for m in messages[1:] %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.index0 >= messages | length - 3 else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '[END]' }}{% endif %}{% endfor %}"
)
# Earlier answers are not in the text at all.
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfirst"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second"},
]
ANSWERS = {
    "closed": (CLOSED, "<think>\nhm\n</think>\n\nfirst<|end|>\nsecond<|end|>\n</s>"),
    "marked": (MARKED, "<think>\nhm\n</think>\n\nfirst<|end|>\nsecond<|end|>\n<|over|></s>"),
    "chatml": (CHATML, "<think>\nhm\n</think>\n\nfirst<|im_end|>\nsecond<|im_end|>\n</s>"),
    "reasoning": (REASONING, "first<|im_end|>\n<think>\n\n</think>\n\nsecond<|im_end|>\n</s>"),
    "system last": (SYSTEM_LAST, "<think>\nhm\n</think>\n\nfirst[END] second[END]</s>"),
}


def tokenizer(template: str | None) -> Any:
    made = byte_tokenizer(chat=template)
    made.add_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<|over|>", "<|im_start|>", "<|im_end|>"])
    return made


def documents(folder: Path, template: str, *rows: object, answer_only: bool = True) -> list[Document]:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_documents([str(folder / "a.jsonl")], tokenizer(template), answer_only=answer_only)


def counted(document: Document) -> str:
    pairs = zip(document.tokens, document.loss_mask, strict=True)
    return str(tokenizer(None).decode([token for token, counts in pairs if counts]))


def text(document: Document) -> str:
    return str(tokenizer(None).decode(document.tokens))


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_of_a_talk_counts(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    template, expected = ANSWERS[name]
    actual = documents(tmp_path, template, {"messages": TALK}, {"messages": TALK[:3]})
    assert counted(actual[0]) == expected
    assert counted(actual[1]).count("first") == 1
    assert not caplog.records


def test_an_answer_with_the_same_text_as_others_is_found_in_its_place(tmp_path: Path) -> None:
    talk = [{"role": role, "content": "same"} for role in ("user", "assistant", "user", "assistant", "user")]
    assert counted(documents(tmp_path, CLOSED, {"messages": talk})[0]) == "same<|end|>\n" * 2
    assert counted(documents(tmp_path, REASONING, {"messages": talk})[0]) == "same<|im_end|>\n" * 2


def test_answers_that_are_calls_of_tools_count(tmp_path: Path) -> None:
    template = CLOSED.replace("m['content']", "(m['content'] or m['tool_calls'] | tojson)")
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    talk = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ]
    result = counted(documents(tmp_path, template, {"messages": talk})[0])
    assert result.startswith('[{"type": "function"') and result.endswith("}]<|end|>\nThree.<|end|>\n</s>")


def test_answers_that_are_not_in_the_text_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = documents(tmp_path, FORGETFUL, {"messages": TALK[:3]}, {"messages": TALK}, {"messages": TALK})
    assert counted(result[1]) == "second\n</s>"
    (record,) = caplog.records
    assert "2 of 3 rows (the first: row 2)" in record.getMessage() and "do not count" in record.getMessage()


# Columns besides the messages

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}" + CHAT
WITH_MORE = "{{ documents[0]['text'] }}|{{ language }}|{% if not enable_thinking %}{{ 'quick' }}{% endif %}|" + CHAT
ASKED = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_reach_the_template(tmp_path: Path, tools: object, caplog: pytest.LogCaptureFixture) -> None:
    result = documents(tmp_path, WITH_TOOLS, {"messages": ASKED, "tools": tools}, {"messages": ASKED, "tools": None})
    assert text(result[0]).startswith('<s>tools: [{"type": "function", "function": {"name": "add"')
    assert text(result[1]) == "<s><user> 1+1?\n<assistant> 2\n</s>"
    assert [counted(document) for document in result] == ["2\n</s>"] * 2
    assert not caplog.records


def test_tools_choose_their_own_template_where_the_tokenizer_has_one(tmp_path: Path) -> None:
    made = tokenizer(None)
    made.chat_template = {"default": CHAT, "tool_use": WITH_TOOLS}
    spec = tmp_path / "a.json"
    spec.write_text(json.dumps([{"messages": ASKED, "tools": TOOLS}, {"messages": ASKED}]), encoding="utf-8")
    result = load_documents([str(spec)], made)
    assert text(result[0]).startswith("<s>tools: ") and text(result[1]).startswith("<s><user>")


def test_every_column_that_the_template_reads_reaches_it(tmp_path: Path) -> None:
    row = {
        "messages": ASKED, "documents": [{"title": "t", "text": "doc"}], "language": "en", "other": 3,
        "chat_template_kwargs": {"enable_thinking": False}, "bos_token": "not this", "tokenize": True,
    }  # fmt: skip
    assert text(documents(tmp_path, WITH_MORE, row)[0]) == "<s>doc|en|quick|<user> 1+1?\n<assistant> 2\n</s>"


def test_columns_that_the_template_could_have_used_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"messages": ASKED, "tools": TOOLS, "id": 7, "chat_template_kwargs": {"enable_thinking": False}}
    documents(tmp_path, CHAT, {"messages": ASKED}, row, row)
    printed = [record.getMessage() for record in caplog.records]
    assert len(printed) == 2 and all("2 of 3 rows (the first: row 2)" in line for line in printed)
    assert "'tools'" in printed[0] and "'enable_thinking'" in printed[1] and not any("'id'" in line for line in printed)


def test_columns_for_a_template_in_rows_that_go_through_none_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": "a", "output": "b", "tools": TOOLS}, {"prompt": "a", "completion": "b", "tools": TOOLS}]
    documents(tmp_path, WITH_TOOLS, *rows)
    assert "2 of 2 rows (the first: row 1)" in caplog.text and "'tools'" in caplog.text
    caplog.clear()
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": TOOLS}
    (tmp_path / "a.json").write_text(json.dumps([pair]), encoding="utf-8")
    read_preferences(str(tmp_path / "a.json"), tokenizer(WITH_TOOLS))
    assert "1 of 1 rows (the first: row 1)" in caplog.text and "'tools'" in caplog.text


def test_tools_of_preferences_and_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [{"role": "assistant", "content": "3"}]}
    result = preference_of({**row, "tools": TOOLS}, tokenizer(WITH_TOOLS))
    assert result.chosen.startswith("tools: ") and result.chosen[result.chosen_start :] == "2\n"
    assert prompt_of({"messages": ASKED, "tools": TOOLS}, tokenizer(WITH_TOOLS)).startswith("tools: ")
    assert prompt_of({"prompt": "1+1?", "tools": TOOLS}, tokenizer(WITH_TOOLS)).startswith("tools: ")
    (tmp_path / "a.json").write_text(json.dumps([{**row, "tools": TOOLS}]), encoding="utf-8")
    read_preferences(str(tmp_path / "a.json"), tokenizer(CHAT))
    assert "1 of 1 rows (the first: row 1)" in caplog.text and "'tools'" in caplog.text


def test_tools_that_are_none_are_refused_in_one_line(tmp_path: Path) -> None:
    for tools in ("add", 3, ["add"]):
        with pytest.raises(InputError, match=r"row 1: .*tools") as caught:
            documents(tmp_path, WITH_TOOLS, {"messages": ASKED, "tools": tools})
        assert "\n" not in str(caught.value)


def test_columns_of_another_kind_that_the_template_does_not_read_do_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": ASKED, "documents": "a text", "tools": value} for value in (float("nan"), "", [], "none")]
    assert [text(d) for d in documents(tmp_path, CHAT, *rows)] == ["<s><user> 1+1?\n<assistant> 2\n</s>"] * 4
    printed = [record.getMessage() for record in caplog.records]
    assert len(printed) == 2 and "4 of 4" in printed[0] and "'documents'" in printed[0] and "1 of 4" in printed[1]


def test_a_tokenizer_with_templates_of_other_names_alone(tmp_path: Path) -> None:
    made = tokenizer(None)
    made.chat_template = {"rag": CHAT, "tool_use": WITH_TOOLS}
    (tmp_path / "a.json").write_text(json.dumps([{"messages": ASKED}]), encoding="utf-8")
    with pytest.raises(InputError, match=r"row 1: .*template") as caught:
        load_documents([str(tmp_path / "a.json")], made)
    assert "\n" not in str(caught.value)


def test_a_template_with_tags_of_transformers_own(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ 'tools\n' }}{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{% else %}{{ m['content'] }}{% endif %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    )
    assert text(documents(tmp_path, template, {"messages": ASKED, "tools": TOOLS})[0]) == "<s>tools\n1+1?2</s>"
