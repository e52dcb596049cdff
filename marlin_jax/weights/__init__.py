"""File formats of weights: one module each, all to and from `Weights`."""
