"""Pydantic models that clients make schemas of.

They allow no other fields: the demo, which has never seen a call, would write some until its context is full.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

# An enum, as Anthropic's client turns bounds into words.
Digit = Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Add(Closed):
    """Adds two digits."""

    a: Digit
    b: Digit


class Stop(Closed):
    city: Literal["Rome", "Oslo"]
    nights: Digit


class Trip(Closed):
    """A trip; its schema has $defs and $ref."""

    home: Stop
    away: Stop
