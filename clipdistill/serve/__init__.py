"""The search service over HTTP, and its page."""
