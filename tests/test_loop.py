"""The loop: the same trajectory for any micro-batch, the best weights kept, only named parameters changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_stage import BATCH, LENGTH, ToyRun, toy_batches, toy_config, toy_heldout

from linearize.errors import InputError
from linearize.training.config import Batch, LossSum
from linearize.training.loop import StageResult, run_stage
from linearize.training.step import derived_seed


class Notes:
    """A tracker that records its calls."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.began: list[tuple[str, int | None]] = []
        self.ended = 0

    def begin(self, stage: str, step: int | None) -> None:
        self.began.append((stage, step))

    def log(self, step: int, values: Any) -> None:
        self.logged.append((step, dict(values)))

    def end(self) -> None:
        self.ended += 1

    def column(self, key: str) -> list[float]:
        return [values[key] for _, values in self.logged if key in values]


def train(run: ToyRun, *, notes: Notes | None = None, folder: Path | None = None, **settings: Any) -> StageResult:
    config = toy_config(**settings)
    return run_stage(run, config, toy_batches, toy_heldout(), length=LENGTH, tracker=notes, checkpoint_dir=folder)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_loss_falls_and_the_result_says_so() -> None:
    run = ToyRun()
    result = train(run)
    assert (result.name, result.steps, result.tokens) == ("toy", 23, 23 * BATCH * LENGTH)
    assert [step for step, _ in result.losses] == list(range(1, 24))
    assert [step for step, _ in result.heldout] == [0, 4, 8, 12, 16, 20, 23]
    assert result.heldout[-1][1] < result.heldout[0][1] - 0.3
    assert (result.best_step, result.stopped_early, run.finished) == (23, False, 1)
    assert result.trainable_parameters == 7 * 13 + 13 + 13 * 11 + 11
    assert result.seconds > 0


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 50])
def test_micro_batches_follow_the_trajectory_of_the_whole_batch(micro: int) -> None:
    whole, cut = ToyRun(dtype=torch.float64), ToyRun(dtype=torch.float64)
    expected = train(whole)
    result = train(cut, micro_batch=micro)
    assert cut.forwards == 23 * -(-BATCH // micro)
    assert difference(whole.weights(), cut.weights()) < 1e-10
    assert [loss for _, loss in result.losses] == pytest.approx([loss for _, loss in expected.losses], rel=1e-10)


def test_counts_of_micro_batches_differ_so_that_a_mean_of_means_would_be_seen() -> None:
    batch, run = next(toy_batches(0)), ToyRun()
    with torch.no_grad():
        parts = [run.loss({key: value[i : i + 2] for key, value in batch.items()}) for i in range(0, BATCH, 2)]
    assert len({int(part.count) for part in parts}) > 2
    mean = sum(float(part.sum) for part in parts) / sum(float(part.count) for part in parts)
    mean_of_means = sum(float(part.sum) / float(part.count) for part in parts) / len(parts)
    assert abs(mean - mean_of_means) > 0.01


def test_the_gradient_is_that_of_the_mean_loss_over_counting_tokens() -> None:
    run, notes = ToyRun(dtype=torch.float64), Notes()
    total, count, _ = run.heldout_loss(next(toy_batches(0)))
    trained = [value for name, value in run.model.named_parameters() if name != "embedding.weight"]
    gradients = torch.autograd.grad(total / count, trained)
    train(run, notes=notes, steps=1, micro_batch=3)
    assert notes.column("loss") == [pytest.approx(float(total.detach() / count), rel=1e-12)]
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert notes.column("gradient_norm") == [pytest.approx(norm, rel=1e-12)]


def test_seeds_differ_between_runs_steps_and_ranks() -> None:
    seeds = {derived_seed(seed, step, rank) for seed in range(3) for step in range(-1, 12) for rank in range(4)}
    assert len(seeds) == 3 * 13 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_only_named_parameters_change_and_each_group_at_its_rate() -> None:
    run = ToyRun()
    before = run.weights()
    train(run, steps=1, warmup=0, weight_decay=0.0, keep_best=False)
    moved = {name: float((value - before[name]).abs().max()) for name, value in run.weights().items()}
    assert moved.pop("embedding.weight") == 0
    expected = {name: 0.03 if name.startswith("hidden") else 0.01 for name in moved}  # AdamW's first step is lr * sign
    assert moved == pytest.approx(expected, rel=1e-3)


def test_a_stage_never_ends_worse_than_it_began() -> None:
    run = ToyRun()
    before = run.weights()
    result = train(run, lr=3.0, clip=None, patience=2)
    assert all(loss > result.heldout[0][1] for _, loss in result.heldout[1:])
    assert (result.best_step, result.stopped_early, result.steps) == (0, True, 8)
    assert difference(before, run.weights()) == 0


def test_the_best_weights_in_the_middle_are_kept() -> None:
    run = ToyRun()
    run.before_loss = lambda forwards: wreck(run) if forwards > 9 else None
    result = train(run, patience=3)
    assert (result.best_step, result.steps, result.stopped_early) == (8, 20, True)
    assert result.heldout[-1][1] > result.heldout[0][1] + 0.3
    assert train(run, steps=1).heldout[0][1] == dict(result.heldout)[8]


def test_patience_counts_from_the_last_improvement() -> None:
    class Scripted(ToyRun):
        losses = iter([5.0, 4.0, 4.5, 4.0, 3.0, 3.5, 3.0, 3.1, 2.0])

        def heldout_loss(self, batch: Batch) -> LossSum:
            return LossSum(torch.tensor(7 * next(self.losses)), 7)

    run, config = Scripted(), toy_config(steps=40, patience=3)
    result = run_stage(run, config, toy_batches, toy_heldout()[:1], length=LENGTH)
    assert [loss for _, loss in result.heldout] == pytest.approx([5.0, 4.0, 4.5, 4.0, 3.0, 3.5, 3.0, 3.1])
    assert (result.best_step, result.steps, result.stopped_early) == (16, 28, True)


def wreck(run: ToyRun) -> None:
    with torch.no_grad():
        run.model.head.weight.add_(0.5 * torch.randn_like(run.model.head.weight))


def test_without_keep_best_the_last_weights_stay() -> None:
    run = ToyRun()
    before = run.weights()
    result = train(run, lr=3.0, clip=None, keep_best=False)
    assert result.best_step == 0
    assert difference(before, run.weights()) > 1


def test_without_held_out_text_the_last_weights_stay() -> None:
    run = ToyRun()
    result = run_stage(run, toy_config(patience=1), toy_batches, [], length=LENGTH)
    assert (result.heldout, result.best_step, result.steps) == ((), 23, 23)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    run, notes, norms = ToyRun(), Notes(), []

    def look(*_: Any) -> None:
        gradients = [value.grad.flatten() for value in run.model.parameters() if value.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    run.model.embedding.weight.requires_grad_(False)
    handle = register_optimizer_step_pre_hook(look)
    try:
        train(run, notes=notes, clip=0.125)
    finally:
        handle.remove()
    assert max(notes.column("gradient_norm")) > 0.2
    assert max(norms) == pytest.approx(0.125, rel=1e-4)
    assert norms == pytest.approx([min(norm, 0.125) for norm in notes.column("gradient_norm")], rel=1e-4)


def test_the_rate_follows_warmup_and_plateau() -> None:
    notes = Notes()
    train(ToyRun(), notes=notes, lr=3.0, clip=None, schedule="plateau", plateau_patience=0, plateau_factor=0.5)
    rates = notes.column("lr")
    assert rates[:4] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert rates[4:9:4] == pytest.approx([1.5, 0.75])


def test_nan_is_refused_and_nothing_is_final(tmp_path: Path) -> None:
    class Broken(ToyRun):
        def loss(self, batch: Batch) -> LossSum:
            total, count, _ = super().loss(batch)
            return LossSum(total * (float("nan") if self.forwards == 3 else 1.0), count)

    run, notes = Broken(), Notes()
    with pytest.raises(RuntimeError, match=r"loss at step 3 of stage 'toy' \(lr 0.03\) is nan"):
        train(run, folder=tmp_path, notes=notes)
    assert (run.finished, notes.ended) == (0, 1)
    assert not any(tmp_path.iterdir())
    assert all(value.isfinite().all() for value in run.weights().values())


def test_an_infinite_gradient_is_refused() -> None:
    class Broken(ToyRun):
        def loss(self, batch: Batch) -> LossSum:
            total, count, _ = super().loss(batch)
            return LossSum(total + (self.model.hidden.bias.sum() * 0).sqrt(), count)

    run = Broken()
    before = run.weights()
    with pytest.raises(RuntimeError, match=r"gradient at step 1 .* is nan"):
        train(run)
    assert difference(before, run.weights()) == 0


def test_a_held_out_loss_that_is_not_finite_is_refused() -> None:
    run = ToyRun()
    with torch.no_grad():
        run.model.head.weight[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="held-out loss after step 0"):
        train(run)


def test_a_step_without_counting_tokens_changes_nothing() -> None:
    def batches(step: int) -> Any:
        for number, batch in enumerate(toy_batches(step), start=step):
            labels = torch.full_like(batch["labels"], -100) if number == 1 else batch["labels"]
            yield batch | {"labels": labels}

    run, seen = ToyRun(), []
    run.before_loss = lambda forwards: seen.append(run.weights())
    result = run_stage(run, toy_config(steps=3), batches, [], length=LENGTH)
    assert [step for step, _ in result.losses] == [1, 3]
    assert difference(seen[1], seen[2]) == 0
    assert difference(seen[0], seen[1]) > 0


def test_held_out_text_without_counting_tokens_is_refused() -> None:
    heldout = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in toy_heldout()]
    with pytest.raises(InputError, match="held-out"):
        run_stage(ToyRun(), toy_config(), toy_batches, heldout, length=LENGTH)


def test_no_tokens_skip_the_stage() -> None:
    run = ToyRun()
    before = run.weights()
    config = toy_config().model_copy(update={"tokens": 0})
    result = run_stage(run, config, toy_batches, toy_heldout(), length=LENGTH)
    assert (result.steps, result.heldout, run.forwards, run.finished) == (0, (), 0, 1)
    assert difference(before, run.weights()) == 0


def test_seeds_decide_and_the_callers_generator_is_left_alone() -> None:
    runs = [ToyRun(dropout=0.3) for _ in range(3)]
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    for run, seed in zip(runs, (5, 5, 6), strict=True):
        train(run, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    assert difference(runs[0].weights(), runs[1].weights()) == 0
    assert difference(runs[0].weights(), runs[2].weights()) > 0


def test_bf16_runs_the_forward_under_autocast_and_leaves_the_weights_fp32() -> None:
    run, seen = ToyRun(), []
    run.before_loss = lambda forwards: seen.append(torch.is_autocast_enabled("cpu"))
    result = train(run, precision="bf16")
    assert seen == [True] * 23
    assert {value.dtype for value in run.weights().values()} == {torch.float32}
    assert result.heldout[-1][1] < result.heldout[0][1] - 0.3
    fp32 = train(ToyRun())
    assert result.losses != fp32.losses


def test_gradient_checkpointing_is_asked_of_the_run_or_refused() -> None:
    class Able(ToyRun):
        checkpoints_gradients, enabled = True, 0

        def enable_gradient_checkpointing(self) -> None:
            assert self.forwards == 0
            self.enabled += 1

    run = Able()
    train(run, steps=1)
    assert run.enabled == 0
    train(run := Able(), steps=1, gradient_checkpointing=True)
    assert run.enabled == 1
    with pytest.raises(InputError, match="gradient_checkpointing"):
        train(ToyRun(), gradient_checkpointing=True)


RANK = """
import sys, torch, torch.distributed as dist
from functools import partial
from toy_stage import *
from linearize.training.loop import run_stage
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
run = ToyRun(dtype=torch.float64)
if rank == 1:
    torch.nn.init.zeros_(run.model.head.weight)  # the first rank's start counts
batches = partial(toy_batches, rank=rank, ranks=2)
result = run_stage(run, toy_config(micro_batch=3), batches, toy_heldout(), length=LENGTH)
torch.save((run.weights(), result.heldout), f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_follow_the_trajectory_of_one(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent / "support"), str(Path(__file__).parents[1] / "src")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    run = ToyRun(dtype=torch.float64)
    expected = train(run)
    for rank in (0, 1):
        weights, heldout = torch.load(tmp_path / f"{rank}.pt")
        assert difference(weights, run.weights()) < 1e-10
        assert [loss for _, loss in heldout] == pytest.approx([loss for _, loss in expected.heldout], rel=1e-10)


def test_a_frozen_parameter_among_the_trained_is_a_bug() -> None:
    run = ToyRun()
    run.model.head.weight.requires_grad_(False)
    with pytest.raises(AssertionError, match="frozen"):
        train(run)
