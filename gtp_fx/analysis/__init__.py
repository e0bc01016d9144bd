"""What a typed graph holds: blocks, branches, liveness. Nothing here changes a graph."""
