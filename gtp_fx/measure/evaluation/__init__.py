"""Evaluation of optimised models on a user's images: accuracy or agreement, time and memory, row by row.

evaluate      `gtp_fx.evaluate`
image_set     a folder of images on disk, with labels where there are some
data          such a folder, or a user's batches, as one kind of batches
found         what is found on an image, and sums of it
record        what was found so far, in files
base_outputs  the original's outputs, in files
intervals     intervals of 95 %
times         time and memory in interleaved rounds
rows          what was found, as values
evaluation    these values as one, kept as JSON
tables        these values as tables
draw          and as a picture
"""
