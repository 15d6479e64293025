"""What an error about a store tells the user to do."""

from dataclasses import dataclass

from ntkgen.store.manifest import Manifest


@dataclass(frozen=True)
class Remedy:
    """Where a store lies, and the command that makes what is missing of it."""

    place: str
    command: str = "ntkgen compute"

    @classmethod
    def of(cls, place: str, manifest: Manifest) -> "Remedy":
        """Choose the command that made a store."""
        return cls(place, "ntkgen import" if manifest.is_imported else "ntkgen compute")

    @property
    def repair(self) -> str:
        """What to do about a damaged tile."""
        return f"Run `ntkgen verify --repair {self.place}` and then the same `{self.command}` again: it makes it anew."
