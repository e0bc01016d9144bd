"""Capture of an nn.Module, or of Dynamo's graph, as one ATen graph."""
