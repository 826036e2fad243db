"""Side-by-side timings and peak memory on this machine: what `logitless bench` runs."""
