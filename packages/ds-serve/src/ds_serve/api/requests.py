"""What clients may send: OpenAI's requests, and a few fields beyond them that vLLM has too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ds_serve.api.fields import Strict, by_token, joined_parts, one_or_list, prompts
from ds_serve.engine.text import MOST_ALTERNATIVES


class StreamOptions(Strict):
    """Options of a streamed answer.

    Attributes:
        include_usage: end with a chunk that states the usage.
        include_obfuscation: accepted and unused: chunks are never padded.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class StructuredOutputs(Strict):
    """A form that the answer must have; one of them, as in vLLM.

    Attributes:
        json_schema: JSON schema, in the field `json`.
        regex: a regular expression in Rust's notation.
        choice: one of these texts.
        grammar: a grammar in Lark's notation.
    """

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one(cls, body: object) -> object:
        if isinstance(body, dict) and len(body) != 1:
            raise ValueError("give one of json, regex, choice, grammar")
        return body


class SamplingRequest(Strict):
    """What completions and chat completions have in common.

    Attributes:
        top_k: not OpenAI's: draw among so many of the likeliest tokens; 0 or -1 is all.
        min_p: not OpenAI's: draw among tokens with at least this share of the likeliest one's
            probability.
        repetition_penalty: not OpenAI's: divides the logits of tokens seen before.
        min_tokens: not OpenAI's: no end token before so many.
        stop_token_ids: not OpenAI's: further end tokens.
        ignore_eos: not OpenAI's: go on behind an end token.
        priority: not OpenAI's: lower numbers go first.
        timeout: not OpenAI's: seconds after which the answer is given up.
        structured_outputs: not OpenAI's: a form that the answer must have.
        experts: not OpenAI's: tell with each token which experts were chosen, and whether it was
            drafted.
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        BeforeValidator(one_or_list),
        Field(max_length=4, default_factory=list),
    ]
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
        BeforeValidator(by_token),
        Field(max_length=1024, default_factory=dict),
    ]
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=2, allow_inf_nan=False)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: list[int] = Field([], max_length=64)
    ignore_eos: bool = False
    priority: int = Field(0, ge=-1000, le=1000)
    timeout: float | None = Field(None, gt=0, le=86_400, allow_inf_nan=False)
    structured_outputs: StructuredOutputs | None = None
    experts: bool = False

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingRequest):
    """Body of `/v1/completions`: a prompt is text or token ids, and there may be several."""

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(prompts),
        Field(max_length=128),
    ]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool = False

    @model_validator(mode="after")
    def _no_logprobs_of_prompts(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: prompts are not scored")
        return self


class FunctionCall(Strict):
    """A call of a tool that the model made: its name, and arguments as JSON."""

    of_the_client = frozenset({"parsed_arguments"})

    name: str
    arguments: str


class ToolCall(Strict):
    """One call in an assistant's message."""

    of_the_client = frozenset({"index"})

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """One turn of a conversation."""

    of_the_client = frozenset({"annotations", "parsed"})

    role: str
    content: Annotated[str | None, BeforeValidator(joined_parts)] = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content, or tool_calls")
        return self


class Function(Strict):
    """What the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Strict):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A function by its name."""

    name: str


class NamedTool(Strict):
    """The one tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema that the answer must fit; `strict` changes nothing: it always must."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool = False


class ResponseFormat(Strict):
    """Free text, any JSON object, or one that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        return self


class ChatRequest(SamplingRequest):
    """Body of `/v1/chat/completions`; without a bound the answer may fill the context.

    Attributes:
        reasoning_effort: "none" tells the chat template not to let the model think, any other to
            let it (its variable `thinking`).
        chat_template_kwargs: not OpenAI's: further variables of the chat template.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="older name")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the older name of max_completion_tokens; send one")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        forced = self.tool_choice if isinstance(self.tool_choice, NamedTool) else None
        if forced and forced.function.name not in {tool.function.name for tool in self.tools}:
            raise ValueError(f"tool_choice names {forced.function.name}, which is not in tools")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice is required, and there are no tools")
        forms = [
            self.structured_outputs is not None,
            self.response_format is not None and self.response_format.type != "text",
            forced is not None or self.tool_choice == "required",
        ]
        if sum(forms) > 1:
            raise ValueError(
                "response_format, structured_outputs and a tool that must be called exclude each "
                "other"
            )
        return self

    @property
    def max_answer(self) -> int | None:
        """The bound on the answer, under whichever name it came."""
        return self.max_completion_tokens or self.max_tokens


class EmbeddingRequest(Strict):
    """Body of `/v1/embeddings`: texts, or their token ids."""

    model: str
    input: Annotated[
        list[str | list[int]],
        BeforeValidator(prompts),
        Field(max_length=2048),
    ]
    encoding_format: Literal["float", "base64"] = "float"
