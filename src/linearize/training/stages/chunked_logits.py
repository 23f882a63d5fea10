"""Losses on logits of which only a slice of tokens ever exists: a model run up to its final hidden states, and the
family's own way from there to logits (head, scale, softcap) applied to a few tokens at a time.

Letters: B batch, T tokens, M model width, V vocabulary, N tokens that count, n tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.parallel import is_sharded
from linearize.ops.blocking import alike, device_kind
from linearize.training.config import Batch

SliceLoss = Callable[[Tensor, slice], Tensor]
SLICE_NUMBERS = 2**24
"""The most logits that exist at a time (64 MiB in fp32), a few times over inside a loss."""
CPU_SLICE_NUMBERS = 8_000_000
"""On a CPU: glibc keeps blocks of up to 32 MiB for the next slice; larger ones are new pages of the system each time,
which take longer to touch than a softmax."""


def slice_tokens(vocabulary: int, like: Tensor) -> int:
    """Tokens whose logits exist at a time on the device of `like`."""
    numbers = min(SLICE_NUMBERS, CPU_SLICE_NUMBERS) if device_kind(like) == "cpu" else SLICE_NUMBERS
    return max(1, numbers // vocabulary)


class SplitModel:
    """A causal LM (a teacher or a student) in two parts: tokens to hidden states, hidden states to logits.

    The second part is the family's own forward with its decoder replaced by one that gives the hidden states, so that
    softcapping (Gemma), scales (Granite, Cohere) and projections before the head are the family's. Where three tokens
    show that a model does not come apart like this, `hidden` gives whole logits and `logits` hands them on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        inner: Any = model.lm if isinstance(model, LinearizedForCausalLM) else model
        self.lm = inner
        self.sharded = any(is_sharded(parameter) for parameter in self.lm.parameters())
        self.vocabulary = int(self.lm.config.get_text_config().vocab_size)
        self.output: type[Any] = type(None)
        self._halved: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.decoder = self._find_decoder()
        if self.decoder is not None and not self._comes_apart():
            self.decoder = None

    def hidden(self, batch: Batch, **options: Any) -> Tensor:
        """Final hidden states `[B, T, M]`, or whole logits `[B, T, V]` if the model cannot be divided; `options` go to
        the model's forward."""
        if self.decoder is None:
            whole: Tensor = self._run(batch, **options).logits
            return whole
        with without_head(self.lm):
            return self._pass(batch, logits_to_keep=1, **options)[0]

    def logits(self, hidden_NM: Tensor) -> Tensor:
        """Logits `[N, V]` of hidden states."""
        if self.decoder is None:
            return hidden_NM
        with self._decoder_gives(hidden_NM[None]), self._weights_in_autocast_dtype(hidden_NM.device.type):
            tokens = torch.zeros(1, len(hidden_NM), dtype=torch.long, device=hidden_NM.device)
            logits: Tensor = self.lm(input_ids=tokens, use_cache=False).logits
        return logits[0]

    def parameters(self) -> list[nn.Parameter]:
        """Parameters with gradients between hidden states and logits: the head's, if it trains."""
        if self.decoder is None:
            return []
        with self._decoder_gives(torch.empty(0)):
            return [parameter for parameter in self.lm.parameters() if parameter.requires_grad]

    @contextmanager
    def _weights_in_autocast_dtype(self, device: str) -> Iterator[None]:
        """Inside autocast, the head's frozen matrices as copies in its dtype, made once for all slices and steps:
        autocast keeps copies of trained weights alone, and would copy a whole head for each slice of tokens."""
        if self.sharded or not torch.is_autocast_enabled(device):
            yield
            return
        dtype, exchanged = torch.get_autocast_dtype(device), list[tuple[nn.Module, str, nn.Parameter]]()
        for path, module in self.lm.named_modules():  # the decoder is not among them: a stand-in has its place
            for name, weight in list(module.named_parameters(recurse=False)):
                if type(weight) is not nn.Parameter or weight.requires_grad or weight.dim() < 2:
                    continue
                if weight.dtype == torch.float32:
                    exchanged.append((module, name, weight))
                    setattr(module, name, self._in_dtype(f"{path}.{name}", weight, dtype))
        try:
            yield
        finally:
            for module, name, weight in exchanged:
                setattr(module, name, weight)

    def _in_dtype(self, name: str, weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """The copy of a frozen weight in a dtype, made anew when there is another weight."""
        original, copy = self._halved.get(name, (None, weight))
        if original is not weight or copy.dtype != dtype:
            copy = nn.Parameter(weight.to(dtype), requires_grad=False)
            self._halved[name] = (weight, copy)
        return copy

    def _run(self, batch: Batch, **options: Any) -> Any:
        return self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **options)

    def _pass(self, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
        """Run the model and record the decoder's output: final hidden states, and logits."""
        assert self.decoder is not None
        outputs: list[Any] = []
        decoder = self.lm.get_submodule(self.decoder)
        hook = decoder.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            logits = self._run(batch, **options).logits
        finally:
            hook.remove()
        self.output = type(outputs[-1])
        return outputs[-1].last_hidden_state, logits

    def _find_decoder(self) -> str | None:
        decoder = self.lm.get_decoder() if hasattr(self.lm, "get_decoder") else None
        return next((name for name, module in self.lm.named_modules() if name and module is decoder), None)

    @contextmanager
    def _decoder_gives(self, hidden_BTM: Tensor) -> Iterator[None]:
        """Make the decoder return these hidden states inside the `with` block, whatever its inputs."""
        assert self.decoder is not None
        parent, _, child = self.decoder.rpartition(".")
        owner, decoder = self.lm.get_submodule(parent), self.lm.get_submodule(self.decoder)
        setattr(owner, child, _FixedDecoder(self.output(last_hidden_state=hidden_BTM)))
        try:
            yield
        finally:
            setattr(owner, child, decoder)

    @torch.no_grad()
    def _comes_apart(self) -> bool:
        """Whether the two parts give the model's logits, tested on three tokens."""
        ids = torch.arange(3, device=self.lm.device)[None]
        try:
            hidden, expected = self._pass({"input_ids": ids % self.vocabulary, "position_ids": ids})
            logits = self.logits(hidden[0])
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            return False
        return logits.shape == expected[0].shape and torch.allclose(logits.float(), expected[0].float(), 1e-2, 1e-3)


@contextmanager
def without_head(lm: Any) -> Iterator[None]:
    """Inside, a causal LM ends before the product with its head, for who wants hidden states alone; its logits mean
    nothing there."""
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    name = next((name for name, module in lm.named_modules() if name and module is head), None)
    if name is None:
        yield
        return
    parent, _, child = name.rpartition(".")
    owner = lm.get_submodule(parent)
    setattr(owner, child, nn.Identity())
    try:
        yield
    finally:
        setattr(owner, child, head)


class _FixedDecoder(nn.Module):
    """A decoder with a fixed output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output


def sliced_loss(split: SplitModel, hidden_NM: Tensor, loss: SliceLoss, *, tokens: int | None = None) -> Tensor:
    """The sum of `loss(logits_nV, slice)` over slices of `tokens` tokens (None: `slice_tokens`), fp32.

    Gradients of a slice are computed with its loss, so that its logits are gone before the next one's are made and no
    product with the head is done twice; what is kept is the gradient of the hidden states and of the head.
    """
    size = tokens or slice_tokens(split.vocabulary, hidden_NM)
    parts = [slice(start, min(start + size, len(hidden_NM))) for start in range(0, len(hidden_NM), size)]
    parameters = split.parameters() if torch.is_grad_enabled() else []
    total: Tensor = _Sliced.apply(split, loss, parts, hidden_NM, *parameters)
    return total


class _Sliced(torch.autograd.Function):
    """A sum over slices whose gradients are made slice by slice in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, split: SplitModel, loss: SliceLoss, parts: list[slice], hidden_NM: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        total = hidden_NM.new_zeros((), dtype=torch.float32)
        need_grad = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (hidden_NM, *parameters)] if need_grad else []
        for part in alike(parts):
            hidden_nM = hidden_NM[part].detach().requires_grad_(need_grad)
            with torch.set_grad_enabled(need_grad):
                value = loss(split.logits(hidden_nM), part)
            total += value.detach()
            if need_grad:
                with torch.autocast(hidden_NM.device.type, enabled=False):
                    slice_grads = torch.autograd.grad(value, (hidden_nM, *parameters), allow_unused=True)
                for whole, new in zip((grads[0][part], *grads[1:]), slice_grads, strict=True):
                    if new is not None:
                        whole += new
        ctx.grads = [grad.to(x.dtype) for grad, x in zip(grads, (hidden_NM, *parameters), strict=False)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        return None, None, None, *(grad * factor.to(grad.dtype) for grad in ctx.grads)
