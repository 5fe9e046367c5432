"""How does a message of the public API look as JSON? As plain dictionaries, lists and numbers."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def as_dict(message: Message) -> dict[str, Any]:
    """Every field by its proto name, defaults included; what is absent (an optional number, a message) is left out.
    protobuf's own JSON writes 64-bit integers as strings."""

    def plain(value: object) -> object:
        if isinstance(value, Message):
            return as_dict(value)
        if isinstance(value, str | int | float):
            return value
        if hasattr(value, "items"):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value]  # type: ignore[attr-defined]

    return {
        field.name: plain(getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }
