"""Labels, features, heads, reports: what the binaries in eval/ share."""
