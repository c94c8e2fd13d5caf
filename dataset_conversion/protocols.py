"""Published splits (protocols) and their known faults, one JSON file per split in the folder published_splits."""

import json
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "published_splits"


@dataclass(frozen=True)
class Protocol:
    """A published split.

    Attributes:
        name: name of the split, as given with --protocol.
        source: the publication of the split.
        published_labeled: numbers of labeled cases that publications use. With N labeled cases, the first N of `train`
            are labeled.
        faults: known faults of the split, or of how publications use it. They are printed as warnings.
        train: identifiers of training cases in the published order.
        val: identifiers of validation cases. Settings are chosen on these.
        test: identifiers of test cases.
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


def published_names(converter: str) -> list[str]:
    """Return the names of the protocols (published splits) for a converter, such as "la"."""
    prefix = f"{converter}_"
    return sorted(file.stem.removeprefix(prefix) for file in _FOLDER.glob(f"{prefix}*.json"))


def published(converter: str, name: str) -> Protocol:
    """Load a protocol (published split) of a converter; `name` is one of `published_names(converter)`."""
    content = json.loads((_FOLDER / f"{converter}_{name}.json").read_text(encoding="utf-8"))
    source = content.pop("source")
    return Protocol(name, source, **{key: tuple(value) for key, value in content.items()})
