"""Base class of autograd functions with hand-written gradients, and a check that raises for second derivatives."""

import torch


class KeptGradient(torch.autograd.Function):
    """Base class of autograd functions whose forward pass also computes the gradient for the first argument.

    The forward method of a subclass saves this gradient with ``ctx.save_for_backward``, and `backward` multiplies the
    saved gradient with the incoming gradient. The other arguments receive no gradient.
    """

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_derivative()
        (of_first,) = ctx.saved_tensors
        return gradient * of_first, *(None for _ in ctx.needs_input_grad[1:])


def refuse_second_derivative() -> None:
    """Raise NotImplementedError in a backward pass that is itself recorded (create_graph=True).

    A hand-written gradient is not connected to its inputs in the graph, so the second derivative would be wrong.
    torch's once_differentiable does not detect this if the incoming gradient is constant, which is the case for a loss.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError("this loss can be differentiated only once; call backward without create_graph=True")
