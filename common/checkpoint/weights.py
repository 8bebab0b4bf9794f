"""Named tensors and slices of a checkpoint, memory-mapped: only the pages that a role reads are touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.checkpoint.directory import StoredTensor, read_tensor_index
from common.checkpoint.tensor_names import find_tensor
from common.compute.device import HOST_MEMORY
from common.errors import CheckpointError


class CheckpointWeights:
    """Reads tensors by name and converts them to the compute dtype; `num_bytes` counts what was read, as converted."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device = HOST_MEMORY) -> None:
        """`device`: where the tensors are wanted."""
        self.directory = directory
        self.dtype = dtype
        self.device = device
        self.num_bytes = 0
        self._index: Mapping[str, StoredTensor] = read_tensor_index(directory)
        self._files: dict[Path, Any] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        index: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> torch.Tensor:
        """Returns a tensor, or part of it, in the compute dtype and on the device (a fresh copy, never a view of the
        map).

        `shape` is what the config says the whole tensor must have. `index` takes one entry of the first axis of a
        three-axis tensor; `rows` and `columns` cut the last two axes. Raises CheckpointError that names the tensor.
        """
        stored = find_tensor(self._index, name, shape, str(self.directory))
        window: tuple[int | slice, ...] = (rows or slice(None), columns or slice(None))[: len(shape)]
        if index is not None:
            window = (index, *window)
        try:
            part = self._open(stored.file).get_slice(name)[window]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} cannot be read from {stored.file}: {error}") from None
        self.num_bytes += part.numel() * self.dtype.itemsize
        tensor: torch.Tensor = part.to(self.dtype)
        if self.device.type != "cpu":
            return tensor.contiguous().to(self.device)
        return tensor.clone(memory_format=torch.contiguous_format) if tensor is part else tensor.contiguous()

    def close(self) -> None:
        """Unmap the files; a tensor that is read later maps its file again."""
        self._files.clear()

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be opened: {error}") from None
        return self._files[file]
