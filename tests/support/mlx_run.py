"""Run by a Python that has mlx-lm: logits of a folder fed in parts, and what it writes greedily, as JSON on stdout.

    python mlx_run.py FOLDER REQUEST

The request is JSON: `ids` (rows of tokens of one length), `parts` (their tokens at a time), `new` (tokens to write
after the first row).
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def main() -> None:
    """Print `logits` (rows), `written`, `again` (from a cache that was filled before) and `state` (bytes by layer)."""
    folder, request = Path(sys.argv[1]), json.loads(sys.argv[2])
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder, trust_remote_code=True)
    ids = mx.array(request["ids"])
    cache, logits, start = model.make_cache(), [], 0
    for count in request["parts"]:
        logits.append(model(ids[:, start : start + count], cache=cache))
        start += count
    cache_bytes = [one.nbytes for one in cache]
    prompt = ids[0]
    written = [int(token) for token, _ in generate_step(prompt, model, max_tokens=request["new"])]
    prefix = model.make_cache()
    model(prompt[None, :-1], cache=prefix)
    again = [
        int(token) for token, _ in generate_step(prompt[-1:], model, max_tokens=request["new"], prompt_cache=prefix)
    ]
    rows = mx.concatenate(logits, axis=1).astype(mx.float32).tolist()
    print(json.dumps({"logits": rows, "written": written, "again": again, "state": cache_bytes}))


if __name__ == "__main__":
    main()
