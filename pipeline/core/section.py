"""The base of all settings, and the kinds of numbers in them."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**31)]  # as the libraries below count, many of them in 32 bits
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # valid for numpy and torch, with room to count up
Count = Annotated[int, Field(ge=0, lt=2**31)]
Few = Annotated[int, Field(gt=0, le=1024)]  # layers, heads, runs: each costs as much as the first
Side = Annotated[int, Field(gt=0, le=4096)]  # pixels: images are decoded at no more
Width = Annotated[int, Field(gt=0, le=16_384)]  # of a vector: a matrix of two such widths has a gigabyte
Batch = Annotated[int, Field(gt=0, le=2**20)]
Prefix = Annotated[int, Field(gt=0, le=10_000)]  # events; memory grows with its square
Workers = Annotated[int, Field(ge=0, le=1024)]
Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
