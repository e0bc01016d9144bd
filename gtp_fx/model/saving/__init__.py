"""An optimised model as a folder: weights as safetensors, and what else it is made of as one JSON file.

record     the JSON file
plain      a call's form and a graph's operators as plain values
tensors    the weights: what a model has, and the files they are in
build      a model by timm's or Hugging Face's name
card       README.md, where an evaluation is saved with the model
write      `OptimizedModel.save_pretrained`
load       `gtp_fx.load`
"""
