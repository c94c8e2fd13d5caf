"""Gradients that a loss writes down itself, instead of having its operations recorded."""

import torch


class KeptGradient(torch.autograd.Function):
    """A function whose forward pass computes the gradient of its first argument, too, and saves it if it is needed."""

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_derivative()
        (of_first,) = ctx.saved_tensors
        return gradient * of_first, *(None for _ in ctx.needs_input_grad[1:])


def refuse_second_derivative() -> None:
    """Raise NotImplementedError in a backward pass that is itself recorded (create_graph=True).

    What the gradient was computed from is not in its graph, so that the second derivative would be wrong. torch's
    once_differentiable does not notice where the gradient that comes in is a constant, as a loss's is.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError("this loss can be differentiated once only; leave create_graph away")
