"""The verb `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli import completion
from linearize.cli.options import (
    Base,
    Device,
    DeviceMap,
    DType,
    Overwrite,
    Recipe,
    RemoteCode,
    Revision,
    Settings,
    Token,
    size,
    specified,
)
from linearize.cli.output import show_rows


def convert(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A causal language model: a folder or a Hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for the student.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="SPEC",
            help="A file (.txt, .jsonl, .json, .csv, .parquet; also .gz, .zst), a folder or 'DIR/*.jsonl', a Hub data "
            "set (NAME@REVISION:SPLIT:COLUMN), or `self` (text that the teacher writes). May be repeated. Default: the "
            "recipe's data.sources.",
        ),
    ] = None,
    recipe: Recipe = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", autocompletion=completion.trackers, help="Log to tensorboard or wandb. May be repeated."
        ),
    ] = None,
    base: Base = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write mixers and LoRA alone; the teacher is needed to load them.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the teacher from disk block by block: it need not fit into memory.")
    ] = False,
    memory: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=size, help="Memory that block-wise training may use, like 24GB."),
    ] = None,
    disk: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=size, help="Disk that saved hidden states may use, like 2TB.")
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="N-N,N", help="Train only these blocks of layers, counted from 0, and make no student."),
    ] = None,
    self_contained: Annotated[
        bool,
        typer.Option(
            "--self-contained", help="Put the code of the layers into the folder: transformers loads it by itself."
        ),
    ] = False,
    push_to: Annotated[
        str | None, typer.Option(metavar="NAME", help="Upload the student to this repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to: make the repository private.")] = False,
    revision: Revision = None,
    token: Token = None,
    dtype: DType = None,
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Convert a teacher into a student."""
    from linearize.conversion.api import convert as run_convert
    from linearize.recipes.overrides import parse_settings

    run_convert(
        teacher,
        data=data or [],
        out=out,
        overrides=parse_settings(settings or []) | specified(base_weights=base),
        overwrite=overwrite,
        adapter_only=adapter_only,
        stream=stream,
        trust_remote_code=trust_remote_code,
        self_contained=self_contained,
        private=private or None,
        **specified(recipe=recipe, device=device, track=track, blocks=blocks, memory=memory, disk=disk),
        **specified(push_to=push_to, revision=revision, token=token, dtype=dtype, device_map=device_map),
    )
    if blocks is not None:
        print(f"blocks {blocks} are trained; the same command without --blocks makes the student")
        return
    _print_losses(out)


def _print_losses(folder: Path) -> None:
    """The losses of a conversion, from the report in the student's folder, and where the student is."""
    from linearize.metrics.report import read_report

    report = read_report(folder)
    if report is None:
        return
    losses = [("teacher", report.teacher_loss), ("bare swap", report.swap_loss)]
    losses += [(f"after {name}", loss) for name, loss, stage in report.moments() if stage is not None]
    print(f"held-out loss, nats per token ({report.heldout_tokens:,} tokens)")
    show_rows([{"": name, "loss": loss, "above": loss - report.teacher_loss} for name, loss in losses])
    print(f"KL(teacher||student) {report.student_kl:.4f}, same most likely token {report.student_top1:.1%}")
    print(f"student written to {folder}")
