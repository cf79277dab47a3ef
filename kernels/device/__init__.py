"""Device code: functions that kernels are made of. Nothing here knows of torch, tensors or launches."""
