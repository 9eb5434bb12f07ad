"""What is asked of one GPU, the most valuable first; docs/gpu.md tells how it is run."""
