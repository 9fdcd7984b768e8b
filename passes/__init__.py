"""From a torch graph to the algebra and back: normalise, match, lift, derive, splice."""
