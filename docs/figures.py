"""Figures of the data flow of each method, as SVG; docs/tables.py writes them into docs/assets/flows.

A flow consists of boxes on a grid and of chains of arrows between them:

- ``a > b``: the output of a is an input of b, with gradient;
- ``a | b``: the same, without gradient;
- ``a ~ b``: the weights of b are the exponential moving average (EMA) of those of a.

In a text, ``_`` makes the next character a subscript. The last line of a loss term is its weight. The sum of all terms
is added to each figure.
"""

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "assets" / "flows"
_WIDTH, _ROW, _LINE, _MARGIN, _CHARACTER = 760, 58, 16, 16, 6.6  # pixels
_STYLES = {  # kind of a box: fill, border, radius of the corners, text in the legend
    "labeled": ("#dbeafe", "#2563eb", 5, "labeled"),
    "unlabeled": ("#e5e7eb", "#6b7280", 5, "unlabeled"),
    "output": ("#ffffff", "#94a3b8", 5, ""),
    "network": ("#ccfbf1", "#0f766e", 5, "trained network"),
    "teacher": ("#f3e8ff", "#7e22ce", 5, "EMA teacher"),
    "loss": ("#fef3c7", "#b45309", 14, "loss term"),
    "sum": ("#fde68a", "#b45309", 17, ""),
}
_ARROWS = {">": "", "|": "no gradient", "~": "average of weights"}  # kind of an arrow: text in the legend
_DASHED = {"teacher", "~"}


@dataclass(frozen=True)
class Box:
    """A box of a figure.

    Attributes:
        kind: a key of `_STYLES`.
        column: number of its column, from 0.
        row: row of its center, from 0; a fraction is between two rows.
        text: one line or several.
    """

    kind: str
    column: int
    row: float
    text: str

    @property
    def height(self) -> int:
        """Height in pixels."""
        return 34 if self.kind == "sum" else 16 + _LINE * len(self.text.split("\n"))

    @property
    def width(self) -> float:
        """Width of the text with its margins, in pixels."""
        return 34 if self.kind == "sum" else 18 + _CHARACTER * max(map(len, self.text.replace("_", "").split("\n")))


@dataclass(frozen=True)
class Flow:
    """Data flow of a method: a title, boxes by name, and chains of arrows (see the docstring of the module)."""

    title: str
    boxes: dict[str, Box]
    chains: tuple[str, ...]


@dataclass(frozen=True)
class Arrow:
    """Arrow of a kind in `_ARROWS` from the box named source to the box named target."""

    source: str
    kind: str
    target: str


def _images(*rows: float) -> dict[str, Box]:
    """Return boxes of images in the given rows: labeled strong, unlabeled strong, unlabeled weak, labeled weak."""
    names = ("labeled", "strong"), ("unlabeled", "strong"), ("unlabeled", "weak"), ("labeled", "weak")
    return {
        f"{kind}_{view}": Box(kind, 0, row, f"{kind} images,\n{view} view") for (kind, view), row in zip(names, rows)
    }


def _loss(column: int, row: float, text: str, weight: str) -> Box:
    return Box("loss", column, row, f"{text}\nweight {weight}")


def _with_teacher(title: str, loss: Box, target: str, teacher: str = "EMA teacher") -> Flow:
    """Return the flow of a method with a teacher's target for the unlabeled images, with CutMix if a column is free."""
    last, mixing = loss.column, loss.column == 4
    boxes = _images(1, 2, 3) | {
        "mix": Box("output", 1, 2, "CutMix"),
        "student": Box("network", last - 2, 1.5, "student"),
        "teacher": Box("teacher", last - 2, 3, teacher),
        "truth": Box("labeled", last - 1, 0, "ground truth"),
        "labeled": Box("output", last - 1, 1, "prediction,\nlabeled"),
        "unlabeled": Box("output", last - 1, 2, "prediction,\nunlabeled"),
        "target": Box("output", last - 1, 3, target),
        "supervised": _loss(last, 0.5, "supervised loss", "1"),
        "loss": loss,
    }
    if not mixing:
        del boxes["mix"]
    chains = (
        "labeled_strong > student > labeled > supervised",
        "truth > supervised",
        "unlabeled_strong > mix > student" if mixing else "unlabeled_strong > student",
        "student > unlabeled > loss",
        "unlabeled_weak > teacher > target | loss",
        "student ~ teacher",
    )
    return Flow(title, boxes, chains)


def _dycon(title: str, images: dict[str, Box], second: Box, labels: str, *chains: str) -> Flow:
    """Return the flow of DyCON's losses between the student and a second network: its teacher or its peer."""
    boxes = images | {
        "student": Box("network", 1, 1.5, "student"),
        "second": second,
        "truth": Box("labeled", 2, 0, "ground truth"),
        "own": Box("output", 2, 0.9, "prediction"),
        "embedded": Box("output", 2, 1.85, "embeddings\nof patches"),
        "classes": Box("output", 2, 3.1, f"classes of patches:\nground truth or\n{labels} labels"),
        "target": Box("output", 2, 4.35, "prediction"),
        "negatives": Box("output", 2, 5.3, "embeddings\nof patches"),
        "supervised": _loss(3, 0.4, "supervised loss", "1"),
        "uncl": _loss(3, 1.6, "UnCL", "r(t) w_u"),
        "fecl": _loss(3, 3, "FeCL", "r(t) w_f"),
    }
    common = (
        "student > own > supervised", "truth > supervised", "own > uncl", "own | fecl", "student > embedded > fecl",
        "second > target | uncl", "target | classes | fecl", "second > negatives | fecl",
    )  # fmt: skip
    return Flow(title, boxes, (*chains, *common))


_PSEUDO = "loss on pseudo-labels"
FLOWS = {
    "mean_teacher": _with_teacher(
        "Mean Teacher", _loss(3, 2.5, "consistency (MSE)", "r(t) w"), "prediction,\nunlabeled"
    ),
    "pseudo_label": _with_teacher(
        "PseudoLabel", _loss(3, 2.5, _PSEUDO, "r(t) w"), "pseudo-labels", "EMA teacher,\ndecay 0 (copy)"
    ),
    "fixmatch": _with_teacher(
        "FixMatch", _loss(4, 2.5, f"{_PSEUDO},\nweighted by ω", "r(t) w mean(ω)"), "pseudo-labels and\nω, mixed"
    ),
    "weak_to_strong": _with_teacher("WeakToStrong", _loss(4, 2.5, _PSEUDO, "r(t) w"), "pseudo-labels,\nmixed"),
    "bcp": Flow(
        "BCP",
        _images(0.5, 1.5, 3)
        | {
            "paste": Box("output", 1, 1, "copy-paste"),
            "student": Box("network", 2, 1, "student"),
            "teacher": Box("teacher", 2, 3, "EMA teacher"),
            "truth": Box("labeled", 3, 0, "ground truth,\nmixed"),
            "own": Box("output", 3, 1.2, "prediction,\nmixed images"),
            "labels": Box("output", 3, 3, "pseudo-labels,\nmixed"),
            "supervised": _loss(4, 0.5, "supervised loss,\nlabeled voxels", "1"),
            "pseudo": _loss(4, 2.2, f"{_PSEUDO},\nunlabeled voxels", "r(t) w"),
        },
        (
            "labeled_strong > paste > student > own > supervised", "unlabeled_strong > paste", "truth > supervised",
            "own > pseudo", "unlabeled_weak > teacher > labels | pseudo", "student ~ teacher",
        ),
    ),
    "dycon": _dycon(
        "DyCON", _images(1, 2, 5.3, 4.3), Box("teacher", 1, 4.8, "EMA teacher"), "teacher's",
        "labeled_strong > student", "unlabeled_strong > student", "labeled_weak > second", "unlabeled_weak > second",
        "student ~ second",
    ),
    "dycon_cotraining": _dycon(
        "DyCON in co-training", _images(2.5, 3.5), Box("network", 1, 4.8, "peer,\nsame losses"), "peer's",
        "labeled_strong > student", "labeled_strong > second", "unlabeled_strong > student",
        "unlabeled_strong > second",
    ),
    "cps": Flow(
        "CPS",
        _images(2, 3)
        | {
            "first": Box("network", 1, 1.5, "first network"),
            "second": Box("network", 1, 3.5, "second network"),
            "truth": Box("labeled", 2, 0, "ground truth"),
            "own": Box("output", 2, 1, "prediction"),
            "labels": Box("output", 2, 2, "pseudo-labels"),
            "labels_2": Box("output", 2, 3, "pseudo-labels"),
            "own_2": Box("output", 2, 4, "prediction"),
            "truth_2": Box("labeled", 2, 5, "ground truth"),
            "supervised": _loss(3, 0.5, "supervised loss", "1"),
            "cross": _loss(3, 1.8, _PSEUDO, "r(t) w"),
            "cross_2": _loss(3, 3.2, _PSEUDO, "r(t) w"),
            "supervised_2": _loss(3, 4.5, "supervised loss", "1"),
        },
        (
            "labeled_strong > first > own > supervised", "labeled_strong > second > own_2 > supervised_2",
            "unlabeled_strong > first | labels | cross_2", "unlabeled_strong > second | labels_2 | cross",
            "own > cross", "own_2 > cross_2", "truth > supervised", "truth_2 > supervised_2",
        ),
    ),
    "ugpl": Flow(
        "UGPL",
        _images(1.3, 2.3)
        | {
            "student": Box("network", 1, 0.9, "student"),
            "peer": Box("network", 1, 3, "peer,\nsame losses"),
            "features": Box("output", 2, 0, "features"),
            "own": Box("output", 2, 1.8, "prediction"),
            "other": Box("output", 2, 3, "prediction"),
            "truth": Box("labeled", 2, 4.3, "ground truth"),
            "filter": Box("output", 3, 0.85, "joint labels,\nentropy filter"),
            "contrast": _loss(4, 0.1, "contrast", "r(t) w_c"),
            "filtered": _loss(4, 1.2, "filtered", "r(t) w_f"),
            "cross": _loss(4, 2.3, "cross", "r(t) w_x"),
            "mistake": _loss(4, 3.4, "mistake", "w_m"),
            "supervised": _loss(4, 4.5, "supervised loss", "1"),
        },
        (
            "labeled_strong > student > features > contrast", "unlabeled_strong > student > own > filtered",
            "labeled_strong > peer > other | filter | filtered", "unlabeled_strong > peer", "own | filter | contrast",
            "own > cross", "own > mistake", "own > supervised", "other | cross", "other | mistake",
            "truth > mistake", "truth > supervised",
        ),
    ),
    "dkuxnet": Flow(
        "DK-UXNet",
        {
            "labeled": Box("labeled", 0, 1.8, "labeled images,\nboth views"),
            "strong": Box("unlabeled", 0, 3, "unlabeled images,\nstrong view"),
            "weak": Box("unlabeled", 0, 4.2, "unlabeled images,\nweak view"),
            "network": Box("network", 1, 3, "\n\nDK-UXNet\n\n"),
            "truth": Box("labeled", 2, 0, "ground truth"),
            "own": Box("output", 2, 1, "segmentation,\nlabeled"),
            "queries": Box("output", 2, 2, "query distribution,\nlabeled"),
            "strong_own": Box("output", 2, 3, "segmentation,\nstrong"),
            "weak_own": Box("output", 2, 4, "segmentation,\nweak"),
            "strong_queries": Box("output", 2, 5, "query distribution,\nstrong"),
            "weak_queries": Box("output", 2, 6, "query distribution,\nweak"),
            "supervised": _loss(3, 0.5, "supervised loss", "1"),
            "qd": _loss(3, 1.6, "query loss", "w_q"),
            "segc": _loss(3, 3.5, "consistency (MSE)", "r(t) w_s"),
            "qdc": _loss(3, 5.5, "consistency (KL)", "r(t) w_c"),
        },
        (
            "labeled > network > own > supervised", "truth > supervised", "truth > qd", "network > queries > qd",
            "strong > network > strong_own > segc", "weak > network > weak_own | segc",
            "network > strong_queries > qdc", "network > weak_queries | qdc",
        ),
    ),
}  # fmt: skip


class Drawing:
    """Drawing of a flow: positions of the boxes and arrows.

    Args:
        flow: the flow.
    """

    def __init__(self, flow: Flow) -> None:
        terms = [name for name, box in flow.boxes.items() if box.kind == "loss"]
        row = sum(flow.boxes[name].row for name in terms) / len(terms)
        self.title = flow.title
        self.boxes = flow.boxes | {"sum": Box("sum", flow.boxes[terms[0]].column + 1, row, "L")}
        words = [chain.split() for chain in flow.chains]
        self.arrows = [Arrow(*chain[at : at + 3]) for chain in words for at in range(0, len(chain) - 1, 2)]
        self.arrows = [*dict.fromkeys(self.arrows), *(Arrow(name, ">", "sum") for name in terms)]
        columns = range(self.boxes["sum"].column + 1)
        self.widths = [max(box.width for box in self.boxes.values() if box.column == column) for column in columns]
        self.gap = (_WIDTH - 2 * _MARGIN - sum(self.widths)) / (len(columns) - 1)
        self.top = min(box.row * _ROW - box.height / 2 for box in self.boxes.values()) - _MARGIN
        self.bottom = max(self.y(name) + box.height / 2 for name, box in self.boxes.items())

    def left(self, name: str) -> float:
        """Return the left edge of a box."""
        column = self.boxes[name].column
        return _MARGIN + sum(self.widths[:column]) + self.gap * column

    def right(self, name: str) -> float:
        """Return the right edge of a box."""
        return self.left(name) + self.widths[self.boxes[name].column]

    def y(self, name: str) -> float:
        """Return the vertical center of a box."""
        return self.boxes[name].row * _ROW - self.top

    def port(self, arrow: Arrow, end: str, other: str) -> float:
        """Return the height at which an arrow ends, so that arrows at the same side of a box are apart and in order.

        Args:
            arrow: the arrow.
            end: the end in question, "source" or "target".
            other: the opposite end.
        """
        name = getattr(arrow, end)
        beside = [one for one in self.arrows if getattr(one, end) == name and not self.is_vertical(one)]
        beside.sort(key=lambda one: self.y(getattr(one, other)))
        step = min(10.0, (self.boxes[name].height - 14) / max(1, len(beside) - 1))
        return self.y(name) + step * (beside.index(arrow) - (len(beside) - 1) / 2)

    def is_vertical(self, arrow: Arrow) -> bool:
        """Return whether both boxes of an arrow are in the same column."""
        return self.boxes[arrow.source].column == self.boxes[arrow.target].column

    def arrow(self, arrow: Arrow) -> str:
        """Return the SVG of an arrow."""
        if self.is_vertical(arrow):
            x, down = (
                (self.left(arrow.source) + self.right(arrow.source)) / 2,
                self.y(arrow.target) > self.y(arrow.source),
            )
            y, end = (
                self.y(name) + side * self.boxes[name].height / 2 * (1 if down else -1)
                for name, side in ((arrow.source, 1), (arrow.target, -1))
            )
            return _line(f"M{x:.1f} {y:.1f}V{end:.1f}", arrow.kind) + _bars(x, (y + end) / 2, arrow.kind, vertical=True)
        x, end_x = self.right(arrow.source), self.left(arrow.target)
        y, end_y = self.port(arrow, "source", "target"), self.port(arrow, "target", "source")
        middle = (x + end_x) / 2
        curve = f"M{x:.1f} {y:.1f}C{middle:.1f} {y:.1f} {middle:.1f} {end_y:.1f} {end_x:.1f} {end_y:.1f}"
        return _line(curve, arrow.kind) + _bars(x + 0.25 * (end_x - x), y + 0.1 * (end_y - y), arrow.kind)

    def box(self, name: str) -> str:
        """Return the SVG of a box."""
        box, x, y = self.boxes[name], self.left(name), self.y(name)
        parts = [_rectangle(box.kind, x, y - box.height / 2, self.right(name) - x, box.height)]
        lines = box.text.split("\n")
        for number, line in enumerate(lines):
            weight = ' font-style="italic" fill="#92400e"' if box.kind == "loss" and number == len(lines) - 1 else ""
            height = y + 4.5 + _LINE * (number - (len(lines) - 1) / 2)
            parts.append(_text((x + self.right(name)) / 2, height, line, f' text-anchor="middle"{weight}'))
        return "\n".join(filter(None, parts))

    def legend(self) -> str:
        """Return the SVG of the legend below the figure."""
        x, y, style = float(_MARGIN), self.bottom + 30, ' font-size="11.5"'
        parts = [f'<path d="M{_MARGIN} {y - 16:.1f}H{_WIDTH - _MARGIN}" stroke="#e2e8f0"/>']
        for kind, (*_, text) in _STYLES.items():
            if text and any(box.kind == kind for box in self.boxes.values()):
                parts += [_rectangle(kind, x, y - 6, 18, 12), _text(x + 24, y + 4, text, style)]
                x += 40 + 5.6 * len(text)
        for kind, text in _ARROWS.items():
            if text and any(arrow.kind == kind for arrow in self.arrows):
                parts += [
                    _line(f"M{x:.1f} {y:.1f}h26", kind) + _bars(x + 9, y, kind),
                    _text(x + 32, y + 4, text, style),
                ]
                x += 48 + 5.6 * len(text)
        return "\n".join(parts)

    def svg(self) -> str:
        """Return the figure."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.bottom + 48:.0f}" width="{_WIDTH}" '
            'role="img" font-family="Helvetica, Arial, sans-serif" font-size="12.5" fill="#1f2937">',
            f"<title>Data flow of {escape(self.title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 8 4 0 8z" fill="#475569"/></marker></defs>',
            '<rect width="100%" height="100%" rx="10" fill="#ffffff"/>',
        )
        parts = (*map(self.arrow, self.arrows), *map(self.box, self.boxes), self.legend())
        return "\n".join([*head, *parts, "</svg>\n"])


def _line(path: str, kind: str) -> str:
    return f'<path d="{path}" fill="none" stroke="#475569" stroke-width="1.3"{_dashes(kind)} marker-end="url(#head)"/>'


def _bars(x: float, y: float, kind: str, vertical: bool = False) -> str:
    """Return two red bars across an arrow without gradient, or "" for other arrows."""
    bars = f"M{x - 6:.1f} {y - 2:.1f}h12m0 4h-12" if vertical else f"M{x - 2:.1f} {y - 6:.1f}v12m4 0v-12"
    return f'<path d="{bars}" stroke="#dc2626" stroke-width="2"/>' if kind == "|" else ""


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    fill, border, radius, _ = _STYLES[kind]
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="{min(radius, height / 2)}" '
        f'fill="{fill}" stroke="{border}" stroke-width="1.3"{_dashes(kind)}/>'
    )


def _dashes(kind: str) -> str:
    return ' stroke-dasharray="5 3"' if kind in _DASHED else ""


def _text(x: float, y: float, line: str, style: str) -> str:
    subscripts = re.sub("_(.)", r'<tspan font-size="9" dy="3">\1</tspan>', escape(line))
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{subscripts}</text>' if line else ""


def files() -> dict[Path, str]:
    """Return the file and the SVG text of each figure."""
    return {FOLDER / f"{name}.svg": Drawing(flow).svg() for name, flow in FLOWS.items()}
