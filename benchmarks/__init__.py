"""marginface beside what its user would otherwise pick, measured in one run."""

import os

from marginface import runtime

runtime.tune_cpu()
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory beside JAX
