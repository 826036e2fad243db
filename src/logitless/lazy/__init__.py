"""What a user holds in place of logits that are not built."""
