"""Networks outside a training run: their sizes, weights and file formats."""
