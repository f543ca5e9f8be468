"""Controls: what edits the distribution at a visited node, one file each."""
