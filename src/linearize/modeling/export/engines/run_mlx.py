"""Greedy tokens of a folder in mlx-lm, for `linearize verify`: see `run_transformers.py`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def main() -> None:
    folder, request, answer = sys.argv[1:4]
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    model, _ = load_model(Path(folder), trust_remote_code=asked["remote_code"])
    if asked["dtype"] == "float32":
        model.set_dtype(mx.float32)
    rows = []
    for ids in asked["rows"]:
        tokens, logprobs = [], []
        for token, scores in generate_step(mx.array(ids), model, max_tokens=asked["new"]):
            tokens.append(int(token))
            logprobs.append(float(scores[int(token)].astype(mx.float32)))
        rows.append({"tokens": tokens, "logprobs": logprobs})
    with open(answer, "w", encoding="utf-8") as file:
        json.dump({"version": version("mlx-lm"), "rows": rows}, file)


if __name__ == "__main__":
    main()
