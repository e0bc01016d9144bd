"""Cost of a graph: `formulas` for one operator, `count` for one graph, `closed_form` for all schedules of a graph."""
