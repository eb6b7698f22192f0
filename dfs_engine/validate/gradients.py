"""How `dfs validate` calls an op: arguments in other strides, and gradients of some of them, of some of the outputs."""

from collections.abc import Callable

import torch
from torch import Tensor

Results = dict[str, Tensor]
# A random tensor of a shape: the gradient of an output. The same for the op and for its oracle.
MakeGrad = Callable[[torch.Size], Tensor]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        # Surrounded by NaN, so that reading beside the view shows.
        base = tensor.new_full([*(size + 2 for size in tensor.shape[:-1]), 2 * tensor.size(-1) + 1], float("nan"))
        inside = [slice(1, -1)] * (tensor.dim() - 1) + [slice(1, None, 2)]
        view = base[tuple(inside)]
        return view.copy_(tensor)
    return tensor


def _lay_out_grad(grad_output: Tensor, layout: str) -> Tensor:
    """As `lay_out`; "expanded" has stride 0 in the last axis, as the gradient of a sum has, and so other values."""
    if layout == "expanded":
        return grad_output[..., :1].expand_as(grad_output)
    return lay_out(grad_output, layout)


def layout_of_values(layout: str) -> str:
    """The one layout among those of equal values."""
    return layout if layout == "expanded" else "contiguous"


def as_leaves(tensors: Results, alone: str) -> Results:
    return {name: tensor.detach().requires_grad_(alone in ("", name)) for name, tensor in tensors.items()}


def differentiate(outputs: Results, leaves: Results, layout: str, make_grad: MakeGrad, reader: str = "both") -> Results:
    """Outputs and gradients of the leaves that want one, of a loss that reads all outputs, or one of them."""
    live = [output for name, output in outputs.items() if output.requires_grad and reader in ("both", name)]
    wanting = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grad_outputs = [_lay_out_grad(make_grad(output.shape).to(output), layout) for output in live]
    grads = torch.autograd.grad(live, list(wanting.values()), grad_outputs, materialize_grads=True)
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"grad_{name}": grad for name, grad in zip(wanting, grads, strict=True)}
