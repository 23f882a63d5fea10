"""Processes that work together, as torchrun starts them, forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["linearize.cli.main", "linearize.conversion.api", "peft", "torch.distributed.fsdp"]
CONTEXT.set_forkserver_preload(PRELOADED)
SECONDS = 240.0


def together(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a test module gives on each rank; an exit code or None where a process died."""
    results = CONTEXT.Queue()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    workers = [
        CONTEXT.Process(target=_work, args=(rank, environment, results, function, arguments)) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    result: dict[int, Any] = {}
    while len(result) < ranks and any(worker.is_alive() for worker in workers):
        try:
            rank, value = results.get(timeout=1.0)
            result[rank] = value
        except Exception:
            continue
    for worker in workers:
        worker.join(timeout=20)
        worker.kill()
    return [result.get(rank) for rank in range(ranks)]


def command(arguments: list[str], output: Path | None = None) -> int:
    """The command `linearize`, without plots, on one of the processes; what it prints goes to files by its rank."""
    from linearize.cli.main import main
    from linearize.conversion import outputs as papers

    for plot in ("plot_stages", "plot_layer_error"):
        setattr(papers, plot, lambda *_: None)
    if output is not None:
        rank = os.environ.get("RANK", "0")
        sys.stdout = (output.parent / f"{output.name}.out.{rank}").open("w")
        sys.stderr = (output.parent / f"{output.name}.err.{rank}").open("w")
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _work(rank: int, environment: dict[str, str], results: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    results.put((rank, function(*arguments)))
