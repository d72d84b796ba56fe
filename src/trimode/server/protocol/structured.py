"""Declares what an answer may be made to follow."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from trimode.server.protocol.strict import Strict


class StructuredOutputs(Strict):
    """Says what an answer has to follow, as in vLLM.

    Exactly one of the first five is set.

    Attributes:
        json: JSON schema, as an object or as text.
        regex: Regular expression.
        choice: Texts, one of which is the answer.
        grammar: Context-free grammar.
        json_object: Whether the answer is any JSON object.
        disable_any_whitespace: Whether JSON is written without blanks.
        whitespace_pattern: Expression for blanks of JSON.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class FreeText(Strict):
    """Asks for free text."""

    type: Literal["text"]


class JsonObject(Strict):
    """Asks for any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """Holds a JSON schema.

    Attributes:
        name: Name of the schema; not used.
        description: Purpose of the schema; not used.
        strict: Accepted; the schema is always followed strictly.
        schema_: JSON schema; None = any JSON object.
    """

    name: Annotated[str, Field(max_length=256)]
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class JsonSchema(Strict):
    """Asks for JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[FreeText | JsonObject | JsonSchema, Field(discriminator="type")]
