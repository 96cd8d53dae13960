"""OpenAI's requests, as they come over HTTP.  https://platform.openai.com/docs/api-reference

Types are strict: a number given as text is an error, not a number.  What OpenAI has and we don't serve is refused by
name; beyond OpenAI's there are top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids and return_token_ids.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nesa_ray.errors import InvalidInput
from nesa_ray.serving.request import MAX_LOGPROBS, Sampling

MAX_CHOICES = 128
MAX_LISTED = 1024  # tokens named in one request: each costs the sampling stage time
Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
TokenKey = Annotated[str, Field(pattern="^[0-9]{1,10}$")]  # JSON's keys are texts
Bias = Annotated[float, Field(ge=-100, le=100)]
Limit = Annotated[int, Field(ge=1, lt=1 << 31)]
Stop = Text | Annotated[list[Text], Field(max_length=16)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Request):
    """What a stream has besides its pieces."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Generation(_Request):
    """What both endpoints take."""

    model: str | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_LISTED)] | None = None
    max_tokens: Limit | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # beyond OpenAI's
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_LISTED)] | None = None
    return_token_ids: bool | None = None
    # accepted, without effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None

    @property
    def choices(self) -> int:
        """Outputs asked for, for each prompt."""
        return self.n or 1

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Raises InvalidInput naming the field."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "ignore_eos": self.ignore_eos,
            "seed": self.seed,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
        }
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items()},
        )


class CompletionRequest(_Generation):
    """POST /v1/completions"""

    prompt: Texts
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if self.suffix:
            raise InvalidInput("suffix: isn't supported")
        if self.best_of not in (None, self.choices):
            raise InvalidInput("best_of: isn't supported beyond n")
        if self.echo and self.logprobs is not None:
            raise InvalidInput("echo: isn't supported together with logprobs")
        return _several(self.prompt)


class EmbeddingRequest(_Request):
    """POST /v1/embeddings"""

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        """The texts, one or several."""
        return _several(self.input)


def _several(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One text or several, each as it is or as token ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return list(given)


class TextPart(_Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One message of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates want it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(p.text for p in content)
        return {"role": self.role, "content": text, **({"name": self.name} if self.name else {})}


class ResponseFormat(_Request):
    """Only plain text is served."""

    type: Literal["text"]


class ChatRequest(_Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def logprobs_asked(self) -> int | None:
        """How many likeliest tokens; None: no log-probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput("top_logprobs: needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None
