"""Engines that people run models in, each tried in an environment of its own."""
