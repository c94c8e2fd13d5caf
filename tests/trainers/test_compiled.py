"""Tests of compiled networks on the CPU, where nnU-Net does not compile.

The default suite traces the networks and runs the traced operations. Tests marked slow also compile them to C++.
"""

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.components.wrappers import unwrap
from nnunet_dycon.data.loader import to_batches
from tests.trainers.test_matrix import METHODS
from tests.trainers.test_matrix import start as start  # a fixture
from tests.trainers.training import seed_everything

REPRESENTATIVE = ["nnUNetTrainerDyCON", "nnUNetTrainerWeakToStrong", "nnUNetTrainerUGPL", "nnUNetTrainerDKUXNet"]


def quick_first() -> list:
    """Return all methods as parameters; all but two are marked slow."""
    others = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in REPRESENTATIVE[:2]]
    return [*REPRESENTATIVE[:2], *others]


@pytest.fixture
def compile_networks(monkeypatch):
    """Return compile_networks(backend), which makes trainers compile, and returns [(compiled module, its inputs)]."""

    def run(backend=None):
        graphs, compile_module = [], torch.compile

        def compile_with_backend(module, **options):
            def record(graph, inputs):
                graphs.append((module, inputs))
                return graph.forward

            return compile_module(module, backend=backend or record, **options)

        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
        monkeypatch.setattr(torch, "compile", compile_with_backend)
        return graphs

    torch._dynamo.reset()
    # Otherwise, networks would silently run without compilation beyond the limit.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield run
    torch._dynamo.reset()


def step_of(trainer, batch) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the loss terms of a batch, and the gradients of the student; 0 for weights that are not used."""
    seed_everything(1)
    terms = trainer.method(trainer._student, *to_batches(batch, trainer.device), 0.5)
    trainer.optimizer.zero_grad()
    terms["loss"].backward()
    parameters = trainer.network.parameters()
    return terms, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def eager_step(start, name: str) -> tuple[dict, tuple]:
    """Return a batch, and the result of `step_of` without compilation."""
    trainer = start(name, "many classes", "3d_fullres")
    batch = next(trainer.dataloader_train)
    trainer._lock.close()  # of the fold, which the compiled training uses, too
    return batch, step_of(trainer, batch)


@pytest.mark.parametrize("name", quick_first())
def test_traced_step_equals_the_eager_step_and_nothing_is_traced_again(start, compile_networks, name):
    batch, expected = eager_step(start, name)
    graphs = compile_networks()
    trainer = start(name, "many classes", "3d_fullres")
    torch.testing.assert_close(step_of(trainer, batch), expected, rtol=1e-4, atol=1e-5)

    def train() -> int:
        """Run two training steps and return the number of graphs so far."""
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
        return len(graphs)

    def validate() -> int:
        trainer.on_validation_epoch_start()
        trainer.validation_step(next(trainer.dataloader_val))
        return len(graphs)

    after_three_steps = train()
    assert train() == after_three_steps
    after_validation = validate()
    assert train() == validate() == after_validation
    dice = unwrap(trainer.loss.loss.dc)  # compiled by nnU-Net for all scales of deep supervision at once
    inputs = [value for module, values in graphs if module is not dice for value in values]
    assert inputs
    assert not any(isinstance(value, torch.SymInt) for value in inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_compiled_step_equals_the_eager_step(start, compile_networks, name):
    batch, expected = eager_step(start, name)
    compile_networks("inductor")
    trainer = start(name, "many classes", "3d_fullres")
    torch.testing.assert_close(step_of(trainer, batch), expected, rtol=1e-3, atol=1e-4)
