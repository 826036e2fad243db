"""The engine for logits that are not built: rows, tiles, products, and one pass over them."""
