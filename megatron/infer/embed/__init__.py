"""From a file of proteins to a file of what a model says of them, in parts, so that a killed run can go on."""
