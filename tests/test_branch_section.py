"""The section Branches: ablation by layer, shares with their errors, loss against context, and what is said of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from torch import Tensor
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.sections.branches import Branches
from linearize.evaluation.sections.branches.context_loss import ContextText
from linearize.evaluation.sections.branches.numbers import BranchesNumbers
from linearize.metrics.branches import longest_reach, share_won, two_branch_layers, window_reach
from linearize.metrics.token_scores import View
from linearize.training.data.documents import Document

TOKENIZER: Any = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = Branches(tokens=200, layer_tokens=120, context_tokens=400, contexts=(4, 10, 16), decode_tokens=31)
LENGTHS = (47, 5, 33, 61, 29, 55, 13, 70)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny("llama", attention="sdpa", head_dim=6)


def documents() -> list[Document]:
    """Odd lengths, BOS first, some tokens that do not count."""
    drawn = torch.Generator().manual_seed(3)
    random_documents = []
    for seed, length in enumerate(LENGTHS):
        tokens = [1, *text(1, length - 1, seed=seed)[0].tolist()]
        random_documents.append(Document(tokens, (torch.rand(length, generator=drawn) < 0.8).long().tolist()))
    return random_documents


def eval_context(*models: Any, **changes: Any) -> EvalContext:
    eval_models = tuple(
        EvalModel(
            name="teacher" if not i else f"student{i}", role="student" if i else "teacher", path="", model=model,
            tokenizer=TOKENIZER, fingerprint=str(i),
        )
        for i, model in enumerate(models)
    )  # fmt: skip
    return EvalContext(**{"models": eval_models, "documents": documents(), "length": 64, "batch": 3, **changes})


def measured(section: Branches, context: EvalContext) -> Any:
    return json.loads(json.dumps(section.run(context), allow_nan=False))


def alone(model: Any, tokens: list[int], **extra: Any) -> Tensor:
    """The loss of each token but the first, one text in the model."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **extra).logits[0]
    return F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")


def test_a_branch_can_be_given_by_layer(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, ids = student_of(teacher, [mixer(), None, mixer("gla")]), text(2, 37)

    def logits(branch: Any) -> Tensor:
        with torch.no_grad():
            return student(ids, branch=branch, use_cache=False).logits

    both = logits("both")
    assert torch.equal(logits({}), both)
    for branch in ("window", "linear"):
        assert torch.equal(logits({0: branch, 2: branch}), logits(branch))
        one = logits({2: branch})
        assert not torch.allclose(one, both) and not torch.allclose(one, logits(branch))
        original = student.mixers()[2].forward
        with monkeypatch.context() as patch:
            patch.setattr(
                student.mixers()[2], "forward", lambda *x, o=original, b=branch, **k: o(*x, **{**k, "branch": b})
            )
            assert torch.equal(logits("both"), one)
    with pytest.raises(InputError, match=r"branch of layer 1: layers with a mixer are \[0, 2\]"):
        logits({1: "window"})


def test_which_layers_have_two_branches() -> None:
    plan = [mixer(), None, mixer("mamba2"), mixer("gla", window=6), mixer("sliding_window"), mixer(window=0)]
    assert two_branch_layers(plan) == [0, 3]
    assert longest_reach(plan) == 8 and longest_reach([None, mixer("mamba2"), mixer(window=0)]) is None
    assert window_reach(plan) is None and window_reach([plan[0], None, plan[3]]) == 8


def test_the_share_is_one_ratio_over_documents() -> None:
    drawn = torch.Generator().manual_seed(1)
    document = torch.tensor([0] * 9 + [1] * 14 + [2] * 5 + [3] * 30)
    worst = 3 + torch.rand(58, generator=drawn)
    best = worst - 1 - torch.rand(58, generator=drawn)
    middle = worst - 0.4 - 0.5 * torch.rand(58, generator=drawn)
    share = share_won(worst, middle, best, document)
    assert share is not None and share.error is not None
    won, lost = (worst - middle).double(), (worst - best).double()
    assert share.value == pytest.approx(float(won.sum() / lost.sum()))
    sums = [(float(won[document == d].sum()), float(lost[document == d].sum())) for d in range(4)]
    totals = [
        (sum(w for w, _ in rest), sum(x for _, x in rest)) for d in range(4) for rest in [sums[:d] + sums[d + 1 :]]
    ]
    left_out = [w / x for w, x in totals]
    centre = sum(left_out) / 4
    jackknife = (3 / 4 * sum((x - centre) ** 2 for x in left_out)) ** 0.5
    assert share.error == pytest.approx(jackknife, rel=0.35)
    assert share_won(worst, middle, worst + 0.1 * torch.randn(58, generator=drawn), document) is None


@pytest.mark.parametrize("size", [4, 10, 16])
def test_a_context_is_what_a_token_sees(teacher: Any, size: int) -> None:
    few = documents()[:2]
    assert ContextText.choose(few, (4, 10, 16), length=64, tokens=10_000, bos=1) is None, "too few tokens for any size"
    context_text = ContextText(
        tuple(Document(d.tokens[:64], d.loss_mask[:64]) for d in documents()), (4, 10, 16), 16, 1
    )
    student = student_of(teacher, [mixer("mamba2"), mixer(), None])
    limited, full = (context_text.losses(View(model=student), n, tokens=130) for n in (size, None))
    expected, whole = [], []
    for document in context_text.documents:
        losses = alone(student, document.tokens)
        for target in range(16, len(document)):
            if document.loss_mask[target]:
                start = (target // (size // 2) - 1) * (size // 2)
                visible = ([1] if start else []) + document.tokens[start : target + 1]
                assert size // 2 <= target - start < size
                expected.append(alone(student, visible)[-1])
                whole.append(losses[target - 1])
    torch.testing.assert_close(limited, torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full, torch.stack(whole), rtol=1e-4, atol=1e-4)
    assert len(context_text.token_documents) == len(limited) and not torch.allclose(limited, full)


def test_sizes_go_as_far_as_the_text() -> None:
    many = [Document(d.tokens * 3, d.loss_mask * 3) for d in documents() if len(d) > 50 for _ in range(9)]
    chosen = ContextText.choose(many, (4, 16, 64, 512), length=200, tokens=4000, bos=None)
    assert chosen is not None and chosen.sizes == (4, 16, 64) and chosen.first == 64
    assert all(64 < len(d) <= 200 for d in chosen.documents)
    assert 4000 <= sum(map(len, chosen.documents)) < 4200
    with pytest.raises(ValueError, match="each must be even"):
        Branches(contexts=(7,))


def test_numbers_are_those_of_documents_alone(teacher: Any) -> None:
    student = student_of(teacher, [mixer(), None, mixer("gla", window=3)])
    context = eval_context(teacher, student)
    numbers = measured(SMALL, context)
    assert measured(SMALL, context) == numbers
    assert json.loads(json.dumps(BranchesNumbers.model_validate(numbers).to_json())) == numbers
    ablation = numbers["models"]["student1"]["ablation"]
    assert ablation["reach"] == 8 and ablation["layers"] == [0, 2] and numbers["models"]["teacher"]["ablation"] is None
    longer = [d for d in documents() if len(d) > 9]
    used, total = [], 0
    for document in longer:
        if total < SMALL.tokens:
            used.append(Document(document.tokens[:64], document.loss_mask[:64]))
            total += len(document)

    def mean(model: Any, start: int, texts: list[Document], **extra: Any) -> float:
        kept = [
            loss
            for d in texts
            for position, loss in enumerate(alone(model, d.tokens, **extra).tolist())
            if position >= start and d.loss_mask[position + 1]
        ]
        return sum(kept) / len(kept)

    for where, start in (("all", 0), ("beyond", 8)):
        losses = ablation[where]
        for name, branch in (("both", "both"), ("window", "window"), ("linear", "linear")):
            assert losses[name]["value"] == pytest.approx(mean(student, start, used, branch=branch), abs=1e-4)
        assert losses["teacher"]["value"] == pytest.approx(mean(teacher, start, used), abs=1e-4)
        assert losses["won"]["value"] == pytest.approx(losses["window"]["value"] - losses["both"]["value"], abs=1e-4)
    few = used[: next(n for n in range(1, 9) if sum(map(len, used[:n])) >= SMALL.layer_tokens)]
    for layer in numbers["models"]["student1"]["layers"]:
        for off, left in (("linear", "window"), ("window", "linear")):
            cost = mean(student, 8, few, branch={layer["layer"]: left}) - mean(student, 8, few)
            assert layer[f"without_{off}"]["value"] == pytest.approx(cost, abs=2e-4)
    decoded = ablation["decoded"]
    assert decoded["loss"] == pytest.approx(decoded["expected_loss"], abs=1e-5) and decoded["tokens"] > 10


def test_every_model_has_a_place_and_a_plot(teacher: Any) -> None:
    from matplotlib.figure import Figure

    long = [Document(d.tokens * 2, d.loss_mask * 2) for d in documents()]
    students = [student_of(teacher, plan) for plan in (mixer(), mixer("mamba2"), [None, mixer("sliding_window"), None])]
    numbers = measured(SMALL, eval_context(teacher, *students, documents=long, length=96))
    shown = Branches.present(numbers)
    assert {finding.student for finding in shown.findings} == {"student1", "student2", "student3"}
    assert [table.title for table in shown.tables] == [
        "One branch at a time", "One branch of one layer off", "Loss against the context given",
    ]  # fmt: skip
    context = numbers["models"]["student2"]["context"]
    assert [loss["size"] for loss in context["losses"]] == [4, 10, 16, None] and context["tokens"] >= 200
    for plot in shown.plots:
        figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
        plot.draw(figure)
        assert figure.axes[0].has_data() and plot.caption
    alone = measured(SMALL, eval_context(teacher, documents=long, length=96))
    assert not Branches.present(alone).findings and len(Branches.present(alone).plots) == 1


def mean(value: float, error: float | None = 0.01) -> dict[str, float | None]:
    return {"value": value, "error": error}


def student_numbers(**beyond: Any) -> dict[str, Any]:
    """Numbers of one student with two branches, as after JSON."""
    losses = {
        "tokens": 500, "documents": 9, "both": mean(2.0), "window": mean(2.2), "linear": mean(5.0),
        "teacher": mean(1.9), "won": mean(0.2), "window_brings": mean(3.0), "lost": mean(0.3),
        "share": mean(0.66, 0.05), **beyond,
    }  # fmt: skip
    decoded = {"tokens": 9, "largest": 1e-6, "rms": 1e-7, "flips": 0, "loss": 2.0, "expected_loss": 2.0,
               "dtype": "float32"}  # fmt: skip
    ablation = {"reach": 8, "layers": [0], "all": losses, "beyond": losses, "decoded": decoded}
    model = {"role": "student", "mixers": ["lolcats"], "ablation": ablation, "layers": [], "context": None}
    return {"models": {"mine": model}}


def levels(numbers: Any) -> list[str]:
    return [finding.level for finding in Branches.present(numbers).findings]


def test_judgements_on_branches() -> None:
    assert levels(student_numbers()) == ["good", "good", "good"]
    assert Branches.headline(student_numbers())["mine"][0].value == "66.0% ± 5.0%"
    for share in (mean(0.05, 0.01), mean(0.3, 0.2), mean(-0.2, 0.05), mean(0.7, None)):
        numbers = student_numbers(share=share)
        assert levels(numbers) == ["bad", "good", "good"], share
        assert "bypassed (2510.05901)" in Branches.present(numbers).findings[0].text
    assert levels(student_numbers(share=None)) == ["note", "good", "good"]
    assert levels(student_numbers(window_brings=mean(0.001, 0.01))) == ["good", "bad", "good"]
    unjudged = student_numbers()
    unjudged["models"]["mine"]["ablation"]["beyond"] = None
    assert levels(unjudged) == ["note", "good", "good"]
    broken = student_numbers()
    broken["models"]["mine"]["ablation"]["decoded"]["loss"] = 2.4
    assert levels(broken) == ["good", "good", "bad"]
    alone = student_numbers()
    for where in ("all", "beyond"):
        for key in ("teacher", "share", "lost"):
            alone["models"]["mine"]["ablation"][where].pop(key, None)
    assert levels(alone) == ["good", "good", "good"]
    alone["models"]["mine"]["ablation"]["beyond"]["won"] = mean(0.001)
    assert levels(alone)[0] == "bad"
    idle = student_numbers()
    idle["models"]["mine"]["layers"] = [
        {"layer": i, "tokens": 99, "without_linear": mean(0.1 * i), "without_window": mean(1.0)} for i in (0, 1)
    ]
    assert "in layer 0 (of 2)" in Branches.present(idle).findings[-1].text


def test_judgements_on_a_state() -> None:
    context: dict[str, Any] = {
        "from_position": 16, "tokens": 300, "documents": 9, "gain": mean(0.5), "share_of_gain": mean(0.8, 0.05),
        "losses": [{"size": 4, **mean(3.0)}, {"size": None, **mean(2.5)}],
    }  # fmt: skip
    model = {"role": "student", "mixers": ["mamba2", "softmax"], "ablation": None, "layers": [], "context": context}
    numbers: dict[str, Any] = {"models": {"mine": model}}
    assert levels(numbers) == ["good"] and Branches.headline(numbers)["mine"][0].label == "memory"
    context["share_of_gain"] = mean(0.04, 0.01)
    assert levels(numbers) == ["bad"]
    model["mixers"] = ["sliding_window", "softmax"]
    assert levels(numbers) == ["note"]
    model["context"] = None
    assert levels(numbers) == ["note"] and not Branches.headline(numbers)
