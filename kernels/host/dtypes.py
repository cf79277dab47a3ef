"""The types that are computed in, and that samples have."""

import torch

INTEGERS = frozenset((torch.uint8, torch.int16))
"""Of images whose samples may be rounded."""
WHOLE_NUMBERS = INTEGERS | {torch.int8, torch.int32, torch.int64}


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Of coordinates, weights and sums: float64 where any argument is, else float32; never half."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def sample_dtype(image: torch.Tensor) -> torch.dtype:
    """Of samples that are not rounded to integers: the image's, and float32 of an image of integers."""
    return torch.float32 if image.dtype in INTEGERS else image.dtype
