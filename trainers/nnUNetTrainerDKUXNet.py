"""Trainer of DK-UXNet: 3D UX-Net with a k-means mask transformer and query distribution consistency."""

from dataclasses import asdict, replace
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.components.batches import StudentOutput
from nnunet_dycon.components.features import FeatureTap
from nnunet_dycon.components.wrappers import unwrap
from nnunet_dycon.errors import NotSupported
from nnunet_dycon.methods import DKUXNet, DKUXNetSettings
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.trainers.uxnet_training import UXNetTraining


class nnUNetTrainerDKUXNet(UXNetTraining, SemiSupervisedTrainer):
    """DK-UXNet: query distribution consistency (arXiv:2311.12364); see `nnunet_dycon.methods.dkuxnet`.

    The loss on unlabeled images is the consistency of a mask transformer's outputs between a weak and a strong view.
    """

    network_class = "nnunet_dycon.networks.DKUXNet"
    activation_memory_factor = 4.5  # two views and the mask transformer; measured in docs/reference/cost.md
    method_settings = DKUXNetSettings()

    @classmethod
    def check_compatibility(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        super().check_compatibility(plans, configuration, dataset_json)
        labels = PlansManager(plans).get_label_manager(dataset_json)
        if labels.has_regions and labels.num_segmentation_heads == 1:
            # All queries would belong to a single region, so the query distribution would be constant.
            raise NotSupported(
                f"{cls.__name__} needs at least two classes or regions, but dataset.json defines a single region; "
                "define it as a label instead"
            )

    @classmethod
    def network_options(cls) -> dict[str, Any]:
        return {"queries": cls.method_settings.queries}

    @property
    def settings(self) -> dict[str, dict]:
        return super().settings | {"optimizer_settings": asdict(self.optimizer_settings)}

    def build_method(self, network, supervision) -> DKUXNet:
        return DKUXNet(supervision, self.method_settings)

    def initialize(self) -> None:
        """Initialize like `SemiSupervisedTrainer`, then register a hook that stores the student's query distribution.

        The mask transformer predicts this distribution in addition to the segmentation. For each voxel, it computes the
        probabilities of all learned queries, and sums them over the queries of each class.

        Raises:
            NotSupported: deep supervision is off. Without it, the layers that assign voxels to queries at the lower
                resolutions are not trained.
        """
        if not self.enable_deep_supervision:
            raise NotSupported(f"{type(self).__name__} needs deep supervision; leave enable_deep_supervision = True")
        super().initialize()
        self._queries = FeatureTap(unwrap(self.network), "kmax")

    def _student(self, images: torch.Tensor) -> StudentOutput:
        output = super()._student(images)
        return replace(output, queries=self._queries.take().queries)
