"""What a field of a suite may hold, and how its sections are checked: unknown fields are refused, and infinity."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
