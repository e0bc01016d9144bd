"""Where there is no GPU, kernels are Triton's interpreter's; it has to be asked for before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
