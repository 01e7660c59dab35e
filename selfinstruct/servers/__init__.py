"""Engines that we bring up and take down, each seen as an OpenAI-compatible endpoint, and the weights they load."""
