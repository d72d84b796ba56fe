"""Holds the common base of all declared objects.

They say exactly what they take.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _whole(value: Any) -> Any:
    """Take 3.0 for 3, as JSON schema does."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Stands behind a number's bounds, so that the schema has them."""
Whole = Annotated[int, WHOLE]


class Strict(BaseModel):
    """Refuses unknown fields, other types, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
