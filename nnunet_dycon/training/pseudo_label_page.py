"""A PNG page with the pseudo-labels of a few cases, to detect failures of a training early."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_dycon.components.label_space import LabelSpace
from nnunet_dycon.data.loader import TrainingCases, UnlabeledDataset
from nnunet_dycon.methods import Method
from nnunet_dycon.system.pictures import draw_or_warn
from nnunet_dycon.training.plots import PseudoLabel, draw_pseudo_labels

_CASES = 3


def draw(trainer: nnUNetTrainer, method: Method, cases: TrainingCases) -> None:
    """Plot the pseudo-labels of at most 3 unlabeled or sparsely annotated cases after an epoch.

    The plot is pseudo_labels_epoch_XXXX.png in the output folder, where XXXX is the number of the epoch. No plot is
    written if the method makes no pseudo-labels or if checkpoints are disabled. A failure is logged as a warning.

    Args:
        trainer: trainer after the end of an epoch.
        method: semi-supervised method whose `label` predicts the pseudo-labels.
        cases: the datasets of the training.
    """
    if method.labeler is not None and not trainer.disable_checkpointing:
        epoch = trainer.current_epoch - 1
        file = Path(trainer.output_folder) / f"pseudo_labels_epoch_{epoch:04d}.png"
        draw_or_warn(file, partial(draw_page, trainer, method, cases, epoch), trainer.print_to_log_file)


def draw_page(trainer: nnUNetTrainer, method: Method, cases: TrainingCases, epoch: int, file: Path) -> None:
    """Write a figure with the pseudo-labels of at most 3 cases, one slice per case.

    The image, the entropy and the annotation (if there is one) of the slice are drawn, too. The cases are the same in
    each epoch. At least one is unlabeled and one is sparsely annotated, if there are such cases. Each case is predicted
    completely, and `_predict` selects the slice.

    Args:
        trainer: trainer whose plans and dataset.json configure the prediction.
        method: semi-supervised method whose `label` predicts the pseudo-labels.
        cases: the datasets of the training.
        epoch: number of the epoch, for the title.
        file: PNG file to write.
    """
    predictor = nnUNetPredictor(
        tile_step_size=1.0,  # no overlap: a plot does not justify the time
        use_mirroring=False,
        perform_everything_on_device=trainer.device.type == "cuda",
        device=trainer.device,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        _Labeler(method),
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        None,
    )
    height, width = trainer.configuration_manager.spacing[-2:]
    label_space, channels = method.supervision.label_space, trainer.label_manager.num_segmentation_heads
    annotated = _spread(cases.sparse.identifiers, 1 if cases.unlabeled.identifiers else _CASES)
    shown = [*_spread(cases.unlabeled.identifiers, _CASES - len(annotated)), *annotated]
    annotations = {case: _annotation(trainer, cases.labeled, case) for case in annotated}
    draw_pseudo_labels(
        [_predict(predictor, label_space, cases.images, case, annotations.get(case)) for case in shown],
        label_names(trainer.dataset_json, trainer.label_manager),
        labeler=str(method.labeler).replace("_", " "),
        highest_entropy=label_space.highest_entropy(channels),
        aspect=height / width,
        title=f"{type(trainer).__name__}, epoch {epoch}",
        file=file,
    )


class _Labeler(nn.Module):
    """Adapter for nnU-Net's predictor: its output are the logits from which a `Method` makes pseudo-labels.

    The `Method` is not registered as a child module, so its networks keep their mode when the predictor calls eval().
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self._method = (method,)  # in a tuple, so that it is not registered as a child

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._method[0].label(images)


def label_names(dataset_json: dict, labels: LabelManager) -> list[str]:
    """Return the names of the values 0, 1, 2, ... in the plotted pseudo-labels.

    The first name is background. Next are the classes in ascending order of their values or, for region-based training,
    the regions in the order of dataset.json.

    Args:
        dataset_json: content of dataset.json.
        labels: nnU-Net's label manager of the data set.
    """
    values = {name: np.ravel(value).tolist() for name, value in dataset_json["labels"].items()}  # 1 or [1]
    names = [name for name in values if name not in ("background", "ignore")]
    return ["background", *(names if labels.has_regions else sorted(names, key=values.__getitem__))]


def _annotation(trainer: nnUNetTrainer, labeled: Any, case: str) -> torch.Tensor:
    """Return the annotation of a labeled case, (Z, Y, X), with the label values of the plot.

    The value of a voxel is the index of its class or region in the result of `label_names`. Voxels without annotation
    have the value -1.

    Args:
        trainer: trainer with the label manager of the data set.
        labeled: nnU-Net's dataset of the labeled training cases.
        case: identifier of the case.
    """
    segmentation, labels = np.asarray(labeled.load_case(case)[1][0]), trainer.label_manager
    shown = np.where(segmentation == labels.ignore_label, -1, 0)
    for number, region in enumerate(labels.foreground_regions if labels.has_regions else labels.foreground_labels, 1):
        shown[np.isin(segmentation, region)] = number
    return torch.from_numpy(shown)


@torch.inference_mode()
def _predict(
    predictor: nnUNetPredictor,
    label_space: LabelSpace,
    cases: UnlabeledDataset,
    case: str,
    annotation: torch.Tensor | None,
) -> PseudoLabel:
    """Predict a complete case and return one slice with its image, pseudo-label and entropy, and its annotation.

    The slice is the one with most annotated foreground or, without annotation, with most predicted foreground. If there
    is no foreground, it is the middle slice.

    Args:
        predictor: nnU-Net's predictor with a `_Labeler` as its network.
        label_space: label space of the method.
        cases: images of the unlabeled and the sparsely annotated cases.
        case: identifier of the case.
        annotation: result of `_annotation`, (Z, Y, X); None for an unlabeled case.
    """
    image = torch.from_numpy(cases.load_image(case)[:])
    logits = predictor.predict_sliding_window_return_logits(image)
    label = label_space.shown(logits[None])[0]
    foreground = (label > 0).sum((1, 2))
    visible = foreground if annotation is None else (annotation > 0).sum((1, 2))
    index = int(visible.argmax()) if visible.any() else len(visible) // 2
    # Only for one slice: the entropy of a whole CT in float32 with many classes may exceed the memory.
    entropy = label_space.voxel_entropy(logits[None, :, index].float())[0]
    fraction = float(foreground.sum()) / label.numel()
    slices = (image[0, index], label[index], entropy, *(() if annotation is None else (annotation[index],)))
    return PseudoLabel(case, index, fraction, *(tensor.cpu().numpy() for tensor in slices))


def _spread(identifiers: Sequence[str], number: int) -> list[str]:
    """Return at most ``number`` identifiers, evenly spaced from the first to the last."""
    chosen = np.linspace(0, len(identifiers) - 1, min(number, len(identifiers))).round().astype(int)
    return [identifiers[index] for index in chosen]
