"""Edit pairs from tar shards to batches: index once, then read by position."""
