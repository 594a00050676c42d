"""Does it matter? The parts of an update, run by themselves: directions from some groups, effects on the others."""
