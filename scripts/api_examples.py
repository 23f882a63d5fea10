"""The examples of docs/api.md, one for each public name; `tests/test_api_page.py` runs them, in this order.

Each runs by itself in a folder with `stories.txt` and, after `convert`, the folder `student`. TEACHER is the small
teacher that comes with the package.
"""

from __future__ import annotations

PRELUDE = """
import torch, transformers
import linearize
from linearize.demo.run import TEACHER
"""

SMALL = '{"data.length": 64, "stages.0.tokens": 512, "stages.1.tokens": 512}'

EXAMPLES: dict[str, str] = {
    "convert": f"""
student = linearize.convert(
    TEACHER, recipe="window-linear", data=["stories.txt"], out="student",
    overrides={SMALL},
)
""",
    "convert_model": """
teacher = transformers.AutoModelForCausalLM.from_pretrained(TEACHER)
student = linearize.convert_model(teacher, "mamba2-in-llama")
assert student.get_input_embeddings().weight is teacher.get_input_embeddings().weight

hybrid = linearize.convert_model(teacher, {"mixer": {"name": "lolcats", "window": 16}, "layers": {"keep": 0.25}})
""",
    "load": """
student = linearize.load("student")
with torch.no_grad():
    logits = student(torch.tensor([[5, 7, 11]])).logits
""",
    "generate": """
student = linearize.load("student")
print(linearize.generate(student, "Once upon a time", max_new_tokens=20))
""",
    "speculate": """
teacher = transformers.AutoModelForCausalLM.from_pretrained(TEACHER)
result = linearize.speculate(teacher, linearize.load("student"), torch.tensor([[5, 7, 11]]), max_new_tokens=12)
print(result.tokens[0], result.stats.line())
""",
    "evaluate": """
from linearize.evaluation.sections.language import Language

report = linearize.evaluate(  # without `sections`: a whole suite, as `linearize eval`
    "student", data=["other_stories.txt"], sections=[Language()],
    options=linearize.EvaluationOptions(tokens=1024, length=128),
)
print(report.student_kl)
""",
    "EvaluationOptions": """
options = linearize.EvaluationOptions(tokens=4096, batch=4, dtype="bfloat16")
""",
    "export": """
folder = linearize.export("student", "hf", "exported")
""",
    "plan": f"""
estimate = linearize.plan(TEACHER, recipe="window-linear", overrides={SMALL}, device="H100-80")
print(estimate.peak_bytes, estimate.seconds)
""",
    "recipes": """
for name, description in linearize.recipes().items():
    print(f"{name}: {description}")
""",
    "load_recipe": """
recipe = linearize.load_recipe("lolcats").override({"plan.mixer.window": 16, "stages.0.tokens": "2M"})
""",
    "Recipe": """
recipe = linearize.Recipe.from_data(
    {
        "plan": {"mixer": {"name": "gla"}, "layers": [0, -1]},
        "stages": [{"name": "distill", "tokens": "1M", "lr": 1e-4}],
    }
)
print(recipe.to_yaml())
""",
    "Plan": """
plan = linearize.Plan(mixer=linearize.LolcatsConfig(window=16), layers={"keep": 0.25})
print(plan.resolve(8))
""",
    "register_mixer": """
from typing import Literal

@linearize.register_mixer
class ShortWindowConfig(linearize.SlidingWindowConfig):
    name: Literal["short_window"] = "short_window"
    window: int = 8

recipe = linearize.load_recipe("window-linear").override({"plan.mixer.name": "short_window"})
""",
    "register_stage": """
from typing import Literal
from linearize.training.stages.distill import DistillConfig

@linearize.register_stage
class GentleConfig(DistillConfig):
    name: Literal["gentle"] = "gentle"
    lr: float = 1e-6
""",
    "register_export": """
from linearize.modeling.export import Export

def write(student, source, folder):
    (folder / "layers.txt").write_text(str(source.plan))

linearize.register_export("layers", Export(misfit=lambda source: None, write=write, native=False))
linearize.export("student", "layers", "listed")
""",
    "LinearizedForCausalLM": """
student = linearize.LinearizedForCausalLM.from_pretrained("student")
print(student.config.plan[0], student.mixers()[0])
""",
    "LinearizeConfig": """
config = linearize.LinearizeConfig.from_pretrained("student")
print(config.teacher_name, config.hidden_size)
""",
    "InputError": """
try:
    linearize.load_recipe("lolcat")
except linearize.InputError as error:
    print(error)
""",
    "LolcatsConfig": """
mixer = linearize.LolcatsConfig(window=64, feature_map="hedgehog")
""",
    "SlidingWindowConfig": """
mixer = linearize.SlidingWindowConfig(window=64, num_sinks=4)
""",
    "GlaConfig": """
mixer = linearize.GlaConfig(window=64)
""",
    "MambaConfig": """
mixer = linearize.MambaConfig()
""",
    "Mamba2Config": """
mixer = linearize.Mamba2Config()
""",
    "GatedDeltaNetConfig": """
mixer = linearize.GatedDeltaNetConfig()
""",
    "RetentionConfig": """
mixer = linearize.RetentionConfig()
""",
    "RetrievalHeadsConfig": """
mixer = linearize.RetrievalHeadsConfig(groups=(0,), mixer=linearize.LolcatsConfig(window=64))
""",
}
