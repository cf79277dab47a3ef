"""The type that coordinates, weights and sums are computed in."""

import torch


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 where any argument is, else float32; never half."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
