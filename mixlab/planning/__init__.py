"""From what a person asks for to a plan of a training: every decision, taken once, some of them measured."""
