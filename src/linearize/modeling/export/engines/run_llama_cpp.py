"""Greedy tokens of a GGUF file in llama.cpp, for `linearize verify`: see `run_transformers.py`.

`xllamacpp` is llama.cpp's server as a Python package.
"""

import json
import sys

import xllamacpp


def main() -> None:
    file, request, answer = sys.argv[1:4]
    with open(request, encoding="utf-8") as opened:
        asked = json.load(opened)
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = max(len(ids) for ids in asked["rows"]) + asked["new"] + 8
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    if asked["dtype"] == "float32":  # keys and values are halved otherwise
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    rows = []
    for ids in asked["rows"]:
        tokens: list[int] = []
        scores: list[float] = []
        while len(tokens) < asked["new"]:  # one at a time: a longer answer leaves such tokens out in silence
            body = {
                "prompt": [*ids, *tokens], "max_tokens": 1, "temperature": 0, "logprobs": 1, "ignore_eos": True,
                "repeat_penalty": 1.0, "cache_prompt": bool(tokens),
            }  # fmt: skip
            logprobs = server.handle_completions(body)["choices"][0]["logprobs"]
            if logprobs is None:
                raise RuntimeError("its server leaves out a token that is a part of a character: give other --prompts")
            (step,) = logprobs["content"]
            tokens.append(step["id"])
            scores.append(step["logprob"])
        rows.append({"tokens": tokens, "logprobs": scores})
    with open(answer, "w", encoding="utf-8") as opened:
        json.dump({"version": xllamacpp.__version__, "rows": rows}, opened)


if __name__ == "__main__":
    main()
