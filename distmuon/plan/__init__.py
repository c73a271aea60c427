"""Who does it: matrices and buckets as plain data, built from shapes alone."""
