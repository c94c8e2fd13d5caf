"""Published splits: the lists lie in published_splits, one JSON file each, with the faults that are known of them."""

import json
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "published_splits"


@dataclass(frozen=True)
class Protocol:
    """A published split.

    Attributes:
        name: what --protocol takes.
        source: who published it.
        published_labeled: the numbers of labeled cases in publications, always the first ones of `train`.
        faults: what is wrong with it, or with how it was used.
        train: identifiers in the published order.
        val: identifiers; for choosing settings.
        test: identifiers.
    """

    name: str
    source: str
    published_labeled: tuple[int, ...]
    faults: tuple[str, ...]
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def identifiers(self) -> tuple[str, ...]:
        return self.train + self.val + self.test


def published(converter: str, name: str) -> Protocol:
    """The protocol `name` of a converter; the registry has the names."""
    content = json.loads((_FOLDER / f"{converter}_{name}.json").read_text(encoding="utf-8"))
    source = content.pop("source")
    return Protocol(name, source, **{key: tuple(value) for key, value in content.items()})
