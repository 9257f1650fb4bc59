"""Models that leave: for other runtimes, in eight bits, as a package, with a card, to the Hub.

The name has an s because `mixlab.export` is to be a function.
"""
