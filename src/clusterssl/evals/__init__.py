"""Evaluations of frozen features: nearest neighbours, linear classifiers, clusters. All shares are in percent."""
