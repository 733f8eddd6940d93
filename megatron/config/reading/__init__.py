"""How a configuration is read: flags, files, what of them holds where several speak, and whether they go together."""
