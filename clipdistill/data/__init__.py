"""The user's pictures and texts: records, readers, splits, views, decoding."""
