"""The truth that `logitless check` holds losses and measures to."""
