"""`linearize plan`: parameters, memory, work and disk from a config alone, compared with real models."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer as mixer_config
from models import student_of, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from linearize.cli.main import main
from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.planning import plan_conversion
from linearize.planning.costs import stage_costs, text
from linearize.planning.devices import Device, load_device
from linearize.planning.samples import look_at, measured, on_sample
from linearize.recipes import load_recipe
from linearize.recipes.schema import Recipe
from linearize.training import memory_simulation
from linearize.training.config import StageConfig
from linearize.training.dataset_stage import DatasetStageConfig
from linearize.training.memory_simulation import Meter, Operation, simulation
from linearize.training.stages import STAGES
from linearize.training.step import Stepper

LLAMAS: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}
SHORT = {"data.length": 8, "plan.mixer.window": 4}


def config_folder(folder: Path, **fields: Any) -> Path:
    common = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "dtype": "bfloat16",
              "max_position_embeddings": 8192, "tie_word_embeddings": False}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**common, **fields}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("one"), num_hidden_layers=1)


def tiny_folder(folder: Path, **changes: Any) -> Path:
    tiny(**changes).config.save_pretrained(folder)
    return folder


def stages() -> list[tuple[str, dict[str, Any]]]:
    """One of each stage with a mixer that it takes."""
    layer_wise = {"matrix_alignment": "mamba2", "hidden_alignment": "gated_delta_net"}
    own = {"sft": {"data": "x.jsonl"}, "dpo": {"data": "x.jsonl"}}
    return [
        (layer_wise.get(name, "lolcats"), {"name": name, "tokens": 700, "lr": 1e-3, "batch": 3, **own.get(name, {})})
        for name in STAGES
    ]


@pytest.mark.parametrize("name", LLAMAS)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / name, **LLAMAS[name])
    config = AutoConfig.from_pretrained(folder)
    whole = look_at(config, load_recipe("lolcats"), torch.bfloat16)
    assert whole.parameters == PARAMETERS[name]
    assert whole.weight_bytes == pytest.approx(2 * PARAMETERS[name], rel=1e-6)
    assert [len(kind) for kind in whole.kinds] == [LLAMAS[name]["num_hidden_layers"]]


def test_405b_by_blocks(tmp_path: Path) -> None:
    """k = 1 needs the published > 200 TB; k = 9 makes 14 blocks; all layers at once do not fit."""
    folder = config_folder(tmp_path / "405b", **LLAMAS["405b"])
    settings = {**SHORT, "stages.0.tokens": "50M", "stages.1.tokens": 0}
    plan = plan_conversion(folder, recipe="lolcats", overrides=settings, device="H100-80", block=1)
    run = plan.stages[0].runs_by_block
    assert run is not None and plan.fits and plan.hidden_bytes == run.disk_bytes == 2 * 50_000_000 * 16_384 * 126
    assert run.disk_bytes > 200e12 and plan.stages[0].memory.peak > 800e9
    cheapest = plan.stages[0].cheapest
    assert cheapest is not None and 9 <= cheapest.block < 14  # 6.4 GB a layer
    assert plan.stages[0].trained_parameters == 126 * (2 * 128 * 128 * 64 + 128)
    with pytest.raises(InputError, match=r"stages.0: block 1 needs 206 TB of disk .*: 9 to 1\d would fit"):
        plan_conversion(folder, recipe="lolcats", overrides=settings, device="H100-80", block=1, disk=25 * 10**12)


@pytest.mark.parametrize(("mixer", "stage"), stages(), ids=list(STAGES))
def test_every_stage_has_its_costs(mixer: str, stage: dict[str, Any], one_layer: Path) -> None:
    config = AutoConfig.from_pretrained(one_layer)
    whole = look_at(config, _recipe(mixer, "all"), torch.float32)
    device = load_device("A100-40")
    own = STAGES[stage["name"]](**stage)
    actual = on_sample(whole, [0], lambda sample: stage_costs(own, sample, 2, 9, text(1, 9, 61), device))
    assert min(actual["flops"], actual["seconds"], actual["trained"]) > 0
    assert actual["step"] > actual["gradients"] and actual["optimizer"] >= 2 * actual["gradients"]
    copies = {"sft": 2, "dpo": 3}.get(own.name, 1)  # beside the teacher: what trains, and the reference
    assert actual["weights"] > (copies - 0.5) * whole.weight_bytes


def real_step(mixer: str, stage: StageConfig, length: int) -> dict[str, float]:
    """Peak and products of a step of a model with contents."""
    torch.manual_seed(3)
    teacher = tiny(num_hidden_layers=5, attention="sdpa").requires_grad_(False)
    student = LinearizedForCausalLM.from_teacher(teacher, _plan(mixer))
    with Meter() as meter, FlopCounterMode(display=False) as counter:
        run = stage.build(student, teacher)
        stepper = Stepper(run, stage)
        batch = text(stage.batch, length, 61)
        stepper.step(batch, number=0, lr=1e-9)
        counter.flop_counts.clear()
        before = meter.restart()
        stepper.step(batch, number=1, lr=1e-9)
    return {"step": meter.peak - before, "flops": counter.get_total_flops()}


def _plan(mixer: str) -> list[Any]:
    return [None if layer == 3 else MIXERS[mixer]() for layer in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "name"), [("lolcats", "lowrank"), ("gla", "distill")])
def test_the_numbers_are_those_of_a_real_step(mixer: str, name: str, tmp_path: Path) -> None:
    """Samples of two and three layers, carried on to five, against five real ones."""
    stage = STAGES[name](name=name, tokens=10, lr=1e-3, batch=3, **({"train": "all"} if name == "distill" else {}))
    config = AutoConfig.from_pretrained(tiny_folder(tmp_path, num_hidden_layers=5))
    whole = look_at(config, _recipe(mixer), torch.float32)
    device, heldout = load_device("A100-40"), text(1, 20, 61)
    result = measured(whole, lambda sample: stage_costs(stage, sample, 3, 20, heldout, device)).total
    real = real_step(mixer, stage, 20)
    assert result["flops"] == real["flops"] > 0
    assert result["step"] == pytest.approx(real["step"], rel=0.05)


def _recipe(mixer: str, layers: Any = (0, 1, 2, 4)) -> Recipe:
    layers = layers if layers == "all" else list(layers)
    return Recipe.from_data({"plan": {"mixer": {"name": mixer}, "layers": layers}, "stages": []})


@pytest.mark.slow
def test_what_does_not_fit_is_reported_with_the_remedy(tmp_path: Path) -> None:
    folder, table = tiny_folder(tmp_path / "m"), tmp_path / "mine.yaml"
    table.write_text("toaster: {memory: 4MB, reserve: 1MB, flops_bf16: 1e9, flops_fp32: 1e8, bandwidth: 1e9, share: 1}")
    stage = {"name": "attention_transfer", "tokens": 900, "lr": 1e-2, "batch": 600}
    recipe = Recipe.from_data({"plan": {"mixer": {"name": "lolcats"}}, "data": {"length": 9}, "stages": [stage]})
    options: dict[str, Any] = {"device": "toaster", "table": table}
    plan = plan_conversion(folder, recipe=recipe, **options)
    advice = plan.stages[0].advice or ""
    assert not plan.stages[0].fits
    assert (
        "stages.0 (attention_transfer) needs" in advice and "stages.0.micro_batch=" in advice and "--devices" in advice
    )
    fewer = int(advice.partition("stages.0.micro_batch=")[2].partition(",")[0])
    again = plan_conversion(folder, recipe=recipe.override({"stages.0.micro_batch": fewer}), **options)
    assert again.stages[0].fits and again.stages[0].peak_bytes > 0.8 * 4e6
    assert again.stages[0].flops == pytest.approx(plan.stages[0].flops, rel=0.01)
    four = plan_conversion(folder, recipe=recipe, devices=4, **options).stages[0]
    assert four.memory.optimizer == -(-plan.stages[0].memory.optimizer // 4) and four.micro_batch == 150
    assert four.memory.activations == pytest.approx(plan.stages[0].memory.activations / 4, rel=0.1)


def test_a_gpu_is_planned_with_its_own_slices_of_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated tensors are on a simulated CPU, whose slices are smaller."""
    folder = tiny_folder(tmp_path / "m", vocab_size=5003, num_hidden_layers=1)
    stage = {"name": "lowrank", "tokens": 3000, "lr": 1e-3, "batch": 3, "loss": "kl"}
    recipe = Recipe.from_data({"plan": {"mixer": {"name": "lolcats"}}, "data": {"length": 300}, "stages": [stage]})

    def bytes_on(device: str) -> int:
        return plan_conversion(folder, recipe=recipe, device=device).stages[0].memory.activations

    gpu, cpu = bytes_on("A100-40"), bytes_on("cpu")
    monkeypatch.setattr("linearize.training.stages.chunked_logits.CPU_SLICE_NUMBERS", 20 * 5003)
    monkeypatch.setattr("linearize.training.stages.losses.CACHED", 7 * 5003)
    assert bytes_on("A100-40") == gpu > 3 * 4 * 800 * 5003
    assert bytes_on("cpu") < 0.5 * cpu


def test_devices(tmp_path: Path) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text("toaster: {memory: 1GB, reserve: 1MB, flops_bf16: 1e9, flops_fp32: 1e8, bandwidth: 1e9, share: 1}")
    toaster = load_device("toaster", table)
    assert toaster == Device(memory=10**9, reserve=10**6, flops_bf16=1e9, flops_fp32=1e8, bandwidth=1e9, share=1)
    assert load_device("H200", table).memory > load_device("H100-80").memory
    work = [Operation(2 * 10**9, 0, 2), Operation(2 * 10**8, 0, 4), Operation(0, 3 * 10**9, 4)]
    assert toaster.seconds(work) == pytest.approx(2 + 2 + 3)
    with pytest.raises(InputError, match=r"unknown device 'A100': did you mean .*cpu.*--table FILE"):
        load_device("A100")
    for text_, message in (("a: {memory: 1GB}", "a.reserve: Field required"), ("[1]", "maps names"), ("a: [", "YAML")):
        table.write_text(text_)
        with pytest.raises(InputError, match=message):
            load_device("a", table)
    cpu = load_device("cpu")
    assert cpu.kind == "cpu" and cpu.memory > 10**8 and cpu.reserve > 10**7


def test_gathering_within_a_node_and_between_nodes() -> None:
    fields: dict[str, Any] = {
        "memory": 10**9,
        "reserve": 1,
        "flops_bf16": 1e9,
        "flops_fp32": 1e8,
        "bandwidth": 1e9,
        "share": 1,
    }
    linked = Device(**fields, link=7e9, link_between_nodes=1e9, link_share=0.5)
    assert linked.gather_seconds(56e9, 1) == 0 and Device(**fields).gather_seconds(56e9, 8) == 0
    assert linked.gather_seconds(56e9, 8) == pytest.approx(56 * (7 / 8) / 7 / 0.5)
    across = 56 * (2 / 3) / 8 / 0.5  # what other nodes hold, by the eight cards of a node; inside would take less
    assert linked.gather_seconds(56e9, 24) == pytest.approx(max(across, 56 * (23 / 24) / 7 / 0.5))
    slower = linked.model_copy(update={"link_between_nodes": 1e8})
    assert slower.gather_seconds(56e9, 24) == pytest.approx(10 * across)


@pytest.mark.slow
def test_what_devices_send_counts_where_it_takes_longer(tmp_path: Path) -> None:
    folder, table = tiny_folder(tmp_path / "m"), tmp_path / "mine.yaml"
    common = "memory: 1GB, reserve: 1MB, flops_bf16: 1e9, flops_fp32: 1e8, bandwidth: 1e9, share: 1"
    rows = {"none": "", "fast": ", link: 1e9, heap: 0.5, beside: 2MB", "slow": ", link: 1e3"}
    table.write_text("".join(f"{name}: {{{common}{more}}}\n" for name, more in rows.items()))
    stages = [{"name": "attention_transfer", "tokens": 108, "lr": 1e-2, "batch": 4},
              {"name": "lowrank", "tokens": 108, "lr": 1e-2, "batch": 4, "micro_batch": 1}]  # fmt: skip
    recipe = Recipe.from_data({"plan": {"mixer": {"name": "lolcats"}}, "data": {"length": 9}, "stages": stages})
    none, fast, slow = (plan_conversion(folder, recipe=recipe, devices=2, device=name, table=table) for name in rows)
    assert any("no link" in notice for notice in none.notices) and not any("link" in n for n in fast.notices)
    for without, hidden, bound in zip(none.stages, fast.stages, slow.stages, strict=True):
        assert without.sending_seconds == 0 < hidden.sending_seconds < hidden.seconds == without.seconds
        assert bound.sending_seconds == pytest.approx(1e6 * hidden.sending_seconds)
        assert bound.sending_seconds < bound.seconds < bound.sending_seconds + without.seconds
    transfer, adapters = (stage.sending_seconds for stage in fast.stages)
    assert adapters > 2 * transfer  # two micro-batches a step, each forward and backward; gradients in both
    memory = fast.stages[0].memory
    assert memory.allocator == 2_000_000 + round(memory.activations / 2)
    assert memory.peak == none.stages[0].memory.peak + memory.allocator


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_folder(tmp_path))
    arguments = ["plan", folder, "--device", "B200", "--set", "data.length=19", "--set", "stages.1.tokens=0"]
    assert main([*arguments, "--block", "auto", "--disk", "1GB"]) == 0
    shown = capsys.readouterr().out
    assert "attention_transfer runs by blocks: k = 3, 1 blocks" in shown and "AdamW" in shown
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["stages"][0]["runs_by_block"] is None and data["fits"] is True
    assert main(["plan", folder, "--device", "toaster"]) == 2
    assert main(["plan", str(tmp_path / "none")]) == 2
    assert "give a folder with config.json" in capsys.readouterr().err


def test_simulation_leaves_nothing_behind() -> None:
    with simulation() as meter:
        before = meter.restart()
        x = torch.ones(1000, 1000)
        assert meter.alive - before == 4_000_000 and float(x.sum()) == 1.0
        del x
        assert meter.alive == before and meter.peak - before >= 4_000_000
    assert float(torch.ones(3).sum()) == 3.0


def test_own_loops_are_known() -> None:
    assert {name for name, stage in STAGES.items() if issubclass(stage, DatasetStageConfig)} == {"sft", "dpo"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lolcats", "gated_delta_net", "mamba", "mamba2", "gla"])
def test_one_of_what_is_alike_is_counted_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows, head blocks, chunk groups and chunks: the first of them alone gives the work and memory of all."""

    def cost() -> tuple[int, int, int]:
        with simulation() as meter:
            student = student_of(tiny("llama", attention="sdpa"), mixer_config(name)).train()
            before = meter.restart()
            student(input_ids=torch.zeros(2, 256, dtype=torch.long), use_cache=False).logits.sum().backward()
            return sum(one.flops for one in meter.operations), len(meter.operations), meter.peak - before

    monkeypatch.setattr("linearize.ops.blocking.BLOCK", 1 << 11)
    for module in ("gated_delta.chunked", "decay_linear.chunk_groups"):  # `chunked` is a function's name, too
        monkeypatch.setattr(sys.modules[f"linearize.ops.recurrent.{module}"], "GROUP_NUMBERS", 1 << 11)
    short = cost()
    monkeypatch.setattr(memory_simulation, "counting_repeats", lambda scale: nullcontext())
    whole = cost()
    assert short[0] == pytest.approx(whole[0], rel=0.01) and short[1] == pytest.approx(whole[1], rel=0.1)
    assert short[2] == pytest.approx(whole[2], rel=0.01)
