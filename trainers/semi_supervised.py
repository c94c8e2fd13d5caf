"""Base class of the semi-supervised trainers, which extends nnU-Net's trainer."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dycon.components.batches import StudentOutput
from nnunet_dycon.components.defaults import unlabeled_patches
from nnunet_dycon.components.features import FeatureStage, FeatureTap
from nnunet_dycon.components.wrappers import unwrap, with_fixed_shapes
from nnunet_dycon.data import augmenters, loader
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.errors import ends_in_one_line, explained
from nnunet_dycon.methods import Method, Supervision
from nnunet_dycon.system.distributed import on_any_rank, on_rank_zero, waiting_for_rank_zero
from nnunet_dycon.system.environment import require_nnunet
from nnunet_dycon.trainers import caveat_of
from nnunet_dycon.training import checkpoints, compatibility, finetune, plots, preemption, preflight, pseudo_label_page
from nnunet_dycon.training.recorder import EpochRecorder, replace_lost
from nnunet_dycon.training.run_record import update_record
from nnunet_dycon.training.settings import TrainingSettings
from nnunet_dycon.training.step import GuardedStep, autocast, optimize_with_network
from nnunet_dycon.training.supervision import make_supervision


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with unlabeled cases. Subclasses define the settings and, in build_method, the method."""

    training_settings = TrainingSettings()
    method_settings: Any  # frozen dataclass with the settings of the method
    activation_memory_factor = 1.0  # memory of a patch for all views and networks, relative to nnU-Net's estimate
    second_network: type[nnUNetTrainer] | None = None  # builds the second network of co-training

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net compares this signature with its own)
    ):
        with ends_in_one_line():
            require_nnunet()
            self.check_compatibility(plans, configuration, dataset_json)
            self._continue_training = bool(plans.get("continue_training"))  # --c; nnU-Net removes it from the plans
            with explained(OSError, "cannot create the output folder of this training; check nnUNet_results"):
                super().__init__(plans, configuration, fold, dataset_json, device)
        self.training_settings.apply_to(self)
        self.unlabeled_cases = UnlabeledCases(self.plans_manager, configuration, dataset_json)
        self.method: Method | None = None  # set by initialize
        self._resumed_settings: dict[str, dict] | None = None  # set by load_checkpoint
        self._sparse: list[str] = []  # sparsely annotated cases of all folds; set by on_train_start
        self._cases: loader.TrainingCases | None = None  # set by get_dataloaders
        self._step_in_epoch, self._recorder = 0, EpochRecorder()
        self._guarded_step = GuardedStep(self.print_to_log_file)
        self._stop_request = preemption.StopRequest()
        self._lock = preflight.TrainingLock(Path(self.output_folder), self.unlabeled_cases, self.print_to_log_file)

    @classmethod
    def check_compatibility(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Raise NotSupported or UserError if plans or dataset.json fail a check in the module `compatibility`."""
        planned = PlansManager(plans).get_configuration(configuration)
        compatibility.check_data(plans, planned, dataset_json)
        compatibility.refuse_cascade(cls.__name__, configuration, planned)
        if cls.build_network_architecture is nnUNetTrainer.build_network_architecture:
            compatibility.refuse_planned_network(cls.__name__, planned.network_arch_class_name)

    def build_method(self, network: nn.Module, supervision: Supervision) -> Method:
        """Build the method, which computes the loss of a step; `network` is the student. See `nnunet_dycon.methods`."""
        raise NotImplementedError(f"{type(self).__name__} is a base class; choose a trainer from: nnunet_dycon list")

    def feature_stage(self) -> FeatureStage:
        """Return the network stage whose output is used as features; by default the stage with stride nearest to 8."""
        return compatibility.stage_nearest_to_stride_8(self)

    @preflight.with_memory_advice
    def initialize(self) -> None:
        """Initialize as in nnU-Net, then build the method and add its trainable modules to the optimizer."""
        super().initialize()
        self.network = with_fixed_shapes(self.network)  # type: ignore[has-type]
        with compatibility.deep_supervision_off(self):  # the teacher is a copy of the network and does not need it
            self.method = self.build_method(self.network, make_supervision(self))
        optimize_with_network(self.method, self.optimizer, self.device, self.is_ddp)
        finetune.schedule(self, self.training_settings)
        # After the teacher was copied, and before the first forward pass: torch.compile ignores later hooks.
        self._tap = FeatureTap(unwrap(self.network), self.feature_stage().name) if self.method.uses_features else None

    def _student(self, images: torch.Tensor) -> StudentOutput:
        if self.method.labeler is not None:
            self._recorder.mark(self.method.labeler)  # methods call it before the student
        logits = self.network(images)  # the wrapped network: DDP synchronizes gradients only there
        self._recorder.mark("student")
        return StudentOutput.of(logits, None if self._tap is None else self._tap.take())

    @property
    def progress(self) -> float:
        """Training progress, from 0 (start) to 1 (end)."""
        steps = self.current_epoch * self.num_iterations_per_epoch + self._step_in_epoch
        return steps / (self.num_epochs * self.num_iterations_per_epoch)

    @property
    def unlabeled_batch_size(self) -> int:
        """Number of unlabeled patches per step and GPU."""
        numbers = len(self._cases.labeled.identifiers), len(self._cases.images.identifiers)
        return self.training_settings.unlabeled_batch_size or unlabeled_patches(self.batch_size, *numbers)

    @property
    def settings(self) -> dict[str, dict]:
        """All settings: name of a group, such as "method_settings" -> dict of the settings in this group."""
        return {"training_settings": asdict(self.training_settings), "method_settings": asdict(self.method_settings)}

    @property
    def curves(self) -> dict[str, list[float]]:
        """Curves of loss terms, diagnostics and durations: name -> one value per epoch, the mean over its steps."""
        return self._recorder.curves

    @ends_in_one_line()
    def on_train_start(self) -> None:
        """Check cases, split and settings, run nnU-Net's hook, and write settings and cases to nnunet_dycon.json."""
        self._sparse = on_rank_zero(self._check_before_training)
        is_new, folder = self._resumed_settings is None, Path(self.output_folder)
        with waiting_for_rank_zero(), preflight.file_errors_explained(folder):
            super().on_train_start()
            if self.local_rank == 0:
                about = type(self).__name__, self.settings, self._cases.identifiers
                update_record(folder, *about, is_new, self.print_to_log_file)
        if is_new:
            self.method.before_first_step()  # here because pretrained weights are loaded after initialize
        self.logger.update_config(self.settings)
        for line in filter(None, (preflight.describe_batch(self, self._cases), caveat_of(type(self).__name__))):
            self.print_to_log_file(line)
        self._stop_request.can_wait = True

    def _check_before_training(self) -> list[str]:
        folder = Path(self.output_folder)
        self._lock.acquire()
        if self._resumed_settings is not None:
            current = {kind: getattr(self, kind) for kind in self.settings}
            preflight.check_settings(self._resumed_settings, current, folder, self.print_to_log_file)
        sparse = preflight.check_cases(self.preprocessed_dataset_folder, self.fold, self.unlabeled_cases, self._lock)
        if self._resumed_settings is None and not self.disable_checkpointing:
            checkpoints.set_aside(folder, self.print_to_log_file)  # --c would prefer an earlier final checkpoint
        return sparse

    def get_dataloaders(self):
        """Return the two augmenters: training (labeled and unlabeled patches) and validation (labeled patches)."""
        self._cases = loader.TrainingCases.of(self, self.get_tr_and_val_datasets(), self._sparse)
        loaders = loader.make_loaders(self, self._cases)
        return augmenters.start(*loaders, self.device.type == "cuda", lambda: self._stop_request.is_made)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._step_in_epoch = 0
        self._recorder.start(self.device)

    @ends_in_one_line()
    def train_step(self, batch: dict) -> dict:
        """Run one training step, and return its loss terms and diagnostics: name -> value."""
        self._recorder.mark("data")
        labeled, unlabeled = loader.to_batches(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            terms = self.method(self._student, labeled, unlabeled, self.progress)
        self._recorder.mark("losses")
        gradients = self._guarded_step.backward(terms, self.optimizer, self.grad_scaler, self._stop_request.is_made)
        self._recorder.mark("backward")
        if self._guarded_step.update(gradients, self.optimizer, self.grad_scaler, labeled.keys + unlabeled.keys):
            self.method.after_optimizer_step()
        self._recorder.mark("update")
        self._step_in_epoch += 1
        if gradients.stop:
            preemption.save_and_exit(self, self.curves, self._step_in_epoch)
        return gradients.values

    def validation_step(self, batch: dict) -> dict:
        """Run nnU-Net's validation step. If SIGTERM has been received, save a checkpoint and exit instead."""
        if on_any_rank(self._stop_request.is_made, self.device):
            preemption.save_and_exit(self, self.curves, self._step_in_epoch)
        return super().validation_step(batch)

    @preflight.with_memory_advice
    def run_training(self) -> None:
        """Run nnU-Net's training. On SIGTERM, finish the step, write a checkpoint and exit."""
        with self._stop_request.listening(self.is_ddp), closing(self._lock):
            super().run_training()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Run nnU-Net's hook. Record and log losses and diagnostics, averaged over the steps with a finite loss."""
        super().on_train_epoch_end(replace_lost(train_outputs))
        self._recorder.end(self.current_epoch, train_outputs).log(self.logger.loggers, self.print_to_log_file)

    def on_epoch_end(self) -> None:
        """Run nnU-Net's hook and plot the curves. Plot pseudo-labels when checkpoint_latest.pth is written."""
        with waiting_for_rank_zero():
            super().on_epoch_end()
            if self.local_rank == 0:
                plots.draw_curves(Path(self.output_folder), self.curves, self.print_to_log_file)
                if self.current_epoch % self.save_every == 0 and self.current_epoch < self.num_epochs:
                    pseudo_label_page.draw(self, self.method, self._cases)

    @ends_in_one_line()
    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint atomically, with settings, curves and the modules of `self.method` added."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return super().save_checkpoint(filename)
        self._lock.check()
        state = {"settings": self.settings, "method": checkpoints.method_state(self.method), "curves": self.curves}
        checkpoints.save_extended(filename, super().save_checkpoint, state)

    @preflight.with_memory_advice
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint, including `self.method`. With --c, load the newest readable one if this one is damaged."""
        if self._continue_training:
            self._continue_training, log = False, self.print_to_log_file  # later calls load exactly the given file
            filename_or_checkpoint = checkpoints.find_readable(filename_or_checkpoint, log, self._lock.acquire)
        own = checkpoints.load_state(filename_or_checkpoint, type(self).__name__)
        if not self.was_initialized:
            self.initialize()
        with checkpoints.fitting(filename_or_checkpoint):
            super().load_checkpoint(filename_or_checkpoint)
            checkpoints.load_method_state(self.method, own["method"], filename_or_checkpoint, type(self).__name__)
        self._recorder.curves, self._resumed_settings = own["curves"], own["settings"]

    def companions(self) -> dict[str, tuple[str, nn.Module]]:
        """Return the networks except the student: checkpoint name -> (name of the network's trainer class, network)."""
        teacher = self.method.teacher
        return {} if teacher is None else {checkpoints.TEACHER: (type(self).__name__, teacher.network)}

    @ends_in_one_line()
    def on_train_end(self) -> None:
        """Run nnU-Net's hook, then write a checkpoint of each network in `companions`, and plot pseudo-labels."""
        with waiting_for_rank_zero():
            super().on_train_end()
            if self.local_rank == 0 and not self.disable_checkpointing:
                checkpoints.save_companions(Path(self.output_folder), self.companions())
                pseudo_label_page.draw(self, self.method, self._cases)
        if on_any_rank(self._stop_request.is_made, self.device):
            preemption.end(self, "stopped by SIGTERM after the end of training; run its validation with --val")

    @preflight.with_memory_advice
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Run nnU-Net's validation; raise an error with the file name if a case cannot be read."""
        with loader.naming_unreadable_cases(self):
            super().perform_actual_validation(save_probabilities)
