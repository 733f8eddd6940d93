"""Files of proteins of every readable kind, as blocks of whole records."""
