"""Greedy tokens of a folder in vLLM, for `linearize verify`: see `run_transformers.py`.

Students need linearize there.
"""

import json
import os
import sys
from importlib.util import find_spec

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # errors in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import vllm


def main() -> None:
    folder, request, answer = sys.argv[1:4]
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        if json.load(file).get("model_type") == "linearized" and find_spec("linearize") is None:
            raise ModuleNotFoundError("No module named 'linearize'")  # vLLM's own report has many lines
    longest = max(len(ids) for ids in asked["rows"]) + asked["new"]
    llm = vllm.LLM(
        folder, dtype=asked["dtype"], trust_remote_code=asked["remote_code"], skip_tokenizer_init=True,
        enforce_eager=True, max_model_len=longest,
    )  # fmt: skip
    params = vllm.SamplingParams(
        temperature=0, max_tokens=asked["new"], ignore_eos=True, logprobs=0, detokenize=False, repetition_penalty=1.0
    )
    rows = []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in asked["rows"]], params, use_tqdm=False):
        one = output.outputs[0]
        scores = [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
        rows.append({"tokens": list(one.token_ids), "logprobs": scores})
    with open(answer, "w", encoding="utf-8") as file:
        json.dump({"version": vllm.__version__, "rows": rows}, file)


if __name__ == "__main__":
    main()
