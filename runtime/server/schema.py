"""What may stand in a body. What is not here is refused by its name; null is the same as absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

Tokens = list[int]
Prompts = str | list[str] | Tokens | list[Tokens]
Stop = str | list[str]
PROMPT_FORMS = "must be a text, a list of texts, a list of token ids, or a list of such lists"


class Body(BaseModel):
    """Strict: a number is no string, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Generation(Body):
    """What completions and chats share. Bounds that hang on the engine are the engine's to check."""

    model: str
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0.0)
    top_p: float = 1.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(default_factory=list)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    # They say who asks and how to bill it, and change nothing here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] = "auto"
    store: Literal[False] = False

    # Extensions.
    deterministic: bool | None = None
    contract: str | dict[str, Any] | None = None
    receipt: bool = False
    fresh: bool = False
    speculate: Literal["engine", "auto", "ngram", "off"] = "engine"
    draft: Tokens | None = None
    return_token_ids: bool = False
    timeout: float | None = Field(None, gt=0)
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Tokens = Field(default_factory=list)
    include_stop: bool = False
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class CompletionRequest(Generation):
    prompt: Prompts
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: Literal[""] = ""

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return one_of(value, handler, PROMPT_FORMS)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: FunctionName


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @field_validator("content", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return one_of(value, handler, "must be a text, or a list of parts of type 'text'")


class Schema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=lambda: {"type": "object"})
    strict: bool = False


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: Schema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class Prediction(Body):
    type: Literal["content"] = "content"
    content: str | list[TextPart]


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Format | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    prediction: Prediction | None = None
    modalities: list[Literal["text"]] = Field(default=["text"])

    @field_validator("tool_choice", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return one_of(value, handler, "must be 'none', 'auto', 'required', or name a function")


class ScoreRequest(Body):
    """One prompt and one completion, or as many of each; texts or token ids."""

    model: str
    prompt: Prompts
    completion: Prompts
    contract: str | dict[str, Any] | None = None
    timeout: float | None = Field(None, gt=0)

    @field_validator("prompt", "completion", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return one_of(value, handler, PROMPT_FORMS)


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Tokens


class VerifyRequest(Body):
    receipt: str
    public_key: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    timeout: float | None = Field(None, gt=0)


def one_of(value: Any, handler: ValidatorFunctionWrapHandler, forms: str) -> Any:
    """The value as one of a union's forms, with one message where it is none of them."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(forms) from None
