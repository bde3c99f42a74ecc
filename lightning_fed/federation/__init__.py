"""The engine: layout, rows, rounds, sampler, exchange, evaluation and checkpoints of a federation."""
