"""What a taught model says of proteins: collected from any layout, measured, and written into files."""
