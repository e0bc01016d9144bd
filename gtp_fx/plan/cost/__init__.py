"""What a graph costs: `formulas` per operator, `count` for a graph as it stands, `closed_form` for every schedule of it."""
