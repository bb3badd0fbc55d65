"""Steps of a model on this machine, timed beside what the machine can do at most."""
