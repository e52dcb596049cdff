"""Videos with a generated mouth."""
