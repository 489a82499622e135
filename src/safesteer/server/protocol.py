"""What goes over the wire: the OpenAI fields that are honoured, and `steering`.

A field is honoured, or changes nothing (`PASSED`, or a value of `NEUTRAL`), or the request is refused by the field's name: also
one that nobody knows, and one within a message.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_validator

from safesteer.models import Conversation

Number = StrictFloat | StrictInt
MOST_STOPS = 4
MOST_PARTS = 64  # of a message
# Bookkeeping of who asks and what is kept.
PASSED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {  # field -> the values that ask for nothing, besides null
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    # vLLM's own
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "bad_words": ([],),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "priority": (0,),
    "vllm_xargs": ({},),
}


class _Strict(BaseModel):
    """Fields that are not declared must ask for nothing."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, json_schema_extra={"additionalProperties": False})
    passed: ClassVar[set[str]] = set()
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if name in cls.model_fields or name in cls.passed or value is None:
                continue
            if not any(_same(value, one) for one in cls.neutral.get(name, ())):
                raise ValueError(f"`{name[:80]}` is not supported here; leave it out")
        return data


def _same(value: Any, one: Any) -> bool:
    return bool(value == one) and isinstance(value, bool) == isinstance(one, bool)


class StreamOptions(_Strict):
    """`include_usage`: a last chunk tells the tokens used."""

    neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
    include_usage: bool = False


class _Asked(_Strict):
    """What both endpoints share."""

    passed = PASSED
    neutral = NEUTRAL
    model: str = Field(max_length=512)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = Field(default=None, description="0 and -1: all tokens.")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    steering: Literal["off"] | dict[str, Any] | None = Field(
        default=None, description='"off", or a strength or "off" by category: what the operator allows of it.'
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop words."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _check_stops(self) -> _Asked:
        if len(self.stops) > MOST_STOPS or any(not 0 < len(word) <= 256 for word in self.stops):
            raise ValueError(f"`stop` takes at most {MOST_STOPS} words of 1 to 256 characters")
        return self


class Part(_Strict):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: str


class Function(_Strict):
    """What a tool was called with: `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: Function


class Message(_Strict):
    """One message of a chat; an assistant's that calls tools needs no `content`."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False, "required": ["role", "content"]})
    neutral = {"annotations": ([],)}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS)] = ""
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_PARTS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_content(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("content") is None:
            if data.get("role") != "assistant":
                raise ValueError("`content` is missing")
            return {**data, "content": ""}
        return data

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        given = self.model_dump(exclude_none=True)
        return {**given, "role": "system" if self.role == "developer" else self.role}


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    neutral = {**NEUTRAL, "add_special_tokens": (False,)}
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer, at most."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def conversation(self) -> Conversation:
        """The messages as the encoder takes them."""
        return [message.plain() for message in self.messages]


class CompletionRequest(_Asked):
    """POST /v1/completions: the prompt goes to the model as it stands, without a chat template."""

    neutral = {**NEUTRAL, "add_special_tokens": (True,)}
    prompt: str = Field(min_length=1)
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer, at most (16 by default, as OpenAI has it)."""
        return self.max_tokens if self.max_tokens is not None else 16
