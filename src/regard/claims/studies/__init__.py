"""Claims of the papers in the room `studies`."""
