"""Scores of predictions, equal to scikit-learn's, for many weights at once.

Every score takes weights of the examples, (V,) or (V, R) for R sets of weights:
a bootstrap is a few hundred sets, and scikit-learn takes one set per call.
"""
