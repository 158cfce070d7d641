"""The kernel laboratory: kernels checked, compiled for GPUs that are not here, and ranked."""
