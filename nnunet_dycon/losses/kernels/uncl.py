"""Uncertainty-aware consistency loss (UnCL) in blocks of voxels.

Only the logits are kept for the backward pass, which recomputes everything else.
"""

from collections.abc import Iterator

import torch

from nnunet_dycon.losses.entropy import softmax_and_entropy
from nnunet_dycon.losses.kernels.gradients import refuse_second_derivative
from nnunet_dycon.losses.two_classes import as_two_classes
from nnunet_dycon.system.precision import upcast

# Entries of a block of logits: 2^18 are 1 MiB in float32 and fit into a CPU cache; a GPU needs fewer, larger blocks.
_BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**23}


class UnCL(torch.autograd.Function):
    """Autograd function of `uncl_loss`, with a hand-written gradient for the student only.

    The arguments of ``apply`` are the student's logits and the teacher's logits (B, C, *spatial), beta, entropy_weight
    and sigmoid, in this order; see `uncl_loss`.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, beta, entropy_weight, sigmoid):
        ctx.save_for_backward(student_logits, teacher_logits)
        ctx.constants = beta, entropy_weight, sigmoid
        output, distance = (_of_regions, _between_regions) if sigmoid else (softmax_and_entropy, _between_classes)
        total = upcast(student_logits.new_zeros(()))
        for student, teacher in _blocks(student_logits, teacher_logits):
            p, entropy = output(student)
            q, teacher_entropy = output(teacher)
            spread = torch.exp(beta * entropy) + torch.exp(beta * teacher_entropy)
            uncertainty = entropy_weight * beta * (entropy + teacher_entropy)
            total += (distance(p, q) / spread + uncertainty).sum()
        return total / (student_logits.numel() // student_logits.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        """Return the gradient for the student's logits, computed block by block, and None for the other arguments."""
        refuse_second_derivative()
        student_logits, teacher_logits = ctx.saved_tensors
        beta, entropy_weight, sigmoid = ctx.constants
        gradient_of = _gradient_of_regions if sigmoid else _gradient_of_classes
        result = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
        scale = gradient / (student_logits.numel() // student_logits.shape[1])
        for student, teacher, out in _blocks(student_logits, teacher_logits, result):
            out.copy_(gradient_of(student, teacher, beta, entropy_weight, scale))
        return result, None, None, None, None


def _between_classes(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the squared distance ‖p - q‖² of each voxel, (B, voxels), for softmax outputs p and q (B, C, voxels)."""
    return (p - q).square_().sum(1)


def _gradient_of_classes(student, teacher, beta, entropy_weight, scale) -> torch.Tensor:
    r"""Return the gradient of `uncl_loss` with respect to the student's logits z of classes, (B, C, voxels).

    p and q are the softmax outputs of student and teacher, H is the entropy, and η is the weight of the entropy term.
    With :math:`D = \lVert p - q \rVert^2` and :math:`E = e^{\beta H(p)} + e^{\beta H(q)}`, the gradient of the loss of
    one voxel is

    .. math::
        \frac{\partial L}{\partial z_c} = p_c \left(g_c - \sum_k p_k g_k\right), \qquad
        g_c = \frac{2 (p_c - q_c)}{E} - \beta \left(\eta - \frac{D e^{\beta H(p)}}{E^2}\right) \ln p_c

    Args:
        student: (B, C, voxels), the student's logits.
        teacher: (B, C, voxels), the teacher's logits.
        beta: β of `uncl_loss`.
        entropy_weight: η of `uncl_loss`.
        scale: factor of the result: the incoming gradient divided by the number of voxels.
    """
    log_p = torch.log_softmax(student, 1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1, keepdim=True)
    q, teacher_entropy = softmax_and_entropy(teacher)
    own = torch.exp(beta * entropy)
    spread = own + torch.exp(beta * teacher_entropy)[:, None]
    difference = p - q
    distance = difference.square().sum(1, keepdim=True)
    g = 2 * difference / spread - beta * (entropy_weight - distance * own / spread.square()) * log_p
    return scale * p * (g - (p * g).sum(1, keepdim=True))


def _of_regions(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sigmoid of logits (B, R, voxels), and the binary entropy averaged over regions, (B, voxels)."""
    probabilities, entropies = softmax_and_entropy(as_two_classes(logits))
    return probabilities[:, 1], entropies.mean(1)


def _between_regions(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the mean over regions of 2 (p - q)² of each voxel, (B, voxels), for sigmoid outputs p and q."""
    return 2 * (p - q).square_().mean(1)


def _gradient_of_regions(student, teacher, beta, entropy_weight, scale) -> torch.Tensor:
    r"""Return the gradient of `uncl_loss` with respect to the student's logits z of regions, (B, R, voxels).

    p and q are the sigmoid outputs of student and teacher, and H is the binary entropy averaged over the R regions. E
    and η are those of `_gradient_of_classes`. The binary entropy of a region has the derivative
    :math:`-p_r (1 - p_r) z_r` with respect to z_r. With :math:`D = \frac{2}{R} \sum_r (p_r - q_r)^2`, the gradient of
    the loss of one voxel is

    .. math::
        \frac{\partial L}{\partial z_r} = \frac{p_r (1 - p_r)}{R} \left[ \frac{4 (p_r - q_r)}{E}
            - \beta \left(\eta - \frac{D e^{\beta H(p)}}{E^2}\right) z_r \right]

    Args:
        student: (B, R, voxels), the student's logits.
        teacher: (B, R, voxels), the teacher's logits.
        beta: β of `uncl_loss`.
        entropy_weight: η of `uncl_loss`.
        scale: factor of the result: the incoming gradient divided by the number of voxels.
    """
    p, entropy = _of_regions(student)
    q, teacher_entropy = _of_regions(teacher)
    own = torch.exp(beta * entropy)
    spread = own + torch.exp(beta * teacher_entropy)
    of_entropy = beta * (entropy_weight - _between_regions(p, q) * own / spread.square())
    g = 4 * (p - q) / spread[:, None] - of_entropy[:, None] * student
    return scale / student.shape[1] * p * (1 - p) * g


def _blocks(*volumes: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Yield blocks of voxels: for each block a list with one tensor (B, C, voxels) per volume (B, C, *spatial).

    The first two volumes are inputs. Their blocks are upcast to at least float32. The other volumes are outputs and
    must be contiguous. Their blocks are views, so values written to a block are written to the volume.
    """
    first = volumes[0]
    flat = [volume.flatten(2) for volume in volumes]
    voxels = max(1, _BLOCK_ENTRIES.get(first.device.type, 2**20) // (first.shape[0] * first.shape[1]))
    for start in range(0, flat[0].shape[2], voxels):
        parts = [volume[:, :, start : start + voxels] for volume in flat]
        yield [upcast(part) for part in parts[:2]] + parts[2:]
