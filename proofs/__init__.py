"""What takes long and is run by hand: the benchmarks, what breaks around paygate, and breaks of its own code."""
