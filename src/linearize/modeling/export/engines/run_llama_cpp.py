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
        body = {
            "prompt": ids, "max_tokens": asked["new"], "temperature": 0, "logprobs": 1, "ignore_eos": True,
            "repeat_penalty": 1.0, "cache_prompt": False,
        }  # fmt: skip
        steps = server.handle_completions(body)["choices"][0]["logprobs"]["content"]
        rows.append({"tokens": [step["id"] for step in steps], "logprobs": [step["logprob"] for step in steps]})
    with open(answer, "w", encoding="utf-8") as opened:
        json.dump({"version": xllamacpp.__version__, "rows": rows}, opened)


if __name__ == "__main__":
    main()
