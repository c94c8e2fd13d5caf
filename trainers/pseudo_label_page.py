"""A page with the labels that some unlabeled cases get: the quickest way to see whether training goes astray."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_dycon.data.loader import UnlabeledDataset
from nnunet_dycon.label_kinds import LabelKind
from nnunet_dycon.methods import Method
from nnunet_dycon.pictures import PseudoLabel, draw_pseudo_labels

_CASES = 3


def draw_page(trainer: nnUNetTrainer, method: Method, cases: UnlabeledDataset, file: Path) -> None:
    """Predict a few unlabeled cases whole, the same ones each time, and draw them."""
    predictor = nnUNetPredictor(
        tile_step_size=1.0,  # without overlap: a look is worth no more time
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
    kind, channels = method.supervision.kind, trainer.label_manager.num_segmentation_heads
    draw_pseudo_labels(
        [_predict(predictor, kind, cases, case) for case in _spread(cases.identifiers)],
        _names(trainer),
        labeler=method.labeler.replace("_", " "),
        highest_entropy=kind.highest_entropy(channels),
        aspect=height / width,
        title=f"{type(trainer).__name__}, epoch {trainer.current_epoch}",
        file=file,
    )


class _Labeler(nn.Module):
    """Who labels, as nnU-Net's predictor wants a network. The method is no child: this does not switch its mode."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self._method = (method,)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._method[0].label(images)


def _names(trainer: nnUNetTrainer) -> list[str]:
    """Of what `LabelKind.shown` numbers: background, then classes by their values or regions in their order."""
    # A label may stand in a list of its own.
    values = {name: np.ravel(value).tolist() for name, value in trainer.dataset_json["labels"].items()}
    names = [name for name in values if name not in ("background", "ignore")]
    return ["background", *(names if trainer.label_manager.has_regions else sorted(names, key=values.get))]


@torch.inference_mode()
def _predict(predictor: nnUNetPredictor, kind: LabelKind, cases: UnlabeledDataset, case: str) -> PseudoLabel:
    """The slice with most foreground, or the middle one if there is none."""
    image = torch.from_numpy(cases.load_image(case)[:])
    logits = predictor.predict_sliding_window_return_logits(image)
    label = kind.shown(logits[None])[0]
    foreground = (label > 0).sum((1, 2))
    index = int(foreground.argmax()) if foreground.any() else len(foreground) // 2
    # Of one slice only: in float32 and for many classes, that of a whole CT might not fit.
    entropy = kind.voxel_entropy(logits[None, :, index].float())[0]
    share = float(foreground.sum()) / label.numel()
    slices = (image[0, index], label[index], entropy)
    return PseudoLabel(case, index, share, *(tensor.cpu().numpy() for tensor in slices))


def _spread(identifiers: Sequence[str]) -> list[str]:
    """A few of them, from the first to the last."""
    chosen = np.linspace(0, len(identifiers) - 1, min(_CASES, len(identifiers))).round().astype(int)
    return [identifiers[index] for index in chosen]
