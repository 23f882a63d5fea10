"""The verbs `eval` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli import completion
from linearize.cli.options import (
    Data,
    Device,
    DeviceMap,
    DType,
    Json,
    Model,
    Revision,
    Teacher,
    Token,
    count,
    counts,
    names,
    specified,
)
from linearize.cli.output import json_only, show

if TYPE_CHECKING:
    from linearize.evaluation import EvalReport


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A student's folder, or any causal language model.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="MODEL...", help="Further students in the same report.")
    ] = None,
    teacher: Teacher = None,
    data: Data = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.suites,
            help="quick, lolcats, open-llm, mamba-in-llama, long-context or chat.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks of lm-eval (`mmlu:5`: five shots) in place of the suite's."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of chat questions, for `--suite chat`.")
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of task definitions (lm-eval's YAML); they come before lm-eval's own."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="At most N items of each task, and N documents.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", parser=count, help="Whole documents up to N tokens; default: 65536."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Tokens of the longest row; default: the recipe's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", parser=count, help="Rows per batch; default: 8.")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Seed of everything that is drawn; default: 0.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that models write (HumanEval).")
    ] = False,
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible endpoint that judges chat answers.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the judge at that endpoint.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, report.html and samples.")] = None,
    revision: Revision = None,
    token: Token = None,
    dtype: DType = None,
    device: Device = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Compare a student with its teacher on the same items.

    Text, tasks, recall, branches and chat, in one report.
    """
    from linearize.evaluation import EvaluationOptions
    from linearize.evaluation import evaluate as run_evaluate

    options = EvaluationOptions(
        allow_code=allow_code,
        **specified(length=length, tokens=tokens, limit=limit, batch=batch, seed=seed, data_root=data_root),
        **specified(include_path=include_path, judge_url=judge_url, judge_model=judge_model, device=device),
        **specified(revision=revision, token=token, dtype=dtype, device_map=device_map),
    )
    with json_only(as_json):
        report = run_evaluate(
            model,
            options=options,
            **specified(compare=compare, teacher=teacher, data=data, suite=suite, tasks=names(tasks), out=out),
        )
    _print(report, as_json)


def bench(
    model: Model,
    teacher: Teacher = None,
    context: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens of context; default: 1024,4096,16384.")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N", help="Sequences per batch; default: 1.")] = None,
    new_tokens: Annotated[int | None, typer.Option(metavar="N", parser=count, help="Tokens timed per repeat.")] = None,
    repeats: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Repeats, of which the median is reported.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES", parser=count, help="Also find the largest batch that fits into this much memory."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and report.html.")] = None,
    revision: Revision = None,
    token: Token = None,
    dtype: DType = None,
    device: Device = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory next to the teacher.

    Prefill, time to first token, decode and memory, by context and batch.
    """
    from linearize.evaluation import EvaluationOptions
    from linearize.evaluation import bench as run_bench

    chosen = specified(revision=revision, token=token, dtype=dtype, device=device, device_map=device_map)
    with json_only(as_json):
        report = run_bench(
            model,
            options=EvaluationOptions(**chosen),
            **specified(teacher=teacher, contexts=counts(context), batches=counts(batch), new_tokens=new_tokens),
            **specified(repeats=repeats, memory_budget_bytes=memory, out=out),
        )
    _print(report, as_json)


def _print(report: EvalReport, as_json: bool) -> None:
    from linearize.evaluation import print_report

    if as_json:
        show(report.to_json(), as_json=True)
    else:
        print_report(report)
