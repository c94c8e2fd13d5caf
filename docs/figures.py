"""Figures of the data flow of each method, drawn as SVG files in docs/assets/flows.

    python -m docs.figures [--check]

With --check, nothing is written, and the exit code is 1 if a figure is out of date.

A flow consists of boxes on a grid and of chains of arrows between them:

- ``a > b``: the output of a is an input of b, with gradient;
- ``a | b``: the same, without gradient;
- ``a ~ b``: the weights of b are the exponential moving average (EMA) of those of a.

In a text, ``_`` makes the next character a subscript. The last line of a loss term is its weight.
"""

import argparse
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "assets" / "flows"
_ROW, _GAP, _MARGIN, _LINE, _CHARACTER = 58, 42, 16, 16, 6.6  # pixels
_STYLES = {  # kind of a box: fill, border, entry in the legend
    "labeled": ("#dbeafe", "#2563eb", "labeled"),
    "unlabeled": ("#e5e7eb", "#6b7280", "unlabeled"),
    "network": ("#ccfbf1", "#0f766e", "trained network"),
    "teacher": ("#f3e8ff", "#7e22ce", "EMA teacher"),
    "output": ("#ffffff", "#94a3b8", ""),
    "loss": ("#fef3c7", "#b45309", "loss term"),
    "sum": ("#fde68a", "#b45309", ""),
}
_ARROWS = {"|": "no gradient", "~": "average of weights"}  # kind of an arrow: entry in the legend


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
        return 34 if self.kind == "sum" else 16 + _LINE * (1 + self.text.count("\n"))


@dataclass(frozen=True)
class Flow:
    """Data flow of a method: a title, boxes by name, and chains of arrows as described in the docstring of the module."""

    title: str
    boxes: dict[str, Box]
    arrows: tuple[str, ...]

    def complete(self) -> tuple[dict[str, Box], list[tuple[str, str, str]]]:
        """Return the boxes, including the sum of all loss terms, and the arrows as (source, kind, target)."""
        links = [link for chain in self.arrows for link in zip(chain.split(), chain.split()[1:], chain.split()[2:])]
        terms = {name: box for name, box in self.boxes.items() if box.kind == "loss"}
        row = sum(box.row for box in terms.values()) / len(terms)
        total = Box("sum", max(box.column for box in terms.values()) + 1, row, "L")
        found = [link for link in links if link[1] in ">|~"] + [(name, ">", "sum") for name in terms]
        return {**self.boxes, "sum": total}, found


def _inputs(*rows: float | None) -> dict[str, Box]:
    """Return the images in the rows of: labeled strong, unlabeled strong, unlabeled weak, labeled weak view."""
    names = ("labeled", "strong"), ("unlabeled", "strong"), ("unlabeled", "weak"), ("labeled", "weak")
    return {
        f"{kind}_{view}": Box(kind, 0, row, f"{kind} images\n{view} view")
        for (kind, view), row in zip(names, rows)
        if row is not None
    }


def _with_teacher(title: str, term: str, target: str, mixing: bool = False, teacher: str = "EMA teacher") -> Flow:
    """Return the flow of a method whose teacher predicts the target of the unlabeled images."""
    at = int(mixing)
    boxes = _inputs(1, 2, 3) | {
        "student": Box("network", 1 + at, 1.5, "student"), "teacher": Box("teacher", 1 + at, 3, teacher),
        "truth": Box("labeled", 2 + at, 0, "ground truth"), "labeled": Box("output", 2 + at, 1, "prediction,\nlabeled"),
        "unlabeled": Box("output", 2 + at, 2, "prediction,\nunlabeled"), "target": Box("output", 2 + at, 3, target),
        "supervised": Box("loss", 3 + at, 0.5, "supervised loss\n1"), "term": Box("loss", 3 + at, 2.5, term),
    }  # fmt: skip
    if mixing:
        boxes["mix"] = Box("output", 1, 2, "CutMix")
    return Flow(title, boxes, (
        "labeled_strong > student > labeled > supervised", "truth > supervised", "student > unlabeled > term",
        "unlabeled_strong > mix > student" if mixing else "unlabeled_strong > student",
        "unlabeled_weak > teacher > target | term", "student ~ teacher",
    ))  # fmt: skip


def _dycon(title: str, second: Box, inputs: dict[str, Box], teacher: str, *arrows: str) -> Flow:
    """Return the flow of DyCON's losses between the student and a second network: its teacher or its peer."""
    boxes = inputs | {
        "student": Box("network", 1, 1.5, "student"), "second": second,
        "truth": Box("labeled", 2, 0, "ground truth"), "own": Box("output", 2, 1, "prediction"),
        "embedded": Box("output", 2, 2, "embeddings"),
        "classes": Box("output", 2, 3, f"classes of patches:\nground truth or\n{teacher} labels"),
        "target": Box("output", 2, 4, "prediction"), "negatives": Box("output", 2, 5, "embeddings"),
        "supervised": Box("loss", 3, 0.5, "supervised loss\n1"), "uncl": Box("loss", 3, 2, "UnCL\nr(t) w_u"),
        "fecl": Box("loss", 3, 3.5, "FeCL\nr(t) w_f"),
    }  # fmt: skip
    return Flow(title, boxes, (
        *arrows, "student > own > supervised", "truth > supervised", "own > uncl", "student > embedded > fecl",
        "second > target | uncl", "target | classes | fecl", "second > negatives | fecl",
    ))  # fmt: skip


_DYCON_TEACHER = Box("teacher", 1, 4.5, "EMA teacher")
_DYCON_PEER = Box("network", 1, 4.5, "peer")
FLOWS = {
    "mean_teacher": _with_teacher("Mean Teacher", "consistency (MSE)\nr(t) w", "prediction,\nunlabeled"),
    "pseudo_label": _with_teacher(
        "Pseudo-labels", "loss on pseudo-labels\nr(t) w", "pseudo-labels", teacher="copy of student"
    ),
    "fixmatch": _with_teacher(
        "FixMatch", "loss on pseudo-labels\nr(t) w × confident part", "pseudo-labels\nabove threshold,\nmixed", True
    ),
    "weak_to_strong": _with_teacher("WeakToStrong", "loss on pseudo-labels\nr(t) w", "pseudo-labels,\nmixed", True),
    "bcp": Flow(
        "Bidirectional copy-paste",
        _inputs(0.5, 1.5, 3) | {
            "paste": Box("output", 1, 1, "copy-paste"), "student": Box("network", 2, 1, "student"),
            "teacher": Box("teacher", 2, 3, "EMA teacher"), "truth": Box("labeled", 3, 0, "ground truth,\nmixed"),
            "own": Box("output", 3, 1.2, "prediction,\nmixed images"),
            "labels": Box("output", 3, 3, "pseudo-labels,\nmixed"),
            "supervised": Box("loss", 4, 0.5, "supervised loss,\nlabeled voxels\n1"),
            "pseudo": Box("loss", 4, 2.2, "loss on pseudo-labels,\nunlabeled voxels\nr(t) w"),
        },
        ("labeled_strong > paste > student > own > supervised", "unlabeled_strong > paste", "truth > supervised",
         "own > pseudo", "unlabeled_weak > teacher > labels | pseudo", "student ~ teacher"),
    ),
    "dycon": _dycon(
        "DyCON", _DYCON_TEACHER, _inputs(1, 2, 5, 4), "teacher's", "labeled_strong > student",
        "unlabeled_strong > student", "labeled_weak > second", "unlabeled_weak > second", "student ~ second",
    ),
    "dycon_cotraining": _dycon(
        "DyCON in co-training, losses of one network", _DYCON_PEER, _inputs(2.5, 3.5), "peer's",
        "labeled_strong > student", "labeled_strong > second", "unlabeled_strong > student", "unlabeled_strong > second",
    ),
    "cps": Flow(
        "Cross pseudo supervision",
        _inputs(2, 3) | {
            "first": Box("network", 1, 1.5, "first network"), "second": Box("network", 1, 3.5, "second network"),
            "truth": Box("labeled", 2, 0, "ground truth"), "own": Box("output", 2, 1, "prediction"),
            "labels": Box("output", 2, 2, "pseudo-labels"), "labels_2": Box("output", 2, 3, "pseudo-labels"),
            "own_2": Box("output", 2, 4, "prediction"), "truth_2": Box("labeled", 2, 5, "ground truth"),
            "supervised": Box("loss", 3, 0.5, "supervised loss\n1"), "cross": Box("loss", 3, 1.8, "cross\nr(t) w"),
            "cross_2": Box("loss", 3, 3.2, "cross\nr(t) w"), "supervised_2": Box("loss", 3, 4.5, "supervised loss\n1"),
        },
        ("labeled_strong > first > own > supervised", "unlabeled_strong > first", "labeled_strong > second > own_2",
         "unlabeled_strong > second", "own_2 > supervised_2", "truth > supervised", "truth_2 > supervised_2",
         "own > cross", "own_2 > cross_2", "first | labels | cross_2", "second | labels_2 | cross"),
    ),
    "ugpl": Flow(
        "UGPL, losses of one network",
        _inputs(1.5, 2.5) | {
            "student": Box("network", 1, 1, "student"), "peer": Box("network", 1, 3, "peer"),
            "features": Box("output", 2, 0, "features"), "own": Box("output", 2, 1.7, "prediction"),
            "other": Box("output", 2, 3, "prediction"), "truth": Box("labeled", 2, 4, "ground truth"),
            "filter": Box("output", 3, 0.9, "joint labels,\nentropy filter"),
            "contrast": Box("loss", 4, 0, "contrast\nr(t) w_c"), "filtered": Box("loss", 4, 1, "filtered\nr(t) w_f"),
            "cross": Box("loss", 4, 2, "cross\nr(t) w_x"), "mistake": Box("loss", 4, 3, "mistake\nw_m"),
            "supervised": Box("loss", 4, 4, "supervised loss\n1"),
        },
        ("labeled_strong > student > features > contrast", "unlabeled_strong > student > own > filtered",
         "labeled_strong > peer > other | filter | filtered", "unlabeled_strong > peer", "own | filter | contrast",
         "own > cross", "own > mistake", "own > supervised", "other | cross", "other | mistake", "truth > mistake",
         "truth > supervised"),
    ),
    "dkuxnet": Flow(
        "DK-UXNet",
        {
            "labeled": Box("labeled", 0, 1.2, "labeled images\nstrong, weak view"),
            "strong": Box("unlabeled", 0, 2.5, "unlabeled images\nstrong view"),
            "weak": Box("unlabeled", 0, 3.8, "unlabeled images\nweak view"),
            "network": Box("network", 1, 2.5, "DK-UXNet"), "truth": Box("labeled", 2, 0, "ground truth"),
            "own": Box("output", 2, 1, "segmentation,\nlabeled"), "queries": Box("output", 2, 2, "queries, labeled"),
            "strong_own": Box("output", 2, 3, "segmentation,\nstrong"), "weak_own": Box("output", 2, 4, "segmentation,\nweak"),
            "strong_queries": Box("output", 2, 5, "queries, strong"), "weak_queries": Box("output", 2, 6, "queries, weak"),
            "supervised": Box("loss", 3, 0.5, "supervised loss\n1"), "qd": Box("loss", 3, 1.6, "query loss\nw_q"),
            "segc": Box("loss", 3, 3.5, "consistency (MSE)\nr(t) w_s"), "qdc": Box("loss", 3, 5.5, "consistency (KL)\nr(t) w_c"),
        },
        ("labeled > network > own > supervised", "truth > supervised", "truth > qd", "network > queries > qd",
         "strong > network > strong_own > segc", "weak > network > weak_own | segc",
         "network > strong_queries > qdc", "network > weak_queries | qdc"),
    ),
}  # fmt: skip


def svg(flow: Flow) -> str:
    """Return the SVG of a flow."""
    boxes, arrows = flow.complete()
    widths: dict[int, float] = defaultdict(float)
    for box in boxes.values():
        widths[box.column] = max(widths[box.column], 34 if box.kind == "sum" else 18 + _CHARACTER * _longest(box.text))
    left = {column: _MARGIN + sum(widths[each] + _GAP for each in range(column)) for column in widths}
    highest = min(box.row * _ROW - box.height / 2 for box in boxes.values())
    center = {
        name: (left[box.column] + widths[box.column] / 2, _MARGIN + box.row * _ROW - highest)
        for name, box in boxes.items()
    }
    right = max(left.values()) + widths[max(widths)] + _MARGIN
    bottom = max(center[name][1] + box.height / 2 for name, box in boxes.items())
    parts = [_arrow(boxes, arrows, center, widths, link) for link in arrows]
    for name, box in boxes.items():
        parts.append(_drawn(box, *center[name], 34 if box.kind == "sum" else widths[box.column]))
    parts += _legend({box.kind for box in boxes.values()}, {kind for _, kind, _ in arrows}, bottom + 30)
    size = f"{right:.0f} {bottom + 48:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12.5" fill="#1f2937">\n<title>{escape(flow.title)}'
        '</title>\n<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#475569"/></marker></defs>\n<rect width="100%" height="100%" '
        'rx="10" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _longest(text: str) -> int:
    return max(len(line.replace("_", "")) for line in text.splitlines())


def _text(x: float, y: float, line: str, style: str = "") -> str:
    subscript = r'<tspan font-size="9" dy="3">\1</tspan>'
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{re.sub("_(.)", subscript, escape(line))}</text>'


def _drawn(box: Box, x: float, y: float, width: float) -> str:
    fill, border, _ = _STYLES[box.kind]
    dashes = ' stroke-dasharray="5 3"' if box.kind == "teacher" else ""
    corner = 17 if box.kind == "sum" else 14 if box.kind == "loss" else 5
    lines = box.text.splitlines()
    parts = [
        f'<rect x="{x - width / 2:.1f}" y="{y - box.height / 2:.1f}" width="{width:.1f}" height="{box.height}" '
        f'rx="{corner}" fill="{fill}" stroke="{border}" stroke-width="1.3"{dashes}/>'
    ]
    for number, line in enumerate(lines):
        style = ' text-anchor="middle"'
        if box.kind == "loss" and number == len(lines) - 1:
            style += ' font-style="italic" fill="#92400e"'
        parts.append(_text(x, y + 4.5 + _LINE * (number - (len(lines) - 1) / 2), line, style))
    return "\n".join(parts)


def _arrow(boxes, arrows, center, widths, link) -> str:
    source, kind, target = link
    (x0, y0), (x1, y1) = center[source], center[target]
    dashes = ' stroke-dasharray="5 3"' if kind == "~" else ""
    if boxes[source].column == boxes[target].column:
        down = 1 if y1 > y0 else -1
        y0, y1 = y0 + down * boxes[source].height / 2, y1 - down * boxes[target].height / 2
        path, middle, across = f"M{x0:.1f} {y0:.1f}V{y1:.1f}", (x0, (y0 + y1) / 2), (6.0, 0.0)
    else:
        x0, x1 = x0 + widths[boxes[source].column] / 2, x1 - widths[boxes[target].column] / 2
        if boxes[target].kind == "sum":
            x1 = center[target][0] - 17
        y0 += _port(boxes, arrows, link, 0)
        y1 += _port(boxes, arrows, link, 2)
        bend = max(20.0, (x1 - x0) / 2)
        path = f"M{x0:.1f} {y0:.1f}C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        middle, across = ((x0 + x1) / 2, (y0 + y1) / 2), (0.0, 6.0)
    parts = [f'<path d="{path}" fill="none" stroke="#475569" stroke-width="1.3"{dashes} marker-end="url(#head)"/>']
    if kind == "|":
        parts.append(_bars(*middle, *across))
    return "\n".join(parts)


def _port(boxes, arrows, link, end: int) -> float:
    """Return the vertical distance of an arrow's end (0: source, 2: target) from the center of its box."""
    name, other = link[end], 2 - end
    same_side = [
        each for each in arrows if each[end] == name and boxes[each[0]].column != boxes[each[2]].column
    ]
    same_side.sort(key=lambda each: boxes[each[other]].row)
    step = min(10.0, (boxes[name].height - 14) / max(1, len(same_side) - 1))
    return (same_side.index(link) - (len(same_side) - 1) / 2) * step


def _bars(x: float, y: float, dx: float, dy: float) -> str:
    """Return two short bars across an arrow: the sign of a stopped gradient."""
    shift = (2.2, 0.0) if dy else (0.0, 2.2)
    return "".join(
        f'<path d="M{x - dx + s * shift[0]:.1f} {y - dy + s * shift[1]:.1f}L{x + dx + s * shift[0]:.1f} '
        f'{y + dy + s * shift[1]:.1f}" stroke="#dc2626" stroke-width="2"/>'
        for s in (-1, 1)
    )


def _legend(kinds: set[str], arrows: set[str], y: float) -> list[str]:
    parts, x = [f'<path d="M{_MARGIN} {y - 17}H9999" stroke="#e2e8f0"/>'], float(_MARGIN)
    for kind, (fill, border, text) in _STYLES.items():
        if kind in kinds and text:
            dashes = ' stroke-dasharray="4 2"' if kind == "teacher" else ""
            parts.append(f'<rect x="{x:.1f}" y="{y - 6}" width="18" height="12" rx="3" fill="{fill}" stroke="{border}"{dashes}/>')
            parts.append(_text(x + 24, y + 4, text, ' font-size="11.5"'))
            x += 24 + 6.2 * len(text) + 16
    for kind, text in _ARROWS.items():
        if kind in arrows:
            dashes = ' stroke-dasharray="5 3"' if kind == "~" else ""
            parts.append(f'<path d="M{x:.1f} {y}h24" stroke="#475569" stroke-width="1.3"{dashes} marker-end="url(#head)"/>')
            parts += [_bars(x + 11, y, 0, 6)] if kind == "|" else []
            parts.append(_text(x + 31, y + 4, text, ' font-size="11.5"'))
            x += 31 + 6.2 * len(text) + 16
    return parts


def main() -> int:
    """Write all figures, or only check them with --check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a figure would change")
    check = parser.parse_args().check
    out_of_date = []
    for name, flow in FLOWS.items():
        file, drawn = FOLDER / f"{name}.svg", svg(flow)
        if not file.is_file() or file.read_text() != drawn:
            out_of_date.append(file)
            if not check:
                FOLDER.mkdir(parents=True, exist_ok=True)
                file.write_text(drawn)
    for file in out_of_date:
        print(file.name, "is out of date; run: python -m docs.figures" if check else "written")
    return int(bool(out_of_date) and check)


if __name__ == "__main__":
    sys.exit(main())
