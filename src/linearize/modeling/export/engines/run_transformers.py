"""Greedy tokens of a folder in plain transformers, for `linearize verify`; run by any Python that has it.

    python run_transformers.py FOLDER REQUEST.json ANSWER.json

REQUEST: `rows` (token ids), `new` (tokens to write after each), `dtype`. ANSWER: `version`, and for each row `tokens`
and the log-probability of each, `logprobs`.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, request, answer = sys.argv[1:4]
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, asked["dtype"]), trust_remote_code=asked["remote_code"]
    ).eval()
    rows = []
    for ids in asked["rows"]:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=asked["new"], do_sample=False,
                num_beams=1, eos_token_id=-1, repetition_penalty=1.0, return_dict_in_generate=True, output_logits=True,
                pad_token_id=0,
            )  # fmt: skip
        tokens = out.sequences[0, len(ids) :].tolist()
        scores = [step[0].float().log_softmax(-1) for step in out.logits]
        rows.append({"tokens": tokens, "logprobs": [float(s[t]) for s, t in zip(scores, tokens)]})  # noqa: B905
    with open(answer, "w", encoding="utf-8") as file:
        json.dump({"version": transformers.__version__, "rows": rows}, file)


if __name__ == "__main__":
    main()
