"""The advice that an error about a store gives to the user."""

from dataclasses import dataclass

from ntkgen.store.manifest import Manifest


@dataclass(frozen=True)
class Remedy:
    """The place of a store, and the command that writes its missing parts."""

    place: str
    command: str = "ntkgen compute"

    @classmethod
    def of(cls, place: str, manifest: Manifest) -> "Remedy":
        """Choose the command that the store was written with."""
        return cls(place, "ntkgen import" if manifest.is_imported else "ntkgen compute")

    @property
    def repair(self) -> str:
        """Advice for a damaged tile."""
        return (
            f"Run `ntkgen verify --repair {self.place}` and then the same `{self.command}` again to restore the tile."
        )
