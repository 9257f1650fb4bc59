"""Sounds: how a sound file becomes the model's input, a log-mel picture, and back to look at."""
