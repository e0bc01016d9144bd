"""The weights of a model, and the safetensors files that they are in.

All that a model holds is saved: what its state dict has, and the buffers that it leaves out. Where the model writes
files of its own (Hugging Face's do), these have most of it, under their own names or others; what isn't there goes
into a file beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.errors import GtpError, LoadError, SaveError

MODEL, BESIDE = "model.safetensors", "gtp_fx.safetensors"
"""The file of a state dict, and the one for what no other file has."""
_PREFIX = "gtp_fx."
"""Begins the names in the file beside, so that none is another file's."""


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all of a model's tensors: its state dict's, and the buffers that are not in it. They are not copied.

    Raises SaveError where one of them has no numbers that a file can hold.
    """
    state = dict(model.state_dict(keep_vars=True))
    state.update((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name not in state)
    for name, value in state.items():
        if why := _why_not(value):
            raise SaveError(f"{name} {why}")
    return state


def _why_not(value: Any) -> str:
    """Return why a value of a state dict can't be written to a file; "" where it can."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__} in the model's state dict, and safetensors holds tensors alone"
    if value.is_meta:
        return "is on the meta device, so it has no numbers: load the model with weights"
    if type(value.data) is not Tensor:
        return (
            f"is a {type(value.data).__name__}, of which safetensors holds no such kind: save before quantising or "
            f"sharding, and do that to what gtp_fx.load returns"
        )
    if value.layout is not torch.strided or value.is_quantized:
        return f"is of layout {value.layout} and dtype {value.dtype}, and safetensors holds dense tensors alone"
    return ""


def form(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape: "float32[3, 4]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def digest_of(tensor: Tensor) -> str:
    """Return a digest of a tensor's form and bits."""
    digest = hashlib.sha256(form(tensor).encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_all(digests: Mapping[str, str]) -> str:
    """Return one digest for those of all tensors, by name."""
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()


def written_state(folder: Path, state: Mapping[str, Tensor], digests: Mapping[str, str]) -> dict[str, str]:
    """Write what the files in a folder don't have yet; return the name in the files of every tensor of `state`.

    Nothing has to be written where a file has the very bits, under whatever name.
    """
    own = list(folder.glob("*.safetensors"))
    stored: dict[str, str] = {}
    for name, tensor in read_files(own).items():
        stored[digest_of(tensor)] = name
    missing = {name: tensor for name, tensor in state.items() if digests[name] not in stored}
    _write(folder / BESIDE, {f"{_PREFIX}{name}": tensor for name, tensor in missing.items()})
    return {name: f"{_PREFIX}{name}" if name in missing else stored[digests[name]] for name in state}


def _write(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors to a file; numbers that several of them share are written for each, as safetensors wants it."""
    if not state:
        return
    apart: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in state.items():
        dense = tensor.detach().contiguous()
        apart[name] = dense.clone() if dense.untyped_storage().data_ptr() in known else dense
        known.add(dense.untyped_storage().data_ptr())
    try:
        required().save_file(apart, file, metadata={"format": "pt"})
    except Exception as error:  # of kinds that differ between its releases
        raise SaveError(f"safetensors can't write {file.name}: {error}") from error


def write_state_dict(file: Path, model: nn.Module) -> None:
    """Write a model's state dict as others read it: a tensor that has several names under the first of them."""
    named: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        named.setdefault(id(tensor), name)
    _write(file, {name: state[name] for name in named.values()})


def read_files(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors in files by name, on the CPU. Raises LoadError where one can't be read."""
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found.update(required(LoadError).load_file(file))
        except GtpError:
            raise
        except Exception as error:  # of kinds that differ between its releases
            raise LoadError(f"{file} can't be read: {error}") from error
    return found


def required(raised: type[GtpError] = SaveError) -> Any:
    """Import safetensors' functions for torch. Raises an error of the class given where they can't be."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise raised(
            f"weights are saved as safetensors, which can't be imported ({error}); pip install safetensors"
        ) from error
    return safetensors.torch
