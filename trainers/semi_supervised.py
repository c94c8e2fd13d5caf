"""What the semi-supervised trainers share: nnU-Net's trainer with a second stream of data and a method's step."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_dycon import __version__, checkpoints
from nnunet_dycon.batches import StudentOutput, Targets
from nnunet_dycon.data.labeled import check_fingerprint, check_split, labeled_identifiers
from nnunet_dycon.data.loader import (
    LabeledLoader,
    TwoStreamLoader,
    UnlabeledDataset,
    UnlabeledLoader,
    Workers,
    augmenter,
    require_readable,
    to_batches,
)
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.data.views import TwoViews, stronger
from nnunet_dycon.environment import require_nnunet
from nnunet_dycon.errors import NotSupported, UserError, ends_in_one_line, explained
from nnunet_dycon.features import FeatureStage, FeatureTap
from nnunet_dycon.files import require_writable
from nnunet_dycon.label_kinds import Classes, Regions
from nnunet_dycon.methods import Method, Supervision
from nnunet_dycon.monitoring import SECONDS, StepTimer, append_epoch, mean_of_finite, terms_of_loss
from nnunet_dycon.pictures import draw_progress
from nnunet_dycon.ranks import first_does, highest_of_ranks, ids_for_ddp, require_even_batch
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.rules import nearest_stage, unlabeled_patches
from nnunet_dycon.run_record import completed, record_file, write_record
from nnunet_dycon.stopping import EXIT_CODE, StopRequest
from nnunet_dycon.teacher import unwrap
from nnunet_dycon.trainers import registered_name
from nnunet_dycon.trainers.length import TrainingLength
from nnunet_dycon.trainers.pseudo_label_page import draw_page

_GRADIENT_NORM = 12  # nnU-Net's
_LOST_STEPS_LIMIT = 10


@dataclass(frozen=True)
class TrainingSettings(TrainingLength):
    """How long and on which views a semi-supervised trainer trains.

    Attributes:
        unlabeled_batch_size: unlabeled patches a step and GPU; None for `nnunet_dycon.rules.unlabeled_patches`.
        strong_intensities: whether the strong view has more intensity augmentation than nnU-Net's, see
            `nnunet_dycon.data.views.stronger`.
    """

    unlabeled_batch_size: int | None = None
    strong_intensities: bool = False


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer, learning from labeled cases and from the unlabeled ones of imagesUn.

    A subclass names its settings and builds its method; everything else is here or nnU-Net's.
    """

    training_settings = TrainingSettings()
    method_settings: Any  # a frozen dataclass
    # What a patch takes, in all its views and networks, against one in the network that nnU-Net plans for.
    patch_memory = 1.0
    second_network: type[nnUNetTrainer] | None = None  # whose build_network_architecture makes a second student

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
            self._refuse_unsupported(plans, configuration, dataset_json)
            batch_size = PlansManager(plans).get_configuration(configuration).batch_size
            first_does(partial(require_even_batch, batch_size))
            self._goes_on = bool(plans.get("continue_training"))  # --c; nnU-Net takes it out
            with explained(OSError, "nnU-Net cannot make the folder of this training; check nnUNet_results"):
                super().__init__(plans, configuration, fold, dataset_json, device)
        self.training_settings.apply_to(self)
        self.unlabeled_cases = UnlabeledCases(self.plans_manager, configuration, dataset_json)
        self.method: Method | None = None  # -> initialize
        self.curves: dict[str, list[float]] = {}  # means over the steps of each epoch, see nnunet_dycon.monitoring
        self._timer: StepTimer  # -> on_train_epoch_start
        self._cases: dict[str, list[str]] = {}  # -> get_dataloaders
        self._tap: FeatureTap | None = None
        self._step_in_epoch = 0
        self._outputs: list[dict] = []  # of the steps of this epoch
        self._before_stop: list[dict] = []  # of those done when the training was stopped in the middle of an epoch
        self._stop_request = StopRequest()
        self._lost_in_a_row = 0  # steps
        self._resumed_settings: dict[str, dict] | None = None

    @classmethod
    def _refuse_unsupported(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        manager = PlansManager(plans)
        if manager.get_configuration(configuration).previous_stage_name is not None:
            raise NotSupported(
                f"{cls.__name__} cannot train {configuration}: in a cascade each case needs the previous stage's "
                "prediction, which unlabeled cases do not have. Train 3d_fullres or 3d_lowres instead."
            )
        if cls.build_network_architecture is nnUNetTrainer.build_network_architecture:
            cls._refuse_network(manager.get_configuration(configuration).network_arch_class_name)

    @classmethod
    def _refuse_network(cls, name: str) -> None:
        """Raise NotSupported if the plans name a network that nnU-Net's trainer cannot build, as Primus."""
        network: Any = locate(name)  # None of a name that is found in nnU-Net's own way alone
        taken = {} if network is None else signature(network).parameters
        if taken and "deep_supervision" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            raise NotSupported(
                f"{cls.__name__} cannot train {name.rpartition('.')[2]}: it has no deep supervision, and no encoder "
                "with stages to tap features from. Use nnU-Net's default or residual-encoder plans."
            )

    def build_method(self, network: nn.Module, supervision: Supervision) -> Method:
        """The method that computes this trainer's step (nnunet_dycon.methods)."""
        raise NotImplementedError(f"{type(self).__name__} builds no method: use one of its subclasses")

    def feature_stage(self) -> FeatureStage:
        """The encoder stage whose stride is nearest to 8.

        Raises:
            NotSupported: the network has no encoder with stages.
        """
        encoder = getattr(unwrap(self.network), "encoder", None)
        if not hasattr(encoder, "stages"):
            raise NotSupported(
                f"{type(self).__name__} needs a network with encoder.stages to tap features from; "
                f"{type(unwrap(self.network)).__name__} has none. Use nnU-Net's default or residual-encoder plans."
            )
        index = nearest_stage(self.configuration_manager.pool_op_kernel_sizes)
        return FeatureStage(f"encoder.stages.{index}", encoder.output_channels[index])

    def initialize(self) -> None:
        """After nnU-Net's: build the method, have its modules trained too, and tap the student."""
        super().initialize()
        network = unwrap(self.network)
        if self.enable_deep_supervision and not hasattr(getattr(network, "decoder", None), "deep_supervision"):
            raise NotSupported(
                f"{type(self).__name__} cannot train {type(network).__name__} with deep supervision, which it does not "
                "have. Use nnU-Net's default or residual-encoder plans."
            )
        # A teacher needs the highest resolution only. It is a copy of the network, made by the method.
        if self.enable_deep_supervision:
            self.set_deep_supervision_enabled(False)
        self.method = self.build_method(self.network, self._supervision)
        if self.enable_deep_supervision:
            self.set_deep_supervision_enabled(True)
        for name, child in self.method.named_children():
            trainable = [parameter for parameter in child.parameters() if parameter.requires_grad]
            if not trainable:
                continue
            self.optimizer.add_param_group({"params": trainable})
            if self.is_ddp:
                child = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # as nnU-Net does with the network
                setattr(self.method, name, DistributedDataParallel(child, device_ids=ids_for_ddp(self.device)))
        # After the teacher was copied, which would have copied the hook, too; before the first forward pass, because
        # torch.compile ignores a later one.
        if self.method.uses_features:
            self._tap = FeatureTap(unwrap(self.network), self.feature_stage().name)

    @property
    def _supervision(self) -> Supervision:
        level_weights = tuple(self.loss.weight_factors) if self.enable_deep_supervision else (1.0,)
        labels = self.label_manager
        kind = Regions(labels.has_ignore_label) if labels.has_regions else Classes(labels.ignore_label)
        weighted_loss = kind.weighted_loss(level_weights, self.configuration_manager.batch_dice)
        return Supervision(self._supervised_loss, weighted_loss, kind)

    def _supervised_loss(self, logits: list[torch.Tensor], targets: Targets) -> torch.Tensor:
        return self.loss(logits if self.enable_deep_supervision else logits[0], targets)

    def _student(self, images: torch.Tensor) -> StudentOutput:
        if self.method.labeler is not None:
            self._timer.mark(self.method.labeler)  # which a method asks before the student
        # Through the wrapper: DDP synchronises gradients only there.
        logits = self.network(images)
        self._timer.mark("student")
        return StudentOutput.of(logits, None if self._tap is None else self._tap.take())

    @property
    def progress(self) -> float:
        """How much of the training is done, from 0 to 1. A resumed run goes on where it was."""
        steps = self.current_epoch * self._steps_per_epoch + self._step_in_epoch
        return steps / (self.num_epochs * self._steps_per_epoch)

    @property
    def _steps_per_epoch(self) -> int:
        """Also of an epoch of which only the rest is left, which is nnU-Net's number of iterations then."""
        return len(self._before_stop) + self.num_iterations_per_epoch

    @property
    def unlabeled_batch_size(self) -> int:
        """Unlabeled patches a step and GPU."""
        if self.training_settings.unlabeled_batch_size is not None:
            return self.training_settings.unlabeled_batch_size
        return unlabeled_patches(self.batch_size, *(len(self._cases[stream]) for stream in ("labeled", "unlabeled")))

    @property
    def settings(self) -> dict[str, dict]:
        """All that is set for this training, as plain numbers."""
        return {"training_settings": asdict(self.training_settings), "method_settings": asdict(self.method_settings)}

    @ends_in_one_line()
    def on_train_start(self) -> None:
        """Before nnU-Net's: check what a user may have got wrong, so that no time is lost on it."""
        first_does(self._check_and_prepare)
        with explained(OSError, f"training cannot begin in {self.output_folder}; make room, or mend what is named"):
            super().on_train_start()
            # A resumed run leaves the record as it is.
            folder = Path(self.output_folder)
            if self.local_rank == 0 and not (self._resumed_settings is not None and record_file(folder).is_file()):
                write_record(folder, type(self).__name__, self.settings, self._cases)
        if self._resumed_settings is None:
            self.method.before_first_step()  # pretrained weights have arrived since initialize
        self.logger.update_config(self.settings)
        self._tell_batch()
        self._log_caveat()
        self._stop_request.can_wait = True

    def _check_and_prepare(self) -> None:
        """Raise UserError if this training cannot begin. Preprocesses the unlabeled cases if that is left to do."""
        require_writable(Path(self.output_folder))
        self._check_settings()
        folder = Path(self.preprocessed_dataset_folder)
        labeled = labeled_identifiers(folder, self.unlabeled_cases.arguments)
        check_split(folder, labeled, self.fold)
        check_fingerprint(folder.parent, folder.name, self.unlabeled_cases.dataset_id)
        self.unlabeled_cases.require(default_num_processes)
        self.unlabeled_cases.check_not_labeled(labeled, set(self.unlabeled_cases.identifiers()))
        if self._resumed_settings is None and not self.disable_checkpointing:
            checkpoints.set_aside(Path(self.output_folder), self._tell)  # nnU-Net's --c looks for a final one first

    def _check_settings(self) -> None:
        """Raise UserError if the checkpoint that is gone on from was trained with other settings of the method."""
        if self._resumed_settings is None:
            return
        for kind, now in self.settings.items():
            before = completed(self._resumed_settings.get(kind, {}), getattr(self, kind))
            changed = [name for name, value in now.items() if before[name] != value]
            if not changed:
                continue
            told = ", ".join(f"{name} {before[name]} (now {now[name]})" for name in changed)
            if kind == "method_settings":
                raise UserError(
                    f"the checkpoint in {self.output_folder} was trained with other settings: {told}; go on with "
                    "those, or start a subclass with a name of its own from its weights, with -pretrained_weights"
                )
            self.print_to_log_file(f"WARNING: the training that is gone on with had other settings: {told}")

    def _tell_batch(self) -> None:
        batch, unlabeled = self.batch_size, self.unlabeled_batch_size
        planned = self.configuration_manager.batch_size  # for all GPUs together; a batch of ours is for each
        needed = self.patch_memory * (batch + unlabeled) / planned
        self.print_to_log_file(
            f"{len(self._cases['labeled'])} labeled and {len(self._cases['unlabeled'])} unlabeled cases. Each of the "
            f"{self.num_epochs * self._steps_per_epoch} steps trains on {batch} labeled and {unlabeled} "
            f"unlabeled patches: about {needed:.3g} times the memory the plans were made for. If that is too much: "
            f"nnUNetv2_plan_experiment with -gpu_memory_target at 1/{needed:.3g} of what you have and a new "
            "-overwrite_plans_name, preprocess, and train with -p; or a subclass with unlabeled_batch_size=1.",
            also_print_to_console=True,
        )

    def _log_caveat(self) -> None:
        trainer = registered_name(type(self).__name__)
        if trainer is not None and TRAINERS[trainer].caveat:
            self.print_to_log_file(f"{trainer}: {TRAINERS[trainer].caveat}", also_print_to_console=True)

    def get_dataloaders(self):
        """As nnU-Net's, with the two-stream loader for training."""
        if self.dataset_class is None:  # type: ignore[has-type]
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        mask_channels = self.configuration_manager.use_mask_for_norm
        labels = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }
        transforms = self.get_training_transforms(
            patch_size, rotation, scales, mirror_axes, dummy_2d, use_mask_for_norm=mask_channels, **labels
        )
        two_views = TwoViews(stronger(transforms) if self.training_settings.strong_intensities else transforms)
        labeled, validation = self.get_tr_and_val_datasets()
        unlabeled = UnlabeledDataset(self.unlabeled_cases.folder, self.unlabeled_cases.identifiers())
        streams = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation}
        self._cases = {name: list(dataset.identifiers) for name, dataset in streams.items()}
        unlabeled_remedy = (
            f"remove {self.unlabeled_cases.folder.name}, and run: nnunet_dycon preprocess_unlabeled "
            f"{self.unlabeled_cases.arguments}"
        )
        options = {
            "remedy": self._labeled_remedy,
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        unlabeled_loader = UnlabeledLoader(
            unlabeled,
            self.unlabeled_batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            transforms=two_views,
            mask_channels=mask_channels,
            remedy=unlabeled_remedy,
        )
        train_loader = TwoStreamLoader(
            labeled,
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            transforms=two_views,
            unlabeled=unlabeled_loader,
            **options,
        )
        validation_loader = LabeledLoader(
            validation,
            self.batch_size,
            patch_size,
            patch_size,
            self.label_manager,
            transforms=self.get_validation_transforms(scales, **labels),
            **options,
        )
        processes = get_allowed_n_proc_DA()
        pin_memory = self.device.type == "cuda"
        start = partial(augmenter, pin_memory=pin_memory, is_ending=lambda: self._stop_request.is_made)
        augmenters = (
            start(train_loader, processes, max(6, processes // 2)),
            start(validation_loader, min(processes, max(1, processes // 2)), max(3, processes // 4)),
        )
        for started in augmenters:
            next(started)
        return augmenters

    @property
    def _labeled_remedy(self) -> str:
        return f"run: nnUNetv2_preprocess {self.unlabeled_cases.arguments}"

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._outputs = list(self._before_stop)
        self._step_in_epoch = len(self._outputs)
        self._timer = StepTimer(self.device)

    @ends_in_one_line()
    def train_step(self, batch: dict) -> dict:
        """One step of the method, optimised as nnU-Net does; gradients of network and heads are clipped together."""
        self._timer.mark("data")
        labeled, unlabeled = to_batches(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        # nnU-Net, too, autocasts on CUDA only.
        with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
            terms = self.method(self._student, labeled, unlabeled, self.progress)
        self._timer.mark("losses")
        if self.grad_scaler is None:
            terms["loss"].backward()
        else:
            self.grad_scaler.scale(terms["loss"]).backward()
            self.grad_scaler.unscale_(self.optimizer)
        optimised = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(optimised, _GRADIENT_NORM)
        # One transfer for all: it is the only place where the host waits for the device.
        tensors = {name: value for name, value in terms.items() if isinstance(value, torch.Tensor)}
        stop = highest_of_ranks(self._stop_request.is_made, self.device)
        norm, stop, *values = torch.stack([norm, stop, *tensors.values()]).detach().float().cpu().numpy()
        terms |= dict(zip(tensors, values))
        self._timer.mark("backward")
        # The norm of the gradients is the same on all ranks, so that all take the same branch.
        if np.isfinite(norm):
            self._optimizer_step()
            self.method.after_optimizer_step()
            self._lost_in_a_row = 0
        else:
            self._lose_step(terms["loss"], labeled.keys + unlabeled.keys)
        self._timer.mark("update")
        self._step_in_epoch += 1
        self._outputs.append(terms)
        if stop:
            self._stop()
        return terms

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, unless the training is to stop."""
        if highest_of_ranks(self._stop_request.is_made, self.device):
            self._stop()
        return super().validation_step(batch)

    def _stop(self) -> NoReturn:
        """Write all that a training needs to go on with the next step, and end, on all ranks at the same step.

        Raises:
            SystemExit: always.
        """
        steps = self._steps_per_epoch
        # What this epoch has logged is logged again when it is whole.
        for curve in (*self.logger.get_checkpoint().values(), *self.curves.values()):
            del curve[self.current_epoch :]
        self._before_stop = self._outputs
        self.current_epoch -= 1  # nnU-Net writes the next one
        self.save_checkpoint(str(Path(self.output_folder) / checkpoints.LATEST))
        self.current_epoch += 1
        if self.is_ddp:
            dist.barrier()  # who ends while the first one writes has it killed
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, Workers):
                loader._finish()
        kept = "nothing was kept" if self.disable_checkpointing else f"{checkpoints.LATEST} is written; go on with --c"
        self._tell_end(
            f"stopped by SIGTERM in epoch {self.current_epoch}, after {self._step_in_epoch} of {steps} steps; {kept}"
        )

    def _tell_end(self, text: str) -> NoReturn:
        self._tell(text)
        raise SystemExit(EXIT_CODE)

    def _tell(self, text: str) -> None:
        if self.local_rank == 0:
            self.print_to_log_file(text, also_print_to_console=True)

    @ends_in_one_line()
    def run_training(self) -> None:
        """nnU-Net's; on SIGTERM, it finishes the step and writes a checkpoint before it ends."""
        # With -num_gpus a signal means that another rank has failed, which this one may be waiting for in its step.
        if not self.is_ddp or dist.is_torchelastic_launched():
            self._stop_request.listen()
        try:
            super().run_training()
        finally:
            self._stop_request.ignore()

    def _optimizer_step(self) -> None:
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def _lose_step(self, loss: float, keys: tuple[str, ...]) -> None:
        """After a step with a non-finite gradient: move nothing, tell why, and give up after too many in a row."""
        has_cause = not np.isfinite(loss)
        cause_is_known = has_cause
        if self.is_ddp:  # it may lie with another rank, which then tells
            cause_is_known = bool(highest_of_ranks(has_cause, self.device))
        if self.grad_scaler is not None:
            scale = self.grad_scaler.get_scale()
            # It overflows now and then, and is lowered then; by hand, because the scaler does not notice if only the
            # norm overflows. For each bad case it stays: lowered, it would end where gradients vanish.
            self.grad_scaler.update(scale if cause_is_known else scale * self.grad_scaler.get_backoff_factor())
            if not cause_is_known and scale > 1:
                return
        self._lost_in_a_row += 1
        if has_cause or not cause_is_known:
            warning = (
                f"WARNING: loss {loss} with a non-finite gradient in epoch {self.current_epoch}; no network was "
                f"changed by this step. Its cases: {', '.join(keys)}"
            )
            # Only rank 0 has a log.
            self.print_to_log_file(warning) if self.local_rank == 0 else print(f"rank {self.local_rank}: {warning}")
        if self._lost_in_a_row == _LOST_STEPS_LIMIT:
            raise UserError(
                f"{_LOST_STEPS_LIMIT} steps in a row had a non-finite loss or gradient; {self.log_file} names their "
                "cases. Repair a case that is in all of them; if there is none, training has diverged: go on from the "
                "last checkpoint with --c, or train again with a lower learning rate"
            )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """After nnU-Net's: log and keep the mean of each value. Steps without a finite loss count nowhere."""
        timed_steps = len(train_outputs)
        train_outputs = self._before_stop + train_outputs
        self.num_iterations_per_epoch, self._before_stop = self._steps_per_epoch, []
        finite = [output for output in train_outputs if np.isfinite(output["loss"])]
        means = {name: mean_of_finite(values) for name, values in collate_outputs(finite or train_outputs).items()}
        # As many as there were steps: nnU-Net wants the same number from all ranks.
        super().on_train_epoch_end([output if np.isfinite(output["loss"]) else means for output in train_outputs])
        if self.is_ddp:
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, means)
            means = {name: mean_of_finite(rank[name] for rank in ranks) for name in means}
        seconds = {part: total / max(1, timed_steps) for part, total in self._timer.totals().items()}
        values = means | {SECONDS + part: mean for part, mean in seconds.items()}
        append_epoch(self.curves, self.current_epoch, values)
        for name, value in values.items():
            for logger in self.logger.loggers:  # those beside nnU-Net's own, which knows no curves but its own
                logger.log(f"semi_supervised/{name}", value, self.current_epoch)
        terms = terms_of_loss(means)
        monitors = [name for name in means if name != "loss" and name not in terms]
        for names in (terms, monitors):
            self.print_to_log_file(*(f"{name} {means[name]:.4f}" for name in names))
        self.print_to_log_file("seconds a step:", *(f"{part} {mean:.3f}" for part, mean in seconds.items()))

    def on_epoch_end(self) -> None:
        """After nnU-Net's, with its progress.png: draw the curves of what this package adds."""
        super().on_epoch_end()
        if self.local_rank == 0:
            self._try_to_draw("ssl_progress.png", partial(draw_progress, self.curves))

    @ends_in_one_line()
    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the method's state in it, written whole or not at all.

        With each latest and with the final one, a page of pseudo-labels is drawn.

        Raises:
            SystemExit: it cannot be written; the one before stays.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        state = {
            "version": __version__,
            "settings": self.settings,
            "method": {name: unwrap(child).state_dict() for name, child in self.method.named_children()},
            "curves": self.curves,
            "steps": [{name: float(value) for name, value in output.items()} for output in self._before_stop],
        }
        checkpoints.save_extended(filename, super().save_checkpoint, state)
        if Path(filename).name in (checkpoints.LATEST, checkpoints.STUDENT) and not self._before_stop:
            self._draw_pseudo_labels()

    def _draw_pseudo_labels(self) -> None:
        identifiers = self._cases.get("unlabeled")
        if not identifiers or self.method.labeler is None:
            return
        cases = UnlabeledDataset(self.unlabeled_cases.folder, identifiers)
        name = f"pseudo_labels_epoch_{self.current_epoch:04d}.png"
        self._try_to_draw(name, partial(draw_page, self, self.method, cases))

    def _try_to_draw(self, name: str, draw: Callable[[Path], None]) -> None:
        try:
            draw(Path(self.output_folder) / name)
        except (RuntimeError, MemoryError, OSError) as error:  # a picture is not worth a training
            self.print_to_log_file(f"WARNING: no {name}: {' '.join(str(error).split())}")

    @ends_in_one_line()
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's, and the method's state. With --c, a damaged file is named and the one before it is taken.

        Raises:
            SystemExit: the file was not written by this trainer, lacks a part of its state, or fits other plans.
        """
        if self._goes_on:
            self._goes_on = False  # what is loaded after the training is meant to be that very file
            find = partial(checkpoints.whole_one, Path(filename_or_checkpoint), self._tell)
            filename_or_checkpoint = str(first_does(find))
        own = checkpoints.load_state(filename_or_checkpoint, type(self).__name__)
        if not self.was_initialized:
            self.initialize()
        remedy = "start from its weights with -pretrained_weights instead"
        unfit = (RuntimeError, KeyError, ValueError, TypeError)
        with explained(unfit, f"{filename_or_checkpoint} does not fit, as if plans had changed; {remedy}"):
            super().load_checkpoint(filename_or_checkpoint)
            for name, child in self.method.named_children():
                if name not in own["method"]:
                    raise UserError(f"{filename_or_checkpoint} has no state of the {name} to go on from; {remedy}")
                unwrap(child).load_state_dict(own["method"][name])
        self.curves = own["curves"]
        self._before_stop = own.get("steps", [])
        self.num_iterations_per_epoch = max(0, self.num_iterations_per_epoch - len(self._before_stop))
        self._resumed_settings = own["settings"]

    def companions(self) -> dict[str, tuple[str, nn.Module]]:
        """The networks beside the student that predict, too.

        Returns:
            By the name of the checkpoint that each gets, the name of the trainer that builds it, and the network.
        """
        teacher = self.method.teacher
        return {} if teacher is None else {checkpoints.TEACHER: (type(self).__name__, teacher.network)}

    @ends_in_one_line()
    def on_train_end(self) -> None:
        """After nnU-Net's: write the companions' weights as models of their own, for nnUNetv2_predict -chk."""
        super().on_train_end()
        if self.local_rank == 0 and not self.disable_checkpointing:
            folder = Path(self.output_folder)
            for file, (builder, network) in self.companions().items():
                checkpoints.save_for_prediction(
                    folder / file, folder / checkpoints.STUDENT, network.state_dict(), trainer_name=builder
                )
            (folder / checkpoints.PREVIOUS).unlink(missing_ok=True)  # as nnU-Net does with the latest
        if highest_of_ranks(self._stop_request.is_made, self.device):
            self._tell_end("stopped by SIGTERM after the training, which is complete; --val runs its validation")

    @ends_in_one_line()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, which says nothing of the case that it cannot read."""
        try:
            super().perform_actual_validation(save_probabilities)
        except Exception:
            require_readable(self.preprocessed_dataset_folder, self.do_split()[1], self._labeled_remedy)
            raise
