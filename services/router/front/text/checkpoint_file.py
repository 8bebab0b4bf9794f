"""A JSON file of a checkpoint, read value by value: what is not as it must be is refused by file, key and what would be
right, as a field of a request is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from common.checkpoint.config_values import shown
from common.checkpoint.directory import read_json
from common.errors import CheckpointError


class CheckpointFile:
    """An object of the file, or one inside it. null counts as absent everywhere, as transformers writes it."""

    def __init__(self, name: str, values: Mapping[str, Any], path: str = "") -> None:
        """`path`: of this object in the file, "" for the file's own."""
        self.name = name
        self.path = path
        self.values = values

    @classmethod
    def read(cls, directory: Path, name: str) -> CheckpointFile:
        """Empty if there is no such file. Raises CheckpointError if it is not a JSON object."""
        path = directory / name
        return cls(name, read_json(path) if path.is_file() else {})

    def refuse(self, key: str, right: str) -> NoReturn:
        """`right`: what the value of `key` must be."""
        raise CheckpointError(f"{self.name}: {self.path}{key} must be {right}, not {shown(self.values.get(key))}")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return default if value is None else value

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.values.get(key)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def section(self, key: str) -> CheckpointFile | None:
        """An object inside this one."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "an object or null")
        return CheckpointFile(self.name, value, f"{self.path}{key}.")

    def items(self, key: str) -> list[CheckpointFile]:
        """Of a list: each entry as an object with the one key `[number]`, so that what is wrong of it can be named."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.refuse(key, "a list or null")
        return [CheckpointFile(self.name, {f"[{at}]": item}, f"{self.path}{key}") for at, item in enumerate(value)]

    def size(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is not None and (type(value) is not int or not 1 <= value < 1 << 31):
            self.refuse(key, "a whole number from 1 to 2147483647")
        return value

    def token_ids(self, key: str) -> list[int]:
        """One id or a list of them."""
        value = self.values.get(key)
        if value is None:
            return []
        token_ids = value if isinstance(value, list) else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
            self.refuse(key, "a token id (a whole number from 0), a list of them or null")
        return token_ids
