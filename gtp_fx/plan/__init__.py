"""Planning: the possible sites, what a schedule costs there, its expected damage, and the choice of counts."""
