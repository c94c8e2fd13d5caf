"""Check of sparse annotations: the fraction of all voxels that is annotated with each label."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from nnunet_dycon.data.dataset_json import ignore_label, values_by_name
from nnunet_dycon.data.label_values import sparsely_annotated
from nnunet_dycon.doctor.findings import NOTE, WARNING, Finding
from nnunet_dycon.errors import counted

_FEW_VOXELS = 50  # of a label in all cases; with fewer, a network hardly learns the label


def examine_annotation(
    counts: Mapping[str, Mapping[int, int]], dataset_json: dict, spacing: Sequence[float] | None = None
) -> Iterator[Finding]:
    """Check the annotation of a data set with an ignore label; yield nothing if all voxels are annotated.

    Yield a NOTE with the fraction of all voxels that is annotated, in total and with each label. Yield a WARNING for
    each problem: cases without any annotation, no voxel annotated as background, and labels with fewer than 50 voxels
    in all cases together.

    Args:
        counts: case identifier -> label value -> number of voxels, as from `count_labels`.
        dataset_json: content of dataset.json.
        spacing: spacing in mm to which the cases were resampled; None for cases that are not preprocessed. It is used
            only in the remedy for cases without annotation, because resampling can remove thin annotations.
    """
    ignore, sparse = ignore_label(dataset_json), sparsely_annotated(counts, dataset_json)
    if ignore is None or not sparse:
        return
    total = sum((Counter(found) for found in counts.values()), Counter())
    voxels, unannotated = total.total(), total.pop(ignore)
    named = {name: sum(total[value] for value in its) for name, its in values_by_name(dataset_json).items()}
    named.pop("ignore")
    shares = ", ".join(f"{name} {number / voxels:.2g}" for name, number in named.items())
    yield Finding(
        "annotation",
        NOTE,
        f"sparsely annotated: {len(sparse)} of {len(counts)} labeled cases; their images are also used as unlabeled "
        f"ones. Annotated share of all voxels: {1 - unannotated / voxels:.2g} ({shares})",
    )
    if empty := [case for case in sparse if not counts[case].keys() - {ignore}]:
        message = counted(empty, "labeled case has no annotation", "labeled cases have no annotation")
        remedy = "move them to imagesUn, and plan and preprocess with --clean"
        if spacing is not None:
            target = " x ".join(f"{length:.3g}" for length in spacing)
            remedy += (
                f"; if they have annotation in labelsTr, resampling to {target} mm has removed it: annotate thicker "
                "strokes, or plan a finer spacing"
            )
        yield Finding("annotation", WARNING, message, remedy)
    if not named["background"]:
        message = "no voxel is annotated as background, so the network learns to predict foreground everywhere"
        yield Finding("annotation", WARNING, message, "also annotate some background")
    few = [f"{name} ({number})" for name, number in named.items() if name != "background" and number < _FEW_VOXELS]
    if few:
        one, many = (f"{noun} fewer than {_FEW_VOXELS} annotated voxels" for noun in ("label has", "labels have"))
        yield Finding("annotation", WARNING, counted(few, one, many), "annotate more voxels")
