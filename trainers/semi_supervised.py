"""nnU-Net's hooks for semi-supervised training. The parts that they call are in `nnunet_dycon.training`."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dycon.components.batches import StudentOutput
from nnunet_dycon.components.defaults import unlabeled_patches
from nnunet_dycon.components.ema_teacher import unwrap
from nnunet_dycon.components.features import FeatureStage, FeatureTap
from nnunet_dycon.data import augmenters, loader
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.errors import ends_in_one_line, explained
from nnunet_dycon.methods import Method, Supervision
from nnunet_dycon.system.distributed import on_any_rank, on_rank_zero, require_even_batch
from nnunet_dycon.system.environment import require_nnunet
from nnunet_dycon.system.files import require_writable
from nnunet_dycon.trainers import caveat_of
from nnunet_dycon.training import checkpoints, compatibility, plots, preemption, preflight, pseudo_label_page
from nnunet_dycon.training.recorder import EpochRecorder, replace_lost
from nnunet_dycon.training.run_record import record_file, write_record
from nnunet_dycon.training.settings import TrainingSettings
from nnunet_dycon.training.step import GuardedStep, autocast, optimize_with_network
from nnunet_dycon.training.supervision import make_supervision


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with unlabeled cases from imagesUn. A subclass has settings and builds a method."""

    training_settings = TrainingSettings()
    method_settings: Any  # a frozen dataclass
    activation_memory_factor = 1.0  # memory of a patch in all views and networks, relative to nnU-Net's estimate
    second_network: type[nnUNetTrainer] | None = None  # its build_network_architecture builds the second student

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
            with explained(OSError, "nnU-Net cannot make the folder of this training; check nnUNet_results"):
                super().__init__(plans, configuration, fold, dataset_json, device)
        self.training_settings.apply_to(self)
        self.unlabeled_cases = UnlabeledCases(self.plans_manager, configuration, dataset_json)
        self.method: Method | None = None  # -> initialize
        self._resumed_settings: dict[str, dict] | None = None  # -> load_checkpoint
        self._cases: dict[str, list[str]] = {}  # -> get_dataloaders
        self._step_in_epoch = 0
        self._recorder = EpochRecorder()
        self._guarded_step = GuardedStep(self.print_to_log_file)
        self._stop_request = preemption.StopRequest()

    @classmethod
    def check_compatibility(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Raise NotSupported, or UserError for an uneven batch, if this trainer cannot train the configuration."""
        planned = PlansManager(plans).get_configuration(configuration)
        on_rank_zero(partial(require_even_batch, planned.batch_size))
        compatibility.refuse_cascade(cls.__name__, configuration, planned)
        if cls.build_network_architecture is nnUNetTrainer.build_network_architecture:
            compatibility.refuse_planned_network(cls.__name__, planned.network_arch_class_name)

    def build_method(self, network: nn.Module, supervision: Supervision) -> Method:
        """Return the method that computes this trainer's step (nnunet_dycon.methods)."""
        raise NotImplementedError(f"{type(self).__name__} builds no method: use one of its subclasses")

    def feature_stage(self) -> FeatureStage:
        """Return the stage to tap features from."""
        return compatibility.stage_nearest_to_stride_8(self)

    def initialize(self) -> None:
        """After nnU-Net's: build the method, add its modules to the optimizer, and tap the student."""
        super().initialize()
        with compatibility.deep_supervision_off(self):  # the teacher is a copy of the network, and needs none
            self.method = self.build_method(self.network, make_supervision(self))
        optimize_with_network(self.method, self.optimizer, self.device, self.is_ddp)
        # After the teacher was copied, which must not copy the hook, and before the first forward pass, because
        # torch.compile ignores later hooks.
        has_tap = self.method.uses_features
        self._tap = FeatureTap(unwrap(self.network), self.feature_stage().name) if has_tap else None

    def _student(self, images: torch.Tensor) -> StudentOutput:
        if self.method.labeler is not None:
            self._recorder.mark(self.method.labeler)  # methods call it before the student
        logits = self.network(images)  # the wrapped network: DDP synchronizes gradients only there
        self._recorder.mark("student")
        return StudentOutput.of(logits, None if self._tap is None else self._tap.take())

    @property
    def progress(self) -> float:
        """The fraction of the training that is done, from 0 to 1."""
        steps = self.current_epoch * self.num_iterations_per_epoch + self._step_in_epoch
        return steps / (self.num_epochs * self.num_iterations_per_epoch)

    @property
    def unlabeled_batch_size(self) -> int:
        """Unlabeled patches per step and GPU."""
        numbers = (len(self._cases[role]) for role in ("labeled", "unlabeled"))
        return self.training_settings.unlabeled_batch_size or unlabeled_patches(self.batch_size, *numbers)

    @property
    def settings(self) -> dict[str, dict]:
        """All settings of this training, as plain values."""
        return {"training_settings": asdict(self.training_settings), "method_settings": asdict(self.method_settings)}

    @property
    def curves(self) -> dict[str, list[float]]:
        """By name, the mean over the steps of each epoch."""
        return self._recorder.curves

    @ends_in_one_line()
    def on_train_start(self) -> None:
        """nnU-Net's, after the preflight checks; then write the run record."""
        on_rank_zero(self._check_before_training)
        with explained(OSError, f"training cannot start in {self.output_folder}; free disk space or fix the file"):
            super().on_train_start()
            is_new, folder = self._resumed_settings is None, Path(self.output_folder)
            if self.local_rank == 0 and (is_new or not record_file(folder).is_file()):
                write_record(folder, type(self).__name__, self.settings, self._cases)
        if is_new:
            self.method.before_first_step()  # pretrained weights were loaded after initialize
        self.logger.update_config(self.settings)
        self.print_to_log_file(preflight.describe_batch(self, self._cases))
        if caveat := caveat_of(type(self).__name__):
            self.print_to_log_file(caveat)
        self._stop_request.can_wait = True

    def _check_before_training(self) -> None:
        folder = Path(self.output_folder)
        require_writable(folder)
        if self._resumed_settings is not None:
            current = {kind: getattr(self, kind) for kind in self.settings}
            preflight.check_settings(self._resumed_settings, current, folder, self.print_to_log_file)
        preflight.check_cases(Path(self.preprocessed_dataset_folder), self.fold, self.unlabeled_cases)
        if self._resumed_settings is None and not self.disable_checkpointing:
            checkpoints.set_aside(folder, self.print_to_log_file)  # --c would prefer an earlier final one

    def get_dataloaders(self):
        """As nnU-Net's, with a loader of two streams for training."""
        labeled, validation = self.get_tr_and_val_datasets()
        unlabeled = loader.UnlabeledDataset(self.unlabeled_cases.folder, self.unlabeled_cases.identifiers())
        streams = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation}
        self._cases = {role: list(dataset.identifiers) for role, dataset in streams.items()}
        loaders = loader.make_loaders(self, labeled, unlabeled, validation)
        return augmenters.start(*loaders, self.device.type == "cuda", lambda: self._stop_request.is_made)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._step_in_epoch = 0
        self._recorder.start(self.device)

    @ends_in_one_line()
    def train_step(self, batch: dict) -> dict:
        """One step of the method. Gradients of the network and of the method's modules are clipped together."""
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
        """nnU-Net's, unless a stop is requested."""
        if on_any_rank(self._stop_request.is_made, self.device):
            preemption.save_and_exit(self, self.curves, self._step_in_epoch)
        return super().validation_step(batch)

    @ends_in_one_line()
    def run_training(self) -> None:
        """nnU-Net's. On SIGTERM, it finishes the step and writes a checkpoint before it ends."""
        # With -num_gpus, SIGTERM means that another rank has failed, and this one may be waiting for it.
        with self._stop_request.listening(not self.is_ddp or torch.distributed.is_torchelastic_launched()):
            super().run_training()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """nnU-Net's, without lost steps; then record the means and seconds of the epoch."""
        super().on_train_epoch_end(replace_lost(train_outputs))
        epoch = self._recorder.end(self.current_epoch, train_outputs)
        epoch.log(self.logger.loggers, self.print_to_log_file)

    def on_epoch_end(self) -> None:
        """nnU-Net's; then draw the curves, and pseudo-labels after each latest checkpoint."""
        super().on_epoch_end()
        if self.local_rank == 0:
            plots.draw_curves(Path(self.output_folder), self.curves, self.print_to_log_file)
            if self.current_epoch % self.save_every == 0 and self.current_epoch < self.num_epochs:
                pseudo_label_page.draw(self, self.method, self.unlabeled_cases)

    @ends_in_one_line()
    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the state of the method, written completely or not at all."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return super().save_checkpoint(filename)
        state = {"settings": self.settings, "method": checkpoints.method_state(self.method), "curves": self.curves}
        checkpoints.save_extended(filename, super().save_checkpoint, state)

    @ends_in_one_line()
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's, and the state of the method. With --c, the newest readable file replaces a damaged one."""
        if self._continue_training:
            self._continue_training = False  # after the training, exactly the named file is loaded
            filename_or_checkpoint = checkpoints.find_readable(filename_or_checkpoint, self.print_to_log_file)
        own = checkpoints.load_state(filename_or_checkpoint, type(self).__name__)
        if not self.was_initialized:
            self.initialize()
        with checkpoints.fitting(filename_or_checkpoint):
            super().load_checkpoint(filename_or_checkpoint)
            checkpoints.load_method_state(self.method, own["method"], filename_or_checkpoint)
        self._recorder.curves, self._resumed_settings = own["curves"], own["settings"]

    def companions(self) -> dict[str, tuple[str, nn.Module]]:
        """Return the other networks that predict: by name of the checkpoint, the trainer that builds it, and it."""
        teacher = self.method.teacher
        return {} if teacher is None else {checkpoints.TEACHER: (type(self).__name__, teacher.network)}

    @ends_in_one_line()
    def on_train_end(self) -> None:
        """nnU-Net's; then write checkpoints of the companions, for nnUNetv2_predict -chk."""
        super().on_train_end()
        if self.local_rank == 0 and not self.disable_checkpointing:
            checkpoints.save_companions(Path(self.output_folder), self.companions())
            pseudo_label_page.draw(self, self.method, self.unlabeled_cases)
        if on_any_rank(self._stop_request.is_made, self.device):
            preemption.end(self, "stopped by SIGTERM after the training, which is complete; --val runs its validation")

    @ends_in_one_line()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; if a case cannot be read, raise an error with its file."""
        with loader.naming_unreadable_cases(self):
            super().perform_actual_validation(save_probabilities)
