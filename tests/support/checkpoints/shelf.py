"""Checkpoints and references that are made once a test session."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.support.checkpoints.reference import Reference
from tests.support.checkpoints.tiny_checkpoints import Recipe, write_checkpoint


@dataclass
class Shelf:
    """Checkpoints by recipe, and what transformers says about them."""

    directory: Path
    _references: dict[str, Reference] = field(default_factory=dict)

    def checkpoint(self, recipe: Recipe) -> Path:
        """Directory of the recipe's checkpoint."""
        path = self.directory / recipe.name
        return path if path.exists() else write_checkpoint(path, recipe)

    def reference(self, recipe: Recipe) -> Reference:
        """With the answers that it gave before."""
        if recipe.name not in self._references:
            self._references[recipe.name] = Reference(self.checkpoint(recipe))
        return self._references[recipe.name]
