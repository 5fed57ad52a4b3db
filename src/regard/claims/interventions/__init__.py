"""Claims of the papers in the room `interventions`."""
