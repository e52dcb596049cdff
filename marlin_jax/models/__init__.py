"""Networks; they import nothing of this project."""
