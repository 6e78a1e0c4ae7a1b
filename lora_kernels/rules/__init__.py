"""What the machinery of others does to an op: vmap, flop counts, DTensors."""
