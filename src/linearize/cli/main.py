"""The command `linearize`: one thin function per verb; what a verb needs is imported when it runs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_command

from linearize.cli.distributed import agreed, join
from linearize.cli.inspect import inspect
from linearize.cli.options import (
    Base,
    Data,
    Device,
    Json,
    MaxNewTokens,
    Model,
    RemoteCode,
    Seed,
    Teacher,
    Temperature,
    count,
    counts,
    each_with_its_option,
    given,
    names,
    size,
)
from linearize.cli.output import DONE, FAILED, INTERRUPTED, conversion_lines, json_only, one_line, show, table
from linearize.cli.plan import plan

app = typer.Typer(
    name="linearize",
    help="Turn a pretrained Transformer into a subquadratic or hybrid one. `--debug` anywhere shows tracebacks.",
    add_completion=False,
    rich_markup_mode=None,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the work failed, 2 bad usage or input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    stderr = sys.stderr
    try:
        join(arguments)
        _flush_subnormals()
        if not debug:
            _quiet_libraries()
        arguments = each_with_its_option(arguments, "--compare")
        with get_command(app).make_context("linearize", arguments) as context:
            context.command.invoke(context)
        sys.stdout.flush()
        return DONE
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("linearize: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone; nothing is left to flush
        return FAILED
    except Exception as error:
        code, message = one_line(error)
        speaks, code = agreed(error, code)
        if speaks:
            if debug:
                traceback.print_exc(file=stderr)
            hint = " (--debug shows where)" if code == FAILED and not debug else ""
            print(f"linearize: {message}{hint}", file=stderr)
        return code


def _flush_subnormals() -> None:
    """Numbers too small for their dtype's exponent count as 0: a processor takes tens of times as long over them, and
    states that decay are full of them. For every verb, once; a library that is imported changes nothing."""
    import torch

    torch.set_flush_denormal(True)


def _quiet_libraries() -> None:
    """An error is one line on stderr, so transformers' own notices and bars stay away."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"linearize {version('linearize')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the verb."""


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for student, text and plots; default: linearize-demo. An earlier demo is replaced."),
    ] = None,
) -> None:
    """Convert the embedded teacher and show the result (under 3 minutes on 2 cores)."""
    from linearize.demo.run import run_demo

    run_demo(**given(out=out))


@app.command()
def convert(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Any causal LM: a folder or a Hub name.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="SPEC",
            help="A file (.txt, .jsonl, .json, .csv, .parquet; also .gz, .zst), a Hub data set, or `self`. "
            "May be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the student.")],
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A recipe's name or a .yaml file; default: window-linear.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: plan.mixer.window=16. May be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    track: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Log to tensorboard or wandb. May be repeated.")
    ] = None,
    base: Base = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the teacher block by block: it need not fit into memory.")
    ] = False,
    memory: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=size, help="Memory that block-wise training may take: 24GB.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=size, help="Disk that saved hidden states may take: 2TB.")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="N-N,N", help="Train only these blocks (from 0), then stop.")
    ] = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Convert a teacher into a student."""
    from linearize.conversion.run import convert as run_convert
    from linearize.recipes.overrides import parse_settings

    run_convert(
        teacher,
        data=data,
        out=out,
        overrides=parse_settings(settings or []) | given(base_weights=base),
        overwrite=overwrite,
        stream=stream,
        trust_remote_code=trust_remote_code,
        **given(recipe=recipe, device=device, track=track, blocks=blocks, memory=memory, disk=disk),
    )
    if blocks is not None:
        print(f"blocks {blocks} are trained; the same command without --blocks makes the student")
        return
    for line in conversion_lines(out):
        print(line)


app.command()(plan)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    draft: Annotated[str | None, typer.Option(metavar="MODEL", help="A smaller model that drafts tokens.")] = None,
    prompt_lookup: Annotated[bool, typer.Option("--prompt-lookup", help="Draft tokens from the text itself.")] = False,
    draft_tokens: Annotated[
        str | None, typer.Option(metavar="K|auto", help="Draft tokens a round; auto (the default): as many as pay.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print to stderr how many drafts were accepted.")] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run torch.compile first: takes half a minute or more, for long texts.")
    ] = False,
    device: Device = None,
) -> None:
    """Continue a prompt."""
    from linearize.decoding.generate import generate_text

    chosen = given(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, draft=draft, device=device)
    if draft_tokens is not None:
        chosen["draft_tokens"] = draft_tokens if draft_tokens == "auto" else count(draft_tokens)
    generate_text(model, prompt, prompt_lookup=prompt_lookup, stats=stats, compile=compile, **chosen)


@app.command()
def chat(
    model: Model,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Talk with a model on the terminal."""
    from linearize.decoding.generate import chat as run_chat

    run_chat(model, **given(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, device=device))


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A student's folder, or any causal LM.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="MODEL...", help="Further students in the same report.")
    ] = None,
    teacher: Teacher = None,
    data: Data = None,
    suite: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="quick, lolcats, open-llm, mamba-in-llama, long-context or chat."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="lm-eval's tasks (`mmlu:5`: five shots) instead of the suite's."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Local task files; without it tasks come from the Hub.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Task definitions of your own (lm-eval's YAML), for --tasks.")
    ] = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out tasks without a local file.")] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="At most N items of a task, and N documents.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", parser=count, help="Whole documents up to N tokens; default: 65536."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Longest row in tokens; default: the recipe's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", parser=count, help="Rows at a time; default: 8.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", parser=count, help="Seed of every draw; default: 0.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that models write (HumanEval).")
    ] = False,
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible endpoint that judges chat answers.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="The judge's name there.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, report.html and samples.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """A student beside its teacher on the same items: text, tasks, recall, branches, chat; one report."""
    from linearize.evaluation import EvaluationOptions, print_report
    from linearize.evaluation import evaluate as run_evaluate

    options = EvaluationOptions(
        skip_missing=skip_missing,
        allow_code=allow_code,
        **given(length=length, tokens=tokens, limit=limit, batch=batch, seed=seed, data_root=data_root),
        **given(include_path=include_path, judge_url=judge_url, judge_model=judge_model, device=device),
    )
    with json_only(as_json):
        report = run_evaluate(
            model,
            options=options,
            **given(compare=compare, teacher=teacher, data=data, suite=suite, tasks=names(tasks), out=out),
        )
    if as_json:
        show(report, as_json=True)
    else:
        print_report(report)


@app.command()
def bench(
    model: Model,
    teacher: Teacher = None,
    context: Annotated[str | None, typer.Option(metavar="N,N", help="Tokens before; default: 1024,4096,16384.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N", help="Sequences at a time; default: 1.")] = None,
    new_tokens: Annotated[int | None, typer.Option(metavar="N", parser=count, help="Tokens timed per repeat.")] = None,
    repeats: Annotated[int | None, typer.Option(metavar="N", parser=count, help="Repeats; medians are told.")] = None,
    memory: Annotated[
        int | None, typer.Option(metavar="BYTES", parser=count, help="Also the largest batch in this much memory.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and report.html.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prefill, time to first token, decode, memory against context and batch, beside the teacher."""
    from linearize.evaluation import EvaluationOptions, print_report
    from linearize.evaluation import bench as run_bench

    with json_only(as_json):
        report = run_bench(
            model,
            options=EvaluationOptions(**given(device=device)),
            **given(teacher=teacher, contexts=counts(context), batches=counts(batch), new_tokens=new_tokens),
            **given(repeats=repeats, memory_budget_bytes=memory, out=out),
        )
    if as_json:
        show(report, as_json=True)
    else:
        print_report(report)


app.command()(inspect)


@app.command()
def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A student's folder, or its Hub name.")],
    to: Annotated[
        str, typer.Option(metavar="TARGET", help="granite-hybrid or qwen3.5 (native), or hf (with its own code).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exported model.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
) -> None:
    """Write a student for programs without linearize."""
    from linearize.modeling.export import export_student

    print(f"exported to {export_student(student, to, out, overwrite=overwrite)}")


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe, every key spelled out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one."""
    from linearize.recipes import DEFAULT_RECIPE, load_recipe, recipe_names

    if name is not None:
        recipe = load_recipe(name)
        show(recipe, as_json=True) if as_json else print(recipe.to_yaml(), end="")
        return
    found = [load_recipe(known) for known in recipe_names()]
    rows = [{"name": r.name, "default": r.name == DEFAULT_RECIPE, "description": r.description} for r in found]
    if as_json:
        show(rows, as_json=True)
        return
    for line in table(rows):
        print(line)
