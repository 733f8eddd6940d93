"""What a taught model says of proteins: `collected` from any layout, measured by `metrics` (`ranking`: by how
probabilities rank), written into `files`."""
