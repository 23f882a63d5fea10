"""Run by a Python that has vLLM: what it writes after prompts from a student's folder, as JSON on stdout.

    python vllm_run.py FOLDER REQUEST

The request is JSON: `engine` (arguments of `vllm.LLM`), and `calls`, each with `prompts` (token ids), `params` (of
`SamplingParams`) and perhaps `abort`: numbers of prompts whose requests are aborted after that many tokens. Printed:
`calls`, for each call and prompt the samples, each with its `tokens` and their `logprobs`; `preemptions`; `pages`, the
bytes of each converted layer's page; `cached`, the prompt tokens of each call (without `abort`) that were in a cache.
"""

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler


def samples(output: Any) -> list[dict[str, Any]]:
    """The samples of one prompt."""
    return [
        {
            "tokens": list(one.token_ids),
            "logprobs": [step[token].logprob for token, step in zip(one.token_ids, one.logprobs or [], strict=False)],
        }
        for one in output.outputs
    ]


def with_aborts(llm: LLM, prompts: list[dict[str, Any]], params: SamplingParams, abort: dict[str, int]) -> list[Any]:
    """Step by hand, and abort some requests on the way: their samples are None."""
    engine, finished = llm.llm_engine, {}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if len(output.outputs[0].token_ids) >= abort.get(output.request_id, 10**9):
                engine.abort_request([output.request_id])
            elif output.finished:
                finished[output.request_id] = samples(output)
    return [finished.get(str(number)) for number in range(len(prompts))]


def main() -> None:
    """Print the answer."""
    folder, request = sys.argv[1], json.loads(sys.argv[2])
    preempted: list[str] = []
    preempt = Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    Scheduler._preempt_request = counted
    options = {"dtype": "float32", **request["engine"]}
    llm = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, **options)
    answers, cached = [], []
    for call in request["calls"]:
        params = SamplingParams(detokenize=False, ignore_eos=True, logprobs=0, **call["params"])
        prompts = [{"prompt_token_ids": ids} for ids in call["prompts"]]
        if "abort" in call:
            answers.append(with_aborts(llm, prompts, params, call["abort"]))
        else:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            cached.append(sum(output.num_cached_tokens or 0 for output in outputs))
            answers.append([samples(output) for output in outputs])
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    pages = [layer.page_bytes for layer in layers.values() if hasattr(layer, "page_bytes")]
    print(json.dumps({"calls": answers, "preemptions": len(preempted), "pages": pages, "cached": cached}))


if __name__ == "__main__":
    main()
