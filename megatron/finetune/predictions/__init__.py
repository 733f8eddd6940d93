"""What a taught model says of proteins: `collected` from any layout, measured by `metrics`, written into `files`."""
