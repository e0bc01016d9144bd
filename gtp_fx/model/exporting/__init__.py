"""Exports of an optimised model: a torch.export program, an AOTInductor package, ONNX."""

from gtp_fx.model.exporting.files import FORMATS, Exported, export
from gtp_fx.model.exporting.program import exported_program

__all__ = ["FORMATS", "Exported", "export", "exported_program"]
