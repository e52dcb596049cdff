"""Networks of lip synchronisation, and their published weights."""
