"""From an nn.Module, or from Dynamo's graph, to one ATen graph."""
