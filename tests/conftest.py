"""What has to be decided before anything imports torch or Triton: threads, and who runs kernels."""

import os

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several processes side by side: threads of theirs would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # kernels are Triton's interpreter's then
    os.environ["TRITON_INTERPRET"] = "1"
