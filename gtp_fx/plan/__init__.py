"""How many tokens leave at which block: candidates, costs, expected damage, the choice."""
