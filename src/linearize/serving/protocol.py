"""Requests and responses of OpenAI's completions and chat completions, as far as this server follows them.

A setting that would change the answer and that is not followed is an error; one without an effect on it is taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FinishReason = Literal["stop", "length"]
MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS = 64, 20, 64
Count = Annotated[int, Field(ge=0, le=2**31)]
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}), "suffix": (None, ""),
    "response_format": (None, {"type": "text"}), "reasoning_effort": (None,), "verbosity": (None,),
    "modalities": (None, ["text"]), "functions": (None, []), "function_call": (None, "none"),
}  # fmt: skip


class StreamOptions(BaseModel):
    """`include_usage`: a last event with the numbers of tokens."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of requests have. `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    user: str | None = None
    # settings without an effect on the answer
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # settings that only their neutral value is taken of
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @model_validator(mode="after")
    def _only_what_is_followed(self) -> Self:
        for name, allowed in NEUTRAL.items():
            if name in type(self).model_fields and getattr(self, name) not in allowed:
                raise ValueError(f"{name} is not supported by this server: leave it out")
        stops = self.stops()
        if len(stops) > MOST_STOPS or not all(stops):
            raise ValueError(f"stop: give at most {MOST_STOPS} texts, none of them empty")
        return self

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(GenerationRequest):
    """Continue texts, or lists of token ids."""

    prompt: str | list[str] | list[Count] | list[list[Count]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = None
    suffix: Any = None

    @model_validator(mode="after")
    def _best_is_any(self) -> Self:
        if self.best_of not in (None, 1, self.n):
            raise ValueError("best_of is not supported by this server: leave it out")
        return self


class ChatMessage(BaseModel):
    """One message; everything that the template may read is handed to it."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: dict[str, Any] | None = None
    annotations: list[Any] | None = None

    def text(self) -> str:
        """The content as one text.

        Raises:
            ValueError: a part that is no text.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        texts = [part.get("text") for part in self.content if part.get("type") == "text"]
        if len(texts) < len(self.content) or not all(isinstance(text, str) for text in texts):
            raise ValueError("a message's content has a part that is no text: this model reads text alone")
        return "\n".join(str(text) for text in texts)


class ChatRequest(GenerationRequest):
    """Answer a conversation."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    modalities: Any = None
    functions: Any = None
    function_call: Any = None

    @model_validator(mode="after")
    def _tools_are_text(self) -> Self:
        if self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: tools are shown to the model as text, so only none and auto can be followed")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs without logprobs: set logprobs to true too")
        for message in self.messages:
            message.text()
        return self


class PromptDetails(BaseModel):
    """`cached_tokens`: of the prompt, those that a stored state stood for."""

    cached_tokens: int


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text's tokens, None for the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The response to a completion request, and each event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token with its log-probability (natural logarithm)."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the answer, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of the tokens of an answer."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatAnswer(BaseModel):
    """A whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The response to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChatDelta(BaseModel):
    """A part of an answer; the first one is a `ChatAnswer` without content."""

    content: str


class ChatChunkChoice(BaseModel):
    """A part of one answer."""

    index: int
    delta: ChatAnswer | ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "linearize"
    max_model_len: int


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
