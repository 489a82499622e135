"""What goes over the wire: the OpenAI fields that are honoured, and `steering`.

Fields that would change what an answer means and are not supported (tools, several choices, log probabilities, ...) are refused
by name; fields that change nothing (user, metadata, store, ...) are passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_validator

from safesteer.models import Conversation

Number = StrictFloat | StrictInt
MOST_STOPS = 4
MOST_PARTS = 64  # of a message
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # field -> the values that ask for nothing
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
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
}


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk tells the tokens used."""

    include_usage: bool = False


class _Asked(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str = Field(max_length=512)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = Field(default=None, description="0 and -1: all tokens.")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    steering: Literal["off"] | dict[str, Any] | None = Field(
        default=None, description='"off", or a strength or "off" by category: what the operator allows of it.'
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name, nothing in UNSUPPORTED.items() if isinstance(data, dict) else ():
            value = data.get(name)
            if value is not None and not any(
                (value == one and type(value) is type(one)) or value == one == 0 for one in nothing
            ):
                raise ValueError(f"`{name}` is not supported here; leave it out")
        return data

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop words."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _check_stops(self) -> _Asked:
        if len(self.stops) > MOST_STOPS or any(not 0 < len(word) <= 256 for word in self.stops):
            raise ValueError(f"`stop` takes at most {MOST_STOPS} words of 1 to 256 characters")
        return self


class Part(BaseModel):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS)]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

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

    prompt: str = Field(min_length=1)
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer, at most (16 by default, as OpenAI has it)."""
        return self.max_tokens if self.max_tokens is not None else 16
