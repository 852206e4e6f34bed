"""Datasets that this package makes: the synthetic CT of the demo and the tests."""
