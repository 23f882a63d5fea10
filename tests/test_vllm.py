"""Students in vLLM, through the plugin that pip installs: its tokens are those of `generate`.

vLLM is in an environment of its own (`make serve-test`), which a process of its own runs.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny

from linearize.modeling import LinearizedForCausalLM, load

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("LINEARIZE_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="make serve-test brings vLLM")
pytestmark = [pytest.mark.slow, needs_vllm]
WIDE = {"head_dim": 32, "hidden_size": 48}  # vLLM's attention for CPUs has no smaller heads
LENGTHS = (29, 1, 90, 6, 53, 2)
NEW = 25
GREEDY = {"temperature": 0, "max_tokens": NEW}
SMALL = {"max_model_len": 250, "max_num_batched_tokens": 32, "max_num_seqs": 5}
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "window-linear": (
        "llama",
        [
            mixer("lolcats"),
            mixer("lolcats", num_sinks=2, window=6, window_shape="sliding", shift="shared"),
            mixer("lolcats", store=5, feature_map="gain"),
        ],
        {"max_model_len": 250},
    ),
    "hybrid-chunked": ("llama", [mixer("lolcats"), None, mixer("sliding_window", num_sinks=1)], SMALL),
    "recurrent-chunked": ("qwen3", [mixer("mamba2"), None, mixer("gated_delta_net")], SMALL),
    "no-softmax-chunked": ("llama", [mixer("mamba"), mixer("gla"), mixer("retention")], SMALL),
    "kept-window-softcap": ("gemma2", [None, mixer("lolcats"), None], SMALL),
}


def built(case: str) -> LinearizedForCausalLM:
    family, plan, _ = CASES[case]
    return student_of(tiny(family, attention="eager", tie_word_embeddings=case == "window-linear", **WIDE), plan)


def run(folder: Path, engine: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    request = json.dumps({"engine": engine, "calls": calls})
    command = [str(PYTHON), str(ROOT / "tests" / "support" / "vllm_run.py"), str(folder), request]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-1000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


@torch.no_grad()
def check_samples(
    student: LinearizedForCausalLM, prompt: list[int], sample: dict[str, Any], atol: float = 2e-3
) -> None:
    """Log-probabilities are the student's own after these tokens."""
    ids = torch.tensor([[*prompt, *sample["tokens"]]])
    scores = student(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = scores.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample["logprobs"]), own, rtol=0, atol=atol)


def greedy(student: LinearizedForCausalLM, prompt: list[int]) -> list[int]:
    out = student.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def prompts(student: LinearizedForCausalLM) -> list[list[int]]:
    return [text(1, length, seed=length)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_of_a_mixed_batch_is_that_of_generate(case: str, tmp_path: Path) -> None:
    """Twice, so that the second batch finds pages that the first one left."""
    student = built(case)
    student.save_pretrained(tmp_path)
    texts = prompts(student)
    answer = run(tmp_path, CASES[case][2], [{"prompts": texts, "params": GREEDY}] * 2)
    expected = [greedy(student, prompt) for prompt in texts]
    assert len({tuple(tokens) for tokens in expected}) == len(texts)
    for call in answer["calls"]:
        assert [samples[0]["tokens"] for samples in call] == expected
    for prompt, samples in zip(texts, answer["calls"][0], strict=True):
        check_samples(student, prompt, samples[0])
    assert len(answer["pages"]) == sum(entry is not None for entry in student.config.plan)
    assert len(set(answer["pages"])) == 1


def test_half_precision_is_what_vllm_chooses_by_itself(tmp_path: Path) -> None:
    """Log-probabilities of the tokens that it wrote are those of the student loaded in bf16, up to rounding."""
    built("recurrent-chunked").save_pretrained(tmp_path)
    student = load(tmp_path, dtype=torch.bfloat16)
    texts = prompts(student)
    answer = run(tmp_path, SMALL | {"dtype": "auto"}, [{"prompts": texts, "params": GREEDY}])
    for prompt, samples in zip(texts, answer["calls"][0], strict=True):
        check_samples(student, prompt, samples[0], atol=0.3)


def test_a_cached_prefix_is_a_page_that_was_kept(tmp_path: Path) -> None:
    """Later texts begin as earlier ones: their states come from pages that were kept at a prompt's last boundary of
    blocks (token 192 of the first, 160 of the second)."""
    student = built("hybrid-chunked")
    student.save_pretrained(tmp_path)
    first, *others = (text(1, length, seed=length)[0].tolist() for length in (200, 9, 14))
    texts = [first, *(first[:190] + more for more in others), first]
    calls = [{"prompts": [one], "params": GREEDY} for one in texts]
    engine = {"max_model_len": 250, "enable_prefix_caching": True, "block_size": 32}
    answer = run(tmp_path, engine, calls)
    assert [call[0][0]["tokens"] for call in answer["calls"]] == [greedy(student, one) for one in texts]
    assert answer["cached"] == [0, 0, 160, 192]


def test_samples_seeds_and_aborted_requests(tmp_path: Path) -> None:
    student = built("window-linear")
    student.save_pretrained(tmp_path)
    texts = prompts(student)
    sampled = {"temperature": 1.0, "n": 3, "seed": 7, "max_tokens": NEW}
    answer = run(
        tmp_path,
        {"max_model_len": 250, "enable_prefix_caching": False},  # vLLM's CPU build has no seeds for prompts in chunks
        [
            {"prompts": texts, "params": sampled},
            {"prompts": texts, "params": GREEDY, "abort": {"0": 3, "4": 9}},
            {"prompts": texts, "params": sampled},
            {"prompts": texts, "params": sampled | {"seed": 8}},
        ],
    )
    first, aborted, again, other = answer["calls"]
    tokens = [[sample["tokens"] for sample in samples] for samples in first]
    assert tokens == [[sample["tokens"] for sample in samples] for samples in again]
    assert tokens != [[sample["tokens"] for sample in samples] for samples in other]
    assert all(len({tuple(one) for one in samples}) == 3 for samples in tokens)
    for prompt, samples in zip(texts, first, strict=True):
        for sample in samples:
            check_samples(student, prompt, sample)
    assert [number for number, samples in enumerate(aborted) if samples is None] == [0, 4]
    for prompt, samples in zip(texts, aborted, strict=True):
        assert samples is None or samples[0]["tokens"] == greedy(student, prompt)


def test_preempted_requests_start_again_and_end_the_same(tmp_path: Path) -> None:
    """The kept layer's blocks run out while requests run; what was preempted is read anew, in chunks."""
    student = built("hybrid-chunked")
    student.save_pretrained(tmp_path)
    texts = [text(1, length, seed=length)[0].tolist() for length in (115, 120, 110, 118)]
    answer = run(tmp_path, SMALL | {"num_gpu_blocks_override": 11}, [{"prompts": texts, "params": GREEDY}])
    assert answer["preemptions"] > 0
    assert [samples[0]["tokens"] for samples in answer["calls"][0]] == [greedy(student, prompt) for prompt in texts]


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"tensor_parallel_size": 2}, "parallel"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
    ],
)
def test_what_the_plugin_does_not_run_is_refused_by_name(engine: dict[str, Any], words: str, tmp_path: Path) -> None:
    built("window-linear").save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match=words):
        run(tmp_path, {"max_model_len": 250, **engine}, [])
