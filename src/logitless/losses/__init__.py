"""What a user calls: every loss and measure, and how each meets logits that are not built."""
