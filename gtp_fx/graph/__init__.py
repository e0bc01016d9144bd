"""FX graphs, whatever they compute: questions about nodes, edits, symbols, verification."""
