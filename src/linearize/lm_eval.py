"""lm-eval's own command on students, with everything that it can do:

    python -m linearize.lm_eval --model linearize --model_args pretrained=STUDENT --tasks piqa --batch_size 8

lm-eval (0.4.13) finds models in its own table alone, and transformers knows students once linearize is imported. This
module does both first: the model `linearize` is lm-eval's `hf`, and `--model hf` takes students too.
"""

from __future__ import annotations

import sys

import torch

from linearize.errors import InputError
from linearize.evaluation.harness.definitions import need_harness

MODEL = "linearize"


def register() -> None:
    """Make `linearize` a model of lm-eval, for its command and for `lm_eval.simple_evaluate`. Raises InputError."""
    need_harness()
    import lm_eval.models  # its own names
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=lm_eval.models.MODEL_MAPPING["hf"])


def main() -> int:
    """Run lm-eval's command with the arguments of this process; returns the exit code."""
    try:
        register()
    except InputError as error:
        print(f"linearize: {error}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    torch.set_flush_denormal(True)  # as the command `linearize` does
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
