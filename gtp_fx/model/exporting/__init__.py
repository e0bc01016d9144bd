"""Exports of an optimised model: a torch.export program, an AOTInductor package, ONNX, compiled code."""

from gtp_fx.model.exporting.cache import load_cache
from gtp_fx.model.exporting.files import FORMATS, Exported, export
from gtp_fx.model.exporting.program import exported_program

__all__ = ["FORMATS", "Exported", "export", "exported_program", "load_cache"]
